"""Promises of the tasks: disjoint splits by hash, labels without contradiction; the measured ones where installed."""

import importlib.util
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.classification.sources import SPAM_FILE, VADER_FILE
from experts.classification.task import SPLITS, ClassificationTask, Item
from experts.classification.tasks.suite import suite
from experts.classification.tasks.texts import mail_text
from experts.classification.tasks.wordnet import parse
from experts.embedded.skills.packages import WORDNET_FILE
from experts.embedded.skills.skill import split_key, split_of
from experts.errors import CheckpointError

DOWNLOADS = Path("build/embedded/downloads")
FETCHED = all((DOWNLOADS / name).is_file() for name in (WORDNET_FILE, VADER_FILE, SPAM_FILE)) and all(
    importlib.util.find_spec(name) for name in ("emoji", "lemminflect")
)


def task_of(
    items: Iterable[Item], labels: tuple[str, ...] = ("a", "b"), **options: int
) -> ClassificationTask:
    held = tuple(items)
    return ClassificationTask("made", "", "made up", "", labels, lambda downloads: held, **options)


@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.sampled_from(["a", "b"])), max_size=60))
def test_splits_are_disjoint_and_nothing_is_labelled_twice(rows: list[tuple[str, str]]) -> None:
    task = task_of(Item(text, label, text) for text, label in rows)
    texts = {split: [split_key(one.text) for one in task.load(split, Path())] for split in SPLITS}
    everything = [text for split in SPLITS for text in texts[split]]
    assert len(everything) == len(set(everything))
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(split_key(text), set()).add(label)
    assert set(everything) == {text for text, found in labels.items() if len(found) == 1}


def test_items_of_one_key_stand_on_one_side() -> None:
    task = task_of(Item(f"{key} {part}", "a", f"key {key}") for key in range(50) for part in range(3))
    for split in SPLITS:
        keys = Counter(one.text.split()[0] for one in task.load(split, Path()))
        assert set(keys.values()) <= {3}


def test_a_text_of_two_keys_belongs_to_the_earlier_split() -> None:
    items = [Item("same", "a", f"key {number}") for number in range(40)]
    assert {split_of(item.key) for item in items} == set(SPLITS)
    found = {split: len(task_of(items).load(split, Path())) for split in SPLITS}
    assert found == {"train": 1, "validation": 0, "test": 0}


def test_a_prefix_of_a_split_is_a_fixed_sample_and_training_is_bounded() -> None:
    items = [Item(f"text {number}", "ab"[number % 2], f"{number}") for number in range(300)]
    assert task_of(items).load("test", Path()) == task_of(reversed(items)).load("test", Path())
    assert len(task_of(items, train_limit=7).load("train", Path())) == 7


def test_a_label_that_the_task_lacks_names_the_source() -> None:
    with pytest.raises(CheckpointError, match="made up"):
        task_of([Item("x", "c", "x")]).load("train", Path())


def test_the_suite_has_label_sets_of_their_own() -> None:
    tasks = suite()
    assert len({task.name for task in tasks}) == len(tasks) == 8
    assert len({task.labels for task in tasks}) == len(tasks)
    assert all(len(set(task.labels)) == len(task.labels) >= 2 for task in tasks)


def test_a_synset_line_is_read_whole() -> None:
    synset = parse(
        "00008299 29 v 02 wink 2 blink_once(p) 0 003 @ 00994073 v 0000 + 06891984 n 0101 ! 10803215 n 0201 "
        '01 + 22 00 | signal by winking; "She winked at him"; "wink!"  '
    )
    assert synset.words == ("wink", "blink once")
    assert synset.lexicographer == 29
    assert synset.gloss == "signal by winking"
    assert synset.examples == ("She winked at him", "wink!")
    assert synset.pointers[2] == ("!", "10803215", "n", 2, 1)


def test_a_mail_becomes_subject_and_readable_text() -> None:
    raw = (
        b"From somebody Fri Aug 23 12:20:43 2002\nSubject: Win now\nContent-Type: text/html\n\n"
        b"<html><style>p {}</style><p>Click &amp; <b>win</b>\n a lot</p></html>"
    )
    assert mail_text(raw) == "Win now Click & win a lot"


@pytest.mark.skipif(
    not FETCHED, reason="the tasks' sources are not here: twinserve classifier train fetches them"
)
@pytest.mark.parametrize("task", suite(), ids=lambda task: task.name)
def test_a_measured_task_is_disjoint_and_large_enough(task: ClassificationTask) -> None:
    loaded = {split: task.load(split, DOWNLOADS) for split in SPLITS}
    texts = {split: {split_key(one.text) for one in loaded[split]} for split in SPLITS}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert len(texts["test"]) >= 200
    assert len(texts["train"]) >= 1000
    assert {one.label for one in loaded["train"]} == set(range(len(task.labels)))
