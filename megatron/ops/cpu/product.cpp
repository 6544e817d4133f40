// C [m, n] = A B, or C + A B, or A B + a bias to each row, in fp32: A [m, k] and B [k, n] may each be a transposed view.
//
// As in Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication": a tile of C [ROWS, COLUMNS] stays
// in registers, a few lines of one factor in the second cache, and many of the other in the third. Both are copied into
// the order in which they are read. The factor that is copied again and again is the one for which that is less: the
// left one, in slabs of SLAB rows, along WIDTH columns; or the right one, in slivers of COLUMNS, along PANEL rows. While
// a piece is multiplied, the memory of the next is asked for, so that copying it waits for nothing. Each element of C is
// summed over k in one order, whatever tile or thread computes it, and whatever the other rows and columns are.

#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "packing.h"
#include "parallel.h"
#include "tiles.h"

namespace deepy {
namespace {

constexpr int64_t DEPTH = 768, WIDTH = 24 * COLUMNS, SLAB = 8 * ROWS, PANEL = 43 * ROWS;

struct Scratch {
    alignas(64) float left[DEPTH * PANEL + LANES];
    alignas(64) float right[DEPTH * WIDTH + LANES];
};

constexpr size_t HUGE_PAGE = size_t{1} << 21, SCRATCH_BYTES = (sizeof(Scratch) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;

// The second cache is indexed by physical addresses: copies in scattered small pages may push each other out of it, by
// chance, for as long as the process lives. In huge pages they cannot; and memory that was never written gets those.
Scratch* make_scratch() {
#if defined(__linux__)
    void* place = mmap(nullptr, SCRATCH_BYTES + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) return nullptr;
    const size_t before = (HUGE_PAGE - reinterpret_cast<uintptr_t>(place) % HUGE_PAGE) % HUGE_PAGE;
    char* start = static_cast<char*>(place) + before;
    if (before) munmap(place, before);
    if (before < HUGE_PAGE) munmap(start + SCRATCH_BYTES, HUGE_PAGE - before);
    madvise(start, SCRATCH_BYTES, MADV_HUGEPAGE);  // where it refuses, pages are small
    return reinterpret_cast<Scratch*>(start);
#else
    return static_cast<Scratch*>(std::aligned_alloc(HUGE_PAGE, SCRATCH_BYTES));
#endif
}

struct FreeScratch {
    void operator()(Scratch* scratch) const {
#if defined(__linux__)
        munmap(scratch, SCRATCH_BYTES);
#else
        std::free(scratch);
#endif
    }
};

// The thread's own.
Scratch& scratch() {
    static thread_local std::unique_ptr<Scratch, FreeScratch> kept;
    if (!kept) kept.reset(make_scratch());
    if (!kept) throw std::bad_alloc();
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
    Floats sums[rows][VECTORS];
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
    float kept[rows * COLUMNS];  // `sums` with an index that changes would have to stay in memory
#pragma GCC unroll 12
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < VECTORS; ++j) store(kept + i * COLUMNS + j * LANES, sums[i][j]);
    }
    for (int64_t i = 0; i < high; ++i) {
        for (int64_t j = 0; j < wide; ++j) {
            float& place = target.values[i * target.stride + j];
            const float value = kept[i * COLUMNS + j] + (target.bias ? target.bias[j] : 0.0f);
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

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// The product of two copies.
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

// A part of C, made by one thread. sums: of the lines of A, or null.
struct Part {
    Factor left, right;
    Target target;
    int64_t rows, columns, depth;
    float* sums;

    int64_t deepest() const {
        const int64_t passes = pieces(depth, DEPTH);
        return passes ? pieces(depth, passes) : 1;
    }

    void copy_left(int64_t row, int64_t high, int64_t k, int64_t deep, bool is_first) const {
        pack<ROWS>(left.from(row, k), deep, high, scratch().left);
        if (sums && is_first) sum_lines(left.from(row, k), deep, high, sums + row, k > 0);
    }

    void multiply_copies(int64_t row, int64_t high, int64_t column, int64_t wide, int64_t k, int64_t deep,
                         Ahead ahead) const {
        Target place = target.from(row, column);
        if (k > 0) place.write = ADD, place.bias = nullptr;
        multiply(scratch(), deep, place, high, wide, ahead);
    }

    // The copies of WIDTH columns stay, those of slabs pass.
    void pass_slabs() const {
        for (int64_t column = 0; column < columns; column += WIDTH) {
            const int64_t wide = std::min(WIDTH, columns - column);
            for (int64_t k = 0; k < depth; k += deepest()) {
                const int64_t deep = std::min(deepest(), depth - k);
                pack<COLUMNS>(right.from(column, k), deep, wide, scratch().right);
                for (int64_t row = 0; row < rows; row += SLAB) {
                    const int64_t high = std::min(SLAB, rows - row), next = std::min(SLAB, rows - row - high);
                    copy_left(row, high, k, deep, column == 0);
                    const Ahead ahead(left.from(row + high, k), deep, next, pieces(high, ROWS) * pieces(wide, COLUMNS));
                    multiply_copies(row, high, column, wide, k, deep, ahead);
                }
            }
        }
    }

    // The copies of PANEL rows stay, those of slivers pass.
    void pass_slivers() const {
        for (int64_t row = 0; row < rows; row += PANEL) {
            const int64_t high = std::min(PANEL, rows - row);
            for (int64_t k = 0; k < depth; k += deepest()) {
                const int64_t deep = std::min(deepest(), depth - k);
                copy_left(row, high, k, deep, true);
                for (int64_t column = 0; column < columns; column += COLUMNS) {
                    const int64_t wide = std::min(COLUMNS, columns - column);
                    const int64_t next = std::min(COLUMNS, columns - column - wide);
                    pack<COLUMNS>(right.from(column, k), deep, wide, scratch().right);
                    const Ahead ahead(right.from(column + wide, k), deep, next, pieces(high, ROWS));
                    multiply_copies(row, high, column, wide, k, deep, ahead);
                }
            }
        }
    }

    void make() const {
        const int64_t copied_for_slabs = columns + pieces(columns, WIDTH) * rows;
        const int64_t copied_for_slivers = rows + pieces(rows, PANEL) * columns;
        if (copied_for_slivers <= copied_for_slabs) pass_slivers();
        else pass_slabs();
#if defined(__AVX512F__)
        if (target.write == PASS) _mm_sfence();
#endif
    }
};

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

// The start of piece `index` of `count` of `size`, in multiples of `step`.
int64_t piece_start(int64_t index, int64_t count, int64_t size, int64_t step) {
    return std::min(size, pieces(size, step) * index / count * step);
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
            Part{from_left, from_right, place, high, wide, depth, sums && column == 0 ? sums + row : nullptr}.make();
        }
    });
    return 0;
}

}  // namespace deepy
