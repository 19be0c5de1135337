"""Registering a model needs memory for a few of its tensors, not for the model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, INNER = 10, 512, 2048

MEASURE = """
import re, sys
from pathlib import Path
import torch
from experts.checkpoint import Checkpoint, open_fine_tune
from experts.compression import CompressionSpec
from experts.registry.checks import require_finite_files
from experts.registry.prepare import compress_exclusive
from experts.registry.sources import inspect_source

class Nothing:
    def delta(self, name):
        return None

def resident(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

base, tuned = map(Path, sys.argv[1:])
torch.set_num_threads(1)
torch.linalg.eigh(torch.eye(64).double())
shared = Checkpoint.open(base)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
require_finite_files(inspect_source(tuned, foreign=True))
compressed = compress_exclusive(open_fine_tune("x", tuned, shared), shared, Nothing(), CompressionSpec(rank=4))
print(resident("VmHWM") - before, len(compressed.factors))
"""


def model(folder: Path, *, tuned: bool) -> int:
    """A full model in two shards; returns its bytes. The fine-tune differs in one layer's attention."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"} | {
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    tensors = {"model.embed_tokens.weight": torch.randn(1000, HIDDEN, generator=generator)}
    for layer in range(LAYERS):
        for part, shape in shapes.items():
            tensors[f"model.layers.{layer}.{part}.weight"] = torch.randn(shape, generator=generator)
    if tuned:
        for part in "qkvo":
            name = f"model.layers.7.self_attn.{part}_proj.weight"
            tensors[name] = tensors[name] + 0.01 * torch.randn(HIDDEN, HIDDEN, generator=generator)
    names = list(tensors)
    where = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        where.update(dict.fromkeys(part, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def test_a_sharded_full_fine_tune_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    nbytes = model(tmp_path / "base", tuned=False)
    model(tmp_path / "tuned", tuned=True)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "base"), str(tmp_path / "tuned")]
    grown, factored = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert factored == 4
    assert nbytes > 150e6
    assert grown < nbytes / 2, f"{grown / 1e6:.0f} MB for a model of {nbytes / 1e6:.0f} MB"
