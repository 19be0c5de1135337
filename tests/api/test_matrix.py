"""echo × logprobs × list × n × ids × stream × gates: every combination says what the single features say."""

import itertools
from typing import Any

import pytest

from tests.api.harness import Served

PROMPTS = ("Add 1 and 2.", "¿Cómo se dice «río» en español?")
TOKENS = 6
GATES: dict[str, dict[str, Any]] = {
    "router": {"model": "tiny"},
    "expert": {"model": "beta"},
    "mix": {"model": "tiny", "gates": {"alpha": 0.75, "gamma": -0.5}},
    "shared": {"model": "shared"},
}
GREEDY: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(scope="module")
def single(server: Served) -> dict[tuple[str, str], dict[str, Any]]:
    """What each prompt gets under each gates when one thing is asked for at a time."""
    found = {}
    for gates, prompt in itertools.product(GATES, PROMPTS):
        plain = server.complete(prompt=prompt, **GATES[gates], **GREEDY)
        scored = server.complete(prompt=prompt, **GATES[gates], **GREEDY, echo=True, logprobs=2)
        found[gates, prompt] = {
            "text": plain["choices"][0]["text"],
            "usage": plain["usage"],
            "routing": plain["choices"][0]["routing"],
            "logprobs": scored["choices"][0]["logprobs"],
            "prompt_ids": list(server.runtime.tokenizer.encode(prompt)),
        }
    return found


def asked(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, put together again if it was streamed."""
    if not body["stream"]:
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())
    body = {**body, "stream_options": {"include_usage": True}}
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in server.chunks("/v1/completions", body):
        usage = chunk.get("usage")
        for piece in chunk["choices"]:
            whole = choices.setdefault(piece["index"], {"text": "", "logprobs": None})
            assert "finish_reason" not in whole or whole["finish_reason"] is None
            whole["text"] += piece["text"]
            whole |= {name: piece.get(name) for name in ("finish_reason", "routing")}
            if piece["logprobs"] is not None:
                parts = whole["logprobs"] = whole["logprobs"] or {name: [] for name in COLUMNS}
                for name in COLUMNS:
                    parts[name] += piece["logprobs"][name]
    return {
        "choices": [{"index": index, **choice} for index, choice in sorted(choices.items())],
        "usage": usage,
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("many", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("echo", [False, True], ids=["", "echo"])
@pytest.mark.parametrize("gates", list(GATES))
def test_features_together_say_what_they_say_alone(
    server: Served,
    single: dict[tuple[str, str], dict[str, Any]],
    gates: str,
    echo: bool,
    logprobs: int | None,
    many: bool,
    n: int,
    ids: bool,
    stream: bool,
) -> None:
    prompts = PROMPTS if many else PROMPTS[:1]
    alone = [single[gates, prompt] for prompt in prompts]
    forms: list[Any] = [
        one["prompt_ids"] if ids else prompt for one, prompt in zip(alone, prompts, strict=True)
    ]
    body = {
        **GATES[gates],
        **GREEDY,
        "prompt": forms if many else forms[0],
        "n": n,
        "echo": echo,
        "logprobs": logprobs,
        "stream": stream,
    }
    answer = asked(server, body)

    assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts) * n))
    for choice in answer["choices"]:
        prompt, one = prompts[choice["index"] // n], alone[choice["index"] // n]
        assert choice["text"] == (prompt if echo else "") + one["text"]
        assert choice["finish_reason"] == "length"
        assert choice["routing"]["gates"] == pytest.approx(one["routing"]["gates"], abs=1e-4)
        assert choice["routing"]["generations"] == one["routing"]["generations"]
        if logprobs is None:
            assert choice["logprobs"] is None
        else:
            _same_scores(choice["logprobs"], one, prompt, echo=echo)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    assert usage["completion_tokens"] == n * TOKENS * len(prompts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def _same_scores(found: dict[str, Any], one: dict[str, Any], prompt: str, *, echo: bool) -> None:
    """As with an echo of one prompt; without it, from the answer's first token on."""
    begin, shift = (0, 0) if echo else (len(one["prompt_ids"]), len(prompt))
    expected = {name: one["logprobs"][name][begin:] for name in COLUMNS}
    assert found["tokens"] == expected["tokens"]
    assert found["text_offset"] == [offset - shift for offset in expected["text_offset"]]
    assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-3)
    for ours, theirs in zip(found["top_logprobs"], expected["top_logprobs"], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours == pytest.approx(theirs, abs=1e-3)
