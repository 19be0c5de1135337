"""What is wrong with a constraint, before it is known which field of which request brought it."""

import re

from service.errors import InvalidRequestError, LimitExceededError

_LONGEST_REASON = 300
"""Characters of the library's messages, which repeat the definition."""

_SHOWN = re.compile(r"\s*(\d+ \||\^+\s*\Z)")
"""A line that repeats the definition, or points into it."""


class DefinitionError(Exception):
    """A constraint that cannot be compiled.

    Attributes:
        reason: says what and the mend.
        limit: it is a bound that was exceeded.
    """

    def __init__(self, reason: str, *, limit: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.limit = limit

    def about(self, param: str) -> InvalidRequestError:
        """The error for a request that sent it in that field."""
        kind = LimitExceededError if self.limit else InvalidRequestError
        return kind(f"{param}: {self.reason}.", param=param)


def shortened(message: str) -> str:
    """A message of the library's in one line of moderate length, without a final full stop."""
    told = (line for line in message.replace("<non-verbose/>", "").splitlines() if not _SHOWN.match(line))
    line = " ".join(" ".join(told).split())
    if len(line) > _LONGEST_REASON:
        line = line[:_LONGEST_REASON] + " …"
    return line.rstrip(". ")
