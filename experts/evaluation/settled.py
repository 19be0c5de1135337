"""When a text that is still being generated can no longer change its score, by metric.

Exact: an answer cut off where it is settled scores what the whole answer would have scored, because greedy decoding
only ever appends. A metric without a rule is scored on whole answers.
"""

import re
from collections.abc import Callable

from experts.evaluation.scoring import CANDIDATES

Settled = Callable[[str], bool]

_HALF = "�"
"""What a tokenizer shows for the first bytes of a character that is not complete yet."""


def settled(metric: str, reference: str) -> Settled | None:
    """The rule for one reference; None where the metric has none."""
    rules = {"exact": _exact, "tokens": _tokens, "mentions": _mentions}
    make = rules.get(metric)
    return None if make is None else make(reference)


def _exact(reference: str) -> Settled:
    """It is not the beginning of the reference, so it can never be equal to it."""
    wanted = reference.strip()
    return lambda text: not wanted.startswith(text.rstrip(_HALF).strip())


def _tokens(reference: str) -> Settled:
    """The complete tokens are at least as many edits away from every beginning of the reference as it has tokens.

    The smallest entry of a row of the edit distance's table never falls from one row to the next.
    """
    expected = reference.split()

    def rule(text: str) -> bool:
        complete = text.rsplit(None, 1)[0].split() if text and not text[-1].isspace() else text.split()
        row = list(range(len(expected) + 1))
        for i, token in enumerate(complete, start=1):
            above, row[0] = row[0], i
            for j, other in enumerate(expected, start=1):
                above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (token != other))
        return min(row) >= max(1, len(expected))

    return rule


def _mentions(reference: str) -> Settled:
    """One of the candidates stands there as a whole word with something behind it."""
    words = "|".join(re.escape(candidate) for candidate in reference.split(CANDIDATES))
    found = re.compile(rf"(?<![\w-])(?:{words})(?=[^\w-])", re.IGNORECASE)
    return lambda text: found.search(text.rstrip(_HALF)) is not None
