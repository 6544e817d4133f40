// Vectors of floats as wide as the processor's registers, by the extensions that GCC and Clang share: the compiler
// makes AVX-512, AVX2, NEON or whatever there is of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

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
inline Floats larger(Floats one, Floats other) { return select(one > other, one, other); }

template <class Vector, class Pointer>
inline Vector raw(const Pointer* pointer) {
    Vector vector;
    std::memcpy(&vector, pointer, sizeof vector);
    return vector;
}

inline Floats widened(Halves halves, BFloat16*) { return floats_of(__builtin_convertvector(halves, Bits) << 16); }

inline Floats widened(Halves halves, Float16*) {
    Bits all_bits = __builtin_convertvector(halves, Bits);
    Bits sign = (all_bits & 0x8000u) << 16, rest = all_bits & 0x7FFFu;
    Bits normal = (rest << 13) + 0x38000000u;                                // the exponent's bias is 127, no more 15
    Bits small = bits_of(floats_of((rest & 0x3FFu) | 0x3F000000u) - 0.5f);   // in steps of 2^-24, from 0.5 on
    Bits large = (rest << 13) | 0x7F800000u;                                 // infinite, or not a number
    return floats_of(sign | select(rest < 0x400u, small, select(rest >= 0x7C00u, large, normal)));
}

// To the nearest, ties to even; what is no number stays so.
inline Halves narrowed(Floats values, BFloat16*) {
    Bits bits = bits_of(values);
    Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(select(values == values, rounded, (bits >> 16) | 0x40u), Halves);
}

inline Halves narrowed(Floats values, Float16*) {
    Bits bits = bits_of(values), sign = bits & 0x80000000u, rest = bits ^ sign;
    Bits normal = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
    Bits small = bits_of(floats_of(rest) + 0.5f) - 0x3F000000u;              // below 2^-14, in steps of 2^-24
    Bits infinite = Bits{} + 0x7C00u, no_number = Bits{} + 0x7E00u;
    Bits large = select(rest > 0x7F800000u, no_number, infinite);
    Bits rounded = select(rest < 0x38800000u, small, select(rest >= 0x477FF000u, large, normal));
    return __builtin_convertvector(rounded | (sign >> 16), Halves);
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
    Floats r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    Floats p = all(1.38888881e-3f);
    p = p * r + 8.37312452e-3f;
    p = p * r + 4.16695364e-2f;
    p = p * r + 1.66664720e-1f;
    p = p * r + 4.99999851e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Floats result = floats_of(bits_of(p) + (bits_of(shifted) << 23));
    result = select(x < -87.33f, Floats{}, result);
    result = select(x > 88.722839f, all(std::numeric_limits<float>::infinity()), result);
    return select(x == x, result, x);
}

}  // namespace deepy
