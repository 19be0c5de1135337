"""Whole models streamed through a merge."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.checkpoint import Checkpoint, FineTune, open_fine_tune, write_checkpoint
from experts.errors import MergeError
from experts.factors import LowRank, dense
from experts.merging import (
    Averaging,
    Breadcrumbs,
    Dare,
    DareTies,
    Della,
    IsoC,
    MergeCache,
    MergeMethod,
    ModelStock,
    Sce,
    TaskArithmetic,
    Ties,
    TsvMerge,
    merge,
)
from experts.merging.dare import dare
from experts.merging.draws import Draws
from experts.merging.sce import sce
from experts.merging.ties import disjoint_mean, elect_signs
from tests.unit.checkpoint.folders import (
    DOWN,
    NORM,
    UP,
    UP_BIAS,
    Q,
    lora_factors,
    near,
    random_weights,
    write_lora,
    write_model,
)

EVERY_METHOD = [
    Averaging(),
    TaskArithmetic(scale=0.4),
    Ties(density=0.3, scale=0.7),
    Dare(drop_rate=0.5, scale=0.4, seed=7),
    DareTies(drop_rate=0.3, density=0.4, seed=7),
    Ties(density=0.3, trim="tensor", scale=0.7),
    Breadcrumbs(density=0.3, outliers=0.05),
    Breadcrumbs(density=0.3, outliers=0.05, election=True),
    Della(drop_rate=0.4, epsilon=0.3, seed=7),
    Della(drop_rate=0.4, epsilon=0.3, election=False, seed=7),
    Sce(density=0.4),
    ModelStock(),
    TsvMerge(),
    TsvMerge(fraction=0.7, scale=0.6),
    IsoC(),
]


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_model(tmp_path / "base", random_weights(0)))


@pytest.fixture
def full(tmp_path: Path, base: Checkpoint) -> list[FineTune]:
    weights = random_weights(0)
    return [
        open_fine_tune(name, write_model(tmp_path / name, near(weights, seed)), base)
        for seed, name in enumerate("abc", start=1)
    ]


@pytest.fixture
def loras(tmp_path: Path, base: Checkpoint) -> list[FineTune]:
    contents = [
        lora_factors(Q, 1) | lora_factors(UP, 2),
        lora_factors(Q, 3),
        lora_factors(Q, 4) | lora_factors(DOWN, 5),
    ]
    return [
        open_fine_tune(f"lora{index}", write_lora(tmp_path / f"lora{index}", factors), base)
        for index, factors in enumerate(contents)
    ]


def as_dense(base: Checkpoint, fine_tunes: Sequence[FineTune], method: MergeMethod) -> dict[str, Tensor]:
    merged = {}
    for name, delta in merge(base, fine_tunes, method):
        merged[name] = torch.zeros(base.shape(name)) if delta is None else dense(delta)
    return merged


def whole_vector(base: Checkpoint, fine_tune: FineTune) -> Tensor:
    deltas = [fine_tune.delta(name) for name in base.names]
    return torch.cat([dense(delta).reshape(-1) for delta in deltas if delta is not None])


def test_every_parameter_comes_once_in_the_bases_order(base: Checkpoint, full: list[FineTune]) -> None:
    lines: list[str] = []
    names = [name for name, _ in merge(base, full, Averaging(), progress=lines.append)]
    assert names == list(base.names)
    assert lines == names


def test_averaging_gives_the_mean_of_the_models(base: Checkpoint, full: list[FineTune]) -> None:
    merged = as_dense(base, full, Averaging())
    for name in base.names:
        models = [fine_tune.tensor(name) for fine_tune in full]
        mean = torch.stack([model for model in models if model is not None]).mean(0)
        torch.testing.assert_close(base.tensor(name) + merged[name], mean)


def test_linear_merges_of_loras_stay_products_and_equal_the_dense_merge(
    base: Checkpoint, loras: list[FineTune]
) -> None:
    for method, weight in ((Averaging(), 1 / 3), (TaskArithmetic(scale=0.4), 0.4)):
        for name, delta in merge(base, loras, method):
            parts = [part for part in (lora.delta(name) for lora in loras) if part is not None]
            if not parts:
                assert delta is None
                continue
            assert delta is not None
            if 2 * len(parts) < min(delta.shape):
                assert isinstance(delta, LowRank)
                assert delta.rank == 2 * len(parts)
            torch.testing.assert_close(
                dense(delta),
                weight * torch.stack([dense(part) for part in parts]).sum(0),
                atol=1e-5,
                rtol=1e-4,
            )


def test_products_and_dense_changes_of_one_parameter_merge_dense(
    base: Checkpoint, full: list[FineTune], loras: list[FineTune]
) -> None:
    merged = dict(merge(base, [full[0], loras[1]], TaskArithmetic(scale=0.5)))
    first, second = full[0].delta(Q), loras[1].delta(Q)
    assert first is not None
    assert second is not None
    assert isinstance(merged[Q], Tensor)
    torch.testing.assert_close(merged[Q], 0.5 * (dense(first) + dense(second)))


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda method: method.method)
def test_the_order_of_the_fine_tunes_does_not_matter(
    base: Checkpoint, full: list[FineTune], loras: list[FineTune], method: MergeMethod
) -> None:
    family = [*full, loras[0]]
    forwards, backwards = as_dense(base, family, method), as_dense(base, family[::-1], method)
    for name in base.names:
        torch.testing.assert_close(forwards[name], backwards[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        Averaging(),
        TaskArithmetic(scale=1),
        Ties(density=1, scale=1),
        Dare(drop_rate=0, scale=1),
        Breadcrumbs(density=1, outliers=0, scale=1),
        Della(drop_rate=0, epsilon=0, scale=1),
        Sce(),
        ModelStock(),
        TsvMerge(scale=1),
    ],
    ids=lambda method: method.method,
)
def test_one_fine_tune_at_scale_one_comes_back_as_a_model(
    tmp_path: Path, base: Checkpoint, full: list[FineTune], method: MergeMethod
) -> None:
    write_checkpoint(base, merge(base, full[:1], method), tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    for name in base.names:
        expected = full[0].tensor(name)
        assert expected is not None
        torch.testing.assert_close(written.tensor(name), expected, atol=1e-6, rtol=1e-6)


def test_ties_trims_each_task_vector_as_a_whole(base: Checkpoint, tmp_path: Path) -> None:
    # One fine-tune's large changes are all in one tensor: a threshold of each tensor would keep some of both.
    weights = random_weights(0)
    weights[Q] = weights[Q] + 100 + torch.arange(36.0).reshape(6, 6)
    weights[DOWN] = weights[DOWN] + 0.01
    tuned = open_fine_tune("a", write_model(tmp_path / "a", weights), base)
    merged = as_dense(base, [tuned], Ties(density=0.3, scale=1.0))
    # 36 + 60 entries were trained, so 29 stay.
    assert int((merged[Q] != 0).sum()) == 29
    assert int((merged[DOWN] != 0).sum()) == 0


def test_ties_equals_the_paper_on_flattened_task_vectors(
    base: Checkpoint, full: list[FineTune], loras: list[FineTune]
) -> None:
    family = [*full, loras[0]]
    density, scale = 0.25, 0.8
    trimmed = []
    for fine_tune in family:
        vector = whole_vector(base, fine_tune)
        count = -(-len(vector) // 4)
        threshold = vector.abs().topk(count).values[-1]
        flat = torch.cat(
            [
                torch.zeros(base.shape(name)).reshape(-1) if delta is None else dense(delta).reshape(-1)
                for name in base.names
                for delta in [fine_tune.delta(name)]
            ]
        )
        trimmed.append(torch.where(flat.abs() >= threshold, flat, 0.0))
    expected = disjoint_mean(torch.stack(trimmed), elect_signs(torch.stack(trimmed))) * scale
    merged = as_dense(base, family, Ties(density=density, scale=scale))
    flat_merged = torch.cat([merged[name].reshape(-1) for name in base.names])
    torch.testing.assert_close(flat_merged, expected)


def test_dare_is_task_arithmetic_over_sparsified_task_vectors(base: Checkpoint, full: list[FineTune]) -> None:
    method = Dare(drop_rate=0.6, scale=0.5, seed=11)
    merged = as_dense(base, full, method)
    for name in (Q, NORM):
        total = torch.zeros(base.shape(name))
        for fine_tune in full:
            delta = fine_tune.delta(name)
            assert delta is not None
            total += dare(dense(delta), 0.6, Draws(11, fine_tune.name, name))
        torch.testing.assert_close(merged[name], 0.5 * total)


@pytest.mark.parametrize("method", [Dare(seed=1, drop_rate=0.5), DareTies(seed=1, drop_rate=0.5)], ids=repr)
def test_random_methods_repeat_with_their_seed_and_differ_with_another(
    base: Checkpoint, full: list[FineTune], method: Dare | DareTies
) -> None:
    first, again = as_dense(base, full, method), as_dense(base, full, method)
    other = as_dense(base, full, method.model_copy(update={"seed": 2}))
    assert all(torch.equal(first[name], again[name]) for name in base.names)
    assert not torch.equal(first[Q], other[Q])


def test_sce_over_blocks_is_sce_of_the_whole_tensor(base: Checkpoint, full: list[FineTune]) -> None:
    merged = as_dense(base, full, Sce(density=0.4, scale=0.7))
    for name in (Q, UP, NORM):
        deltas = torch.stack([dense(delta) for each in full if (delta := each.delta(name)) is not None])
        torch.testing.assert_close(merged[name], sce(deltas, 0.4, 0.7))


@pytest.mark.parametrize("method", [TsvMerge(scale=0.6), IsoC(scale=0.6)], ids=lambda method: method.method)
def test_matrix_methods_average_what_is_no_matrix(
    base: Checkpoint, full: list[FineTune], method: MergeMethod
) -> None:
    merged, average = as_dense(base, full, method), as_dense(base, full, Averaging())
    for name in (NORM, UP_BIAS):
        torch.testing.assert_close(merged[name], 0.6 * average[name])
    assert not torch.allclose(merged[Q], 0.6 * average[Q])


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda method: method.method)
@pytest.mark.parametrize("keep_products", [True, False])
def test_a_cache_changes_no_merge(
    base: Checkpoint,
    full: list[FineTune],
    loras: list[FineTune],
    method: MergeMethod,
    keep_products: bool,
) -> None:
    cache = MergeCache(keep_products)
    for family in ([*full, loras[0]], full[:2], [*full, loras[0]], loras):
        plain = as_dense(base, family, method)
        for _ in range(2):
            kept = dict(merge(base, family, method, cache=cache))
            for name in base.names:
                delta = kept[name]
                got = torch.zeros(base.shape(name)) if delta is None else dense(delta)
                torch.testing.assert_close(got, plain[name], rtol=0, atol=0)


def test_a_cache_spares_the_passes_for_thresholds(base: Checkpoint, full: list[FineTune]) -> None:
    cache = MergeCache()

    def passes(method: MergeMethod) -> int:
        lines: list[str] = []
        list(merge(base, full, method, lines.append, cache))
        return sum("trimming threshold" in line for line in lines)

    assert passes(Ties(density=0.3, scale=0.3)) > 0
    assert passes(Ties(density=0.3, scale=0.6)) == 0


def test_impossible_inputs_are_refused(tmp_path: Path, base: Checkpoint, full: list[FineTune]) -> None:
    with pytest.raises(MergeError, match="nothing to merge"):
        merge(base, [], Averaging())
    with pytest.raises(MergeError, match="one name: a, a"):
        merge(base, [full[0], full[0]], Averaging())
    broken = random_weights(0)
    broken[UP][0, 0] = torch.nan
    tuned = open_fine_tune("broken", write_model(tmp_path / "broken", broken), base)
    for method in EVERY_METHOD:
        with pytest.raises(MergeError, match=r"broken .*up_proj\.weight has NaN or Inf"):
            list(merge(base, [full[0], tuned], method))
