"""Routing by weights: experts that nobody has prompts of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import RoutingError
from experts.routing import FeatureSpec, MlpRouter, load_router
from experts.routing.energies import energies
from experts.routing.gaussian import GaussianRouter
from experts.routing.router import Abstaining, DataFree
from experts.routing.subspace import SubspaceRouter

HIDDEN = 24
SPEC = FeatureSpec(layer=3, taps=(1, 2), pooling="mean")
NAMES = ("a", "b", "c")


def directions() -> torch.Tensor:
    """(experts, hidden) orthonormal."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(HIDDEN, 4, generator=generator))[0].T


def weights(index: int) -> torch.Tensor:
    """(taps, groups, rank, hidden) rows that respond to the expert's own direction."""
    generator = torch.Generator().manual_seed(index)
    rows = 0.05 * torch.randn(3, 2, 4, HIDDEN, generator=generator)
    rows[:, :, 0] += directions()[index]
    return rows


def prompts(index: int | None, count: int, seed: int) -> torch.Tensor:
    """(count, 3 · hidden): noise, and the expert's direction in every layer."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, 3, HIDDEN, generator=generator)
    if index is not None:
        states = states + 6 * directions()[index]
    return states.flatten(1)


def made(names=NAMES, **options) -> SubspaceRouter:
    rows = {name: weights(ord(name) - ord("a")) for name in names}
    return SubspaceRouter.of(rows, prompts(None, 200, 9), SPEC, **options)


@pytest.mark.parametrize("score", ["contrast", "spectral", "arrow", "residual"])
def test_the_expert_whose_weights_respond_is_chosen_without_any_prompt(score):
    router = made(score=score)
    for column in range(3):
        rows = router.probabilities(prompts(column, 40, column))
        assert torch.allclose(rows.sum(1), torch.ones(40), atol=1e-5)
        assert float((rows.argmax(1) == column).float().mean()) > 0.95


def test_neutral_prompts_are_left_to_the_shared_expert():
    router = made()
    assert float(router.abstains(prompts(None, 200, 5)).float().mean()) > 0.85
    assert not router.abstains(prompts(1, 40, 6)).any()


def test_an_expert_joins_by_its_weights_and_the_others_keep_their_scores():
    router = made(("a", "b"), score="residual")
    assert isinstance(router, DataFree)
    assert isinstance(router, Abstaining)
    joined = router.joined_data_free("c", weights(2))
    rows = prompts(0, 10, 1)
    assert torch.allclose(joined.scores(rows)[:, :2], router.scores(rows))
    assert (joined.probabilities(prompts(2, 30, 2)).argmax(1) == 2).float().mean() > 0.95


def test_an_expert_that_joins_takes_its_prompts_and_no_others():
    router = made(("a", "b")).joined_data_free("c", weights(2))
    for column in range(3):
        assert (
            router.probabilities(prompts(column, 30, 7 + column)).argmax(1) == column
        ).float().mean() > 0.95


def test_a_router_with_fewer_directions_takes_a_new_expert_with_as_many():
    wide = torch.cat([weights(2), torch.zeros(3, 2, 4, HIDDEN)], dim=2)
    narrow, same = (made(("a", "b")).joined_data_free("c", rows) for rows in (wide, weights(2)))
    assert torch.equal(narrow.rows, same.rows)


def test_an_expert_alone_claims_its_own_prompts_only():
    router = made(("a",))
    assert not router.abstains(prompts(0, 40, 1)).any()
    assert router.abstains(prompts(None, 200, 5)).float().mean() > 0.85


def known_router(names=("a", "b"), guard_rate=0.02) -> GaussianRouter:
    def split(seed: int) -> dict[str, torch.Tensor]:
        return {name: prompts(ord(name) - ord("a"), 60, seed + ord(name)) for name in names}

    return GaussianRouter.fit(split(100), split(200), SPEC, guard_rate=guard_rate)


def test_what_is_known_by_prompts_stays_and_the_rest_is_offered_to_the_new_expert():
    known = known_router()
    router = SubspaceRouter.of({"c": weights(2)}, prompts(None, 200, 9), SPEC, known=known)
    assert router.names == NAMES
    rows = prompts(1, 40, 3)
    kept = ~known.abstains(rows)
    assert torch.equal(router.probabilities(rows)[kept][:, :2], known.probabilities(rows)[kept])
    assert (router.probabilities(prompts(2, 40, 4)).argmax(1) == 2).float().mean() > 0.9
    assert router.abstains(prompts(None, 200, 5)).float().mean() > 0.8


def test_with_prompts_an_expert_moves_to_those_that_are_known():
    rows = prompts(2, 40, 1)
    router = made().refitted("c", rows[:30], rows[30:], seed=0)
    assert router.free == ("a", "b")
    assert router.known.names == ("c",)
    assert router.names == NAMES
    assert (router.probabilities(prompts(2, 40, 2)).argmax(1) == 2).float().mean() > 0.9
    assert (router.probabilities(prompts(0, 40, 3)).argmax(1) == 0).float().mean() > 0.9


@pytest.mark.parametrize("known", [False, True])
def test_a_saved_router_is_read_back_as_it_was(known, tmp_path):
    router = made(("c",), known=known_router() if known else None).at_generation(4)
    router.save(tmp_path)
    loaded = load_router(tmp_path)
    rows = torch.cat([prompts(2, 10, 1), prompts(None, 10, 2)])
    assert torch.equal(loaded.probabilities(rows), router.probabilities(rows))
    assert torch.equal(loaded.abstains(rows), router.abstains(rows))
    assert (loaded.names, loaded.spec, loaded.generation) == (router.names, SPEC, 4)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(RoutingError, match=r"router.safetensors"):
        load_router(tmp_path)


def test_without_experts_there_is_no_router():
    router = made(("a", "c"), known=known_router(("b",)))
    assert router.without("b").known is None
    assert router.without("a").without("b").without("c") is None
    assert router.without("nobody") is router


def test_what_cannot_be_put_together_is_refused():
    with pytest.raises(RoutingError, match="at least one expert"):
        SubspaceRouter.of({}, prompts(None, 9, 1), SPEC)
    with pytest.raises(RoutingError, match="below the last"):
        SubspaceRouter.of({"a": weights(0)}, prompts(None, 9, 1), FeatureSpec(taps=(1, 2), pooling="mean"))
    with pytest.raises(RoutingError, match="do not fit"):
        SubspaceRouter.of({"a": weights(0)[:2]}, prompts(None, 9, 1), SPEC)
    with pytest.raises(RoutingError, match="reads"):
        made().probabilities(torch.zeros(1, 5))


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 100), seed=st.integers(0, 99))
def test_scores_do_not_depend_on_a_states_length(scale, seed):
    rows = torch.stack([weights(0), weights(1)])
    features = prompts(None, 4, seed)
    for score in ("spectral", "arrow", "residual"):
        assert torch.allclose(
            energies(features, rows, score), energies(features * scale, rows, score), atol=1e-3
        )


def test_a_router_of_an_earlier_build_keeps_its_score(tmp_path):
    router = made(score="residual", temperature=2.0)
    router.save(tmp_path)
    loaded = load_router(tmp_path)
    assert (loaded.score, loaded.temperature, loaded.contrast) == ("residual", 2.0, None)
    assert made().temperature < 1


def test_an_mlp_router_with_a_guard_can_be_inside():
    names = {"a": 0, "b": 1}
    training, held = ({n: prompts(i, 60, seed + i) for n, i in names.items()} for seed in (1, 50))
    known = MlpRouter.fit(training, held, SPEC, epochs=3, hidden=16, guard_rate=0.02)
    router = SubspaceRouter.of({"c": weights(2)}, prompts(None, 100, 9), SPEC, known=known)
    assert router.describe()["known"]["kind"] == "mlp"
    assert (router.probabilities(prompts(2, 30, 4)).argmax(1) == 2).float().mean() > 0.9


def test_forms_that_differ_more_than_tasks_do_not_hide_them():
    shift = 40 * torch.randn(3 * HIDDEN, generator=torch.Generator().manual_seed(3))
    chats, raws = prompts(None, 200, 9), prompts(None, 200, 10) + shift
    background = torch.stack([chats, raws], dim=1).flatten(0, 1)
    rows = {name: weights(index) for index, name in enumerate(NAMES)}
    router = SubspaceRouter.of(rows, background, SPEC, forms=2)
    assert (router.probabilities(prompts(1, 40, 1)).argmax(1) == 1).float().mean() > 0.9
    assert router.mean.shape == (2, 3, 12)
