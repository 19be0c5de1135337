// Norms, residual sums, gated activations, rotary positions.

#include "kernels.h"
#include "lanes.h"

namespace twinserve {
namespace {

constexpr std::int64_t kParallel = 8192;  // elements from which a second thread pays

// out = x̂ * (base + sum_t g_t delta_t), the sum over the experts that `token` uses.
template <typename T>
void norm_row(const T* x, std::int64_t dim, const Scales& scales, const float* scale, T* out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < dim; ++i) squares += widen(x[i]) * widen(x[i]);
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(dim) + scales.epsilon);
#pragma omp simd
    for (std::int64_t i = 0; i < dim; ++i) out[i] = narrow<T>(widen(x[i]) * inverse * scale[i]);
}

// (tokens, dim): every token's own scale.
std::vector<float> mixed_scales(std::int64_t tokens, std::int64_t dim, const Scales& scales, const Mix& mix) {
    std::vector<float> all(tokens * dim);
    for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t i = 0; i < dim; ++i) all[t * dim + i] = scales.base[i];
    for (std::size_t e = 0; e < scales.experts.size(); ++e) {
        if (scales.experts[e] == nullptr) continue;
        for (const Mix::Use& use : mix.uses[e])
            for (std::int64_t i = 0; i < dim; ++i) all[use.token * dim + i] += use.gate * scales.experts[e][i];
    }
    return all;
}

template <typename T>
void rotate_head(T* head, std::int64_t rotary, const float* cosine, const float* sine) {
    const std::int64_t half = rotary / 2;
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
        const float low = widen(head[i]), high = widen(head[half + i]);
        head[i] = narrow<T>(low * cosine[i] - high * sine[i]);
        head[half + i] = narrow<T>(high * cosine[half + i] + low * sine[half + i]);
    }
}

inline float act(float x, Activation kind) {
    if (kind == Activation::silu) return x / (1.0f + fast_exp(-x));
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x - x / (1.0f + fast_exp(2.0f * inner));  // x (1 + tanh) / 2
}

}  // namespace

bool Scales::gated() const {
    for (const float* expert : experts)
        if (expert != nullptr) return true;
    return false;
}

template <typename T>
void rms_norm(const T* x, std::int64_t tokens, std::int64_t dim, const Scales& scales, const Mix& mix, T* out) {
    const bool gated = scales.gated();
    const std::vector<float> own = gated ? mixed_scales(tokens, dim, scales, mix) : std::vector<float>();
#pragma omp parallel for if (tokens * dim > kParallel)
    for (std::int64_t t = 0; t < tokens; ++t)
        norm_row(x + t * dim, dim, scales, gated ? own.data() + t * dim : scales.base, out + t * dim);
}

template <typename T>
void add(T* h, const T* x, std::int64_t n) {
    const std::int64_t whole = n / kLanes * kLanes;
#pragma omp parallel for if (n > 4 * kParallel)
    for (std::int64_t i = 0; i < whole; i += kLanes) save(h + i, load(h + i) + load(x + i));
    for (std::int64_t i = whole; i < n; ++i) h[i] = narrow<T>(widen(h[i]) + widen(x[i]));
}

template <typename T>
void activate(const T* gate_up, std::int64_t tokens, std::int64_t width, Activation kind, T* out) {
#pragma omp parallel for if (tokens * width > kParallel)
    for (std::int64_t t = 0; t < tokens; ++t) {
        const T* gate = gate_up + t * 2 * width;
        T* target = out + t * width;
        if (kind == Activation::silu) {
#pragma omp simd
            for (std::int64_t i = 0; i < width; ++i)
                target[i] = narrow<T>(act(widen(gate[i]), Activation::silu) * widen(gate[width + i]));
        } else {
#pragma omp simd
            for (std::int64_t i = 0; i < width; ++i)
                target[i] = narrow<T>(act(widen(gate[i]), Activation::gelu_tanh) * widen(gate[width + i]));
        }
    }
}

template <typename T>
void rotate(T* qkv, std::int64_t tokens, const Heads& shape, const std::int32_t* positions, const float* cosine,
            const float* sine, const Scales& query, const Scales& key, const Mix& mix) {
    const std::int64_t rotated = shape.heads + shape.groups;
    const bool query_gated = query.gated(), key_gated = key.gated();
    const std::vector<float> own_query =
        query_gated ? mixed_scales(tokens, shape.dim, query, mix) : std::vector<float>();
    const std::vector<float> own_key = key_gated ? mixed_scales(tokens, shape.dim, key, mix) : std::vector<float>();
#pragma omp parallel for if (tokens * rotated * shape.dim > kParallel)
    for (std::int64_t t = 0; t < tokens; ++t) {
        T* token = qkv + t * shape.stride();
        const float* c = cosine + positions[t] * shape.rotary;
        const float* s = sine + positions[t] * shape.rotary;
        for (std::int64_t h = 0; h < rotated; ++h) {
            T* head = token + h * shape.dim;
            const bool is_query = h < shape.heads;
            const Scales& scales = is_query ? query : key;
            if (scales.base != nullptr) {
                const bool gated = is_query ? query_gated : key_gated;
                const float* own = (is_query ? own_query : own_key).data() + t * shape.dim;
                norm_row(head, shape.dim, scales, gated ? own : scales.base, head);
            }
            rotate_head(head, shape.rotary, c, s);
        }
    }
}

#define TWINSERVE_INSTANTIATE(T)                                                                                  \
    template void rms_norm<T>(const T*, std::int64_t, std::int64_t, const Scales&, const Mix&, T*);               \
    template void add<T>(T*, const T*, std::int64_t);                                                             \
    template void activate<T>(const T*, std::int64_t, std::int64_t, Activation, T*);                              \
    template void rotate<T>(T*, std::int64_t, const Heads&, const std::int32_t*, const float*, const float*,      \
                            const Scales&, const Scales&, const Mix&);
TWINSERVE_INSTANTIATE(float)
TWINSERVE_INSTANTIATE(bf16)

}  // namespace twinserve
