// Cross entropy over rows of logits, which become their own gradients, with one reading and one writing of them.
//
//     loss = log z + m - x[label];   m = max(x);   z = sum(exp(x - m));   gradient = exp(x - m) / z - [column is label]
//
// A block keeps its row in shared memory between the pass that finds m and z and the pass that writes the gradient.
// Each thread copies, reads and writes vectors of its own, so that nothing but the sums waits for other threads; and a
// vector's place is asked for the next row as soon as its gradient is written: while one row is written, the next one
// arrives. A row that one block cannot hold is shared by a cluster of them, who tell each other their m and z (sm_90);
// what even that cannot hold is read twice.

#pragma once

#include "cross_entropy.h"
#include "plan.h"
#include "rows.cuh"

namespace deepy {

// A Request for one type of logits. share, resident: of the Plan.
template <typename T>
struct Work {
  T* logits;
  const int64_t* labels;
  float* results;
  const float* maxima;
  const float* totals;
  int64_t stride;
  int64_t rows;
  int64_t first;
  int columns;
  int share;
  int resident;
  float scale;
};

// m and z of some values. Of none: the least number instead of -infinity, whose difference to itself is no number.
struct Statistics {
  float maximum = -FLT_MAX;
  float total = 0.0f;
};

constexpr int WARPS = 32;

// The part of shared memory that holds no row. Two of each, for rows that follow each other: between the reading of one
// and its next writing lies the barrier of the other.
struct alignas(16) Scratch {
  float2 of_warp[2][WARPS];
  float2 of_block[2];
};

// The same, bit by bit, whichever of the two is the first.
DEEPY_INLINE Statistics joined(Statistics one, Statistics other) {
  const bool is_larger = one.maximum >= other.maximum;
  const float larger = is_larger ? one.total : other.total, smaller = is_larger ? other.total : one.total;
  const float factor = exponential(-fabsf(one.maximum - other.maximum));
  return {fmaxf(one.maximum, other.maximum), fmaf(smaller, factor, larger)};
}

DEEPY_INLINE Statistics joined_in_warp(Statistics mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    mine = joined(mine, {shuffle_xor(mine.maximum, distance), shuffle_xor(mine.total, distance)});
  }
  return mine;
}

// The statistics of all threads of all blocks of the cluster, known to all of them.
DEEPY_INLINE Statistics joined_in_cluster(Statistics mine, Scratch* scratch, int parity) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, blocks = cluster_size();
  mine = joined_in_warp(mine);
  if (lane == 0) scratch->of_warp[parity][warp] = {mine.maximum, mine.total};
  block_barrier();
  mine = Statistics{};
  if (lane < warps) mine = {scratch->of_warp[parity][lane].x, scratch->of_warp[parity][lane].y};
  mine = joined_in_warp(mine);
  if (blocks == 1) return mine;
  if (threadIdx.x == 0) scratch->of_block[parity] = {mine.maximum, mine.total};
  cluster_barrier();
  Statistics all;
  for (int rank = 0; rank < blocks; ++rank) {
    const float2 theirs = read_of_rank(&scratch->of_block[parity], rank);
    all = joined(all, {theirs.x, theirs.y});
  }
  return all;
}

// The columns of a row that a block of the cluster has; of a row beyond the last, none.
template <typename T>
DEEPY_INLINE Slice<T> slice_of_row(const Work<T>& work, int64_t row, int rank) {
  if (row >= work.rows) return {work.logits, 0, 0, 0};
  const int begin = min(rank * work.share, work.columns);
  return slice_of(work.logits + row * work.stride + begin, min(work.share, work.columns - begin));
}

// A vector's number within a slice: threads stand side by side, so that a warp reads 512 bytes in a row.
DEEPY_INLINE int vector_of(int stage, int each) {
  return (stage * GROUP + each) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
}

// Asks for the vectors of a stage that shared memory holds; they are one batch, even where there are none.
template <typename T>
DEEPY_INLINE void request(const Slice<T>& slice, Vector* held, int resident, int stage) {
  const int end = min(slice.body, resident);
#pragma unroll
  for (int each = 0; each < GROUP; ++each) {
    const int vector = vector_of(stage, each);
    if (vector < end) copy_async(held + vector, slice.vectors() + vector);
  }
  commit_copies();
}

// Takes the first `count` vectors of a group into the statistics: one factor for the sum so far, then all its values.
template <typename T>
DEEPY_INLINE void take(Statistics& found, const Vector (&group)[GROUP], int count) {
  float largest = found.maximum;
#pragma unroll
  for (int each = 0; each < GROUP; ++each) {
    const Values<T> values = unpacked<T>(group[each]);
#pragma unroll
    for (int value = 0; value < PER_VECTOR<T>; ++value) {
      largest = each < count ? fmaxf(largest, values.of[value]) : largest;
    }
  }
  float total = found.total * exponential(found.maximum - largest);
#pragma unroll
  for (int each = 0; each < GROUP; ++each) {
    if (each < count) {
      const Values<T> values = unpacked<T>(group[each]);
      float sum = 0.0f;
#pragma unroll
      for (int value = 0; value < PER_VECTOR<T>; ++value) sum += exponential(values.of[value] - largest);
      total += sum;
    }
  }
  found = {largest, total};
}

// Reads this thread's vectors of a stage from shared or global memory, those below `end`; returns how many there are.
template <bool SHARED>
DEEPY_INLINE int read_group(Vector (&group)[GROUP], const Vector* source, int stage, int begin, int end) {
  int count = 0;
#pragma unroll
  for (int each = 0; each < GROUP; ++each) {
    const int vector = begin + vector_of(stage, each);
    group[each] = Vector{};
    if (vector < end) {
      group[each] = SHARED ? read_shared(source + vector) : read_global(source + vector);
      ++count;
    }
  }
  return count;
}

// What the passes over one row share.
template <typename T>
struct Row {
  Slice<T> slice;
  Slice<T> next;  // of the row after this one
  Vector* held;
  int resident;
  int stages;  // batches in which the resident part of a row is asked for
  float edge;  // this thread's value of the edges, if it has one
  bool has_edge;
};

// Returns the statistics of this thread's values. RELEASE: no other pass follows, so the next row may arrive.
template <typename T, bool RELEASE>
DEEPY_INLINE Statistics read_row(const Row<T>& row) {
  Statistics found;
  Vector group[GROUP];
  for (int stage = 0; stage < row.stages; ++stage) {
    wait_copies(RELEASE ? row.stages - 1 : row.stages - 1 - stage);
    take<T>(found, group, read_group<true>(group, row.held, stage, 0, min(row.slice.body, row.resident)));
    if (RELEASE) request(row.next, row.held, row.resident, stage);
  }
  for (int stage = 0; row.resident + vector_of(stage, 0) < row.slice.body; ++stage) {
    take<T>(found, group, read_group<false>(group, row.slice.vectors(), stage, row.resident, row.slice.body));
  }
  if (row.has_edge) found = joined(found, {row.edge, 1.0f});
  return found;
}

// What a gradient is made of. factor: scale / z. label: the label's column in the slice, or something outside of it.
struct Gradient {
  float maximum;
  float factor;
  float scale;
  int label;
};

DEEPY_INLINE float gradient_of(float value, const Gradient& how, bool is_label) {
  const float gradient = exponential(value - how.maximum) * how.factor;
  return is_label ? gradient - how.scale : gradient;
}

// Writes the gradient of the vector whose first column in the slice is given.
template <typename T>
DEEPY_INLINE void write_gradient(Vector* target, const Vector& vector, int column, const Gradient& how) {
  Values<T> values = unpacked<T>(vector);
#pragma unroll
  for (int each = 0; each < PER_VECTOR<T>; ++each) values.of[each] = gradient_of(values.of[each], how, false);
  const int label = how.label - column;
  if (label >= 0 && label < PER_VECTOR<T>) {
#pragma unroll
    for (int each = 0; each < PER_VECTOR<T>; ++each) values.of[each] -= each == label ? how.scale : 0.0f;
  }
  write_global(target, packed<T>(values));
}

template <typename T>
DEEPY_INLINE void write_group(const Row<T>& row, const Vector (&group)[GROUP], int count, int first, const Gradient& how) {
#pragma unroll
  for (int each = 0; each < GROUP; ++each) {
    const int vector = first + each * static_cast<int>(blockDim.x);
    if (each < count) {
      write_gradient<T>(row.slice.vectors() + vector, group[each], row.slice.head + vector * PER_VECTOR<T>, how);
    }
  }
}

// Writes the gradient over this thread's logits; each place of shared memory is then asked to take the next row's.
template <typename T>
DEEPY_INLINE void write_row(const Row<T>& row, const Gradient& how) {
  Vector group[GROUP];
  // What shared memory does not hold comes first: it was read last, so that the L2 cache most likely has it.
  for (int stage = 0; row.resident + vector_of(stage, 0) < row.slice.body; ++stage) {
    const int count = read_group<false>(group, row.slice.vectors(), stage, row.resident, row.slice.body);
    write_group(row, group, count, row.resident + vector_of(stage, 0), how);
  }
  for (int stage = 0; stage < row.stages; ++stage) {
    const int count = read_group<true>(group, row.held, stage, 0, min(row.slice.body, row.resident));
    write_group(row, group, count, vector_of(stage, 0), how);
    request(row.next, row.held, row.resident, stage);
  }
  if (row.has_edge) {
    const int column = row.slice.edge(threadIdx.x);
    row.slice.start[column] = from_float<T>(gradient_of(row.edge, how, column == how.label));
  }
}

// The column of a label, or -1 where these columns are not the label's.
template <typename T>
DEEPY_INLINE int column_of(const Work<T>& work, int64_t label) {
  label -= work.first;
  return label >= 0 && label < work.columns ? static_cast<int>(label) : -1;
}

// One cluster of blocks, often of one, takes every so manieth row.
template <typename T, Kind KIND>
DEEPY_KERNEL(1024) walk_rows(const Work<T> work) {
  const int blocks = cluster_size(), rank = cluster_rank(), thread = threadIdx.x;
  const int64_t step = gridDim.x / blocks;
  int64_t index = blockIdx.x / blocks;
  Scratch* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const int in_stage = GROUP * static_cast<int>(blockDim.x);
  Row<T> row{{}, slice_of_row(work, index, rank), shared_memory() + sizeof(Scratch) / sizeof(Vector), work.resident,
             (work.resident + in_stage - 1) / in_stage, 0.0f, false};
  for (int stage = 0; stage < row.stages; ++stage) request(row.next, row.held, row.resident, stage);
  int64_t upcoming = work.labels[index];  // a row ahead, so that nothing waits for it
  for (int parity = 0; index < work.rows; index += step, parity ^= 1) {
    row.slice = row.next;
    row.next = slice_of_row(work, index + step, rank);
    row.has_edge = thread < row.slice.edges();
    if (row.has_edge) row.edge = to_float(row.slice.start[row.slice.edge(thread)]);
    const int label = column_of(work, upcoming);
    if (index + step < work.rows) upcoming = work.labels[index + step];
    Statistics all;
    if (KIND == Kind::gradient) {
      all = {work.maxima[index], work.totals[index]};
    } else {
      // Read before the barrier, after which another thread may write the gradient over it.
      const bool tells = thread == 0 && rank == 0;
      const float target = tells && label >= 0 ? to_float(work.logits[index * work.stride + label]) : 0.0f;
      all = joined_in_cluster(read_row<T, KIND == Kind::statistics>(row), scratch, parity);
      if (tells && KIND == Kind::statistics) {
        work.results[index] = all.maximum;
        work.results[work.rows + index] = all.total;
        work.results[2 * work.rows + index] = target;
      } else if (tells) {
        work.results[index] = logf(all.total) + (all.maximum - target);
      }
    }
    if (KIND != Kind::statistics) {
      const int column = label < 0 ? -1 : label - rank * work.share;
      write_row(row, {all.maximum, work.scale / all.total, work.scale, column});
    }
  }
  if (blocks > 1) cluster_barrier();  // no block leaves while another may still read its shared memory
}

template <typename T, Kind KIND>
Plan plan_of(const Request& request, const Device& device) {
  const int columns = static_cast<int>(request.columns);
  if (KIND == Kind::gradient) return plan_of_stream(columns, sizeof(Scratch));
  return plan_of_rows(columns, sizeof(T), device, sizeof(Scratch));
}

template <typename T>
Work<T> work_of(const Request& request, const Plan& plan) {
  return {static_cast<T*>(request.logits), request.labels, request.results, request.maxima,
          request.totals,                  request.stride, request.rows,    request.first,
          static_cast<int>(request.columns), plan.share,   plan.resident,   request.scale};
}

template <typename T, typename Launch>
void launch_kind(Kind kind, const Launch& launch) {
  switch (kind) {
    case Kind::losses: return launch.template operator()<T, Kind::losses>();
    case Kind::statistics: return launch.template operator()<T, Kind::statistics>();
    case Kind::gradient: return launch.template operator()<T, Kind::gradient>();
  }
}

// Calls launch.operator()<T, KIND>() for the type and the kind that are asked for.
template <typename Launch>
void launch_of(Kind kind, Element element, const Launch& launch) {
  switch (element) {
    case Element::fp32: return launch_kind<float>(kind, launch);
    case Element::bf16: return launch_kind<bf16>(kind, launch);
    case Element::fp16: return launch_kind<fp16>(kind, launch);
  }
}

}  // namespace deepy
