"""The embedded build's inputs; the build itself is the ordinary one and is run end to end in tests/e2e."""

import pytest
import typer

import experts.build
from experts.embedded.build import FACTORS, PROMPTS, EmbeddedRecipe, build, build_embedded
from experts.errors import BundleError
from experts.routing import load_prompts


def test_a_place_that_is_taken_is_refused_before_the_base_is_converted(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(BundleError, match="is not a bundle"):
        build_embedded(tmp_path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_every_embedded_expert_has_prompts_with_answers_in_both_splits():
    names = {path.name for path in FACTORS.iterdir()} if FACTORS.is_dir() else set()
    assert names <= {path.stem for path in PROMPTS.glob("*.jsonl")}
    for path in PROMPTS.glob("*.jsonl"):
        lines = load_prompts(path)
        assert {line.side for line in lines} == {"train", "validation"}
        assert all(line.answer for line in lines)


def test_the_recipe_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        EmbeddedRecipe().scale = 1.0


def test_the_routers_layer_reaches_the_build(monkeypatch, tmp_path):
    plans = []

    def stop(plan, progress):
        plans.append(plan)
        raise BundleError("enough")

    monkeypatch.setattr(experts.build, "build_bundle", stop)
    monkeypatch.setattr("experts.embedded.base.ensure_base", lambda folder: folder)
    with pytest.raises(BundleError, match="enough"):
        build_embedded(tmp_path / "bundle", recipe=EmbeddedRecipe(router_layer=4))
    with pytest.raises(typer.Exit):
        build(tmp_path / "bundle", router_layer=6)
    assert [plan.features.layer for plan in plans] == [4, 6]
