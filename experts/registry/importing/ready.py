"""A ready expert: expert.safetensors and expert.json as a server exported them, checked like anything foreign."""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from experts.bundle_expert import check_expert, read_stored
from experts.bundle_manifest import EXPERT_FILES
from experts.checkpoint import Checkpoint
from experts.checkpoint.storage import MAX_JSON_BYTES, TensorStore
from experts.compression import CompressedExpert, CompressionReport, TensorReport
from experts.compression.svd import require_finite
from experts.errors import CheckpointError, CorruptBundleError
from experts.factors import Delta


@dataclass(frozen=True, slots=True)
class ReadyExpert:
    """What the two files hold."""

    compressed: CompressedExpert

    def exclusive(self, name: str) -> Delta | None:
        """v̂_t of one parameter, float32; None where there is none."""
        factors = self.compressed.factors.get(name)
        return self.compressed.exact.get(name) if factors is None else factors.low_rank()


def ready_expert(folder: Path, shared: Checkpoint) -> ReadyExpert:
    """Read both files and check each against the other and against the shared expert.

    Raises:
        CheckpointError: they cannot be read, do not fit, or tell different things; names the file.
        CompressionError: NaN or Inf; names the tensor.
    """
    TensorStore([folder / EXPERT_FILES[0]])
    try:
        check_expert(folder, shared)
        stored, exact = read_stored(folder)
    except CorruptBundleError as error:
        raise CheckpointError(str(error)) from error
    factors = {name: form.decoded() for name, form in stored.items()}
    for name, decoded in factors.items():
        require_finite(decoded.low_rank(), name)
    for name, vector in exact.items():
        require_finite(vector, name)
    nbytes = {name: form.nbytes for name, form in stored.items()}
    nbytes |= {name: vector.nbytes for name, vector in exact.items()}
    report = _report(folder / EXPERT_FILES[1])
    told = {
        tensor.name: (tensor.handling, tensor.rank, tensor.nbytes)
        for tensor in report.tensors
        if tensor.nbytes
    }
    held = {name: ("factored", form.rank, nbytes[name]) for name, form in stored.items()}
    held |= {name: ("exact", 0, nbytes[name]) for name in exact}
    if told != held or not all(_plausible(tensor, shared) for tensor in report.tensors):
        raise CheckpointError(
            f"{folder / EXPERT_FILES[1]} describes another expert than {EXPERT_FILES[0]}; export both again"
        )
    whole = CompressionReport(tensors=report.tensors, model_nbytes=shared.nbytes)
    return ReadyExpert(CompressedExpert(stored, factors, exact, whole))


def _report(path: Path) -> CompressionReport:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes; it is no expert's report")
        return CompressionReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; export the expert again") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "document"
        raise CheckpointError(f"{path}: {where}: {problem['msg']}; export the expert again") from error


def _plausible(tensor: TensorReport, shared: Checkpoint) -> bool:
    """Whether it tells of a parameter of the model, in numbers that can be."""
    numbers = (tensor.norm, tensor.error)
    return (
        tensor.name in shared
        and tensor.shape == shared.shape(tensor.name)
        and all(math.isfinite(number) and number >= 0 for number in numbers)
        and tensor.nbytes >= 0
    )
