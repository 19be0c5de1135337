"""500 registered experts of which 16 are active, over an engine that has those 16 alone."""

from dataclasses import replace

from benchmarks.alone import EngineAlone, defaults, renamed
from benchmarks.context import Context
from benchmarks.paired import Run, alternate
from benchmarks.report import Figure
from benchmarks.workload import Load
from experts.bundle import Bundle, ExpertWeights
from service.core import ExpertKey
from service.gating.slots import SlotPool

REGISTERED = 500
ACTIVE = 16


class CopiesOnDisk:
    """As many experts as are asked for, each read from disk: an expert of the bundle under another name."""

    def __init__(self, bundle: Bundle) -> None:
        self._loader = bundle.loader()
        self._originals = [(name, bundle.entry(name).generation) for name in bundle.expert_names()]

    def load(self, key: ExpertKey) -> ExpertWeights:
        """Read one."""
        name, generation = self._originals[int(key.name[4:]) % len(self._originals)]
        return renamed(self._loader.load(name, generation), key.name, key.generation)


def slots(context: Context) -> list[Figure]:
    """Slots for 16 experts; 8 sequences at once with pairs of experts."""
    bundle = Bundle.open(context.bundle)
    source = CopiesOnDisk(bundle)
    # Two engines live side by side.
    options = replace(defaults(), model=replace(defaults().model, kv_bytes=2**27))
    registered = context.size(REGISTERED, 40)
    keys = [ExpertKey(f"copy{number}", 1) for number in range(registered)]
    few = EngineAlone(bundle.shared_path, [source.load(key) for key in keys[:ACTIVE]], options=options)
    many = EngineAlone(bundle.shared_path, options=options, pool=SlotPool(max_experts=ACTIVE), source=source)
    for key in keys:
        many.register(key)
    some = Load(
        tuple(few.experts),
        few.vocabulary,
        prompt_tokens=context.size(64, 16),
        new_tokens=context.size(64, 6),
    )
    number = context.size(16, 8)

    def turning(salt: int) -> float:
        """Other 16 experts in every run, none of which has a slot at its beginning."""
        first = salt * ACTIVE % (registered - ACTIVE)
        names = tuple(key.name for key in keys[first : first + ACTIVE])
        return many.run(replace(some, experts=names).requests(number, salt), 8).rate

    runs: dict[str, Run[float]] = {
        "few": lambda salt: few.run(some.requests(number, salt), 8).rate,
        "many": lambda salt: many.run(some.requests(number, salt), 8).rate,
    }
    for run in runs.values():
        run(0)
    found = alternate(runs, context.rounds)
    loads = many.engine.residency.stats.loads
    moving = alternate({"few": runs["few"], "turning": turning}, context.rounds, first=1)
    loaded = many.engine.residency.stats.loads - loads
    note = f"pairs among {ACTIVE} experts; prompt {some.prompt_tokens}, {some.new_tokens} new, {number} requests, "
    note += "8 at once"
    return [
        context.figure(
            f"{registered} registered, {ACTIVE} active / {ACTIVE} registered",
            [a / b for a, b in zip(found["many"], found["few"], strict=True)],
            "x throughput",
            "higher",
            at_least=0.95,
            aim=1.0,
            note=f"{note}; slots for {ACTIVE}",
        ),
        context.figure(
            f"{registered} registered, another {ACTIVE} active in every run / {ACTIVE} registered",
            [a / b for a, b in zip(moving["turning"], moving["few"], strict=True)],
            "x throughput",
            "higher",
            note=f"{note}; each run begins without one of its experts in a slot: {loaded} loads from disk",
        ),
    ]
