"""The staged router: the coarse stage answers where that costs no accuracy, the fine one elsewhere."""

import dataclasses
import json
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import RoutingError
from experts.routing import FeatureSpec, MlpRouter, Router
from experts.routing.certainty import NEVER, certain_from
from experts.routing.features import narrowed
from experts.routing.nested import pack
from experts.routing.router import Abstaining, Settling, judged
from experts.routing.staged import StagedRouter, first_tap

SPEC = FeatureSpec(layer=16, taps=(4,), pooling="mean")
NAMES = ("a", "b", "c", "d")
WIDTH = 6


def layered(count: int, seed: int, names=NAMES) -> dict[str, torch.Tensor]:
    """(count, 12): the shallow half tells a and b from the rest but not c from d, the deep half tells all."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.4 * torch.randn(len(NAMES), count, 2 * WIDTH, generator=generator)
    shallow, deep = torch.eye(WIDTH)[[0, 1, 2, 2]], torch.eye(WIDTH)[:4]
    return {
        name: torch.cat([3 * shallow[i], 3 * deep[i]]) + noise[i]
        for i, name in enumerate(NAMES)
        if name in names
    }


def small(training, validation, spec) -> Router:
    return MlpRouter.fit(training, validation, spec, epochs=30, hidden=16, learning_rate=5e-3)


def fitted(names=NAMES, **options) -> StagedRouter:
    return StagedRouter.fit(
        layered(40, 1, names), layered(20, 2, names), SPEC, coarse=small, fine=small, **options
    )


@pytest.fixture(scope="module")
def router() -> StagedRouter:
    return fitted()


def _accuracy(router: Router, features: dict[str, torch.Tensor]) -> float:
    right = [
        router.probabilities(rows).argmax(1) == router.names.index(name) for name, rows in features.items()
    ]
    return float(torch.cat(right).float().mean())


def test_what_the_shallow_layer_tells_is_settled_there_and_the_rest_by_the_fine_stage(router):
    for name, rows in layered(50, 3).items():
        _, certain = router.settles(rows[:, :WIDTH])
        share = float(certain.float().mean())
        assert share > 0.8 if name in "ab" else share < 0.2, name
    assert _accuracy(router, layered(50, 3)) >= _accuracy(router.fine, layered(50, 3)) - 0.01
    assert router.record.staged >= router.record.fine > router.record.coarse
    assert 0.4 < router.record.settled < 0.6


def test_probabilities_are_the_coarse_ones_where_settled_and_the_fine_ones_elsewhere(router):
    features = torch.cat(list(layered(10, 4).values()))
    row, certain = router.settles(features[:, :WIDTH])
    found = router.probabilities(features)
    assert torch.equal(found[certain], row[certain])
    assert torch.allclose(found[~certain], router.fine.probabilities(features)[~certain])
    assert torch.allclose(found.sum(1), torch.ones(40))


def test_a_row_that_was_not_read_deeper_stays_settled_when_its_certainty_rounds_otherwise(router):
    rows = torch.cat(list(layered(10, 4).values()))[:1]
    row, certain = router.settles(rows[:, :WIDTH])
    assert certain.all()
    just_above = dataclasses.replace(router, certainty=float(row.max()) + 1e-7)
    found, silent = judged(just_above, torch.cat([rows[:, :WIDTH], torch.full((1, WIDTH), torch.nan)], dim=1))
    assert torch.equal(found, row)
    assert not silent.any()


def test_layers_that_were_not_read_do_not_matter_to_settled_rows(router):
    features = torch.cat(list(layered(10, 4).values()))
    _, certain = router.settles(features[:, :WIDTH])
    unread = features.clone()
    unread[certain, WIDTH:] = torch.nan
    assert torch.equal(router.probabilities(unread), router.probabilities(features))


def test_it_is_known_as_one_that_settles_and_a_plain_one_is_not(router):
    assert isinstance(router, Settling)
    assert isinstance(router, Abstaining)
    assert not isinstance(router.coarse, Settling)


def test_the_fine_stage_may_read_the_deepest_layer_alone():
    router = fitted(fine_reads="deepest")
    assert router.fine.spec == FeatureSpec(layer=16, pooling="mean")
    assert router.coarse.spec == FeatureSpec(layer=4, pooling="mean")
    assert _accuracy(router, layered(50, 3)) > 0.95


def test_it_is_read_back_as_it_was(router, tmp_path):
    router.at_generation(7).save(tmp_path)
    loaded = StagedRouter.load(tmp_path)
    features = torch.cat(list(layered(10, 4).values()))
    assert torch.equal(loaded.probabilities(features), router.probabilities(features))
    assert (loaded.names, loaded.spec, loaded.generation) == (NAMES, SPEC, 7)
    assert (loaded.certainty, loaded.record) == (router.certainty, router.record)
    assert all(torch.equal(loaded.held[name], router.held[name]) for name in NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router.json", "router.safetensors"]
    assert json.dumps(loaded.describe())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config: config.pop("certainty"), "not a router description"),
        (lambda config: config["coarse"].update(kind="nobody's"), "a stage cannot be read"),
        (lambda config: config["spec"].update(taps=[3]), "may read the first tap alone, 3"),
    ],
)
def test_a_spoilt_description_is_refused(router, tmp_path, spoil, message):
    router.save(tmp_path)
    config = json.loads((tmp_path / "router.json").read_text())
    spoil(config)
    (tmp_path / "router.json").write_text(json.dumps(config))
    with pytest.raises(RoutingError, match=message):
        StagedRouter.load(tmp_path)


def test_without_an_expert_both_stages_choose_among_the_others(router):
    rest = router.without("c")
    assert rest.names == rest.coarse.names == rest.fine.names == ("a", "b", "d")
    # What c was confused with at the shallow layer is certain there now.
    _, certain = rest.settles(layered(50, 3)["d"][:, :WIDTH])
    assert float(certain.float().mean()) > 0.8
    assert rest.without("a").without("b").without("d") is None
    assert router.without("stranger") is router


def test_an_expert_joins_both_stages_and_the_certainty_is_set_anew():
    before = fitted(("a", "b", "c"))
    assert before.record.settled > 0.9
    training, validation = layered(40, 1)["d"], layered(20, 2)["d"]
    router = before.refitted("d", training, validation, seed=0)
    assert router.names == NAMES
    assert _accuracy(router, layered(50, 3)) > 0.95
    assert router.record.settled < 0.7
    again = before.refitted("d", training, validation, seed=0)
    assert torch.equal(again.probabilities(training), router.probabilities(training))


@dataclasses.dataclass(frozen=True)
class Shy:
    """A stage that abstains where the first feature is beyond a limit."""

    stage: Router
    limit: float

    def __getattr__(self, name: str) -> object:
        return getattr(self.stage, name)

    def abstains(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0] > self.limit


def test_what_looks_strange_to_the_coarse_stage_is_left_to_the_fine_one(router):
    features = layered(10, 4)["a"].clone()
    assert bool(router.settles(features[:, :WIDTH])[1].all())
    features[:5, 0] = 50
    shy = dataclasses.replace(router, coarse=Shy(router.coarse, 20), fine=Shy(router.fine, 20))
    assert shy.settles(features[:, :WIDTH])[1].tolist() == [False] * 5 + [True] * 5
    assert shy.abstains(features).tolist() == [True] * 5 + [False] * 5
    assert not bool(router.abstains(features).any())


def test_stages_that_do_not_fit_together_are_refused(router):
    held = layered(5, 2)
    with pytest.raises(RoutingError, match="the stages choose among"):
        StagedRouter.of(router.coarse.without("a"), router.fine, held, SPEC)
    with pytest.raises(RoutingError, match="may read the first tap alone, 4"):
        StagedRouter.of(router.fine, router.fine, held, SPEC)
    with pytest.raises(RoutingError, match="do not hold those of"):
        StagedRouter.of(router.coarse, router.fine, held, FeatureSpec(layer=9, taps=(4,), pooling="mean"))
    with pytest.raises(RoutingError, match="at least one tap"):
        first_tap(FeatureSpec(layer=3))


def test_a_part_of_features_is_cut_out_by_layer():
    spec = FeatureSpec(layer=-1, taps=(2, 5), pooling="last")
    features = torch.arange(12.0).view(2, 6)
    assert narrowed(features, spec, spec) is features
    part = FeatureSpec(layer=-1, taps=(5,), pooling="last")
    assert narrowed(features, spec, part).tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]
    with pytest.raises(RoutingError, match="equally wide"):
        narrowed(torch.zeros(1, 7), spec, part)


def test_packing_leaves_nothing_behind(router, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pack(router)
    assert list(tmp_path.iterdir()) == []


PROBABILITIES = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.floats(0.5, 0.984375, width=32), min_size=n, max_size=n) for _ in range(2)),
        *(st.lists(st.booleans(), min_size=n, max_size=n) for _ in range(2)),
    )
)


@given(PROBABILITIES)
def test_the_certainty_loses_no_right_answer_and_no_smaller_one_would_do(drawn):
    labels = torch.zeros(len(drawn[0]), dtype=torch.int64)
    coarse, fine = (
        torch.tensor(
            [[p, 1 - p] if right else [1 - p - 1e-3, p + 1e-3] for p, right in zip(ps, rs, strict=True)]
        )
        for ps, rs in zip(drawn[:2], drawn[2:], strict=True)
    )
    least = certain_from(coarse, fine, labels, margin=0)

    def lost(certainty: float) -> int:
        reach = coarse.max(1).values >= certainty
        return int((fine.argmax(1) == 0)[reach].sum()) - int((coarse.argmax(1) == 0)[reach].sum())

    assert lost(least) <= 0
    smaller = [float(each) for each in coarse.max(1).values if float(each) < least]
    assert all(lost(each) > 0 for each in smaller)
    assert certain_from(coarse, fine, labels, margin=0.5) >= least


def test_a_coarse_stage_that_only_errs_is_never_believed():
    labels, right = torch.zeros(3, dtype=torch.int64), torch.tensor([[0.9, 0.1]] * 3)
    assert certain_from(right.flip(1), right, labels) == NEVER
    assert certain_from(right.flip(1), right, labels, tolerance=1.0) < 1


def test_both_answers_of_a_prompt_cost_one_look_of_each_stage(router):
    asked: list[str] = []

    class Counted(Shy):
        def probabilities(self, features: torch.Tensor) -> torch.Tensor:
            asked.append(self.stage.spec.layer)
            return self.stage.probabilities(features)

    features = layered(10, 4)["c"]
    counted = dataclasses.replace(
        router, coarse=Counted(router.coarse, 20), fine=Counted(router.fine, 20), certainty=NEVER
    )
    probabilities, silent = judged(counted, features)
    assert asked == [4, 16]
    assert torch.equal(probabilities, counted.probabilities(features))
    assert torch.equal(silent, counted.abstains(features))


def test_stages_of_our_own_are_packed_without_a_folder(router, tmp_path, monkeypatch):
    router.save(tmp_path)
    written = (tmp_path / "router.json").read_text(), (tmp_path / "router.safetensors").read_bytes()
    monkeypatch.setattr(tempfile, "TemporaryDirectory", None)
    router.save(tmp_path)
    assert ((tmp_path / "router.json").read_text(), (tmp_path / "router.safetensors").read_bytes()) == written
