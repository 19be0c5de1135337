"""Memory of the server's process over what it must hold: shared expert, KV budget, 1.5 × the active factors."""

from transformers import AutoConfig

from benchmarks.context import Context
from benchmarks.http_client import drive
from benchmarks.ours import OurServer, sizes
from benchmarks.report import Figure
from benchmarks.workload import Load, vocabulary_of
from experts.bundle import Bundle
from service.settings import Settings

_MIB = 2**20
_PROMPT = 1000
"""Tokens of the prompts that fill the KV cache: prefixes stay in it, so that the whole budget is really in use."""


def memory(context: Context) -> list[Figure]:
    """After a load of 32 clients with pairs of all experts, and after prompts that fill the KV cache."""
    bundle = Bundle.open(context.bundle)
    load = Load(bundle.expert_names(), vocabulary_of(bundle.shared_path), new_tokens=context.size(32, 4))
    shared = sum(path.stat().st_size for path in bundle.shared_path.glob("*.safetensors"))
    factors = sum(_device_bytes(bundle, name) for name in bundle.expert_names())
    budget = Settings().kv_cache_bytes
    # Materialised weights have a budget of their own, which is not in the sum.
    with OurServer(context.bundle, context.work, {"TWINSERVE_MIX_MODE": "factored"}) as server:
        idle = sizes(server.pid, "status")
        drive(server.url, server.model, load.requests(context.size(64, 4)), 32, stream=False)
        filling = Load(load.experts, load.vocabulary, prompt_tokens=_PROMPT, new_tokens=1)
        tokens = budget // _kv_bytes_a_token(bundle)
        number = context.size(tokens // _PROMPT + 2, 2)
        drive(server.url, server.model, filling.requests(number, 1), 8, stream=False)
        after = sizes(server.pid, "status")
        pss = sizes(server.pid, "smaps_rollup")["Pss"]
    must = shared + budget + 1.5 * factors
    parts = ", ".join(f"{name} {after[name] / _MIB:.0f}" for name in ("RssAnon", "RssFile", "VmHWM"))
    return [
        context.figure(
            "memory: server / (shared + KV budget + 1.5 x active factors)",
            [(after["RssAnon"] + after["RssFile"]) / must],
            "x",
            at_least=1.3,
            aim=1.15,
            note=f"RssAnon + RssFile of the process, libraries included (about 390 MiB before anything is "
            f"loaded), with the KV cache full, no materialised weights; MiB: {parts}, "
            f"Pss {pss / _MIB:.0f}, RSS before the first request {idle['VmRSS'] / _MIB:.0f}; shared "
            f"{shared / _MIB:.0f}, KV budget {budget / _MIB:.0f}, factors {factors / _MIB:.0f} (all active)",
        )
    ]


def _device_bytes(bundle: Bundle, name: str) -> int:
    """Of an expert's factors in bfloat16, as the engine holds them."""
    expert = bundle.expert(name)
    matrices = sum(2 * factors.rank * sum(factors.shape) for factors in expert.factors.values())
    return matrices + sum(2 * vector.numel() for vector in expert.exact.values())


def _kv_bytes_a_token(bundle: Bundle) -> int:
    """Keys and values of all layers in bfloat16."""
    config = AutoConfig.from_pretrained(bundle.shared_path).get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * dim)
