"""One expert's exclusive vector as device tensors, ready to be packed into the working set."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.bundle import ExpertWeights
from experts.factors import SvdFactors
from service.core import ExpertKey
from service.errors import ExpertRejectedError
from service.gating.sites import Site
from service.native.decoder import tiled, untiled


@dataclass(frozen=True, slots=True)
class MatrixFactors:
    """The low-rank part of one matrix parameter, oriented for x → x·aᵀ·b.

    Attributes:
        a: (k, in) in the model's dtype.
        b: (k, out), singular values folded in; in tiles where the compiled decoder reads it.
    """

    a: Tensor
    b: Tensor

    def rows(self, out: int) -> Tensor:
        """`b` as (k, out), however it is held."""
        return self.b if self.b.dim() == 2 else untiled(self.b, out)


@dataclass(frozen=True, slots=True)
class ResidentExpert:
    """One expert generation on the device.

    Attributes:
        matrices: parameter name → factors; parameters that the expert leaves alone are absent.
        vectors: parameter name → (dim,) difference of a bias or norm weight (exact option).
    """

    key: ExpertKey
    matrices: Mapping[str, MatrixFactors]
    vectors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        matrices = sum(m.a.nbytes + m.b.nbytes for m in self.matrices.values())
        return matrices + sum(v.nbytes for v in self.vectors.values())

    @property
    def max_rank(self) -> int:
        """Largest rank over the matrices."""
        return max((m.a.shape[0] for m in self.matrices.values()), default=0)


def make_resident(
    weights: ExpertWeights,
    sites: Sequence[Site],
    dtype: torch.dtype,
    device: torch.device,
    in_tiles: Container[str] = (),
) -> ResidentExpert:
    """Move an expert's factors to the device in the model's dtype.

    Args:
        in_tiles: parameters that the compiled decoder computes.

    Safe on any thread; the engine thread later only stores the result.

    Raises:
        ExpertRejectedError: a tensor of the expert has no site in the model, a wrong shape, or values that
            are not finite in the model's dtype. (A gate of zero does not silence NaN: it would reach
            every row that shares a step with the expert.)
    """
    matrix_sites = {s.weight: s for s in sites if s.kind != "norm"}
    vector_shapes = _vector_shapes(sites)
    matrices: dict[str, MatrixFactors] = {}
    for name, factors in weights.factors.items():
        site = matrix_sites.get(name)
        if site is None:
            raise ExpertRejectedError(
                f"expert {weights.name!r}: the model cannot apply factors of tensor {name!r}; "
                "rebuild the expert without it"
            )
        if factors.rank:
            made = _orient(weights.name, name, factors, site, dtype, device)
            matrices[name] = MatrixFactors(made.a, tiled(made.b)) if name in in_tiles else made
    vectors: dict[str, Tensor] = {}
    for name, delta in weights.exact.items():
        shape = vector_shapes.get(name)
        if shape is None or tuple(delta.shape) != shape:
            raise ExpertRejectedError(
                f"expert {weights.name!r}: tensor {name!r} of shape {tuple(delta.shape)} does not fit "
                f"the model ({shape if shape else 'no such bias or norm'}); rebuild the expert on this base"
            )
        vectors[name] = _finite(weights.name, name, delta.to(device=device, dtype=dtype))
    return ResidentExpert(ExpertKey(weights.name, weights.generation), matrices, vectors)


def _vector_shapes(sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        if site.kind == "norm":
            shapes[site.weight] = tuple(site.module.get_parameter("weight").shape)
        if site.bias is not None:
            shapes[site.bias] = tuple(site.module.get_parameter("bias").shape)
    return shapes


def _orient(
    expert: str, name: str, factors: SvdFactors, site: Site, dtype: torch.dtype, device: torch.device
) -> MatrixFactors:
    stored = tuple(site.module.get_parameter("weight").shape)
    if factors.shape != stored:
        raise ExpertRejectedError(
            f"expert {expert!r}: factors of tensor {name!r} have shape {factors.shape}, "
            f"the model's is {stored}; rebuild the expert on this base"
        )
    u = factors.U.to(torch.float32)
    vh = factors.Vh.to(torch.float32)
    sigma = factors.S.to(torch.float32)
    if site.transposed:
        a, b = u.t(), sigma[:, None] * vh
    else:
        a, b = vh, (u * sigma).t()
    return MatrixFactors(
        _finite(expert, name, a.to(device=device, dtype=dtype).contiguous()),
        _finite(expert, name, b.to(device=device, dtype=dtype).contiguous()),
    )


def _finite(expert: str, name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ExpertRejectedError(
            f"expert {expert!r}: tensor {name!r} holds NaN or infinity as {tensor.dtype}; "
            "check the fine-tune, or serve in a wider dtype"
        )
    return tensor
