"""What can answer a task: base, expert, static merge, Twin, each with all its hyper-parameters. Plain data."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from experts.compression import CompressionSpec
from experts.compression.curve import Form
from experts.merging import MergeMethod


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Part):
    """θ₀ itself."""

    kind: Literal["base"] = "base"


class Alone(_Part):
    """Each task by the expert of its name: the yardstick."""

    kind: Literal["expert"] = "expert"


class Adapter(_Part):
    """One other fine-tune for all tasks, such as the multi-task model."""

    kind: Literal["adapter"] = "adapter"
    name: str


class Static(_Part):
    """One merged model for all tasks."""

    kind: Literal["static"] = "static"
    method: MergeMethod


class NoShared(_Part):
    """The bare base in the shared expert's place."""

    method: Literal["none"] = "none"


class OneExpert(_Part):
    """One of the experts in the shared expert's place."""

    method: Literal["one-expert"] = "one-expert"
    name: str


class RouterPlan(_Part):
    """How gates are chosen for a request of unknown task.

    Attributes:
        router: its kind.
        layer: decoder layer that it reads; None for the setting's.
        taps: layers below it that it reads too.
        prompts: training prompts of each expert, in chat form.
        top_k, threshold: as in the bundle.
        guard: rate of false abstention at which the guard's threshold is set; None for no guard.
        seed: of the fit.
    """

    router: Literal["mlp", "gaussian", "nearest", "staged"] = "gaussian"
    layer: int | None = None
    taps: tuple[int, ...] = ()
    prompts: int = 60
    top_k: int = 2
    threshold: float = 0.05
    guard: float | None = None
    seed: int = 0


class Twin(_Part):
    """θ* + Σ g_t · compressed v_t.

    Attributes:
        shared: the merge that makes θ*.
        compression: how v_t is stored; None for v_t as it is.
        router: None for oracle gates: the true task's expert with gate 1.
    """

    kind: Literal["twin"] = "twin"
    shared: MergeMethod | NoShared | OneExpert
    compression: CompressionSpec | None = None
    router: RouterPlan | None = None


class Coded(_Part):
    """θ* + v_t in a form of `experts.compression.curve`, oracle gates.

    Attributes:
        shared: the merge that makes θ*.
        form: how v_t is kept.
        fraction: bytes of an expert over those of a full model; None where the form has only one size.
        seed: of random forms.
    """

    kind: Literal["coded"] = "coded"
    shared: MergeMethod | NoShared | OneExpert
    form: Form
    fraction: float | None = None
    seed: int = 0


System = Annotated[Base | Alone | Adapter | Static | Twin | Coded, Field(discriminator="kind")]
"""Any of them, told apart by `kind`."""


def describe(system: System) -> str:
    """Every hyper-parameter, on one line."""
    values = _flat(system.model_dump(mode="json", exclude_none=True))
    return ", ".join(f"{name} {value}" for name, value in values.items() if name != "kind")


def _flat(values: dict[str, object], before: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{name}." if name in ("shared", "router") else "")
        else:
            found[f"{before}{name}"] = value
    return found
