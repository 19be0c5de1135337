"""Layers that see a window keep no more than the window, and answers far beyond it stay the model's own."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from service.core import SamplingParams
from service.scheduler.blocks import NULL_BLOCK
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY, tiny_model
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference

WINDOWS = (16, 21, 5)


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Window → model."""
    root = tmp_path_factory.mktemp("gemmas")
    return {
        window: tiny_model("gemma3", root / str(window), seed=4, sliding_window=window) for window in WINDOWS
    }


def _experts(path: Path):
    plain = AutoModelForCausalLM.from_pretrained(path)
    return [random_expert(plain, f"e{i}", seed=i, ranks=(3, 5)) for i in range(2)]


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def _held(harness: Harness) -> int:
    """Most blocks of the windowed group that one sequence holds now."""
    return max(
        (
            sum(block != NULL_BLOCK for block in sequence.tables[1])
            for sequence in harness.engine.scheduler.running
        ),
        default=0,
    )


@pytest.mark.parametrize("window", WINDOWS)
def test_sequences_much_longer_than_the_window_equal_the_ground_truth(window, gemmas, native):
    path = gemmas[window]
    experts = _experts(path)
    harness = Harness(path, experts, native=native, max_tokens=250, budget=Budget(40, 24))
    assert [group.window for group in harness.engine.scheduler.kv.groups] == [None, window]
    mixes = [{}, {"e0": 1.0}, {"e0": 0.5, "e1": 0.5}]
    lengths = [3, 90, 170]
    prompts = [prompt_ids(i, length, VOCABULARY) for i, length in enumerate(lengths)]
    for i, (prompt, mix) in enumerate(zip(prompts, mixes, strict=True)):
        harness.submit(f"r{i}", prompt, mix, _greedy(70))
    most = 0
    while harness.engine.busy:
        harness.step()
        most = max(most, _held(harness))
    # The window, the chunk being written, and one block for the alignment of each end.
    assert most <= (window + 40) // 16 + 2
    for i, (prompt, mix) in enumerate(zip(prompts, mixes, strict=True)):
        model = materialised(path, [(e, mix[e.name]) for e in experts if e.name in mix])
        assert harness.tokens(f"r{i}") == reference(model, prompt, 70), i
    harness.assert_idle()


@pytest.mark.parametrize("window", WINDOWS)
def test_prefixes_beyond_the_window_are_found_and_continued(window, gemmas, native):
    path = gemmas[window]
    experts = _experts(path)
    harness = Harness(path, experts, native=native, max_tokens=250, kv_bytes=2**23)
    model = materialised(path, [(experts[0], 1.0)])
    prompt = prompt_ids(1, 100, VOCABULARY)
    for name, asked in (
        ("first", prompt),
        ("again", prompt),
        ("longer", (*prompt, *prompt_ids(2, 30, VOCABULARY))),
        ("shorter", prompt[:70]),
        ("branch", (*prompt[:50], *prompt_ids(3, 30, VOCABULARY))),
    ):
        harness.submit(name, asked, {"e0": 1.0}, _greedy(30))
        harness.run()
        assert harness.tokens(name) == reference(model, asked, 30), name
    found = {name: harness.finished(name).usage.cached_tokens for name in ("again", "longer", "branch")}
    assert found == {"again": 96, "longer": 96, "branch": 48}
    harness.assert_idle()


@pytest.mark.parametrize("window", WINDOWS)
def test_preempted_sequences_keep_their_windows_straight(window, gemmas, native):
    path = gemmas[window]
    experts = _experts(path)
    harness = Harness(path, experts, native=native, max_tokens=140, kv_bytes=0, budget=Budget(32, 16))
    prompts = [prompt_ids(i, 10 + 4 * i, VOCABULARY) for i in range(5)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, {"e1": 1.0} if i % 2 else {}, _greedy(90))
    harness.run()
    assert harness.preemptions > 0
    models = [materialised(path, []), materialised(path, [(experts[1], 1.0)])]
    for i, prompt in enumerate(prompts):
        assert harness.tokens(f"r{i}") == reference(models[i % 2], prompt, 90), i
    harness.assert_idle()


def test_a_window_that_is_no_help_has_no_group_of_its_own(gemmas, native):
    harness = Harness(gemmas[21], native=native, max_tokens=64)
    assert [group.window for group in harness.engine.scheduler.kv.groups] == [None]
    prompt = prompt_ids(1, 40, VOCABULARY)
    harness.submit("r", prompt, {}, _greedy(20))
    harness.run()
    assert harness.tokens("r") == reference(materialised(gemmas[21], []), prompt, 20)
    harness.assert_idle()
