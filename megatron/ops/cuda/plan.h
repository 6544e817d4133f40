// How rows of logits are spread over a GPU: plain C++, for the launch and for the tests.

#pragma once

#include <algorithm>
#include <cstddef>

namespace deepy {

// What a device offers. per_block, per_multiprocessor: bytes of shared memory.
struct Device {
  size_t per_block;
  size_t per_multiprocessor;
  bool has_clusters;
};

// How a row is taken. threads: of a block. cluster: blocks that share a row. share: columns of each of them.
// resident: vectors of 16 bytes of a block's share that shared memory holds. shared: bytes of it, in all.
struct Plan {
  int threads;
  int cluster;
  int share;
  int resident;
  size_t shared;
};

// Vectors that a thread reads before it looks at any of them.
constexpr int GROUP = 2;

constexpr int LARGEST_CLUSTER = 8;

// Shared memory that the device keeps for itself, for each block.
constexpr size_t RESERVED = 1024;

// Columns of each of `cluster` blocks; a multiple of 8, so that all shares are aligned as the row is.
inline int share_of(int columns, int cluster) { return ((columns + cluster - 1) / cluster + 7) / 8 * 8; }

// The plan for rows that are kept between two passes. scratch: bytes of shared memory that hold no row.
//
// Two blocks to a multiprocessor where that is possible, by splitting the row over a cluster if need be: the arithmetic
// of one goes on beside the memory traffic of the other. What shared memory cannot hold is read twice.
inline Plan plan_of_rows(int columns, int element, const Device& device, size_t scratch) {
  const auto vectors_of = [&](int cluster) { return size_t(share_of(columns, cluster)) * element / 16; };
  const size_t half = std::min(device.per_block, device.per_multiprocessor / 2 - RESERVED);
  Plan plan{};
  plan.cluster = 1;
  while (device.has_clusters && plan.cluster < LARGEST_CLUSTER && vectors_of(plan.cluster) * 16 + scratch > half) {
    plan.cluster *= 2;
  }
  const size_t vectors = vectors_of(plan.cluster);
  plan.share = share_of(columns, plan.cluster);
  plan.resident = int(std::min(vectors, (device.per_block - scratch) / 16));
  plan.shared = scratch + size_t(plan.resident) * 16;
  plan.threads = plan.shared <= half ? 512 : 1024;
  while (plan.threads > 128 && vectors < size_t(plan.threads) * GROUP) plan.threads /= 2;
  return plan;
}

// The plan for rows that are read once: nothing is kept.
inline Plan plan_of_stream(int columns, size_t scratch) { return {512, 1, share_of(columns, 1), 0, scratch}; }

}  // namespace deepy
