"""The whole comparison of a family, from base and fine-tunes to a table."""

from collections.abc import Callable, Mapping, Sequence

from experts.checkpoint import Checkpoint, FineTune
from experts.evaluation.generation import Generate
from experts.evaluation.methods import (
    Candidate,
    bare_base,
    expert_alone,
    grid,
    static_merge,
    truncated,
    twin_oracle,
)
from experts.evaluation.scoring import Score
from experts.evaluation.suite import Log, row_of, scores_of, tune
from experts.evaluation.table import MethodRow, Table, method_row
from experts.evaluation.task import Task, measure
from experts.evaluation.weights import PatchedModel
from experts.merging import Averaging, MergeMethod


def compare(
    base: Checkpoint,
    fine_tunes: Mapping[str, FineTune],
    tasks: Sequence[Task],
    model: PatchedModel,
    generate: Generate,
    shared: MergeMethod | None,
    ranks: Sequence[int],
    log: Log,
    save: Callable[[Table], None],
) -> Table:
    """Measure every method and return the table; `save` gets it after each row.

    Args:
        base: θ₀.
        fine_tunes: name → expert; the names are the tasks'.
        tasks: what to measure on.
        model: a plain model of the base.
        generate: greedy generation on that model.
        shared: the merge that Twin's shared expert is; the tuned Task Arithmetic if None.
        ranks: ranks of Twin and of the truncated task vector.
        log: called with a line for each score.
        save: called with the table so far.
    """
    everyone = list(fine_tunes.values())
    alone = expert_alone(base, fine_tunes)
    experts = scores_of(alone, tasks, model, generate, "test", log)
    yardstick = scores_of(alone, tasks, model, generate, "validation", log)
    rows: list[MethodRow] = []

    def record(row: MethodRow) -> None:
        rows.append(row)
        log(f"{row.method}: {row.average:.1f} ± {row.average_error:.1f} normalised")
        save(Table(tasks=tuple(task.name for task in tasks), rows=tuple(rows)))

    def run(candidate: Candidate) -> None:
        record(row_of(candidate, tasks, experts, model, generate, log))

    def best(kind: str) -> MergeMethod:
        methods = {f"{method}": method for method in grid(kind)}
        candidates = [static_merge(kind, base, everyone, method) for method in methods.values()]
        winner = tune(candidates, tasks, yardstick, model, generate, log)
        run(winner)
        return list(methods.values())[candidates.index(winner)]

    run(bare_base())
    record(method_row(alone.name, alone.note, alone.expert_bytes, experts, experts))
    run(static_merge("averaging", base, everyone, Averaging()))
    arithmetic = best("task-arithmetic")
    best("ties")
    best("dare-ties")
    for rank in ranks:
        run(truncated(base, fine_tunes, rank))
        run(twin_oracle(base, fine_tunes, shared or arithmetic, rank))
    return Table(tasks=tuple(task.name for task in tasks), rows=tuple(rows))


def served_row(
    name: str,
    note: str,
    expert_bytes: int,
    tasks: Sequence[Task],
    experts: dict[str, Score],
    generate: Generate,
) -> MethodRow:
    """A row for anything that answers texts by itself: Twin with its router, behind the server's engine."""
    scores = {task.name: measure(generate, task, task.test) for task in tasks}
    return method_row(name, note, expert_bytes, scores, experts)
