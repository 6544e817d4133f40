// Copies of parts of a matrix in the order in which a product reads them: slivers of a few lines (rows of the left
// factor, columns of the right one), in each of which the lines' elements k stand together.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

namespace deepy {

// A factor: line i, element k lies at values[i * stride + k] where lines lie in one piece, else at
// values[k * stride + i].
struct Factor {
    const float* values;
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
class Ahead {
public:
    // calls: of `advance`, after which all were asked for.
    Ahead(Factor from, int64_t depth, int64_t lines, int64_t calls)
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
    static constexpr int64_t LINE = 16;  // floats
    Factor from_;
    int64_t rows_, width_, each_, row_ = 0, column_ = 0;
};

// Lines that do not lie in one piece: rows are read a few at a time, whole, so that memory is read as it lies.
template <int64_t width>
void pack_rows(Factor from, int64_t depth, int64_t lines, float* to) {
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

// A sliver of lines that lie in one piece each, of which `count` are there. While it is copied, `next` is asked for.
template <int64_t width>
void pack_lines(Factor from, int64_t depth, int64_t count, float* to, Ahead& next) {
    const int64_t whole = depth / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        next.advance();
        for (int64_t line = 0; line < width; line += LANES) {
            Floats vectors[LANES];
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; ++i) {
                const float* place = from.values + (line + i) * from.stride + k;
                vectors[i] = line + i < count ? load(place) : Floats{};
            }
            transpose(vectors);
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; ++i) store(to + (k + i) * width + line, vectors[i]);
        }
    }
    for (int64_t k = whole; k < depth; ++k) {
        for (int64_t line = 0; line < width; ++line)
            to[k * width + line] = line < count ? from.values[line * from.stride + k] : 0.0f;
    }
}

// `lines` lines in slivers of `width` each, one behind the other, the last filled up with 0. It may write LANES floats
// beyond the last.
template <int64_t width>
void pack(Factor from, int64_t depth, int64_t lines, float* to) {
    if (!from.has_lines) return pack_rows<width>(from, depth, lines, to);
    for (int64_t start = 0; start < lines; start += width) {
        const int64_t behind = std::min(width, std::max<int64_t>(lines - start - width, 0));
        Ahead next(from.from(start + width, 0), depth, behind, depth / LANES);
        pack_lines<width>(from.from(start, 0), depth, std::min(width, lines - start), to + start * depth, next);
    }
}

}  // namespace deepy
