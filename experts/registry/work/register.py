"""A fine-tune → files of an expert, checked. Writes below the task's folder only."""

import contextlib
from pathlib import Path
from typing import Any

from experts.bundle import Bundle
from experts.bundle_expert import check_expert, summarise, write_expert
from experts.bundle_files import digest
from experts.bundle_manifest import EXPERT_FILES, ExpertSummary, FileEntry
from experts.compression import CompressedExpert, CompressionSpec
from experts.errors import BlobError
from experts.registry.checks import check_expert_candidate, norm_told, require_finite_files
from experts.registry.prepare import describe_source, prepare_expert
from experts.registry.sources import (
    digest_of_source,
    fetch,
    inspect_source,
    is_accepted,
    read_keys,
    signature_beside,
    verify,
)
from experts.registry.work.stages import Desk, shares
from experts.registry.work.tasks import EXPERT, SOURCE, Checks, Prepared, RegisterTask, RemoteSource

_USUAL_BYTES = 2**28
"""A fetched source of that size is half of its stage, since nobody knows beforehand how large one is."""


def register(task: RegisterTask, desk: Desk) -> Prepared:
    """Fetch, check, compress, write.

    Raises:
        SourceError: it may not be fetched, or cannot be.
        SignatureError: it is not signed as it must be.
        CheckpointError, MismatchError, CompressionError: it cannot become an expert of this bundle.
    """
    bundle = desk.bundle(task.bundle, task.build_id)
    source = (
        _fetched(task.source, task.folder, desk) if isinstance(task.source, RemoteSource) else task.source
    )
    desk.step("check", 0)
    weights = inspect_source(source, foreign=task.foreign)
    require_finite_files(weights, lambda name: desk.step("check", 0.2, name))
    desk.step("check", 0.5)
    signer = _signer(task.checks, source)
    described = describe_source(source)
    desk.step("check", 0.9)
    spec = compression(bundle, task.size)
    told = shares(bundle, desk.step, "compress")
    compressed = prepare_expert(bundle, task.name, source, spec, progress=told)
    measured = check_expert_candidate(
        compressed,
        _siblings(task.checks, desk),
        max_norm_ratio=task.checks.max_norm_ratio,
        max_relative_error=task.checks.max_relative_error,
    )
    folder = task.folder / EXPERT
    folder.mkdir()
    write_expert(folder, compressed)
    check_expert(folder, bundle.shared)
    report = totals(compressed) | measured
    if signer is not None:
        report["signed_by"] = signer
    return Prepared(
        files={name: digest(folder / name) for name in EXPERT_FILES},
        source=described,
        origin=_origin(source) if _kept(task.keep, described.kind) else {},
        compression=spec,
        summary=summarise(compressed, bundle.shared),
        report=report,
    )


def compression(bundle: Bundle, size: Any) -> CompressionSpec:
    """The bundle's own, or as was asked.

    Prompts come to the process as features only, so activations cannot weigh what is lost.
    """
    spec = bundle.manifest.compression
    if size:
        spec = spec.resized(**size)
    return spec.model_copy(update={"allocation": "energy"})


def totals(compressed: CompressedExpert) -> dict[str, Any]:
    """Of the compression report."""
    report = compressed.report
    handled = [tensor.handling for tensor in report.tensors]
    return {
        "bytes": report.nbytes,
        "fraction_of_full": report.fraction,
        "relative_error": report.relative_error,
        "kept_relative_error": report.kept_relative_error,
        "folded_fraction": report.folded_fraction,
        "max_rank": report.max_rank,
        "tensors": {handling: handled.count(handling) for handling in ("factored", "exact", "folded")},
    }


def _siblings(checks: Checks, desk: Desk) -> dict[str, ExpertSummary]:
    """Those that serve, each with its norm where that is known at all."""
    found = dict(checks.siblings)
    for name, entry in checks.reports.items():
        # The norm of one whose file cannot be had counts for nothing: that is no fault of this one.
        with contextlib.suppress(BlobError):
            found[name] = found[name].model_copy(update={"norm": norm_told(desk.blobs.path(entry))})
    return found


def _kept(keep: str, kind: str) -> bool:
    """Whether a source of that kind is kept: all that is small where it is not all."""
    return keep == "all" or (keep == "lora" and kind in ("lora", "gguf"))


def _fetched(remote: RemoteSource, folder: Path, desk: Desk) -> Path:
    target = folder / SOURCE
    target.mkdir()

    def told(name: str, nbytes: int) -> None:
        desk.step("fetch", nbytes / (nbytes + _USUAL_BYTES), name)

    return fetch(remote.url, target, remote.policy, told)


def _signer(checks: Checks, source: Path) -> str | None:
    """The label of the trusted key that vouches for the source; None where nobody has to."""
    if checks.keys is None:
        return None
    given = signature_beside(source, checks.signature)
    return verify(read_keys(checks.keys), digest_of_source(source), given)


def _origin(source: Path) -> dict[str, FileEntry]:
    return {path.name: digest(path) for path in sorted(source.iterdir()) if is_accepted(path.name)}
