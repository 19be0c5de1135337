"""A new shared expert over all current experts of a family: merged anew, compressed anew, routed anew.

The base is the one that the family was made from. Where its folder is gone it is worked out, θ₀ = θ* − (θ* − θ₀), to
the rounding of what the bundle stores. An expert is the fine-tune as it came, where that was kept; else it is what
the bundle knows of it, δ_t = (θ* − θ₀) + v_t. One tensor of each is in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from experts.bundle import Bundle
from experts.bundle_delta import BaseDelta
from experts.bundle_files import digest
from experts.bundle_manifest import MANIFEST_NAME, ROUTER_FILES, MergeInfo, router_folder
from experts.bundle_writer import BundleWriter, new_bundle
from experts.checkpoint import Checkpoint
from experts.errors import BundleError, MergeError, RoutingError
from experts.factors import Delta
from experts.merging import merge
from experts.merging.methods import MergeMethod
from experts.registry.adopting import bundle_generations
from experts.registry.calibration import expert_statistics
from experts.registry.fitting import Kind, every_layer, fit_router, subspace_router
from experts.registry.prepare import compress_exclusive
from experts.registry.reconstruct import Member, base_of, opened
from experts.registry.records import BundleRecord, Generation, RouterGeneration
from experts.registry.refit import MIN_PROMPTS, VALIDATION_EVERY
from experts.registry.responses import of_fine_tune, readable
from experts.routing import FeatureSpec, Router, RoutingPrompt, extract_features, fitted, render_prompts
from experts.routing.loading import load_model, load_tokenizer
from experts.routing.subspace import GUARD_RATE

__all__ = ["Member", "Progress", "RebuildPlan", "read_method", "rebuild_bundle", "rebuilt_records"]

Progress = Callable[[str, int, int, str], None]
"""Gets (stage, done, total, parameter at hand or nothing); stages are base, merge, experts, route."""

_LEARNING: tuple[Kind, ...] = ("mlp", "gaussian", "nearest", "staged")
"""Kinds of router that are fitted on prompts."""


@dataclass(frozen=True)
class RebuildPlan:
    """Everything that decides what the new bundle becomes.

    Attributes:
        bundle: the one that is served.
        members: all of its current experts.
        out: the new bundle's folder to be.
        base: folder of the base; None works it out.
        method: the static merge; None is as the bundle was merged.
        router: the one that serves; what it reads and how it chooses stays. None makes no router.
        seed: of the router's fit.
    """

    bundle: Bundle
    members: tuple[Member, ...]
    out: Path
    base: Path | None = None
    method: MergeMethod | None = None
    router: Router | None = None
    seed: int = 0


def read_method(asked: Mapping[str, Any]) -> MergeMethod:
    """A merge method by its name under `method`, and its parameters.

    Raises:
        MergeError: there is no such method, or a parameter is wrong; names it.
    """
    named = {**asked, "method": str(asked.get("method", "")).replace("_", "-")}
    try:
        found: MergeMethod = TypeAdapter[MergeMethod](MergeMethod).validate_python(named)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "merge"
        raise MergeError(f"merge: {where}: {problem['msg']}") from error
    return found


def rebuild_bundle(plan: RebuildPlan, progress: Progress | None = None) -> Bundle:
    """Build the new bundle and open it. Until it is complete nothing is at `plan.out`.

    Experts with prompts are known to the router by them: by a router of the same kind as before, if all have some.
    Those without are known by their weights, where the model is one whose weights tell; else requests must name them.

    Raises:
        BundleError: there is no expert, or `out` is taken.
        MismatchError: `base` is not the base that the bundle was made from, or a kept fine-tune does not fit it.
        ExpertsError: of the subclass that says what is wrong with a file, the merge or the router.
    """
    report = progress or (lambda stage, done, total, parameter: None)
    if not plan.members:
        raise BundleError("there are no experts to rebuild the shared expert over")
    old = plan.bundle
    method = plan.method or old.manifest.merge.method
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    parameters = len(old.shared.names)
    with (
        base_of(
            old, plan.base, plan.out.parent, lambda done, name: report("base", done, parameters, name)
        ) as base,
        new_bundle(plan.out, old.manifest.name, old.manifest.compression) as writer,
    ):
        fine_tunes = [opened(member, old, base) for member in plan.members]
        deltas = _counted(merge(base, fine_tunes, method), parameters, report)
        shared, base_delta = writer.write_shared(base.streamed(), deltas)
        _add_experts(plan, writer, shared, base_delta, report)
        router = None
        if plan.router is not None:
            router = _router(plan, plan.router, writer, shared, base_delta, report)
        if router is not None:
            writer.set_router(router)
        writer.commit(old.manifest.base, MergeInfo(method=method))
    return Bundle.open(plan.out)


def _counted(
    deltas: Iterator[tuple[str, Delta | None]], total: int, report: Progress
) -> Iterator[tuple[str, Delta | None]]:
    for done, item in enumerate(deltas, start=1):
        yield item
        report("merge", done, total, item[0])


def _add_experts(
    plan: RebuildPlan, writer: BundleWriter, shared: Checkpoint, base_delta: BaseDelta, report: Progress
) -> None:
    """Every exclusive vector against the new shared expert, as it was written."""
    total = len(plan.members) * len(shared.names)
    # Loaded for the first expert that is weighed so, and for no other again.
    weighing = cache(lambda: (load_model(writer.shared_path), load_tokenizer(writer.shared_path)))
    for index, member in enumerate(plan.members):
        places = {name: index * len(shared.names) + place for place, name in enumerate(shared.names, start=1)}
        spec = member.compression or writer.compression
        prompts = [RoutingPrompt(prompt=text) for text in member.prompts]
        statistics = None
        if spec.allocation == "activation" and prompts:
            statistics = expert_statistics(*weighing(), member.name, prompts)
        elif spec.allocation == "activation":
            spec = spec.model_copy(update={"allocation": "energy"})
        compressed = compress_exclusive(
            opened(member, plan.bundle, shared),
            shared,
            base_delta,
            spec,
            partial(_told, report, places, total),
            statistics,
        )
        writer.add_expert(member.name, compressed, member.source, shared, spec)
        report("experts", (index + 1) * len(shared.names), total, shared.names[-1])


def _told(report: Progress, places: Mapping[str, int], total: int, name: str) -> None:
    report("experts", places[name], total, name)


@dataclass(frozen=True)
class _Split:
    """Expert → features (n, d) of two disjoint sets of its prompts."""

    training: dict[str, Tensor] = field(default_factory=dict)
    validation: dict[str, Tensor] = field(default_factory=dict)


def _router(
    plan: RebuildPlan,
    before: Router,
    writer: BundleWriter,
    shared: Checkpoint,
    base_delta: BaseDelta,
    report: Progress,
) -> Router | None:
    """Over the experts that can be known; None where that is none of them."""
    spec, guard_rate = before.spec, fitted(before).abstention
    known = _features(plan.members, writer.shared_path, spec, report)
    unknown = [member for member in plan.members if member.name not in known.training]
    wide = spec if known.training and spec.layer == -1 else every_layer(spec, shared)
    if unknown and readable(shared, wide.read):
        tasks = {
            member.name: of_fine_tune(opened(member, plan.bundle, shared), shared, base_delta)
            for member in unknown
        }
        return subspace_router(
            tasks,
            writer.shared_path,
            spec,
            training=known.training,
            validation=known.validation,
            top_k=before.top_k,
            threshold=before.threshold,
            guard_rate=guard_rate,
        )
    if not known.training:
        return None
    kind: Kind = next((kind for kind in _LEARNING if kind == before.kind), "gaussian")
    return fit_router(
        kind,
        known.training,
        known.validation,
        spec,
        top_k=before.top_k,
        threshold=before.threshold,
        seed=plan.seed,
        guard_rate=GUARD_RATE if guard_rate is None and kind != before.kind else guard_rate,
    )


def _features(members: Sequence[Member], shared: Path, spec: FeatureSpec, report: Progress) -> _Split:
    """Of every expert with enough prompts; every fifth prompt is held out."""
    found = _Split()
    asked = [member for member in members if len(member.prompts) >= MIN_PROMPTS]
    if not asked:
        return found
    tokenizer, model = load_tokenizer(shared), load_model(shared)
    for done, member in enumerate(asked, start=1):
        held = [text for place, text in enumerate(member.prompts) if _held_out(place)]
        kept = [text for place, text in enumerate(member.prompts) if not _held_out(place)]
        for split, texts in ((found.training, kept), (found.validation, held)):
            try:
                split[member.name] = extract_features(model, render_prompts(tokenizer, texts), spec)
            except RoutingError as error:
                raise RoutingError(f"prompts of {member.name!r}: {error}") from error
        report("route", done, len(asked), "")
    return found


def _held_out(place: int) -> bool:
    return place % VALIDATION_EVERY == VALIDATION_EVERY - 1


def rebuilt_records(
    bundle: Bundle, before: Sequence[Generation]
) -> tuple[BundleRecord, list[Generation], RouterGeneration | None]:
    """What a catalogue has to know of a bundle that takes another's place; its files belong into the blob store.

    The numbers are the bundle's own, and the catalogue gives others.

    Args:
        before: the generations that it was rebuilt from: what was kept of how they came stays known.
    """
    manifest, files = bundle.manifest, dict(bundle.manifest.files)
    files[MANIFEST_NAME] = digest(bundle.path / MANIFEST_NAME)
    text = (bundle.path / MANIFEST_NAME).read_text(encoding="utf-8")
    record = BundleRecord(manifest.build_id, manifest.name, text, files, "staged")
    came = {generation.name: generation for generation in before}
    generations = []
    for made in bundle_generations(bundle):
        earlier = came.get(made.name)
        if earlier is not None:
            made = replace(made, origin=earlier.origin, prompts=earlier.prompts, report=dict(earlier.report))
        generations.append(made)
    number = manifest.router.generation
    if not number:
        return record, generations, None
    folder = router_folder(number)
    router = RouterGeneration(
        number=number,
        build_id=manifest.build_id,
        profiles={name: manifest.experts[name].generation for name in manifest.router.names},
        files={name: files[f"{folder}/{name}"] for name in ROUTER_FILES},
        reason="rebuilt",
    )
    return record, generations, router
