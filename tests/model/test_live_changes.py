"""Experts, router and trials change under way: every answer is that of exactly the generations that it names."""

import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.bundle import ExpertWeights
from service.core import ExpertKey, Finished, RoutingChoice, SamplingParams
from service.engine.change import LiveChange, LiveTrial
from service.engine.trials import Trial, Trials, compared, position
from service.errors import ExpertRejectedError, UnknownExpertError
from service.gating.slots import SlotPool
from tests.fixtures.tiny import VOCABULARY, tiny_model
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference
from tests.model.routers import random_router, random_staged

NAMES = ("a", "b", "c")
TWELVE = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def key(name: str, generation: int) -> ExpertKey:
    return ExpertKey(name, generation)


@pytest.fixture(scope="module")
def generations(plain_llama) -> dict[ExpertKey, ExpertWeights]:
    """Four generations of three experts."""
    return {
        key(name, number): random_expert(plain_llama, name, 10 * number + place, generation=number)
        for place, name in enumerate(NAMES)
        for number in range(1, 5)
    }


@pytest.fixture(scope="module")
def routers(llama):
    """Routers that know all three, told apart by their generation."""
    return {number: random_router(llama, NAMES, layer=1, generation=number) for number in (1, 2, 3)}


def _first(generations) -> list[ExpertWeights]:
    return [generations[key(name, 1)] for name in NAMES]


def _assert_truth(llama, generations, harness, request_id, prompt) -> None:
    told = harness.finished(request_id).routing
    mix = [(generations[key(name, told.generations[name])], gate) for name, gate in told.gates.items()]
    assert harness.tokens(request_id) == reference(materialised(llama, mix), prompt, 12), (request_id, told)


@pytest.mark.parametrize("slots", [None, 2], ids=["all resident", "two slots"])
def test_every_answer_is_that_of_the_generations_that_it_names(llama, generations, routers, slots, native):
    choose = random.Random(7)
    pool = SlotPool(max_experts=slots)
    harness = Harness(llama, _first(generations), rows=6, router=routers[1], pool=pool, native=native)
    harness.source.experts.update(generations)
    current = dict.fromkeys(NAMES, 1)
    router, trials, staged = 1, (), None
    asked, arms, made = {}, Counter(), Counter()

    def submit() -> None:
        number = len(asked)
        prompt = prompt_ids(number % 9, 8 + number % 5, VOCABULARY)
        kind = choose.choice(["routed", "routed", "named", "mixed", "pinned"])
        live = sorted(current)
        gates, pins = None, {}
        if kind == "named":
            gates = {choose.choice(live): 1.0}
        elif kind == "mixed":
            gates = dict.fromkeys(live, 0.5)
        elif kind == "pinned" and staged is not None:
            gates, pins = {staged.name: 1.0}, {staged.name: staged.generation}
        request_id = f"r{number}"
        harness.submit(request_id, prompt, gates, TWELVE, generations=pins)
        asked[request_id] = (prompt, gates, pins)

    def change(**more) -> None:
        harness.change(LiveChange(router=routers[router], trials=trials, **more))

    while len(asked) < 60 or harness.engine.busy:
        if len(asked) < 60 and choose.random() < 0.7:
            submit()
        action = choose.choice(["none"] * 5 + ["stage", "apply", "back", "retire", "canary", "none"])
        name, number = choose.choice(NAMES), choose.randint(2, 4)
        busy = staged is not None or trials
        if action == "stage" and staged is None and current.get(name) != number:
            staged = key(name, number)
            harness.stage(generations[staged])
        elif action == "apply" and staged is not None:
            router = choose.randint(1, 3)
            current[staged.name] = staged.generation
            trials = ()
            change(publish=(staged,))
            harness.engine.unstage(staged)
            staged = None
        elif action == "back" and not busy:
            router, current[name] = 1, 1
            change(publish=(generations[key(name, 1)],))
        elif action == "retire" and not busy and len(current) > 1 and name in current:
            del current[name]
            change(retire=(name,))
        elif action == "canary" and staged is not None and not trials:
            trials = (LiveTrial(staged, None, "canary", 50.0, routers[choose.randint(1, 3)]),)
            change()
        else:
            action = "none"
        made[action] += 1
        if harness.engine.busy:
            harness.step()
    assert {"stage", "apply", "back", "retire", "canary"} <= made.keys()
    for request_id, (prompt, gates, pins) in asked.items():
        _assert_truth(llama, generations, harness, request_id, prompt)
        told = harness.finished(request_id).routing
        if gates is not None:
            assert told.gates == gates
            assert all(told.generations[name] == number for name, number in pins.items())
            assert told.trial is None
        else:
            arms["canary" if told.trial else "current"] += 1
            assert told.trial is None or told.generations.get(told.trial.name) in (
                None,
                told.trial.generation,
            )
    assert arms["canary"] >= 3
    assert arms["current"] >= 3
    if staged is not None:
        harness.engine.unstage(staged)
    harness.change(LiveChange(router=routers[1]))
    harness.assert_idle()
    assert set(harness.catalogue.held()) == {key(name, number) for name, number in current.items()}


def test_a_canary_takes_its_share_with_its_router_and_leaves_the_rest_as_it_was(llama, generations, routers):
    harness = Harness(llama, _first(generations), router=routers[1])
    tried = key("b", 2)
    trial = LiveTrial(tried, generations[tried], "canary", 50.0, routers[2])
    harness.change(LiveChange(router=routers[1], trials=(trial,)))
    for number in range(24):
        harness.submit(f"r{number}", prompt_ids(number % 6, 9, VOCABULARY), None, TWELVE)
    harness.run()
    seen = Counter()
    for number in range(24):
        told = harness.finished(f"r{number}").routing
        mine = position(f"r{number}") < 50
        seen[mine] += 1
        assert told.trial == (tried if mine else None)
        assert told.router_generation == (2 if mine else 1)
        assert all(told.generations[name] == (2 if mine and name == "b" else 1) for name in told.gates)
        _assert_truth(llama, generations, harness, f"r{number}", prompt_ids(number % 6, 9, VOCABULARY))
    assert min(seen.values()) >= 6
    assert any("b" in harness.finished(f"r{n}").routing.gates for n in range(24))
    harness.change(LiveChange(router=routers[1]))
    assert harness.model.bank.resident(tried) is None
    harness.assert_idle()


def test_a_shadow_without_a_router_of_its_own_is_not_compared_with_itself(llama, generations, routers):
    harness = Harness(llama, _first(generations), router=routers[1])
    harness.change(LiveChange(router=routers[1], trials=(LiveTrial(key("a", 2), None, "shadow", 100.0),)))
    for number in range(3):
        harness.submit(f"r{number}", prompt_ids(number, 9, VOCABULARY), None, TWELVE)
    harness.run()
    assert [route.shadow for stats in harness.stats for route in stats.routes] == [None] * 3


def test_a_shadow_is_compared_and_changes_no_answer(llama, generations, routers):
    quiet = Harness(llama, _first(generations), router=routers[1])
    watched = Harness(llama, _first(generations), router=routers[1])
    shadow = random_router(llama, (*NAMES, "d"), layer=1, generation=9)
    trial = LiveTrial(key("d", 1), None, "shadow", 100.0, shadow)
    watched.change(LiveChange(router=routers[1], trials=(trial,)))
    for harness in (quiet, watched):
        for number in range(12):
            harness.submit(f"r{number}", prompt_ids(number, 9, VOCABULARY), None, TWELVE)
        harness.run()
    for number in range(12):
        assert watched.tokens(f"r{number}") == quiet.tokens(f"r{number}")
        assert watched.finished(f"r{number}").routing == quiet.finished(f"r{number}").routing
    routes = [route for stats in watched.stats for route in stats.routes]
    assert len(routes) == 12
    assert {route.shadow.key for route in routes} == {key("d", 1)}
    # The same centroids and one more: nearest to it are other prompts than before.
    for route in routes:
        assert 0 <= route.shadow.difference <= 1
        assert route.shadow.agree or route.shadow.difference > 0
    assert any(route.shadow.difference > 0 for route in routes)
    assert all(route.shadow is None for stats in quiet.stats for route in stats.routes)


def test_a_staged_generation_is_there_for_whoever_names_it_and_for_nobody_else(llama, generations):
    harness = Harness(llama, _first(generations))
    prompt = prompt_ids(3, 10, VOCABULARY)
    harness.stage(generations[key("a", 2)])
    harness.submit("current", prompt, {"a": 1.0}, TWELVE)
    harness.submit("named", prompt, {"a": 1.0}, TWELVE, generations={"a": 2})
    with pytest.raises(UnknownExpertError, match="generation 3 of 'a' is not live; 1 is"):
        harness.submit("none", prompt, {"a": 1.0}, TWELVE, generations={"a": 3})
    harness.engine.unstage(key("a", 2))
    with pytest.raises(UnknownExpertError, match="generation 2 of 'a' is not live"):
        harness.submit("late", prompt, {"a": 1.0}, TWELVE, generations={"a": 2})
    assert harness.model.bank.resident(key("a", 2)) is not None
    harness.run()
    assert harness.finished("current").routing.generations == {"a": 1}
    assert harness.finished("named").routing.generations == {"a": 2}
    for name in ("current", "named"):
        _assert_truth(llama, generations, harness, name, prompt)
    assert harness.model.bank.resident(key("a", 2)) is None
    harness.assert_idle()


def test_a_new_name_is_staged_without_being_known(llama, plain_llama, generations):
    harness = Harness(llama, _first(generations))
    new = random_expert(plain_llama, "new", 99)
    harness.stage(new)
    prompt = prompt_ids(3, 10, VOCABULARY)
    with pytest.raises(UnknownExpertError, match="no expert named 'new'"):
        harness.submit("no", prompt, {"new": 1.0}, TWELVE)
    harness.submit("yes", prompt, {"new": 1.0}, TWELVE, generations={"new": 1})
    harness.run()
    assert harness.tokens("yes") == reference(materialised(llama, [(new, 1.0)]), prompt, 12)


def test_a_staged_generation_that_lost_its_slot_comes_back_without_the_source(llama, generations):
    harness = Harness(llama, _first(generations), pool=SlotPool(max_experts=1))
    harness.stage(generations[key("a", 2)])
    prompt = prompt_ids(3, 10, VOCABULARY)
    for number, pins in enumerate(({}, {"a": 2}, {}, {"a": 2})):
        harness.submit(f"r{number}", prompt, {"a": 1.0}, TWELVE, generations=pins)
        harness.run()
        _assert_truth(llama, generations, harness, f"r{number}", prompt)
    assert key("a", 2) not in harness.source.experts


def test_nothing_changes_if_one_of_several_experts_finds_no_memory(llama, generations, routers, monkeypatch):
    harness = Harness(llama, _first(generations), router=routers[1], native="on")
    before = harness.catalogue.held()
    native, count = harness.model.bank._native, Counter()
    set_expert = native.set_expert

    def explode(slot, *parts):
        count["set"] += 1
        if count["set"] == 2:
            raise MemoryError
        set_expert(slot, *parts)

    monkeypatch.setattr(native, "set_expert", explode)
    change = LiveChange(
        (generations[key("a", 2)], generations[key("b", 2)]), retire=("c",), router=routers[2]
    )
    with pytest.raises(MemoryError):
        harness.change(change)
    monkeypatch.undo()
    assert harness.catalogue.held() == before
    assert harness.engine.dispatcher.router.generation == 1
    harness.assert_idle()
    harness.change(change)
    assert harness.catalogue.current() == {"a": key("a", 2), "b": key("b", 2)}
    assert harness.engine.dispatcher.router.names == ("a", "b")
    harness.assert_idle()


def test_a_change_that_cannot_be_made_says_why(llama, generations, routers):
    harness = Harness(llama, _first(generations), router=routers[1])
    with pytest.raises(ValueError, match="a@3 cannot be published by its key"):
        harness.change(LiveChange((key("a", 3),), router=routers[1]))
    with pytest.raises(ValueError, match="a@3 cannot answer a share"):
        harness.change(LiveChange(router=routers[1], trials=(LiveTrial(key("a", 3), None, "canary", 5.0),)))
    broken = generations[key("b", 2)]
    name = next(iter(broken.factors))
    factors = type(broken.factors[name])(
        broken.factors[name].U * torch.nan, broken.factors[name].S, broken.factors[name].Vh
    )
    nan = ExpertWeights("b", 2, dict(broken.factors) | {name: factors}, {})
    with pytest.raises(ExpertRejectedError, match="NaN"):
        harness.change(LiveChange((generations[key("a", 2)], nan), router=routers[2]))
    assert set(harness.catalogue.held()) == {key(name, 1) for name in NAMES}
    harness.assert_idle()


def test_prompts_of_a_trial_are_read_to_the_end_even_if_the_current_router_settles_them(tmp_path):
    path = tiny_model("llama", tmp_path / "m", seed=5, num_hidden_layers=4)
    plain = AutoModelForCausalLM.from_pretrained(path)
    experts = [random_expert(plain, name, seed) for seed, name in enumerate(NAMES)]
    prompts = [prompt_ids(seed, 9, VOCABULARY) for seed in range(8)]
    staged = random_staged(path, NAMES, prompts, layer=3, tap=1, settled=8)
    fine = random_router(path, NAMES, layer=3, taps=(1,), generation=8)
    harness = Harness(path, experts, router=staged)
    harness.change(LiveChange(router=staged, trials=(LiveTrial(key("a", 1), None, "shadow", 50.0, fine),)))
    for number, prompt in enumerate(prompts):
        harness.submit(f"r{number}", prompt, None, TWELVE)
    harness.run()
    routes = [route for stats in harness.stats for route in stats.routes]
    looked = [route for route in routes if route.shadow is not None]
    assert len(looked) == sum(position(f"r{number}") < 50 for number in range(8)) > 0
    assert all(isinstance(harness.finished(f"r{number}"), Finished) for number in range(8))
    assert all(route.shadow.difference == route.shadow.difference for route in looked), "NaN"


def test_parallel_choices_are_in_one_trial_together(llama, generations, routers):
    harness = Harness(llama, _first(generations), router=routers[1])
    tried = key("a", 2)
    trial = LiveTrial(tried, generations[tried], "canary", 50.0, routers[2])
    harness.change(LiveChange(router=routers[1], trials=(trial,)))
    prompt = prompt_ids(1, 9, VOCABULARY)
    for number in range(8):
        harness.submit(f"{number}", prompt, None, TWELVE)
        harness.submit(f"{number}-1", prompt, None, TWELVE, leader=f"{number}")
    harness.run()
    for number in range(8):
        assert harness.finished(f"{number}").routing == harness.finished(f"{number}-1").routing


def test_shares_lie_beside_each_other_and_are_even():
    trials = Trials(
        [
            Trial(key("a", 2), "canary", 20.0),
            Trial(key("b", 2), "shadow", 30.0),
            Trial(key("c", 2), "canary", 50.0),
        ]
    )
    found = Counter(trials.of(f"request-{number}").key.name for number in range(5000))
    assert found["a"] == pytest.approx(1000, abs=120)
    assert found["b"] == pytest.approx(1500, abs=130)
    assert found["c"] == pytest.approx(2500, abs=150)
    assert Trials([Trial(key("a", 2), "canary", 20.0)]).of("request-1") == Trials(
        [Trial(key("a", 2), "canary", 20.0)]
    ).of("request-1")


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([("a", 60.0), ("b", 50.0)], "more than 100 percent"),
        ([("a", 0.0)], "above 0"),
        ([("a", 101.0)], "at most 100"),
        ([("a", 5.0), ("a", 5.0)], "one trial at a time"),
    ],
)
def test_shares_that_make_no_sense_are_refused(trials, message):
    with pytest.raises(ValueError, match=message):
        Trials([Trial(key(name, 2), "canary", percent) for name, percent in trials])


@pytest.mark.parametrize(
    ("used", "other", "agree", "difference"),
    [
        ({"a": 1.0}, {"a": 1.0}, True, 0.0),
        ({"a": 0.75, "b": 0.25}, {"a": 0.5, "b": 0.5}, False, 0.25),
        ({}, {}, True, 0.0),
        ({}, {"a": 1.0}, False, 1.0),
        ({"a": 0.9, "b": 0.1}, {"a": 0.6}, True, 0.2),
    ],
)
def test_gates_are_compared_by_their_top_expert_and_their_weights(used, other, agree, difference):
    found = compared(used, other)
    assert (found.agree, found.difference) == (agree, pytest.approx(difference))


def test_a_generation_named_by_a_request_survives_its_retirement(llama, generations):
    harness = Harness(llama, _first(generations))
    prompt = prompt_ids(3, 10, VOCABULARY)
    harness.submit("r", prompt, {"a": 1.0}, TWELVE)
    harness.step()
    harness.retire("a")
    harness.publish(generations[key("a", 2)])
    harness.publish(generations[key("a", 1)])
    harness.submit("again", prompt, {"a": 1.0}, TWELVE)
    harness.run()
    for name in ("r", "again"):
        assert harness.finished(name).routing.generations == {"a": 1}
        _assert_truth(llama, generations, harness, name, prompt)
    harness.assert_idle()


def test_whoever_explains_the_router_is_in_no_trial_and_not_counted(llama, generations, routers):
    harness = Harness(llama, _first(generations), router=routers[1])
    tried = key("a", 2)
    trial = LiveTrial(tried, generations[tried], "canary", 100.0, routers[2])
    harness.change(LiveChange(router=routers[1], trials=(trial,)))
    dispatcher = harness.engine.dispatcher
    pattern, told = dispatcher.route(routers[1].centroids[0], RoutingChoice())
    harness.engine.release(pattern)
    assert told.trial is None
    assert told.router_generation == 1
    assert dispatcher.taken() == ()
