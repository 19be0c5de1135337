// y = x Wᵀ for weights kept as int8 with one scale a row: half the memory traffic of bfloat16, which is what a
// decode step waits for. Sixteen rows of W, a panel, are widened into the cache once and multiplied with all
// tokens; integers up to 127 are exact in bfloat16, so the products are those of the dequantised weights.

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "lanes.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace twinserve {
namespace {

static_assert(kPanelRows == kLanes);

constexpr std::int64_t kTokensTogether = 8;

// One panel, widened: float (in, kLanes), and for processors that multiply pairs bfloat16 (in / 2, kLanes, 2).
template <typename T>
struct Panel {
    using Element = float;
    static void fill(const std::int8_t* from, std::int64_t in, float* to) {
        for (std::int64_t pair = 0; pair < in / 2; ++pair) {
#pragma omp simd
            for (std::int64_t row = 0; row < kLanes; ++row) {
                to[2 * pair * kLanes + row] = from[2 * (pair * kLanes + row)];
                to[(2 * pair + 1) * kLanes + row] = from[2 * (pair * kLanes + row) + 1];
            }
        }
    }

    template <int Tokens>
    static void multiply(const T* x, std::int64_t in, std::int64_t stride, const float* panel, lanes* sums) {
        for (int t = 0; t < Tokens; ++t) sums[t] = lanes{};
        for (std::int64_t i = 0; i < in; ++i) {
            const lanes weights = load(panel + i * kLanes);
            for (int t = 0; t < Tokens; ++t) sums[t] += widen(x[t * stride + i]) * weights;
        }
    }
};

#ifdef __AVX512BF16__
template <>
struct Panel<bf16> {
    using Element = bf16;
    static void fill(const std::int8_t* from, std::int64_t in, bf16* to) {
        for (std::int64_t i = 0; i < in * kLanes; i += 2 * kLanes) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
            _mm512_storeu_si512(to + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
    }

    template <int Tokens>
    static void multiply(const bf16* x, std::int64_t in, std::int64_t stride, const bf16* panel, lanes* sums) {
        // Few tokens would wait for the sum before: more sums than one a token keep the unit busy.
        constexpr int kChains = Tokens >= 4 ? 1 : 4;
        __m512 chains[Tokens][kChains] = {};
        const std::int64_t pairs = in / 2;
        const auto step = [&](std::int64_t pair, int chain) {
            const auto weights = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + 2 * pair * kLanes));
            for (int t = 0; t < Tokens; ++t) {
                std::int32_t two;
                std::memcpy(&two, x + t * stride + 2 * pair, sizeof two);
                chains[t][chain] =
                    _mm512_dpbf16_ps(chains[t][chain], weights, reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
            }
        };
        std::int64_t pair = 0;
        for (; pair + kChains <= pairs; pair += kChains)
            for (int chain = 0; chain < kChains; ++chain) step(pair + chain, chain);
        for (; pair < pairs; ++pair) step(pair, 0);
        if (in % 2 != 0) {
            const auto weights = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + 2 * pairs * kLanes));
            for (int t = 0; t < Tokens; ++t) {
                const auto last = _mm512_set1_epi32(x[t * stride + in - 1].bits);
                chains[t][0] = _mm512_dpbf16_ps(chains[t][0], weights, reinterpret_cast<__m512bh>(last));
            }
        }
        for (int t = 0; t < Tokens; ++t) {
            for (int chain = 1; chain < kChains; ++chain) chains[t][0] = chains[t][0] + chains[t][chain];
            sums[t] = reinterpret_cast<lanes>(chains[t][0]);
        }
    }
};
#endif

// Where one panel's sums go: scaled, with the bias, into columns [column, column + width) of y.
template <typename T>
struct Target {
    T* y;
    std::int64_t out, column, width;
    const float* scales;
    const float* bias;

    void write(std::int64_t token, const float* sums) const {
        T* to = y + token * out + column;
        if (width == kLanes) {
            lanes value = load(sums) * load(scales + column);
            if (bias != nullptr) value += load(bias + column);
            return save(to, value);
        }
        for (std::int64_t c = 0; c < width; ++c)
            to[c] = narrow<T>(sums[c] * scales[column + c] + (bias == nullptr ? 0.0f : bias[column + c]));
    }
};

template <typename T, int Tokens>
void few(const T* x, std::int64_t token, std::int64_t in, const typename Panel<T>::Element* panel,
         const Target<T>& target) {
    lanes sums[Tokens];
    Panel<T>::template multiply<Tokens>(x + token * in, in, in, panel, sums);
    for (int t = 0; t < Tokens; ++t) {
        float each[kLanes];
        save(each, sums[t]);
        target.write(token + t, each);
    }
}

template <typename T>
void vectors(const T* x, std::int64_t tokens, std::int64_t in, const typename Panel<T>::Element* panel,
             const Target<T>& target) {
    std::int64_t token = 0;
    for (; token + kTokensTogether <= tokens; token += kTokensTogether)
        few<T, kTokensTogether>(x, token, in, panel, target);
    for (; token + 4 <= tokens; token += 4) few<T, 4>(x, token, in, panel, target);
    for (; token + 2 <= tokens; token += 2) few<T, 2>(x, token, in, panel, target);
    if (token < tokens) few<T, 1>(x, token, in, panel, target);
}

#ifdef __AMX_BF16__
constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileDepth = 32;  // elements of x that one tile product sums over
constexpr std::int64_t kTileFrom = 2;    // one token alone is quicker without

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// Tiles of this thread are ours for a while, then as they were: oneDNN keeps its own between calls.
class Tiles {
  public:
    explicit Tiles(std::int64_t last_rows) {
        _tile_storeconfig(&before_);
        TileConfig ours;
        // 0, 1: sums of whole tiles; 2, 3: their tokens; 4: weights; 5: sums of the last tile; 6: its tokens.
        const auto few = static_cast<std::uint8_t>(last_rows);
        const std::uint8_t rows[7] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, few, few};
        for (int tile = 0; tile < 7; ++tile) {
            ours.rows[tile] = rows[tile];
            ours.bytes[tile] = 64;
        }
        _tile_loadconfig(&ours);
    }
    ~Tiles() {
        if (before_.palette == 0)
            _tile_release();
        else
            _tile_loadconfig(&before_);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    TileConfig before_;
};

void tiled(const bf16* x, std::int64_t tokens, std::int64_t in, const bf16* panel, const Target<bf16>& target) {
    alignas(64) float sums[kTileRows * kLanes];
    const auto write = [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t t = 0; t < count; ++t) target.write(first + t, sums + t * kLanes);
    };
    std::int64_t token = 0;
    for (; token + 2 * kTileRows <= tokens; token += 2 * kTileRows) {
        _tile_zero(0);
        _tile_zero(1);
        for (std::int64_t i = 0; i < in; i += kTileDepth) {
            _tile_loadd(4, panel + i * kLanes, 64);
            _tile_loadd(2, x + token * in + i, 2 * in);
            _tile_loadd(3, x + (token + kTileRows) * in + i, 2 * in);
            _tile_dpbf16ps(0, 2, 4);
            _tile_dpbf16ps(1, 3, 4);
        }
        _tile_stored(0, sums, 64);
        write(token, kTileRows);
        _tile_stored(1, sums, 64);
        write(token + kTileRows, kTileRows);
    }
    if (token + kTileRows <= tokens) {
        _tile_zero(0);
        for (std::int64_t i = 0; i < in; i += kTileDepth) {
            _tile_loadd(4, panel + i * kLanes, 64);
            _tile_loadd(2, x + token * in + i, 2 * in);
            _tile_dpbf16ps(0, 2, 4);
        }
        _tile_stored(0, sums, 64);
        write(token, kTileRows);
        token += kTileRows;
    }
    if (token == tokens) return;
    _tile_zero(5);
    for (std::int64_t i = 0; i < in; i += kTileDepth) {
        _tile_loadd(4, panel + i * kLanes, 64);
        _tile_loadd(6, x + token * in + i, 2 * in);
        _tile_dpbf16ps(5, 6, 4);
    }
    _tile_stored(5, sums, 64);
    write(token, tokens - token);
}
#endif

template <typename T>
void run(const T* x, std::int64_t tokens, const Quantised& weights, const float* bias, T* y) {
    const std::int64_t in = weights.in, depth = weights.depth();
    const std::int64_t panels = (weights.out + kLanes - 1) / kLanes;
    // Panels are filled up with zeros to whole tiles, rows of x are not.
    [[maybe_unused]] const bool whole = depth == in;
#pragma omp parallel
    {
        std::vector<typename Panel<T>::Element> panel(depth * kLanes);
#ifdef __AMX_BF16__
        std::optional<Tiles> tiles;
        if constexpr (std::is_same_v<T, bf16>)
            if (whole && tokens >= kTileFrom) tiles.emplace(tokens % kTileRows == 0 ? kTileRows : tokens % kTileRows);
#endif
#pragma omp for schedule(static)
        for (std::int64_t p = 0; p < panels; ++p) {
            const std::int64_t column = p * kLanes;
            const Target<T> target{y, weights.out, column, std::min(kLanes, weights.out - column), weights.scales,
                                   bias};
            Panel<T>::fill(weights.panels + p * depth * kLanes, depth, panel.data());
#ifdef __AMX_BF16__
            if constexpr (std::is_same_v<T, bf16>) {
                if (tiles.has_value()) {
                    tiled(x, tokens, in, panel.data(), target);
                    continue;
                }
            }
#endif
            vectors(x, tokens, in, panel.data(), target);
        }
    }
}

}  // namespace

template <>
void quantised_product<float>(const float* x, std::int64_t tokens, const Quantised& weights, const float* bias,
                              float* y) {
    run(x, tokens, weights, bias, y);
}

template <>
void quantised_product<bf16>(const bf16* x, std::int64_t tokens, const Quantised& weights, const float* bias,
                             bf16* y) {
    run(x, tokens, weights, bias, y);
}

}  // namespace twinserve
