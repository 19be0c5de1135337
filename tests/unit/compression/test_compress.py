from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from experts.compression import CompressedExpert, CompressionReport, CompressionSpec, compress, tensor_kind
from experts.errors import CompressionError
from experts.factors import Delta, LowRank, dense
from tests.unit.checkpoint.folders import DOWN, EMBEDDING, HEAD, NORM, SHAPES, UP, UP_BIAS, Q, random_weights

MATRICES = {Q, UP, DOWN}


def exclusive(seed: int = 0) -> dict[str, Delta]:
    vectors: dict[str, Delta] = dict(random_weights(seed))
    vectors[UP] = LowRank(torch.randn(10, 3), torch.randn(3, 6))
    return vectors


def measured_error(deltas: dict[str, Delta], expert: CompressedExpert, name: str) -> float:
    kept = torch.zeros(SHAPES[name])
    if name in expert.factors:
        kept = expert.factors[name].dense()
    elif name in expert.exact:
        kept = expert.exact[name]
    return float((dense(deltas[name]) - kept).norm())


def test_linear_weights_are_factored_and_extras_folded_and_reported() -> None:
    deltas = exclusive()
    expert = compress(deltas.items(), CompressionSpec(rank=2), model_nbytes=10_000)
    assert set(expert.factors) == MATRICES
    assert not expert.exact
    report = {tensor.name: tensor for tensor in expert.report.tensors}
    assert list(report) == list(SHAPES)
    for name, tensor in report.items():
        assert tensor.shape == SHAPES[name]
        assert tensor.norm == pytest.approx(float(dense(deltas[name]).norm()), rel=1e-4)
        assert tensor.error == pytest.approx(measured_error(deltas, expert, name), rel=1e-3)
        if name in MATRICES:
            assert (tensor.handling, tensor.rank) == ("factored", 2)
            assert tensor.nbytes == expert.factors[name].nbytes
        else:
            assert (tensor.handling, tensor.rank, tensor.nbytes, tensor.relative_error) == (
                "folded",
                0,
                0,
                1.0,
            )


def test_exact_extras_keep_vectors_whole_and_factor_embeddings_and_heads() -> None:
    deltas = exclusive()
    expert = compress(deltas.items(), CompressionSpec(rank=6, dtype="float32", extras="exact"))
    assert set(expert.factors) == MATRICES | {EMBEDDING, HEAD}
    assert set(expert.exact) == {NORM, UP_BIAS}
    for name in SHAPES:
        assert measured_error(deltas, expert, name) < 1e-4
    assert expert.exact[NORM].dtype == torch.float32
    assert expert.report.relative_error < 1e-5
    assert expert.report.folded_fraction == 0


def test_totals_are_true_bytes_and_errors_over_all_tensors() -> None:
    deltas = exclusive()
    expert = compress(deltas.items(), CompressionSpec(rank=1), model_nbytes=4_000)
    stored = sum(
        part.nbytes for factors in expert.factors.values() for part in (factors.U, factors.S, factors.Vh)
    )
    assert expert.nbytes == expert.report.nbytes == stored
    assert expert.report.fraction == stored / 4_000
    whole = sum(float(dense(delta).norm()) ** 2 for delta in deltas.values())
    lost = sum(measured_error(deltas, expert, name) ** 2 for name in SHAPES)
    folded = sum(float(dense(deltas[name]).norm()) ** 2 for name in SHAPES if name not in MATRICES)
    assert expert.report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert expert.report.kept_relative_error == pytest.approx(
        ((lost - folded) / (whole - folded)) ** 0.5, rel=1e-3
    )
    assert expert.report.folded_fraction == pytest.approx(folded / whole, rel=1e-3)
    assert expert.report.max_rank == 1


def test_energy_sets_the_rank_of_each_matrix_by_its_own_spectrum() -> None:
    flat, steep = torch.eye(6), torch.diag(torch.tensor([10.0, 1, 0.1, 0, 0, 0]))
    expert = compress([(Q, flat), (UP, steep)], CompressionSpec(energy=0.9))
    assert expert.factors[Q].rank == 6
    assert expert.factors[UP].rank == 1


def test_a_zero_difference_is_reported_but_not_stored() -> None:
    deltas: list[tuple[str, Delta | None]] = [(Q, torch.zeros(6, 6)), (NORM, torch.zeros(6)), (DOWN, None)]
    expert = compress(deltas, CompressionSpec(rank=3, extras="exact"))
    assert not expert.factors
    assert not expert.exact
    assert [(tensor.name, tensor.nbytes, tensor.relative_error) for tensor in expert.report.tensors] == [
        (Q, 0, 0.0),
        (NORM, 0, 0.0),
    ]
    assert expert.report.relative_error == 0.0
    assert expert.report.fraction is None


def cost(name: str, itemsize: int) -> int:
    return sum(SHAPES[name]) * itemsize + 4


def test_a_byte_budget_buys_the_most_energy_per_byte() -> None:
    small, large = torch.diag(torch.tensor([3.0, 1, 0.1, 0, 0, 0])), torch.zeros(10, 6)
    large[:6] = torch.diag(torch.tensor([4.0, 2, 0.2, 0, 0, 0]))
    # bf16: one value costs 28 bytes in Q, 36 in UP. Energy per byte: UP 16/36, Q 9/28, UP 4/36, Q 1/28, …
    spent = {
        36: {UP: 1},
        63: {UP: 1},
        64: {UP: 1, Q: 1},
        99: {UP: 1, Q: 2},  # the next in order, UP's second, does not fit; the one after it does
        100: {UP: 2, Q: 1},
        128: {UP: 2, Q: 2},
    }
    for budget, ranks in spent.items():
        expert = compress([(Q, small), (UP, large)], CompressionSpec(budget_bytes=budget))
        assert {name: factors.rank for name, factors in expert.factors.items()} == ranks, budget
        assert expert.nbytes <= budget


@given(st.integers(200, 4000), st.integers(0, 30), st.sampled_from(["bfloat16", "float32"]), st.booleans())
@settings(max_examples=60)
def test_a_byte_budget_is_kept_and_nearly_used(budget: int, seed: int, dtype: Any, exact: bool) -> None:
    deltas = dict(random_weights(seed))
    spec = CompressionSpec(budget_bytes=budget, dtype=dtype, extras="exact" if exact else "fold")
    expert = compress(iter(deltas.items()), spec)
    assert expert.nbytes <= budget
    names = (*MATRICES, *((EMBEDDING, HEAD) if exact else ()))
    held_whole = all(
        name in expert.factors and expert.factors[name].rank == min(SHAPES[name]) for name in names
    )
    largest = max(cost(name, spec.torch_dtype.itemsize) for name in names)
    assert held_whole or budget - expert.nbytes < largest


def many(count: int) -> Iterator[tuple[str, Delta]]:
    for index in range(count):
        yield (
            f"model.layers.{index}.proj.weight",
            torch.randn(8, 8, generator=torch.Generator().manual_seed(index)),
        )


def test_a_stream_much_larger_than_the_budget_is_shared_out_as_if_held_whole() -> None:
    budget = 10 * (16 * 4 + 4)
    expert = compress(many(60), CompressionSpec(budget_bytes=budget, dtype="float32"))
    values = {name: torch.linalg.svdvals(dense(delta).double()) for name, delta in many(60)}
    largest = torch.cat(list(values.values())).sort(descending=True).values[:10]
    kept = torch.cat([factors.S for factors in expert.factors.values()]).sort(descending=True).values
    torch.testing.assert_close(kept.double(), largest, atol=1e-5, rtol=1e-5)
    assert len(expert.report.tensors) == 60
    deltas = dict(many(60))
    for tensor in expert.report.tensors:
        factors = expert.factors.get(tensor.name)
        kept_part = factors.dense() if factors is not None else torch.zeros(8, 8)
        assert tensor.error == pytest.approx(float((dense(deltas[tensor.name]) - kept_part).norm()), rel=1e-4)


def test_a_budget_that_holds_nothing_is_refused_with_the_least_that_would_do() -> None:
    with pytest.raises(CompressionError, match="give at least 28"):
        compress([(Q, torch.eye(6))], CompressionSpec(budget_bytes=27))
    with pytest.raises(CompressionError, match="24 bytes of exact vectors"):
        compress([(Q, torch.eye(6)), (NORM, torch.ones(6))], CompressionSpec(budget_bytes=30, extras="exact"))


@pytest.mark.parametrize("name", [Q, NORM, EMBEDDING])
@pytest.mark.parametrize("extras", ["fold", "exact"])
def test_values_that_are_not_finite_are_refused_even_where_they_would_be_folded(
    name: str, extras: Any
) -> None:
    deltas = random_weights(0)
    deltas[name].view(-1)[0] = torch.nan
    with pytest.raises(CompressionError, match=f"{name} has NaN"):
        compress(deltas.items(), CompressionSpec(rank=1, extras=extras))


@pytest.mark.parametrize("extras", ["fold", "exact"])
@pytest.mark.parametrize("shape", [(2, 3, 4), ()])
def test_a_changed_tensor_that_no_expert_can_have_is_refused_and_never_dropped(
    extras: Any, shape: tuple[int, ...]
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    spec = CompressionSpec(rank=1, extras=extras)
    with pytest.raises(
        CompressionError, match=rf"{name} was changed and has shape \{list(shape)}.*freeze it"
    ):
        compress([(name, torch.ones(shape))], spec)
    unchanged = compress([(name, torch.zeros(shape))], spec)
    assert (unchanged.nbytes, unchanged.report.folded_fraction) == (0, 0)


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(CompressionError, match="comes twice"):
        compress([(Q, torch.eye(6)), (Q, torch.eye(6))], CompressionSpec(rank=1))


def test_progress_names_each_tensor() -> None:
    names: list[str] = []
    compress(exclusive().items(), CompressionSpec(rank=1), progress=names.append)
    assert names == list(SHAPES)


def test_the_report_goes_through_json_unchanged() -> None:
    report = compress(exclusive().items(), CompressionSpec(rank=1), model_nbytes=5).report
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"rank": 1, "energy": 0.5},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"budget_bytes": 0},
        {"rank": 1, "dtype": "int3"},
        {"rank": 1, "dtype": "mixed"},
        {"rank": 1, "allocation": "random"},
        {"rank": 1, "extras": "drop"},
        {"rank": 1, "ranks": 2},
    ],
)
def test_an_impossible_spec_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompressionSpec(**content)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), "linear"),
        ("transformer.h.0.attn.c_attn.weight", (4, 12), "linear"),
        ("gpt_neox.layers.0.attention.dense.bias", (4,), "vector"),
        ("model.norm.weight", (4,), "vector"),
        ("model.embed_tokens.weight", (9, 4), "embedding"),
        ("transformer.wte.weight", (9, 4), "embedding"),
        ("transformer.wpe.weight", (9, 4), "embedding"),
        ("gpt_neox.embed_in.weight", (9, 4), "embedding"),
        ("lm_head.weight", (9, 4), "head"),
        ("embed_out.weight", (9, 4), "head"),
        ("model.layers.0.mlp.experts.down_proj", (2, 4, 4), "other"),
        ("scale", (), "other"),
    ],
)
def test_a_parameters_role_is_told_from_its_name(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert tensor_kind(name, shape) == kind


def test_a_spec_can_be_asked_for_by_rank_or_energy_instead():
    mixed = CompressionSpec(budget_bytes=1000, dtype="mixed", extras="exact")
    assert mixed.resized(rank=3) == CompressionSpec(rank=3, dtype="int8", extras="exact")
    assert CompressionSpec(rank=2).resized(energy=0.5) == CompressionSpec(energy=0.5)
    with pytest.raises(ValidationError, match="exactly one"):
        mixed.resized()
