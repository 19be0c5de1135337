"""Promises of training: learns, repeats itself to the byte, goes on with what is missing, leaves no half."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from experts.classification.checkpoints import ClassifierFineTune, save_encoder
from experts.classification.task import ClassificationTask, Item
from experts.classification.train import RECORD_NAME, Recipe, collate, schedule, train_suite
from tests.fixtures.classifiers import WORDS, tiny_encoder

RECIPE = Recipe(learning_rate=5e-3, head_learning_rate=2e-2, warmup=3, max_tokens=12)


def told_apart(name: str, steps: int = 100) -> ClassificationTask:
    """Colours against sizes."""
    items = [
        Item(f"{WORDS[kind][i % 10]} {WORDS[kind][i // 10]}", kind, f"{kind} {i}")
        for kind in ("colour", "size")
        for i in range(100)
    ]
    return ClassificationTask(
        name, "", "made up", "", ("colour", "size"), lambda downloads: items, steps=steps, batch=8
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder("bert", tmp_path_factory.mktemp("base"))


def test_training_learns_and_repeats_itself_to_the_byte(base: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    one, other = (
        train_suite([told_apart("kind")], base, tmp_path / run, tmp_path, RECIPE, lines.append)[0]
        for run in ("one", "other")
    )
    weights = "model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines[:4]]
    assert losses[-1] < 0.5 * losses[0]
    assert json.loads((one / RECORD_NAME).read_text())["steps"] == 100


def test_a_trained_task_is_not_trained_again_and_a_half_trained_one_is(base: Path, tmp_path: Path) -> None:
    tasks = [told_apart("first", steps=2), told_apart("second", steps=2)]
    train_suite(tasks, base, tmp_path / "out", tmp_path, RECIPE, lambda line: None)
    times = {task.name: (tmp_path / "out" / task.name / RECORD_NAME).stat().st_mtime_ns for task in tasks}
    (tmp_path / "out" / "second" / RECORD_NAME).unlink()
    lines: list[str] = []
    train_suite(tasks, base, tmp_path / "out", tmp_path, RECIPE, lines.append)
    assert lines == ["first: already trained"]
    after = {task.name: (tmp_path / "out" / task.name / RECORD_NAME).stat().st_mtime_ns for task in tasks}
    assert after["first"] == times["first"]
    assert after["second"] > times["second"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first", "second"}


def test_word_embeddings_move_only_when_asked(base: Path, tmp_path: Path) -> None:
    shared = save_encoder(base, tmp_path / "encoder")
    words = "embeddings.word_embeddings.weight"
    for train_words in (False, True):
        recipe = Recipe(max_tokens=12, warmup=0, train_words=train_words)
        [folder] = train_suite(
            [told_apart("kind", steps=2)],
            base,
            tmp_path / str(train_words),
            tmp_path,
            recipe,
            lambda line: None,
        )
        touched = ClassifierFineTune("kind", folder, shared).touched()
        assert (words in touched) is train_words
        assert {"embeddings.position_embeddings.weight", "encoder.layer.0.output.dense.bias"} <= touched
        assert load_file(folder / "model.safetensors")["classifier.weight"].shape == (2, 32)


def test_the_rate_rises_then_falls_to_a_twentieth() -> None:
    recipe = Recipe(steps=50, warmup=10)
    rates = [schedule(step, recipe) for step in range(50)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


def test_padding_is_masked() -> None:
    batch = collate([([2, 5, 3], 1), ([2, 5, 6, 7, 3], 0)], pad=0)
    assert batch.ids.tolist() == [[2, 5, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch.labels.tolist() == [1, 0]
