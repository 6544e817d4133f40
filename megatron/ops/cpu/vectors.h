// Vectors of floats as wide as the processor's registers, by the extensions that GCC and Clang share: the compiler
// makes AVX-512, AVX2, NEON or whatever there is of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

// Whether the processor multiplies pairs of bf16 and adds both products to an fp32 sum.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define HAS_BF16_PRODUCTS 1
#else
#define HAS_BF16_PRODUCTS 0
#endif

namespace deepy {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// What the Python side calls a dtype (library.py: DTYPES).
enum Type : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };

// Returns `function` applied to a null pointer of the type with this number.
template <class Function>
inline auto with_type(int64_t type, const Function& function) {
    if (type == BF16) return function(static_cast<BFloat16*>(nullptr));
    if (type == FP16) return function(static_cast<Float16*>(nullptr));
    return function(static_cast<float*>(nullptr));
}

inline Floats all(float value) { return value - Floats{}; }
inline Bits bits_of(Floats values) { return reinterpret_cast<Bits>(values); }
inline Floats floats_of(Bits bits) { return reinterpret_cast<Floats>(bits); }
inline Floats select(Ints where, Floats yes, Floats no) { return where ? yes : no; }
inline Bits select(Ints where, Bits yes, Bits no) { return where ? yes : no; }

// The larger of each two, and `other` where one is no number.
inline Floats larger(Floats one, Floats other) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_max_ps(reinterpret_cast<__m512>(one), reinterpret_cast<__m512>(other)));
#elif defined(__AVX__)
    return reinterpret_cast<Floats>(_mm256_max_ps(reinterpret_cast<__m256>(one), reinterpret_cast<__m256>(other)));
#else
    return select(one > other, one, other);
#endif
}

inline Floats square_root(Floats values) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(values)));
#elif defined(__AVX__)
    return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(values)));
#else
    for (int lane = 0; lane < LANES; ++lane) values[lane] = __builtin_sqrtf(values[lane]);
    return values;
#endif
}


// 16 bits of each lane as 32, and the low 16 of 32. (GCC 12 makes several instructions of __builtin_convertvector.)
inline Bits extended(Halves halves) {
#if defined(__AVX512F__)
    return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
    return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
    return __builtin_convertvector(halves, Bits);
#endif
}
inline Halves shortened(Bits bits) {
#if defined(__AVX512F__)
    return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
    return __builtin_convertvector(bits, Halves);
#endif
}

template <class Vector, class Pointer>
inline Vector raw(const Pointer* pointer) {
    Vector vector;
    std::memcpy(&vector, pointer, sizeof vector);
    return vector;
}

inline Floats widened(Halves halves, BFloat16*) { return floats_of(extended(halves) << 16); }

inline Floats widened(Halves halves, Float16*) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX__) && defined(__F16C__)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)));
#else
    Bits all_bits = extended(halves);
    Bits sign = (all_bits & 0x8000u) << 16, rest = all_bits & 0x7FFFu;
    Bits normal = (rest << 13) + 0x38000000u;                                // the exponent's bias is 127, no more 15
    Bits small = bits_of(floats_of((rest & 0x3FFu) | 0x3F000000u) - 0.5f);   // in steps of 2^-24, from 0.5 on
    Bits large = (rest << 13) | 0x7F800000u;                                 // infinite, or not a number
    return floats_of(sign | select(rest < 0x400u, small, select(rest >= 0x7C00u, large, normal)));
#endif
}

// To the nearest, ties to even; what is no number stays so.
inline Halves narrowed(Floats values, BFloat16*) {
    Bits bits = bits_of(values);
    Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return shortened(select(values == values, rounded, (bits >> 16) | 0x40u));
}

inline Halves narrowed(Floats values, Float16*) {
#if defined(__AVX512F__)
    return reinterpret_cast<Halves>(_mm512_cvtps_ph(reinterpret_cast<__m512>(values), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX__) && defined(__F16C__)
    return reinterpret_cast<Halves>(_mm256_cvtps_ph(reinterpret_cast<__m256>(values), _MM_FROUND_TO_NEAREST_INT));
#else
    Bits bits = bits_of(values), sign = bits & 0x80000000u, rest = bits ^ sign;
    Bits normal = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
    Bits small = bits_of(floats_of(rest) + 0.5f) - 0x3F000000u;              // below 2^-14, in steps of 2^-24
    Bits infinite = Bits{} + 0x7C00u, no_number = Bits{} + 0x7E00u;
    Bits large = select(rest > 0x7F800000u, no_number, infinite);
    Bits rounded = select(rest < 0x38800000u, small, select(rest >= 0x477FF000u, large, normal));
    return shortened(rounded | (sign >> 16));
#endif
}

// LANES values from memory, which need not be aligned.
inline Floats load(const float* pointer) { return raw<Floats>(pointer); }
template <class Half>
inline Floats load(const Half* pointer) {
    return widened(raw<Halves>(pointer), static_cast<Half*>(nullptr));
}

inline void store(float* pointer, Floats values) { std::memcpy(pointer, &values, sizeof values); }
template <class Half>
inline void store(Half* pointer, Floats values) {
    Halves halves = narrowed(values, static_cast<Half*>(nullptr));
    std::memcpy(pointer, &halves, sizeof halves);
}

// The same for values of which those below 2^-126 may become 0: with AVX-512's own rounding to bf16, where there is one.
template <class T>
inline void store_normal(T* pointer, Floats values) {
    store(pointer, values);
}
#if defined(__AVX512F__) && defined(__AVX512BF16__)
inline void store_normal(BFloat16* pointer, Floats values) {
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(values));
    std::memcpy(pointer, &halves, sizeof halves);
}
#endif
#if defined(__AVX512DQ__) && defined(__AVX512BF16__)
// By that instruction, unless a value is below 2^-126.
inline void store(BFloat16* pointer, Floats values) {
    constexpr int BELOW_NORMAL = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(values), BELOW_NORMAL), 0))
        return store<BFloat16>(pointer, values);
    store_normal(pointer, values);
}
#endif

#if HAS_BF16_PRODUCTS
// The mask of the first `count` of 16 lanes.
inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0;
}

// Values as bf16 in the low halves of 32 bits; those below 2^-126 become 0.
inline Bits rounded_bits(Floats values) {
    return extended((Halves)_mm512_cvtneps_pbh((__m512)values));
}
#endif

// The first `count` of LANES values; the others are `fill`, and are not stored.
template <class T>
inline Floats load_some(const T* pointer, int64_t count, float fill) {
    T values[LANES] = {};
    std::memcpy(values, pointer, count * sizeof(T));
    Floats loaded = load(values);
    for (int64_t lane = count; lane < LANES; ++lane) loaded[lane] = fill;
    return loaded;
}
template <class T>
inline void store_some(T* pointer, Floats values, int64_t count) {
    T all_values[LANES];
    store(all_values, values);
    std::memcpy(pointer, all_values, count * sizeof(T));
}

// One value.
inline float load_one(const float* pointer) { return *pointer; }
template <class Half>
inline float load_one(const Half* pointer) {
    return load_some(pointer, 1, 0.0f)[0];
}

inline float largest(Floats values) {
    float result = values[0];
    for (int lane = 1; lane < LANES; ++lane) result = values[lane] > result ? values[lane] : result;
    return result;
}
// Their sum in fp32, in a few steps.
inline float lanes_sum(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(values));
#else
    float lanes[LANES];
    std::memcpy(lanes, &values, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
#endif
}
inline double sum(Floats values) {
    double result = 0.0;
    for (int lane = 0; lane < LANES; ++lane) result += values[lane];
    return result;
}

// e^x to 1.1 units in the last place. What is below 2^-126 becomes 0; infinities and what is no number are as they
// should be. x = n ln 2 + r; e^r by its minimax polynomial on |r| <= ln(2)/2; 2^n by the exponent's bits.
inline Floats exponential(Floats x) {
    const Floats shift = all(12582912.0f);  // 1.5 2^23: what is added to it is rounded to an integer
    Floats shifted = x * 1.44269504f + shift;
    Floats n = shifted - shift;
    Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Floats p = all(1.3843607e-3f);
    p = p * r + 8.3741955e-3f;
    p = p * r + 4.1668005e-2f;
    p = p * r + 1.6666430e-1f;
    p = p * r + 4.9999994e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Floats result = floats_of(bits_of(p) + (bits_of(shifted) << 23));
    result = select(x < -87.33f, Floats{}, result);
    result = select(x > 88.722839f, all(std::numeric_limits<float>::infinity()), result);
    return select(x == x, result, x);
}

// e^x of x <= 0, or of what is no number, to 2.2 units in the last place, in fewer steps. Below 2^-126.5 it becomes 0.
inline Floats exponential_below_zero(Floats x) {
    const Floats shift = all(12582912.0f);
    x = larger(all(-88.0f), x);  // so that 2^n has the bits of 0
    Floats shifted = x * 1.44269504f + shift;
    Floats n = shifted - shift;
    Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Floats p = all(8.2902723e-3f);
    p = p * r + 4.1898161e-2f;
    p = p * r + 1.6667639e-1f;
    p = p * r + 4.9999148e-1f;
    p = p * r + 9.9999970e-1f;
    p = p * r + 1.0f;
    return p * floats_of((bits_of(shifted) << 23) + 0x3F800000u);
}

}  // namespace deepy
