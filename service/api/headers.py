"""Headers that say which experts made an answer; of ASCII, whatever an expert is called."""

from collections.abc import Sequence
from urllib.parse import quote

from service.core import RoutingOutcome

PATTERN = "X-Twinserve-Pattern"
GENERATIONS = "X-Twinserve-Generations"
ROUTER_GENERATION = "X-Twinserve-Router-Generation"

_LONGEST = 1024
"""Characters of one header: proxies refuse long ones, and gates of a hundred experts are in the body too."""


def routing_headers(outcomes: Sequence[RoutingOutcome | None]) -> dict[str, str]:
    """The headers of an answer whose prompts came to these outcomes; none where they differ."""
    first = outcomes[0] if outcomes else None
    if first is None or any(one is None or _said(one) != _said(first) for one in outcomes):
        return {}
    return _said(first)


def _said(outcome: RoutingOutcome) -> dict[str, str]:
    generations = ",".join(f"{name}={number}" for name, number in sorted(outcome.generations.items()))
    told = {PATTERN: _plain(outcome.pattern), GENERATIONS: _plain(generations or "none")}
    if outcome.router_generation is not None:
        told[ROUTER_GENERATION] = str(outcome.router_generation)
    return told


def _plain(text: str) -> str:
    safe = quote(text, safe=" !#$&'()*+,/:;=?@[]{}<>|^~")
    return safe if len(safe) <= _LONGEST else safe[: _LONGEST - 3] + "..."
