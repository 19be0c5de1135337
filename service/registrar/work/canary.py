"""Questions that a new generation must answer before it may serve; greedy, on the running engine."""

import asyncio
from collections.abc import Sequence
from typing import Any

from experts.registry.records import new_id
from experts.routing import prompt_forms, render_prompts
from service.core import ExpertKey, Failed, GenerationRequest, RoutingChoice, SamplingParams, TextDelta
from service.errors import ExpertRejectedError, QueueFullError
from service.registrar.checks import Canary
from service.registrar.work.live import Stage

_LONGEST = 256
"""Tokens of an answer that shall contain something."""

_MARGIN = 16
"""Tokens beyond the expected ones, so that an answer that goes on is seen to."""

_TOGETHER = 4
"""Asked at once: requests of clients come first."""

_PAUSE_SECONDS = 0.2
_SHOWN = 500
"""Characters of an answer in a report."""


async def ask_all(live: Stage, key: ExpertKey, canaries: Sequence[Canary], least: float) -> dict[str, Any]:
    """Score a staged generation; every prompt as a chat where the model has chats, as raw text where it has not.

    Args:
        live: where it is staged.
        key: the generation.
        canaries: prompts with what is expected.
        least: the share that must come out as expected.

    Returns:
        The score and every answer, for the generation's report.

    Raises:
        CanaryError: the score is lower; with the same report.
        TwinserveError: the engine cannot answer.
    """
    gate = asyncio.Semaphore(_TOGETHER)
    forms = len(prompt_forms(live.tokenizer))
    rendered = await asyncio.to_thread(render_prompts, live.tokenizer, [it.prompt for it in canaries])

    async def one(canary: Canary, ids: Sequence[int]) -> dict[str, Any]:
        async with gate:
            answer = await _answer(live, key, canary, ids)
        return {
            "prompt": canary.prompt[:_SHOWN],
            "expected": canary.expected[:_SHOWN],
            "match": canary.match,
            "answer": answer[:_SHOWN],
            "passed": _passes(canary, answer),
        }

    answers = await asyncio.gather(*map(one, canaries, rendered[::forms]))
    score = sum(answer["passed"] for answer in answers) / max(len(answers), 1)
    report = {"score": score, "least": least, "answers": answers}
    if score < least:
        raise CanaryError(key, score, least, report)
    return report


class CanaryError(ExpertRejectedError):
    """A generation answered too few of its canary prompts as expected.

    Attributes:
        report: the score and every answer.
    """

    def __init__(self, key: ExpertKey, score: float, least: float, report: dict[str, Any]) -> None:
        failed = sum(not answer["passed"] for answer in report["answers"])
        super().__init__(
            f"The expert {key} answered {failed} of {len(report['answers'])} canary prompts otherwise than "
            f"expected: its score {score:.3g} is below canary_min_score = {least:g}. The job's report has the "
            "answers; nothing went live.",
            param="canary_prompts",
        )
        self.report = report


async def _answer(live: Stage, key: ExpertKey, canary: Canary, ids: Sequence[int]) -> str:
    expected = len(live.tokenizer(canary.expected, add_special_tokens=False)["input_ids"])
    limit = expected + _MARGIN if canary.match == "exact" else max(expected + _MARGIN, _LONGEST)
    room = live.max_context - len(ids)
    if room < 1:
        raise ExpertRejectedError(
            f"The canary prompt {canary.prompt[:40]!r} has {len(ids)} tokens; the context is "
            f"{live.max_context}: shorten it.",
            param="canary_prompts",
        )
    request = GenerationRequest(
        id=new_id("canary"),
        prompt_ids=tuple(ids),
        sampling=SamplingParams(max_tokens=min(limit, room), temperature=0.0),
        routing=RoutingChoice(gates={key.name: 1.0}, generations={key.name: key.generation}),
        client="twinserve canary",
    )
    while True:
        try:
            events = live.submit(request)
            break
        except QueueFullError:
            await asyncio.sleep(_PAUSE_SECONDS)
    parts: list[str] = []
    try:
        async for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, TextDelta):
                parts.append(event.text)
    finally:
        events.cancel()
    return "".join(parts)


def _passes(canary: Canary, answer: str) -> bool:
    if canary.match == "exact":
        return answer.strip() == canary.expected.strip()
    return canary.expected in answer
