"""Base + fine-tunes → bundle: merge, compress, fit the router, write. One function, whoever asks for it.

Order: write the shared expert (streamed), then take every exclusive vector against it as it was written, then
read router features from it, so that what is served is what was measured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from experts.bundle import Bundle
from experts.bundle_delta import BaseDelta
from experts.bundle_manifest import BASE_DELTA_NAME, BaseInfo, MergeInfo, TuningRecord, check_name
from experts.bundle_writer import BundleWriter, check_target, new_bundle
from experts.checkpoint import Checkpoint, FineTune, open_fine_tune
from experts.compression import CompressionSpec
from experts.errors import BundleError, RoutingError
from experts.factors import Delta
from experts.merging import merge
from experts.merging.methods import MergeMethod, TaskArithmetic
from experts.registry.calibration import expert_statistics
from experts.registry.fitting import Kind, fit_router, subspace_router
from experts.registry.prepare import compress_exclusive, describe_source
from experts.registry.responses import of_fine_tune
from experts.routing import (
    FeatureSpec,
    Router,
    RoutingPrompt,
    extract_features,
    load_prompts,
    render_prompts,
)
from experts.routing.loading import load_model, load_tokenizer
from experts.routing.prompts import Split
from experts.routing.training import CONSTANT, Pace
from experts.tuning import tune_scale

Progress = Callable[[str, int, int], None]
"""Gets (stage, done, total); a total of 0 means that it is not known."""

_SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class BuildPlan:
    """Everything that decides what a bundle becomes.

    Attributes:
        base: folder of θ₀.
        experts: name → folder of a LoRA or full fine-tune of the base.
        out: the bundle's folder to be.
        name: the bundle's name, by which clients ask for routed answers.
        method: the static merge that makes the shared expert.
        compression: how much of each exclusive vector is kept.
        prompts: name → prompts file (`load_prompts`); the router needs one for every expert.
        router: its kind, or "none": requests then name their experts. "subspace" needs no prompts.
        features: what the router sees.
        guard_rate: share of held-out prompts that the router's guard may leave to the shared expert; None: no
            guard.
        pace: how the learning rate of an mlp or staged router follows the prompts' difficulty.
        top_k, threshold: the router's defaults.
        max_prompts: at most so many prompts of each expert and split train the router.
        tune: choose the method's scale on validation prompts with answers, see `tune_scale`.
        seed: of the router's fit.
        overwrite: replace a bundle that is at `out`.
    """

    base: Path
    experts: Mapping[str, Path]
    out: Path
    name: str = "twin"
    method: MergeMethod = field(default_factory=TaskArithmetic)
    compression: CompressionSpec = field(default_factory=lambda: CompressionSpec(rank=16))
    prompts: Mapping[str, Path] = field(default_factory=dict)
    router: Kind | Literal["none"] = "mlp"
    features: FeatureSpec = field(default_factory=FeatureSpec)
    guard_rate: float | None = None
    pace: Pace = CONSTANT
    top_k: int = 2
    threshold: float = 0.05
    max_prompts: int = 500
    tune: bool = False
    seed: int = 0
    overwrite: bool = False


def build_bundle(plan: BuildPlan, progress: Progress | None = None) -> Bundle:
    """Build a bundle and open it. Until it is complete nothing is at `plan.out`.

    Raises:
        ExpertsError: of the subclass that says what is wrong: the plan (BundleError, RoutingError), a
            checkpoint (CheckpointError, MismatchError), a merge or a compression.
    """
    report = progress or (lambda stage, done, total: None)
    prompts = _check_plan(plan)
    base = Checkpoint.open(plan.base)
    fine_tunes = [open_fine_tune(name, path, base) for name, path in plan.experts.items()]
    method, tuning = plan.method, None
    if plan.tune:
        # Activation statistics are of the shared expert, which the scale decides: tuning goes without.
        spec = plan.compression.model_copy(update={"allocation": "energy"})
        method, tuning = tune_scale(base, fine_tunes, plan.method, spec, prompts, report)
    with new_bundle(plan.out, plan.name, plan.compression, overwrite=plan.overwrite) as writer:
        _write_experts(plan, writer, base, fine_tunes, method, prompts, report)
        if plan.router != "none":
            writer.set_router(_fit_router(plan, writer, prompts, report))
        report("finish", 0, 1)
        _commit(writer, base, method, tuning)
    bundle = Bundle.open(plan.out)
    report("finish", 1, 1)
    return bundle


def _check_plan(plan: BuildPlan) -> dict[str, tuple[RoutingPrompt, ...]]:
    """Refuse an impossible plan before any work is done, and read its prompts."""
    check_name(plan.name, "bundle")
    if not plan.experts:
        raise BundleError("there are no experts; give at least one as name=folder")
    for name in plan.experts:
        check_name(name)
        if name == plan.name:
            raise BundleError(f"expert name {name!r} is the bundle's own name; choose another")
    check_target(plan.out, overwrite=plan.overwrite)
    unknown = sorted(set(plan.prompts) - set(plan.experts))
    if unknown:
        raise RoutingError(f"prompts are given for {unknown}, which are not experts of this build")
    missing = sorted(set(plan.experts) - set(plan.prompts))
    weighed = plan.compression.allocation == "activation"
    learns = plan.router not in ("none", "subspace")
    if missing and (learns or plan.tune or weighed):
        needs = "the router" if learns else "tuning" if plan.tune else "allocation=activation"
        raise RoutingError(
            f"{needs} needs prompts for every expert, and {missing} have none; give them or do without"
        )
    return {name: load_prompts(plan.prompts[name]) for name in plan.experts if name in plan.prompts}


def _write_experts(
    plan: BuildPlan,
    writer: BundleWriter,
    base: Checkpoint,
    fine_tunes: Sequence[FineTune],
    method: MergeMethod,
    prompts: Mapping[str, Sequence[RoutingPrompt]],
    report: Progress,
) -> None:
    """The shared expert, then every exclusive vector against it as written."""
    thresholds = 0

    def on_line(line: str) -> None:
        nonlocal thresholds
        if line not in base:
            thresholds += 1
            report("trim", thresholds, 0)

    shared, base_delta = writer.write_shared(
        base, _counted(merge(base, fine_tunes, method, on_line), base, report)
    )
    weigh = _calibration(plan, writer, prompts)
    for index, (name, path) in enumerate(plan.experts.items()):
        positions = {parameter: place for place, parameter in enumerate(shared.names, start=1)}
        step = _stepped(report, positions, index, len(plan.experts))
        fine_tune = open_fine_tune(name, path, shared)
        compressed = compress_exclusive(fine_tune, shared, base_delta, plan.compression, step, weigh(name))
        writer.add_expert(name, compressed, describe_source(path), shared)
        report("experts", (index + 1) * len(positions), len(plan.experts) * len(positions))


def _calibration(
    plan: BuildPlan, writer: BundleWriter, prompts: Mapping[str, Sequence[RoutingPrompt]]
) -> Callable[[str], Mapping[str, Tensor] | None]:
    """Gives an expert's activation statistics on the shared expert as written; None where none are needed."""
    if plan.compression.allocation == "energy":
        return lambda name: None
    tokenizer, model = load_tokenizer(writer.shared_path), load_model(writer.shared_path)
    return lambda name: expert_statistics(model, tokenizer, name, prompts[name])


def _stepped(
    report: Progress, positions: Mapping[str, int], index: int, experts: int
) -> Callable[[str], None]:
    """Report a parameter of one expert as progress over all experts."""
    size = len(positions)
    return lambda parameter: report("experts", index * size + positions[parameter], experts * size)


def _counted(
    deltas: Iterator[tuple[str, Delta | None]], base: Checkpoint, report: Progress
) -> Iterator[tuple[str, Delta | None]]:
    for done, item in enumerate(deltas, start=1):
        yield item
        report("merge", done, len(base.names))


def _fit_router(
    plan: BuildPlan,
    writer: BundleWriter,
    prompts: Mapping[str, Sequence[RoutingPrompt]],
    report: Progress,
) -> Router:
    """Features of every expert's prompts on the shared expert, then the fit."""
    shared = writer.shared_path
    training, validation = _features(plan, shared, prompts, report) if prompts else ({}, {})
    told = lambda epoch, epochs: report("router", epoch, epochs)  # noqa: E731 - one line, used twice
    if plan.router in ("none", "subspace"):
        checkpoint, base_delta = Checkpoint.open(shared), BaseDelta.open(writer.folder / BASE_DELTA_NAME)
        tasks = {
            name: of_fine_tune(open_fine_tune(name, path, checkpoint), checkpoint, base_delta)
            for name, path in plan.experts.items()
            if name not in prompts
        }
        return subspace_router(
            tasks,
            shared,
            plan.features,
            training=training,
            validation=validation,
            top_k=plan.top_k,
            threshold=plan.threshold,
            guard_rate=plan.guard_rate,
            progress=told,
        )
    return fit_router(
        plan.router,
        training,
        validation,
        plan.features,
        top_k=plan.top_k,
        threshold=plan.threshold,
        seed=plan.seed,
        pace=plan.pace,
        guard_rate=plan.guard_rate,
        progress=told,
    )


def _features(
    plan: BuildPlan, shared: Path, prompts: Mapping[str, Sequence[RoutingPrompt]], report: Progress
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and validation features by expert."""
    tokenizer, model = load_tokenizer(shared), load_model(shared)
    rendered: dict[tuple[str, Split], list[list[int]]] = {}
    for name, lines in prompts.items():
        for side in _SPLITS:
            texts = [line.prompt for line in lines if line.side == side][: plan.max_prompts]
            if not texts:
                raise RoutingError(f"{plan.prompts[name]}: no {side} prompts; the router needs both splits")
            rendered[name, side] = render_prompts(tokenizer, texts)
    total, done = sum(len(ids) for ids in rendered.values()), 0
    features: dict[Split, dict[str, Tensor]] = {side: {} for side in _SPLITS}
    for (name, side), ids in rendered.items():
        features[side][name] = extract_features(
            model, ids, plan.features, progress=_shifted(report, "features", done, total)
        )
        done += len(ids)
    return features["train"], features["validation"]


def _shifted(report: Progress, stage: str, before: int, total: int) -> Callable[[int, int], None]:
    """Report a part's progress as progress of the whole."""
    return lambda done, _: report(stage, before + done, total)


def _commit(writer: BundleWriter, base: Checkpoint, method: MergeMethod, tuning: TuningRecord | None) -> None:
    parameters = 0
    for name in base.names:
        count = 1
        for extent in base.shape(name):
            count *= extent
        parameters += count
    info = BaseInfo(
        architecture=base.architecture,
        fingerprint=base.fingerprint(),
        parameters=parameters,
        nbytes=base.nbytes,
    )
    writer.commit(info, MergeInfo(method=method, tuning=tuning))
