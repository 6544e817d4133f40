// Attention that holds the scores of 96 queries at a time, and their gradients; arithmetic is fp32 in every dtype.
//
//     P = softmax of scale q k^T and alibi's -slope * distance, over what is seen;    o = P v
//     dv = P^T do    dP = do v^T    dS = P (dP - do . o)    dq = scale dS k    dk = scale dS^T q
//
// The backward pass computes P again, from the logarithm of each query's sum (Dao et al. 2022, "FlashAttention"). Scores
// are held transposed, a row for each key and a column for each query: then the softmax goes along vectors, and of the
// five products none needs its factors in another order, but for the queries and do.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "packing.h"
#include "parallel.h"
#include "tiles.h"

namespace deepy {
namespace {

constexpr int64_t QUERIES = 96;
static_assert(QUERIES % ROWS == 0 && QUERIES % COLUMNS == 0, "blocks are made of whole tiles");
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Rows of features in memory: what lies between rows of the batch, heads and tokens.
template <class T>
struct Heads {
    T* values;
    const int64_t* strides;

    T* at(int64_t batch, int64_t head, int64_t token = 0) const {
        return values + batch * strides[0] + head * strides[1] + token * strides[2];
    }
    int64_t step() const { return strides[2]; }
};

// What all heads of a call share. first, last: the keys that a query sees, of each row of the batch or of one for all.
struct Shape {
    int64_t batch, heads, groups, queries, keys, dim;
    const int32_t *first, *last;
    int64_t bounds_stride;
    const float* slopes;
    float scale;

    int64_t padded_keys() const { return (keys + ROWS - 1) / ROWS * ROWS; }
};

struct Memory {
    explicit Memory(int64_t size) : values(static_cast<float*>(::operator new(size * 4, std::align_val_t(64)))) {}
    ~Memory() { ::operator delete(values, std::align_val_t(64)); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    float* values;
};

// Copies `count` rows of `dim` features, times a factor, to `rows` rows of DIM; what is beyond is 0.
template <int64_t DIM, class T>
void copy_in(const T* from, int64_t step, int64_t count, int64_t dim, float factor, int64_t rows, float* to) {
    for (int64_t row = 0; row < count; ++row, from += step, to += DIM) {
        int64_t column = 0;
        for (; column + LANES <= dim; column += LANES) store(to + column, load(from + column) * factor);
        if (column < dim) {
            store(to + column, load_some(from + column, dim - column, 0.0f) * factor);
            column += LANES;
        }
        std::memset(to + column, 0, (DIM - column) * sizeof(float));
    }
    std::memset(to, 0, (rows - count) * DIM * sizeof(float));
}

// Copies `count` rows of DIM values, each times its factor, to rows of `dim` features.
template <int64_t DIM, class T>
void copy_out(const float* from, int64_t count, int64_t dim, const float* factors, T* to, int64_t step) {
    for (int64_t row = 0; row < count; ++row, from += DIM, to += step) {
        const float factor = factors[row];
        int64_t column = 0;
        for (; column + LANES <= dim; column += LANES) store(to + column, load(from + column) * factor);
        if (column < dim) store_some(to + column, load(from + column) * factor, dim - column);
    }
}

// A block of queries of one head: what they see, and the products over it.
template <int64_t DIM>
struct Block {
    const Shape& shape;
    int64_t begin, end, count;  // keys [begin, end), in whole tiles, that any of the `count` queries sees
    int32_t first[QUERIES], last[QUERIES];
    float positions[QUERIES];
    float slope;

    Block(const Shape& all, int64_t batch, int64_t head, int64_t start)
        : shape(all), count(std::min(QUERIES, all.queries - start)), slope(all.slopes ? all.slopes[head] : 0.0f) {
        const int64_t place = batch * all.bounds_stride + start;
        int32_t lowest = std::numeric_limits<int32_t>::max(), highest = -1;
        for (int64_t query = 0; query < QUERIES; ++query) {
            const bool is_there = query < count;
            first[query] = is_there ? std::max(all.first[place + query], 0) : std::numeric_limits<int32_t>::max();
            last[query] = is_there ? std::min<int64_t>(all.last[place + query], all.keys - 1) : -1;
            positions[query] = static_cast<float>(all.keys - all.queries + start + query);
            if (first[query] <= last[query]) {
                lowest = std::min(lowest, first[query]);
                highest = std::max(highest, last[query]);
            }
        }
        begin = highest < 0 ? 0 : lowest / ROWS * ROWS;
        end = highest < 0 ? 0 : (highest + ROWS) / ROWS * ROWS;
    }

    // Whether any of the queries [from, from + number) sees any of the keys [key, key + ROWS).
    bool sees(int64_t from, int64_t number, int64_t key) const {
        for (int64_t query = from; query < from + number; ++query)
            if (first[query] < key + ROWS && last[query] >= key) return true;
        return false;
    }

    // scores[key][query] = keys . queries, where any of a tile is seen. columns: the queries, transposed.
    void products(const float* rows, const float* columns, float* scores) const {
        for (int64_t key = begin; key < end; key += ROWS)
            for (int64_t query = 0; query < QUERIES; query += COLUMNS)
                if (sees(query, COLUMNS, key))
                    sum_tile<1, DIM, QUERIES>(rows + key * DIM, columns + query, shape.dim,
                                              scores + (key - begin) * QUERIES + query, QUERIES, false);
    }

    // The keys that any of the queries [query, query + LANES) sees.
    struct Keys {
        int64_t from, to;
    };
    Keys seen_by(int64_t query) const {
        Keys keys = {end, begin};
        for (int64_t each = query; each < query + LANES; ++each) {
            if (first[each] > last[each]) continue;
            keys.from = std::min<int64_t>(keys.from, first[each]);
            keys.to = std::max<int64_t>(keys.to, last[each] + 1);
        }
        return keys.from < keys.to ? keys : Keys{begin, begin};
    }

    // Calls body(scores, seen, bias) for the vectors of all pairs of those keys and these queries.
    template <class Body>
    void each_pair(float* scores, int64_t query, const Body& body) const {
        Ints lowest = raw<Ints>(first + query), highest = raw<Ints>(last + query);
        const Floats position = load(positions + query);
        const Keys keys = seen_by(query);
        for (int64_t key = keys.from; key < keys.to; ++key) {
            const Ints number = Ints{} + static_cast<int32_t>(key);
            const Floats bias = (all(static_cast<float>(key)) - position) * slope;
            body(scores + (key - begin) * QUERIES + query, (number >= lowest) & (number <= highest), bias);
        }
    }

    // Sets the weights of these queries to 0 for all other keys.
    void clear_others(float* weights, int64_t query) const {
        const Keys keys = seen_by(query);
        for (int64_t key = begin; key < keys.from; ++key) store(weights + (key - begin) * QUERIES + query, Floats{});
        for (int64_t key = keys.to; key < end; ++key) store(weights + (key - begin) * QUERIES + query, Floats{});
    }

    // out[query][feature] = sum over keys of weights[key][query] rows[key][feature].
    void weighted(const float* weights, const float* rows, float* out) const {
        for (int64_t query = 0; query < count; query += ROWS) {
            int64_t from = end, to = begin;
            for (int64_t each = query; each < query + ROWS; ++each) {
                if (first[each] > last[each]) continue;
                from = std::min<int64_t>(from, first[each]);
                to = std::max<int64_t>(to, last[each] + 1);
            }
            for (int64_t column = 0; column < DIM; column += COLUMNS)
                sum_tile<QUERIES, 1, DIM>(weights + (from - begin) * QUERIES + query, rows + from * DIM + column,
                                          std::max<int64_t>(to - from, 0), out + query * DIM + column, DIM, false);
        }
    }

    // sums[key][feature] += sum over queries of weights[key][query] rows[query][feature].
    void add_weighted(const float* weights, const float* rows, float* sums) const {
        for (int64_t key = begin; key < end; key += ROWS) {
            int64_t from = 0, to = count;
            while (from < to && !(first[from] < key + ROWS && last[from] >= key)) ++from;
            while (to > from && !(first[to - 1] < key + ROWS && last[to - 1] >= key)) --to;
            if (from == to) continue;
            for (int64_t column = 0; column < DIM; column += COLUMNS)
                sum_tile<1, QUERIES, DIM>(weights + (key - begin) * QUERIES + from, rows + from * DIM + column,
                                          to - from, sums + key * DIM + column, DIM, true);
        }
    }
};

template <int64_t DIM, class T>
void attend(const Shape& shape, Heads<const T> query, Heads<const T> key, Heads<const T> value, Heads<T> output,
            float* logarithms, int64_t item) {
    const int64_t batch = item / shape.heads, head = item % shape.heads, padded = shape.padded_keys();
    const int64_t group = head / (shape.heads / shape.groups);
    Memory keys(padded * DIM), values(padded * DIM), rows(QUERIES * DIM), columns(QUERIES * DIM);
    Memory scores(padded * QUERIES);
    copy_in<DIM>(key.at(batch, group), key.step(), shape.keys, shape.dim, 1.0f, padded, keys.values);
    copy_in<DIM>(value.at(batch, group), value.step(), shape.keys, shape.dim, 1.0f, padded, values.values);
    for (int64_t start = 0; start < shape.queries; start += QUERIES) {
        const Block<DIM> block(shape, batch, head, start);
        copy_in<DIM>(query.at(batch, head, start), query.step(), block.count, shape.dim, shape.scale, QUERIES,
                     rows.values);
        pack<QUERIES>(Factor<float>{rows.values, DIM, true}, shape.dim, QUERIES, columns.values);
        block.products(keys.values, columns.values, scores.values);
        float factors[QUERIES], sums[QUERIES], tops[QUERIES];
        for (int64_t place = 0; place < QUERIES; place += LANES) {
            Floats top = all(-INFINITE), total = {};
            block.each_pair(scores.values, place, [&](float* score, Ints seen, Floats bias) {
                const Floats found = select(seen, load(score) + bias, all(-INFINITE));
                store(score, found);
                top = larger(found, top);
            });
            top = select(top == -INFINITE, Floats{}, top);
            block.each_pair(scores.values, place, [&](float* score, Ints, Floats) {
                const Floats weight = exponential_below_zero(load(score) - top);
                store(score, weight);
                total += weight;
            });
            block.clear_others(scores.values, place);
            store(tops + place, top);
            store(sums + place, total);
        }
        for (int64_t place = 0; place < block.count; ++place) {
            const bool is_blind = block.first[place] > block.last[place];
            factors[place] = is_blind ? 0.0f : 1.0f / sums[place];
            logarithms[item * shape.queries + start + place] =
                is_blind ? INFINITE : tops[place] + std::log(sums[place]);
        }
        block.weighted(scores.values, values.values, rows.values);
        copy_out<DIM>(rows.values, block.count, shape.dim, factors, output.at(batch, head, start), output.step());
    }
}

// The gradients of one key-value head and of the queries that it serves.
template <int64_t DIM, class T>
void attend_back(const Shape& shape, Heads<const T> query, Heads<const T> key, Heads<const T> value,
                 Heads<const T> output, Heads<const T> upstream, const float* logarithms, Heads<T> query_gradient,
                 Heads<T> key_gradient, Heads<T> value_gradient, int64_t item) {
    const int64_t batch = item / shape.groups, group = item % shape.groups, padded = shape.padded_keys();
    const int64_t shared = shape.heads / shape.groups;
    Memory keys(padded * DIM), values(padded * DIM), key_sums(padded * DIM), value_sums(padded * DIM);
    Memory rows(QUERIES * DIM), columns(QUERIES * DIM), above(QUERIES * DIM), above_columns(QUERIES * DIM);
    Memory weights(padded * QUERIES), scores(padded * QUERIES);
    copy_in<DIM>(key.at(batch, group), key.step(), shape.keys, shape.dim, 1.0f, padded, keys.values);
    copy_in<DIM>(value.at(batch, group), value.step(), shape.keys, shape.dim, 1.0f, padded, values.values);
    std::memset(key_sums.values, 0, padded * DIM * sizeof(float));
    std::memset(value_sums.values, 0, padded * DIM * sizeof(float));
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
        for (int64_t start = 0; start < shape.queries; start += QUERIES) {
            const Block<DIM> block(shape, batch, head, start);
            float inner[QUERIES] = {}, lines[QUERIES], factors[QUERIES];
            std::fill(lines, lines + QUERIES, INFINITE);
            std::fill(factors, factors + QUERIES, shape.scale);
            std::copy_n(logarithms + (batch * shape.heads + head) * shape.queries + start, block.count, lines);
            copy_in<DIM>(output.at(batch, head, start), output.step(), block.count, shape.dim, 1.0f, QUERIES,
                         rows.values);
            copy_in<DIM>(upstream.at(batch, head, start), upstream.step(), block.count, shape.dim, 1.0f, QUERIES,
                         above.values);
            for (int64_t place = 0; place < block.count; ++place) {
                Floats product = {};
                for (int64_t column = 0; column < DIM; column += LANES)
                    product += load(rows.values + place * DIM + column) * load(above.values + place * DIM + column);
                inner[place] = static_cast<float>(sum(product));
            }
            copy_in<DIM>(query.at(batch, head, start), query.step(), block.count, shape.dim, shape.scale, QUERIES,
                         rows.values);
            pack<QUERIES>(Factor<float>{rows.values, DIM, true}, shape.dim, QUERIES, columns.values);
            pack<QUERIES>(Factor<float>{above.values, DIM, true}, shape.dim, QUERIES, above_columns.values);
            block.products(keys.values, columns.values, weights.values);
            block.products(values.values, above_columns.values, scores.values);
            const int64_t distance = scores.values - weights.values;
            for (int64_t place = 0; place < QUERIES; place += LANES) {
                const Floats line = load(lines + place), mean = load(inner + place);
                block.each_pair(weights.values, place, [&](float* pair, Ints seen, Floats bias) {
                    const Floats weight = select(seen, exponential_below_zero(load(pair) + bias - line), Floats{});
                    store(pair, weight);
                    store(pair + distance, select(seen, weight * (load(pair + distance) - mean), Floats{}));
                });
                block.clear_others(weights.values, place);
                block.clear_others(scores.values, place);
            }
            block.add_weighted(weights.values, above.values, value_sums.values);
            block.add_weighted(scores.values, rows.values, key_sums.values);
            block.weighted(scores.values, keys.values, rows.values);
            copy_out<DIM>(rows.values, block.count, shape.dim, factors, query_gradient.at(batch, head, start),
                          query_gradient.step());
        }
    }
    std::fill(weights.values, weights.values + shape.keys, 1.0f);
    copy_out<DIM>(key_sums.values, shape.keys, shape.dim, weights.values, key_gradient.at(batch, group),
                  key_gradient.step());
    copy_out<DIM>(value_sums.values, shape.keys, shape.dim, weights.values, value_gradient.at(batch, group),
                  value_gradient.step());
}

// Calls body with a multiple of COLUMNS, as a type, that holds `dim` features.
template <class Body>
void with_dim(int64_t dim, const Body& body) {
    if (dim <= 64) return body(std::integral_constant<int64_t, 64>());
    if (dim <= 96) return body(std::integral_constant<int64_t, 96>());
    if (dim <= 128) return body(std::integral_constant<int64_t, 128>());
    return body(std::integral_constant<int64_t, 256>());
}

}  // namespace
}  // namespace deepy

// query, output [batch, heads, queries, dim], key, value [batch, groups, keys, dim]; strides: three for each of these
// four, in values. logarithms [batch, heads, queries]. first, last: `Shape`. slopes [heads] or null.
DEEPY_EXPORT int64_t deepy_attend(
    const void* query, const void* key, const void* value, void* output, float* logarithms, int64_t type,
    const int64_t* strides, const int32_t* first, const int32_t* last, int64_t bounds_stride, const float* slopes,
    float scale, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys, int64_t dim) {
    using namespace deepy;
    const Shape shape{batch, heads, groups, queries, keys, dim, first, last, bounds_stride, slopes, scale};
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        auto of = [&](const void* values, int number) {
            return Heads<const T>{static_cast<const T*>(values), strides + 3 * number};
        };
        with_dim(dim, [&](auto padded) {
            parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
                for (int64_t item = begin; item < end; ++item)
                    attend<decltype(padded)::value, T>(shape, of(query, 0), of(key, 1), of(value, 2),
                                                       Heads<T>{static_cast<T*>(output), strides + 9}, logarithms, item);
            });
        });
    });
    return 0;
}

// The gradients of all three; strides: of the four above, and of upstream and the three gradients.
DEEPY_EXPORT int64_t deepy_attend_back(
    const void* query, const void* key, const void* value, const void* output, const void* upstream,
    const float* logarithms, void* query_gradient, void* key_gradient, void* value_gradient, int64_t type,
    const int64_t* strides, const int32_t* first, const int32_t* last, int64_t bounds_stride, const float* slopes,
    float scale, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys, int64_t dim) {
    using namespace deepy;
    const Shape shape{batch, heads, groups, queries, keys, dim, first, last, bounds_stride, slopes, scale};
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        auto of = [&](const void* values, int number) {
            return Heads<const T>{static_cast<const T*>(values), strides + 3 * number};
        };
        auto to = [&](void* values, int number) { return Heads<T>{static_cast<T*>(values), strides + 3 * number}; };
        with_dim(dim, [&](auto padded) {
            parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
                for (int64_t item = begin; item < end; ++item)
                    attend_back<decltype(padded)::value, T>(
                        shape, of(query, 0), of(key, 1), of(value, 2), of(output, 3), of(upstream, 4), logarithms,
                        to(query_gradient, 5), to(key_gradient, 6), to(value_gradient, 7), item);
            });
        });
    });
    return 0;
}
