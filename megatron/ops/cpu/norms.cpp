// layer_norm and rms_norm, with the addition of the residual before them, in one pass over memory each way. A row is
// read several times, but from the first cache. Arithmetic is fp32.
//
//     t = x + r, rounded to its dtype     n = (t - mean) scale,  scale = 1 / sqrt(mean((t - mean)^2) + eps)
//     y = n weight + bias                 rms_norm: the same without a mean
//     g = dy weight                       dx = dr = dt + scale (g - mean(g) - n mean(g n));  rms_norm: without mean(g)
//     dweight = sum over rows of dy n     dbias = sum over rows of dy
#include <cmath>
#include <memory>
#include <type_traits>

#include "columns.h"
#include "parallel.h"

namespace deepy {
namespace {

constexpr int64_t GRAIN = 32768;    // values of a thread's share: below it a second thread takes longer to be woken
constexpr int64_t FEWEST = 32;      // rows whose part of the weights' gradients is summed by itself,
constexpr int64_t MOST_PARTS = 128; // unless there would be more such parts than this

// Weights of any dtype in fp32, copied where they are of another; null stays so.
class InFp32 {
  public:
    InFp32(const void* weights, int64_t type, int64_t size) : pointer_(static_cast<const float*>(weights)) {
        if (type == FP32 || !weights) return;
        copy_.reset(new float[size]);
        with_type(type, [&](auto* tag) {
            const auto* source = static_cast<std::add_const_t<std::remove_pointer_t<decltype(tag)>>*>(weights);
            over_columns(size, [&](int64_t column, auto some) {
                some.write(copy_.get() + column, some.read(source + column));
            });
        });
        pointer_ = copy_.get();
    }
    const float* get() const { return pointer_; }

  private:
    std::unique_ptr<float[]> copy_;
    const float* pointer_;
};

// What is kept of each row for the backward pass.
struct Statistics {
    float* scales;
    float* means;  // null: rms_norm
};

template <class T, bool CENTRED>
struct Norm {
    const float* weight;  // [width], or null
    const float* bias;
    int64_t width;
    Statistics statistics;

    // Writes y of a row t.
    void forward(int64_t row, const T* values, T* target, float eps) const {
        float average = 0.0f;
        if (CENTRED) {
            Sum sum;
            over_columns_in_turns(width, [&](int64_t column, auto some, int turn) {
                sum.parts[turn] += some.read(values + column);
            });
            statistics.means[row] = average = sum.value() / width;
        }
        Sum squares;
        over_columns_in_turns(width, [&](int64_t column, auto some, int turn) {
            const Floats centred = some.read(values + column, average) - average;
            squares.parts[turn] += centred * centred;
        });
        const float scale = 1.0f / std::sqrt(squares.value() / width + eps);
        statistics.scales[row] = scale;
        over_columns(width, [&](int64_t column, auto some) {
            Floats normed = (some.read(values + column) - average) * scale;
            if (weight) normed *= some.read(weight + column);
            if (bias) normed += some.read(bias + column);
            some.write_normal(target + column, normed);
        });
    }

    // Writes a row t.
    void add(const T* one, const T* other, T* total) const {
        over_columns(width, [&](int64_t column, auto some) {
            some.write(total + column, some.read(one + column) + some.read(other + column));
        });
    }

    // Writes dx of a row, of dy = upstream and dt = above or nothing, and adds its part to the weights' gradients, where
    // these are not null. (Several rows at once would spare most of these additions, but take twice as long.)
    void backward(
        int64_t row, const T* values, const T* upstream, const T* above, T* gradient, float* weight_sum,
        float* bias_sum) const {
        const float average = CENTRED ? statistics.means[row] : 0.0f, scale = statistics.scales[row];
        Sum of_gradient, of_product;
        over_columns_in_turns(width, [&](int64_t column, auto some, int turn) {
            const Floats found = some.read(upstream + column);
            const Floats normed = (some.read(values + column, average) - average) * scale;
            const Floats gained = weight ? found * some.read(weight + column) : found;
            if (weight_sum) some.write(weight_sum + column, some.read(weight_sum + column) + found * normed);
            if (bias_sum) some.write(bias_sum + column, some.read(bias_sum + column) + found);
            if (CENTRED) of_gradient.parts[turn] += gained;
            of_product.parts[turn] += gained * normed;
        });
        const float share = CENTRED ? of_gradient.value() / width * scale : 0.0f;
        const float slope = of_product.value() / width * scale * scale;
        over_columns(width, [&](int64_t column, auto some) {
            const Floats given = some.read(upstream + column);
            const Floats gained = weight ? given * some.read(weight + column) : given;
            // A difference, and no product, which would not be rounded before dt is added, and rounded to T as well: so
            // dx is the same to the last bit where autograd adds it, as behind a pipeline's stage.
            const Floats found = gained * scale - ((some.read(values + column) - average) * slope + share);
            some.write_normal(gradient + column, found);
            if (above) some.write_normal(gradient + column, some.read(gradient + column) + some.read(above + column));
        });
    }
};

// Calls body(a Norm of this kind) with what its parameters are.
template <class Body>
void with_norm(
    int64_t type, const float* weight, const float* bias, int64_t width, float* statistics, int64_t centred,
    int64_t rows, const Body& body) {
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        if (centred)
            body(tag, Norm<T, true>{weight, bias, width, {statistics, statistics + rows}});
        else
            body(tag, Norm<T, false>{weight, bias, width, {statistics, nullptr}});
    });
}

// Rows that are summed by themselves, which depend on nothing but how many there are.
int64_t rows_of_part(int64_t rows) {
    const int64_t least = (rows + MOST_PARTS - 1) / MOST_PARTS;
    return least < FEWEST ? FEWEST : least;
}

// target [width] = the sum over parts, in their order, of partial [parts, stride].
void sum_parts(const float* partial, int64_t parts, int64_t stride, int64_t width, void* target, int64_t type) {
    with_type(type, [&](auto* tag) {
        over_columns(width, [&](int64_t column, auto some) {
            Floats sum = {};
            for (int64_t part = 0; part < parts; ++part) sum += some.read(partial + part * stride + column);
            some.write(static_cast<decltype(tag)>(target) + column, sum);
        });
    });
}

}  // namespace
}  // namespace deepy

// output [rows, width] of inputs, or of inputs + residual, which goes into total; statistics: fp32 [2, rows], or,
// without a mean, [rows]. residual and total, weight and bias [width] may be null.
DEEPY_EXPORT int64_t deepy_norm(
    const void* inputs, const void* residual, const void* weight, const void* bias, void* output, void* total,
    float* statistics, int64_t type, int64_t weight_type, int64_t centred, int64_t rows, int64_t width, float eps) {
    using namespace deepy;
    const InFp32 gains(weight, weight_type, width), offsets(bias, weight_type, width);
    with_norm(type, gains.get(), offsets.get(), width, statistics, centred, rows, [&](auto* tag, const auto& norm) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const T *one = static_cast<const T*>(inputs), *other = static_cast<const T*>(residual);
        T *sums = static_cast<T*>(total), *target = static_cast<T*>(output);
        parallel_for(0, rows, 1 + GRAIN / width, [&](int64_t first, int64_t last) {
            for (int64_t row = first, place = first * width; row < last; ++row, place += width) {
                if (residual) norm.add(one + place, other + place, sums + place);
                norm.forward(row, (residual ? sums : one) + place, target + place, eps);
            }
        });
    });
    return 0;
}

// gradient [rows, width] of what was normed, `values`; above: its gradient from elsewhere, or null. The gradients of
// weight and bias, where they are not null.
DEEPY_EXPORT int64_t deepy_norm_gradient(
    const void* values, float* statistics, const void* weight, const void* upstream, const void* above, void* gradient,
    void* weight_gradient, void* bias_gradient, int64_t type, int64_t weight_type, int64_t centred, int64_t rows,
    int64_t width) {
    using namespace deepy;
    const InFp32 gains(weight, weight_type, width);
    const int64_t size = rows_of_part(rows), parts = (rows + size - 1) / size, sums = !!weight_gradient + !!bias_gradient;
    const std::unique_ptr<float[]> partial(new float[parts * sums * width]);
    with_norm(type, gains.get(), nullptr, width, statistics, centred, rows, [&](auto* tag, const auto& norm) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const T *of = static_cast<const T*>(values), *found = static_cast<const T*>(upstream);
        const T* from = static_cast<const T*>(above);
        T* target = static_cast<T*>(gradient);
        parallel_for(0, parts, 1 + GRAIN / (size * width), [&](int64_t first, int64_t last) {
            for (int64_t part = first; part < last; ++part) {
                float* sum = partial.get() + part * sums * width;
                std::memset(sum, 0, sums * width * sizeof(float));
                float* weight_sum = weight_gradient ? sum : nullptr;
                float* bias_sum = bias_gradient ? sum + (sums - 1) * width : nullptr;
                const int64_t begin = part * size, end = begin + size < rows ? begin + size : rows;
                for (int64_t row = begin, place = begin * width; row < end; ++row, place += width)
                    norm.backward(
                        row, of + place, found + place, from ? from + place : nullptr, target + place, weight_sum,
                        bias_sum);
            }
        });
    });
    if (weight_gradient) sum_parts(partial.get(), parts, sums * width, width, weight_gradient, weight_type);
    if (bias_gradient)
        sum_parts(partial.get() + (sums - 1) * width, parts, sums * width, width, bias_gradient, weight_type);
    return 0;
}
