// C [m, n] = A^T B, or C + A^T B, from A [k, m] and B [k, n] in fp32: the gradient of a weight.
//
// As in Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication": a block of B [DEPTH, WIDTH]
// stays in the second cache, a sliver of A [DEPTH, ROWS] in the first, and a tile of C [ROWS, COLUMNS] in registers.
// Both are copied into the order in which they are read, which is cheap here, since rows of A and B lie as they are
// needed. Each element of C is summed over k in one order, whatever tile or thread computes it.

#include <algorithm>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "tiles.h"

namespace deepy {
namespace {

constexpr int64_t DEPTH = 256, WIDTH = 512, SLAB = 8 * ROWS;

struct Matrix {
    const float* values;
    int64_t stride;
};

// A tile of C of which not all rows or columns are there.
void put_part(const float* tile, float* target, int64_t stride, int64_t rows, int64_t columns, bool adds) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            float& place = target[i * stride + j];
            place = adds ? place + tile[i * COLUMNS + j] : tile[i * COLUMNS + j];
        }
    }
}

// Copies rows [0, depth) of `columns` columns into slivers of `width` columns each, the last filled up with 0.
template <int64_t width>
void pack(Matrix from, int64_t depth, int64_t columns, float* to) {
    for (int64_t start = 0; start < columns; start += width) {
        const int64_t here = std::min(width, columns - start);
        for (int64_t k = 0; k < depth; ++k, to += width) {
            const float* row = from.values + k * from.stride + start;
            if (here == width) {
                std::memcpy(to, row, sizeof(float) * width);
            } else {
                std::memset(to, 0, sizeof(float) * width);
                std::memcpy(to, row, sizeof(float) * here);
            }
        }
    }
}

struct Scratch {
    alignas(64) float left[DEPTH * SLAB];
    alignas(64) float right[DEPTH * (WIDTH + COLUMNS)];
};

// Rows [first, last) of `width` columns of C.
void multiply(Matrix left, Matrix right, float* target, int64_t stride, int64_t first, int64_t last, int64_t width,
              int64_t depth, bool adds) {
    static thread_local std::unique_ptr<Scratch> kept;
    if (!kept) kept.reset(new Scratch);
    Scratch& scratch = *kept;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = std::min(DEPTH, depth - k);
        pack<COLUMNS>({right.values + k * right.stride, right.stride}, deep, width, scratch.right);
        for (int64_t slab = first; slab < last; slab += SLAB) {
            const int64_t high = std::min(SLAB, last - slab);
            pack<ROWS>({left.values + k * left.stride + slab, left.stride}, deep, high, scratch.left);
            for (int64_t i = 0; i < high; i += ROWS) {
                for (int64_t j = 0; j < width; j += COLUMNS) {
                    const float *sliver = scratch.left + i * deep, *other = scratch.right + j * deep;
                    float* place = target + (slab + i) * stride + j;
                    const int64_t rows = std::min(ROWS, high - i), columns = std::min(COLUMNS, width - j);
                    if (rows == ROWS && columns == COLUMNS) {
                        sum_tile<ROWS, 1, COLUMNS>(sliver, other, deep, place, stride, adds || k > 0);
                    } else {
                        float tile[ROWS * COLUMNS];
                        sum_tile<ROWS, 1, COLUMNS>(sliver, other, deep, tile, COLUMNS, false);
                        put_part(tile, place, stride, rows, columns, adds || k > 0);
                    }
                }
            }
        }
    }
}

}  // namespace

// target [rows, columns] = left^T right, or that added to it; left [depth, rows], right [depth, columns].
DEEPY_EXPORT int64_t deepy_transposed_product(float* target, int64_t stride, const float* left, int64_t left_stride,
                                              const float* right, int64_t right_stride, int64_t rows, int64_t columns,
                                              int64_t depth, int64_t adds) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t start = 0; start < columns; start += WIDTH) {
        const int64_t width = std::min(WIDTH, columns - start);
        parallel_for(0, tiles, SLAB / ROWS, [&](int64_t first, int64_t last) {
            multiply({left, left_stride}, {right + start, right_stride}, target + start, stride, first * ROWS,
                     std::min(last * ROWS, rows), width, depth, adds != 0);
        });
    }
    return 0;
}

}  // namespace deepy
