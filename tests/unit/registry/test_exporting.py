"""An expert in other programs' forms: what they make of it is what the server serves."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from experts.bundle import Bundle
from experts.bundle_expert import ExpertWeights
from experts.checkpoint import Checkpoint
from experts.checkpoint.mark import SharedMark, read_mark
from experts.compression import CompressionSpec
from experts.errors import CheckpointError, ExportError, MismatchError
from experts.factors import SvdFactors
from experts.registry import describe_source, prepare_expert
from experts.registry.exporting import model_nbytes, write_gguf, write_model, write_peft, write_ready
from experts.registry.importing import OverShared, mark_of, open_source
from tests.fixtures.tiny import ARCHITECTURES, VOCABULARY, Architecture, tiny_family
from tests.model.harness import materialised, prompt_ids, random_expert

MARK = SharedMark("tiny", "0" * 64)
EXACT = CompressionSpec(rank=6, dtype="float32", extras="exact")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """By dtype of the factors; bf16 folds extras, float32 keeps them."""
    root = tmp_path_factory.mktemp("families")
    families = {
        "bfloat16": tiny_family(root / "bf16", router=False, compression=CompressionSpec(rank=6)),
        "int8": tiny_family(root / "int8", router=False, compression=CompressionSpec(rank=6, dtype="int8")),
        "float32": tiny_family(root / "f32", router=False, full=True, compression=EXACT),
        "other": tiny_family(root / "other", router=False, seed=1, name="other"),
    }
    return {name: Bundle.open(family.bundle) for name, family in families.items()}


@pytest.fixture(autouse=True)
def _peft_asks_transformers_by_an_old_name() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        # One setting for GPT-2's Conv1D and its tied linear head; PEFT says so and takes each as it is.
        warnings.filterwarnings("ignore", category=UserWarning, message="fan_in_fan_out is set to True")
        yield


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt_ids(1, 24, VOCABULARY)])).logits


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _export(bundle: Bundle, form: str, name: str, folder: Path) -> Path:
    _folder(folder)
    mark, expert = mark_of(bundle), bundle.expert(name)
    if form == "peft":
        write_peft(bundle.shared, expert, mark, folder)
    elif form == "gguf":
        write_gguf(bundle.shared, expert, mark, folder / "adapter.gguf")
    else:
        entry = bundle.entry(name)
        write_ready(bundle.path / "experts" / name / str(entry.generation), mark, folder)
    return folder


def _same(one: ExpertWeights, factors: dict[str, SvdFactors]) -> None:
    assert one.factors.keys() == factors.keys()
    for name, mine in one.factors.items():
        theirs = factors[name]
        for part in ("U", "S", "Vh"):
            ours, other = getattr(mine, part), getattr(theirs, part)
            assert ours.dtype == other.dtype
            assert torch.equal(ours, other), (name, part)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_over_the_shared_expert_is_the_shared_expert_plus_the_exclusive_vector(
    architecture: Architecture, tmp_path: Path
) -> None:
    family = tiny_family(tmp_path, architecture=architecture, experts=("alpha",), router=False)
    shared_path = family.bundle / "shared"
    plain = AutoModelForCausalLM.from_pretrained(shared_path, dtype=torch.float32).eval()
    # Every matrix, of several ranks, every embedding and head, every norm and bias.
    expert = random_expert(plain, "alpha", 3, ranks=(2, 5, 3))
    write_peft(Checkpoint.open(shared_path), expert, MARK, _folder(tmp_path / "adapter"))
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    expected = materialised(shared_path, [(expert, 1.0)])
    torch.testing.assert_close(_logits(adapted), _logits(expected), atol=2e-4, rtol=1e-4)


def test_an_expert_of_linear_layers_alone_leaves_the_model_under_the_adapter_as_it_is(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles["bfloat16"]
    _export(bundle, "peft", "alpha", tmp_path / "a")
    plain = AutoModelForCausalLM.from_pretrained(bundle.shared_path, dtype=torch.float32).eval()
    before = _logits(plain)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    assert not torch.allclose(_logits(adapted), before, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(_logits(adapted), before)


def test_peft_saves_the_adapter_again_with_its_mark(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["bfloat16"]
    _export(bundle, "peft", "alpha", tmp_path / "a")
    plain = AutoModelForCausalLM.from_pretrained(bundle.shared_path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "a", is_trainable=True)
    with torch.no_grad():  # as if it had been trained further
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    adapted.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    trained = open_source("twice", tmp_path / "b", bundle)
    assert isinstance(trained, OverShared)
    assert trained.kept is None
    twice = prepare_expert(bundle, "twice", tmp_path / "b", CompressionSpec(rank=12, dtype="float32"))
    for name, factors in bundle.expert("alpha").factors.items():
        torch.testing.assert_close(twice.factors[name].dense(), 2 * factors.dense(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["peft", "gguf", "expert"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_is_exported_comes_back_bit_by_bit(
    form: str, dtype: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles[dtype]
    folder = _export(bundle, form, "beta", tmp_path / "out")
    again = prepare_expert(bundle, "again", folder)
    _same(bundle.expert("beta"), again.factors)
    assert describe_source(folder).kind == {"peft": "lora"}.get(form, form)
    assert again.report.max_rank == 6
    # A size that is asked for is made.
    assert prepare_expert(bundle, "small", folder, CompressionSpec(rank=2)).report.max_rank == 2


def test_exact_vectors_come_back_too(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["float32"]
    expert = bundle.expert("alpha")
    assert expert.exact
    ready = prepare_expert(bundle, "again", _export(bundle, "expert", "alpha", tmp_path / "ready"))
    _same(expert, ready.factors)
    assert ready.exact.keys() == expert.exact.keys()
    assert all(torch.equal(ready.exact[name], vector) for name, vector in expert.exact.items())
    adapter = prepare_expert(bundle, "again", _export(bundle, "peft", "alpha", tmp_path / "peft"))
    for name, factors in expert.factors.items():  # B and A are what is served, and they are the same
        assert torch.equal(adapter.factors[name].low_rank().up, factors.low_rank().up)
        assert torch.equal(adapter.factors[name].Vh, factors.Vh)
    for (
        name,
        vector,
    ) in expert.exact.items():  # θ* + Δ is one float32, from which Δ comes back but for its rounding
        torch.testing.assert_close(adapter.exact[name], vector, atol=1e-6, rtol=0)


def test_gguf_holds_the_products_in_llama_cpps_names_and_order(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles["bfloat16"]
    expert = bundle.expert("alpha")
    folder = _export(bundle, "gguf", "alpha", tmp_path / "out")
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["general.type"]) == ("llama", "adapter")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 6.0)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    config = bundle.shared.config
    processor = LlamaTensorProcessor(config=config)
    endings = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    assert len(tensors) == 2 * len(expert.factors) == 2 * 2 * len(endings)
    for layer in range(2):
        for ours, theirs in endings.items():
            stem = f"blk.{layer}.{theirs}.weight"
            product = tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(theirs)
            if heads:  # transformers' own way back from llama.cpp's order
                found = processor._reverse_permute_weights(
                    product.numpy(), config["num_attention_heads"], config[heads]
                )
                product = torch.tensor(found)
            expected = expert.factors[f"model.layers.{layer}.{ours}.weight"].dense()
            torch.testing.assert_close(product, expected, atol=1e-6, rtol=1e-5)


def test_a_merged_model_is_the_ground_truth_of_its_gates(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["float32"]
    mix = [(bundle.expert("alpha"), 0.75), (bundle.expert("beta"), 0.5)]
    seen: list[str] = []
    write_model(bundle.shared, mix, _folder(tmp_path / "model"), seen.append)
    assert set(seen) == set(bundle.shared.names)
    merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = materialised(bundle.shared_path, mix)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(dict(merged.named_parameters())[name], parameter, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_logits(merged), _logits(expected), atol=1e-5, rtol=1e-5)
    written = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    assert written <= model_nbytes(bundle.shared)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (
        bundle.shared_path / "tokenizer.json"
    ).read_bytes()


def test_no_gates_give_the_shared_expert_itself(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    shared = bundles["bfloat16"].shared
    write_model(shared, [], _folder(tmp_path / "model"))
    written = Checkpoint.open(tmp_path / "model")
    assert all(torch.equal(written.tensor(name), shared.tensor(name)) for name in shared.names)


@pytest.mark.parametrize("form", ["peft", "gguf", "expert"])
def test_an_export_fits_no_other_shared_expert(form: str, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    folder = _export(bundles["bfloat16"], form, "alpha", tmp_path / "out")
    with pytest.raises(MismatchError, match="over the shared expert"):
        prepare_expert(bundles["other"], "alpha", folder)


def test_an_expert_without_its_mark_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    folder = bundles["bfloat16"].path / "experts" / "alpha" / "1"
    assert read_mark(folder) is None
    with pytest.raises(CheckpointError, match="does not tell of which shared expert"):
        open_source("alpha", folder, bundles["bfloat16"])


def test_a_report_of_another_expert_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["bfloat16"]
    folder = _export(bundle, "expert", "alpha", tmp_path / "out")
    report = json.loads((folder / "expert.json").read_text())
    report["tensors"][0]["rank"] += 1
    (folder / "expert.json").write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match="describes another expert"):
        open_source("alpha", folder, bundle)
    (folder / "expert.json").write_text('{"tensors": 3}')
    with pytest.raises(CheckpointError, match="tensors: "):
        open_source("alpha", folder, bundle)


def test_told_values_that_do_not_give_the_factors_count_for_nothing(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles["bfloat16"]
    folder = _export(bundle, "peft", "alpha", tmp_path / "out")
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    values = json.loads(metadata["twinserve.values"])
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for told in ("[1e39]", "nonsense", json.dumps({name: [9.0] * 6 for name in values}), "{}"):
        header["__metadata__"]["twinserve.values"] = told
        raw = json.dumps(header).encode()
        weights.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
        found = open_source("alpha", folder, bundle)
        assert isinstance(found, OverShared)
        assert found.kept is None
        again = prepare_expert(bundle, "again", folder, CompressionSpec(rank=12, dtype="float32"))
        for name, factors in bundle.expert("alpha").factors.items():
            torch.testing.assert_close(again.factors[name].dense(), factors.dense(), atol=1e-5, rtol=1e-4)


def test_what_a_form_cannot_hold_is_said(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    shared, expert = bundles["float32"].shared, bundles["float32"].expert("alpha")
    with pytest.raises(ExportError, match=r"biases and norms .*export as peft"):
        write_gguf(shared, expert, MARK, tmp_path / "a.gguf")
    embeddings = ExpertWeights("alpha", 1, expert.factors, {})
    with pytest.raises(ExportError, match=r"changes model\.embed_tokens\.weight"):
        write_gguf(shared, embeddings, MARK, tmp_path / "a.gguf")
    nothing = ExpertWeights("alpha", 1, {}, {})
    with pytest.raises(ExportError, match="differs in nothing"):
        write_peft(shared, nothing, MARK, tmp_path)
    with pytest.raises(ExportError, match="differs in nothing"):
        write_gguf(shared, nothing, MARK, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_other_llama_like_models_have_every_matrix_in_gguf_and_no_row_moved(
    architecture: Architecture, tmp_path: Path
) -> None:
    half = CompressionSpec(rank=6)
    family = tiny_family(
        tmp_path, architecture=architecture, experts=("alpha",), router=False, compression=half
    )
    bundle = Bundle.open(family.bundle)
    folder = _export(bundle, "gguf", "alpha", tmp_path / "out")
    _same(bundle.expert("alpha"), prepare_expert(bundle, "again", folder).factors)
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    assert reader.fields["general.architecture"].contents() == architecture
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    query = tensors["blk.1.attn_q.weight.lora_b"] @ tensors["blk.1.attn_q.weight.lora_a"]
    expected = bundle.expert("alpha").factors["model.layers.1.self_attn.q_proj.weight"].dense()
    torch.testing.assert_close(query, expected, atol=1e-6, rtol=1e-5)


def test_gpt2_has_no_gguf_form(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, architecture="gpt2", experts=("alpha",), router=False)
    bundle = Bundle.open(family.bundle)
    with pytest.raises(ExportError, match="a gpt2 cannot be exported as GGUF"):
        write_gguf(bundle.shared, bundle.expert("alpha"), MARK, tmp_path / "a.gguf")
