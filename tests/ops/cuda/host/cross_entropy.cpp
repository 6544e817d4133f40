// The kernels of megatron/ops/cuda/cross_entropy.cuh on a CPU, as functions that Python can call.

#include "device.h"
// The kernels see it as their own device.cuh.
#include "cross_entropy.cuh"

#ifndef ONLY_FP32_LOSSES  // one kernel compiles sooner than nine
#define ONLY_FP32_LOSSES false
#endif

namespace {

std::string failure;

// What the device of a launch offers, and how its threads take turns.
struct Situation {
  int64_t per_block, per_multiprocessor;
  int has_clusters, clusters, order;
  const char *low, *high;

  deepy::Device device() const { return {size_t(per_block), size_t(per_multiprocessor), has_clusters != 0}; }
};

template <typename T, deepy::Kind KIND>
void start(const deepy::Request& request, const Situation& situation) {
  const deepy::Plan plan = deepy::plan_of<T, KIND>(request, situation.device());
  const auto work = deepy::work_of<T>(request, plan);
  const int clusters = int(std::min<int64_t>(request.rows, situation.clusters));
  deepy::host::Launch launch;
  launch.threads = plan.threads;
  launch.grid = clusters * plan.cluster;
  launch.shared = plan.shared;
  launch.low = situation.low;
  launch.high = situation.high;
  launch.body = [&work] { deepy::walk_rows<T, KIND>(work); };
  for (int cluster = 0; cluster < clusters && launch.failure.empty(); ++cluster) {
    deepy::host::run_cluster(launch, cluster * plan.cluster, plan.cluster, situation.order);
  }
  failure = launch.failure;
}

}  // namespace

extern "C" {

// Runs a kernel on the rows and returns why it could not, or "".
const char* run(int kind, int element, const deepy::Request* request, const Situation* situation) {
  failure.clear();
  deepy::launch_of(deepy::Kind(kind), deepy::Element(element), [&]<typename T, deepy::Kind KIND>() {
    if constexpr (!ONLY_FP32_LOSSES || (std::is_same_v<T, float> && KIND == deepy::Kind::losses)) {
      start<T, KIND>(*request, *situation);
    }
  });
  return failure.c_str();
}

// The plan for rows that are kept: threads, blocks of a cluster, columns of each, vectors and bytes of shared memory.
void plan(int columns, int element_size, const Situation* situation, int64_t* found) {
  const deepy::Plan plan = deepy::plan_of_rows(columns, element_size, situation->device(), sizeof(deepy::Scratch));
  const int64_t values[] = {plan.threads, plan.cluster, plan.share, plan.resident, int64_t(plan.shared)};
  std::copy(std::begin(values), std::end(values), found);
}

}
