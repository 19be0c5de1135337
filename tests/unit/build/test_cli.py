"""`twinserve build`, `inspect` and `export-lora` as a user meets them."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from experts.bundle import Bundle
from experts.checkpoint import Checkpoint, open_fine_tune
from experts.cli import register
from experts.factors import dense
from tests.fixtures.tiny import TinyFamily, tiny_family


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> TinyFamily:
    return tiny_family(tmp_path_factory.mktemp("family"), experts=("alpha", "beta"))


@pytest.fixture
def run():
    app = typer.Typer()
    register(app)
    return lambda *arguments: CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


@pytest.fixture
def arguments(family, tmp_path):
    experts = [part for name, path in family.fine_tunes.items() for part in ("--expert", f"{name}={path}")]
    prompts = [part for name, path in family.prompts.items() for part in ("--prompts", f"{name}={path}")]
    return ["build", "--base", family.base, "--out", tmp_path / "bundle", *experts, *prompts]


def test_build_writes_a_bundle_and_shows_it(run, arguments, tmp_path):
    given = ("--scale", "0.5", "--rank", "3", "--name", "pair", "--top-k", "1", "--router-layer", "1")
    result = run(*arguments, *given)
    assert result.exit_code == 0, result.output
    assert "alpha" in result.output
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.name == "pair"
    assert manifest.merge.method.model_dump() == {"method": "task-arithmetic", "scale": 0.5}
    assert manifest.compression.rank == 3
    router = Bundle.open(tmp_path / "bundle").router()
    assert router.top_k == 1
    assert router.spec.layer == 1


def test_build_takes_every_method_with_its_own_parameters(run, arguments, tmp_path):
    given = (
        "--method",
        "dare-ties",
        "--drop-rate",
        "0.5",
        "--density",
        "0.4",
        "--merge-seed",
        "3",
        "--router",
        "none",
    )
    result = run(*arguments, *given, "--energy", "0.9", "--extras", "exact")
    assert result.exit_code == 0, result.output
    method = Bundle.open(tmp_path / "bundle").manifest.merge.method.model_dump()
    assert method == {"method": "dare-ties", "drop_rate": 0.5, "density": 0.4, "scale": 1.0, "seed": 3}


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (["ties", "--trim", "tensor"], {"density": 0.2, "trim": "tensor", "scale": 1.0}),
        (
            ["breadcrumbs", "--density", "0.3", "--outliers", "0.1", "--election"],
            {"density": 0.3, "outliers": 0.1, "election": True, "scale": 0.3},
        ),
        (
            ["della", "--drop-rate", "0.6", "--epsilon", "0.1", "--no-election", "--merge-seed", "2"],
            {"drop_rate": 0.6, "epsilon": 0.1, "election": False, "scale": 1.0, "seed": 2},
        ),
        (["sce", "--density", "0.4"], {"density": 0.4, "scale": 1.0}),
        (["model-stock"], {}),
        (["tsv", "--fraction", "0.5"], {"fraction": 0.5, "scale": 1.0}),
        (["iso-c", "--scale", "0.7"], {"scale": 0.7}),
    ],
)
def test_build_offers_every_merge(run, arguments, tmp_path, given, settings):
    result = run(*arguments, "--method", *given, "--router", "none")
    assert result.exit_code == 0, result.output
    method = Bundle.open(tmp_path / "bundle").manifest.merge.method.model_dump()
    assert method == {"method": given[0], **settings}


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--expert", "alpha=elsewhere"], "names 'alpha' twice"),
        (["--expert", "nopath"], "not of the form name=PATH"),
        (["--expert", "=x"], "not of the form name=PATH"),
        (["--expert", "a/b=x"], "name 'a/b' is not allowed"),
        (["--prompts", "gamma=x.jsonl"], "['gamma'], which are not experts"),
        (["--expert", "gamma=nowhere"], "['gamma'] have none"),
        (["--scale", "-1"], "--scale -1.0"),
        (["--method", "averaging", "--scale", "1"], "--scale means nothing to --method averaging"),
        (["--merge-seed", "1"], "--merge-seed means nothing"),
        (["--method", "della", "--epsilon", "1.5"], "--epsilon 1.5"),
        (["--method", "breadcrumbs", "--density", "0.9", "--outliers", "0.2"], "--outliers 0.2"),
        (["--rank", "0"], "--rank"),
        (["--router-layer", "0"], "--router-layer: Value error, layer 0"),
        (["--router-layer", "9"], "feature layer 9 does not exist; the model has 2 decoder layers"),
        (["--rank", "2", "--energy", "0.5"], "exactly one of rank, energy and budget_bytes"),
        (["--base", "nowhere"], "nowhere is not a folder"),
        (["--method", "magic"], "magic"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_two(run, arguments, extra, says, tmp_path):
    result = run(*arguments, *extra)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "bundle").exists()


def test_a_second_build_at_one_place_needs_overwrite(run, arguments):
    assert run(*arguments, "--rank", "1").exit_code == 0
    refused = run(*arguments, "--rank", "2")
    assert refused.exit_code == 2
    assert "--overwrite" in refused.output
    assert run(*arguments, "--rank", "2", "--overwrite").exit_code == 0


def test_inspect_shows_experts_method_and_digests(run, family):
    result = run("inspect", family.bundle)
    manifest = Bundle.open(family.bundle).manifest
    assert result.exit_code == 0
    for text in ("alpha", "beta", "task-arithmetic scale=0.3", manifest.base.fingerprint, manifest.build_id):
        assert text in result.output
    assert f"{manifest.experts['alpha'].summary.nbytes:,}" in result.output
    assert manifest.experts["alpha"].source.sha256[:12] in result.output


def test_inspect_as_json_is_the_manifest_with_the_routers_record(run, family):
    facts = json.loads(run("inspect", family.bundle, "--json").output)
    assert set(facts["experts"]) == {"alpha", "beta"}
    assert facts["files"]["shared/model.safetensors"]["sha256"]
    assert facts["router"]["fit"]["confusion"]


def test_inspect_of_something_else_is_an_error(run, tmp_path):
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert "is not a bundle" in result.output


def test_a_shared_expert_is_exported_as_one_lora_of_its_base(run, family, tmp_path):
    given = ("--base", family.base, "--out", tmp_path / "lora", "--rank", "64")
    result = run("export-lora", family.bundle, *given)
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(family.bundle)
    adapter = open_fine_tune("merged", tmp_path / "lora", Checkpoint.open(family.base))
    assert adapter.touched()
    for name in bundle.shared.names:
        delta = bundle.base_delta.delta(name)
        assert (delta is None) == (name not in adapter.touched())
        if delta is not None:
            torch.testing.assert_close(dense(adapter.delta(name)), dense(delta), atol=1e-5, rtol=1e-4)


def test_a_lora_is_exported_for_the_bundles_own_base_alone(run, family, tmp_path):
    other = family.bundle / "shared"
    result = run("export-lora", family.bundle, "--base", other, "--out", tmp_path / "lora")
    assert result.exit_code == 2
    assert "is not the base that" in result.output
    assert not (tmp_path / "lora").exists()
