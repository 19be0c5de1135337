"""What asking the router costs of the time to first token: routed requests over the same with explicit gates."""

import statistics
from dataclasses import replace

from benchmarks.alone import EngineAlone, defaults
from benchmarks.context import Context
from benchmarks.paired import Run, alternate
from benchmarks.report import Figure
from benchmarks.workload import Load
from experts.bundle import Bundle
from experts.routing import MlpRouter

_SHALLOW = 3
"""A shallow depth, for those whose prompts follow fixed templates (`results/depth.md`)."""


def routing(context: Context) -> list[Figure]:
    """At the router's own depth and at a shallow one: a pass of its own for the router, and single-pass routing."""
    bundle = Bundle.open(context.bundle)
    router = bundle.router()
    if not isinstance(router, MlpRouter):
        return [
            context.missing(
                "routing share of TTFT", "%", "lower", "the bundle has no MLP router", at_least=15
            )
        ]
    figures = []
    for layer in dict.fromkeys((router.spec.layer, _SHALLOW)):
        # What the router then says is worthless; what it costs is the same.
        reading = replace(router, spec=router.spec.model_copy(update={"layer": layer}))
        depth = "the last layer" if layer == -1 else f"layer {layer}"
        figures += _ways(context, bundle, reading, single_pass=False, title=f"own pass up to {depth}")
        if layer != -1:
            title = f"single pass, the prompt's gates from {depth} on"
            figures += _ways(context, bundle, reading, single_pass=True, title=title)
    return figures


def _ways(
    context: Context, bundle: Bundle, router: MlpRouter, *, single_pass: bool, title: str
) -> list[Figure]:
    engine = EngineAlone(
        bundle.shared_path,
        [bundle.expert(name) for name in bundle.expert_names()],
        router=router,
        options=replace(defaults(), single_pass=single_pass),
    )
    prompt = context.size(128, 16)
    some = Load(tuple(engine.experts), engine.vocabulary, prompt_tokens=prompt)
    return [
        _cell(context, engine, replace(some, new_tokens=new), clients, number, title)
        for clients, number, new in ((1, 12, 2), (8, 32, context.size(16, 4)))
    ]


def _cell(context: Context, engine: EngineAlone, load: Load, clients: int, number: int, title: str) -> Figure:
    def first_token(load: Load) -> Run[float]:
        return lambda salt: statistics.median(engine.run(load.requests(number, salt), clients).first_tokens)

    runs: dict[str, Run[float]] = {
        "explicit": first_token(load),
        # Negative salts: no prompt of one way may be in the prefix cache for the other.
        "routed": lambda salt: first_token(replace(load, kind="routed"))(-1 - salt),
    }
    for run in runs.values():
        run(0)
    found = alternate(runs, context.rounds)
    routed, explicit = (statistics.median(found[name]) * 1000 for name in ("routed", "explicit"))
    return context.figure(
        f"routing share of TTFT, {clients} clients, {title}",
        [100 * (1 - b / a) for a, b in zip(found["routed"], found["explicit"], strict=True)],
        "%",
        at_least=15,
        aim=3,
        note=f"medians: {routed:.1f} ms routed, {explicit:.1f} ms with two gates given; engine alone, prompt "
        f"{load.prompt_tokens}, {load.new_tokens} new, {number} requests a run; random prompts, so the router's "
        "gates are not the given ones",
    )
