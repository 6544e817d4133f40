// Loops over the columns of a row, LANES at a time, of which the last may be fewer.
#pragma once

#include "vectors.h"

namespace deepy {

// How LANES columns are read and written, and how those that are left at the end of a row.
struct Whole {
    template <class T>
    Floats read(const T* pointer, float = 0.0f) const { return load(pointer); }
    template <class T>
    void write(T* pointer, Floats values) const { store(pointer, values); }
    template <class T>
    void write_normal(T* pointer, Floats values) const { store_normal(pointer, values); }
};
struct Part {
    int64_t count;
    template <class T>
    Floats read(const T* pointer, float fill = 0.0f) const { return load_some(pointer, count, fill); }
    template <class T>
    void write(T* pointer, Floats values) const { store_some(pointer, values, count); }
    template <class T>
    void write_normal(T* pointer, Floats values) const { store_some(pointer, values, count); }
};

// Calls body(column, some) for every LANES of `size` columns; `some` reads and writes them.
template <class Body>
inline void over_columns(int64_t size, const Body& body) {
    int64_t column = 0;
    for (; column + LANES <= size; column += LANES) body(column, Whole());
    if (column < size) body(column, Part{size - column});
}

constexpr int UNROLLED = 4;

// Calls body(column, some, turn) in the same way; turn goes around 0 .. UNROLLED - 1, for sums in so many vectors that
// do not wait for each other.
template <class Body>
inline void over_columns_in_turns(int64_t size, const Body& body) {
    int64_t column = 0;
    for (; column + UNROLLED * LANES <= size; column += UNROLLED * LANES) {
        body(column, Whole(), 0);
        body(column + LANES, Whole(), 1);
        body(column + 2 * LANES, Whole(), 2);
        body(column + 3 * LANES, Whole(), 3);
    }
    for (; column + LANES <= size; column += LANES) body(column, Whole(), 0);
    if (column < size) body(column, Part{size - column}, 1);
}

struct Sum {
    Floats parts[UNROLLED] = {};
    float value() const { return lanes_sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

}  // namespace deepy
