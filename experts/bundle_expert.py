"""One expert on disk: expert.safetensors (factors and exact vectors) and expert.json (its report).

Keys are ``<parameter>.U``, ``.S``, ``.Vh`` for factors, ``.q8``, ``.s8`` (``4``, ``2``) beside ``.S`` for quantised
ones (`experts.compression.stored`), and ``<parameter>.delta`` for exact vectors, with the parameter named as the
shared checkpoint stores it. Codes do not tell where a left vector ends, so the file's metadata holds the shapes
of matrices with quantised factors. Whatever is stored, `read_expert` gives plain factors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experts.bundle_manifest import EXPERT_FILES, ExpertSummary
from experts.checkpoint import Checkpoint
from experts.compression import CompressedExpert
from experts.compression.stored import PARTS, StoredFactors, complete, from_tensors, problem
from experts.errors import CorruptBundleError
from experts.factors import SvdFactors

_SHAPES = "shapes"
"""Metadata: parameter → [rows, columns] of those with quantised factors, as JSON."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One generation of an expert, in memory.

    Attributes:
        factors: parameter name → truncated SVD of its exclusive part.
        exact: parameter name → dense exclusive part of a vector (bias, norm), float32 (n,).
    """

    name: str
    generation: int
    factors: Mapping[str, SvdFactors]
    exact: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory, decoded; `ExpertSummary.nbytes` says how many are stored."""
        return sum(f.nbytes for f in self.factors.values()) + sum(v.nbytes for v in self.exact.values())

    @property
    def max_rank(self) -> int:
        """Largest rank of any factor; 0 without factors."""
        return max((f.rank for f in self.factors.values()), default=0)


def write_expert(folder: Path, compressed: CompressedExpert) -> None:
    """Write both files into an existing empty folder."""
    tensors: dict[str, Tensor] = {}
    for name, stored in compressed.stored.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.tensors().items()}
    shapes = {name: stored.shape for name, stored in compressed.stored.items() if stored.runs}
    for name, vector in compressed.exact.items():
        tensors[f"{name}.delta"] = vector.contiguous()
    weights, report = EXPERT_FILES
    metadata = {_SHAPES: json.dumps(shapes, separators=(",", ":"))} if shapes else None
    save_file(tensors, folder / weights, metadata=metadata)
    (folder / report).write_text(compressed.report.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_expert(folder: Path, name: str, generation: int) -> ExpertWeights:
    """Read the tensors of one generation, as `check_expert` accepted them.

    Raises:
        CorruptBundleError: the file cannot be read.
    """
    stored, exact = read_stored(folder)
    factors = {parameter: form.decoded() for parameter, form in stored.items()}
    return ExpertWeights(name, generation, MappingProxyType(factors), MappingProxyType(exact))


def read_stored(folder: Path) -> tuple[dict[str, StoredFactors], dict[str, Tensor]]:
    """Factors in their stored form, and exact vectors, by parameter; as `check_expert` accepted them.

    Raises:
        CorruptBundleError: the file cannot be read.
    """
    path = folder / EXPERT_FILES[0]
    stored: dict[str, StoredFactors] = {}
    exact: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = _quantised_shapes(path, file.metadata())
            for parameter, parts in _grouped(path, file.keys()).items():
                tensors = {part: file.get_tensor(f"{parameter}.{part}") for part in parts}
                if parts == {"delta"}:
                    exact[parameter] = tensors["delta"]
                elif parameter in shapes:
                    stored[parameter] = from_tensors(tensors, shapes[parameter])
                else:
                    shape = (tensors["U"].shape[0], tensors["Vh"].shape[1])
                    stored[parameter] = from_tensors(tensors, shape)
    except (OSError, SafetensorError) as error:
        raise CorruptBundleError(
            f"{path}: not readable ({error}); restore or publish the expert again"
        ) from error
    return stored, exact


def check_expert(folder: Path, shared: Checkpoint) -> None:
    """Check every shape and dtype in the file's header against the shared expert; reads no tensor data.

    Raises:
        CorruptBundleError: naming the file and tensor that does not fit.
    """
    path = folder / EXPERT_FILES[0]
    parameters = set(shared.names)
    try:
        with safe_open(path, framework="pt") as file:
            told = _quantised_shapes(path, file.metadata())
            for parameter, parts in _grouped(path, file.keys()).items():
                if parameter not in parameters:
                    raise CorruptBundleError(f"{path}: {parameter}: the shared expert has no such parameter")
                views = {part: file.get_slice(f"{parameter}.{part}") for part in parts}
                shapes = {part: tuple(view.get_shape()) for part, view in views.items()}
                dtypes = {part: str(view.get_dtype()) for part, view in views.items()}
                wrong = _problem(shapes, dtypes, shared.shape(parameter), told.get(parameter))
                if wrong:
                    raise CorruptBundleError(f"{path}: {parameter}: {wrong}")
    except (OSError, SafetensorError) as error:
        raise CorruptBundleError(
            f"{path}: not readable ({error}); restore or publish the expert again"
        ) from error


def summarise(compressed: CompressedExpert, shared: Checkpoint) -> ExpertSummary:
    """The manifest's few numbers of a compression report."""
    report = compressed.report
    ranks = [factors.rank for factors in compressed.factors.values()] or [0]
    return ExpertSummary(
        tensors=len(report.tensors),
        rank_min=min(ranks),
        rank_mean=sum(ranks) / len(ranks),
        rank_max=max(ranks),
        nbytes=report.nbytes,
        fraction_of_full=report.nbytes / shared.nbytes,
        relative_error=report.relative_error,
        folded=sum(tensor.handling == "folded" for tensor in report.tensors),
        norm=report.norm,
    )


def _quantised_shapes(path: Path, metadata: Mapping[str, str] | None) -> dict[str, tuple[int, int]]:
    """Parameter → shape, of those with quantised factors."""
    try:
        told = json.loads((metadata or {}).get(_SHAPES, "{}"))
        shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in told.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptBundleError(
            f"{path}: the metadata {_SHAPES!r} is not readable ({error}); restore or publish the expert again"
        ) from error
    return shapes


def _grouped(path: Path, keys: list[str]) -> dict[str, set[str]]:
    """Parameter → the parts stored for it."""
    grouped: dict[str, set[str]] = {}
    for key in keys:
        parameter, _, part = key.rpartition(".")
        if part != "delta" and part not in PARTS:
            raise CorruptBundleError(f"{path}: {key}: not an expert's tensor name")
        grouped.setdefault(parameter, set()).add(part)
    for parameter, parts in grouped.items():
        if parts != {"delta"} and not complete(parts):
            raise CorruptBundleError(
                f"{path}: {parameter}: has only {sorted(parts)}; a factor is U, S and Vh, or S with codes q and "
                "scales s of the same width"
            )
    return grouped


def _problem(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    expected: tuple[int, ...],
    told: tuple[int, int] | None,
) -> str | None:
    """What is wrong with one parameter's tensors, if anything."""
    if "delta" in shapes:
        if shapes["delta"] != expected:
            return f"exact part has shape {shapes['delta']}, the shared expert has {expected}"
        return None if dtypes["delta"] == "F32" else f"exact part is {dtypes['delta']}, not F32"
    wrong = problem(shapes, dtypes, expected)
    if wrong is None and (set(shapes) == {"U", "S", "Vh"}) != (told is None):
        return "the file's metadata must tell the shapes of quantised factors, and of no others"
    if wrong is None and told is not None and told != expected:
        return f"the file's metadata tells shape {told}, the shared expert has {expected}"
    return wrong
