"""What is in a bundle, for people (a table) and for programs (plain data)."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from experts.bundle import Bundle
from experts.bundle_manifest import ExpertSummary
from experts.compression import CompressionSpec


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """The manifest, and how the router did, as plain JSON-able data."""
    facts = bundle.manifest.model_dump(mode="json")
    router = bundle.router()
    if router is not None:
        facts["router"] |= {
            "kind": router.kind,
            "features": router.spec.model_dump(),
            "top_k": router.top_k,
            "threshold": router.threshold,
            **router.describe(),
        }
    return facts


def bundle_table(bundle: Bundle) -> RenderableType:
    """Experts as a table, and the bundle's making below it."""
    return Group(_experts(bundle), _making(bundle))


def _experts(bundle: Bundle) -> Table:
    table = Table(title=f"{bundle.manifest.name} ({bundle.path})", title_justify="left")
    table.add_column("expert")
    for title in ("generation", "rank", "bytes", "% of full", "rel. error", "folded"):
        table.add_column(title, justify="right")
    for title in ("codec", "routed", "source", "sha256"):
        table.add_column(title)
    for name, entry in sorted(bundle.manifest.experts.items()):
        summary = entry.summary
        table.add_row(
            name,
            str(entry.generation),
            _ranks(summary),
            f"{summary.nbytes:,}",
            f"{100 * summary.fraction_of_full:.2f}",
            f"{summary.relative_error:.4f}",
            f"{summary.folded} tensors",
            _codec(entry.compression),
            "retired" if entry.state == "retired" else "yes" if entry.routed else "no",
            entry.source.kind,
            entry.source.sha256[:12],
        )
    return table


def _making(bundle: Bundle) -> Table:
    """Label and value, one fact a line."""
    manifest = bundle.manifest
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()

    def add(label: str, value: str) -> None:
        grid.add_row(label, Text(value))  # text, so that no value is read as markup

    base = manifest.base
    add("base", f"{base.architecture}, {base.parameters:,} parameters, {base.nbytes:,} bytes")
    add("base sha256", base.fingerprint)
    parameters = manifest.merge.method.model_dump(exclude={"method"})
    add(
        "merge",
        " ".join([manifest.merge.method.method, *(f"{key}={value}" for key, value in parameters.items())]),
    )
    if manifest.merge.tuning is not None:
        points = ", ".join(f"{point.scale:g}: {point.loss:.4f}" for point in manifest.merge.tuning.grid)
        add("tuned", f"loss per answer token at λ = {points}")
    spec = manifest.compression.model_dump(exclude_none=True)
    add("compression", " ".join(f"{key}={value}" for key, value in spec.items()))
    add("router", _router(bundle))
    shared = sum(entry.nbytes for path, entry in manifest.files.items() if path.startswith("shared/"))
    add(
        "bytes", f"{shared:,} shared, {sum(entry.nbytes for entry in manifest.files.values()):,} in all files"
    )
    add(
        "build",
        f"{manifest.build_id}, format {manifest.format_version}, {len(manifest.files)} files with sha256",
    )
    return grid


def _codec(spec: CompressionSpec) -> str:
    """Stored form, and the allocation where it is not the plain one."""
    return spec.dtype if spec.allocation == "energy" else f"{spec.dtype}, {spec.allocation}"


def _ranks(summary: ExpertSummary) -> str:
    """min/mean/max, or one number where they agree."""
    if summary.rank_min == summary.rank_max:
        return str(summary.rank_min)
    return f"{summary.rank_min}/{summary.rank_mean:.1f}/{summary.rank_max}"


def _router(bundle: Bundle) -> str:
    router = bundle.router()
    if router is None:
        return "none; requests name their experts"
    told = {"top_k": router.top_k, "threshold": router.threshold, **router.describe()}
    plain = [f"{key}={_plain(value)}" for key, value in told.items() if isinstance(value, str | int | float)]
    return ", ".join([f"{router.kind}, generation {router.generation}, {len(router.names)} experts", *plain])


def _plain(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
