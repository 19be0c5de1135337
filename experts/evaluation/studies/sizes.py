"""Quality against bytes: each form of an exclusive vector at many sizes, oracle gates."""

from experts.compression.curve import FRACTIONS, Form
from experts.evaluation.jobs import Job
from experts.evaluation.runner import Unit
from experts.evaluation.studies.options import Options, Settings
from experts.evaluation.systems import Coded
from experts.merging import TaskArithmetic

STUDY = "bytes"
FACTORED: tuple[Form, ...] = ("bfloat16", "int8", "int4", "mixed")
DENSE: tuple[Form, ...] = ("sparse", "ternary", "dare")
LARGEST_FACTORED = 0.1
"""Beyond it the factors of a LoRA's exclusive vector are whole and no more bytes are used."""
DENSE_FRACTIONS = (0.002, 0.01, 0.05, 0.25, 1.0)


def plan(settings: Settings, options: Options) -> list[Unit]:
    """Every form and size on the first setting's own tasks."""
    setting = next(iter(settings.values()))
    experts = tuple(setting.experts)
    shared = TaskArithmetic(scale=options.scale)
    points: list[tuple[Form, float | None]] = [
        *((form, size) for size in FRACTIONS if size <= LARGEST_FACTORED for form in FACTORED),
        ("one-bit", None),
        *((form, size) for size in DENSE_FRACTIONS for form in DENSE),
    ]
    return [
        (
            Job(
                STUDY,
                setting.name,
                form if size is None else f"{form} {100 * size:g} %",
                (Coded(shared=shared, form=form, fraction=size),),
                experts,
                experts,
                options.items,
                options.validation,
            ),
        )
        for form, size in points
    ]
