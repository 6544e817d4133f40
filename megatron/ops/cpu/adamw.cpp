// AdamW in one pass over any number of tensors, and the sum of squares that clipping needs: megatron/ops/adamw.py has the
// formula. The tensors are cut into spans, the same whatever the threads, each of which is one thread's.
//
// One pass reads gradient, master and both moments and writes master, moments and the rounded weight; gradients stay.
// Moments in bf16 are rounded at random by the bits that `megatron.ops.adamw.noise` makes.
#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace deepy {
namespace {

constexpr int64_t SPAN = 16384;
constexpr int64_t GRAIN = 2;  // spans

// Which spans are whose: the first of each tensor, and their number at the end.
std::vector<int64_t> first_spans(const int64_t* sizes, int64_t count) {
    std::vector<int64_t> firsts(count + 1, 0);
    for (int64_t tensor = 0; tensor < count; ++tensor)
        firsts[tensor + 1] = firsts[tensor] + (sizes[tensor] + SPAN - 1) / SPAN;
    return firsts;
}

// Calls body(span, tensor, begin, end) for every span, with its elements' range in its tensor.
template <class Body>
void for_spans(const int64_t* sizes, int64_t count, const Body& body) {
    const std::vector<int64_t> firsts = first_spans(sizes, count);
    parallel_for(0, firsts[count], GRAIN, [&](int64_t span, int64_t end) {
        int64_t tensor = std::upper_bound(firsts.begin(), firsts.end(), span) - firsts.begin() - 1;
        for (; span < end; ++span) {
            while (span >= firsts[tensor + 1]) ++tensor;
            const int64_t begin = (span - firsts[tensor]) * SPAN;
            body(span, tensor, begin, std::min(begin + SPAN, sizes[tensor]));
        }
    });
}

// MurmurHash3's finaliser (Appleby 2011), on numbers and on vectors of them.
template <class Unsigned>
Unsigned mixed(Unsigned bits) {
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6Bu;
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35u;
    return bits ^ (bits >> 16);
}

constexpr uint32_t GOLDEN = 0x9E3779B9u;

struct Settings {
    float coefficient, added1, kept2, added2, root, eps, shrink, rate;
};

struct Piece {  // of one tensor; addresses of its first element
    int64_t gradient_type, weight_type;
    const void* gradient;
    float* master;
    void *average, *square, *weight;  // no weight: null
    uint32_t noise;                   // of the tensor's first element, before it is mixed
};

Floats load_as(int64_t type, const void* pointer, int64_t index, int64_t count) {
    return with_type(type, [&](auto* tag) {
        const auto* values = static_cast<decltype(tag)>(const_cast<void*>(pointer)) + index;
        return count == LANES ? load(values) : load_some(values, count, 0.0f);
    });
}

void store_as(int64_t type, void* pointer, int64_t index, Floats values, int64_t count) {
    with_type(type, [&](auto* tag) {
        auto* target = static_cast<decltype(tag)>(pointer) + index;
        count == LANES ? store(target, values) : store_some(target, values, count);
    });
}

template <class T>
Floats load_count(const T* pointer, int64_t count) {
    return count == LANES ? load(pointer) : load_some(pointer, count, 0.0f);
}
template <class T>
void store_count(T* pointer, Floats values, int64_t count) {
    count == LANES ? store(pointer, values) : store_some(pointer, values, count);
}

inline void store_moment(float* pointer, Floats values, Bits, int64_t count) { store_count(pointer, values, count); }
inline void store_moment(BFloat16* pointer, Floats values, Bits random, int64_t count) {
    Halves halves = shortened((bits_of(values) + (random & 0xFFFFu)) >> 16);
    std::memcpy(pointer, &halves, count * sizeof(BFloat16));
}

// The update of `count` elements from `index` on, LANES or fewer.
template <class Moment>
inline __attribute__((always_inline)) void update(const Piece& piece, const Settings& set, Bits lanes, int64_t index,
                                                  int64_t count) {
    Moment* averages = static_cast<Moment*>(piece.average) + index;
    Moment* squares = static_cast<Moment*>(piece.square) + index;
    const Floats gradient = load_as(piece.gradient_type, piece.gradient, index, count) * set.coefficient;
    Floats average = load_count(averages, count), square = load_count(squares, count);
    average = average + (gradient - average) * set.added1;
    square = square * set.kept2 + gradient * gradient * set.added2;
    const Floats change = average / (square_root(square) * set.root + set.eps);
    const Floats master = load_count(piece.master + index, count) * set.shrink - change * set.rate;
    store_count(piece.master + index, master, count);
    Bits random = {};
    if (sizeof(Moment) != sizeof(float)) random = mixed(lanes + (piece.noise + static_cast<uint32_t>(index) * GOLDEN));
    store_moment(averages, average, random, count);
    store_moment(squares, square, random >> 16, count);
    if (piece.weight) store_as(piece.weight_type, piece.weight, index, master, count);
}

template <class Moment>
void update_span(const Piece& piece, const Settings& set, int64_t begin, int64_t end) {
    Bits lanes = {};
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] = static_cast<uint32_t>(lane) * GOLDEN;
    int64_t index = begin;
    for (; index + LANES <= end; index += LANES) update<Moment>(piece, set, lanes, index, LANES);
    if (index < end) update<Moment>(piece, set, lanes, index, end - index);
}

// Four streams of memory at once bring more of it than one.
template <class T>
double span_squares(const T* values, int64_t size) {
    constexpr int64_t STREAMS = 4, RUN = 64 * LANES;  // as many of each as are summed in fp32
    const int64_t stream = size / STREAMS / LANES * LANES;
    double total = 0.0;
    for (int64_t begin = 0; begin < stream; begin += RUN) {
        Floats partial[STREAMS] = {};
        for (int64_t index = begin; index < std::min(begin + RUN, stream); index += LANES)
            for (int64_t part = 0; part < STREAMS; ++part) {
                const Floats value = load(values + part * stream + index);
                partial[part] += value * value;
            }
        total += sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
    }
    for (int64_t index = STREAMS * stream; index < size; index += LANES) {
        const Floats value = load_count(values + index, std::min<int64_t>(LANES, size - index));
        total += sum(value * value);
    }
    return total;
}

}  // namespace
}  // namespace deepy

// Rows of the table, `count` numbers each: sizes; addresses of gradients, and their types; of masters, averages, squares
// and weights (0: none). The random bits of rounding follow from the seed, the update's number and the tensors' numbers,
// which begin with `first`. Nothing changes where the coefficient is not finite.
DEEPY_EXPORT int64_t deepy_adamw(
    const int64_t* table, int64_t count, int64_t moment_type, int64_t weight_type, const float* coefficient,
    const float* step, const float* rates, double rate, double beta1, double beta2, double eps, double weight_decay,
    int64_t seed, int64_t first) {
    using namespace deepy;
    if (!std::isfinite(*coefficient)) return 0;
    const double number_of_update = std::max(static_cast<double>(*step), 1.0);
    const double correction = 1.0 / (1.0 - std::pow(beta1, number_of_update));
    const double root = 1.0 / std::sqrt(1.0 - std::pow(beta2, number_of_update));
    if (rates) rate = *rates;
    Settings set;
    set.coefficient = *coefficient;
    set.added1 = static_cast<float>(1.0 - beta1);
    set.kept2 = static_cast<float>(beta2);
    set.added2 = static_cast<float>(1.0 - beta2);
    set.root = static_cast<float>(root);
    set.eps = static_cast<float>(eps);
    set.shrink = static_cast<float>(1.0 - rate * weight_decay);
    set.rate = static_cast<float>(rate * correction);
    const uint32_t key = mixed(static_cast<uint32_t>(static_cast<int64_t>(*step)) * GOLDEN + static_cast<uint32_t>(seed));
    for_spans(table, count, [&](int64_t, int64_t tensor, int64_t begin, int64_t end) {
        const int64_t* row = table + tensor;
        auto address = [&](int number) { return reinterpret_cast<void*>(row[number * count]); };
        const uint32_t number = static_cast<uint32_t>(first + tensor);
        const uint32_t noise = mixed(key + number * 0x85EBCA6Bu);
        const Piece piece = {row[2 * count], weight_type, address(1), static_cast<float*>(address(3)),
                             address(4), address(5), address(6), noise};
        if (moment_type == BF16) update_span<BFloat16>(piece, set, begin, end);
        else update_span<float>(piece, set, begin, end);
    });
    return 0;
}

// The sum of the squares of all elements. Rows of the table: sizes, addresses, types.
DEEPY_EXPORT int64_t deepy_sum_of_squares(const int64_t* table, int64_t count, double* result) {
    using namespace deepy;
    std::vector<double> sums(first_spans(table, count)[count]);
    for_spans(table, count, [&](int64_t span, int64_t tensor, int64_t begin, int64_t end) {
        sums[span] = with_type(table[2 * count + tensor], [&](auto* tag) {
            return span_squares(reinterpret_cast<decltype(tag)>(table[count + tensor]) + begin, end - begin);
        });
    });
    *result = 0.0;
    for (double each : sums) *result += each;
    return 0;
}
