// A GPU's words on a CPU: the kernels of megatron/ops/cuda include this in place of their device.cuh, and mean the same.
//
// Every thread of a block is a fiber that runs until it has to wait for others, and every warp runs as far ahead of the
// others as it can, in an order that the caller chooses.
// What a GPU does at a time of its own is done here as late as it may be: a copy to shared memory arrives when its
// thread waits for it, and until then its place holds NaN. Whatever a GPU would do something undefined for ends the
// launch with a sentence: addresses that are not aligned or not the launch's own, a barrier that some threads never
// reach, copies that nobody waits for. Shared memory is NaN at first.

#ifndef DEEPY_DEVICE_CUH
#define DEEPY_DEVICE_CUH

#include <ucontext.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define DEEPY_KERNEL(threads) void
#define DEEPY_INLINE inline

namespace deepy {

struct alignas(16) Vector { uint32_t words[4]; };
struct float2 { float x, y; };
struct bf16 { uint16_t bits; };
using fp16 = _Float16;
using std::min;

namespace host {

struct Index { int x; };
using Copy = std::pair<Vector*, const Vector*>;

// Something that `size` fibers reach together.
struct Barrier {
  int size = 0, reached = 0, passed = 0;
};

struct Block {
  std::unique_ptr<Vector[]> shared;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> lanes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Block* block = nullptr;
  int thread = 0, rank = 0, index = 0;
  bool is_done = false;
  std::vector<Copy> begun;                 // since the last commit
  std::deque<std::vector<Copy>> batches;   // committed, under way
};

// A launch: what the fibers of one cluster see. low, high: the addresses of global memory that vectors may be at.
struct Launch {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  ucontext_t scheduler;
  Fiber* here = nullptr;
  std::string failure;
  bool progressed = false;
  int threads = 0, grid = 0;
  size_t shared = 0;
  const char *low = nullptr, *high = nullptr;
  std::function<void()> body;
};

inline Launch* launch = nullptr;

inline void yield() { swapcontext(&launch->here->context, &launch->scheduler); }

[[noreturn]] inline void fail(const std::string& sentence) {
  launch->failure = sentence;
  for (;;) yield();
}

inline void wait(Barrier& barrier) {
  const int passed = barrier.passed;
  launch->progressed = true;
  if (++barrier.reached == barrier.size) {
    barrier.reached = 0;
    ++barrier.passed;
    return;
  }
  while (barrier.passed == passed) yield();
}

inline bool is_shared(const void* address) {
  const char* memory = reinterpret_cast<const char*>(launch->here->block->shared.get());
  return address >= memory && address < memory + launch->shared;
}

inline void require_vector(const void* address, bool global, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail(std::string(what) + ": an address is no multiple of 16");
  const char* begin = static_cast<const char*>(address);
  if (!global && !is_shared(address)) fail(std::string(what) + ": an address is not in shared memory");
  if (global && (begin < launch->low || begin + 16 > launch->high)) {
    fail(std::string(what) + ": an address is outside of the logits");
  }
}

inline void entry() {
  launch->body();
  Fiber& here = *launch->here;
  size_t left = here.begun.size();
  for (const auto& batch : here.batches) left += batch.size();
  if (left) launch->failure = "a thread ended with copies under way";
  here.is_done = launch->progressed = true;
  for (;;) yield();
}

}  // namespace host

#define threadIdx (deepy::host::Index{deepy::host::launch->here->thread})
#define blockIdx (deepy::host::Index{deepy::host::launch->here->index})
#define blockDim (deepy::host::Index{deepy::host::launch->threads})
#define gridDim (deepy::host::Index{deepy::host::launch->grid})

inline Vector* shared_memory() { return host::launch->here->block->shared.get(); }

inline Vector read_shared(const Vector* source) {
  host::require_vector(source, false, "read_shared");
  return *source;
}

inline Vector read_global(const Vector* source) {
  host::require_vector(source, true, "read_global");
  return *source;
}

inline void write_global(Vector* target, Vector value) {
  host::require_vector(target, true, "write_global");
  *target = value;
}

inline void copy_async(Vector* shared, const Vector* global) {
  host::require_vector(shared, false, "copy_async");
  host::require_vector(global, true, "copy_async");
  std::memset(shared, 0xff, sizeof(Vector));
  host::launch->here->begun.emplace_back(shared, global);
}

inline void commit_copies() {
  auto& here = *host::launch->here;
  here.batches.push_back(std::exchange(here.begun, {}));
}

inline void wait_copies(int newer) {
  auto& batches = host::launch->here->batches;
  for (; batches.size() > size_t(min(newer, 7)); batches.pop_front()) {
    for (const auto& [shared, global] : batches.front()) *shared = *global;
  }
}

inline void block_barrier() { host::wait(host::launch->here->block->barrier); }

inline float shuffle_xor(float value, int mask) {
  auto& here = *host::launch->here;
  auto& warp = here.block->warps[here.thread / 32];
  here.block->lanes[here.thread] = value;
  host::wait(warp);
  const float other = here.block->lanes[here.thread ^ mask];
  host::wait(warp);
  return other;
}

inline float exponential(float value) { return std::exp(value); }
inline int cluster_size() { return int(host::launch->blocks.size()); }
inline int cluster_rank() { return host::launch->here->rank; }
inline void cluster_barrier() { host::wait(host::launch->barrier); }

inline float2 read_of_rank(const float2* shared, int rank) {
  const auto* own = reinterpret_cast<const char*>(shared_memory());
  const auto* theirs = reinterpret_cast<const char*>(host::launch->blocks[rank].shared.get());
  return *reinterpret_cast<const float2*>(theirs + (reinterpret_cast<const char*>(shared) - own));
}

inline float to_float(float value) { return value; }
inline float to_float(fp16 value) { return float(value); }
inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) { return value; }
template <>
inline fp16 from_float<fp16>(float value) { return fp16(value); }
template <>
inline bf16 from_float<bf16>(float value) {
  if (value != value) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to the nearest, and halves to the even one
}

namespace host {

// Lets each thread of a warp run until it waits; returns whether any of them got further.
inline bool run_warp(Launch& now, int warp, int order) {
  now.progressed = false;
  for (int turn = 0; turn < 32 && now.failure.empty(); ++turn) {
    now.here = &now.fibers[size_t(warp) * 32 + (order == 1 ? 31 - turn : turn ^ order % 32)];
    if (!now.here->is_done) swapcontext(&now.scheduler, &now.here->context);
  }
  return now.progressed && now.failure.empty();
}

// Runs one cluster's fibers to their end. order: 0 first to last, 1 last to first, any other the seed of a shuffle.
// A warp runs as far ahead of the others as barriers let it.
inline void run_cluster(Launch& now, int first_block, int blocks, int order) {
  launch = &now;
  now.blocks = std::vector<Block>(blocks);
  now.fibers = std::vector<Fiber>(size_t(blocks) * now.threads);
  now.barrier = {blocks * now.threads};
  for (int rank = 0; rank < blocks; ++rank) {
    Block& block = now.blocks[rank];
    block.shared.reset(new Vector[now.shared / 16]);
    std::memset(block.shared.get(), 0xff, now.shared);
    block.barrier = {now.threads};
    block.warps.assign(now.threads / 32, {32});
    block.lanes.assign(now.threads, 0.0f);
    for (int thread = 0; thread < now.threads; ++thread) {
      Fiber& fiber = now.fibers[size_t(rank) * now.threads + thread];
      fiber.block = &block;
      fiber.thread = thread;
      fiber.rank = rank;
      fiber.index = first_block + rank;
      fiber.stack.resize(32768);
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
  }
  std::vector<int> warps(now.fibers.size() / 32);
  std::iota(warps.begin(), warps.end(), 0);
  if (order == 1) std::reverse(warps.begin(), warps.end());
  if (order > 1) std::shuffle(warps.begin(), warps.end(), std::mt19937(order));
  for (bool moved = true; moved && now.failure.empty();) {
    moved = false;
    for (const int warp : warps) {
      while (run_warp(now, warp, order)) moved = true;
    }
  }
  const bool all_done = std::all_of(now.fibers.begin(), now.fibers.end(), [](const Fiber& each) { return each.is_done; });
  if (!all_done && now.failure.empty()) now.failure = "some threads wait at a barrier that others never reach";
}

}  // namespace host
}  // namespace deepy

#endif  // DEEPY_DEVICE_CUH
