"""`/v1/feedback`: clients rate answers. `/admin/feedback`: operators look, freeze, go back."""

from dataclasses import asdict

from fastapi import APIRouter, Request, Response

from service.api.refusals import refusals
from service.api.wire.feedback import (
    ChangeAnswer,
    FeedbackAction,
    FeedbackAnswer,
    FeedbackBody,
    FeedbackState,
)
from service.errors import AlreadyRatedError, FeedbackDisabledError, RequestNotFoundError
from service.feedback import Feedback

_RATING = refusals(FeedbackDisabledError, RequestNotFoundError, AlreadyRatedError)


def add_routes(router: APIRouter, feedback: Feedback | None) -> None:
    """Put `/v1/feedback` and `/admin/feedback` on `router`; without feedback they say that it is off."""

    def state() -> Response:
        known = {"enabled": True, **feedback.describe()} if feedback is not None else {"enabled": False}
        return Response(FeedbackState.model_validate(known).dump(), media_type="application/json")

    @router.post("/v1/feedback", response_model=FeedbackAnswer, responses=_RATING)
    async def rate(request: Request, body: FeedbackBody) -> Response:
        """Rate an answer: the router learns which experts serve such prompts well."""
        loop = _enabled(feedback)
        client = request.state.client
        applied = await loop.rate(f"{body.request_id}-{body.choice}", body.reward, client)
        answer = FeedbackAnswer(
            request_id=body.request_id,
            choice=body.choice,
            applied=applied.applied,
            explored=applied.explored,
            version=applied.version,
            experts={name: ChangeAnswer(**asdict(change)) for name, change in applied.experts.items()},
        )
        return Response(answer.dump(), media_type="application/json")

    @router.get("/admin/feedback", response_model=FeedbackState)
    async def look() -> Response:
        """Tell what was learnt, and which versions can be gone back to."""
        return state()

    @router.post("/admin/feedback", response_model=FeedbackState, responses=refusals(FeedbackDisabledError))
    async def act(body: FeedbackAction) -> Response:
        """Freeze, resume, reset, or roll back."""
        loop = _enabled(feedback)
        if body.action == "rollback" and body.version is not None:
            await loop.rollback(body.version)
        elif body.action == "reset":
            await loop.reset()
        else:
            loop.frozen = body.action == "freeze"
        return state()


def _enabled(feedback: Feedback | None) -> Feedback:
    if feedback is None:
        raise FeedbackDisabledError("Feedback is off: start the server with TWINSERVE_FEEDBACK=true.")
    return feedback
