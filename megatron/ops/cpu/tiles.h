// Products of matrices in tiles whose sums stay in registers.
#pragma once

#include "vectors.h"

namespace deepy {

constexpr int64_t VECTORS = 2;
constexpr int64_t ROWS = LANES == 8 ? 6 : 12;  // AVX2 has 16 registers, AVX-512 and NEON 32
constexpr int64_t COLUMNS = VECTORS * LANES;

// sum + left * right, of words of a type (packing.h).
inline __attribute__((always_inline)) Floats with_product(Floats sum, float left, Floats right, float*) {
    return sum + left * right;
}
#if HAS_BF16_PRODUCTS
inline __attribute__((always_inline)) Floats with_product(Floats sum, float left, Floats right, BFloat16*) {
    const __m512bh pairs = (__m512bh)_mm512_set1_ps(left);
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pairs, (__m512bh)right));
}
#endif

// sums[i][j] = sum over k < depth of left_ki right_kj for `rows` i and COLUMNS j, all of them words of T. left_ki lies
// at left[k * LEFT_K + i * LEFT_I], right_kj at right[k * RIGHT_K + j].
template <int64_t rows, int64_t LEFT_K, int64_t LEFT_I, int64_t RIGHT_K, class T = float>
inline __attribute__((always_inline)) void tile_sums(const float* __restrict left, const float* __restrict right,
                                                     int64_t depth, Floats (&sums)[rows][VECTORS]) {
#pragma GCC unroll 12
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] = Floats{};
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
        Floats values[VECTORS];
        for (int64_t j = 0; j < VECTORS; ++j) values[j] = load(right + k * RIGHT_K + j * LANES);
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
            for (int64_t j = 0; j < VECTORS; ++j)
                sums[i][j] = with_product(sums[i][j], left[k * LEFT_K + i * LEFT_I], values[j], static_cast<T*>(nullptr));
        }
    }
}

// target[i][j] = those sums, or that with them added, for ROWS i; rows of the target lie `stride` apart.
template <int64_t LEFT_K, int64_t LEFT_I, int64_t RIGHT_K, class T = float>
inline void sum_tile(const float* __restrict left, const float* __restrict right, int64_t depth,
                     float* __restrict target, int64_t stride, bool adds) {
    Floats sums[ROWS][VECTORS];
    tile_sums<ROWS, LEFT_K, LEFT_I, RIGHT_K, T>(left, right, depth, sums);
#pragma GCC unroll 12
    for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < VECTORS; ++j) {
            float* place = target + i * stride + j * LANES;
            store(place, adds ? load(place) + sums[i][j] : sums[i][j]);
        }
    }
}

}  // namespace deepy
