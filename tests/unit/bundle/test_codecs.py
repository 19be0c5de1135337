"""Whatever form an expert is stored in, a bundle gives plain factors and tells the stored bytes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experts.build import BuildPlan, build_bundle
from experts.bundle import Bundle
from experts.bundle_files import digest
from experts.checkpoint import open_fine_tune
from experts.compression import CompressionSpec
from experts.errors import CompressionError, CorruptBundleError
from experts.factors import dense
from experts.inspection import bundle_facts
from experts.registry import describe_source, exclusive_vector, prepare_expert
from experts.routing import load_prompts
from tests.fixtures.bundles import with_expert

FILE = "experts/alpha/2/expert.safetensors"
SPECS = {
    "int8": CompressionSpec(rank=8, dtype="int8"),
    "int4": CompressionSpec(rank=8, dtype="int4"),
    "mixed": CompressionSpec(budget_bytes=12_000, dtype="mixed"),
    "weighed": CompressionSpec(budget_bytes=12_000, dtype="mixed", allocation="activation"),
}


def published(bundle, family, spec) -> Bundle:
    source = family.fine_tunes["alpha"]
    prompts = load_prompts(family.prompts["alpha"])
    compressed = prepare_expert(bundle, "alpha", source, spec, prompts)
    return with_expert(bundle, "alpha", compressed, describe_source(source), spec)


@pytest.mark.parametrize("codec", SPECS)
def test_an_expert_is_read_as_plain_factors_whatever_it_is_stored_as(bundle, family, codec):
    spec = SPECS[codec]
    changed = published(bundle, family, spec)
    entry, expert = changed.entry("alpha"), changed.expert("alpha")
    assert entry.compression == spec
    stored = load_file(changed.path / FILE)
    assert entry.summary.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert expert.nbytes > entry.summary.nbytes
    if spec.budget_bytes is not None:
        assert entry.summary.nbytes <= spec.budget_bytes
    lost = norm = 0.0
    fine_tune = open_fine_tune("alpha", family.fine_tunes["alpha"], changed.shared)
    for name, delta in exclusive_vector(fine_tune, changed.shared, changed.base_delta):
        whole = dense(delta)
        factors = expert.factors.get(name)
        if factors is not None:
            assert (factors.U.dtype, factors.S.dtype) == (torch.bfloat16, torch.float32)
            assert factors.shape == changed.shared.shape(name)
            assert factors.S.tolist() == sorted(factors.S.tolist(), reverse=True)
        kept = factors.dense() if factors is not None else torch.zeros(whole.shape)
        lost, norm = lost + float((whole - kept).square().sum()), norm + float(whole.square().sum())
    assert entry.summary.relative_error == pytest.approx((lost / norm) ** 0.5, rel=0.05)
    assert Bundle.open(changed.path).expert("alpha").max_rank == entry.summary.rank_max


def test_plain_and_quantised_experts_live_in_one_bundle(bundle, family):
    changed = published(bundle, family, SPECS["int4"])
    assert changed.entry("alpha").summary.nbytes < changed.entry("beta").summary.nbytes
    assert changed.expert("beta").nbytes == changed.entry("beta").summary.nbytes
    told = bundle_facts(changed)["experts"]
    assert [told[name]["compression"]["dtype"] for name in ("alpha", "beta")] == ["int4", "float32"]


def rewritten(changed, change) -> None:
    """Change the tensors and metadata of alpha's file and make its digest right again."""
    file = changed.path / FILE
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors, metadata)
    save_file(tensors, file, metadata=metadata)
    manifest = json.loads((changed.path / "manifest.json").read_text())
    manifest["files"][FILE] = digest(file).model_dump()
    (changed.path / "manifest.json").write_text(json.dumps(manifest))


KEY = "model.layers.0.self_attn.q_proj.weight"


def set_shape(metadata, shape):
    metadata["shapes"] = json.dumps(json.loads(metadata["shapes"]) | {KEY: shape})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, m: t.pop(f"{KEY}.s4"), "has only"),
        (lambda t, m: t.pop(f"{KEY}.S"), "has only"),
        (lambda t, m: t.update({f"{KEY}.q4": t[f"{KEY}.q4"][:, :-1].contiguous()}), "do not make"),
        (lambda t, m: t.update({f"{KEY}.q4": t[f"{KEY}.q4"].view(torch.int8)}), "not U8 and F16"),
        (lambda t, m: t.update({f"{KEY}.S": t[f"{KEY}.S"][:-1].clone()}), "do not multiply"),
        (lambda t, m: m.pop("shapes"), "metadata"),
        (lambda t, m: m.update(shapes="{"), "metadata 'shapes' is not readable"),
        (lambda t, m: m.update(shapes="[1]"), "metadata 'shapes' is not readable"),
        (lambda t, m: set_shape(m, [1, 2]), r"metadata tells shape \(1, 2\)"),
    ],
)
def test_a_quantised_expert_that_does_not_fit_is_refused_though_its_digest_is_right(
    bundle, family, change, says
):
    changed = published(bundle, family, SPECS["int4"])
    rewritten(changed, change)
    with pytest.raises(CorruptBundleError, match=says) as caught:
        Bundle.open(changed.path)
    assert "expert.safetensors" in str(caught.value)


def test_a_compression_by_activations_needs_prompts(bundle, family):
    with pytest.raises(CompressionError, match="needs training prompts, and expert 'alpha' has none"):
        prepare_expert(bundle, "alpha", family.fine_tunes["alpha"], SPECS["weighed"])


def test_a_build_weighs_every_expert_by_its_own_prompts(family, tmp_path):
    plan = BuildPlan(
        base=family.base,
        experts={name: family.fine_tunes[name] for name in ("alpha", "beta")},
        out=tmp_path / "weighed",
        compression=SPECS["weighed"],
        prompts={name: family.prompts[name] for name in ("alpha", "beta")},
        router="none",
    )
    bundle = build_bundle(plan)
    for name in ("alpha", "beta"):
        assert 0 < bundle.entry(name).summary.nbytes <= 12_000
        assert bundle.expert(name).factors
