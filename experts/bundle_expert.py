"""One expert on disk: expert.safetensors (factors and exact vectors) and expert.json (its report).

Keys are ``<parameter>.U``, ``.S``, ``.Vh`` for factors and ``<parameter>.delta`` for exact vectors, with the
parameter named as the shared checkpoint stores it.
"""

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
from experts.errors import CorruptBundleError
from experts.factors import SvdFactors

_FACTOR_DTYPES = frozenset({"BF16", "F16", "F32"})
_PARTS = frozenset({"U", "S", "Vh", "delta"})


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
        """True bytes of all tensors."""
        return sum(f.nbytes for f in self.factors.values()) + sum(v.nbytes for v in self.exact.values())

    @property
    def max_rank(self) -> int:
        """Largest rank of any factor; 0 without factors."""
        return max((f.rank for f in self.factors.values()), default=0)


def write_expert(folder: Path, compressed: CompressedExpert) -> None:
    """Write both files into an existing empty folder."""
    tensors: dict[str, Tensor] = {}
    for name, factors in compressed.factors.items():
        tensors[f"{name}.U"] = factors.U.contiguous()
        tensors[f"{name}.S"] = factors.S.contiguous()
        tensors[f"{name}.Vh"] = factors.Vh.contiguous()
    for name, vector in compressed.exact.items():
        tensors[f"{name}.delta"] = vector.contiguous()
    weights, report = EXPERT_FILES
    save_file(tensors, folder / weights)
    (folder / report).write_text(compressed.report.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_expert(folder: Path, name: str, generation: int) -> ExpertWeights:
    """Read the tensors of one generation, as `check_expert` accepted them.

    Raises:
        CorruptBundleError: the file cannot be read.
    """
    path = folder / EXPERT_FILES[0]
    factors: dict[str, SvdFactors] = {}
    exact: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for parameter, parts in _grouped(path, file.keys()).items():
                if parts == {"delta"}:
                    exact[parameter] = file.get_tensor(f"{parameter}.delta")
                else:
                    factors[parameter] = SvdFactors(
                        *(file.get_tensor(f"{parameter}.{part}") for part in ("U", "S", "Vh"))
                    )
    except (OSError, SafetensorError) as error:
        raise CorruptBundleError(
            f"{path}: not readable ({error}); restore or publish the expert again"
        ) from error
    return ExpertWeights(name, generation, MappingProxyType(factors), MappingProxyType(exact))


def check_expert(folder: Path, shared: Checkpoint) -> None:
    """Check every shape and dtype in the file's header against the shared expert; reads no tensor data.

    Raises:
        CorruptBundleError: naming the file and tensor that does not fit.
    """
    path = folder / EXPERT_FILES[0]
    parameters = set(shared.names)
    try:
        with safe_open(path, framework="pt") as file:
            for parameter, parts in _grouped(path, file.keys()).items():
                if parameter not in parameters:
                    raise CorruptBundleError(f"{path}: {parameter}: the shared expert has no such parameter")
                views = {part: file.get_slice(f"{parameter}.{part}") for part in parts}
                shapes = {part: tuple(view.get_shape()) for part, view in views.items()}
                dtypes = {part: str(view.get_dtype()) for part, view in views.items()}
                problem = _problem(shapes, dtypes, shared.shape(parameter))
                if problem:
                    raise CorruptBundleError(f"{path}: {parameter}: {problem}")
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
    )


def _grouped(path: Path, keys: list[str]) -> dict[str, set[str]]:
    """Parameter → the parts stored for it."""
    grouped: dict[str, set[str]] = {}
    for key in keys:
        parameter, _, part = key.rpartition(".")
        if part not in _PARTS:
            raise CorruptBundleError(f"{path}: {key}: not an expert's tensor name")
        grouped.setdefault(parameter, set()).add(part)
    for parameter, parts in grouped.items():
        if parts not in ({"delta"}, {"U", "S", "Vh"}):
            raise CorruptBundleError(
                f"{path}: {parameter}: has only {sorted(parts)}; a factor is U, S and Vh"
            )
    return grouped


def _problem(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], expected: tuple[int, ...]
) -> str | None:
    """What is wrong with one parameter's tensors, if anything."""
    if "delta" in shapes:
        if shapes["delta"] != expected:
            return f"exact part has shape {shapes['delta']}, the shared expert has {expected}"
        return None if dtypes["delta"] == "F32" else f"exact part is {dtypes['delta']}, not F32"
    U, S, Vh = shapes["U"], shapes["S"], shapes["Vh"]
    if len(U) != 2 or len(Vh) != 2 or len(S) != 1 or not U[1] == S[0] == Vh[0]:
        return f"factors have shapes U {U}, S {S}, Vh {Vh}, which do not multiply"
    if (U[0], Vh[1]) != expected:
        return f"factors make {(U[0], Vh[1])}, the shared expert has {expected}"
    if S[0] < 1 or S[0] > min(expected):
        return f"rank {S[0]} is outside 1..{min(expected)}"
    if dtypes["S"] != "F32" or dtypes["U"] != dtypes["Vh"] or dtypes["U"] not in _FACTOR_DTYPES:
        found = f"U {dtypes['U']}, S {dtypes['S']}, Vh {dtypes['Vh']}"
        return f"factors are {found}; U and Vh must agree in BF16, F16 or F32 and S be F32"
    return None
