"""A compiled constraint, and one sequence's way through it."""

import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from service.core import Constraint
from service.errors import InvalidRequestError, LimitExceededError, RequestFailedError
from service.grammar.definition import definition
from service.grammar.faults import DefinitionError, shortened
from service.grammar.vocabulary import Vocabulary

_LEXER_STATES = 50_000
"""About 30 MB: all sequences of a grammar share its lexer, which grows with what they write."""

_BURST_SECONDS = 1.0
_SECONDS_A_TOKEN = 0.02
"""Processor time that a sequence's masks may take: everybody waits for the slowest one of a step."""

_RENEWABLE_SECONDS = 0.1
"""Compiling that was faster can be done again between two steps."""

_COMPLEX = "simplify it: fewer alternatives that begin alike, smaller repetitions"


def _limits() -> LLParserLimits:
    return LLParserLimits(verbose_errors=False, max_lexer_states=_LEXER_STATES)


class Grammar:
    """A compiled constraint; any number of sequences may start from it, on one thread at a time.

    Args:
        constraint: what to compile.
        vocabulary: of the served model.

    Attributes:
        worn: its lexer has come to its bounds: whoever starts next needs a new one.

    Raises:
        DefinitionError: it cannot be compiled, or no text matches it.
    """

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.worn = False
        started = time.thread_time()
        self._definition = definition(constraint)
        self._fresh = self.renewed()
        self.seconds = time.thread_time() - started
        named = self._definition if constraint.kind == "grammar" else None
        self.possible = vocabulary.allowed(named)
        self._try()

    def start(self) -> LLMatcher:
        """Before the first token; shares the lexer with all others."""
        return self._fresh.deep_copy()

    def renewed(self) -> LLMatcher:
        """Before the first token, with a lexer of its own.

        Raises:
            DefinitionError: the library refuses the grammar.
        """
        matcher = LLMatcher(self.vocabulary.made, self._definition, log_level=0, limits=_limits())
        if matcher.is_error():
            raise DefinitionError(shortened(matcher.get_error()))
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise DefinitionError(shortened("; ".join(warnings)))
        return matcher

    def _try(self) -> None:
        """Compute the first mask: it costs most, and some definitions fail at once."""
        try:
            Run(self, "").allowed()
        except LimitExceededError as error:
            raise DefinitionError(f"is too complex; {_COMPLEX}", limit=True) from error
        except InvalidRequestError as error:
            raise DefinitionError("matches nothing that this model can write") from error


class Run:
    """One sequence's way through a grammar.

    Args:
        grammar: where it starts.
        param: the field that brought it, for messages.
    """

    def __init__(self, grammar: Grammar, param: str) -> None:
        self._grammar = grammar
        self._param = param
        self._matcher = grammar.start()
        self._own = False
        self._tokens: list[int] = []
        self._spent = 0.0
        self._bits = np.zeros((1, grammar.vocabulary.words), dtype=np.int32)

    @property
    def complete(self) -> bool:
        """Nothing more can come."""
        return self._matcher.is_stopped()

    @property
    def ends(self) -> Sequence[int]:
        """The end-of-sequence tokens."""
        return self._grammar.vocabulary.ends

    def advance(self, token: int) -> None:
        """Take a chosen token.

        Raises:
            LimitExceededError: the grammar has become too complex.
            RequestFailedError: the token was not allowed.
        """
        self._tokens.append(token)
        if not self._matcher.consume_token(token):
            self._recover()

    def allowed(self) -> NDArray[np.bool_]:
        """Of each token of the vocabulary, whether it may come next; asked again, the same.

        Raises:
            LimitExceededError: the grammar has become too complex.
            InvalidRequestError: no token of the vocabulary goes on from here.
        """
        started = time.thread_time()
        fill_next_token_bitmask(self._matcher, self._bits)
        if self._matcher.is_error():
            self._recover()
            fill_next_token_bitmask(self._matcher, self._bits)
            self._check()
        self._spent += time.thread_time() - started
        if self._spent > _BURST_SECONDS + _SECONDS_A_TOKEN * len(self._tokens):
            raise self._too_complex("it takes too much time to follow")
        bits = self._bits[0] & self._grammar.possible
        if not bits.any():
            raise self._dead_end()
        return np.unpackbits(bits.view(np.uint8), bitorder="little").view(np.bool_)

    def _recover(self) -> None:
        """Go the same way with a lexer of its own: the shared one may be full of what others wrote."""
        grammar = self._grammar
        grammar.worn = True  # or broken: to compile it again does no harm
        if self._own or grammar.seconds > _RENEWABLE_SECONDS:
            self._check()
        self._own = True
        self._matcher = grammar.renewed()
        self._matcher.consume_tokens(self._tokens)
        self._check()

    def _check(self) -> None:
        """Raise what the library's message means, if it has one."""
        if not self._matcher.is_error():
            return
        reason = self._matcher.get_error()
        if "doesn't satisfy the grammar" in reason:
            raise RequestFailedError(f"a token was chosen that {self._param or 'the grammar'} forbids")
        if reason.startswith("NoExtension"):
            raise self._dead_end()
        raise self._too_complex(shortened(reason))

    def _dead_end(self) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self._param}: after {len(self._tokens)} tokens nothing that this model can write follows.",
            param=self._param,
        )

    def _too_complex(self, reason: str) -> LimitExceededError:
        return LimitExceededError(
            f"{self._param}: after {len(self._tokens)} tokens it has become too complex ({reason}); {_COMPLEX}.",
            param=self._param,
        )
