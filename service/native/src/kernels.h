// What a decoder layer does between its matrix products. Plain pointers, row-major, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "scalar.h"

namespace twinserve {

// One expert's part of one layer's linear map y (out) = W x (in): y += gate * (B^T (A x) + bias).
// `a` is (rank, in); `b` is (rank, out) cut into tiles, (out / kColumns rounded up, rank, kColumns), the last one
// filled up with zeros; both are null where the rank is 0. `bias` is (out) or null.
template <typename T>
struct Factors {
    const T* a = nullptr;
    const T* b = nullptr;
    const float* bias = nullptr;
    std::int64_t rank = 0;
};

// Columns of an output that are worked on together.
constexpr std::int64_t kColumns = 64;

// Who is mixed into which tokens of a step. Experts are numbered by their place in `slots`.
struct Mix {
    struct Use {
        std::int32_t token;
        float gate;
    };
    std::vector<std::int32_t> slots;    // expert slot of every active expert
    std::vector<std::vector<Use>> uses; // its tokens, ascending
    std::int32_t last = 0;              // behind the last token that uses one
    bool empty() const { return slots.empty(); }
};

// A linear map whose input is shared with others: columns [column, column + out) of the joint output.
template <typename T>
struct Part {
    std::int64_t column;
    std::int64_t out;
    std::vector<Factors<T>> experts;  // one for each of Mix::slots
};

// y (tokens, stride) += the mixed exclusive parts of all `parts`, which read the same x (tokens, in).
template <typename T>
void add_mix(const T* x, std::int64_t tokens, std::int64_t in, T* y, std::int64_t stride,
             const std::vector<Part<T>>& parts, const Mix& mix, std::vector<float>& scratch);

// A weight matrix (out, in) as int8 with one scale a row. `panels` is (out / kPanelRows rounded up, depth / 2,
// kPanelRows, 2), the input filled up with zeros to `depth`; rows that the last panel lacks are zeros too.
constexpr std::int64_t kPanelRows = 16;
constexpr std::int64_t kPanelDepth = 32;

struct Quantised {
    const std::int8_t* panels;
    const float* scales;
    std::int64_t out, in;
    std::int64_t depth() const { return (in + kPanelDepth - 1) / kPanelDepth * kPanelDepth; }
};

// y (tokens, out) = x (tokens, in) Wᵀ + bias (out, or null).
template <typename T>
void quantised_product(const T* x, std::int64_t tokens, const Quantised& weights, const float* bias, T* y);

// Scales (dim) of an RMS norm: base, and one difference for each of Mix::slots (null: none).
struct Scales {
    const float* base = nullptr;
    std::vector<const float*> experts;
    float epsilon = 0;
    bool gated() const;
};

// out (tokens, dim) = RMS norm of x (tokens, dim).
template <typename T>
void rms_norm(const T* x, std::int64_t tokens, std::int64_t dim, const Scales& scales, const Mix& mix, T* out);

// h += x, elementwise over n.
template <typename T>
void add(T* h, const T* x, std::int64_t n);

enum class Activation : std::int64_t { silu = 0, gelu_tanh = 1 };

// out (tokens, width) = act(gate) * up, with gate_up (tokens, 2 * width).
template <typename T>
void activate(const T* gate_up, std::int64_t tokens, std::int64_t width, Activation kind, T* out);

// Heads of a packed (tokens, (heads + 2 * groups) * dim) product of the query, key and value maps.
struct Heads {
    std::int64_t heads, groups, dim, rotary;
    std::int64_t stride() const { return (heads + 2 * groups) * dim; }
};

// Optional RMS norm of every query and key head, then rotation by position, in place.
// cosine, sine: (positions, rotary), rotary <= dim, halves rotated against each other.
template <typename T>
void rotate(T* qkv, std::int64_t tokens, const Heads& shape, const std::int32_t* positions, const float* cosine,
            const float* sine, const Scales& query, const Scales& key, const Mix& mix);

// The cache of one layer, in blocks: keys (groups, dim, kBlockTokens), values
// (groups, kBlockTokens, dim).
constexpr std::int64_t kBlockTokens = 16;

// Store the keys and values of `tokens` tokens; slots[t] = block * kBlockTokens + offset.
template <typename T>
void store(const T* qkv, std::int64_t tokens, const Heads& shape, const std::int32_t* slots, T* keys, T* values);

// One query a sequence over its cached keys: out (sequences, heads * dim).
// tables: (sequences, width) block ids; lengths: keys of each; window <= 0 sees all of them.
template <typename T>
void decode_attention(const T* qkv, std::int64_t sequences, const Heads& shape, const T* keys, const T* values,
                      const std::int32_t* tables, std::int64_t width, const std::int32_t* positions, float scale,
                      std::int64_t window, T* out);

// Copy the first `length` cached keys and values of one sequence out: (groups, length, dim) each.
template <typename T>
void gather(const T* keys, const T* values, const std::int32_t* table, std::int64_t length, const Heads& shape,
            T* key, T* value);

}  // namespace twinserve
