"""Building a bundle: the whole of it or nothing."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from experts.build import BuildPlan, build_bundle
from experts.bundle import Bundle
from experts.compression import CompressionSpec
from experts.errors import BundleError, CheckpointError, ExpertsError, MergeError, RoutingError
from experts.merging.methods import Averaging, Dare, DareTies, TaskArithmetic, Ties
from tests.fixtures.tiny import ARCHITECTURES, TinyFamily, tiny_family, tiny_fine_tune, tiny_model

FULL_RANK = CompressionSpec(energy=1.0, dtype="float32", extras="exact")


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> TinyFamily:
    return tiny_family(tmp_path_factory.mktemp("family"), experts=("alpha", "beta"))


@pytest.fixture
def plan(family, tmp_path) -> BuildPlan:
    return BuildPlan(
        base=family.base,
        experts=family.fine_tunes,
        out=tmp_path / "bundle",
        compression=CompressionSpec(rank=4),
        prompts=family.prompts,
    )


def changed(plan, **fields) -> BuildPlan:
    return dataclasses.replace(plan, **fields)


def materialised(bundle, name):
    """The shared model with one expert's exclusive vector at gate 1."""
    model = AutoModelForCausalLM.from_pretrained(bundle.shared_path)
    expert = bundle.expert(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in expert.factors:
                parameter.add_(expert.factors[key].dense())
            elif key in expert.exact:
                parameter.add_(expert.exact[key])
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21's own
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_full_rank_an_expert_at_gate_one_is_its_lora_fine_tune(architecture, tmp_path):
    family = tiny_family(tmp_path, architecture=architecture, compression=FULL_RANK, router=False)
    ids = torch.arange(3, 40)[None]
    for name, folder in family.fine_tunes.items():
        base = AutoModelForCausalLM.from_pretrained(family.base)
        with torch.no_grad():
            expected = PeftModel.from_pretrained(base, folder).eval()(ids).logits
            actual = materialised(Bundle.open(family.bundle), name).eval()(ids).logits
        assert torch.allclose(actual, expected, atol=1e-3), name


@pytest.mark.parametrize(
    "method", [Averaging(), Ties(density=0.5), Dare(drop_rate=0.5), DareTies(drop_rate=0.5)]
)
def test_at_full_rank_every_merge_gives_back_its_full_fine_tunes(method, tmp_path):
    family = tiny_family(tmp_path, full=True, method=method, compression=FULL_RANK, router=False)
    bundle = Bundle.open(family.bundle)
    assert bundle.manifest.merge.method == method
    for name, folder in family.fine_tunes.items():
        expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for key, tensor in materialised(bundle, name).state_dict().items():
            assert torch.allclose(tensor, expected[key], atol=1e-5), (name, key)


def test_folded_extras_are_reported_not_hidden(tmp_path):
    bundle = Bundle.open(tiny_family(tmp_path, full=True, router=False).bundle)
    summary = bundle.entry("alpha").summary
    assert summary.folded > 0
    assert not bundle.expert("alpha").exact
    assert 0 < summary.relative_error < 1


def test_a_sixteen_bit_base_gives_a_sixteen_bit_bundle(tmp_path):
    family = tiny_family(tmp_path, dtype=torch.bfloat16, compression=CompressionSpec(rank=4))
    bundle = Bundle.open(family.bundle)
    assert {bundle.shared.dtype(name) for name in bundle.shared.names} == {torch.bfloat16}
    assert next(iter(bundle.expert("alpha").factors.values())).U.dtype == torch.bfloat16
    assert bundle.router().record.validation_accuracy > 0.9


def test_one_expert_makes_a_bundle_whose_router_is_certain(plan):
    alone = changed(plan, experts={"alpha": plan.experts["alpha"]}, prompts={"alpha": plan.prompts["alpha"]})
    bundle = build_bundle(changed(alone, method=TaskArithmetic(scale=1.0)))
    assert bundle.router().probabilities(torch.zeros(1, 128)).tolist() == [[1.0]]


def test_the_same_plan_gives_the_same_bundle(plan, tmp_path):
    one, two = build_bundle(plan), build_bundle(changed(plan, out=tmp_path / "again"))
    assert one.manifest.files == two.manifest.files


def test_progress_tells_every_stage_to_its_end(plan):
    last = {}
    build_bundle(plan, lambda stage, done, total: last.update({stage: (done, total)}))
    assert list(last) == ["merge", "experts", "features", "router", "finish"]
    assert all(done == total for done, total in last.values())


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"experts": {}}, BundleError, "no experts"),
        ({"name": "a/b"}, BundleError, "bundle name"),
        ({"name": "alpha"}, BundleError, "own name"),
        ({"prompts": {"gamma": Path("x")}}, RoutingError, r"\['gamma'\], which are not experts"),
        ({"prompts": {}}, RoutingError, r"router needs prompts .*\['alpha', 'beta'\]"),
        ({"prompts": {}, "router": "none", "tune": True}, RoutingError, "tuning needs prompts"),
        ({"base": Path("nowhere")}, CheckpointError, "nowhere"),
        ({"tune": True, "method": Averaging()}, MergeError, "no scale to tune"),
        ({"out": Path("/proc/none/bundle")}, BundleError, "cannot write beside"),
    ],
)
def test_an_impossible_plan_is_refused_before_anything_is_written(plan, fields, error, says, tmp_path):
    with pytest.raises(error, match=says):
        build_bundle(changed(plan, **fields))
    assert list(tmp_path.iterdir()) == []


def test_an_expert_whose_name_is_a_path_is_refused(plan):
    with pytest.raises(BundleError, match=r"'\.\./x' is not allowed"):
        build_bundle(changed(plan, experts={"../x": plan.experts["alpha"]}))


def test_a_place_that_is_taken_is_refused(plan, tmp_path):
    plan.out.mkdir()
    (plan.out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BundleError, match="is not a bundle"):
            build_bundle(changed(plan, overwrite=overwrite))
    assert (plan.out / "thesis.txt").exists()


def test_a_bundle_is_replaced_only_when_asked(plan):
    first = build_bundle(plan)
    with pytest.raises(BundleError, match="--overwrite"):
        build_bundle(plan)
    second = build_bundle(changed(plan, overwrite=True))
    assert second.manifest.build_id != first.manifest.build_id
    assert [entry.name for entry in plan.out.parent.iterdir()] == ["bundle"]


def test_a_build_that_fails_leaves_the_old_bundle_and_nothing_else(plan, tmp_path):
    first = build_bundle(plan)
    other = tiny_fine_tune(tmp_path / "other", tiny_model("llama", tmp_path / "base"), seed=3)
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ExpertsError):
        build_bundle(changed(plan, experts={**plan.experts, "beta": other}, overwrite=True))

    def stop(stage, done, total):
        if stage == "features":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(changed(plan, overwrite=True), stop)
    assert Bundle.open(plan.out).manifest == first.manifest
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "bundle", "other"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from experts.build import BuildPlan, build_bundle
base, alpha, out, stage = sys.argv[1:]
def kill(now, done, total):
    if now == stage:
        os.kill(os.getpid(), signal.SIGKILL)
build_bundle(BuildPlan(base=Path(base), experts={"alpha": Path(alpha)}, out=Path(out), router="none"), kill)
"""


@pytest.mark.parametrize("stage", ["experts", "finish"])
def test_a_build_killed_half_way_leaves_no_bundle_and_the_next_one_cleans_up(plan, stage):
    arguments = [str(plan.base), str(plan.experts["alpha"]), str(plan.out), stage]
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not plan.out.exists()
    assert [entry.name[:17] for entry in plan.out.parent.iterdir()] == [".bundle.building-"]
    build_bundle(plan)
    assert [entry.name for entry in plan.out.parent.iterdir()] == ["bundle"]
