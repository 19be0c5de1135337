"""What asking the router costs of the time to first token: routed requests over the same with explicit gates."""

import statistics
from dataclasses import replace

from benchmarks.alone import EngineAlone, defaults
from benchmarks.context import Context
from benchmarks.paired import Run, alternate
from benchmarks.report import Figure
from benchmarks.workload import Load
from experts.bundle import Bundle


def routing(context: Context) -> list[Figure]:
    """A pass of its own for the router, and single-pass routing where the router reads a layer in the middle."""
    bundle = Bundle.open(context.bundle)
    router = bundle.router()
    if router is None:
        return [
            context.missing("routing share of TTFT", "%", "lower", "the bundle has no router", at_least=15)
        ]
    layer = router.spec.layer
    depth = "the last layer" if layer == -1 else f"layer {layer}"
    figures = _ways(context, bundle, single_pass=False, title=f"own pass up to {depth}")
    if layer == -1:
        why = "the bundle's router reads the last layer, and gates must be known before it"
        return [*figures, context.missing("routing share of TTFT, single pass", "%", "lower", why)]
    return figures + _ways(context, bundle, single_pass=True, title=f"single pass, gates from {depth} on")


def _ways(context: Context, bundle: Bundle, *, single_pass: bool, title: str) -> list[Figure]:
    engine = EngineAlone.of_bundle(bundle, replace(defaults(), single_pass=single_pass))
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
