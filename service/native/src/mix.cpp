// y += sum_t g_t B_t^T (A_t x): the exclusive parts of a step whose tokens have different gates.
//
// Two phases in one parallel region. First every (expert, part, few factor rows) is multiplied with the
// tokens that use the expert, so that a factor row is read from memory once. Then every tile of output
// columns collects all experts of its tokens while the tile lies in the first-level cache.

#include <algorithm>

#include "kernels.h"
#include "lanes.h"

namespace twinserve {
namespace {

constexpr int kRows = 4;               // factor rows multiplied together
constexpr int kTogether = 4;           // tokens multiplied together
constexpr int kVectors = 4;            // vectors of a tile's row
constexpr std::int64_t kTokens = 64;   // tokens of a tile
constexpr std::size_t kAhead = 4;      // experts whose factors are asked for ahead of use

static_assert(kColumns == kVectors * kLanes);

// Have memory that will be read soon brought near: factors of many experts are short and far apart, and the
// processor's own look-ahead starts anew with each.
template <typename T>
void ask(const T* from, std::int64_t count) {
    constexpr std::int64_t line = 64 / sizeof(T);
    for (std::int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

// hidden[u * rank + j] = gate_u * (a_j . x_{token u}) for `Rows` factor rows and `Tokens` uses.
template <typename T, int Rows, int Tokens>
void project(const T* x, std::int64_t in, const T* a, const Mix::Use* uses, float* hidden, std::int64_t rank) {
    lanes sums[Rows][Tokens] = {};
    const T* rows[Tokens];
    for (int t = 0; t < Tokens; ++t) rows[t] = x + uses[t].token * in;
    std::int64_t i = 0;
    for (; i + Dot<T>::kWidth <= in; i += Dot<T>::kWidth) {
        typename Dot<T>::Vector inputs[Tokens];
        for (int t = 0; t < Tokens; ++t) inputs[t] = Dot<T>::read(rows[t] + i);
        for (int j = 0; j < Rows; ++j) {
            const auto factor = Dot<T>::read(a + j * in + i);
            for (int t = 0; t < Tokens; ++t) sums[j][t] = Dot<T>::step(sums[j][t], factor, inputs[t]);
        }
    }
    for (int j = 0; j < Rows; ++j) {
        for (int t = 0; t < Tokens; ++t) {
            float sum = total(sums[j][t]);
            for (std::int64_t k = i; k < in; ++k) sum += widen(a[j * in + k]) * widen(rows[t][k]);
            hidden[t * rank + j] = uses[t].gate * sum;
        }
    }
}

template <typename T, int Rows>
void project_uses(const T* x, std::int64_t in, const T* a, const Mix::Use* uses, std::int64_t count, float* hidden,
                  std::int64_t rank) {
    std::int64_t u = 0;
    for (; u + kTogether <= count; u += kTogether)
        project<T, Rows, kTogether>(x, in, a, uses + u, hidden + u * rank, rank);
    for (; u + 2 <= count; u += 2) project<T, Rows, 2>(x, in, a, uses + u, hidden + u * rank, rank);
    if (u < count) project<T, Rows, 1>(x, in, a, uses + u, hidden + u * rank, rank);
}

template <typename T>
void project_rows(std::int64_t rows, const T* x, std::int64_t in, const T* a, const std::vector<Mix::Use>& uses,
                  float* hidden, std::int64_t rank) {
    const std::int64_t count = static_cast<std::int64_t>(uses.size());
    if (rows == kRows) return project_uses<T, kRows>(x, in, a, uses.data(), count, hidden, rank);
    for (std::int64_t j = 0; j < rows; ++j)
        project_uses<T, 1>(x, in, a + j * in, uses.data(), count, hidden + j, rank);
}

// The running sums of a tile: (tokens, kColumns), read from y when a token is first used.
struct Sums {
    alignas(64) float values[kTokens][kColumns];
    bool used[kTokens] = {};
};

// sums[token of each use] += sum_j h_j b[j], for uses whose factors are the same; b is a tile (rank, kColumns).
template <typename T, int Tokens>
void collect(const T* b, std::int64_t rank, const float* h, Sums& sums, const std::int64_t* at) {
    lanes acc[Tokens][kVectors];
    for (int t = 0; t < Tokens; ++t)
        for (int v = 0; v < kVectors; ++v) acc[t][v] = load(sums.values[at[t]] + v * kLanes);
    for (std::int64_t j = 0; j < rank; ++j) {
        lanes row[kVectors];
        for (int v = 0; v < kVectors; ++v) row[v] = load(b + j * kColumns + v * kLanes);
        for (int t = 0; t < Tokens; ++t)
            for (int v = 0; v < kVectors; ++v) acc[t][v] += h[t * rank + j] * row[v];
    }
    for (int t = 0; t < Tokens; ++t)
        for (int v = 0; v < kVectors; ++v) save(sums.values[at[t]] + v * kLanes, acc[t][v]);
}

struct Projection {
    std::int32_t expert, part, row, rows;
};

struct Tile {
    std::int32_t part;
    std::int64_t column, width, token, tokens;
};

// What one tile of y gains. `fetch(e)` is told ahead of time which expert's factors come.
template <typename T, typename Fetch>
void finish(const Tile& tile, const Part<T>& part, const Mix& mix, const float* hidden, const std::int64_t* offsets,
            T* y, std::int64_t stride, const Fetch& fetch) {
    Sums sums;
    T* target = y + tile.token * stride + part.column + tile.column;
    const auto open = [&](std::int64_t token) {
        const std::int64_t t = token - tile.token;
        if (!sums.used[t]) {
            sums.used[t] = true;
            for (std::int64_t c = 0; c < tile.width; ++c) sums.values[t][c] = widen(target[t * stride + c]);
            for (std::int64_t c = tile.width; c < kColumns; ++c) sums.values[t][c] = 0;
        }
        return t;
    };
    for (std::size_t e = 0; e < mix.uses.size(); ++e) {
        fetch(e + kAhead);
        const Factors<T>& factors = part.experts[e];
        if (factors.rank == 0 && factors.bias == nullptr) continue;
        const std::vector<Mix::Use>& uses = mix.uses[e];
        const auto before = [](const Mix::Use& use, std::int64_t token) { return use.token < token; };
        const auto first = std::lower_bound(uses.begin(), uses.end(), tile.token, before);
        const auto last = std::lower_bound(first, uses.end(), tile.token + tile.tokens, before);
        const float* h = hidden + offsets[e] + (first - uses.begin()) * factors.rank;
        const T* b = factors.b + tile.column * factors.rank;
        for (auto use = first; use != last;) {
            const int together = last - use >= kTogether ? kTogether : last - use >= 2 ? 2 : 1;
            std::int64_t at[kTogether];
            for (int t = 0; t < together; ++t) at[t] = open(use[t].token);
            if (together == kTogether)
                collect<T, kTogether>(b, factors.rank, h, sums, at);
            else if (together == 2)
                collect<T, 2>(b, factors.rank, h, sums, at);
            else
                collect<T, 1>(b, factors.rank, h, sums, at);
            if (factors.bias != nullptr)
                for (int t = 0; t < together; ++t)
                    for (std::int64_t c = 0; c < tile.width; ++c)
                        sums.values[at[t]][c] += use[t].gate * factors.bias[tile.column + c];
            use += together;
            h += together * factors.rank;
        }
    }
    for (std::int64_t t = 0; t < tile.tokens; ++t) {
        if (!sums.used[t]) continue;
#pragma omp simd
        for (std::int64_t c = 0; c < tile.width; ++c) target[t * stride + c] = narrow<T>(sums.values[t][c]);
    }
}

}  // namespace

template <typename T>
void add_mix(const T* x, std::int64_t tokens, std::int64_t in, T* y, std::int64_t stride,
             const std::vector<Part<T>>& parts, const Mix& mix, std::vector<float>& scratch) {
    const std::int64_t experts = static_cast<std::int64_t>(mix.slots.size());
    std::vector<Projection> projections;
    std::vector<std::int64_t> offsets(experts * parts.size());
    std::vector<Tile> tiles;
    std::int64_t size = 0;
    for (std::size_t p = 0; p < parts.size(); ++p) {
        bool touched = false;
        for (std::int64_t e = 0; e < experts; ++e) {
            const Factors<T>& factors = parts[p].experts[e];
            offsets[p * experts + e] = size;
            size += factors.rank * static_cast<std::int64_t>(mix.uses[e].size());
            touched |= factors.rank > 0 || factors.bias != nullptr;
            for (std::int64_t row = 0; row < factors.rank; row += kRows)
                projections.push_back({static_cast<std::int32_t>(e), static_cast<std::int32_t>(p),
                                       static_cast<std::int32_t>(row),
                                       static_cast<std::int32_t>(std::min<std::int64_t>(kRows, factors.rank - row))});
        }
        if (!touched) continue;
        for (std::int64_t column = 0; column < parts[p].out; column += kColumns)
            for (std::int64_t token = 0; token < tokens; token += kTokens)
                tiles.push_back({static_cast<std::int32_t>(p), column, std::min(kColumns, parts[p].out - column), token,
                                 std::min(kTokens, tokens - token)});
    }
    if (tiles.empty()) return;
    if (static_cast<std::int64_t>(scratch.size()) < size) scratch.resize(size);
    float* hidden = scratch.data();

#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (std::size_t i = 0; i < projections.size(); ++i) {
            if (i + 1 < projections.size()) {
                const Projection& next = projections[i + 1];
                ask(parts[next.part].experts[next.expert].a + next.row * in, next.rows * in);
            }
            const Projection& job = projections[i];
            const Factors<T>& factors = parts[job.part].experts[job.expert];
            project_rows(job.rows, x, in, factors.a + job.row * in, mix.uses[job.expert],
                         hidden + offsets[job.part * experts + job.expert] + job.row, factors.rank);
        }
#pragma omp for schedule(static)
        for (std::size_t i = 0; i < tiles.size(); ++i) {
            const auto fetch = [&](std::size_t e) {
                const std::size_t behind = i + e / experts;
                if (behind >= tiles.size()) return;
                const Tile& tile = tiles[behind];
                const Factors<T>& factors = parts[tile.part].experts[e % experts];
                ask(factors.b + tile.column * factors.rank, factors.rank * kColumns);
            };
            finish(tiles[i], parts[tiles[i].part], mix, hidden, offsets.data() + tiles[i].part * experts, y, stride,
                   fetch);
        }
    }
}

template void add_mix<float>(const float*, std::int64_t, std::int64_t, float*, std::int64_t,
                             const std::vector<Part<float>>&, const Mix&, std::vector<float>&);
template void add_mix<bf16>(const bf16*, std::int64_t, std::int64_t, bf16*, std::int64_t,
                            const std::vector<Part<bf16>>&, const Mix&, std::vector<float>&);

}  // namespace twinserve
