"""`twinserve classifier …` as a user types it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experts.classification.bundle import ClassifierBundle
from service.cli import build_app
from tests.fixtures.classifiers import LABELS, task_text, tiny_classifier, tiny_encoder


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("own")
    base = tiny_encoder("bert", folder / "base")
    given = ["--base", str(base), "--name", "mine", "--rank", "4", "--scale", "0.4"]
    for seed, (task, labels) in enumerate(LABELS.items()):
        given += ["--expert", f"{task}={tiny_classifier(folder / task, base, labels, seed)}"]
        lines = folder / f"{task}.jsonl"
        lines.write_text("".join(json.dumps({"prompt": task_text(task, n)}) + "\n" for n in range(40)))
        given += ["--texts", f"{task}={lines}"]
    return given


def test_a_bundle_of_ones_own_classifiers_is_built_and_inspected(
    arguments: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    built = CliRunner().invoke(build_app(), ["classifier", "build", *arguments, "--out", str(out)])
    assert built.exit_code == 0, built.output
    manifest = ClassifierBundle.open(out).manifest
    assert (manifest.name, manifest.compression.rank, manifest.merge.method.model_dump()["scale"]) == (
        "mine",
        4,
        0.4,
    )
    shown = CliRunner().invoke(build_app(), ["classifier", "inspect", str(out)])
    assert shown.exit_code == 0
    assert "colour: 5 labels, rank 4" in shown.output
    assert "router: mlp" in shown.output


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--expert", "tone"], "name=PATH"), (["--expert", "tone=a", "--expert", "tone=b"], "name of its own")],
)
def test_a_wrong_option_is_told_in_a_line(change: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(build_app(), ["classifier", "build", "--base", str(tmp_path), *change])
    assert result.exit_code == 2
    assert message in result.output


def test_experts_need_their_base() -> None:
    result = CliRunner().invoke(build_app(), ["classifier", "build", "--expert", "tone=a"])
    assert result.exit_code == 2
    assert "--base" in result.output
