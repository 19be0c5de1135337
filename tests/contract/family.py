"""A tiny family whose chat template shows tools as Hermes and Qwen write them, with room for their descriptions."""

from collections.abc import Sequence
from pathlib import Path

from experts.build import BuildPlan, build_bundle
from experts.compression import CompressionSpec
from experts.merging.methods import TaskArithmetic
from tests.fixtures.tiny import TinyFamily, tiny_lora, tiny_model, tiny_prompts

CONTEXT = 4096
EXPERTS = ("alpha", "beta", "gamma")
EMBEDDED = ("category", "french", "german", "inflect", "pronounce", "spanish", "spell", "stress")
"""The names that the OpenAPI document's examples use."""

_TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer with <tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def contract_family(path: Path, name: str = "tiny", experts: Sequence[str] = EXPERTS) -> TinyFamily:
    """Base, fine-tunes and bundle below `path`."""
    base = tiny_model("llama", path / "base", max_position_embeddings=CONTEXT)
    (base / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    fine_tunes = {
        expert: tiny_lora(path / "fine-tunes" / expert, base, seed=index + 1)
        for index, expert in enumerate(experts)
    }
    prompts = {expert: tiny_prompts(path / "prompts" / f"{expert}.jsonl", expert) for expert in experts}
    plan = BuildPlan(
        base=base,
        experts=fine_tunes,
        out=path / "bundle",
        name=name,
        method=TaskArithmetic(scale=0.3),
        compression=CompressionSpec(rank=8, dtype="float32"),
        prompts=prompts,
        router="mlp",
    )
    build_bundle(plan)
    return TinyFamily(plan.out, base, fine_tunes, prompts)
