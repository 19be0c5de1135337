"""Answers that follow a grammar, in the engine: beside free ones, cut short, preempted, and failing alone."""

import asyncio
import json
import re

import jsonschema
import pytest

from service.core import Constraint, Failed, SamplingParams
from service.errors import LimitExceededError, RequestFailedError
from service.grammar import GrammarOptions, Grammars
from service.grammar import grammar as module
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import Harness, prompt_ids

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b", None]},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
FORMS = {
    "schema": Constraint("json_schema", json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}})),
    "regex": Constraint("regex", r"[a-c]{3}-\d{2,4}"),
    "choice": Constraint("choice", json.dumps(["yes", "no", "mäh 😀"])),
    "grammar": Constraint("grammar", 'start: "<" /[a-z]{1,6}/ ">"'),
}


def follows(form: str, text: str) -> None:
    """The text is one of that form."""
    if form == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif form == "regex":
        assert re.fullmatch(r"[a-c]{3}-\d{2,4}", text), text
    elif form == "choice":
        assert text in ("yes", "no", "mäh 😀")
    else:
        assert re.fullmatch("<[a-z]{1,6}>", text), text


def grammars_of(harness: Harness) -> Grammars:
    engine = harness.engine
    return Grammars(harness.tokenizer, engine.model.vocabulary, sorted(engine.end_ids), GrammarOptions())


class Served:
    """An engine with what compiles its constraints."""

    def __init__(self, path, **options) -> None:
        self.harness = Harness(path, **{"native": "off"} | options)
        self.grammars = grammars_of(self.harness)

    def submit(self, name: str, constraint: Constraint | None, prompt=None, leader=None, **sampling) -> None:
        grammar = asyncio.run(self.grammars.get(constraint)) if constraint is not None else None
        params = SamplingParams(**{"max_tokens": 100, "constraint": constraint} | sampling)
        prompt = prompt or prompt_ids(1, 12, VOCABULARY)
        self.harness.submit(name, prompt, {}, params, grammar=grammar, leader=leader)

    def answer(self, constraint: Constraint, **sampling):
        """One request that runs alone: its text and its end."""
        self.submit("only", constraint, **sampling)
        self.harness.run()
        return self.harness.text("only"), self.harness.finished("only")


@pytest.fixture(scope="module")
def served(llama) -> Served:
    """For tests that leave it idle."""
    return Served(llama)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_every_answer_has_its_form(served, form, temperature):
    for seed in range(8):
        served.submit(
            f"r{seed}", FORMS[form], prompt_ids(seed, 9, VOCABULARY), temperature=temperature, seed=seed
        )
    served.harness.run()
    for seed in range(8):
        assert served.harness.finished(f"r{seed}").reason == "stop"
        follows(form, served.harness.text(f"r{seed}"))
    served.harness.assert_idle()


def test_constrained_and_free_rows_in_one_batch_are_each_as_alone(llama, native):
    forms = [*FORMS.values(), None, None, FORMS["schema"], FORMS["regex"]]

    def submit(served: Served, index: int) -> None:
        sampling = {"temperature": 0.9, "seed": index, "top_p": 0.95, "repetition_penalty": 1.1}
        served.submit(f"r{index}", forms[index], prompt_ids(index, 9 + 3 * index, VOCABULARY), **sampling)

    together, alone = Served(llama, native=native), Served(llama, native=native, prefix_cache=False)
    for index in range(len(forms)):
        submit(together, index)
        submit(alone, index)
        alone.harness.run()
    together.harness.run()
    for index in range(len(forms)):
        assert together.harness.tokens(f"r{index}") == alone.harness.tokens(f"r{index}"), index
        assert together.harness.text(f"r{index}") == alone.harness.text(f"r{index}")
        assert together.harness.finished(f"r{index}").reason == alone.harness.finished(f"r{index}").reason


def test_who_had_to_give_way_follows_the_grammar_from_where_it_was(llama):
    pattern = Constraint("regex", "([a-z]{2}-){12}end")
    tight, roomy = (
        Served(llama, kv_bytes=0, max_tokens=100, budget=Budget(32, 16)),
        Served(llama, prefix_cache=False),
    )
    for served in (tight, roomy):
        for index in range(6):
            prompt = prompt_ids(index, 10 + 3 * index, VOCABULARY)
            served.submit(f"r{index}", pattern, prompt, temperature=1.0, seed=index)
            if served is roomy:
                served.harness.run()
        served.harness.run()
    assert tight.harness.preemptions > 0
    for index in range(6):
        assert tight.harness.text(f"r{index}") == roomy.harness.text(f"r{index}")
        assert re.fullmatch("([a-z]{2}-){12}end", tight.harness.text(f"r{index}"))


def test_choices_of_one_prompt_each_have_their_own_way(served):
    for index in range(6):
        leader = "c0" if index else None
        served.submit(f"c{index}", FORMS["regex"], leader=leader, temperature=1.0, seed=index)
    served.harness.run()
    texts = [served.harness.text(f"c{index}") for index in range(6)]
    for text in texts:
        follows("regex", text)
    assert len(set(texts)) > 1


def test_max_tokens_cut_an_answer_that_the_grammar_would_go_on_with(served):
    text, end = served.answer(Constraint("regex", "[ab]{50}"), max_tokens=20)
    assert end.reason == "length"
    assert re.fullmatch("[ab]{20}", text)


def test_an_answer_that_is_complete_with_its_last_token_has_stopped(served):
    text, end = served.answer(Constraint("regex", "[ab]{20}"), max_tokens=20)
    assert end.reason == "stop"
    assert end.usage.completion_tokens == 20
    assert len(text) == 20


def test_stop_strings_cut_it_like_any_other(served):
    text, end = served.answer(Constraint("regex", "aa;bb"), stop=(";",))
    assert text == "aa"
    assert (end.reason, end.stop_reason) == ("stop", ";")


def test_the_grammars_end_wins_over_all_that_asks_for_more(served):
    form = Constraint("regex", "[ab]{3}")
    for more in ({"ignore_eos": True}, {"min_tokens": 20}, {"ignore_eos": True, "min_tokens": 20}):
        text, end = served.answer(form, temperature=1.0, seed=1, **more)
        assert re.fullmatch("[ab]{3}", text)
        assert (end.reason, end.stop_reason) == ("stop", None)


def test_until_then_they_keep_it_from_ending_where_it_may(served):
    form = Constraint("regex", "[ab]{1,9}")
    lengths = set()
    for seed in range(6):
        plain, _ = served.answer(form, temperature=2.0, seed=seed, logit_bias=((2, 8.0),))
        longer, _ = served.answer(form, temperature=2.0, seed=seed, logit_bias=((2, 8.0),), min_tokens=5)
        longest, _ = served.answer(form, temperature=2.0, seed=seed, logit_bias=((2, 8.0),), ignore_eos=True)
        lengths.add(len(plain))
        assert len(longer) >= 5
        assert len(longest) == 9
    assert min(lengths) < 5


def test_an_empty_answer_can_be_all_that_a_grammar_has(served):
    text, end = served.answer(Constraint("grammar", 'start: ""'), ignore_eos=True, min_tokens=3)
    assert text == ""
    assert end.reason == "stop"


def test_log_probabilities_are_the_models_own(served):
    served.submit("free", None, temperature=0.0, logprobs=1, max_tokens=1)
    served.submit("held", Constraint("choice", '["é"]'), temperature=0.0, logprobs=1)
    served.harness.run()
    free = served.harness.events["free"][0].logprobs[0]
    held = served.harness.events["held"][0].logprobs[0]
    assert held.top == free.top
    assert held.token != free.token
    assert held.rank > 1
    assert held.logprob < free.logprob


def test_a_grammar_that_becomes_too_complex_ends_its_row_alone(llama, monkeypatch):
    monkeypatch.setattr(module, "_LEXER_STATES", 60)
    served = Served(llama)
    greedy = Constraint("regex", r"(a|b)*a(a|b){14}c", "guided_regex")
    (last,) = served.harness.tokenizer.encode("c", add_special_tokens=False)
    served.submit("held", FORMS["choice"], temperature=1.0, seed=1)
    served.submit("lost", greedy, temperature=2.0, seed=2, logit_bias=((last, -100.0),))
    served.submit("free", None, temperature=0.0, max_tokens=20, ignore_eos=True)
    served.harness.run()
    lost = served.harness.terminal("lost")
    assert isinstance(lost, Failed)
    assert isinstance(lost.error, LimitExceededError)
    assert lost.error.param == "guided_regex"
    follows("choice", served.harness.text("held"))
    assert len(served.harness.tokens("free")) == 20
    served.harness.assert_idle()


def test_a_constraint_that_nobody_compiled_is_an_error_and_not_ignored(llama):
    harness = Harness(llama, native="off")
    harness.submit(
        "r", prompt_ids(1, 9, VOCABULARY), {}, SamplingParams(max_tokens=5, constraint=FORMS["regex"])
    )
    harness.run()
    failed = harness.terminal("r")
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RequestFailedError)
    harness.assert_idle()


def test_other_restrictions_hold_within_the_grammar(served):
    allowed = served.harness.tokenizer.encode("ac-123", add_special_tokens=False)
    text, _ = served.answer(
        FORMS["regex"], temperature=1.0, seed=3, allowed_token_ids=tuple(allowed), ignore_eos=True
    )
    follows("regex", text)
    assert set(text) <= set("ac-123")
