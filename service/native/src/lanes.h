// Sixteen floats at once, in the compiler's own vector types: one register with AVX-512, several elsewhere.
#pragma once

#include <cstring>

#include "scalar.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace twinserve {

constexpr std::int64_t kLanes = 16;

using lanes = float __attribute__((vector_size(4 * kLanes)));

inline lanes spread(float value) { return value - lanes{}; }

inline lanes load(const float* from) {
    lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline lanes load(const bf16* from) {
    using halves = std::uint16_t __attribute__((vector_size(2 * kLanes)));
    using words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
    halves bits;
    std::memcpy(&bits, from, sizeof bits);
    const words wide = __builtin_convertvector(bits, words) << 16;
    lanes value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline void save(float* to, lanes value) { std::memcpy(to, &value, sizeof value); }

inline void save(bf16* to, lanes value) {
    float each[kLanes];
    std::memcpy(each, &value, sizeof value);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) to[i] = narrow<bf16>(each[i]);
}

inline float total(lanes value) {
    float each[kLanes];
    std::memcpy(each, &value, sizeof value);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) each[i] += each[i + half];
    return each[0];
}

// Products of kWidth elements, summed into lanes.
template <typename T>
struct Dot {
    static constexpr std::int64_t kWidth = kLanes;
    using Vector = lanes;
    static Vector read(const T* from) { return load(from); }
    static lanes step(lanes sum, Vector a, Vector b) { return sum + a * b; }
};

#ifdef __AVX512BF16__
template <>
struct Dot<bf16> {
    static constexpr std::int64_t kWidth = 2 * kLanes;
    using Vector = __m512bh;
    static Vector read(const bf16* from) { return reinterpret_cast<Vector>(_mm512_loadu_si512(from)); }
    static lanes step(lanes sum, Vector a, Vector b) {
        return reinterpret_cast<lanes>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
    }
};
#endif

}  // namespace twinserve
