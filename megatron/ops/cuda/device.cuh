// What the kernels of this folder ask of a GPU, and the only place that says it in CUDA's and PTX's own words.
//
// The tests of these kernels give the same names another meaning, on a CPU, and compile the same kernels with it.

#ifndef DEEPY_DEVICE_CUH
#define DEEPY_DEVICE_CUH

#include <cfloat>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEEPY_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define DEEPY_INLINE __device__ __forceinline__

namespace deepy {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// 16 bytes, the widest that one instruction moves.
using Vector = uint4;

DEEPY_INLINE Vector read_shared(const Vector* source) { return *source; }

// Of a pointer that came to the kernel in a struct, the compiler does not know that it is one to global memory.
DEEPY_INLINE Vector read_global(const Vector* source) {
  Vector value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(source))
               : "memory");
  return value;
}

DEEPY_INLINE void write_global(Vector* target, Vector value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// The block's part of shared memory, of the size that it is started with.
DEEPY_INLINE Vector* shared_memory() {
  extern __shared__ Vector memory[];
  return memory;
}

// Begins to copy 16 bytes from global to shared memory, past the registers and the L1 cache.
DEEPY_INLINE void copy_async(Vector* shared, const Vector* global) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(__cvta_generic_to_global(global)) : "memory");
}

// Makes one batch of the copies that this thread began since the last call.
DEEPY_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int NEWER>
DEEPY_INLINE void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory");
}

// Waits until at most `newer` of this thread's batches, the last ones, are under way; the others it can read.
DEEPY_INLINE void wait_copies(int newer) {
  switch (newer) {
    case 0: return wait_for_all_but<0>();
    case 1: return wait_for_all_but<1>();
    case 2: return wait_for_all_but<2>();
    case 3: return wait_for_all_but<3>();
    case 4: return wait_for_all_but<4>();
    case 5: return wait_for_all_but<5>();
    case 6: return wait_for_all_but<6>();
    default: return wait_for_all_but<7>();
  }
}

DEEPY_INLINE void block_barrier() { __syncthreads(); }
DEEPY_INLINE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// e^x, whose relative error is 2e-7 + 1e-7 |x|; what falls below 1e-38 is 0. Two instructions, where expf and __expf
// take care of such small numbers with four more.
DEEPY_INLINE float exponential(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value * 1.44269504f));
  return power;
}

// A cluster is a few blocks that see each other's shared memory, from sm_90 on; before that each block is alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

DEEPY_INLINE int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

DEEPY_INLINE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of all blocks of the cluster: what any wrote before is seen by all after it. Not `.aligned`, which would
// need the threads of a warp to come together.
DEEPY_INLINE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// What another block of the cluster holds at this place of its shared memory.
DEEPY_INLINE float2 read_of_rank(const float2* shared, int rank) {
  const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t theirs;
  float2 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(theirs) : "memory");
  return value;
}

#else

DEEPY_INLINE int cluster_size() { return 1; }
DEEPY_INLINE int cluster_rank() { return 0; }
DEEPY_INLINE void cluster_barrier() {}
DEEPY_INLINE float2 read_of_rank(const float2* shared, int) { return *shared; }

#endif

DEEPY_INLINE float to_float(float value) { return value; }
DEEPY_INLINE float to_float(bf16 value) { return __bfloat162float(value); }
DEEPY_INLINE float to_float(fp16 value) { return __half2float(value); }

template <typename T>
DEEPY_INLINE T from_float(float value);
template <>
DEEPY_INLINE float from_float<float>(float value) { return value; }
template <>
DEEPY_INLINE bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }
template <>
DEEPY_INLINE fp16 from_float<fp16>(float value) { return __float2half_rn(value); }

}  // namespace deepy

#endif  // DEEPY_DEVICE_CUH
