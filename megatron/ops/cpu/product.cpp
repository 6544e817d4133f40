// C [m, n] = A B, or C + A B, or A B + a bias to each row, in fp32: A [m, k] and B [k, n] may each be a transposed view.
//
// As in Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication": a block of B [DEPTH, WIDTH]
// stays in the third cache, a slab of A [SLAB, DEPTH] and a sliver of B [DEPTH, COLUMNS] in the second, and a tile of C
// [ROWS, COLUMNS] in registers. Both are copied into the order in which they are read; while a slab is multiplied, the
// memory of the next is asked for, so that copying it waits for nothing. Each element of C is summed over k in one
// order, whatever tile or thread computes it, and whatever the other rows and columns are.

#include <memory>

#include "packing.h"
#include "parallel.h"
#include "tiles.h"

namespace deepy {
namespace {

constexpr int64_t DEPTH = 768, WIDTH = 24 * COLUMNS, SLAB = 8 * ROWS;

struct Scratch {
    alignas(64) float left[DEPTH * SLAB + LANES];
    alignas(64) float right[DEPTH * WIDTH + LANES];
};

Scratch& scratch() {
    static thread_local std::unique_ptr<Scratch> kept;
    if (!kept) kept.reset(new Scratch);
    return *kept;
}

enum Write : int64_t { FILL = 0, ADD = 1, PASS = 2 };  // PASS: fill past the caches, what is not needed soon

struct Target {
    float* values;
    int64_t stride;
    const float* bias;  // of the first column, or null
    int64_t write;

    Target from(int64_t row, int64_t column) const {
        return {values + row * stride + column, stride, bias ? bias + column : nullptr, write};
    }
};

inline void put(float* place, Floats values, int64_t write) {
    if (write == ADD) return store(place, load(place) + values);
#if defined(__AVX512F__)
    if (write == PASS) return _mm512_stream_ps(place, reinterpret_cast<__m512>(values));
#endif
    store(place, values);
}

// A tile of `rows` rows, of which `high` are there, and `wide` of its COLUMNS.
template <int64_t rows>
void make_tile(const float* left, const float* right, int64_t depth, Target target, int64_t high, int64_t wide) {
    for (int64_t i = 0; target.write != PASS && i < high; ++i) {
        for (int64_t j = 0; j < wide; j += 16) __builtin_prefetch(target.values + i * target.stride + j, 1, 3);
    }
    Floats sums[rows][VECTORS] = {};
    tile_sums<rows, ROWS, 1, COLUMNS>(left, right, depth, sums);
    if (high == rows && wide == COLUMNS) {
        Floats bias[VECTORS] = {};
        for (int64_t j = 0; target.bias && j < VECTORS; ++j) bias[j] = load(target.bias + j * LANES);
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
            for (int64_t j = 0; j < VECTORS; ++j)
                put(target.values + i * target.stride + j * LANES, sums[i][j] + bias[j], target.write);
        }
        return;
    }
    for (int64_t i = 0; i < high; ++i) {
        for (int64_t j = 0; j < wide; ++j) {
            float& place = target.values[i * target.stride + j];
            const float value = sums[i][j / LANES][j % LANES] + (target.bias ? target.bias[j] : 0.0f);
            place = target.write == ADD ? place + value : value;
        }
    }
}

// The sum of each line's elements, or that added.
void sum_lines(Factor from, int64_t depth, int64_t lines, float* sums, bool adds) {
    for (int64_t line = 0; line < lines; line += LANES) {
        const int64_t count = std::min<int64_t>(LANES, lines - line);
        Floats even = {}, odd = {};
        for (int64_t k = 0; k < depth; ++k) {
            const float* place = from.from(line, k).values;
            (k % 2 ? odd : even) += count == LANES ? load(place) : load_some(place, count, 0.0f);
        }
        Floats total = even + odd;
        if (adds) total += load_some(sums + line, count, 0.0f);
        store_some(sums + line, total, count);
    }
}

// The product of a slab and a block, both copied.
void multiply(const Scratch& from, int64_t depth, Target target, int64_t high, int64_t wide, Ahead& ahead) {
    constexpr int64_t FEW = ROWS / 3, SOME = 2 * FEW;  // of the last tile's rows
    for (int64_t column = 0; column < wide; column += COLUMNS) {
        for (int64_t row = 0; row < high; row += ROWS) {
            const float *left = from.left + row * depth, *right = from.right + column * depth;
            const int64_t rows = std::min(ROWS, high - row), columns = std::min(COLUMNS, wide - column);
            const Target place = target.from(row, column);
            ahead.advance();
            if (rows > SOME) make_tile<ROWS>(left, right, depth, place, rows, columns);
            else if (rows > FEW) make_tile<SOME>(left, right, depth, place, rows, columns);
            else make_tile<FEW>(left, right, depth, place, rows, columns);
        }
    }
}

// A part of C, by one thread. sums: of the lines of A, or null.
void multiply(Factor left, Factor right, Target target, int64_t rows, int64_t columns, int64_t depth, float* sums) {
    Scratch& to = scratch();
    const int64_t passes = (depth + DEPTH - 1) / DEPTH, deepest = (depth + passes - 1) / passes;
    for (int64_t start = 0; start < columns; start += WIDTH) {
        const int64_t wide = std::min(WIDTH, columns - start);
        for (int64_t k = 0; k < depth; k += deepest) {
            const int64_t deep = std::min(deepest, depth - k);
            Target part = target.from(0, start);
            if (k > 0) part.write = ADD, part.bias = nullptr;
            pack<COLUMNS>(right.from(start, k), deep, wide, to.right);
            for (int64_t slab = 0; slab < rows; slab += SLAB) {
                const int64_t high = std::min(SLAB, rows - slab), next = std::min(SLAB, rows - slab - high);
                pack<ROWS>(left.from(slab, k), deep, high, to.left);
                if (sums && start == 0) sum_lines(left.from(slab, k), deep, high, sums + slab, k > 0);
                Ahead ahead(left.from(slab + high, k), deep, next, (high + ROWS - 1) / ROWS * (wide / COLUMNS));
                multiply(to, deep, part.from(slab, 0), high, wide, ahead);
            }
        }
    }
#if defined(__AVX512F__)
    if (target.write == PASS) _mm_sfence();
#endif
}

// How many of the threads share the columns; the others share the rows. Each copies what it needs of both factors.
int64_t column_parts(int64_t rows, int64_t columns, int64_t threads) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t parts = 1; parts <= threads; ++parts) {
        if (threads % parts) continue;
        const int64_t copied = threads / parts * columns + parts * rows;
        if (copied < least) least = copied, best = parts;
    }
    return best;
}

// The start of piece `index` of `pieces` of `size`, in multiples of `step`.
int64_t piece_start(int64_t index, int64_t pieces, int64_t size, int64_t step) {
    const int64_t steps = (size + step - 1) / step;
    return std::min(size, steps * index / pieces * step);
}

}  // namespace

// target [rows, columns] from left [rows, depth] and right [depth, columns]; lines are rows of the left and columns of
// the right factor. bias [columns], or null. write: a Write; PASS only for rows whose memory begins at multiples of 64.
// sums [rows] are filled with the sums of the left factor's lines, which must not lie in one piece; or null.
DEEPY_EXPORT int64_t deepy_product(float* target, int64_t stride, const float* left, int64_t left_stride,
                                   int64_t left_lines, const float* right, int64_t right_stride, int64_t right_lines,
                                   const float* bias, float* sums, int64_t rows, int64_t columns, int64_t depth,
                                   int64_t write, int64_t threads) {
    if (write == PASS && depth > DEPTH) write = FILL;
    const int64_t across = column_parts(rows, columns, threads), down = threads / across;
    parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t piece = first; piece < last; ++piece) {
            const int64_t row = piece_start(piece / across, down, rows, ROWS);
            const int64_t column = piece_start(piece % across, across, columns, COLUMNS);
            const int64_t high = piece_start(piece / across + 1, down, rows, ROWS) - row;
            const int64_t wide = piece_start(piece % across + 1, across, columns, COLUMNS) - column;
            if (high <= 0 || wide <= 0) continue;
            const Factor from_left = Factor{left, left_stride, left_lines != 0}.from(row, 0);
            const Factor from_right = Factor{right, right_stride, right_lines != 0}.from(column, 0);
            const Target place = Target{target, stride, bias, write}.from(row, column);
            multiply(from_left, from_right, place, high, wide, depth, sums && column == 0 ? sums + row : nullptr);
        }
    });
    return 0;
}

}  // namespace deepy
