// C [m, n] = A B, or C + A B, or A B + a bias to each row: A [m, k] and B [k, n] may each be a transposed view. All are
// fp32; or A and B are bf16, whose products are summed in fp32, and C either.
//
// As in Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication": a tile of C [ROWS, COLUMNS] stays
// in registers, a few lines of one factor in the second cache, and many of the other in the third. Both are copied into
// the order in which they are read. The factor that is copied again and again is the one for which that is less: the
// left one, in slabs of SLAB rows, along WIDTH columns; or the right one, in slivers of COLUMNS, along PANEL rows. While
// a piece is multiplied, the memory of the next is asked for, so that copying it waits for nothing. Each element of C is
// summed over k in one order, whatever tile or thread computes it, and whatever the other rows and columns are. Sums over
// more than DEPTH words go on from what was kept in fp32: in C, or where that is bf16 in memory of the thread's own.

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "packing.h"
#include "parallel.h"
#include "tiles.h"

namespace deepy {
namespace {

// Words, columns, and rows of copies.
constexpr int64_t DEPTH = 768, WIDTH = 24 * COLUMNS, SLAB = 8 * ROWS, PANEL = 43 * ROWS;

struct Scratch {
    alignas(64) float left[DEPTH * PANEL + LANES];
    alignas(64) float right[DEPTH * WIDTH + LANES];
    alignas(64) float sums[PANEL * WIDTH];  // of a part of C that is bf16
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

template <class Out>
struct Target {
    Out* values;
    int64_t stride;
    const Out* bias;       // of the first column, or null
    const float* earlier;  // what is added, or null
    int64_t earlier_stride;
    bool is_read;  // soon

    Target from(int64_t row, int64_t column) const {
        return {values + row * stride + column, stride, bias ? bias + column : nullptr,
                earlier ? earlier + row * earlier_stride + column : nullptr, earlier_stride, is_read};
    }
};

inline void put(float* place, const Floats (&values)[VECTORS], [[maybe_unused]] bool is_read) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < VECTORS; ++j) {
#if defined(__AVX512F__)
        if (!is_read) {
            _mm512_stream_ps(place + j * LANES, reinterpret_cast<__m512>(values[j]));
            continue;
        }
#endif
        store(place + j * LANES, values[j]);
    }
}

#if HAS_BF16_PRODUCTS
inline void put(BFloat16* place, const Floats (&values)[VECTORS], bool is_read) {
    static_assert(VECTORS == 2, "a line of the cache");
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
    if (is_read) _mm512_storeu_si512(place, both);
    else _mm512_stream_si512(reinterpret_cast<__m512i*>(place), both);
}
#endif

// A tile of `rows` rows, of which `high` are there, and `wide` of its COLUMNS. depth: words of In.
template <class In, int64_t rows, class Out>
void make_tile(const float* left, const float* right, int64_t depth, Target<Out> target, int64_t high, int64_t wide) {
    for (int64_t i = 0; target.is_read && i < high; ++i) {
        for (int64_t j = 0; j < wide; j += 64 / sizeof(Out))
            __builtin_prefetch(target.values + i * target.stride + j, 1, 3);
    }
    Floats sums[rows][VECTORS];
    tile_sums<rows, ROWS, 1, COLUMNS, In>(left, right, depth, sums);
    if (high == rows && wide == COLUMNS) {
        Floats bias[VECTORS] = {};
        for (int64_t j = 0; target.bias && j < VECTORS; ++j) bias[j] = load(target.bias + j * LANES);
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; ++i) {
            const float* earlier = target.earlier ? target.earlier + i * target.earlier_stride : nullptr;
#pragma GCC unroll 2
            for (int64_t j = 0; j < VECTORS; ++j) {
                if (earlier) sums[i][j] += load(earlier + j * LANES);
                sums[i][j] += bias[j];
            }
            put(target.values + i * target.stride, sums[i], target.is_read);
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
        for (int64_t j = 0; j < wide; j += LANES) {
            const int64_t count = std::min<int64_t>(LANES, wide - j);
            Floats values = load(kept + i * COLUMNS + j);
            if (target.earlier) values += load_some(target.earlier + i * target.earlier_stride + j, count, 0.0f);
            if (target.bias) values += load_some(target.bias + j, count, 0.0f);
            Out rounded[LANES];
            store_normal(rounded, values);  // as `put` does, so that no value depends on its tile
            std::memcpy(target.values + i * target.stride + j, rounded, count * sizeof(Out));
        }
    }
}

// The sum of each line's elements, or that added.
template <class T>
void sum_lines(Factor<T> from, int64_t depth, int64_t lines, float* sums, bool adds) {
    for (int64_t line = 0; line < lines; line += LANES) {
        const int64_t count = std::min<int64_t>(LANES, lines - line);
        Floats even = {}, odd = {};
        for (int64_t k = 0; k < depth; ++k) {
            const T* place = from.from(line, k).values;
            (k % 2 ? odd : even) += count == LANES ? load(place) : load_some(place, count, 0.0f);
        }
        Floats total = even + odd;
        if (adds) total += load_some(sums + line, count, 0.0f);
        store_some(sums + line, total, count);
    }
}

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// The product of two copies. depth: words of In.
template <class In, class Out>
void multiply(const Scratch& from, int64_t depth, Target<Out> target, int64_t high, int64_t wide, Ahead<In>& ahead) {
    constexpr int64_t FEW = ROWS / 3, SOME = 2 * FEW;  // of the last tile's rows
    for (int64_t column = 0; column < wide; column += COLUMNS) {
        for (int64_t row = 0; row < high; row += ROWS) {
            const float *left = from.left + row * depth, *right = from.right + column * depth;
            const int64_t rows = std::min(ROWS, high - row), columns = std::min(COLUMNS, wide - column);
            const Target<Out> place = target.from(row, column);
            ahead.advance();
            if (rows > SOME) make_tile<In, ROWS>(left, right, depth, place, rows, columns);
            else if (rows > FEW) make_tile<In, SOME>(left, right, depth, place, rows, columns);
            else make_tile<In, FEW>(left, right, depth, place, rows, columns);
        }
    }
}

// A part of C, made by one thread. sums: of the lines of A, or null.
template <class In, class Out>
struct Part {
    Factor<In> left, right;
    Target<Out> target;
    int64_t rows, columns, depth;
    float* sums;

    int64_t passes() const { return pieces(words<In>(depth), DEPTH); }
    int64_t deepest() const { return passes() ? pieces(words<In>(depth), passes()) * PER_WORD<In> : 1; }

    void copy_left(int64_t row, int64_t high, int64_t k, int64_t deep, bool is_first) const {
        pack<ROWS>(left.from(row, k), deep, high, scratch().left);
        if (sums && is_first) sum_lines(left.from(row, k), deep, high, sums + row, k > 0);
    }

    // Where sums over a part of k are kept: C itself, or memory for so many columns as are copied at once.
    Target<float> kept() const {
        if constexpr (std::is_same_v<Out, float>) return {target.values, target.stride, nullptr, nullptr, 0, true};
        else return {scratch().sums, WIDTH, nullptr, nullptr, 0, true};
    }

    void multiply_copies(int64_t row, int64_t high, int64_t column, int64_t wide, int64_t k, int64_t deep,
                         Ahead<In> ahead) const {
        const Target<float> sum = kept();
        const float* earlier = k > 0 ? sum.values : target.earlier;
        const int64_t stride = k > 0 ? sum.stride : target.earlier_stride;
        if (k + deep >= depth) {
            Target<Out> whole = target;
            whole.earlier = earlier, whole.earlier_stride = stride;
            multiply(scratch(), words<In>(deep), whole.from(row, column), high, wide, ahead);
        } else {
            Target<float> part = sum;
            part.earlier = earlier, part.earlier_stride = stride;
            multiply(scratch(), words<In>(deep), part.from(row, column), high, wide, ahead);
        }
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
                    const Ahead<In> ahead(left.from(row + high, k), deep, next,
                                          pieces(high, ROWS) * pieces(wide, COLUMNS));
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
                    const Ahead<In> ahead(right.from(column + wide, k), deep, next, pieces(high, ROWS));
                    multiply_copies(row, high, column, wide, k, deep, ahead);
                }
            }
        }
    }

    Part from(int64_t row, int64_t column, int64_t high, int64_t wide) const {
        return {left.from(row, 0), right.from(column, 0), target.from(row, column), high, wide, depth,
                sums && column == 0 ? sums + row : nullptr};
    }

    void make() const {
        if (!std::is_same_v<Out, float> && passes() > 1 && (rows > PANEL || columns > WIDTH)) {
            for (int64_t row = 0; row < rows; row += PANEL) {
                for (int64_t column = 0; column < columns; column += WIDTH)
                    from(row, column, std::min(PANEL, rows - row), std::min(WIDTH, columns - column)).make();
            }
            return;
        }
        const int64_t copied_for_slabs = columns + pieces(columns, WIDTH) * rows;
        const int64_t copied_for_slivers = rows + pieces(rows, PANEL) * columns;
        if (copied_for_slivers <= copied_for_slabs) pass_slivers();
        else pass_slabs();
#if defined(__AVX512F__)
        if (!target.is_read) _mm_sfence();
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

template <class In, class Out>
void make_product(const Part<In, Out>& whole, int64_t threads) {
    const int64_t across = column_parts(whole.rows, whole.columns, threads), down = threads / across;
    parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t piece = first; piece < last; ++piece) {
            const int64_t row = piece_start(piece / across, down, whole.rows, ROWS);
            const int64_t column = piece_start(piece % across, across, whole.columns, COLUMNS);
            const int64_t high = piece_start(piece / across + 1, down, whole.rows, ROWS) - row;
            const int64_t wide = piece_start(piece % across + 1, across, whole.columns, COLUMNS) - column;
            if (high > 0 && wide > 0) whole.from(row, column, high, wide).make();
        }
    });
}

}  // namespace

// Whether the factors may be bf16.
DEEPY_EXPORT int64_t deepy_has_bf16_products() { return HAS_BF16_PRODUCTS; }

// target [rows, columns] from left [rows, depth] and right [depth, columns]; lines are rows of the left and columns of
// the right factor. type: of both, and of the bias; target_type: FP32, or `type`. bias [columns], or null. write: a
// Write; ADD only to fp32, and PASS only to rows whose memory begins at multiples of 64. sums [rows] are filled with the
// sums of the left factor's lines, which must not lie in one piece; or null.
DEEPY_EXPORT int64_t deepy_product(int64_t type, [[maybe_unused]] int64_t target_type, void* target, int64_t stride,
                                   const void* left, int64_t left_stride, int64_t left_lines, const void* right,
                                   int64_t right_stride, int64_t right_lines, const void* bias, float* sums, int64_t rows, int64_t columns,
                                   int64_t depth, int64_t write, int64_t threads) {
    const auto make = [&](auto* in, auto* out) {
        using In = std::remove_pointer_t<decltype(in)>;
        using Out = std::remove_pointer_t<decltype(out)>;
        const Factor<In> from_left{static_cast<const In*>(left), left_stride, left_lines != 0};
        const Factor<In> from_right{static_cast<const In*>(right), right_stride, right_lines != 0};
        Target<Out> place{static_cast<Out*>(target), stride, static_cast<const Out*>(bias), nullptr, 0, true};
        if constexpr (std::is_same_v<Out, float>) {
            if (write == ADD) place.earlier = place.values, place.earlier_stride = stride;
        }
        place.is_read = write != PASS || words<In>(depth) > DEPTH;
        make_product(Part<In, Out>{from_left, from_right, place, rows, columns, depth, sums}, threads);
    };
    if (type == FP32) make(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
#if HAS_BF16_PRODUCTS
    else if (target_type == FP32) make(static_cast<BFloat16*>(nullptr), static_cast<float*>(nullptr));
    else make(static_cast<BFloat16*>(nullptr), static_cast<BFloat16*>(nullptr));
#endif
    return 0;
}

}  // namespace deepy
