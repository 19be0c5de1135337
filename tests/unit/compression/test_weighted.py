from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from experts.compression import CompressionSpec, activation_statistics, compress
from experts.compression.svd import decompose
from experts.compression.weighted import decompose_weighted
from experts.errors import CompressionError
from experts.factors import Delta, LowRank, dense


def samples(size: int, seed: int) -> Tensor:
    """Correlated inputs of very different size, (200, size)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(200, size, generator=generator) @ mixing * torch.logspace(-1, 1, size)


def moments_of(inputs: Tensor, form: str) -> Tensor:
    full = inputs.T @ inputs / len(inputs)
    return full if form == "full" else full.diagonal().clone()


def output_error(delta: Delta, kept: Tensor, moments: Tensor) -> float:
    lost = (dense(delta) - kept).double()
    through = lost * moments if moments.ndim == 1 else lost @ moments.double()
    return float((through * lost).sum().clamp(min=0).sqrt())


@given(st.integers(1, 5), st.sampled_from(["full", "diagonal"]), st.booleans(), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_outputs_suffer_no_more_than_under_the_plain_truncation_of_the_same_rank(
    rank: int, form: str, low: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    product = LowRank(torch.randn(12, 6, generator=generator), torch.randn(6, 9, generator=generator))
    delta: Delta = product if low else product.dense()
    moments = moments_of(samples(9, seed), form)
    weighted = decompose_weighted(delta, moments, "w")
    ours = output_error(delta, weighted.at(rank).dense(), moments)
    plain = output_error(delta, decompose(delta, "w").at(rank).dense(), moments)
    assert ours <= plain * 1.02 + 1e-4 * float(weighted.values[0])
    assert weighted.lost(rank) == pytest.approx(
        float((dense(delta) - weighted.at(rank).dense()).norm()), rel=1e-3, abs=2e-3 * weighted.norm
    )


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_low_rank_and_dense_differences_are_decomposed_alike(form: str) -> None:
    product = LowRank(torch.randn(10, 4), torch.randn(4, 8))
    moments = moments_of(samples(8, 1), form)
    low, whole = (decompose_weighted(delta, moments, "w") for delta in (product, product.dense()))
    torch.testing.assert_close(low.values[:4], whole.values[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low.at(2).dense(), whole.at(2).dense(), rtol=1e-3, atol=1e-3)


def test_all_ranks_give_the_difference_back_and_factors_are_an_ordinary_svd() -> None:
    delta = torch.randn(7, 5)
    factors = decompose_weighted(delta, torch.rand(5), "w").at(5)
    torch.testing.assert_close(factors.dense(), delta, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.U.T @ factors.U, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.Vh @ factors.Vh.T, torch.eye(5), rtol=0, atol=1e-5)
    assert factors.S.tolist() == sorted(factors.S.tolist(), reverse=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "mixed"])
def test_a_budget_goes_where_the_inputs_are_large(dtype: Any) -> None:
    deltas = {name: torch.randn(16, 16) for name in ("loud.weight", "quiet.weight")}
    statistics = {"loud.weight": torch.full((16,), 100.0), "quiet.weight": torch.full((16,), 0.01)}
    spec = CompressionSpec(budget_bytes=320, dtype=dtype, allocation="activation")
    expert = compress(deltas.items(), spec, statistics=statistics)
    assert list(expert.factors) == ["loud.weight"]
    assert expert.nbytes <= 320


def test_statistics_that_are_missing_or_of_another_model_are_refused() -> None:
    spec = CompressionSpec(rank=1, allocation="activation")
    with pytest.raises(CompressionError, match=r"no activation statistics of a\.weight.*allocation=energy"):
        compress([("a.weight", torch.eye(3))], spec)
    with pytest.raises(CompressionError, match=r"takes 3 inputs.*\[4\]"):
        compress([("a.weight", torch.eye(3))], spec, statistics={"a.weight": torch.ones(4)})
    with pytest.raises(CompressionError, match="NaN or Inf"):
        compress([("a.weight", torch.eye(3))], spec, statistics={"a.weight": torch.full((3,), torch.nan)})


class Tiny(nn.Module):
    """Two layers that see the same input, and one that sees their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.query, self.key, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        inputs = self.embed(input_ids)
        result: Tensor = self.out(self.query(inputs) + self.key(inputs))
        return result


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_statistics_are_means_over_real_tokens_whatever_the_batches(batch: int) -> None:
    model = Tiny().eval()
    texts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [1, 1]]
    batches = [texts[start : start + batch] for start in range(0, len(texts), batch)]
    full = activation_statistics(model, batches, "full")
    diagonal = activation_statistics(model, batches)
    assert set(full) == {"query.weight", "key.weight", "out.weight"}
    seen = model.embed(torch.tensor([token for text in texts for token in text])).detach()
    torch.testing.assert_close(full["query.weight"], seen.T @ seen / len(seen))
    inner = (model.query(seen) + model.key(seen)).detach()
    torch.testing.assert_close(full["out.weight"], inner.T @ inner / len(seen))
    assert full["key.weight"] is full["query.weight"]
    for name, moments in diagonal.items():
        torch.testing.assert_close(moments, full[name].diagonal())


def test_statistics_of_no_tokens_are_refused_and_hooks_are_taken_off() -> None:
    model = Tiny().eval()
    with pytest.raises(CompressionError, match="no tokens"):
        activation_statistics(model, [[]])
    assert not any(module._forward_pre_hooks for module in model.modules())
