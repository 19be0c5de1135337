"""`POST /v1/feedback` and `/admin/feedback`."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from service.api.wire.answers import Answer
from service.api.wire.base import WireModel


class FeedbackBody(WireModel):
    """A rating of one answer.

    Attributes:
        request_id: the `id` of a completion or chat whose gates the router chose.
        reward: from -1, as bad as can be, to 1.
        choice: which of its choices, by `index`.
    """

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=160)]
    reward: float = Field(ge=-1, le=1)
    choice: int = Field(default=0, ge=0, le=2**31 - 1)


class FeedbackAction(WireModel):
    """What an operator wants.

    Attributes:
        action: rollback goes back to a kept `version`, reset to the static router; freeze stops learning and
            exploring and keeps the adjustments, resume ends that.
    """

    action: Literal["rollback", "reset", "freeze", "resume"]
    version: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _version_for_rollback(self) -> "FeedbackAction":
        if (self.action == "rollback") != (self.version is not None):
            raise ValueError("'version' goes with action rollback, and with no other")
        return self


class ChangeAnswer(Answer):
    """One expert's part in the answer, and the adjustment of its log-odds for this very prompt."""

    part: float
    before: float
    after: float
    updates: int
    mean_reward: float | None


class FeedbackAnswer(Answer):
    """What a rating changed; `applied` is false while the feedback is frozen, or when an expert is gone."""

    object: Literal["feedback"] = "feedback"
    request_id: str
    choice: int
    applied: bool
    explored: bool
    version: int
    experts: dict[str, ChangeAnswer]


class ArmAnswer(Answer):
    """What was learnt of one expert: ratings, whole answers among them, and their mean reward."""

    updates: int
    answers: float
    mean_reward: float | None


class FeedbackState(Answer):
    """The feedback as operators see it; everything but `enabled` is null where it is off."""

    enabled: bool
    frozen: bool | None = None
    version: int | None = None
    updates: int | None = None
    remembered: int | None = None
    epsilon: float | None = None
    cap: float | None = None
    experts: dict[str, ArmAnswer] | None = None
    versions: list[int] | None = None
