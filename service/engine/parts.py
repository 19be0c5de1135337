"""What an engine is put together from."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from service.engine.correction import Correction
from service.engine.merged import MergedWeights
from service.engine.model import SharedModel
from service.engine.residency import Residency
from service.engine.routing import Dispatcher
from service.scheduler.scheduler import Scheduler


@dataclass(slots=True)
class EngineParts:
    """What an engine is put together from.

    Attributes:
        backend: the fast tokenizer's own object.
        end_ids: the model's end-of-sequence token ids.
        merged: materialised weights; None where the model has no compiled layers.
        single_pass: route prompts in the middle of their own prefill where that is possible.
        correction: of the features that rounded weights give; None where none are rounded.
    """

    model: SharedModel
    scheduler: Scheduler
    dispatcher: Dispatcher
    residency: Residency
    backend: Tokenizer
    end_ids: frozenset[int]
    merged: MergedWeights | None = None
    single_pass: bool = False
    correction: Correction | None = None
