"""Opening a bundle: what is there is what was written, or the error says which file is not."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.bundle import Bundle
from experts.bundle_files import digest
from experts.bundle_manifest import check_name
from experts.errors import BundleError, CorruptBundleError, UnknownExpertError
from experts.factors import dense

EXPERT = "experts/beta/1/expert.safetensors"
LIVE = (
    "base_delta.safetensors",
    "shared/model.safetensors",
    "shared/config.json",
    "shared/tokenizer.json",
    EXPERT,
    "experts/beta/1/expert.json",
    "router/1/router.safetensors",
    "router/1/router.json",
)


def edit_manifest(path, change):
    """Apply `change` to the manifest's plain data."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def resign(path, name):
    """Make the manifest's digest of a file right again."""
    edit_manifest(path, lambda manifest: manifest["files"].update({name: digest(path / name).model_dump()}))


def test_a_bundle_lists_its_experts_and_its_router(family):
    bundle = Bundle.open(family.bundle)
    assert bundle.expert_names() == ("alpha", "beta", "gamma")
    assert bundle.router().names == bundle.expert_names()
    assert bundle.router().generation == 1
    assert all(entry.routed and entry.generation == 1 for entry in bundle.manifest.experts.values())


def test_the_shared_expert_is_an_ordinary_model_folder(family):
    shared = Bundle.open(family.bundle).shared_path
    model = AutoModelForCausalLM.from_pretrained(shared)
    tokenizer = AutoTokenizer.from_pretrained(shared)
    assert tokenizer.chat_template
    assert model(torch.tensor([tokenizer("hello")["input_ids"]])).logits.shape[-1] == len(tokenizer)


def test_base_delta_is_what_separates_shared_from_base(family):
    bundle = Bundle.open(family.bundle)
    base = load_file(family.base / "model.safetensors")
    for name in bundle.shared.names:
        delta = bundle.base_delta.delta(name)
        moved = base[name] if delta is None else base[name] + dense(delta)
        assert torch.allclose(moved, bundle.shared.tensor(name), atol=1e-6), name


def test_an_expert_has_factors_that_fit_the_shared_expert(family):
    bundle = Bundle.open(family.bundle)
    expert = bundle.expert("alpha")
    assert (expert.name, expert.generation, expert.max_rank) == ("alpha", 1, 8)
    assert expert.nbytes == bundle.entry("alpha").summary.nbytes
    for name, factors in expert.factors.items():
        assert factors.shape == bundle.shared.shape(name)
        assert factors.S.dtype == torch.float32


def test_an_unknown_expert_is_named_with_those_that_there_are(family):
    with pytest.raises(UnknownExpertError, match="'delta'; it has alpha, beta, gamma"):
        Bundle.open(family.bundle).expert("delta")


@pytest.mark.parametrize("name", LIVE)
def test_a_changed_byte_is_found_and_the_file_named(path, name):
    file = path / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptBundleError, match=name):
        Bundle.open(path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", LIVE)
def test_a_truncated_file_is_named_with_and_without_digests(path, name, verify):
    os.truncate(path / name, (path / name).stat().st_size - 1)
    with pytest.raises(CorruptBundleError, match=name):
        Bundle.open(path, verify=verify)


@pytest.mark.parametrize("name", LIVE)
def test_a_missing_file_is_named(path, name):
    (path / name).unlink()
    with pytest.raises(CorruptBundleError, match=f"{name} is missing"):
        Bundle.open(path)


@pytest.mark.parametrize("name", [*LIVE, "manifest.json"])
def test_a_linked_file_is_refused_even_if_its_content_is_right(path, name, tmp_path):
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptBundleError, match="symbolic link"):
        Bundle.open(path)


def test_a_linked_folder_is_refused(path, tmp_path):
    (path / "experts").rename(tmp_path / "experts")
    (path / "experts").symlink_to(tmp_path / "experts")
    with pytest.raises(CorruptBundleError, match="experts is a symbolic link"):
        Bundle.open(path)


def test_a_surplus_link_is_refused_wherever_it_lies(path):
    (path / "experts" / "beta" / "more").symlink_to("/etc/passwd")
    with pytest.raises(CorruptBundleError, match="more is a symbolic link"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "name", ["chat_template.json", "pytorch_model.bin", "adapter_config.json", "modeling.py"]
)
def test_a_surplus_file_in_the_shared_folder_is_refused(path, name):
    (path / "shared" / name).write_text("{}")
    with pytest.raises(CorruptBundleError, match=f"{name} is not part of the bundle"):
        Bundle.open(path, verify=False)


def test_what_a_crashed_publication_left_behind_does_not_matter(path):
    orphan = path / "experts" / "beta" / "2"
    orphan.mkdir()
    (orphan / "expert.safetensors").write_bytes(b"half")
    (path / "experts" / "beta" / ".3.abcd").mkdir()
    (path / ".manifest.json.abcd").write_text("{")
    assert Bundle.open(path).entry("beta").generation == 1


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path / "nowhere")


def test_another_format_version_is_told_apart_from_corruption(path):
    edit_manifest(path, lambda manifest: manifest.update(format_version=2))
    with pytest.raises(BundleError, match=r"format version 2; this program reads 1") as caught:
        Bundle.open(path)
    assert not isinstance(caught.value, CorruptBundleError)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m["files"].pop(EXPERT), "is not listed"),
        (lambda m: m["files"].update({"../outside": m["files"][EXPERT]}), "not a plain relative path"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"][EXPERT]}), "not a plain relative path"),
        (lambda m: m["experts"].update({"../up": m["experts"]["beta"]}), "not allowed"),
        (lambda m: m["experts"]["beta"].update(generation=0), "generation"),
        (lambda m: m["experts"]["beta"].update(state="asleep"), "state"),
        (lambda m: m["router"].update(names=["alpha"]), "router's experts differ"),
        (lambda m: m["experts"]["beta"].update(state="retired"), "not active experts"),
        (lambda m: m["files"][EXPERT].update(sha256="x"), "sha256"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(path, change, says):
    edit_manifest(path, change)
    with pytest.raises(CorruptBundleError, match=says):
        Bundle.open(path)


def test_a_manifest_that_is_no_json_is_refused(path):
    (path / "manifest.json").write_bytes(b"\x00\xff{")
    with pytest.raises(CorruptBundleError, match=r"manifest\.json"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, k: t.update({f"{k}.U": t[f"{k}.U"][:-1]}), "factors make"),
        (lambda t, k: t.update({f"{k}.S": t[f"{k}.S"][:-1]}), "do not multiply"),
        (lambda t, k: t.update({f"{k}.U": t[f"{k}.U"].double(), f"{k}.Vh": t[f"{k}.Vh"].double()}), "F64"),
        (lambda t, k: t.update({f"{k}.S": t[f"{k}.S"].half()}), "S be F32"),
        (lambda t, k: t.pop(f"{k}.S"), "a factor is U, S and Vh"),
        (
            lambda t, k: t.update(
                {"nobody.U": t[f"{k}.U"], "nobody.S": t[f"{k}.S"], "nobody.Vh": t[f"{k}.Vh"]}
            ),
            "nobody",
        ),
        (lambda t, k: t.update({"model.norm.weight.delta": torch.zeros(3)}), "exact part has shape"),
        (lambda t, k: t.update({"model.norm.weight.delta": torch.zeros(64).half()}), "not F32"),
        (lambda t, k: t.update({"what": torch.zeros(3)}), "not an expert's tensor name"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused_though_its_digest_is_right(path, change, says):
    tensors = load_file(path / EXPERT)
    change(tensors, "model.layers.0.self_attn.q_proj.weight")
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path / EXPERT)
    resign(path, EXPERT)
    with pytest.raises(CorruptBundleError, match=says) as caught:
        Bundle.open(path)
    assert "expert.safetensors" in str(caught.value)


def test_a_base_delta_that_does_not_fit_is_refused_though_its_digest_is_right(path):
    save_file({"model.norm.weight.dense": torch.zeros(3)}, path / "base_delta.safetensors")
    resign(path, "base_delta.safetensors")
    with pytest.raises(CorruptBundleError, match=r"base_delta.*model\.norm\.weight"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["a", "A1", "en-es", "v1.2_x", "a" * 64])
def test_plain_names_are_allowed(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../a",
        "a\\b",
        ".a",
        "a.",
        "-a",
        "a b",
        "a\n",
        "a\0",
        "é",
        "a" * 65,
        "shared",
        "a=b",
    ],
)
def test_names_that_could_leave_their_folder_are_refused(name):
    with pytest.raises(BundleError, match="name"):
        check_name(name)
