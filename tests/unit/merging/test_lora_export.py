"""A merged change as an adapter folder."""

from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint, FineTune, open_fine_tune
from experts.errors import MergeError
from experts.factors import LowRank, dense
from experts.merging import Averaging, TaskArithmetic, TsvMerge, merge
from experts.merging.lora_export import lora_factors, write_lora
from tests.unit.checkpoint.folders import (
    DOWN,
    UP,
    Q,
    near,
    random_weights,
    write_model,
)
from tests.unit.checkpoint.folders import (
    lora_factors as random_factors,
)
from tests.unit.checkpoint.folders import (
    write_lora as write_adapter,
)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_model(tmp_path / "base", random_weights(0)))


@pytest.fixture
def mixed(tmp_path: Path, base: Checkpoint) -> list[FineTune]:
    """Adapters of ranks 1 and 2 over different matrices."""
    first = write_adapter(tmp_path / "one", random_factors(Q, 1, 1) | random_factors(UP, 2, 1), r=1)
    second = write_adapter(tmp_path / "two", random_factors(Q, 3) | random_factors(DOWN, 4))
    return [open_fine_tune("one", first, base), open_fine_tune("two", second, base)]


@pytest.mark.parametrize(
    "method", [TaskArithmetic(), TsvMerge(fraction=1.0)], ids=lambda method: method.method
)
def test_a_lora_of_the_summed_ranks_is_the_merge_itself(
    tmp_path: Path, base: Checkpoint, mixed: list[FineTune], method: TaskArithmetic | TsvMerge
) -> None:
    write_lora(base, merge(base, mixed, method), tmp_path / "out", rank=3)
    adapter = open_fine_tune("merged", tmp_path / "out", base)
    assert adapter.touched() == {Q, UP, DOWN}
    for name, delta in merge(base, mixed, method):
        if delta is not None:
            read = adapter.delta(name)
            assert isinstance(read, LowRank)
            assert read.rank == 3
            torch.testing.assert_close(dense(read), dense(delta), atol=1e-5, rtol=1e-4)


def test_a_smaller_rank_is_the_best_approximation() -> None:
    delta = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(lora_factors(delta, 2).dense(), best, atol=1e-5, rtol=1e-5)
    product = LowRank(left * values, right)
    torch.testing.assert_close(lora_factors(product, 2).dense(), best, atol=1e-5, rtol=1e-5)


def test_what_a_lora_cannot_hold_is_refused(tmp_path: Path, base: Checkpoint, mixed: list[FineTune]) -> None:
    full = open_fine_tune("full", write_model(tmp_path / "full", near(random_weights(0), 1)), base)
    with pytest.raises(MergeError, match="which a LoRA of linear layers cannot hold"):
        write_lora(base, merge(base, [full], Averaging()), tmp_path / "out", 4)
    with pytest.raises(MergeError, match="a LoRA of rank 0"):
        write_lora(base, merge(base, mixed, Averaging()), tmp_path / "out", 0)
    with pytest.raises(MergeError, match="nothing changes"):
        write_lora(base, ((name, None) for name in base.names), tmp_path / "out", 4)
    write_lora(base, merge(base, mixed, Averaging()), tmp_path / "out", 4)
    with pytest.raises(MergeError, match="is there already"):
        write_lora(base, merge(base, mixed, Averaging()), tmp_path / "out", 4)
