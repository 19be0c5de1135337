// The decoder layers of a Llama-like model as one call: base products through torch's oneDNN, everything
// between them through the kernels, with every token's own mix of experts. Seen from Python as
// torch.classes.twinserve.Decoder; service/native/decoder.py says what the tensors hold.

#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <map>
#include <unordered_map>

#include "kernels.h"

namespace twinserve {
namespace {

using at::Tensor;
using Tensors = c10::List<std::optional<Tensor>>;

constexpr std::int64_t kMatrices = 7;  // q k v o gate up down
constexpr std::int64_t kNorms = 6;     // input, after attention, before mlp, after mlp, query, key
constexpr std::int64_t kProducts = 4;  // q+k+v, o, gate+up, down

struct Layer {
    std::vector<Tensor> norms;
    double epsilon, scale;
    std::int64_t group, window, rope;
};

// `scales` where the weight is int8 in panels; then the bias is float32.
struct Product {
    Tensor weight, bias, scales;
};

struct ExpertLayer {
    std::vector<Tensor> a, b, bias, norms;
};

struct Chunk {
    std::int64_t begin, end, start;
};

Tensor optional_tensor(const Tensors& list, std::int64_t index) {
    const std::optional<Tensor> found = list.get(index);
    return found.has_value() ? *found : Tensor();
}

const float* floats(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

const std::int32_t* integers(const Tensor& tensor) { return tensor.const_data_ptr<std::int32_t>(); }

template <typename T>
T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

Tensor packed_linear(const Tensor& x, const Product& product) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                               .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                             std::string_view, c10::List<std::optional<at::Scalar>>,
                                             std::optional<std::string_view>)>();
    const std::optional<Tensor> bias = product.bias.defined() ? std::optional<Tensor>(product.bias) : std::nullopt;
    return op.call(x, product.weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

class Decoder : public torch::CustomClassHolder {
  public:
    Decoder(std::int64_t heads, std::int64_t groups, std::int64_t dim, std::int64_t rotary, std::int64_t hidden,
            std::int64_t width, std::int64_t activation)
        : shape_{heads, groups, dim, rotary},
          hidden_(hidden),
          width_(width),
          activation_(static_cast<Activation>(activation)) {}

    // norms: kNorms float32 scales, missing ones None.
    void add_layer(const Tensors& norms, double epsilon, double scale, std::int64_t group, std::int64_t window,
                   std::int64_t rope) {
        TORCH_CHECK_VALUE(norms.size() == kNorms, "a layer has ", kNorms, " norms, got ", norms.size());
        Layer layer{{}, epsilon, scale, group, window, rope};
        for (std::int64_t i = 0; i < kNorms; ++i) layer.norms.push_back(optional_tensor(norms, i));
        layers_.push_back(std::move(layer));
    }

    // cosine, sine: (positions, rotary) float32, contiguous.
    void add_rope(const Tensor& cosine, const Tensor& sine) { ropes_.emplace_back(cosine, sine); }

    // One weight set: kProducts weights, biases and scales a layer; `packed` ones come from oneDNN's reorder. Those
    // with scales (out) float32 are int8 (panels, depth / 2, kPanelRows, 2), their biases float32.
    void set_base(std::int64_t id, const Tensors& weights, const Tensors& biases, const Tensors& scales, bool packed) {
        const std::int64_t wanted = kProducts * static_cast<std::int64_t>(layers_.size());
        TORCH_CHECK_VALUE(static_cast<std::int64_t>(weights.size()) == wanted, "a base has ", wanted, " weights");
        Base base{{}, packed};
        for (std::int64_t i = 0; i < wanted; ++i) {
            const Product made{optional_tensor(weights, i), optional_tensor(biases, i), optional_tensor(scales, i)};
            if (made.scales.defined()) check_panels(made, i % kProducts);
            base.products.push_back(made);
        }
        bases_[id] = std::move(base);
    }

    void drop_base(std::int64_t id) { bases_.erase(id); }

    // Keys and values of every layer; kernels.h says how a block lies.
    void set_cache(std::vector<Tensor> keys, std::vector<Tensor> values) {
        TORCH_CHECK_VALUE(keys.size() == layers_.size() && values.size() == layers_.size(), "one cache a layer");
        for (const auto* all : {&keys, &values})
            for (const Tensor& each : *all)
                TORCH_CHECK_VALUE(each.dim() == 4 && each.size(1) == kBlockTokens && each.size(2) == shape_.groups &&
                                      each.size(3) == shape_.dim && each.is_contiguous() &&
                                      each.scalar_type() == keys[0].scalar_type(),
                                  "a cache must be (blocks, ", kBlockTokens, ", ", shape_.groups, ", ", shape_.dim, ")");
        keys_ = std::move(keys);
        values_ = std::move(values);
    }

    // Per layer: a (rank, in), b (tiles, rank, kColumns), bias of kMatrices matrices, then kNorms norm differences.
    void set_expert(std::int64_t slot, const Tensors& tensors) {
        constexpr std::int64_t each = 3 * kMatrices + kNorms;
        TORCH_CHECK_VALUE(tensors.size() == each * layers_.size(), "an expert has ", each, " tensors a layer");
        std::vector<ExpertLayer> layers(layers_.size());
        for (std::size_t l = 0; l < layers.size(); ++l) {
            const std::int64_t at = each * static_cast<std::int64_t>(l);
            for (std::int64_t m = 0; m < kMatrices; ++m) {
                layers[l].a.push_back(optional_tensor(tensors, at + 3 * m));
                layers[l].b.push_back(optional_tensor(tensors, at + 3 * m + 1));
                const Tensor &a = layers[l].a.back(), &b = layers[l].b.back();
                TORCH_CHECK_VALUE(a.defined() == b.defined(), "factors come in pairs");
                TORCH_CHECK_VALUE(!b.defined() || (a.is_contiguous() && b.is_contiguous() && b.dim() == 3 &&
                                                   b.size(1) == a.size(0) && b.size(2) == kColumns &&
                                                   b.size(0) == (width_of(m) + kColumns - 1) / kColumns),
                                  "factors must be (rank, in) and (tiles, rank, ", kColumns, ")");
                layers[l].bias.push_back(optional_tensor(tensors, at + 3 * m + 2));
            }
            for (std::int64_t n = 0; n < kNorms; ++n)
                layers[l].norms.push_back(optional_tensor(tensors, at + 3 * kMatrices + n));
        }
        experts_[slot] = std::move(layers);
    }

    void drop_expert(std::int64_t slot) { experts_.erase(slot); }

    // Where the tokens of the coming steps lie, until the next call; all int32, contiguous.
    // places: (KV groups, cached tokens); tables: (KV groups, decode, width);
    // chunks: (chunks, 3) begin, end, start; chunk_tables: (KV groups, chunks, width); segments: (segments, 2).
    void begin(const Tensor& positions, const Tensor& places, const Tensor& tables, const Tensor& chunks,
               const Tensor& chunk_tables, const Tensor& segments) {
        const std::int64_t known = ropes_.empty() ? 0 : ropes_[0].first.size(0);
        for (std::int64_t i = 0; i < positions.numel(); ++i)
            TORCH_CHECK_VALUE(integers(positions)[i] >= 0 && integers(positions)[i] < known, "position ",
                              integers(positions)[i], " lies beyond the ", known, " that are known");
        positions_ = positions;
        places_ = places;
        tables_ = tables;
        chunk_tables_ = chunk_tables;
        chunks_.clear();
        for (std::int64_t i = 0; i < chunks.size(0); ++i) {
            const std::int32_t* row = integers(chunks) + 3 * i;
            chunks_.push_back({row[0], row[1], row[2]});
        }
        segments_.clear();
        for (std::int64_t i = 0; i < segments.size(0); ++i) {
            const std::int32_t* row = integers(segments) + 2 * i;
            segments_.push_back({row[0], row[1], 0});
        }
        masks_.clear();
    }

    // Gates of the layers to come, until the next call: uses (n, 3) int32 slot, first token, end token; gates (n) float32.
    // Token ranges of one slot must not overlap.
    void mix(const Tensor& uses, const Tensor& gates) {
        mix_ = Mix();
        std::map<std::int32_t, std::vector<Mix::Use>> by_slot;
        for (std::int64_t i = 0; i < uses.size(0); ++i) {
            const std::int32_t* row = integers(uses) + 3 * i;
            TORCH_CHECK_VALUE(experts_.count(row[0]), "no expert in slot ", row[0]);
            for (std::int32_t token = row[1]; token < row[2]; ++token)
                by_slot[row[0]].push_back({token, floats(gates)[i]});
        }
        for (auto& [slot, tokens] : by_slot) {
            std::sort(tokens.begin(), tokens.end(), [](const auto& l, const auto& r) { return l.token < r.token; });
            mix_.slots.push_back(slot);
            mix_.last = std::max(mix_.last, tokens.back().token + 1);
            mix_.uses.push_back(std::move(tokens));
        }
    }

    // Layers [first, last) over hidden (tokens, hidden), which is overwritten and returned. Segments whose
    // tokens are not there any more are left out.
    Tensor run(const Tensor& hidden, std::int64_t first, std::int64_t last, std::int64_t base) {
        TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.is_contiguous() && hidden.size(1) == hidden_,
                          "hidden states must be contiguous (tokens, ", hidden_, ")");
        TORCH_CHECK_VALUE(hidden.scalar_type() == at::kBFloat16 || hidden.scalar_type() == at::kFloat,
                          "hidden states must be bfloat16 or float32");
        TORCH_CHECK_VALUE(keys_.empty() || keys_[0].scalar_type() == hidden.scalar_type(),
                          "hidden states and cache must have one dtype");
        TORCH_CHECK_VALUE(0 <= first && first <= last && last <= static_cast<std::int64_t>(layers_.size()),
                          "no layers ", first, " to ", last);
        TORCH_CHECK_VALUE(hidden.size(0) <= positions_.size(0) && places_.size(1) <= hidden.size(0),
                          "the step has ", positions_.size(0), " tokens, got ", hidden.size(0));
        TORCH_CHECK_VALUE(mix_.last <= hidden.size(0), "gates reach beyond the step's tokens");
        const auto found = bases_.find(base);
        TORCH_CHECK_VALUE(found != bases_.end(), "no base weights ", base);
        for (std::int64_t l = first; l < last; ++l) {
            if (hidden.scalar_type() == at::kBFloat16)
                layer<bf16>(hidden, l, found->second);
            else
                layer<float>(hidden, l, found->second);
        }
        return hidden;
    }

  private:
    struct Base {
        std::vector<Product> products;
        bool packed;
    };

    template <typename T>
    void layer(const Tensor& hidden, std::int64_t index, const Base& base) {
        const Layer& layer = layers_[index];
        const std::int64_t tokens = hidden.size(0);
        T* h = data<T>(hidden);
        Tensor normed = at::empty_like(hidden);

        norm(h, tokens, index, 0, data<T>(normed));
        const Tensor qkv = product<T>(normed, index, base, 0, {0, 1, 2});
        const auto& [cosine, sine] = ropes_[layer.rope];
        rotate(data<T>(qkv), tokens, shape_, integers(positions_), floats(cosine), floats(sine), scales(index, 4),
               scales(index, 5), mix_);
        const Tensor attended = attention<T>(qkv, index);
        residual<T>(h, product<T>(attended, index, base, 1, {3}), index, 1);

        norm(h, tokens, index, 2, data<T>(normed));
        const Tensor gate_up = product<T>(normed, index, base, 2, {4, 5});
        const Tensor active = at::empty({tokens, width_}, hidden.options());
        activate(data<T>(gate_up), tokens, width_, activation_, data<T>(active));
        residual<T>(h, product<T>(active, index, base, 3, {6}), index, 3);
    }

    Scales scales(std::int64_t index, std::int64_t which) const {
        Scales found{floats(layers_[index].norms[which]), {}, static_cast<float>(layers_[index].epsilon)};
        for (const std::int32_t slot : mix_.slots)
            found.experts.push_back(floats(experts_.at(slot)[index].norms[which]));
        return found;
    }

    template <typename T>
    void norm(const T* x, std::int64_t tokens, std::int64_t index, std::int64_t which, T* out) const {
        rms_norm(x, tokens, hidden_, scales(index, which), mix_, out);
    }

    // h += x, with the norm `which` in between where the layer has one.
    template <typename T>
    void residual(T* h, const Tensor& x, std::int64_t index, std::int64_t which) const {
        if (layers_[index].norms[which].defined()) norm(data<T>(x), x.size(0), index, which, data<T>(x));
        add(h, data<T>(x), x.numel());
    }

    template <typename T>
    static Tensor plain_product(const Tensor& x, const Base& base, const Product& weights) {
        if (weights.scales.defined()) {
            const Quantised rows{weights.weight.const_data_ptr<std::int8_t>(), floats(weights.scales),
                                 weights.scales.size(0), x.size(1)};
            const Tensor y = at::empty({x.size(0), rows.out}, x.options());
            quantised_product(data<T>(x), x.size(0), rows, floats(weights.bias), data<T>(y));
            return y;
        }
        if (base.packed) return packed_linear(x, weights);
        return at::linear(x, weights.weight,
                          weights.bias.defined() ? std::optional<Tensor>(weights.bias) : std::nullopt);
    }

    // The kernel reads plain memory by these sizes.
    void check_panels(const Product& made, std::int64_t which) const {
        const std::int64_t in = which == 1 ? width_of(0) : which == 3 ? width_ : hidden_;
        const std::int64_t out = which == 0   ? width_of(0) + width_of(1) + width_of(2)
                                 : which == 2 ? 2 * width_
                                              : hidden_;
        const Quantised wanted{nullptr, nullptr, out, in};
        TORCH_CHECK_VALUE(made.scales.scalar_type() == at::kFloat && made.scales.is_contiguous() &&
                              made.scales.numel() == out,
                          "a quantised weight needs ", out, " scales");
        TORCH_CHECK_VALUE(made.weight.scalar_type() == at::kChar && made.weight.is_contiguous() &&
                              made.weight.numel() ==
                                  (out + kPanelRows - 1) / kPanelRows * kPanelRows * wanted.depth(),
                          "panels must be int8 (", (out + kPanelRows - 1) / kPanelRows, ", ", wanted.depth() / 2, ", ",
                          kPanelRows, ", 2)");
        TORCH_CHECK_VALUE(!made.bias.defined() || (made.bias.scalar_type() == at::kFloat && made.bias.numel() == out),
                          "a quantised weight's bias must be float32");
    }

    // One base product and the exclusive parts of the matrices that it holds side by side.
    template <typename T>
    Tensor product(const Tensor& x, std::int64_t index, const Base& base, std::int64_t which,
                   std::initializer_list<std::int64_t> matrices) {
        const Tensor y = plain_product<T>(x, base, base.products[kProducts * index + which]);
        if (mix_.empty()) return y;
        std::vector<Part<T>> parts;
        std::int64_t column = 0;
        for (const std::int64_t matrix : matrices) {
            Part<T> part{column, width_of(matrix), {}};
            for (const std::int32_t slot : mix_.slots) {
                const ExpertLayer& expert = experts_.at(slot)[index];
                Factors<T> factors;
                if (expert.a[matrix].defined()) {
                    factors.a = data<T>(expert.a[matrix]);
                    factors.b = data<T>(expert.b[matrix]);
                    factors.rank = expert.a[matrix].size(0);
                }
                factors.bias = floats(expert.bias[matrix]);
                part.experts.push_back(factors);
            }
            column += part.out;
            parts.push_back(std::move(part));
        }
        add_mix(data<T>(x), x.size(0), x.size(1), data<T>(y), y.size(1), parts, mix_, scratch_);
        return y;
    }

    std::int64_t width_of(std::int64_t matrix) const {
        switch (matrix) {
            case 0: return shape_.heads * shape_.dim;
            case 1:
            case 2: return shape_.groups * shape_.dim;
            case 3:
            case 6: return hidden_;
            default: return width_;
        }
    }

    template <typename T>
    Tensor attention(const Tensor& qkv, std::int64_t index) {
        const Layer& layer = layers_[index];
        const Tensor out = at::empty({qkv.size(0), shape_.heads * shape_.dim}, qkv.options());
        const std::int64_t cached = places_.size(1), decoding = tables_.size(1);
        if (cached > 0) {
            T* keys = data<T>(keys_[index]);
            T* values = data<T>(values_[index]);
            store(data<T>(qkv), cached, shape_, integers(places_) + layer.group * cached, keys, values);
            if (decoding > 0) {
                const std::int64_t width = tables_.size(2);
                decode_attention(data<T>(qkv), decoding, shape_, keys, values,
                                 integers(tables_) + layer.group * decoding * width, width, integers(positions_),
                                 static_cast<float>(layer.scale), layer.window, data<T>(out));
            }
        }
        for (std::size_t c = 0; c < chunks_.size(); ++c) prompt<T>(qkv, chunks_[c], static_cast<std::int64_t>(c), index, out);
        for (const Chunk& segment : segments_)
            if (segment.end <= qkv.size(0)) prompt<T>(qkv, segment, -1, index, out);
        return out;
    }

    // A run of prompt tokens: causal over itself, and over the cache before it.
    template <typename T>
    void prompt(const Tensor& qkv, const Chunk& chunk, std::int64_t number, std::int64_t index, const Tensor& out) {
        const Layer& layer = layers_[index];
        const std::int64_t count = chunk.end - chunk.begin, length = chunk.start + count;
        const Tensor own = qkv.narrow(0, chunk.begin, count);
        const auto heads_of = [&](std::int64_t first, std::int64_t heads) {
            return own.narrow(1, first * shape_.dim, heads * shape_.dim)
                .view({count, heads, shape_.dim})
                .transpose(0, 1)
                .unsqueeze(0);
        };
        const Tensor query = heads_of(0, shape_.heads);
        Tensor key, value;
        std::optional<Tensor> mask;
        if (chunk.start > 0) {
            const std::int64_t width = chunk_tables_.size(2);
            const std::int32_t* table = integers(chunk_tables_) +
                                        (layer.group * static_cast<std::int64_t>(chunks_.size()) + number) * width;
            key = at::empty({1, shape_.groups, length, shape_.dim}, qkv.options());
            value = at::empty_like(key);
            gather(data<T>(keys_[index]), data<T>(values_[index]), table, length, shape_, data<T>(key),
                   data<T>(value));
        } else {
            key = heads_of(shape_.heads, shape_.groups);
            value = heads_of(shape_.heads + shape_.groups, shape_.groups);
        }
        const bool windowed = layer.window > 0 && length > layer.window;
        if (chunk.start > 0 || windowed) mask = visible(chunk, windowed ? layer.window : 0);
        const Tensor found = at::scaled_dot_product_attention(query, key, value, mask, 0.0, !mask.has_value(),
                                                              layer.scale, shape_.heads != shape_.groups);
        out.narrow(0, chunk.begin, count)
            .view({count, shape_.heads, shape_.dim})
            .copy_(found.squeeze(0).transpose(0, 1));
    }

    // (queries, keys) boolean, True where a query may look; made once a step for every kind of layer.
    const Tensor& visible(const Chunk& chunk, std::int64_t window) {
        Tensor& mask = masks_[{chunk.begin, window}];
        if (!mask.defined()) {
            const std::int64_t count = chunk.end - chunk.begin;
            const Tensor position = at::arange(chunk.start, chunk.start + count).unsqueeze(1);
            const Tensor keys = at::arange(chunk.start + count);
            mask = keys <= position;
            if (window > 0) mask = mask.logical_and(keys > position - window);
        }
        return mask;
    }

    Heads shape_;
    std::int64_t hidden_, width_;
    Activation activation_;
    std::vector<Layer> layers_;
    std::vector<std::pair<Tensor, Tensor>> ropes_;
    std::unordered_map<std::int64_t, Base> bases_;
    std::unordered_map<std::int64_t, std::vector<ExpertLayer>> experts_;
    std::vector<Tensor> keys_, values_;
    Tensor positions_, places_, tables_, chunk_tables_;
    std::vector<Chunk> chunks_, segments_;
    std::map<std::pair<std::int64_t, std::int64_t>, Tensor> masks_;
    Mix mix_;
    std::vector<float> scratch_;
};

TORCH_LIBRARY(twinserve, library) {
    library.class_<Decoder>("Decoder")
        .def(torch::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         std::int64_t>())
        .def("add_layer", &Decoder::add_layer)
        .def("add_rope", &Decoder::add_rope)
        .def("set_base", &Decoder::set_base)
        .def("drop_base", &Decoder::drop_base)
        .def("set_cache", &Decoder::set_cache)
        .def("set_expert", &Decoder::set_expert)
        .def("drop_expert", &Decoder::drop_expert)
        .def("begin", &Decoder::begin)
        .def("mix", &Decoder::mix)
        .def("run", &Decoder::run);
}

}  // namespace twinserve
