// Starts the kernels of cross_entropy.cuh: how many blocks, with how much shared memory, in which clusters.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cross_entropy.cuh"

namespace deepy {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch of anybody would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// What the device offers a kernel. Clusters need a kernel that was compiled for them, not the device alone.
Device device_of(const void* kernel, int device) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return {size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
          size_t(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)), attributes.ptxVersion >= 90};
}

// Clusters that run side by side on the whole device.
int resident_clusters(const void* kernel, const cudaLaunchConfig_t& config, const Plan& plan, int device) {
  int count = 0;
  if (plan.cluster > 1) {
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  } else {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, plan.threads, plan.shared), "cudaOccupancy");
    count *= attribute(cudaDevAttrMultiProcessorCount, device);
  }
  if (count == 0) throw std::runtime_error("the device has no room for a block of the cross entropy kernel");
  return count;
}

template <typename T, Kind KIND>
void launch(const Request& request, int device, void* stream) {
  void (*const walk)(const Work<T>) = walk_rows<T, KIND>;
  const void* kernel = reinterpret_cast<const void*>(walk);
  const Plan plan = plan_of<T, KIND>(request, device_of(kernel, device));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared)), "shared memory");
  if (plan.resident > 0) {  // what the L1 cache could have is of no use to it
    const int carveout = cudaSharedmemCarveoutMaxShared;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout), "shared memory");
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.cluster));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = plan.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  const int64_t clusters = resident_clusters(kernel, config, plan, device);
  config.gridDim.x = unsigned(std::min(clusters, request.rows) * plan.cluster);
  check(cudaLaunchKernelEx(&config, walk, work_of<T>(request, plan)), "cross entropy");
}

}  // namespace

void start(Kind kind, Element element, const Request& request, int device, void* stream) {
  if (request.rows == 0) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  launch_of(kind, element, [&]<typename T, Kind KIND>() { launch<T, KIND>(request, device, stream); });
}

}  // namespace deepy
