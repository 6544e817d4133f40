// Activations with the bias before them, plain and gated, in one pass each way. Arithmetic is fp32.
//
//     y = act(x + b);                      dx = dy act'(x + b);              db = sum over rows of dx
//     y = act(gate) value, of halves [value; gate] = x + b;      d value = dy act(gate);     d gate = dy value act'(gate)
#include <type_traits>

#include "columns.h"
#include "parallel.h"

namespace deepy {
namespace {

constexpr int64_t CHUNK = 64;  // rows whose part of db is summed by itself, whatever the number of threads

// act(x) = x share, and its slope.
struct Activated {
    Floats share, slope;
};

inline Floats magnitude(Floats x) { return floats_of(bits_of(x) & 0x7FFFFFFFu); }

// 2^y to 2 units in the last place for y in [-126, 128); exactly 0 from -127 and infinite from 128 on. What is no
// number becomes 0: an activation multiplies by its input. y = n + r; 2^r by its minimax polynomial (Cephes' exp2f).
inline Floats power(Floats y) {
    const Floats shift = all(12582912.0f);  // 1.5 2^23: what is added to it is rounded to an integer
    y = larger(y, all(-127.0f));
    y = select(y < 128.0f, y, all(128.0f));
    const Floats shifted = y + shift, r = y - (shifted - shift);
    Floats p = r * 1.535336188e-4f + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
    return floats_of(bits_of(p) + (bits_of(shifted) << 23));
}

// x Phi(x): Phi by Abramowitz and Stegun 7.1.26, whose error is 7.5e-8; its tail has no cancellation.
struct Gelu {
    static Activated of(Floats x) {
        const Floats t = 1.0f / (1.0f + magnitude(x) * 0.23164189f), density = power(x * x * -0.72134752f);
        Floats p = t * 0.5307027145f - 0.7265760135f;
        p = p * t + 0.7107068705f;
        p = p * t - 0.1422483680f;
        p = p * t + 0.1274147960f;
        const Floats tail = p * t * density;
        const Floats share = select(x < 0.0f, tail, 1.0f - tail);
        return {share, share + x * density * 0.39894228f};
    }
};

// x/2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
struct GeluTanh {
    static Activated of(Floats x) {
        const Floats square = x * x;
        const Floats share = 1.0f / (1.0f + power(x * (square * -0.10294324f - 2.3022082f)));
        return {share, share + x * share * (1.0f - share) * (square * 0.21406445f + 1.5957691f)};
    }
};

struct Silu {
    static Activated of(Floats x) {
        const Floats share = 1.0f / (1.0f + power(x * -1.44269504f));
        return {share, share + x * share * (1.0f - share)};
    }
};

// What the Python side calls them (activations.py: KINDS).
enum Kind : int64_t { GELU = 0, GELU_TANH = 1, SILU = 2 };

template <class Function>
void with_kind(int64_t kind, const Function& function) {
    if (kind == GELU) return function(Gelu());
    if (kind == GELU_TANH) return function(GeluTanh());
    function(Silu());
}

template <class T>
struct Rows {
    const T* inputs;    // [rows, width]
    const float* bias;  // [width], or null
    int64_t size;       // of an output row
    bool gated;
    int64_t width() const { return gated ? 2 * size : size; }

    template <class Some>
    Floats biased(const T* row, int64_t column, const Some& some) const {
        const Floats values = some.read(row + column);
        return bias ? values + some.read(bias + column) : values;
    }

    template <class Act>
    void forward(int64_t row, T* output) const {
        const T* values = inputs + row * width();
        T* target = output + row * size;
        if (gated)
            over_columns(size, [&](int64_t column, auto some) {
                const Floats gate = biased(values, size + column, some);
                some.write(target + column, gate * Act::of(gate).share * biased(values, column, some));
            });
        else
            over_columns(size, [&](int64_t column, auto some) {
                const Floats x = biased(values, column, some);
                some.write(target + column, x * Act::of(x).share);
            });
    }

    // Writes a row of dx, and adds it to `total` [width], where that is not null.
    template <class Act>
    void backward(int64_t row, const T* upstream, T* gradient, float* total) const {
        const T *values = inputs + row * width(), *above = upstream + row * size;
        T* target = gradient + row * width();
        auto put = [&](int64_t column, Floats found, auto some) {
            some.write(target + column, found);
            if (total) some.write(total + column, some.read(total + column) + found);
        };
        if (gated)
            over_columns(size, [&](int64_t column, auto some) {
                const Floats gate = biased(values, size + column, some), dy = some.read(above + column);
                const Activated act = Act::of(gate);
                put(column, dy * gate * act.share, some);
                put(size + column, dy * biased(values, column, some) * act.slope, some);
            });
        else
            over_columns(size, [&](int64_t column, auto some) {
                put(column, some.read(above + column) * Act::of(biased(values, column, some)).slope, some);
            });
    }
};

template <class Body>
void dispatch(int64_t kind, int64_t type, const Body& body) {
    with_type(type, [&](auto* tag) { with_kind(kind, [&](auto act) { body(tag, act); }); });
}

}  // namespace
}  // namespace deepy

// output [rows, size] of inputs [rows, size], or gated [rows, 2 size]; bias of an input row, or null.
DEEPY_EXPORT int64_t deepy_bias_activation(
    const void* inputs, const float* bias, void* output, int64_t type, int64_t kind, int64_t gated, int64_t rows,
    int64_t size) {
    using namespace deepy;
    dispatch(kind, type, [&](auto* tag, auto act) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const Rows<T> of{static_cast<const T*>(inputs), bias, size, gated != 0};
        parallel_for(0, rows, 1 + 8192 / (size + 1), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                of.template forward<decltype(act)>(row, static_cast<T*>(output));
        });
    });
    return 0;
}

// gradient like the inputs; partial [ceil(rows / 64), width] fp32 and bias_gradient [width], or null for both.
DEEPY_EXPORT int64_t deepy_bias_activation_gradient(
    const void* inputs, const float* bias, const void* upstream, void* gradient, float* partial, void* bias_gradient,
    int64_t type, int64_t kind, int64_t gated, int64_t rows, int64_t size) {
    using namespace deepy;
    dispatch(kind, type, [&](auto* tag, auto act) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const Rows<T> of{static_cast<const T*>(inputs), bias, size, gated != 0};
        const int64_t width = of.width(), chunks = (rows + CHUNK - 1) / CHUNK;
        parallel_for(0, chunks, 1 + 8192 / (CHUNK * width + 1), [&](int64_t first, int64_t last) {
            for (int64_t row = first * CHUNK; row < last * CHUNK && row < rows; ++row) {
                float* total = partial ? partial + row / CHUNK * width : nullptr;
                if (total && row % CHUNK == 0) std::memset(total, 0, width * sizeof(float));
                of.template backward<decltype(act)>(
                    row, static_cast<const T*>(upstream), static_cast<T*>(gradient), total);
            }
        });
        if (!partial) return;
        parallel_for(0, (width + LANES - 1) / LANES, 1 + 8192 / (LANES * (chunks + 1)), [&](int64_t first, int64_t last) {
            for (int64_t column = first * LANES; column < last * LANES && column < width; column += LANES) {
                const int64_t count = width - column < LANES ? width - column : LANES;
                Floats total = {};
                for (int64_t chunk = 0; chunk < chunks; ++chunk)
                    total += load_some(partial + chunk * width + column, count, 0.0f);
                store_some(static_cast<T*>(bias_gradient) + column, total, count);
            }
        });
    });
    return 0;
}
