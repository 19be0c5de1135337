"""The gate before exposure: what an expert must be beyond readable, measured; pure functions of files and reports."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from experts.bundle_manifest import ExpertSummary
from experts.checkpoint.storage import StoredTensor, read_header
from experts.compression import CompressedExpert
from experts.compression.report import CompressionReport
from experts.errors import CheckpointError, CompressionError, MismatchError

_CHUNK = 2**23
"""Bytes of a tensor that are looked at together."""


def require_finite_files(files: Iterable[Path], progress: Callable[[str], None] | None = None) -> int:
    """Raise if any number in any of the safetensors files is NaN or infinite, used or not; returns the tensors.

    Reads a few megabytes at a time and maps nothing.

    Args:
        progress: called with each tensor's name once it is checked.

    Raises:
        CheckpointError: names file and tensor.
    """
    count = 0
    for file in files:
        for tensor in read_header(file).values():
            if tensor.dtype.is_floating_point and not _is_finite(tensor):
                raise CheckpointError(
                    f"{file.name}: {tensor.name} has NaN or Inf; train the fine-tune again or leave it out"
                )
            count += 1
            if progress is not None:
                progress(tensor.name)
    return count


def _is_finite(tensor: StoredTensor) -> bool:
    buffer = bytearray(min(_CHUNK, tensor.nbytes))
    left = tensor.nbytes
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        while left:
            wanted = memoryview(buffer)[: min(left, len(buffer))]
            got = 0
            while got < len(wanted):
                read = file.readinto(wanted[got:])
                if not read:
                    raise CheckpointError(
                        f"{tensor.file.name} ended within {tensor.name}; was it overwritten?"
                    )
                got += read
            if not torch.isfinite(torch.frombuffer(wanted, dtype=tensor.dtype)).all():
                return False
            left -= got
    return True


def norm_told(report: Path) -> float | None:
    """An expert's norm by its expert.json, which told it before summaries did; None if that is not readable."""
    try:
        return CompressionReport.model_validate_json(report.read_bytes()).norm
    except (OSError, ValidationError):
        return None


def check_expert_candidate(
    compressed: CompressedExpert,
    siblings: Mapping[str, ExpertSummary],
    *,
    max_norm_ratio: float,
    max_relative_error: float | None = None,
) -> dict[str, Any]:
    """Whether a compressed expert may serve beside its siblings.

    Args:
        compressed: the candidate.
        siblings: the experts that serve, by name. Those whose summary tells no norm count for nothing.
        max_norm_ratio: of the candidate's norm over the siblings' median, either way.
        max_relative_error: that compression may have; None bounds nothing.

    Returns:
        What was measured, for the generation's report: norm, siblings' median norm, their ratio, largest rank.

    Raises:
        CompressionError: it lost too much, or factors that are not finite or of an impossible rank;
            names the tensor.
        MismatchError: its norm is out of proportion; names the tensor that has most of it.
    """
    for name, factors in compressed.factors.items():
        problem = _factor_problem(factors.U, factors.S, factors.Vh)
        if problem:
            raise CompressionError(f"the factors of {name} {problem}; its weights are likely broken")
    for name, vector in compressed.exact.items():
        if not torch.isfinite(vector).all():
            raise CompressionError(f"{name} has NaN or Inf; train the fine-tune again or leave it out")
    report = compressed.report
    _check_error(report, max_relative_error)
    norm = report.norm
    norms = [summary.norm for summary in siblings.values() if summary.norm]
    median = statistics.median(norms) if norms else None
    ratio = norm / median if median else None
    if not math.isfinite(norm) or (ratio is not None and not 1 / max_norm_ratio <= ratio <= max_norm_ratio):
        raise MismatchError(_out_of_proportion(report, norm, median, max_norm_ratio))
    return {"norm": norm, "siblings_norm": median, "norm_ratio": ratio, "max_rank": report.max_rank}


def _factor_problem(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> str | None:
    if not all(bool(torch.isfinite(part).all()) for part in (U, S, Vh)):
        return "have NaN or Inf"
    if len(S) > min(U.shape[0], Vh.shape[1]):
        return f"have rank {len(S)}, more than a matrix of {U.shape[0]} by {Vh.shape[1]} can have"
    if len(S) and float(S.min()) < 0:
        return "have negative singular values"
    return None


def _check_error(report: CompressionReport, limit: float | None) -> None:
    if limit is None or report.relative_error <= limit:
        return
    worst = max(report.tensors, key=lambda tensor: tensor.error)
    raise CompressionError(
        f"compression would lose {report.relative_error:.3g} of the expert's norm, the limit is {limit:g} "
        f"(max_relative_error); most of it in {worst.name} ({worst.relative_error:.3g} of its own norm at rank "
        f"{worst.rank}); register it with a higher rank or energy"
    )


def _out_of_proportion(report: CompressionReport, norm: float, median: float | None, limit: float) -> str:
    largest = max(report.tensors, key=lambda tensor: tensor.norm, default=None)
    where = f", most of it in {largest.name} ({largest.norm:.3g})" if largest is not None else ""
    told = f"{median:.3g}" if median is not None else "unknown"
    return (
        f"the expert differs from the shared expert by a norm of {norm:.3g}{where}; its siblings' median is {told} "
        f"and {limit:g} times that, either way, is allowed (max_norm_ratio): is it a fine-tune of the same base, "
        "trained to the end?"
    )
