"""Where exclusive vectors act: which module applies which parameter, and how.

A *site* is one (module, parameter) pair. A tied embedding is one parameter with two sites.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SiteKind = Literal["linear", "head", "embedding", "norm"]


@dataclass(frozen=True, slots=True)
class Site:
    """One module that exclusive vectors can act on.

    Attributes:
        path: the module's dotted name.
        kind: "head" is a linear layer that sees only the tokens whose logits are kept.
        weight: parameter name of its weight, as in the checkpoint.
        bias: parameter name of its bias, or None.
        transposed: the weight is stored (in, out), as in GPT-2's Conv1D.
    """

    path: str
    module: nn.Module
    kind: SiteKind
    weight: str
    bias: str | None = None
    transposed: bool = False


def find_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every module of the model whose parameters can be gated, in execution-independent name order."""
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return tuple(_sites(model, canonical, head))


def _sites(model: PreTrainedModel, canonical: dict[int, str], head: nn.Module | None) -> Iterator[Site]:
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or id(weight) not in canonical:
            continue
        name = canonical[id(weight)]
        bias = getattr(module, "bias", None)
        bias_name = canonical.get(id(bias)) if isinstance(bias, Tensor) else None
        if isinstance(module, nn.Linear):
            yield Site(path, module, "head" if module is head else "linear", name, bias_name)
        elif isinstance(module, Conv1D):
            yield Site(path, module, "linear", name, bias_name, transposed=True)
        elif isinstance(module, nn.Embedding):
            yield Site(path, module, "embedding", name)
        elif norm_epsilon(module) is not None:
            yield Site(path, module, "norm", name, bias_name)


def norm_epsilon(module: nn.Module) -> float | None:
    """The epsilon of a LayerNorm or RMSNorm whose output is affine in its weight; None for anything else."""
    if isinstance(module, nn.LayerNorm):
        return float(module.eps)
    if type(module).__name__.endswith("RMSNorm"):
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return None if epsilon is None else float(epsilon)
    return None
