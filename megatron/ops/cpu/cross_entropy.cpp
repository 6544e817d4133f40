// Losses of logits, which become their own gradients: a row at a time, so that it is read from memory once and stays
// in a core's cache between the passes for its maximum, its sum and its gradient.
//
//     m = max(x);   z = sum(exp(x - m));   loss = (m - x[label]) + log z
//     d loss / d x = exp(x - m) / z - [column is label]
//
// A block of a row is looked at twice while it is in the core's first cache. z is summed in fp64 over blocks, so that a
// loss is exact to fp32's last digits for any vocabulary.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "parallel.h"
#include "vectors.h"

namespace deepy {
namespace {

constexpr int64_t BLOCK = 64 * LANES;

template <class T>
float maximum_of(const T* values, int64_t size) {
    const float lowest = -std::numeric_limits<float>::infinity();
    Floats found[4] = {all(lowest), all(lowest), all(lowest), all(lowest)};
    int64_t column = 0;
    for (; column + 4 * LANES <= size; column += 4 * LANES)
        for (int part = 0; part < 4; ++part) found[part] = larger(load(values + column + part * LANES), found[part]);
    for (; column + LANES <= size; column += LANES) found[0] = larger(load(values + column), found[0]);
    if (column < size) found[1] = larger(load_some(values + column, size - column, lowest), found[1]);
    return largest(larger(larger(found[0], found[1]), larger(found[2], found[3])));
}

// Returns the sum of exp(values - shift), none of which is above the shift. Where KEEPS, weights are what is summed.
template <bool KEEPS, class T>
float block_sum(const T* values, int64_t size, float shift, float* weights) {
    Floats partial[2] = {};
    int64_t column = 0;
    for (; column + 2 * LANES <= size; column += 2 * LANES)
        for (int part = 0; part < 2; ++part) {
            __builtin_prefetch(values + column + BLOCK + part * LANES);  // what comes next, while this is computed
            const Floats weight = exponential_below_zero(load(values + column + part * LANES) - shift);
            partial[part] += weight;
            if (KEEPS) store(weights + column + part * LANES, weight);
        }
    for (; column < size; column += LANES) {
        const int64_t count = std::min<int64_t>(LANES, size - column);
        Floats rest = load_some(values + column, count, -std::numeric_limits<float>::infinity());
        const Floats weight = exponential_below_zero(rest - shift);
        partial[0] += weight;
        if (KEEPS) store_some(weights + column, weight, count);
    }
    return sum(partial[0] + partial[1]);
}

struct Row {
    float maximum;
    double total;  // of exp(x - maximum)
};

// Where KEEPS, weights[c] = exp(row[c] - shifts[c / BLOCK]), and weights may be the row; a block's shift is the largest
// value up to its end, so that every value is read from memory once.
template <bool KEEPS, class T>
Row statistics_of(const T* row, int64_t size, float* weights, float* shifts) {
    const float lowest = -std::numeric_limits<float>::infinity();
    Row result = {lowest, 0.0};
    for (int64_t column = 0; column < size; column += BLOCK) {
        const int64_t count = std::min(BLOCK, size - column);
        const float largest_here = maximum_of(row + column, count);
        if (largest_here > result.maximum) {
            result.total *= std::exp(static_cast<double>(result.maximum) - largest_here);
            result.maximum = largest_here;
        }
        const float shift = result.maximum == lowest ? 0.0f : result.maximum;  // so far all are 0
        result.total += block_sum<KEEPS>(row + column, count, shift, KEEPS ? weights + column : nullptr);
        if (KEEPS) shifts[column / BLOCK] = result.maximum;
    }
    return result;
}

template <class T>
void write_scaled(T* values, const float* weights, int64_t size, float factor) {
    int64_t column = 0;
    for (; column + LANES <= size; column += LANES)
        store_normal(values + column, load(weights + column) * factor);
    if (column < size)
        store_some(values + column, load_some(weights + column, size - column, 0.0f) * factor, size - column);
}

template <class T>
void store_one(T* pointer, float value) {
    store_some(pointer, all(value), 1);
}

template <class T>
float row_loss(T* row, int64_t size, int64_t label, bool has_gradient, float scale, float* scratch, float* shifts) {
    const float target = load_one(row + label);
    float* weights = sizeof(T) == sizeof(float) ? reinterpret_cast<float*>(row) : scratch;
    const Row found = has_gradient ? statistics_of<true>(row, size, weights, shifts)
                                   : statistics_of<false>(row, size, weights, shifts);
    if (has_gradient) {
        float factor = 0.0f, shift = std::numeric_limits<float>::quiet_NaN();
        for (int64_t column = 0; column < size; column += BLOCK) {
            if (shifts[column / BLOCK] != shift) {
                shift = shifts[column / BLOCK];
                factor = static_cast<float>(scale * std::exp(static_cast<double>(shift) - found.maximum) / found.total);
            }
            write_scaled(row + column, weights + column, std::min(BLOCK, size - column), factor);
        }
        const double share = std::exp(static_cast<double>(target) - found.maximum) / found.total;
        store_one(row + label, static_cast<float>((share - 1.0) * scale));
    }
    return static_cast<float>((static_cast<double>(found.maximum) - target) + std::log(found.total));
}

int64_t first_outside(const int64_t* labels, int64_t rows, int64_t size) {
    for (int64_t row = 0; row < rows; ++row)
        if (labels[row] < 0 || labels[row] >= size) return row;
    return -1;
}

int64_t grain(int64_t size) { return 1 + 16384 / (size + 1); }

}  // namespace
}  // namespace deepy

// losses [rows] of logits [rows, size], whose rows begin `stride` apart. With a gradient the logits become their own
// gradients times `scale`; without, they stay. Returns -1, or the first row whose label is not in [0, size), and then
// nothing is written.
DEEPY_EXPORT int64_t deepy_block_losses(
    void* logits, int64_t type, const int64_t* labels, float* losses, int64_t rows, int64_t size, int64_t stride,
    int64_t has_gradient, float scale) {
    using namespace deepy;
    const int64_t outside = first_outside(labels, rows, size);
    if (outside >= 0) return outside;
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        parallel_for(0, rows, grain(size), [&](int64_t first, int64_t last) {
            const bool needs_scratch = has_gradient && sizeof(T) != sizeof(float);
            std::unique_ptr<float[]> scratch(needs_scratch ? new float[size] : nullptr);
            std::unique_ptr<float[]> shifts(new float[size / BLOCK + 1]);
            for (int64_t row = first; row < last; ++row)
                losses[row] = row_loss(
                    static_cast<T*>(logits) + row * stride, size, labels[row], has_gradient, scale, scratch.get(),
                    shifts.get());
        });
    });
    return -1;
}

// statistics [3, rows]: of each row its maximum, its sum of exp(x - maximum), and its label's logit, 0 where the label
// is not among the columns, of which the first has the number `begin`.
DEEPY_EXPORT int64_t deepy_logits_statistics(
    const void* logits, int64_t type, const int64_t* labels, float* statistics, int64_t rows, int64_t size,
    int64_t stride, int64_t begin) {
    using namespace deepy;
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        parallel_for(0, rows, grain(size), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                const T* values = static_cast<const T*>(logits) + row * stride;
                const int64_t label = labels[row] - begin;
                const Row found = statistics_of<false>(values, size, nullptr, nullptr);
                statistics[row] = found.maximum;
                statistics[rows + row] = static_cast<float>(found.total);
                statistics[2 * rows + row] = label >= 0 && label < size ? load_one(values + label) : 0.0f;
            }
        });
    });
    return 0;
}

// Writes the gradients times `scale` over the logits; maximum and total [rows] are those of the whole rows.
DEEPY_EXPORT int64_t deepy_logits_gradient(
    void* logits, int64_t type, const int64_t* labels, const float* maximum, const float* total, int64_t rows,
    int64_t size, int64_t stride, int64_t begin, float scale) {
    using namespace deepy;
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        parallel_for(0, rows, grain(size), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                T* values = static_cast<T*>(logits) + row * stride;
                const int64_t label = labels[row] - begin;
                const Floats shift = all(maximum[row]);
                const float factor = scale / total[row];
                const float target = label >= 0 && label < size ? load_one(values + label) : 0.0f;
                int64_t column = 0;
                for (; column + LANES <= size; column += LANES)
                    store_normal(values + column, exponential_below_zero(load(values + column) - shift) * factor);
                if (column < size) {
                    Floats rest = load_some(values + column, size - column, 0.0f);
                    store_some(values + column, exponential_below_zero(rest - shift) * factor, size - column);
                }
                if (label >= 0 && label < size)
                    store_one(values + label, exponential_below_zero(all(target) - shift)[0] * factor - scale);
            }
        });
    });
    return 0;
}
