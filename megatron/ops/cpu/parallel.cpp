#include "parallel.h"

namespace deepy {
ParallelFor torch_parallel_for = nullptr;
}

DEEPY_EXPORT int64_t deepy_set_parallel_for(void* function) {
    deepy::torch_parallel_for = reinterpret_cast<deepy::ParallelFor>(function);
    return 0;
}
