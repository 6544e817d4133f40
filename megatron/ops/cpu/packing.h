// Copies of parts of a matrix in the order in which a product reads them: slivers of a few lines (rows of the left
// factor, columns of the right one), in each of which the lines' words k stand together. A word is an fp32 element, or
// two of bf16, k even and the next.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

namespace deepy {

// How many elements make a word, and words of so many elements, the last filled up with 0.
template <class T>
constexpr int64_t PER_WORD = sizeof(float) / sizeof(T);
template <class T>
constexpr int64_t words(int64_t elements) {
    return (elements + PER_WORD<T> - 1) / PER_WORD<T>;
}

// A factor: line i, element k lies at values[i * stride + k] where lines lie in one piece, else at
// values[k * stride + i].
template <class T>
struct Factor {
    const T* values;
    int64_t stride;
    bool has_lines;

    Factor from(int64_t line, int64_t k) const {
        return {values + (has_lines ? line * stride + k : k * stride + line), stride, has_lines};
    }
};

// The lanes with these numbers of two vectors, the other's from LANES on. (GCC before 12 has no __builtin_shufflevector.)
template <int... lanes>
inline Floats chosen(Floats one, Floats other) {
#if defined(__clang__)
    return __builtin_shufflevector(one, other, lanes...);
#else
    return __builtin_shuffle(one, other, Ints{lanes...});
#endif
}
template <int... lanes>
inline Floats low_halves(Floats one, Floats other, std::integer_sequence<int, lanes...>) {
    return chosen<(lanes / 2 + (lanes % 2) * LANES)...>(one, other);
}
template <int... lanes>
inline Floats high_halves(Floats one, Floats other, std::integer_sequence<int, lanes...>) {
    return chosen<(LANES / 2 + lanes / 2 + (lanes % 2) * LANES)...>(one, other);
}

// Turns LANES vectors of LANES values: each round puts vector i and vector i + LANES / 2 together, lane by lane.
inline void transpose(Floats* vectors) {
    using All = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        Floats turned[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; ++i) {
            turned[2 * i] = low_halves(vectors[i], vectors[i + LANES / 2], All());
            turned[2 * i + 1] = high_halves(vectors[i], vectors[i + LANES / 2], All());
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) vectors[i] = turned[i];
    }
}

// Asks, a few at a time, for the cache lines of a part of a factor, so that they have arrived when it is copied.
template <class T>
class Ahead {
public:
    // calls: of `advance`, after which all were asked for.
    Ahead(Factor<T> from, int64_t depth, int64_t lines, int64_t calls)
        : from_(from), rows_(from.has_lines ? lines : depth), width_(from.has_lines ? depth : lines) {
        const int64_t all = rows_ * ((width_ + LINE - 1) / LINE);
        each_ = calls > 0 ? (all + calls - 1) / calls : 0;
    }

    void advance() {
        for (int64_t asked = 0; asked < each_ && row_ < rows_; ++asked) {
            __builtin_prefetch(from_.values + row_ * from_.stride + column_, 0, 2);
            column_ += LINE;
            if (column_ >= width_) column_ = 0, ++row_;
        }
    }

private:
    static constexpr int64_t LINE = 64 / sizeof(T);
    Factor<T> from_;
    int64_t rows_, width_, each_, row_ = 0, column_ = 0;
};

// Lines that do not lie in one piece: rows are read a few at a time, whole, so that memory is read as it lies.
template <int64_t width>
void pack_rows(Factor<float> from, int64_t depth, int64_t lines, float* to) {
    constexpr int64_t BATCH = 4, DISTANCE = 8;  // rows copied at once, and rows ahead of which memory is asked for
    for (int64_t batch = 0; batch < depth; batch += BATCH) {
        const int64_t end = std::min(depth, batch + BATCH);
        for (int64_t start = 0; start < lines; start += width) {
            const int64_t count = std::min(width, lines - start);
            for (int64_t k = batch; k < end; ++k) {
                const float* place = from.values + k * from.stride + start;
                float* target = to + start * depth + k * width;
                for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(place + DISTANCE * from.stride + i, 0, 2);
                if (count == width) {
                    std::memcpy(target, place, sizeof(float) * width);
                } else {
                    std::memset(target, 0, sizeof(float) * width);
                    std::memcpy(target, place, sizeof(float) * count);
                }
            }
        }
    }
}

// The word at a place of which `count` elements are there.
template <class T>
inline float word_at(const T* place, int64_t count) {
    float word = 0.0f;
    std::memcpy(&word, place, std::min(count, PER_WORD<T>) * sizeof(T));
    return word;
}

// A sliver of lines that lie in one piece each, of which `count` are there. While it is copied, `next` is asked for.
template <int64_t width, class T>
void pack_lines(Factor<T> from, int64_t depth, int64_t count, float* to, Ahead<T>& next) {
    constexpr int64_t PER = PER_WORD<T>;
    const int64_t whole = depth / PER / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        next.advance();
        for (int64_t line = 0; line < width; line += LANES) {
            Floats vectors[LANES];
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; ++i) {
                const T* place = from.values + (line + i) * from.stride + k * PER;
                vectors[i] = line + i < count ? raw<Floats>(place) : Floats{};
            }
            transpose(vectors);
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; ++i) store(to + (k + i) * width + line, vectors[i]);
        }
    }
    for (int64_t k = whole; k < words<T>(depth); ++k) {
        for (int64_t line = 0; line < width; ++line) {
            const T* place = from.values + line * from.stride + k * PER;
            to[k * width + line] = line < count ? word_at(place, depth - k * PER) : 0.0f;
        }
    }
}

#if HAS_BF16_PRODUCTS
// The same for bf16: pairs of rows, put together element by element.
template <int64_t width>
void pack_rows(Factor<BFloat16> from, int64_t depth, int64_t lines, float* to) {
    constexpr int64_t BATCH = 4, DISTANCE = 8;  // of pairs and rows
    const int64_t pairs = words<BFloat16>(depth);
    for (int64_t batch = 0; batch < pairs; batch += BATCH) {
        const int64_t end = std::min(pairs, batch + BATCH);
        for (int64_t start = 0; start < lines; start += width) {
            const int64_t count = std::min(width, lines - start);
            for (int64_t pair = batch; pair < end; ++pair) {
                const BFloat16 *even = from.values + 2 * pair * from.stride + start, *odd = even + from.stride;
                float* target = to + start * pairs + pair * width;
                __builtin_prefetch(even + DISTANCE * from.stride, 0, 2);
                __builtin_prefetch(odd + DISTANCE * from.stride, 0, 2);
                const bool is_pair = 2 * pair + 1 < depth;
#pragma GCC unroll 2
                for (int64_t i = 0; i < width; i += 16) {
                    const __mmask16 there = first_lanes(count - i), wanted = first_lanes(width - i);
                    const Bits low = extended((Halves)_mm256_maskz_loadu_epi16(there, even + i));
                    const Bits high = extended((Halves)_mm256_maskz_loadu_epi16(is_pair ? there : 0, odd + i));
                    _mm512_mask_storeu_epi32(target + i, wanted, (__m512i)(low | high << 16));
                }
            }
        }
    }
}

#endif

// `lines` lines in slivers of `width` each, one behind the other, the last filled up with 0. It may write LANES floats
// beyond the last.
template <int64_t width, class T>
void pack(Factor<T> from, int64_t depth, int64_t lines, float* to) {
    if (!from.has_lines) return pack_rows<width>(from, depth, lines, to);
    for (int64_t start = 0; start < lines; start += width) {
        const int64_t behind = std::min(width, std::max<int64_t>(lines - start - width, 0));
        Ahead<T> next(from.from(start + width, 0), depth, behind, words<T>(depth) / LANES);
        pack_lines<width>(from.from(start, 0), depth, std::min(width, lines - start), to + start * words<T>(depth), next);
    }
}

}  // namespace deepy
