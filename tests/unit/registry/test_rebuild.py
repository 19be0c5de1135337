"""A shared expert over all current experts: what is served afterwards is what was fine-tuned."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.bundle import Bundle
from experts.bundle_expert import read_expert, write_expert
from experts.bundle_manifest import expert_folder
from experts.checkpoint import Checkpoint, open_fine_tune
from experts.compression import CompressionSpec
from experts.errors import BundleError, MergeError, MismatchError
from experts.factors import dense
from experts.merging.methods import Averaging, TaskArithmetic, Ties
from experts.registry import describe_source, prepare_expert
from experts.registry.adopting import bundle_generations
from experts.registry.rebuild import Member, RebuildPlan, read_method, rebuild_bundle, rebuilt_records
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_fine_tune, tiny_lora, tiny_model

WHOLE = CompressionSpec(energy=1.0, dtype="float32", extras="exact")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return tiny_family(tmp_path_factory.mktemp("family"), compression=WHOLE)


@pytest.fixture(scope="module")
def bundle(family: TinyFamily) -> Bundle:
    return Bundle.open(family.bundle)


def _prompts(family: TinyFamily, name: str) -> tuple[str, ...]:
    return tuple(json.loads(line)["prompt"] for line in family.prompts[name].read_text().splitlines())


def _members(
    bundle: Bundle,
    origins: Mapping[str, Path] | None = None,
    prompts: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Member, ...]:
    return tuple(
        Member(
            name,
            bundle.path / expert_folder(name, bundle.entry(name).generation),
            bundle.entry(name).source,
            (origins or {}).get(name),
            prompts=(prompts or {}).get(name, ()),
        )
        for name in bundle.expert_names()
    )


def _served(bundle: Bundle, name: str) -> dict[str, torch.Tensor]:
    """θ* + v_t of every parameter."""
    weights, found = bundle.expert(name), {}
    for parameter in bundle.shared.names:
        own = bundle.shared.tensor(parameter).to(torch.float32)
        if parameter in weights.factors:
            own = own + weights.factors[parameter].dense()
        found[parameter] = own + weights.exact.get(parameter, torch.zeros(()))
    return found


def _truth(base: Path, source: Path) -> dict[str, torch.Tensor]:
    """θ_t of every parameter."""
    theta = Checkpoint.open(base)
    fine_tune = open_fine_tune("x", source, theta)
    found = {}
    for name in theta.names:
        delta = fine_tune.delta(name)
        found[name] = theta.tensor(name) + (0 if delta is None else dense(delta))
    return found


def _assert_close(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) <= tolerance, name


def test_with_base_and_sources_it_is_what_a_build_would_make(family, bundle, tmp_path):
    built = tiny_family(tmp_path / "again", compression=WHOLE, method=TaskArithmetic(scale=0.6), router=False)
    plan = RebuildPlan(
        bundle,
        _members(bundle, family.fine_tunes),
        tmp_path / "new",
        base=family.base,
        method=TaskArithmetic(scale=0.6),
    )
    made, wanted = rebuild_bundle(plan), Bundle.open(built.bundle)
    for name in wanted.shared.names:
        assert torch.equal(made.shared.tensor(name), wanted.shared.tensor(name)), name
    assert made.manifest.base == bundle.manifest.base
    assert made.manifest.merge.method == TaskArithmetic(scale=0.6)
    assert made.manifest.name == bundle.manifest.name
    assert made.manifest.build_id != bundle.manifest.build_id
    assert made.expert_names() == bundle.expert_names()
    assert {name: made.entry(name).source for name in made.expert_names()} == {
        name: bundle.entry(name).source for name in bundle.expert_names()
    }


@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("base", [True, False], ids=["base given", "base worked out"])
def test_every_expert_stays_the_fine_tune_that_it_was(family, bundle, tmp_path, kept, base):
    names = {"all": ["alpha", "beta", "gamma"], "some": ["beta"], "none": []}[kept]
    origins = {name: family.fine_tunes[name] for name in names}
    plan = RebuildPlan(
        bundle,
        _members(bundle, origins),
        tmp_path / "new",
        base=family.base if base else None,
        method=Averaging(),
    )
    made = rebuild_bundle(plan)
    for name in made.expert_names():
        _assert_close(_served(made, name), _truth(family.base, family.fine_tunes[name]), 2e-5)
    assert not torch.equal(
        made.shared.tensor("model.layers.0.mlp.up_proj.weight"),
        bundle.shared.tensor("model.layers.0.mlp.up_proj.weight"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("kept", [True, False], ids=["source kept", "source gone"])
def test_an_expert_that_joined_later_and_full_fine_tunes_are_merged_too(tmp_path, kept):
    family = tiny_family(
        tmp_path / "f", compression=WHOLE, full=True, experts=("alpha", "beta"), router=False
    )
    bundle = Bundle.open(family.bundle)
    source = tiny_fine_tune(tmp_path / "late", family.base, seed=77)
    folder = tmp_path / "late-expert"
    folder.mkdir()
    write_expert(folder, prepare_expert(bundle, "late", source))
    late = Member("late", folder, describe_source(source), source if kept else None)
    origins = dict(family.fine_tunes) if kept else None
    made = rebuild_bundle(RebuildPlan(bundle, (*_members(bundle, origins), late), tmp_path / "new"))
    assert made.expert_names() == ("alpha", "beta", "late")
    sources = {**family.fine_tunes, "late": source}
    for name in made.expert_names():
        _assert_close(_served(made, name), _truth(family.base, sources[name]), 5e-5)
    # Its share of the merge: the new shared expert lies nearer to it.
    truth = _truth(family.base, source)
    far = sum(float((bundle.shared.tensor(n).float() - truth[n]).norm()) for n in truth)
    near = sum(float((made.shared.tensor(n).float() - truth[n]).norm()) for n in truth)
    assert near < far


def test_a_rebuilt_bundle_can_be_rebuilt(family, bundle, tmp_path):
    first = rebuild_bundle(RebuildPlan(bundle, _members(bundle), tmp_path / "one", method=Averaging()))
    second = rebuild_bundle(
        RebuildPlan(first, _members(first), tmp_path / "two", method=bundle.manifest.merge.method)
    )
    for name in second.expert_names():
        _assert_close(_served(second, name), _truth(family.base, family.fine_tunes[name]), 5e-5)
    for name in bundle.shared.names:
        torch.testing.assert_close(second.shared.tensor(name), bundle.shared.tensor(name), rtol=0, atol=5e-5)


def test_an_expert_keeps_its_own_way_of_being_compressed(family, bundle, tmp_path):
    small = CompressionSpec(rank=2, dtype="float16")
    members = [replace(it, compression=small) if it.name == "beta" else it for it in _members(bundle)]
    made = rebuild_bundle(RebuildPlan(bundle, tuple(members), tmp_path / "new"))
    assert made.entry("beta").compression == small
    assert made.entry("beta").summary.rank_max == 2
    assert made.entry("alpha").compression == WHOLE


def test_with_prompts_the_router_is_of_its_kind_and_knows_their_experts(family, bundle, tmp_path):
    prompts = {name: _prompts(family, name) for name in bundle.expert_names()}
    router = bundle.router()
    made = rebuild_bundle(
        RebuildPlan(bundle, _members(bundle, family.fine_tunes, prompts), tmp_path / "new", router=router)
    )
    found = made.router()
    assert (found.kind, found.spec, found.names) == ("mlp", router.spec, router.names)
    assert (found.top_k, found.threshold) == (router.top_k, router.threshold)
    assert found.describe()["validation_accuracy"] > 0.8
    assert all(made.entry(name).routed for name in made.expert_names())


def test_without_prompts_the_router_goes_by_weights(bundle, tmp_path):
    made = rebuild_bundle(RebuildPlan(bundle, _members(bundle), tmp_path / "new", router=bundle.router()))
    found = made.router()
    assert found.kind == "subspace"
    assert set(found.names) == {"alpha", "beta", "gamma"}


def test_without_a_router_there_is_none_afterwards(bundle, tmp_path):
    made = rebuild_bundle(RebuildPlan(bundle, _members(bundle), tmp_path / "new"))
    assert made.router() is None


def test_a_model_whose_weights_do_not_tell_is_routed_by_prompts_alone(tmp_path):
    family = tiny_family(tmp_path / "f", architecture="gpt2", experts=("alpha", "beta", "gamma"))
    bundle = Bundle.open(family.bundle)
    prompts = {name: _prompts(family, name) for name in ("alpha", "beta")}
    some = rebuild_bundle(
        RebuildPlan(bundle, _members(bundle, prompts=prompts), tmp_path / "some", router=bundle.router())
    )
    assert some.router().names == ("alpha", "beta")
    none = rebuild_bundle(RebuildPlan(bundle, _members(bundle), tmp_path / "none", router=bundle.router()))
    assert none.router() is None


def test_another_base_is_refused_and_nothing_is_left(family, bundle, tmp_path):
    other = tiny_model("llama", tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="is not the base that bundle 'tiny' was made from"):
        rebuild_bundle(RebuildPlan(bundle, _members(bundle), tmp_path / "new", base=other))
    with pytest.raises(BundleError, match="no experts"):
        rebuild_bundle(RebuildPlan(bundle, (), tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_source_that_does_not_fit_leaves_nothing(family, bundle, tmp_path):
    other = tiny_model("llama", tmp_path / "other", seed=9, intermediate_size=96)
    odd = tiny_lora(tmp_path / "odd", other)
    with pytest.raises(MismatchError):
        rebuild_bundle(RebuildPlan(bundle, _members(bundle, {"beta": odd}), tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "other"]


def test_progress_covers_every_stage_and_ends(family, bundle, tmp_path):
    seen: dict[str, tuple[int, int]] = {}

    def told(stage: str, done: int, total: int, parameter: str) -> None:
        assert seen.get(stage, (0, 0))[0] <= done <= total
        assert parameter in bundle.shared.names or stage == "route"
        seen[stage] = (done, total)

    prompts = {name: _prompts(family, name) for name in bundle.expert_names()}
    plan = RebuildPlan(bundle, _members(bundle, prompts=prompts), tmp_path / "new", router=bundle.router())
    rebuild_bundle(plan, told)
    assert set(seen) == {"base", "merge", "experts", "route"}
    assert all(done == total for done, total in seen.values())


@pytest.mark.parametrize(
    ("asked", "method"),
    [
        ({"method": "task_arithmetic", "scale": 0.5}, TaskArithmetic(scale=0.5)),
        ({"method": "averaging"}, Averaging()),
        ({"method": "ties", "density": 0.3}, Ties(density=0.3)),
    ],
)
def test_a_method_is_read_by_its_name(asked, method):
    assert read_method(asked) == method


@pytest.mark.parametrize(
    "asked",
    [{}, {"method": "none"}, {"method": "task_arithmetic", "scale": "much"}, {"method": "averaging", "x": 1}],
)
def test_a_method_that_does_not_exist_is_refused(asked):
    with pytest.raises(MergeError, match=r"^merge: "):
        read_method(asked)


def test_what_the_catalogue_has_to_know_is_all_there(family, bundle, tmp_path):
    prompts = {name: _prompts(family, name) for name in bundle.expert_names()}
    made = rebuild_bundle(
        RebuildPlan(bundle, _members(bundle, prompts=prompts), tmp_path / "new", router=bundle.router())
    )
    kept = next(iter(bundle.manifest.files.values()))
    before = [replace(it, origin={"adapter_model.safetensors": kept}) for it in bundle_generations(bundle)]
    record, generations, router = rebuilt_records(made, before)
    assert record.build_id == made.manifest.build_id
    assert set(record.files) == {
        str(path.relative_to(made.path)) for path in made.path.rglob("*") if path.is_file()
    }
    assert json.loads(record.manifest)["build_id"] == record.build_id
    assert [it.name for it in generations] == list(made.expert_names())
    assert all(it.origin == {"adapter_model.safetensors": kept} for it in generations)
    assert router.profiles == dict.fromkeys(made.router().names, 1)
    for generation in generations:
        folder = made.path / expert_folder(generation.name, generation.number)
        assert read_expert(folder, generation.name, generation.number).factors
        for name, file in generation.files.items():
            assert (folder / name).stat().st_size == file.nbytes


def test_the_new_shared_expert_is_an_ordinary_model(bundle, tmp_path):
    made = rebuild_bundle(RebuildPlan(bundle, _members(bundle), tmp_path / "new"))
    model = AutoModelForCausalLM.from_pretrained(made.shared_path)
    assert bool(torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all())
