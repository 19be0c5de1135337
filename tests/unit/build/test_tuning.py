"""Tuning λ: by the loss of the finished family on validation prompts with answers."""

import json

import pytest

from experts.build import BuildPlan, build_bundle
from experts.bundle import Bundle
from experts.checkpoint import Checkpoint, open_fine_tune
from experts.compression import CompressionSpec
from experts.errors import MergeError
from experts.merging.methods import TaskArithmetic
from experts.routing import load_prompts
from experts.routing.loading import load_model, load_tokenizer
from experts.tuning import SCALES, answer_loss, tune_scale
from tests.fixtures.tiny import ARCHITECTURES, TinyFamily, tiny_family


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> TinyFamily:
    return tiny_family(tmp_path_factory.mktemp("family"), experts=("alpha", "beta"), router=False)


def tuned(family, spec, architecture_prompts, scales=SCALES):
    base = Checkpoint.open(family.base)
    tunes = [open_fine_tune(name, path, base) for name, path in family.fine_tunes.items()]
    return tune_scale(base, tunes, TaskArithmetic(), spec, architecture_prompts, lambda *_: None, scales)


def test_the_grid_includes_one():
    assert 1.0 in SCALES


def test_the_scale_with_the_lowest_loss_is_chosen_and_recorded(family):
    bundle = build_bundle(
        BuildPlan(
            base=family.base,
            experts=family.fine_tunes,
            out=family.bundle.with_name("tuned"),
            compression=CompressionSpec(rank=2),
            prompts=family.prompts,
            router="none",
            tune=True,
        )
    )
    grid = bundle.manifest.merge.tuning.grid
    assert [point.scale for point in grid] == list(SCALES)
    assert bundle.manifest.merge.method.scale == min(grid, key=lambda point: point.loss).scale
    assert all(set(point.by_expert) == {"alpha", "beta"} for point in grid)
    assert Bundle.open(bundle.path).manifest == bundle.manifest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_full_rank_every_scale_is_the_fine_tune_itself(architecture, tmp_path):
    family = tiny_family(tmp_path, architecture=architecture, experts=("alpha", "beta"), router=False)
    prompts = {name: load_prompts(path) for name, path in _all_prompts(tmp_path, family).items()}
    spec = CompressionSpec(energy=1.0, dtype="float32", extras="exact")
    _, record = tuned(family, spec, prompts, scales=(0.3, 1.0))
    low, high = record.grid
    assert low.by_expert == pytest.approx(high.by_expert, abs=1e-3)


def test_loss_counts_answer_tokens_only_and_ignores_padding(family):
    model, tokenizer = load_model(family.base), load_tokenizer(family.base)
    short = (tokenizer("hello")["input_ids"], tokenizer(" you")["input_ids"])
    long = (tokenizer("hello there how are you")["input_ids"], tokenizer(" fine thanks")["input_ids"])
    lengths = [len(answer) for _, answer in (short, long)]
    alone = [answer_loss(model, [pair]) for pair in (short, long)]
    expected = sum(n * loss for n, loss in zip(lengths, alone, strict=True)) / sum(lengths)
    assert answer_loss(model, [short, long]) == pytest.approx(expected, rel=1e-5)


def test_tuning_without_answers_is_refused(family, tmp_path):
    path = tmp_path / "alpha.jsonl"
    path.write_text(json.dumps({"prompt": "a", "split": "validation"}) + "\n")
    with pytest.raises(MergeError, match="'alpha' has none"):
        tuned(family, CompressionSpec(rank=1), {"alpha": load_prompts(path), "beta": ()})


def _all_prompts(tmp_path, family):
    from tests.fixtures.tiny import tiny_prompts

    return {name: tiny_prompts(tmp_path / f"{name}.jsonl", name) for name in family.fine_tunes}
