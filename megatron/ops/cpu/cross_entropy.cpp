// Losses of logits, which become their own gradients: a row at a time, so that it is read from memory once and stays
// in a core's cache between the passes for its maximum, its sum and its gradient.
//
//     m = max(x);   z = sum(exp(x - m));   loss = (m - x[label]) + log z
//     d loss / d x = exp(x - m) / z - [column is label]
//
// z is summed in fp64 over runs of fp32: a loss is exact to fp32's last digits for any vocabulary.
#include <cmath>
#include <memory>

#include "parallel.h"
#include "vectors.h"

namespace deepy {
namespace {

constexpr int64_t RUN = 64 * LANES;  // summed in fp32

template <class T>
float maximum_of(const T* row, int64_t size) {
    const float lowest = -std::numeric_limits<float>::infinity();
    Floats found[4] = {all(lowest), all(lowest), all(lowest), all(lowest)};
    int64_t column = 0;
    for (; column + 4 * LANES <= size; column += 4 * LANES)
        for (int part = 0; part < 4; ++part) found[part] = larger(load(row + column + part * LANES), found[part]);
    for (; column + LANES <= size; column += LANES) found[0] = larger(load(row + column), found[0]);
    if (column < size) found[1] = larger(load_some(row + column, size - column, lowest), found[1]);
    return largest(larger(larger(found[0], found[1]), larger(found[2], found[3])));
}

// Returns z. Where KEEPS, weights[c] = exp(row[c] - maximum); weights may be the row.
template <bool KEEPS, class T>
double sum_of_weights(const T* row, int64_t size, float maximum, float* weights) {
    const Floats shift = all(maximum);
    double total = 0.0;
    int64_t column = 0;
    while (column + LANES <= size) {
        const int64_t end = column + RUN < size - LANES + 1 ? column + RUN : size - LANES + 1;
        Floats partial[2] = {};
        for (int part = 0; column < end; column += LANES, part ^= 1) {
            Floats weight = exponential(load(row + column) - shift);
            partial[part] += weight;
            if (KEEPS) store(weights + column, weight);
        }
        total += sum(partial[0] + partial[1]);
    }
    if (column < size) {
        Floats weight = exponential(load_some(row + column, size - column, 0.0f) - shift);
        if (KEEPS) store_some(weights + column, weight, size - column);
        for (int64_t lane = 0; lane < size - column; ++lane) total += weight[lane];
    }
    return total;
}

template <class T>
void write_scaled(T* row, const float* weights, int64_t size, float factor) {
    int64_t column = 0;
    for (; column + LANES <= size; column += LANES) store(row + column, load(weights + column) * factor);
    if (column < size) store_some(row + column, load_some(weights + column, size - column, 0.0f) * factor, size - column);
}

template <class T>
void store_one(T* pointer, float value) {
    store_some(pointer, all(value), 1);
}

template <class T>
float row_loss(T* row, int64_t size, int64_t label, bool has_gradient, float scale, float* scratch) {
    const float maximum = maximum_of(row, size), target = load_one(row + label);
    float* weights = sizeof(T) == sizeof(float) ? reinterpret_cast<float*>(row) : scratch;
    const double total = has_gradient ? sum_of_weights<true>(row, size, maximum, weights)
                                      : sum_of_weights<false>(row, size, maximum, weights);
    if (has_gradient) {
        const float of_label = static_cast<float>((weights[label] / total - 1.0) * scale);
        write_scaled(row, weights, size, static_cast<float>(scale / total));
        store_one(row + label, of_label);
    }
    return static_cast<float>((static_cast<double>(maximum) - target) + std::log(total));
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
            for (int64_t row = first; row < last; ++row)
                losses[row] = row_loss(
                    static_cast<T*>(logits) + row * stride, size, labels[row], has_gradient, scale, scratch.get());
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
                const float maximum = maximum_of(values, size);
                statistics[row] = maximum;
                statistics[rows + row] = static_cast<float>(sum_of_weights<false>(values, size, maximum, nullptr));
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
                    store(values + column, exponential(load(values + column) - shift) * factor);
                if (column < size) {
                    Floats rest = load_some(values + column, size - column, 0.0f);
                    store_some(values + column, exponential(rest - shift) * factor, size - column);
                }
                if (label >= 0 && label < size)
                    store_one(values + label, exponential(all(target) - shift)[0] * factor - scale);
            }
        });
    });
    return 0;
}
