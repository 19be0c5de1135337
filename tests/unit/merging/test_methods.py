"""The pure merge functions against cases worked by hand, and the properties their papers promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from experts.merging.averaging import average
from experts.merging.dare import dare
from experts.merging.draws import Draws
from experts.merging.methods import (
    Averaging,
    Breadcrumbs,
    Dare,
    DareTies,
    Della,
    IsoC,
    MergeMethod,
    ModelStock,
    Sce,
    TaskArithmetic,
    Ties,
    TsvMerge,
)
from experts.merging.task_arithmetic import task_arithmetic
from experts.merging.threshold import magnitude_threshold, streamed_threshold
from experts.merging.ties import disjoint_mean, elect_signs, ties, trim

numbers = st.floats(-8, 8, width=32).map(lambda x: round(x, 3))


@st.composite
def families(draw: st.DrawFn) -> list[Tensor]:
    length = draw(st.integers(1, 12))
    vector = st.lists(numbers, min_size=length, max_size=length)
    return [torch.tensor(values) for values in draw(st.lists(vector, min_size=1, max_size=5))]


def test_averaging_is_the_mean_of_the_task_vectors() -> None:
    merged = average([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), torch.zeros(2)])
    torch.testing.assert_close(merged, torch.tensor([4 / 3, 0.0]))


def test_task_arithmetic_is_the_scaled_sum() -> None:
    merged = task_arithmetic([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])], 0.5)
    torch.testing.assert_close(merged, torch.tensor([2.0, 0.0]))


def test_trimming_keeps_the_largest_magnitudes_and_all_that_tie() -> None:
    delta = torch.tensor([0.1, -3.0, 2.0, -0.5, 2.0])
    threshold = magnitude_threshold(delta, 0.4)
    assert threshold == 2.0
    torch.testing.assert_close(trim(delta, threshold), torch.tensor([0.0, -3.0, 2.0, 0.0, 2.0]))


def test_signs_are_elected_by_mass_not_by_count() -> None:
    trimmed = [torch.tensor([3.0, -1.0, 0.0, 1.0]), torch.tensor([-1.0, -1.0, 0.0, -1.0])]
    trimmed.append(torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(elect_signs(torch.stack(trimmed)), torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_the_disjoint_mean_counts_only_the_entries_that_agree() -> None:
    trimmed = [torch.tensor([3.0, -1.0, 4.0]), torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])]
    merged = disjoint_mean(torch.stack(trimmed), torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(merged, torch.tensor([2.0, -2.0, 4.0]))


def test_ties_worked_by_hand() -> None:
    first = torch.tensor([4.0, -1.0, 0.2, 3.0])
    second = torch.tensor([-2.0, -3.0, 5.0, 0.1])
    # Half of each stays: [4, 0, 0, 3] and [0, -3, 5, 0]; no entry is shared, so each mean is over one.
    thresholds = [magnitude_threshold(vector, 0.5) for vector in (first, second)]
    assert thresholds == [3.0, 3.0]
    torch.testing.assert_close(ties([first, second], thresholds, 2.0), torch.tensor([8.0, -6.0, 10.0, 6.0]))
    # All stays: elected signs + - + +; agreeing entries 4 | -1, -3 | 0.2, 5 | 3, 0.1.
    torch.testing.assert_close(ties([first, second], [0.0, 0.0], 1.0), torch.tensor([4.0, -2.0, 2.6, 1.55]))


@given(families(), st.randoms(use_true_random=False))
def test_the_order_of_the_fine_tunes_does_not_matter(family: list[Tensor], random: object) -> None:
    shuffled = list(family)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    torch.testing.assert_close(average(shuffled), average(family), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        task_arithmetic(shuffled, 0.3), task_arithmetic(family, 0.3), atol=1e-4, rtol=1e-4
    )
    # Entries whose signs cancel but for rounding may be elected either way; halves are exact.
    exact, exact_shuffled = ([(v * 2).round() / 2 for v in vectors] for vectors in (family, shuffled))
    thresholds = [[magnitude_threshold(v, 0.5) for v in vectors] for vectors in (exact, exact_shuffled)]
    torch.testing.assert_close(
        ties(exact_shuffled, thresholds[1], 1.0), ties(exact, thresholds[0], 1.0), atol=1e-4, rtol=1e-4
    )


@given(families())
def test_one_fine_tune_with_scale_one_comes_back(family: list[Tensor]) -> None:
    one = family[0]
    for merged in (average([one]), task_arithmetic([one], 1.0), ties([one], [0.0], 1.0)):
        torch.testing.assert_close(merged, one, rtol=0, atol=0)


@given(families())
def test_every_ties_entry_lies_between_zero_and_the_largest_input(family: list[Tensor]) -> None:
    merged = ties(family, [magnitude_threshold(vector, 0.5) for vector in family], 1.0)
    stacked = torch.stack(family)
    assert bool((merged <= stacked.max(0).values.clamp(min=0) + 1e-5).all())
    assert bool((merged >= stacked.min(0).values.clamp(max=0) - 1e-5).all())


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=80),
    st.floats(0.01, 1.0),
    st.integers(1, 7),
)
@settings(max_examples=150)
def test_the_streamed_threshold_is_exactly_the_kth_largest_magnitude(
    values: list[float], density: float, piece: int
) -> None:
    vector = torch.tensor(values)
    threshold = streamed_threshold(lambda: vector.split(piece), density)
    ordered = vector.abs().sort(descending=True).values
    wanted = max(1, int(-(-density * len(values) * (1 - 1e-12) // 1)))
    assert threshold == ordered[wanted - 1].item()
    assert int((vector.abs() >= threshold).sum()) >= wanted


def test_the_threshold_of_nothing_keeps_everything() -> None:
    assert streamed_threshold(lambda: (), 0.5) == 0.0


def test_density_times_length_is_not_rounded_up_by_floating_point() -> None:
    assert magnitude_threshold(torch.arange(1.0, 101.0), 0.07) == 94.0


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=20)
def test_dare_keeps_the_expectation(seed: int, drop_rate: float) -> None:
    delta = torch.full((20_000,), 3.0)
    sparse = dare(delta, drop_rate, Draws(seed, "a", "w"))
    kept = sparse != 0
    # Drop rates are multiples of 2⁻¹⁶, and survivors are rescaled by the rate that was used.
    torch.testing.assert_close(sparse[kept], delta[kept] / (1 - drop_rate), rtol=2e-4, atol=0)
    # Five standard errors of the mean and of the share kept.
    deviation = (drop_rate * (1 - drop_rate) / len(delta)) ** 0.5
    assert abs(kept.float().mean().item() - (1 - drop_rate)) < 5 * deviation
    assert abs(sparse.mean().item() - 3.0) < 5 * 3.0 * deviation / (1 - drop_rate)


def test_dare_draws_depend_on_seed_fine_tune_and_parameter_alone() -> None:
    delta = torch.ones(64)

    def draw(seed: int, fine_tune: str, parameter: str) -> Tensor:
        return dare(delta, 0.5, Draws(seed, fine_tune, parameter))

    torch.testing.assert_close(draw(1, "a", "w"), draw(1, "a", "w"), rtol=0, atol=0)
    for other in (draw(2, "a", "w"), draw(1, "b", "w"), draw(1, "a", "v")):
        assert not torch.equal(draw(1, "a", "w"), other)


def test_dare_that_drops_nothing_changes_nothing() -> None:
    delta = torch.randn(5)
    torch.testing.assert_close(dare(delta, 0.0, Draws(0, "a", "w")), delta, rtol=0, atol=0)


@pytest.mark.parametrize(
    "method",
    [
        Averaging(),
        TaskArithmetic(scale=0.4),
        Ties(),
        Dare(seed=3),
        DareTies(drop_rate=0.5),
        Della(),
        Sce(),
        ModelStock(),
        TsvMerge(fraction=0.5),
        IsoC(),
        Breadcrumbs(election=True),
    ],
)
def test_methods_go_through_json_unchanged(method: MergeMethod) -> None:
    adapter: TypeAdapter[MergeMethod] = TypeAdapter(MergeMethod)
    assert adapter.validate_json(adapter.dump_json(method)) == method


@pytest.mark.parametrize(
    "content",
    [
        {"method": "slerp"},
        {"method": "averaging", "scale": 1},
        {"method": "task-arithmetic", "scale": float("nan")},
        {"method": "task-arithmetic", "scale": 0},
        {"method": "ties", "density": 0},
        {"method": "ties", "density": 1.1},
        {"method": "dare", "drop_rate": 1.0},
        {"method": "dare", "seed": -1},
        {"method": "della", "drop_rate": 0.9, "epsilon": 0.3},
        {"method": "breadcrumbs", "density": 0.9, "outliers": 0.2},
        {"method": "model-stock", "scale": 1},
        {"method": "tsv", "fraction": 0},
        {},
    ],
)
def test_impossible_hyper_parameters_are_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(MergeMethod).validate_python(content)
