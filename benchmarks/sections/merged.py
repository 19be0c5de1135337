"""When materialised weights pay: what mixing costs a step, and how many steps make up for making them."""

from dataclasses import replace

from benchmarks.alone import EngineAlone, defaults
from benchmarks.context import Context
from benchmarks.report import Figure
from experts.bundle import Bundle
from service.engine.costs import measure_costs
from service.engine.loader import loader_thread

_STEPS = (
    (1, "decode, batch 1"),
    (8, "decode, batch 8"),
    (32, "decode, batch 32"),
    (512, "prompts of 512 tokens"),
)


def merged(context: Context) -> list[Figure]:
    """The cost model as it is measured at start-up, and the crossover that follows from it."""
    engine = EngineAlone.of_bundle(Bundle.open(context.bundle), replace(defaults(), mode="factored")).engine
    with loader_thread() as executor:
        rounds = [measure_costs(engine.model, executor) for _ in range(context.size(5, 1))]
    figures = [
        context.figure(
            "merged: making one pattern's weights",
            [costs.making * 1000 for costs in rounds],
            "ms",
            note="materialised from the shared weights in float32 and packed, on one thread, with no steps beside it",
        )
    ]
    for tokens, title in _STEPS:
        extra = [costs.extra_of(tokens) for costs in rounds]
        figures.append(
            context.figure(
                f"merged: crossover, {title}",
                [costs.making / max(more, 1e-6) for costs, more in zip(rounds, extra, strict=True)],
                "steps of one pattern",
                note=f"mixing two experts of rank 8 costs {sorted(extra)[len(extra) // 2] * 1000:.2f} ms more than "
                "none; beyond 128 tokens extrapolated",
            )
        )
    return figures
