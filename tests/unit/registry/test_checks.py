"""What is broken, lossy or out of proportion is measured and refused by the tensor's name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experts.bundle_manifest import ExpertSummary
from experts.compression import CompressedExpert, CompressionSpec, compress
from experts.errors import CheckpointError, CompressionError, MismatchError
from experts.factors import SvdFactors
from experts.registry.checks import check_expert_candidate, norm_told, require_finite_files

NAME = "model.layers.0.mlp.up_proj.weight"


def matrix(scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))


def candidate(scale: float = 1.0, rank: int = 16) -> CompressedExpert:
    deltas = [(NAME, matrix(scale)), ("model.layers.0.mlp.down_proj.weight", 0.1 * matrix(scale, 1))]
    return compress(deltas, CompressionSpec(rank=rank, dtype="float32"))


def sibling(norm: float | None) -> ExpertSummary:
    numbers = {"tensors": 1, "rank_min": 1, "rank_mean": 1.0, "rank_max": 1, "nbytes": 1, "folded": 0}
    return ExpertSummary(**numbers, fraction_of_full=0.1, relative_error=0.1, norm=norm)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none_is_found_anywhere(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    file = tmp_path / "model.safetensors"
    bad = torch.zeros(3_000_000, dtype=dtype)
    save_file({"a": torch.ones(3), "unused.buffer": bad, "ids": torch.arange(3)}, file)
    seen: list[str] = []
    assert require_finite_files([file], seen.append) == 3
    assert sorted(seen) == ["a", "ids", "unused.buffer"]
    bad[-1] = value
    save_file({"a": torch.ones(3), "unused.buffer": bad}, file)
    with pytest.raises(CheckpointError, match=r"unused\.buffer has NaN or Inf"):
        require_finite_files([file])


def test_what_was_measured_is_told() -> None:
    compressed = candidate()
    siblings = {"a": sibling(10.0), "b": sibling(20.0), "c": sibling(40.0), "old": sibling(None)}
    report = check_expert_candidate(compressed, siblings, max_norm_ratio=10, max_relative_error=0.5)
    assert report["norm"] == pytest.approx(
        float((matrix().square().sum() + 0.01 * matrix(1, 1).square().sum()).sqrt())
    )
    assert report["siblings_norm"] == 20.0
    assert report["norm_ratio"] == pytest.approx(report["norm"] / 20)
    assert report["max_rank"] == 16


def test_an_experts_own_report_tells_its_norm(tmp_path: Path) -> None:
    compressed = candidate()
    report = tmp_path / "expert.json"
    assert norm_told(report) is None
    report.write_text(compressed.report.model_dump_json())
    assert norm_told(report) == pytest.approx(compressed.report.norm)
    report.write_text(report.read_text()[:-2])
    assert norm_told(report) is None


@pytest.mark.parametrize("scale", [1e-4, 1e4, 0.0])
def test_a_norm_out_of_proportion_to_the_siblings_is_refused(scale: float) -> None:
    with pytest.raises(MismatchError, match="max_norm_ratio"):
        check_expert_candidate(candidate(scale), {"a": sibling(20.0)}, max_norm_ratio=100)
    assert check_expert_candidate(candidate(scale), {}, max_norm_ratio=100)["norm_ratio"] is None
    assert (
        check_expert_candidate(candidate(scale), {"a": sibling(None)}, max_norm_ratio=100)["norm_ratio"]
        is None
    )


def test_compression_that_loses_too_much_names_the_tensor() -> None:
    lossy = candidate(rank=1)
    check_expert_candidate(lossy, {}, max_norm_ratio=100)
    with pytest.raises(CompressionError, match=rf"max_relative_error.*{NAME}"):
        check_expert_candidate(lossy, {}, max_norm_ratio=100, max_relative_error=0.1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: SvdFactors(f.U * float("nan"), f.S, f.Vh), "NaN or Inf"),
        (lambda f: SvdFactors(f.U, f.S * float("inf"), f.Vh), "NaN or Inf"),
        (lambda f: SvdFactors(f.U, -f.S, f.Vh), "negative"),
        (
            lambda f: SvdFactors(f.U.repeat(1, 2), f.S.repeat(2), f.Vh.repeat(2, 1)),
            "rank 32, more than a matrix of 16 by 24",
        ),
    ],
)
def test_impossible_factors_name_their_tensor(change: object, why: str) -> None:
    compressed = candidate()
    compressed.factors[NAME] = change(compressed.factors[NAME])  # type: ignore[operator]
    with pytest.raises(CompressionError, match=rf"{NAME} (?:have|has).*{why}|{NAME} have {why}"):
        check_expert_candidate(compressed, {}, max_norm_ratio=100)
    compressed = candidate()
    compressed.exact["model.norm.weight"] = torch.tensor([float("nan")])
    with pytest.raises(CompressionError, match=r"model\.norm\.weight has NaN"):
        check_expert_candidate(compressed, {}, max_norm_ratio=100)
