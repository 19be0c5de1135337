// Element types of the kernels: float, and bfloat16 as its upper half. Loops over `widen` and `narrow` vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace twinserve {

struct bf16 {
    std::uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bf16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <typename T>
T narrow(float value);

template <>
inline float narrow<float>(float value) {
    return value;
}

// To nearest, ties to even; a NaN stays one, so that a broken row is seen as broken.
template <>
inline bf16 narrow<bf16>(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

// exp with a relative error below 2e-7 on its range; beyond it 0 or a huge finite number. NaN stays NaN.
// Written out so that the compiler can vectorise the loops that call it.
inline float fast_exp(float x) {
    const float low = x < -87.0f ? -87.0f : x;
    const float clamped = low > 88.0f ? 88.0f : low;
    const float n = std::nearbyint(clamped * 1.44269504088896341f);
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // A NaN has no integer: without the choice below the cast would be undefined.
    const std::int32_t exponent = static_cast<std::int32_t>(n == n ? n : 0.0f);
    const std::uint32_t bits = static_cast<std::uint32_t>(exponent + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

}  // namespace twinserve
