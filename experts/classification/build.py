"""Encoder + sequence classifiers → classifier bundle: merge the encoders, compress, fit the router, write.

Heads are neither merged nor compressed: each expert keeps its own, whole.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from experts.bundle_expert import summarise, write_expert
from experts.bundle_files import digest, list_files, scratch_folder, sync, sync_tree
from experts.bundle_manifest import (
    MANIFEST_NAME,
    SHARED_NAME,
    BaseInfo,
    MergeInfo,
    RouterEntry,
    check_name,
)
from experts.bundle_writer import check_target
from experts.checkpoint import Checkpoint, write_checkpoint
from experts.classification.bundle import ClassifierBundle
from experts.classification.checkpoints import ClassifierFineTune, save_encoder
from experts.classification.features import encoder_features
from experts.classification.manifest import (
    HEAD_FILE,
    ROUTER_FOLDER,
    ClassifierEntry,
    ClassifierManifest,
    expert_folder,
)
from experts.compression import CompressionSpec, compress
from experts.errors import BundleError, RoutingError
from experts.merging import merge
from experts.merging.methods import MergeMethod, TaskArithmetic
from experts.registry.prepare import describe_source
from experts.routing import FeatureSpec, MlpRouter, Router, RoutingPrompt
from experts.routing.loading import load_tokenizer

Progress = Callable[[str], None]

_SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


@dataclass(frozen=True)
class ClassifierPlan:
    """Everything that decides what a classifier bundle becomes.

    Attributes:
        base: folder of the encoder that all classifiers were trained from.
        experts: name → folder of a sequence classifier.
        texts: name → texts of the expert's task, for the router; none at all makes a bundle without router.
        method: the static merge of the encoders.
        compression: of the exclusive vectors; "exact" extras keep biases and norms whole.
        features: what the router sees.
        top_k, threshold: the router's defaults.
        max_texts: at most so many texts of each expert and split train the router.
        max_tokens: a text is cut to that many tokens for the router's fit.
    """

    base: Path
    experts: Mapping[str, Path]
    out: Path
    name: str = "classifier"
    method: MergeMethod = field(default_factory=TaskArithmetic)
    compression: CompressionSpec = field(default_factory=lambda: CompressionSpec(rank=16, extras="exact"))
    texts: Mapping[str, Sequence[RoutingPrompt]] = field(default_factory=dict)
    features: FeatureSpec = field(default_factory=lambda: FeatureSpec(pooling="mean"))
    top_k: int = 1
    threshold: float = 0.05
    max_texts: int = 1000
    max_tokens: int = 64
    seed: int = 0
    overwrite: bool = False


def build_classifier(plan: ClassifierPlan, progress: Progress | None = None) -> ClassifierBundle:
    """Build a classifier bundle and open it. Until it is complete nothing is at `plan.out`.

    Raises:
        ExpertsError: of the subclass that says what is wrong with the plan, a checkpoint or a text.
    """
    report = progress or (lambda line: None)
    _check_plan(plan)
    target = plan.out.absolute()
    check_target(target, overwrite=plan.overwrite)
    with scratch_folder(target) as folder, scratch_folder(target.with_name(f"{target.name}.base")) as encoder:
        try:
            report("encoder")
            base = save_encoder(plan.base, encoder / "base")
            manifest = _fill(plan, base, folder, report)
            (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
            sync_tree(folder)
            _rename(folder, target, overwrite=plan.overwrite)
        except OSError as error:
            raise BundleError(f"cannot write {target}: {error}") from error
    return ClassifierBundle.open(target)


def _check_plan(plan: ClassifierPlan) -> None:
    check_name(plan.name, "bundle")
    if not plan.experts:
        raise BundleError("there are no experts; give at least one as name=folder")
    for name in plan.experts:
        check_name(name)
        if name == plan.name:
            raise BundleError(f"expert name {name!r} is the bundle's own name; choose another")
    if plan.texts and set(plan.texts) != set(plan.experts):
        odd = sorted(set(plan.texts) ^ set(plan.experts))
        raise RoutingError(f"texts and experts differ in {odd}; give texts for every expert, or for none")
    if plan.compression.extras != "exact":
        raise BundleError(
            'compression folds biases and norms into the merge; a classifier needs extras="exact"'
        )


def _fill(plan: ClassifierPlan, base: Checkpoint, folder: Path, report: Progress) -> ClassifierManifest:
    fine_tunes = [ClassifierFineTune(name, path, base) for name, path in plan.experts.items()]
    report(f"merge: {plan.method.method}")
    write_checkpoint(base, merge(base, fine_tunes, plan.method), folder / SHARED_NAME)
    shared = Checkpoint.open(folder / SHARED_NAME)
    entries = {}
    for name, path in plan.experts.items():
        report(f"compress: {name}")
        entries[name] = _write_expert(plan, ClassifierFineTune(name, path, shared), shared, folder)
    router = RouterEntry(generation=0, names=())
    if plan.texts:
        report("router")
        fitted = fit_router(plan, folder / SHARED_NAME)
        (folder / ROUTER_FOLDER).mkdir()
        fitted.at_generation(1).save(folder / ROUTER_FOLDER)
        router = RouterEntry(generation=1, names=fitted.names)
    return ClassifierManifest(
        name=plan.name,
        build_id=secrets.token_hex(16),
        base=BaseInfo(
            architecture=base.architecture,
            fingerprint=base.fingerprint(),
            parameters=sum(int(torch.Size(base.shape(name)).numel()) for name in base.names),
            nbytes=base.nbytes,
        ),
        merge=MergeInfo(method=plan.method),
        compression=plan.compression,
        max_tokens=plan.max_tokens,
        experts=entries,
        router=router,
        files={path: digest(folder / path) for path in list_files(folder)},
    )


def _write_expert(
    plan: ClassifierPlan, fine_tune: ClassifierFineTune, shared: Checkpoint, folder: Path
) -> ClassifierEntry:
    """The exclusive vector against the shared encoder as it was written, and the head."""
    deltas = ((name, fine_tune.delta(name)) for name in shared.names)
    compressed = compress(deltas, plan.compression, model_nbytes=shared.nbytes)
    target = folder / expert_folder(fine_tune.name)
    target.mkdir(parents=True)
    write_expert(target, compressed)
    save_file({name: tensor.contiguous() for name, tensor in fine_tune.head.items()}, target / HEAD_FILE)
    return ClassifierEntry(
        labels=fine_tune.labels,
        head_nbytes=sum(tensor.nbytes for tensor in fine_tune.head.values()),
        source=describe_source(fine_tune.path),
        summary=summarise(compressed, shared),
    )


def fit_router(plan: ClassifierPlan, shared: Path) -> Router:
    """The paper's router over features of each task's texts on the shared encoder."""
    training, validation = router_features(plan, shared)
    return MlpRouter.fit(
        training, validation, plan.features, top_k=plan.top_k, threshold=plan.threshold, seed=plan.seed
    )


def router_features(plan: ClassifierPlan, shared: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expert → (n, d) features of its training and of its validation texts, as every router's `fit` takes them.

    Raises:
        RoutingError: an expert has no texts in a split.
    """
    tokenizer = load_tokenizer(shared)
    encoder = AutoModel.from_pretrained(shared, local_files_only=True, use_safetensors=True).eval()
    found: dict[str, dict[str, Tensor]] = {split: {} for split in _SPLITS}
    for name, lines in plan.texts.items():
        for split in _SPLITS:
            texts = [line.prompt for line in lines if line.side == split][: plan.max_texts]
            if not texts:
                raise RoutingError(f"expert {name!r} has no {split} texts; the router needs both splits")
            ids = tokenizer(texts, truncation=True, max_length=plan.max_tokens)["input_ids"]
            found[split][name] = encoder_features(encoder, ids, tokenizer.pad_token_id, plan.features)
    return found["train"], found["validation"]


def _rename(folder: Path, target: Path, *, overwrite: bool) -> None:
    """Swap the finished folder in; the bundle that it replaces is kept until the new one is there."""
    check_target(target, overwrite=overwrite)
    replaced = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    if target.exists():
        os.rename(target, replaced)
    os.rename(folder, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
