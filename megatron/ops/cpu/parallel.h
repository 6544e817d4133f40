// Loops over PyTorch's own threads: its torch_parallel_for (torch/csrc/stable/c/shim.h, since 2.10), whose address the
// library is given when it is loaded.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#define DEEPY_EXPORT extern "C" __attribute__((visibility("default")))

namespace deepy {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

extern ParallelFor torch_parallel_for;

// Ends the process: a part may have been computed in place, so that neither going on nor doing it again would be right.
[[noreturn]] inline void give_up(const char* why) {
    std::fprintf(stderr, "deepy: %s\n", why);
    std::abort();
}

// Calls body(first, last) for pieces of [begin, end), each of about `grain` or more, at once on PyTorch's threads. The
// body throws nothing but bad_alloc. Where pieces begin depends on the number of threads, so nothing may be summed over
// a piece.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    if (begin >= end) return;
    auto call = [](int64_t first, int64_t last, void* context) {
        try {
            (*static_cast<const Body*>(context))(first, last);
        } catch (const std::bad_alloc&) {
            give_up("a C++ kernel on a CPU found no memory for its copies");
        }
    };
    if (torch_parallel_for(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&body))))
        give_up("PyTorch's threads could not be started");
}

}  // namespace deepy
