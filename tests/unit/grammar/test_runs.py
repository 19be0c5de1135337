"""One sequence's way through a grammar, and what it shares with others."""

import json
import random
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from service.errors import InvalidRequestError, LimitExceededError
from service.grammar import Grammars, Run
from service.grammar import grammar as module
from tests.unit.grammar.walking import END, allowed_ids, compiled, grammars, spell, wander


def test_a_run_ends_as_soon_as_nothing_can_follow(made: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    run = Run(compiled(made, "regex", "[0-9]{1,2}"), "field")
    assert END not in allowed_ids(run)
    assert not run.complete
    spell(run, tokenizer, "1")
    assert END in allowed_ids(run)
    assert not run.complete
    spell(run, tokenizer, "2")
    assert run.complete


def test_the_end_token_completes_it(made: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    run = Run(compiled(made, "regex", "[0-9]*"), "field")
    run.advance(END)
    assert run.complete


def test_asking_does_not_advance(made: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    run = Run(compiled(made, "regex", "ab"), "field")
    first = allowed_ids(run)
    assert allowed_ids(run) == first
    spell(run, tokenizer, "a")
    assert allowed_ids(run) != first


def test_runs_of_one_grammar_do_not_touch_each_other(
    made: Grammars, tokenizer: PreTrainedTokenizerBase
) -> None:
    grammar = compiled(made, "regex", "ab|cd")
    left, right = Run(grammar, "field"), Run(grammar, "field")
    spell(left, tokenizer, "a")
    spell(right, tokenizer, "cd")
    assert right.complete
    spell(left, tokenizer, "b")
    assert left.complete


def test_a_full_lexer_is_left_to_those_who_filled_it(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = r"(a|b)*a(a|b){9}c"
    monkeypatch.setattr(module, "_LEXER_STATES", 150)
    made = grammars(tokenizer)
    grammar = compiled(made, "regex", pattern)
    quiet = Run(grammar, "field")
    spell(quiet, tokenizer, "aab")
    loud = Run(grammar, "field")
    draw = random.Random(1)
    letters = "".join(draw.choices("ab", k=3000))
    with pytest.raises(LimitExceededError, match="too complex"):
        spell(loud, tokenizer, letters)
    spell(quiet, tokenizer, "bbabaabac")
    assert quiet.complete
    assert grammar.worn
    renewed = compiled(made, "regex", pattern)
    assert renewed is not grammar
    assert made.compiled == 2


def test_masks_that_take_too_long_end_their_run_alone(
    made: Grammars, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compiled(made, "regex", "(a|b)*")
    monkeypatch.setattr(module, "_BURST_SECONDS", -1.0)
    with pytest.raises(LimitExceededError, match="too much time") as ended:
        Run(grammar, "guided_regex").allowed()
    assert ended.value.param == "guided_regex"
    monkeypatch.undo()
    assert Run(grammar, "field").allowed().any()


def test_a_token_that_was_not_allowed_is_an_error_of_ours(
    made: Grammars, tokenizer: PreTrainedTokenizerBase
) -> None:
    run = Run(compiled(made, "regex", "a"), "field")
    with pytest.raises(Exception, match="forbids") as failed:
        spell_anyway(run, tokenizer, "x")
    assert not isinstance(failed.value, InvalidRequestError)


def spell_anyway(run: Run, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    for token in tokenizer.encode(text, add_special_tokens=False):
        run.advance(token)


_LEAVES = st.one_of(
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-99, 99),
        st.integers(0, 500),
    ),
    st.builds(
        lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "format": "date"},
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
        ]
    ),
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=4)), min_size=1, max_size=4
    ).map(lambda values: {"enum": values}),
    st.text(max_size=6).map(lambda value: {"const": value}),
)


def _containers(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    names = st.text(min_size=1, max_size=4)
    members = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        st.builds(
            lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3)
        ),
        members.flatmap(
            lambda properties: (
                st.sets(st.sampled_from(sorted(properties))).map(
                    lambda required: {
                        "type": "object",
                        "properties": properties,
                        "required": sorted(required),
                        "additionalProperties": False,
                    }
                )
                if properties
                else st.just({"type": "object", "additionalProperties": False})
            )
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda ways: {"anyOf": ways}),
    )


@settings(max_examples=40, deadline=None)
@given(schema=st.recursive(_LEAVES, _containers, max_leaves=6), seed=st.integers(0, 2**16))
def test_whatever_the_schema_its_texts_validate(
    made: Grammars, tokenizer: PreTrainedTokenizerBase, schema: dict, seed: int
) -> None:
    text = wander(compiled(made, "json_schema", schema), tokenizer, seed)
    jsonschema.validate(json.loads(text), schema)


_PATTERNS = st.recursive(
    st.one_of(
        st.text(alphabet="abcxyz 019é-", min_size=1, max_size=3).map(re.escape),
        st.sampled_from([r"\d", "[a-f]", "[^a-z]", r"\w", "."]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda ways: f"(?:{'|'.join(ways)})"),
        st.builds(
            lambda one, least, more: f"(?:{one}){{{least},{least + more}}}",
            inner,
            st.integers(0, 2),
            st.integers(0, 3),
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(pattern=_PATTERNS, seed=st.integers(0, 2**16))
def test_whatever_the_regex_its_texts_match(
    made: Grammars, tokenizer: PreTrainedTokenizerBase, pattern: str, seed: int
) -> None:
    text = wander(compiled(made, "regex", pattern), tokenizer, seed)
    assert re.fullmatch(pattern, text), (pattern, text)
