// Put ahead of service/native/src/decoder.cpp in an instrumented build, by kernel_times.py: every kernel that it
// calls is timed by kind. The product's own library has none of this.
#pragma once

#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <chrono>
#include <map>
#include <unordered_map>
#include <utility>

#include "kernels.h"

namespace twinserve::timed {

// In the order of KINDS in kernel_times.py.
enum Kind { kProducts, kMix, kNorm, kResidual, kActivation, kRotation, kStore, kAttention, kKinds };

inline double seconds[kKinds] = {};

class Span {
  public:
    explicit Span(Kind kind) : kind_(kind), begin_(std::chrono::steady_clock::now()) {}
    ~Span() { seconds[kind_] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;

  private:
    Kind kind_;
    std::chrono::steady_clock::time_point begin_;
};

#define TWINSERVE_TIMED(name, kind)                    \
    template <typename... Arguments>                   \
    void name(Arguments&&... arguments) {              \
        const Span span(kind);                         \
        twinserve::name(std::forward<Arguments>(arguments)...); \
    }

TWINSERVE_TIMED(add_mix, kMix)
TWINSERVE_TIMED(rms_norm, kNorm)
TWINSERVE_TIMED(add, kResidual)
TWINSERVE_TIMED(activate, kActivation)
TWINSERVE_TIMED(rotate, kRotation)
TWINSERVE_TIMED(store, kStore)
TWINSERVE_TIMED(decode_attention, kAttention)

}  // namespace twinserve::timed

// Copies the totals out and begins again.
extern "C" __attribute__((visibility("default"))) void twinserve_kernel_times(double* out) {
    for (int kind = 0; kind < twinserve::timed::kKinds; ++kind) {
        out[kind] = twinserve::timed::seconds[kind];
        twinserve::timed::seconds[kind] = 0;
    }
}

#define add_mix timed::add_mix
#define rms_norm timed::rms_norm
#define add timed::add
#define activate timed::activate
#define rotate timed::rotate
#define store timed::store
#define decode_attention timed::decode_attention
