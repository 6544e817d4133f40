// Heads of attention out of a joint projection, turned on the way: one pass over memory, and one back.
//
//     y[j] = x[j] cos - x[j + half] sin;      y[j + half] = x[j + half] cos + x[j] sin;      all else passes
//
// A token's features are read in their order, and each head's positions written one after the other.
#include <type_traits>

#include "parallel.h"
#include "vectors.h"

namespace deepy {
namespace {

// Where head n of token s in row b lies: base + b strides[0] + n strides[1] + s strides[2].
template <class T>
struct Heads {
    T* base;
    const int64_t* strides;
    T* at(int64_t row, int64_t head, int64_t token) const {
        return base + row * strides[0] + head * strides[1] + token * strides[2];
    }
};

template <class T>
void copy(const T* source, T* target, int64_t count) {
    int64_t done = 0;
    for (; done + LANES <= count; done += LANES) std::memcpy(target + done, source + done, LANES * sizeof(T));
    if (done < count) std::memcpy(target + done, source + done, (count - done) * sizeof(T));
}

// What a token's heads are turned by: cos, sin [half]; sign is -1 on the way back. Where both features of all pairs
// fit into one vector, they are turned at once: values times `cosines`, plus their partners times `sines`.
struct Turn {
    const float* cos;
    const float* sin;
    float sign;
    int64_t half;
    bool narrow;
    Floats cosines, sines;
    Ints partners;

    Turn(const float* cos, const float* sin, float sign, int64_t half, int64_t dim)
        : cos(cos), sin(sin), sign(sign), half(half), narrow(2 * half <= LANES && dim >= LANES) {
        for (int64_t lane = 0; narrow && lane < LANES; ++lane) {
            const bool first = lane < half, second = !first && lane < 2 * half;
            const int64_t pair = second ? lane - half : lane;
            cosines[lane] = first || second ? cos[pair] : 1.0f;
            sines[lane] = first ? -sign * sin[pair] : second ? sign * sin[pair] : 0.0f;
            partners[lane] = static_cast<int32_t>(first ? lane + half : second ? pair : lane);
        }
    }

    Floats permuted(Floats values) const {
#if defined(__clang__)
        Floats result;
        for (int lane = 0; lane < LANES; ++lane) result[lane] = values[partners[lane]];
        return result;
#else
        return __builtin_shuffle(values, partners);
#endif
    }

    template <class T>
    void pairs(const T* source, T* target) const {
        int64_t pair = 0;
        for (; pair + LANES <= half; pair += LANES) {
            const Floats one = load(source + pair), other = load(source + half + pair);
            const Floats c = load(cos + pair), s = load(sin + pair) * sign;
            store(target + pair, one * c - other * s);
            store(target + half + pair, other * c + one * s);
        }
        if (pair == half) return;
        const int64_t count = half - pair;
        const Floats one = load_some(source + pair, count, 0.0f), other = load_some(source + half + pair, count, 0.0f);
        const Floats c = load_some(cos + pair, count, 0.0f), s = load_some(sin + pair, count, 0.0f) * sign;
        store_some(target + pair, one * c - other * s, count);
        store_some(target + half + pair, other * c + one * s, count);
    }

    // Copies a head of `dim` features, turned.
    template <class T>
    void operator()(const T* source, T* target, int64_t dim) const {
        if (!narrow) {
            pairs(source, target);
            copy(source + 2 * half, target + 2 * half, dim - 2 * half);
            return;
        }
        const Floats values = load(source);
        copy(source, target, dim);
        if (2 * half == LANES)
            store(target, values * cosines + permuted(values) * sines);
        else  // what is not turned stays as it was copied, whatever it is
            store_some(target, values * cosines + permuted(values) * sines, 2 * half);
    }
};

}  // namespace
}  // namespace deepy

// Packed [batch, length, groups, heads + 2, dim] into query [batch, groups * heads, length, dim], key and value
// [batch, groups, length, dim], whose strides of row, head and token are strides[0..2], [3..5] and [6..8]; or, where
// `back`, gradients of these into that of packed. cos, sin: [length, half], of row b from b * table_stride on.
DEEPY_EXPORT int64_t deepy_split_heads(
    void* packed, void* query, void* key, void* value, int64_t type, const int64_t* strides, const float* cos,
    const float* sin, int64_t table_stride, int64_t batch, int64_t length, int64_t groups, int64_t heads, int64_t dim,
    int64_t half, int64_t back) {
    using namespace deepy;
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const Heads<T> queries{static_cast<T*>(query), strides}, keys{static_cast<T*>(key), strides + 3};
        const Heads<T> values{static_cast<T*>(value), strides + 6};
        parallel_for(0, batch * length, 1 + 16384 / (groups * (heads + 2) * dim), [&](int64_t first, int64_t last) {
            for (int64_t place = first; place < last; ++place) {
                const int64_t row = place / length, token = place % length, table = row * table_stride + token * half;
                const Turn turn(cos + table, sin + table, back ? -1.0f : 1.0f, half, dim);
                for (int64_t group = 0; group < groups; ++group) {
                    T* joint = static_cast<T*>(packed) + (place * groups + group) * (heads + 2) * dim;
                    for (int64_t head = 0; head < heads + 2; ++head, joint += dim) {
                        T* apart = head < heads    ? queries.at(row, group * heads + head, token)
                                   : head == heads ? keys.at(row, group, token)
                                                   : values.at(row, group, token);
                        T *source = back ? apart : joint, *target = back ? joint : apart;
                        if (head <= heads)
                            turn(source, target, dim);
                        else
                            copy(source, target, dim);
                    }
                }
            }
        });
    });
    return 0;
}
