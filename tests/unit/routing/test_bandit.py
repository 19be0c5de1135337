"""Rated answers change gates: bounded, reversible, and not at all without ratings."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import RoutingError
from experts.routing.bandit import SHARED_ARM, Bandit, ContextMap
from experts.routing.bandit_arm import Arm, BanditSpec

SPEC = BanditSpec(dims=8)
STATIC = {"a": 0.95, "b": 0.04, "c": 0.01}
MAP = ContextMap.make(np.zeros(20, np.float32), np.ones(20, np.float32), SPEC.dims, 0)


def context(seed: int = 0) -> np.ndarray:
    return MAP.of(np.random.default_rng(seed).standard_normal(20).astype(np.float32))


def rated(bandit: Bandit, seed: int, gates: dict[str, float], reward: float, times: int = 1) -> Bandit:
    for _ in range(times):
        bandit = bandit.learned(bandit.decide(context(seed), STATIC, 0.05), gates, reward)
    return bandit


def top(bandit: Bandit, seed: int = 0) -> str:
    decision = bandit.decide(context(seed), STATIC, 0.05)
    return decision.alone if decision.alone is not None else max(decision.adjusted, key=decision.adjusted.get)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 99))
def test_without_feedback_the_routers_own_row_comes_back(row, threshold, seed):
    static = {f"e{index}": p for index, p in enumerate(row)}
    decision = Bandit(SPEC).decide(context(seed), static, threshold, np.random.default_rng(0))
    assert decision.adjusted == static
    assert decision.alone is None
    assert not decision.explored
    assert decision.propensity == 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.floats(-1, 1)), max_size=80),
    st.integers(0, 5),
)
def test_an_adjustment_never_leaves_its_bounds_and_the_mass_stays(ratings, seed):
    bandit = Bandit(SPEC)
    for place, name, reward in ratings:
        bandit = rated(bandit, place, {name: 1.0}, reward)
    for name, p in STATIC.items():
        assert abs(bandit.adjustment(name, context(seed), p)) <= SPEC.cap
    decision = bandit.decide(context(seed), STATIC, 0.05)
    assert math.isclose(sum(decision.adjusted.values()), sum(STATIC.values()))


def test_a_router_that_is_as_right_as_it_claims_stays_as_it_is():
    certain = {"a": 1.0, "b": 0.0}
    bandit = Bandit(SPEC)
    for _ in range(50):
        bandit = bandit.learned(bandit.decide(context(), certain, 0.05), {"a": 1.0}, 1.0)
    assert bandit.decide(context(), certain, 0.05).adjusted == certain


def test_an_expert_that_fails_loses_such_prompts_and_one_that_serves_well_gets_them():
    bandit = rated(rated(Bandit(SPEC), 0, {"a": 1.0}, -1.0, 8), 0, {"c": 1.0}, 1.0, 8)
    assert top(bandit) == "c"


def test_other_prompts_keep_their_expert():
    bandit = rated(rated(Bandit(SPEC), 0, {"a": 1.0}, -1.0, 8), 0, {"c": 1.0}, 1.0, 8)
    opposite = -context()
    decision = bandit.decide(opposite, STATIC, 0.05)
    assert max(decision.adjusted, key=decision.adjusted.get) == "a"


def test_the_shared_expert_wins_where_every_expert_fails():
    bandit = rated(Bandit(SPEC), 0, {}, 1.0, 10)
    for name in STATIC:
        bandit = rated(bandit, 0, {name: 1.0}, -1.0, 10)
    assert top(bandit) == SHARED_ARM


def test_a_mix_is_credited_by_gate_weight():
    bandit = rated(Bandit(SPEC), 0, {"a": 0.75, "b": 0.25}, -1.0)
    assert (bandit.arms["a"].credit, bandit.arms["b"].credit) == (0.75, 0.25)
    assert np.allclose(np.trace(bandit.arms["a"].gram), 3 * np.trace(bandit.arms["b"].gram), rtol=0.2)
    assert bandit.arms["a"].mean_reward == -1


def test_old_feedback_fades_so_that_a_replaced_expert_is_judged_anew():
    spec = BanditSpec(dims=8, memory=64)
    bandit = rated(Bandit(spec), 0, {"a": 1.0}, 1.0, 1280)
    assert np.trace(bandit.arms["a"].gram) < 400
    assert top(rated(bandit, 0, {"a": 1.0}, -1.0, 192)) != "a"


@given(st.integers(0, 1000), st.integers(1, 200))
def test_rank_one_updates_agree_with_the_exact_solution(seed, count):
    rng, spec = np.random.default_rng(seed), BanditSpec(dims=4, memory=1e12)
    arm = Arm.fresh(4, spec.ridge)
    rows, residuals, weights = (
        rng.standard_normal((count, 4)),
        rng.uniform(-2, 2, count),
        rng.uniform(0, 5, count),
    )
    for x, residual, weight in zip(rows, residuals, weights, strict=True):
        arm = arm.learned(x, residual, 0.0, 1.0, weight, spec)
    gram = (rows * weights[:, None]).T @ rows + spec.ridge * np.eye(4)
    assert np.allclose(arm.theta, np.linalg.solve(gram, rows.T @ (weights * residuals)), atol=1e-6)


def test_exploration_keeps_to_its_share_and_says_so():
    spec, rng = BanditSpec(dims=8, epsilon=0.1), np.random.default_rng(0)
    flat = {"a": 0.4, "b": 0.3, "c": 0.3}
    decisions = [Bandit(spec).decide(context(), flat, 0.05, rng) for _ in range(2000)]
    explored = [decision for decision in decisions if decision.explored]
    assert 0 < len(explored) < 0.12 * len(decisions)
    for decision in explored:
        assert decision.alone in {"b", "c", SHARED_ARM}
        assert 0 < decision.propensity <= 0.1
    assert all(
        decision.alone is None and decision.propensity >= 0.9
        for decision in decisions
        if not decision.explored
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_without_a_generator_nothing_is_explored(epsilon):
    bandit = Bandit(BanditSpec(dims=8, epsilon=epsilon))
    assert not any(bandit.decide(context(), STATIC, 0.05).explored for _ in range(50))


def test_an_explored_answer_counts_by_its_inverse_propensity_up_to_the_clip():
    bandit = Bandit(BanditSpec(dims=8, epsilon=0.5, clip=3))
    rng = np.random.default_rng(0)
    explored = next(d for d in iter(lambda: bandit.decide(context(), STATIC, 0.05, rng), None) if d.explored)
    once = bandit.learned(explored, {explored.alone: 1.0} if explored.alone else {}, 1.0)
    arm = once.arms[explored.alone]
    x = bandit.inputs(explored.context, {**STATIC, SHARED_ARM: 0.05}[explored.alone])
    assert np.isclose(np.trace(arm.gram), float(x @ x) * min(3, 1 / explored.propensity))


@pytest.mark.parametrize("reward", [math.nan, math.inf, 1.01, -2])
def test_an_impossible_reward_is_refused(reward):
    with pytest.raises(RoutingError, match=r"\[-1, 1\]"):
        rated(Bandit(SPEC), 0, {"a": 1.0}, reward)


def test_versions_grow_with_every_change_and_an_earlier_one_comes_back():
    first = rated(Bandit(SPEC), 0, {"a": 1.0}, -1.0)
    second = rated(first, 0, {"b": 1.0}, 1.0)
    back = second.restored(first)
    assert (first.version, second.version, back.version, back.cleared().version) == (1, 2, 3, 4)
    assert back.arms == first.arms
    assert back.cleared().arms == {}


def test_arms_of_experts_that_are_gone_go_by_name():
    bandit = rated(rated(Bandit(SPEC), 0, {"a": 1.0}, -1.0), 0, {}, 1.0)
    assert bandit.retained({"a", "new"}) is bandit
    left = bandit.retained({"b"})
    assert set(left.arms) == {SHARED_ARM}
    assert left.version == bandit.version + 1


def test_what_a_router_did_not_read_counts_as_average():
    features = np.random.default_rng(0).standard_normal(20).astype(np.float32)
    partly = features.copy()
    partly[10:] = np.nan
    assert np.isfinite(MAP.of(partly)).all()
    assert np.allclose(MAP.of(partly), MAP.of(np.where(np.isnan(partly), 0, partly)))
    assert not MAP.of(np.full(20, np.nan, np.float32)).any()


def test_features_of_another_width_are_refused():
    with pytest.raises(RoutingError, match="shape"):
        MAP.of(np.zeros(21, np.float32))
