// Attention of decoding sequences over the paged cache, and the copies in and out of it.
//
// A block of keys lies as (groups, dim, kBlockTokens): one vector holds the same component of sixteen keys, so
// that scores need no sums across a vector. Values lie as (groups, kBlockTokens, dim). What one key head needs of
// a block is thus one run of memory for the keys and one for the values, asked for one block ahead.

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "lanes.h"

namespace twinserve {
namespace {

static_assert(kBlockTokens == kLanes, "a block of keys is one vector wide");

constexpr int kTogether = 4;  // query heads of one key head handled together
constexpr int kVectors = 4;   // vectors of a value handled together

template <typename T>
void ask(const T* from, std::int64_t count) {
    constexpr std::int64_t line = 64 / sizeof(T);
    for (std::int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

// scores (Count, blocks * kLanes) of the queries (Count, dim) against whole blocks [first, last) of keys.
template <typename T, int Count>
void score(const float* query, std::int64_t dim, const T* keys, std::int64_t block_size, const std::int32_t* table,
           std::int64_t first, std::int64_t last, float* scores) {
    const std::int64_t stride = (last - first) * kLanes;
    for (std::int64_t block = first; block < last; ++block) {
        const T* key = keys + table[block] * block_size;
        if (block + 1 < last) ask(keys + table[block + 1] * block_size, dim * kLanes);
        lanes sums[Count] = {};
        for (std::int64_t i = 0; i < dim; ++i) {
            const lanes component = load(key + i * kLanes);
            for (int h = 0; h < Count; ++h) sums[h] += query[h * dim + i] * component;
        }
        for (int h = 0; h < Count; ++h) save(scores + h * stride + (block - first) * kLanes, sums[h]);
    }
}

// scores (n) → weights that sum to 1.
void softmax(float* scores, std::int64_t n) {
    float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
    for (std::int64_t i = 0; i < n; ++i) most = scores[i] > most ? scores[i] : most;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) {
        scores[i] = fast_exp(scores[i] - most);
        sum += scores[i];
    }
    const float inverse = 1.0f / sum;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) scores[i] *= inverse;
}

// out (Count, dim) = weights (Count, stride), from the key `begin` on, times the values.
template <typename T, int Count>
void weigh(const float* weights, std::int64_t stride, const T* values, std::int64_t block_size,
           const std::int32_t* table, std::int64_t begin, std::int64_t end, std::int64_t dim, T* out) {
    std::int64_t column = 0;
    for (; column + kVectors * kLanes <= dim; column += kVectors * kLanes) {
        lanes sums[Count][kVectors] = {};
        for (std::int64_t at = begin; at < end;) {
            const std::int64_t block = at / kBlockTokens, stop = std::min(end, (block + 1) * kBlockTokens);
            if (stop < end && column == 0) ask(values + table[block + 1] * block_size, kBlockTokens * dim);
            const T* value = values + table[block] * block_size + at % kBlockTokens * dim + column;
            for (; at < stop; ++at, value += dim) {
                lanes parts[kVectors];
                for (int v = 0; v < kVectors; ++v) parts[v] = load(value + v * kLanes);
                for (int h = 0; h < Count; ++h)
                    for (int v = 0; v < kVectors; ++v) sums[h][v] += weights[h * stride + at - begin] * parts[v];
            }
        }
        for (int h = 0; h < Count; ++h)
            for (int v = 0; v < kVectors; ++v) save(out + h * dim + column + v * kLanes, sums[h][v]);
    }
    for (; column < dim; ++column) {
        for (int h = 0; h < Count; ++h) {
            float sum = 0;
            for (std::int64_t at = begin; at < end; ++at)
                sum += weights[h * stride + at - begin] *
                       widen(values[table[at / kBlockTokens] * block_size + at % kBlockTokens * dim + column]);
            out[h * dim + column] = narrow<T>(sum);
        }
    }
}

// `Count` query heads that share the key head `group`, over the keys [begin, end).
template <typename T, int Count>
void attend(const T* query, std::int64_t group, const Heads& shape, const T* keys, const T* values,
            const std::int32_t* table, std::int64_t begin, std::int64_t end, float scale, std::vector<float>& scratch,
            T* out) {
    const std::int64_t dim = shape.dim, block_size = shape.groups * dim * kBlockTokens;
    const std::int64_t first = begin / kBlockTokens, last = (end + kBlockTokens - 1) / kBlockTokens;
    const std::int64_t stride = (last - first) * kLanes;
    scratch.resize(Count * (stride + dim));
    float* scores = scratch.data();
    float* wide = scores + Count * stride;
    for (std::int64_t i = 0; i < Count * dim; ++i) wide[i] = widen(query[i]) * scale;
    keys += group * dim * kBlockTokens;
    values += group * dim * kBlockTokens;
    ask(keys + table[first] * block_size, dim * kLanes);
    score<T, Count>(wide, dim, keys, block_size, table, first, last, scores);
    ask(values + table[first] * block_size, dim * kLanes);
    float* visible = scores + begin - first * kBlockTokens;
    for (int h = 0; h < Count; ++h) softmax(visible + h * stride, end - begin);
    weigh<T, Count>(visible, stride, values, block_size, table, begin, end, dim, out);
}

}  // namespace

template <typename T>
void store(const T* qkv, std::int64_t tokens, const Heads& shape, const std::int32_t* slots, T* keys, T* values) {
    const std::int64_t row = shape.groups * shape.dim;
    for (std::int64_t t = 0; t < tokens; ++t) {
        const T* key = qkv + t * shape.stride() + shape.heads * shape.dim;
        T* block = keys + slots[t] / kBlockTokens * kBlockTokens * row + slots[t] % kBlockTokens;
        for (std::int64_t i = 0; i < row; ++i) block[i * kBlockTokens] = key[i];
        T* target = values + slots[t] / kBlockTokens * kBlockTokens * row + slots[t] % kBlockTokens * shape.dim;
        for (std::int64_t g = 0; g < shape.groups; ++g) {
            const T* value = key + row + g * shape.dim;
            std::copy(value, value + shape.dim, target + g * kBlockTokens * shape.dim);
        }
    }
}

template <typename T>
void decode_attention(const T* qkv, std::int64_t sequences, const Heads& shape, const T* keys, const T* values,
                      const std::int32_t* tables, std::int64_t width, const std::int32_t* positions, float scale,
                      std::int64_t window, T* out) {
    const std::int64_t grouped = shape.heads / shape.groups;
    const std::int64_t pieces = (grouped + kTogether - 1) / kTogether;
    const std::int64_t jobs = sequences * shape.groups * pieces;
#pragma omp parallel if (jobs > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t job = 0; job < jobs; ++job) {
            const std::int64_t sequence = job / (shape.groups * pieces);
            const std::int64_t group = job / pieces % shape.groups;
            const std::int64_t first = job % pieces * kTogether;
            const std::int64_t head = (group * grouped + first) * shape.dim;
            const std::int64_t end = positions[sequence] + 1;
            const std::int64_t begin = window > 0 ? std::max<std::int64_t>(0, end - window) : 0;
            const T* query = qkv + sequence * shape.stride() + head;
            const std::int32_t* table = tables + sequence * width;
            T* target = out + sequence * shape.heads * shape.dim + head;
            const auto run = [&](auto count) {
                attend<T, count.value>(query, group, shape, keys, values, table, begin, end, scale, scratch, target);
            };
            switch (std::min<std::int64_t>(kTogether, grouped - first)) {
                case 1: run(std::integral_constant<int, 1>()); break;
                case 2: run(std::integral_constant<int, 2>()); break;
                case 3: run(std::integral_constant<int, 3>()); break;
                default: run(std::integral_constant<int, 4>());
            }
        }
    }
}

template <typename T>
void gather(const T* keys, const T* values, const std::int32_t* table, std::int64_t length, const Heads& shape,
            T* key, T* value) {
    const std::int64_t dim = shape.dim, row = shape.groups * dim;
    const std::int64_t blocks = (length + kBlockTokens - 1) / kBlockTokens;
#pragma omp parallel for if (blocks > 4)
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t base = table[b] * kBlockTokens * row;
        const std::int64_t count = std::min(kBlockTokens, length - b * kBlockTokens);
        for (std::int64_t g = 0; g < shape.groups; ++g) {
            T* to = key + (g * length + b * kBlockTokens) * dim;
            const T* from = keys + base + g * dim * kBlockTokens;
            for (std::int64_t i = 0; i < count; ++i)
                for (std::int64_t c = 0; c < dim; ++c) to[i * dim + c] = from[c * kBlockTokens + i];
            const T* token = values + base + g * dim * kBlockTokens;
            std::copy(token, token + count * dim, value + (g * length + b * kBlockTokens) * dim);
        }
    }
}

#define TWINSERVE_INSTANTIATE(T)                                                                                   \
    template void store<T>(const T*, std::int64_t, const Heads&, const std::int32_t*, T*, T*);                     \
    template void decode_attention<T>(const T*, std::int64_t, const Heads&, const T*, const T*,                    \
                                      const std::int32_t*, std::int64_t, const std::int32_t*, float, std::int64_t, \
                                      T*);                                                                         \
    template void gather<T>(const T*, const T*, const std::int32_t*, std::int64_t, const Heads&, T*, T*);
TWINSERVE_INSTANTIATE(float)
TWINSERVE_INSTANTIATE(bf16)

}  // namespace twinserve
