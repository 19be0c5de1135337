"""The family's results table: every method on every skill, written after each row."""

from collections.abc import Sequence
from pathlib import Path

from experts.embedded.base import ensure_base
from experts.embedded.family import family
from experts.embedded.tasks import family_tasks
from experts.evaluation.comparison import compare
from experts.evaluation.suite import Log
from experts.evaluation.table import Table


def evaluate_family(
    factors: Path,
    work: Path,
    output: Path,
    validation: int,
    test: int,
    ranks: Sequence[int],
    log: Log,
) -> Table:
    """Compare all methods on the experts in `factors`; write `methods.json` and `.md` to `output`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experts.checkpoint import Checkpoint, open_fine_tune
    from experts.evaluation.generation import plain_generator
    from experts.evaluation.weights import PatchedModel

    folder = ensure_base(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # left in eval mode
    base = Checkpoint.open(folder)
    skills = family()
    fine_tunes = {skill.name: open_fine_tune(skill.name, factors / skill.name, base) for skill in skills}
    output.mkdir(parents=True, exist_ok=True)

    def save(table: Table) -> None:
        (output / "methods.json").write_text(table.to_json(), encoding="utf-8")
        (output / "methods.md").write_text(table.to_markdown(), encoding="utf-8")

    return compare(
        base=base,
        fine_tunes=fine_tunes,
        tasks=family_tasks(skills, tokenizer, work / "downloads", validation, test),
        model=PatchedModel(model),
        generate=plain_generator(model, tokenizer),
        shared=None,
        ranks=ranks,
        log=log,
        save=save,
    )
