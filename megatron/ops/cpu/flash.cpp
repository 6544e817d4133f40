// Attention that holds the scores of 96 queries at a time, and their gradients. Arithmetic is fp32 in every dtype, but
// where the processor multiplies pairs of bf16: there products of bf16 take bf16, P and dS rounded to it, and sum in fp32.
//
//     P = softmax of scale q k^T and alibi's -slope * distance, over what is seen;    o = P v
//     dv = P^T do    dP = do v^T    dS = P (dP - do . o)    dq = scale dS k    dk = scale dS^T q
//
// The backward pass computes P again, from the logarithm of each query's sum (Dao et al. 2022, "FlashAttention"). Scores
// are held transposed, a row for each key and a column for each query: then the softmax goes along vectors, and of the
// five products none needs its factors in another order, but for the queries and do. In bf16 a word (packing.h) has two
// of what a product sums over: of features for scores, of keys for o and dq, of queries for dk and dv.
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

// What products of heads of T are made of.
template <class T>
using Factors = std::conditional_t<HAS_BF16_PRODUCTS && std::is_same_v<T, BFloat16>, BFloat16, float>;

// Rows of features of a head, copied into words of both kinds; what is beyond them is 0.
template <int64_t DIM, class T>
class Rows {
public:
    using In = Factors<T>;

    explicit Rows(int64_t rows) : rows_(rows), values_(rows * DIM / PER_WORD<In>), pairs_(is_paired ? values_size() : 0) {}

    void copy(const T* from, int64_t step, int64_t count, int64_t dim) {
        In* to = reinterpret_cast<In*>(values_.values);
        for (int64_t row = 0; row < count; ++row, from += step, to += DIM) {
            int64_t column = 0;
            if constexpr (is_paired) {
                std::memcpy(to, from, dim * sizeof(T));
                column = dim;
            } else {
                for (; column + LANES <= dim; column += LANES) store(to + column, load(from + column));
                if (column < dim) {
                    store(to + column, load_some(from + column, dim - column, 0.0f));
                    column += LANES;
                }
            }
            std::memset(to + column, 0, (DIM - column) * sizeof(In));
        }
        std::memset(to, 0, (rows_ - count) * DIM * sizeof(In));
    }

    // [row][word of features]
    const float* of_features() const { return values_.values; }

    // [word of rows][feature]
    const float* of_rows() {
        if constexpr (!is_paired) return values_.values;
        else {
            const Factor<In> rows{reinterpret_cast<const In*>(values_.values), DIM, false};
            pack<DIM>(rows, rows_, DIM, pairs_.values);
            return pairs_.values;
        }
    }

    // [word of features][row], of QUERIES rows
    void turn(int64_t dim, float* columns) const {
        pack<QUERIES>(Factor<float>{values_.values, DIM / PER_WORD<In>, true}, words<In>(dim), QUERIES, columns);
    }

private:
    static constexpr bool is_paired = PER_WORD<In> > 1;
    int64_t values_size() const { return rows_ * DIM / PER_WORD<In>; }

    int64_t rows_;
    Memory values_, pairs_;
};

// Weights [key][query] of fp32 as words of queries, [key][word], in `to`, which may be their own memory.
template <class In>
const float* of_queries(const float* weights, [[maybe_unused]] int64_t keys, [[maybe_unused]] float* to) {
    if constexpr (PER_WORD<In> > 1) {
        BFloat16* place = reinterpret_cast<BFloat16*>(to);
        for (int64_t i = 0; i < keys * QUERIES; i += LANES) store_normal(place + i, load(weights + i));
        return to;
    }
    return weights;
}

// The same as words of keys, [word][query], in their own memory.
template <class In>
const float* of_keys(float* weights, [[maybe_unused]] int64_t keys) {
#if HAS_BF16_PRODUCTS
    for (int64_t key = 0; PER_WORD<In> > 1 && key < keys; key += 2) {
        const float* pair = weights + key * QUERIES;
        for (int64_t query = 0; query < QUERIES; query += LANES) {
            const Bits even = rounded_bits(load(pair + query)), odd = rounded_bits(load(pair + QUERIES + query));
            store(weights + key / 2 * QUERIES + query, floats_of(even | odd << 16));
        }
    }
#endif
    return weights;
}

// The product of two rows.
template <class T>
float dot(const T* one, const T* other, int64_t dim) {
    Floats product = {};
    int64_t column = 0;
    for (; column + LANES <= dim; column += LANES) product += load(one + column) * load(other + column);
    if (column < dim)
        product += load_some(one + column, dim - column, 0.0f) * load_some(other + column, dim - column, 0.0f);
    return static_cast<float>(sum(product));
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

// A block of queries of one head: what they see, and the products over it, of words of In.
template <int64_t DIM, class In>
struct Block {
    static constexpr int64_t PER = PER_WORD<In>;
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

    // scores[key][query] = keys . queries, where any of a tile is seen. rows: of_features; columns: the queries, turned.
    void products(const float* rows, const float* columns, float* scores) const {
        for (int64_t key = begin; key < end; key += ROWS)
            for (int64_t query = 0; query < QUERIES; query += COLUMNS)
                if (sees(query, COLUMNS, key))
                    sum_tile<1, DIM / PER, QUERIES, In>(rows + key * DIM / PER, columns + query, words<In>(shape.dim),
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

    // Calls body(place, score, seen) for the vectors of all pairs of those keys and these queries. score: with its bias.
    template <class Body>
    void each_pair(float* scores, int64_t query, const Body& body) const {
        Ints lowest = raw<Ints>(first + query), highest = raw<Ints>(last + query);
        const Floats position = load(positions + query);
        const Keys keys = seen_by(query);
        for (int64_t key = keys.from; key < keys.to; ++key) {
            const Ints number = Ints{} + static_cast<int32_t>(key);
            const Floats bias = (all(static_cast<float>(key)) - position) * slope;
            float* place = scores + (key - begin) * QUERIES + query;
            body(place, load(place) * shape.scale + bias, (number >= lowest) & (number <= highest));
        }
    }

    // Calls body(place) for the same vectors.
    template <class Body>
    void each_seen(float* scores, int64_t query, const Body& body) const {
        const Keys keys = seen_by(query);
        for (int64_t key = keys.from; key < keys.to; ++key) body(scores + (key - begin) * QUERIES + query);
    }

    // Sets the weights of these queries to 0 for all other keys.
    void clear_others(float* weights, int64_t query) const {
        const Keys keys = seen_by(query);
        for (int64_t key = begin; key < keys.from; ++key) store(weights + (key - begin) * QUERIES + query, Floats{});
        for (int64_t key = keys.to; key < end; ++key) store(weights + (key - begin) * QUERIES + query, Floats{});
    }

    // out[query][feature] = sum over keys of weights[key][query] rows[key][feature]. weights: of_keys; rows: of_rows.
    void weighted(const float* weights, const float* rows, float* out) const {
        for (int64_t query = 0; query < count; query += ROWS) {
            int64_t from = end, to = begin;
            for (int64_t each = query; each < query + ROWS; ++each) {
                if (first[each] > last[each]) continue;
                from = std::min<int64_t>(from, first[each]);
                to = std::max<int64_t>(to, last[each] + 1);
            }
            const int64_t word = from / PER, count_of_words = std::max<int64_t>(words<In>(to) - word, 0);
            for (int64_t column = 0; column < DIM; column += COLUMNS)
                sum_tile<QUERIES, 1, DIM, In>(weights + (word - begin / PER) * QUERIES + query,
                                              rows + word * DIM + column, count_of_words, out + query * DIM + column,
                                              DIM, false);
        }
    }

    // sums[key][feature] += sum over queries of weights[key][query] rows[query][feature]. weights: of_queries; rows:
    // of_rows.
    void add_weighted(const float* weights, const float* rows, float* sums) const {
        for (int64_t key = begin; key < end; key += ROWS) {
            int64_t from = 0, to = count;
            while (from < to && !(first[from] < key + ROWS && last[from] >= key)) ++from;
            while (to > from && !(first[to - 1] < key + ROWS && last[to - 1] >= key)) --to;
            if (from == to) continue;
            const int64_t word = from / PER;
            for (int64_t column = 0; column < DIM; column += COLUMNS)
                sum_tile<1, QUERIES / PER, DIM, In>(weights + (key - begin) * QUERIES / PER + word,
                                                    rows + word * DIM + column, words<In>(to) - word,
                                                    sums + key * DIM + column, DIM, true);
        }
    }
};

template <int64_t DIM, class T>
void attend(const Shape& shape, Heads<const T> query, Heads<const T> key, Heads<const T> value, Heads<T> output,
            float* logarithms, int64_t item) {
    using In = Factors<T>;
    const int64_t batch = item / shape.heads, head = item % shape.heads, padded = shape.padded_keys();
    const int64_t group = head / (shape.heads / shape.groups);
    Rows<DIM, T> keys(padded), values(padded), queries(QUERIES);
    Memory columns(QUERIES * DIM), scores(padded * QUERIES), out(QUERIES * DIM);
    keys.copy(key.at(batch, group), key.step(), shape.keys, shape.dim);
    values.copy(value.at(batch, group), value.step(), shape.keys, shape.dim);
    const float* value_rows = values.of_rows();
    for (int64_t start = 0; start < shape.queries; start += QUERIES) {
        const Block<DIM, In> block(shape, batch, head, start);
        queries.copy(query.at(batch, head, start), query.step(), block.count, shape.dim);
        queries.turn(shape.dim, columns.values);
        block.products(keys.of_features(), columns.values, scores.values);
        float factors[QUERIES], sums[QUERIES], tops[QUERIES];
        for (int64_t place = 0; place < QUERIES; place += LANES) {
            Floats top = all(-INFINITE), total = {};
            block.each_pair(scores.values, place, [&](float* pair, Floats score, Ints seen) {
                const Floats found = select(seen, score, all(-INFINITE));
                store(pair, found);
                top = larger(found, top);
            });
            top = select(top == -INFINITE, Floats{}, top);
            block.each_seen(scores.values, place, [&](float* pair) {
                const Floats weight = exponential_below_zero(load(pair) - top);
                store(pair, weight);
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
        block.weighted(of_keys<In>(scores.values, block.end - block.begin), value_rows, out.values);
        copy_out<DIM>(out.values, block.count, shape.dim, factors, output.at(batch, head, start), output.step());
    }
}

// The gradients of one key-value head and of the queries that it serves.
template <int64_t DIM, class T>
void attend_back(const Shape& shape, Heads<const T> query, Heads<const T> key, Heads<const T> value,
                 Heads<const T> output, Heads<const T> upstream, const float* logarithms, Heads<T> query_gradient,
                 Heads<T> key_gradient, Heads<T> value_gradient, int64_t item) {
    using In = Factors<T>;
    const int64_t batch = item / shape.groups, group = item % shape.groups, padded = shape.padded_keys();
    const int64_t shared = shape.heads / shape.groups;
    Rows<DIM, T> keys(padded), values(padded), queries(QUERIES), above(QUERIES);
    Memory columns(QUERIES * DIM), key_sums(padded * DIM), value_sums(padded * DIM), out(QUERIES * DIM);
    Memory weights(padded * QUERIES), scores(padded * QUERIES);
    Memory turned(PER_WORD<In> > 1 ? padded * QUERIES / PER_WORD<In> : 0);
    keys.copy(key.at(batch, group), key.step(), shape.keys, shape.dim);
    values.copy(value.at(batch, group), value.step(), shape.keys, shape.dim);
    const float* key_rows = keys.of_rows();
    std::memset(key_sums.values, 0, padded * DIM * sizeof(float));
    std::memset(value_sums.values, 0, padded * DIM * sizeof(float));
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
        for (int64_t start = 0; start < shape.queries; start += QUERIES) {
            const Block<DIM, In> block(shape, batch, head, start);
            const int64_t seen_keys = block.end - block.begin;
            float inner[QUERIES] = {}, lines[QUERIES], factors[QUERIES];
            std::fill(lines, lines + QUERIES, INFINITE);
            std::fill(factors, factors + QUERIES, shape.scale);
            std::copy_n(logarithms + (batch * shape.heads + head) * shape.queries + start, block.count, lines);
            for (int64_t place = 0; place < block.count; ++place)
                inner[place] = dot(output.at(batch, head, start + place), upstream.at(batch, head, start + place),
                                   shape.dim);
            queries.copy(query.at(batch, head, start), query.step(), block.count, shape.dim);
            above.copy(upstream.at(batch, head, start), upstream.step(), block.count, shape.dim);
            queries.turn(shape.dim, columns.values);
            block.products(keys.of_features(), columns.values, weights.values);
            above.turn(shape.dim, columns.values);
            block.products(values.of_features(), columns.values, scores.values);
            const int64_t distance = scores.values - weights.values;
            for (int64_t place = 0; place < QUERIES; place += LANES) {
                const Floats line = load(lines + place), mean = load(inner + place);
                block.each_pair(weights.values, place, [&](float* pair, Floats score, Ints seen) {
                    const Floats weight = select(seen, exponential_below_zero(score - line), Floats{});
                    store(pair, weight);
                    store(pair + distance, select(seen, weight * (load(pair + distance) - mean), Floats{}));
                });
                block.clear_others(weights.values, place);
                block.clear_others(scores.values, place);
            }
            block.add_weighted(of_queries<In>(weights.values, seen_keys, weights.values), above.of_rows(),
                               value_sums.values);
            block.add_weighted(of_queries<In>(scores.values, seen_keys, turned.values), queries.of_rows(),
                               key_sums.values);
            block.weighted(of_keys<In>(scores.values, seen_keys), key_rows, out.values);
            copy_out<DIM>(out.values, block.count, shape.dim, factors, query_gradient.at(batch, head, start),
                          query_gradient.step());
        }
    }
    std::fill(weights.values, weights.values + shape.keys, shape.scale);
    copy_out<DIM>(key_sums.values, shape.keys, shape.dim, weights.values, key_gradient.at(batch, group),
                  key_gradient.step());
    std::fill(weights.values, weights.values + shape.keys, 1.0f);
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
