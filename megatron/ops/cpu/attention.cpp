// What stands between the products of attention, a row of scores at a time while it is in a core's cache:
//
//     P = softmax of what is seen of scale S, with alibi's -slope * distance; 0 elsewhere
//     dS = scale P (dP - sum over the row of dP P)
//
// and sums of gradients in fp32. Arithmetic is fp32. A row is read before it is written: results may take its place.
#include <memory>
#include <type_traits>

#include "parallel.h"
#include "vectors.h"

namespace deepy {
namespace {

struct Columns {
    int64_t begin, end;  // of whole vectors, of which the last may reach beyond the row
};

inline Columns around(int64_t first, int64_t last) {
    return {first / LANES * LANES, (last + LANES) / LANES * LANES};
}

inline Floats numbers(int64_t column) {
    Floats result;
    for (int lane = 0; lane < LANES; ++lane) result[lane] = static_cast<float>(lane);
    return result + static_cast<float>(column);
}

// A vector at `column` of a row of `size` values; what is beyond it is 0, and is not stored.
template <class T>
inline Floats load_within(const T* row, int64_t column, int64_t size) {
    return column + LANES <= size ? load(row + column) : load_some(row + column, size - column, 0.0f);
}
template <class T>
inline void store_within(T* row, int64_t column, int64_t size, Floats values) {
    if (column + LANES <= size)
        store(row + column, values);
    else
        store_some(row + column, values, size - column);
}

template <class T>
void clear_outside(T* row, Columns columns, int64_t size) {
    std::memset(row, 0, columns.begin * sizeof(T));
    if (columns.end < size) std::memset(row + columns.end, 0, (size - columns.end) * sizeof(T));
}

// The softmax over columns first..last, of scale * scores plus slope (column - position); scratch: `size` + LANES values.
template <class T>
void softmax_row(
    const T* scores, T* row, int64_t size, int64_t first, int64_t last, float scale, float slope, float position,
    float* scratch) {
    if (first > last) {
        std::memset(row, 0, size * sizeof(T));
        return;
    }
    const Columns columns = around(first, last);
    const Floats lowest = all(-std::numeric_limits<float>::infinity());
    const float begin = static_cast<float>(first), end = static_cast<float>(last);
    Floats found = lowest, total = {};
    for (int64_t column = columns.begin; column < columns.end; column += LANES) {
        const Floats number = numbers(column);
        Floats score = load_within(scores, column, size) * scale + (number - position) * slope;
        score = select((number >= begin) & (number <= end), score, lowest);
        store(scratch + column, score);
        found = larger(score, found);
    }
    const float maximum = largest(found);
    for (int64_t column = columns.begin; column < columns.end; column += LANES) {
        const Floats weight = exponential(load(scratch + column) - maximum);
        store(scratch + column, weight);
        total += weight;
    }
    const float factor = static_cast<float>(1.0 / sum(total));
    clear_outside(row, columns, size);
    for (int64_t column = columns.begin; column < columns.end; column += LANES)
        store_within(row, column, size, load(scratch + column) * factor);
}

template <class T>
void gradient_row(const T* weights, const T* above, T* row, int64_t size, int64_t first, int64_t last, float scale) {
    if (first > last) {
        std::memset(row, 0, size * sizeof(T));
        return;
    }
    const Columns columns = around(first, last);
    Floats products = {};
    for (int64_t column = columns.begin; column < columns.end; column += LANES)
        products += load_within(weights, column, size) * load_within(above, column, size);
    const float mean = static_cast<float>(sum(products));
    clear_outside(row, columns, size);
    for (int64_t column = columns.begin; column < columns.end; column += LANES) {
        const Floats weight = load_within(weights, column, size) * scale;
        store_within(row, column, size, weight * (load_within(above, column, size) - mean));
    }
}

// Rows of [batch, heads, queries, size]; of a row of the batch, query i sees columns first[i]..last[i] less `begin`,
// cut to 0..size - 1.
struct Seen {
    const int32_t *first, *last;
    int64_t stride;  // from one row of the batch to the next, 0 where they are alike
    int64_t heads, queries, begin, size;

    template <class Body>
    void each(int64_t batch, const Body& body) const {
        const int64_t rows = batch * heads * queries;
        parallel_for(0, rows, 1 + 8192 / (size + 1), [&](int64_t from, int64_t to) {
            std::unique_ptr<float[]> scratch(new float[size + LANES]);
            for (int64_t row = from; row < to; ++row) {
                const int64_t query = row % queries, head = row / queries % heads;
                const int64_t place = row / (queries * heads) * stride + query;
                const int64_t lowest = first[place] - begin, highest = last[place] - begin;
                body(row, head, query, lowest > 0 ? lowest : 0, highest < size ? highest : size - 1, scratch.get());
            }
        });
    }
};

}  // namespace
}  // namespace deepy

// scores and probabilities [batch, heads, queries, size]. slopes [heads] or null; query 0 stands at column `position`.
// first, last, stride, begin: `Seen`.
DEEPY_EXPORT int64_t deepy_seen_softmax(
    const void* scores, void* probabilities, int64_t type, const int32_t* first, const int32_t* last, int64_t stride,
    const float* slopes, float scale, int64_t batch, int64_t heads, int64_t queries, int64_t size, int64_t begin,
    int64_t position) {
    using namespace deepy;
    const Seen seen{first, last, stride, heads, queries, begin, size};
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        seen.each(batch, [&](int64_t row, int64_t head, int64_t query, int64_t low, int64_t high, float* scratch) {
            softmax_row(
                static_cast<const T*>(scores) + row * size, static_cast<T*>(probabilities) + row * size, size, low,
                high, scale, slopes ? slopes[head] : 0.0f, static_cast<float>(position + query), scratch);
        });
    });
    return 0;
}

// weights: the probabilities; above: their gradient; gradient: that of the scores.
DEEPY_EXPORT int64_t deepy_seen_softmax_gradient(
    const void* weights, const void* above, void* gradient, int64_t type, const int32_t* first, const int32_t* last,
    int64_t stride, float scale, int64_t batch, int64_t heads, int64_t queries, int64_t size, int64_t begin) {
    using namespace deepy;
    const Seen seen{first, last, stride, heads, queries, begin, size};
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        seen.each(batch, [&](int64_t row, int64_t, int64_t, int64_t low, int64_t high, float*) {
            gradient_row(
                static_cast<const T*>(weights) + row * size, static_cast<const T*>(above) + row * size,
                static_cast<T*>(gradient) + row * size, size, low, high, scale);
        });
    });
    return 0;
}

// total[b][0..size) += part[b][0..size) for rows of `total` that begin `stride` apart.
DEEPY_EXPORT int64_t deepy_add_rows(
    float* total, int64_t stride, const void* part, int64_t type, int64_t rows, int64_t size) {
    using namespace deepy;
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        parallel_for(0, rows, 1 + 16384 / (size + 1), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                float* sums = total + row * stride;
                const T* values = static_cast<const T*>(part) + row * size;
                for (int64_t column = 0; column < size; column += LANES)
                    store_within(
                        sums, column, size, load_within(sums, column, size) + load_within(values, column, size));
            }
        });
    });
    return 0;
}
