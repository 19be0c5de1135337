"""Promises of the studies, on a made-up family: every study runs, resumes, and divides by the right thing."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint, open_fine_tune
from experts.errors import EvaluationError
from experts.evaluation.changes import Weights
from experts.evaluation.jobs import Job
from experts.evaluation.runner import Unit, run_stages
from experts.evaluation.setting import Setting, check_setting, require_disjoint
from experts.evaluation.store import Cell, Store
from experts.evaluation.studies import scale, sizes, tables
from experts.evaluation.studies.grids import METHODS, grid
from experts.evaluation.studies.options import Options, references
from experts.evaluation.summaries import entries, write_tables
from experts.evaluation.systems import Coded, Static
from experts.factors import dense
from experts.merging import TaskArithmetic, merge
from tests.unit.evaluation.tiny_setting import HELD_OUT, overlapping, tiny_setting

OPTIONS = Options(items=4, validation=2, seeds=1, rank=4, counts=(2, 3), prompts=6)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return tiny_setting(tmp_path_factory.mktemp("family"))


def run(setting: Setting, units: Sequence[Unit], store: Store, workers: int = 1) -> int:
    """How many cells were measured anew."""
    new: list[Cell] = []
    settings = {setting.name: setting}
    stages = [references(settings, OPTIONS), units]
    run_stages(stages, settings, store, workers, lambda cell, cost: new.append(cell) if cell else None)
    return len(new)


def only(units: Sequence[Unit], *rows: str) -> list[Unit]:
    kept = [tuple(job for job in unit if job.row in rows) for unit in units]
    return [unit for unit in kept if unit]


def test_tables_of_a_made_up_family(setting: Setting, tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.jsonl")
    units = tables.plan({"tiny": setting}, OPTIONS)
    rows = (
        "averaging",
        "task-arithmetic",
        "tsv",
        "multi",
        "Twin, oracle",
        "Twin, router",
        "no shared expert, router",
    )
    chosen = only(units, *rows, "0 %", "99.9 %", "base")
    assert run(setting, chosen, store) > 0
    found = {entry["method"]: entry for entry in entries(store, "tables")}
    assert set(found) == {"averaging", "task-arithmetic", "tsv", "multi", "Twin, oracle", "Twin, router"}
    assert found["Twin, oracle"]["normalised"] > found["averaging"]["normalised"]
    assert found["Twin, router"]["right"] is not None
    assert found["multi"]["raw"]["alpha"] == [100.0, 0.0]
    assert "scale" in found["task-arithmetic"]["settings"]
    sparse = {entry["method"]: entry for entry in entries(store, "sparsity")}
    assert sparse["99.9 %"]["expert_bytes"] < sparse["0 %"]["expert_bytes"]
    assert sparse["0 %"]["normalised"] >= sparse["99.9 %"]["normalised"]
    unseen = {entry["method"]: entry for entry in entries(store, "unseen")}
    assert unseen["base"]["tasks"] == 3
    for path in write_tables(store, tmp_path / "out"):
        assert path.stat().st_size
    assert json.loads((tmp_path / "out" / "tables.json").read_text())[0]["n"] == 4
    assert "| Twin, router |" in (tmp_path / "out" / "tables.md").read_text()


def test_a_run_that_is_started_again_measures_nothing_twice(setting: Setting, tmp_path: Path) -> None:
    units = only(tables.plan({"tiny": setting}, OPTIONS), "task-arithmetic")
    assert run(setting, units, Store(tmp_path / "cells.jsonl")) > 0
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"parameters": {"cut o')
    assert run(setting, units, Store(tmp_path / "cells.jsonl")) == 0


def test_scale_holds_held_in_and_held_out_of_nested_merges(setting: Setting, tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.jsonl")
    units = only(scale.plan({"tiny": setting}, OPTIONS), "averaging", "Twin, oracle", "Twin, router", "multi")
    run(setting, units, store)
    found = {(entry["method"], entry["experts"]): entry for entry in entries(store, "scale")}
    assert {number for method, number in found if method == "averaging"} == {2, 3}
    assert found["Twin, router", 2]["held_out"] == found["Twin, router", 2]["held_out"]
    assert found["averaging", 3]["seeds"] == 1
    assert set(scale.draw(setting, 2, 0)) < set(scale.draw(setting, 3, 0))
    assert HELD_OUT not in scale.draw(setting, 3, 0)


def test_bytes_holds_every_form_that_fits_its_size(setting: Setting, tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.jsonl")
    wanted = ("bfloat16 10 %", "int8 10 %", "one-bit", "sparse 100 %", "sparse 5 %")
    units = only(sizes.plan({"tiny": setting}, OPTIONS), *wanted)
    tiny = Coded(shared=TaskArithmetic(), form="bfloat16", fraction=1e-4)
    run(setting, [*units, (replace(units[0][0], row="too small", candidates=(tiny,)),)], store)
    found = {entry["method"]: entry for entry in entries(store, "bytes")}
    assert set(found) == set(wanted)
    assert found["sparse 5 %"]["expert_bytes"] <= 0.05 * Checkpoint.open(setting.base).nbytes
    assert found["sparse 100 %"]["normalised"] == 100


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_linear_in_its_scale(setting: Setting, method: str) -> None:
    base = Checkpoint.open(setting.base)
    tunes = {name: open_fine_tune(name, folder, base) for name, folder in setting.experts.items()}
    for tried in grid(method)[:2]:
        scaled = Weights(base, tunes).shared(tried, tuple(tunes))
        for name, delta in merge(base, list(tunes.values()), tried):
            got = scaled[name]
            assert (delta is None) == (got is None)
            if delta is not None and got is not None:
                torch.testing.assert_close(dense(got), dense(delta))


def test_workers_measure_the_same_as_one_process(setting: Setting, tmp_path: Path) -> None:
    units = only(tables.plan({"tiny": setting}, OPTIONS), "averaging", "task-arithmetic")
    units = [unit for unit in units if unit[0].study == "tables"]
    alone, beside = Store(tmp_path / "alone.jsonl"), Store(tmp_path / "beside.jsonl")
    assert run(setting, units, alone) == run(setting, units, beside, workers=2)
    for cell in alone.cells():
        other = beside.get(cell.parameters)
        assert other is not None
        assert other.scores == cell.scores


def test_a_job_that_fails_in_a_worker_is_told_with_its_reason(setting: Setting, tmp_path: Path) -> None:
    job = Job("tables", "tiny", "x", (Static(method=TaskArithmetic()),), ("nobody",), ("alpha",), 1, 1)
    with pytest.raises(EvaluationError, match="nobody"):
        run(setting, [(job,), (replace(job, row="y"),)], Store(tmp_path / "cells.jsonl"), workers=2)


def test_a_setting_whose_splits_overlap_is_refused(setting: Setting) -> None:
    check_setting(setting)
    with pytest.raises(EvaluationError, match="two splits"):
        check_setting(overlapping(setting))
    with pytest.raises(EvaluationError, match="must not share"):
        require_disjoint("spell", train=["A b"], test=["a  B"])


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.jsonl")
    with store.owned(), pytest.raises(EvaluationError, match="another evaluation"), store.owned():
        pass
