"""Router features on real tiny models of every architecture."""

import pytest
import torch
from pydantic import ValidationError

from experts.errors import RoutingError
from experts.routing import FeatureSpec, decoder_layers, extract_features, pool
from experts.routing.loading import load_model
from tests.fixtures.tiny import ARCHITECTURES, tiny_model

PROMPTS = [[7, 8, 9, 10, 11], [12], [13, 14, 15], list(range(20, 60)), [7, 8, 9, 10, 11]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    return load_model(tiny_model(request.param, tmp_path_factory.mktemp(request.param)))


def test_features_do_not_depend_on_batch_or_padding(model):
    spec = FeatureSpec(pooling="mean_last")
    together = extract_features(model, PROMPTS, spec, batch_tokens=4096)
    alone = torch.cat([extract_features(model, [ids], spec) for ids in PROMPTS])
    assert together.shape == (5, 128)
    assert together.dtype == torch.float32
    assert torch.allclose(together, alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(together, extract_features(model, PROMPTS, spec, batch_tokens=4096))


def test_layer_minus_one_is_the_state_after_the_final_norm(model):
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states[-1][0]
    features = extract_features(model, [PROMPTS[0]], FeatureSpec(pooling="mean_last"))[0]
    assert torch.allclose(features, torch.cat([expected.mean(0), expected[-1]]), atol=1e-5)


def test_layer_k_is_the_output_of_the_kth_decoder_layer(model):
    with torch.no_grad():
        states = model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
    hooks = [len(layer._forward_hooks) for layer in decoder_layers(model)]
    first = extract_features(model, [PROMPTS[0]], FeatureSpec(layer=1, pooling="last"))[0]
    assert torch.allclose(first, states[1][0, -1], atol=1e-5)
    # The last layer's own output differs from the last hidden state, which is normalised.
    last = extract_features(model, [PROMPTS[0]], FeatureSpec(layer=2, pooling="last"))[0]
    assert not torch.allclose(last, states[2][0, -1], atol=1e-3)
    assert [len(layer._forward_hooks) for layer in decoder_layers(model)] == hooks


@pytest.mark.parametrize(
    ("taps", "layer"), [((1,), 2), ((1,), -1), ((1, 2), -1)], ids=["below", "norm", "every"]
)
def test_tapped_layers_stand_in_front_each_pooled_alone(model, taps, layer):
    hooks = [len(each._forward_hooks) for each in decoder_layers(model)]
    found = extract_features(model, PROMPTS, FeatureSpec(taps=taps, layer=layer), batch_tokens=64)
    alone = [extract_features(model, PROMPTS, FeatureSpec(layer=part)) for part in (*taps, layer)]
    assert found.shape == (5, FeatureSpec(taps=taps, layer=layer).size(64))
    assert torch.allclose(found, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)
    assert [len(each._forward_hooks) for each in decoder_layers(model)] == hooks


def test_a_tapped_spec_takes_one_pass_and_no_layer_above_the_last(model):
    ran = []
    handles = [
        each.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, each in enumerate(decoder_layers(model))
    ]
    extract_features(model, [PROMPTS[0]], FeatureSpec(taps=(1,), layer=2))
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()


def test_a_tap_that_does_not_exist_is_refused(model):
    with pytest.raises(RoutingError, match="has 2 decoder layers"):
        extract_features(model, [[1]], FeatureSpec(taps=(3,), layer=-1))


def test_a_spec_without_taps_is_written_as_before_and_one_with_taps_comes_back():
    plain = FeatureSpec(layer=16)
    assert plain.model_dump() == {"layer": 16, "pooling": "mean_last", "max_tokens": 512}
    assert FeatureSpec.model_validate_json('{"layer":16,"pooling":"mean_last","max_tokens":512}') == plain
    tapped = FeatureSpec(layer=16, taps=(4, 8))
    assert FeatureSpec.model_validate_json(tapped.model_dump_json()) == tapped


def test_layers_above_the_one_that_is_read_do_not_run(model):
    ran = []
    above = decoder_layers(model)[1].register_forward_hook(lambda *_: ran.append(1))
    extract_features(model, [PROMPTS[0]], FeatureSpec(layer=1))
    assert ran == []
    above.remove()
    # The pass that was cut short leaves nothing behind.
    whole = model(torch.tensor([PROMPTS[0]])).logits
    assert torch.isfinite(whole).all()


def test_only_the_last_tokens_of_a_long_prompt_are_read(model):
    spec = FeatureSpec(max_tokens=4)
    long, short = extract_features(model, [PROMPTS[3], PROMPTS[3][-4:]], spec)
    assert torch.allclose(long, short, atol=1e-5)


def test_a_layer_that_does_not_exist_is_refused(model):
    with pytest.raises(RoutingError, match="has 2 decoder layers"):
        extract_features(model, [[1]], FeatureSpec(layer=3))


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(RoutingError, match="prompt 1 has no tokens"):
        extract_features(model, [[1], []], FeatureSpec())


def test_nan_weights_are_reported(tmp_path):
    broken = load_model(tiny_model("llama", tmp_path))
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(RoutingError, match="NaN"):
        extract_features(broken, [[1, 2]], FeatureSpec())


def test_progress_counts_prompts(model):
    seen = []
    extract_features(
        model, PROMPTS, FeatureSpec(), batch_tokens=8, progress=lambda *count: seen.append(count)
    )
    assert seen[-1] == (5, 5)
    assert len(seen) > 2


def test_pooling_is_done_in_float32():
    states = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    assert pool(states, "mean").dtype == torch.float32
    assert torch.allclose(pool(states, "mean"), states[0].float(), atol=1e-6)
    assert pool(states, "mean_last").shape == (4,)


@pytest.mark.parametrize(
    "field",
    [
        {"layer": 0},
        {"layer": -2},
        {"pooling": "max"},
        {"max_tokens": 0},
        {"taps": (4,), "layer": 4},
        {"taps": (0, 2)},
        {"taps": (3, 2)},
        {"taps": (2, 2)},
        {"taps": (1, 5), "layer": 4},
    ],
)
def test_an_impossible_spec_is_refused(field):
    with pytest.raises(ValidationError):
        FeatureSpec(**field)
