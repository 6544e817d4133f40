// A row of logits as the threads of a block see it: vectors of 16 bytes, and the few columns before and after them.

#pragma once

#include "device.cuh"

namespace deepy {

template <typename T>
constexpr int PER_VECTOR = 16 / sizeof(T);

// The columns of a row that are this block's. head: columns before the first address that is a multiple of 16 bytes.
// body: vectors from there on. What remains is the tail; head and tail together are the edges, less than 32 columns.
template <typename T>
struct Slice {
  T* start;
  int count;
  int head;
  int body;

  DEEPY_INLINE Vector* vectors() const { return reinterpret_cast<Vector*>(start + head); }
  DEEPY_INLINE int edges() const { return count - body * PER_VECTOR<T>; }
  // The column of the edge that a thread has, if it is less than edges().
  DEEPY_INLINE int edge(int thread) const { return thread < head ? thread : thread + body * PER_VECTOR<T>; }
};

template <typename T>
DEEPY_INLINE Slice<T> slice_of(T* start, int count) {
  const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(start) % 16);
  Slice<T> slice{start, count, 0, 0};
  slice.head = min(count, (16 - beyond) % 16 / static_cast<int>(sizeof(T)));
  slice.body = (count - slice.head) / PER_VECTOR<T>;
  return slice;
}

// The values of a vector.
template <typename T>
struct Values {
  float of[PER_VECTOR<T>];
};

template <typename T>
DEEPY_INLINE Values<T> unpacked(const Vector& vector) {
  const T* narrow = reinterpret_cast<const T*>(&vector);
  Values<T> values;
#pragma unroll
  for (int each = 0; each < PER_VECTOR<T>; ++each) values.of[each] = to_float(narrow[each]);
  return values;
}

template <typename T>
DEEPY_INLINE Vector packed(const Values<T>& values) {
  Vector vector;
  T* narrow = reinterpret_cast<T*>(&vector);
#pragma unroll
  for (int each = 0; each < PER_VECTOR<T>; ++each) narrow[each] = from_float<T>(values.of[each]);
  return vector;
}

}  // namespace deepy
