"""Whatever runs beside it, a row equals plain transformers on its own materialised weights, in float32."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from service.core import SamplingParams
from service.engine.model import UnsupportedModelError
from service.scheduler.policy import Budget
from tests.fixtures.tiny import ARCHITECTURES, VOCABULARY
from tests.model.harness import GREEDY, Harness, materialised, prompt_ids, random_expert, reference

COMPILED = ("llama", "qwen3", "gemma3")
CASES = [(name, "on") for name in COMPILED] + [(name, "off") for name in ARCHITECTURES]


def _experts(path, count: int = 4):
    plain = AutoModelForCausalLM.from_pretrained(path)
    ranks = [(3,), (5, 2), (1,), (4, 0, 7)]
    return [random_expert(plain, f"e{i}", seed=i, ranks=ranks[i % 4]) for i in range(count)]


@pytest.mark.parametrize("architecture", COMPILED)
@pytest.mark.parametrize("choice", ["on", "auto"])
def test_the_layers_of_the_llama_family_are_recognised_and_compiled(architecture, choice, folders):
    harness = Harness(folders[architecture], native=choice)
    assert harness.model.native is not None
    assert len(harness.model.native.parts.layers) == 2
    assert Harness(folders[architecture], native="off").model.native is None


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_other_layers_run_as_transformers_wrote_them_and_cannot_be_insisted_on(architecture, folders, caplog):
    with caplog.at_level("INFO", "service.engine.model"):
        assert Harness(folders[architecture], native="auto").model.native is None
    assert "decoder layers run uncompiled" in caplog.text
    with pytest.raises(UnsupportedModelError, match="TWINSERVE_NATIVE=on, but"):
        Harness(folders[architecture], native="on")


@pytest.mark.parametrize(("architecture", "native"), CASES)
def test_eight_rows_with_different_gates_equal_their_materialised_models(architecture, native, folders):
    path = folders[architecture]
    experts = _experts(path)
    by_name = {expert.name: expert for expert in experts}
    mixes = [
        {},
        {"e0": 1.0},
        {"e1": 0.5, "e2": 0.5},
        {"e0": 0.25, "e1": 0.25, "e2": 0.25, "e3": 0.25},
        {"e3": -0.5},
        {"e2": 1.5, "e0": -0.25},
        {"e3": 1.0, "e1": 0.125},
        {"e0": 0.7, "e3": 0.3},
    ]
    lengths = [5, 23, 40, 1, 31, 17, 9, 50]
    harness = Harness(path, experts, budget=Budget(step_tokens=24, chunk_tokens=8), native=native)
    assert (harness.model.native is not None) == (native == "on")
    prompts = [prompt_ids(i, length, VOCABULARY) for i, length in enumerate(lengths)]
    # They join one by one while others run, with different lengths, so they also leave at different steps.
    for i, (mix, prompt) in enumerate(zip(mixes, prompts, strict=True)):
        harness.submit(
            f"r{i}", prompt, mix, SamplingParams(max_tokens=6 + 3 * i, temperature=0, ignore_eos=True)
        )
        harness.step()
    harness.run()
    for i, (mix, prompt) in enumerate(zip(mixes, prompts, strict=True)):
        model = materialised(path, [(by_name[name], gate) for name, gate in mix.items()])
        assert harness.tokens(f"r{i}") == reference(model, prompt, 6 + 3 * i), (i, mix)
        assert harness.finished(f"r{i}").reason == "length"
    harness.assert_idle()


@pytest.mark.parametrize(("architecture", "native"), CASES)
def test_an_expert_can_be_added_and_another_replaced_while_rows_decode(architecture, native, folders):
    path = folders[architecture]
    experts = _experts(path, 3)
    plain = AutoModelForCausalLM.from_pretrained(path)
    harness = Harness(path, experts[:2], native=native)
    long = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    prompts = [prompt_ids(70 + i, 12 + i, VOCABULARY) for i in range(4)]
    harness.submit("old", prompts[0], {"e0": 1.0, "e1": 0.5}, long)
    for _ in range(5):
        harness.step()
    harness.publish(experts[2])
    harness.submit("added", prompts[1], {"e2": 1.0}, long)
    harness.step()
    replacement = random_expert(plain, "e0", seed=99, generation=2, ranks=(6,))
    harness.publish(replacement)
    harness.submit("new", prompts[2], {"e0": 1.0, "e1": 0.5}, long)
    harness.run()
    assert harness.tokens("old") == reference(
        materialised(path, [(experts[0], 1.0), (experts[1], 0.5)]), prompts[0], 20
    )
    assert harness.tokens("added") == reference(materialised(path, [(experts[2], 1.0)]), prompts[1], 20)
    assert harness.tokens("new") == reference(
        materialised(path, [(replacement, 1.0), (experts[1], 0.5)]), prompts[2], 20
    )
    assert harness.finished("old").routing.generations == {"e0": 1, "e1": 1}
    assert harness.finished("new").routing.generations == {"e0": 2, "e1": 1}
    # The replaced generation is gone from memory once nobody uses it.
    assert harness.model.bank.resident_count == 3
    harness.assert_idle()


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_gates_ranks_and_batch_order_give_the_ground_truth(data, folders):
    architecture, native = data.draw(st.sampled_from(CASES))
    path = folders[architecture]
    plain = AutoModelForCausalLM.from_pretrained(path)
    count = data.draw(st.integers(1, 4))
    experts = [
        random_expert(
            plain,
            f"e{i}",
            seed=data.draw(st.integers(0, 10_000)),
            ranks=data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)),
            exact=data.draw(st.booleans()),
        )
        for i in range(count)
    ]
    gate = st.floats(-1.5, 1.5, allow_nan=False).map(lambda value: round(value, 2))
    requests = data.draw(
        st.lists(
            st.tuples(
                st.dictionaries(st.sampled_from([e.name for e in experts]), gate, max_size=count),
                st.integers(1, 30),
                st.integers(1, 6),
                st.integers(0, 3),
            ),
            min_size=1,
            max_size=6,
        )
    )
    harness = Harness(
        path,
        experts,
        rows=data.draw(st.integers(1, 5)),
        budget=Budget(32, data.draw(st.integers(1, 16))),
        kv_bytes=data.draw(st.sampled_from([0, 2**22])),
        prefix_cache=data.draw(st.booleans()),
        native=native,
    )
    prompts = []
    for i, (mix, length, tokens, pause) in enumerate(requests):
        prompts.append(prompt_ids(i, length, VOCABULARY))
        harness.submit(
            f"r{i}", prompts[i], mix, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        )
        for _ in range(pause):
            if harness.engine.busy:
                harness.step()
    harness.run()
    for i, (mix, _, tokens, _) in enumerate(requests):
        model = materialised(path, [(e, mix[e.name]) for e in experts if e.name in mix])
        assert harness.tokens(f"r{i}") == reference(model, prompts[i], tokens)
    harness.assert_idle()


def test_a_row_outlives_fifteen_others_without_a_change_in_its_text(native, folders):
    path = folders["llama"]
    experts = _experts(path, 2)
    harness = Harness(path, experts, rows=16, budget=Budget(512, 512), native=native)
    for i in range(16):
        tokens = 40 if i == 15 else 2
        harness.submit(
            f"r{i}",
            prompt_ids(i, 6, VOCABULARY),
            {"e1": 1.0},
            SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
        )
    harness.run()
    model = materialised(path, [(experts[1], 1.0)])
    assert harness.tokens("r15") == reference(model, prompt_ids(15, 6, VOCABULARY), 40)
    harness.assert_idle()


def test_the_plain_model_is_untouched_by_gating(native, folders):
    path = folders["llama"]
    harness = Harness(path, _experts(path), native=native)
    before = {name: tensor.clone() for name, tensor in harness.model.model.state_dict().items()}
    harness.submit("r", prompt_ids(1, 10, VOCABULARY), {"e0": 1.0}, GREEDY)
    harness.run()
    after = harness.model.model.state_dict()
    plain = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert list(after) == list(before) == list(plain)
    assert all((after[name] == before[name]).all() for name in before)
