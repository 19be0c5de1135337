"""The embedded default bundle: the ordinary build, fed with the embedded base, factors and prompts."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from experts.bundle import Bundle

_HERE = Path(__file__).parent
FACTORS = _HERE / "factors"
PROMPTS = _HERE / "prompts"


@dataclass(frozen=True)
class EmbeddedRecipe:
    """Every number that decides what the default bundle is.

    Attributes:
        scale: λ of the task arithmetic that makes the shared expert.
        expert_bytes: of an exclusive vector's factors, in mixed precision: half a percent of the full model.
        router: its kind; this one takes a new expert in at once.
        router_layer: `FeatureSpec.layer` of the router; of those measured the one that best stands unseen wording.
        guard_rate: share of known prompts that may be left to the shared expert, for the sake of foreign ones.
        max_prompts: router prompts of each expert and split.
    """

    name: str = "embedded"
    scale: float = 0.05
    expert_bytes: int = 1_345_000
    router: Literal["mlp", "gaussian"] = "gaussian"
    router_layer: int = 16
    guard_rate: float | None = 0.001
    max_prompts: int = 200
    top_k: int = 2
    threshold: float = 0.2
    seed: int = 0


def build_embedded(
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    base: Path | None = None,
    overwrite: bool = False,
    recipe: EmbeddedRecipe | None = None,
) -> "Bundle":
    """Build the default bundle at `out`; a few minutes on two cores.

    Args:
        out: the bundle's folder to be.
        progress: see `experts.build.Progress`.
        base: folder that holds the converted base, or will; without it the base is converted into a
            temporary folder beside `out`.
        overwrite: replace a bundle that is at `out`.
        recipe: other numbers than the default ones.

    Raises:
        CheckpointError: the base's package or the committed factors are missing.
        ExpertsError: as `build_bundle`.
    """
    from experts.build import BuildPlan, build_bundle
    from experts.bundle_writer import check_target
    from experts.compression import CompressionSpec
    from experts.errors import CheckpointError
    from experts.merging.methods import TaskArithmetic
    from experts.routing import FeatureSpec

    numbers = recipe or EmbeddedRecipe()
    check_target(out, overwrite=overwrite)
    factors = sorted(folder.parent for folder in FACTORS.glob("*/adapter_config.json"))
    if not factors:
        raise CheckpointError(f"{FACTORS} holds no experts; run `twinserve embedded train`")
    with _base_folder(out, base, progress) as folder:
        plan = BuildPlan(
            base=folder,
            experts={path.name: path for path in factors},
            out=out,
            name=numbers.name,
            method=TaskArithmetic(scale=numbers.scale),
            compression=CompressionSpec(budget_bytes=numbers.expert_bytes, dtype="mixed"),
            prompts={path.name: PROMPTS / f"{path.name}.jsonl" for path in factors},
            max_prompts=numbers.max_prompts,
            router=numbers.router,
            features=FeatureSpec(layer=numbers.router_layer),
            guard_rate=numbers.guard_rate,
            top_k=numbers.top_k,
            threshold=numbers.threshold,
            seed=numbers.seed,
            overwrite=overwrite,
        )
        return build_bundle(plan, progress)


@contextlib.contextmanager
def _base_folder(
    out: Path, base: Path | None, progress: Callable[[str, int, int], None] | None
) -> Iterator[Path]:
    """The converted base, kept at `base` or in a folder that goes away in the end."""
    from experts.embedded.base import ensure_base
    from experts.errors import BundleError

    report = progress or (lambda stage, done, total: None)
    with contextlib.ExitStack() as stack:
        try:
            if base is None:
                out.parent.mkdir(parents=True, exist_ok=True)
                scratch = tempfile.TemporaryDirectory(prefix=f".{out.name}.base-", dir=out.parent)
                base = Path(stack.enter_context(scratch)) / "base"
            report("base", 0, 1)
            folder = ensure_base(base)
        except OSError as error:
            raise BundleError(f"cannot write the base beside {out}: {error}") from error
        report("base", 1, 1)
        yield folder


def build(
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    base: Annotated[Path | None, typer.Option(help="Keep the converted base in this folder.")] = None,
    router_layer: Annotated[
        int, typer.Option(help="Decoder layer that the router reads, from 1; -1: the last, after the norm.")
    ] = EmbeddedRecipe.router_layer,
    overwrite: Annotated[bool, typer.Option(help="Replace the bundle that is there.")] = False,
) -> None:
    """Build the default bundle from the embedded base, factors and prompts."""
    from rich.console import Console

    from experts.cli import build_progress, reported_errors
    from experts.cli_options import router_features
    from experts.inspection import bundle_table

    with reported_errors():
        recipe = EmbeddedRecipe(router_layer=router_features(router_layer).layer)
        with build_progress() as progress:
            bundle = build_embedded(out, progress, base=base, overwrite=overwrite, recipe=recipe)
        Console().print(bundle_table(bundle))
