"""Compiling off the event loop: once, bounded in time, size and number, and remembered."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import PreTrainedTokenizerBase

from service.core import Constraint
from service.errors import InvalidRequestError, LimitExceededError, QueueFullError, ShuttingDownError
from service.grammar import Grammars
from service.grammar import grammar as module
from tests.unit.grammar.walking import compiled, grammars


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Compiling threads stand still until it is set."""
    opened = threading.Event()
    definition = module.definition

    def late(constraint: Constraint) -> str:
        assert opened.wait(30)
        return definition(constraint)

    monkeypatch.setattr(module, "definition", late)
    yield opened
    opened.set()


def prepared(made: Grammars) -> None:
    """The tokenizer has been read."""
    made.prepare()
    assert made._vocabulary.made is not None


def test_a_constraint_is_compiled_once_whatever_field_brought_it(tokenizer: PreTrainedTokenizerBase) -> None:
    made = grammars(tokenizer)
    first = compiled(made, "regex", "a+", param="guided_regex")
    assert compiled(made, "regex", "a+", param="structured_outputs.regex") is first
    assert made.compiled == 1
    assert compiled(made, "choice", ["a"]) is not first


def test_requests_at_the_same_time_wait_for_the_same_work(
    tokenizer: PreTrainedTokenizerBase, gate: threading.Event
) -> None:
    made = grammars(tokenizer)

    async def together() -> None:
        asked = [asyncio.ensure_future(made.get(Constraint("regex", "a+"))) for _ in range(5)]
        given_up = asked.pop()
        await asyncio.sleep(0)
        given_up.cancel()
        gate.set()
        found = await asyncio.gather(*asked)
        assert len(set(found)) == 1
        with pytest.raises(asyncio.CancelledError):
            await given_up

    asyncio.run(together())
    assert made.compiled == 1


def test_a_fault_is_remembered_and_told_under_each_requests_own_field(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    made = grammars(tokenizer)
    for param in ("guided_regex", "structured_outputs.regex"):
        with pytest.raises(InvalidRequestError) as refused:
            compiled(made, "regex", "(", param=param)
        assert refused.value.param == param
    assert made.compiled == 1


def test_the_least_recently_used_one_is_forgotten(tokenizer: PreTrainedTokenizerBase) -> None:
    made = grammars(tokenizer, remembered=2)
    a = compiled(made, "regex", "a")
    compiled(made, "regex", "b")
    assert compiled(made, "regex", "a") is a
    compiled(made, "regex", "c")
    assert compiled(made, "regex", "a") is a
    assert made.compiled == 3
    compiled(made, "regex", "b")
    assert made.compiled == 4


def test_compiling_that_takes_too_long_is_refused_and_found_when_it_is_done(
    tokenizer: PreTrainedTokenizerBase, gate: threading.Event
) -> None:
    made = grammars(tokenizer, max_seconds=0.05)
    prepared(made)
    with pytest.raises(LimitExceededError, match="max_grammar_seconds") as refused:
        compiled(made, "regex", "a+", param="guided_regex")
    assert refused.value.param == "guided_regex"
    gate.set()
    made.close(wait=True)
    compiled(made, "regex", "a+")
    assert made.compiled == 1


def test_who_waits_for_the_tokenizer_to_be_read_is_not_called_too_complex(
    tokenizer: PreTrainedTokenizerBase, gate: threading.Event
) -> None:
    made = grammars(tokenizer, max_seconds=0.05)
    with pytest.raises(QueueFullError):
        compiled(made, "regex", "a+")
    gate.set()


def test_who_waits_behind_others_is_told_to_come_again(
    tokenizer: PreTrainedTokenizerBase, gate: threading.Event
) -> None:
    made = grammars(tokenizer, max_seconds=0.05)
    prepared(made)

    async def many() -> list[BaseException | object]:
        return await asyncio.gather(
            *(made.get(Constraint("regex", f"a{{{count}}}")) for count in range(1, 70)),
            return_exceptions=True,
        )

    refused = asyncio.run(many())
    kinds = [type(error) for error in refused]
    assert kinds.count(LimitExceededError) == 2
    assert kinds.count(QueueFullError) == 67
    assert all(error.retry_after for error in refused if isinstance(error, QueueFullError))


def test_a_long_definition_is_not_even_begun(tokenizer: PreTrainedTokenizerBase) -> None:
    made = grammars(tokenizer, max_bytes=100)
    compiled(made, "regex", "a" * 100)
    with pytest.raises(LimitExceededError, match="max_grammar_bytes"):
        compiled(made, "regex", "é" * 51)
    assert made.compiled == 1


def test_after_closing_nothing_is_compiled(tokenizer: PreTrainedTokenizerBase) -> None:
    made = grammars(tokenizer)
    made.close()
    with pytest.raises(ShuttingDownError):
        compiled(made, "regex", "a")


def test_work_that_closing_cancels_ends_its_requests(
    tokenizer: PreTrainedTokenizerBase, gate: threading.Event
) -> None:
    made = grammars(tokenizer)

    async def asked() -> list[object]:
        waiting = [asyncio.ensure_future(made.get(Constraint("regex", text))) for text in ("a", "b", "c")]
        await asyncio.sleep(0)
        made.close()
        gate.set()
        return list(await asyncio.gather(*waiting, return_exceptions=True))

    assert isinstance(asyncio.run(asked())[2], ShuttingDownError)


def test_several_event_loops_share_what_is_compiled(tokenizer: PreTrainedTokenizerBase) -> None:
    made = grammars(tokenizer)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: compiled(made, "regex", "[ab]+"), range(8)))
    assert len(found) == 1
    assert made.compiled == 1


DEEP = {
    "rules that call each other": (
        "grammar",
        "start: r0\n" + "".join(f'r{i}: "x" r{i + 1} "y"\n' for i in range(500)) + 'r500: "a"',
    ),
    "terminals in each other": (
        "grammar",
        "start: R0\n" + "".join(f'R{i}: "x" (R{i + 1} | "z")* "y"\n' for i in range(500)) + 'R500: "a"',
    ),
    "references to each other": (
        "json_schema",
        {
            "$defs": {
                **{f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(500)},
                "d500": {"type": "null"},
            },
            "$ref": "#/$defs/d0",
        },
    ),
    "brackets": ("grammar", "start: " + "(" * 25 + '"a"' + ")" * 25),
    "groups of a regex": ("regex", "(" * 100 + "a" + ")" * 100),
    "gbnf": (
        "grammar",
        "root ::= r0\n" + "".join(f'r{i} ::= "x" r{i + 1} "y"\n' for i in range(200)) + 'r200 ::= "a"',
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_deepest_definitions_that_are_taken_compile(made: Grammars, name: str) -> None:
    kind, text = DEEP[name]
    compiled(made, kind, text)


DEEP_ITEMS = '{"items":' * 7 + '{"$ref": "TARGET"}' + "}" * 7

TOO_LARGE = {
    "rules": ("grammar", "start: r0\n" + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(600)) + 'r600: "a"'),
    "brackets in rules": (
        "grammar",
        "start: r0\n" + "".join(f"r{i}: {'(' * 20}r{i + 1}{')' * 20}\n" for i in range(250)) + 'r250: "a"',
    ),
    "references": (
        "json_schema",
        {
            "$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(600)},
            "$ref": "#/$defs/d0",
        },
    ),
    "references in an embedded schema": (
        "grammar",
        "start: %json {"
        + ", ".join(f'"d{i}": {DEEP_ITEMS.replace("TARGET", f"#/d{i + 1}")}' for i in range(600))
        + "}",
    ),
    "nesting": ("json_schema", '{"items":' * 80 + "{}" + "}" * 80),
    "gbnf rules": ("grammar", "".join(f'r{i} ::= "x"\n' for i in range(300)) + 'root ::= "a"'),
    "gbnf brackets": ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "many ways": (
        "json_schema",
        {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i}]} for i in range(30)]},
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_larger_definitions_are_refused_within_the_bound(made: Grammars, name: str) -> None:
    kind, text = TOO_LARGE[name]
    with pytest.raises(InvalidRequestError) as refused:
        compiled(made, kind, text, param="structured_outputs.it")
    assert refused.value.param == "structured_outputs.it"
    assert refused.value.status == 400
