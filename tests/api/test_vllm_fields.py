"""What vLLM's clients send besides OpenAI's fields, and what they get for it."""

import threading
from typing import Any

import pytest

from tests.api.harness import Served, error_of, eventually
from tests.fixtures.tiny import CONTEXT

PROMPT = "Add 1 and 2."
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]}
GREEDY: dict[str, Any] = {"model": "alpha", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


def choice_of(server: Served, **body: Any) -> dict[str, Any]:
    [choice] = server.complete(**{**GREEDY, **body})["choices"]
    return dict(choice)


def letters(server: Served, text: str) -> list[int]:
    """The tokens of single characters, so that answers are clean text."""
    return [server.runtime.tokenizer.encode(letter)[0] for letter in text]


def test_token_ids_are_the_prompts_and_the_answers(server: Served) -> None:
    answer = server.complete(**GREEDY, prompt=[PROMPT, "SORT: a"], n=2, return_token_ids=True)
    tokenizer = server.runtime.tokenizer
    for index, choice in enumerate(answer["choices"]):
        assert choice["prompt_token_ids"] == tokenizer.encode([PROMPT, "SORT: a"][index // 2])
        assert len(choice["token_ids"]) == 12
    assert (
        sum(len(choice["token_ids"]) for choice in answer["choices"]) == answer["usage"]["completion_tokens"]
    )
    assert "token_ids" not in choice_of(server)


def test_a_stream_has_the_same_token_ids_in_pieces(server: Served) -> None:
    body: dict[str, Any] = {**GREEDY, "prompt": [PROMPT, "SORT: a"], "return_token_ids": True}
    whole = server.complete(**body)["choices"]
    ids: list[list[int]] = [[], []]
    prompts: list[list[list[int]]] = [[], []]
    for chunk in server.chunks("/v1/completions", body):
        [choice] = chunk["choices"]
        ids[choice["index"]] += choice.get("token_ids", [])
        if "prompt_token_ids" in choice:
            prompts[choice["index"]].append(choice["prompt_token_ids"])
    assert ids == [choice["token_ids"] for choice in whole]
    assert prompts == [[choice["prompt_token_ids"]] for choice in whole]


def test_a_chat_tells_its_prompts_ids_beside_its_choices(server: Served) -> None:
    body = {**CHAT, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    whole = server.post("/v1/chat/completions", body).json()
    tokenizer: Any = server.runtime.tokenizer
    rendered = tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True)
    assert whole["prompt_token_ids"] == rendered["input_ids"]
    assert len(whole["choices"][0]["token_ids"]) == whole["usage"]["completion_tokens"]
    chunks = server.chunks("/v1/chat/completions", body)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]


def test_the_token_that_ends_an_answer_is_counted_and_told_but_leaves_no_text(server: Served) -> None:
    clean: dict[str, Any] = {"allowed_token_ids": letters(server, "abcdefgh "), "temperature": 1, "seed": 2}
    free = choice_of(server, **clean, return_token_ids=True)
    third = free["token_ids"][2]
    first = free["token_ids"].index(third)
    ended = choice_of(server, **clean, stop_token_ids=[third], return_token_ids=True, logprobs=0)
    assert ended["token_ids"] == free["token_ids"][: first + 1]
    assert ended["stop_reason"] == third
    assert len(ended["logprobs"]["tokens"]) == first + 1
    tokenizer = server.runtime.tokenizer
    assert ended["text"] == tokenizer.decode(free["token_ids"][:first])
    kept = choice_of(server, **clean, stop_token_ids=[third], include_stop_str_in_output=True)
    assert kept["text"] == tokenizer.decode(free["token_ids"][: first + 1])


def test_a_stop_string_may_stay_in_the_text(server: Served) -> None:
    text = choice_of(server)["text"]
    stop = text[3:5]
    cut, kept = choice_of(server, stop=stop), choice_of(server, stop=stop, include_stop_str_in_output=True)
    assert cut["text"] + stop == kept["text"]
    assert text.startswith(kept["text"])
    streamed = server.chunks(
        "/v1/completions", {**GREEDY, "prompt": PROMPT, "stop": stop, "include_stop_str_in_output": True}
    )
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == kept["text"]


def test_special_tokens_can_be_seen(server: Served) -> None:
    [special] = server.runtime.tokenizer.encode("<|im_start|>")
    body: dict[str, Any] = {"allowed_token_ids": [special], "max_tokens": 3}
    assert choice_of(server, **body)["text"] == ""
    assert choice_of(server, **body, skip_special_tokens=False)["text"] == "<|im_start|>" * 3


def test_only_allowed_tokens_come(server: Served) -> None:
    allowed = letters(server, "xyz")
    for temperature in (0, 1.5):
        choice = choice_of(server, allowed_token_ids=allowed, temperature=temperature, return_token_ids=True)
        assert set(choice["token_ids"]) <= set(allowed)


def test_bad_words_do_not_come_up(server: Served) -> None:
    both = letters(server, "xy")
    assert choice_of(server, allowed_token_ids=both, bad_words=["x"])["text"] == "y" * 12
    pairs = choice_of(server, allowed_token_ids=both, bad_words=["xx", "yy"])["text"]
    assert pairs in ("xy" * 6, "yx" * 6)


def test_what_leaves_no_token_is_refused_or_ends_alone(server: Served) -> None:
    [x] = server.runtime.tokenizer.encode("x")
    body = {"model": "tiny", "prompt": PROMPT, "allowed_token_ids": [x]}
    answer = server.post("/v1/completions", {**body, "bad_words": ["x"]})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "allowed_token_ids"
    later = server.post("/v1/completions", {**body, "bad_words": ["xx"]})
    assert later.status_code == 400
    assert "No token is left" in error_of(later)["message"]


def test_prompt_logprobs_are_those_of_an_echo_in_vllms_shape(server: Served) -> None:
    body: dict[str, Any] = {"model": "shared", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    [asked] = server.complete(**body, prompt_logprobs=2)["choices"]
    [echoed] = server.complete(**body, echo=True, logprobs=2)["choices"]
    ids = server.runtime.tokenizer.encode(PROMPT)
    told = asked["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == len(ids)
    for place, token in enumerate(ids[1:], 1):
        entry = told[place][str(token)]
        assert entry["logprob"] == pytest.approx(echoed["logprobs"]["token_logprobs"][place], abs=1e-3)
        ranks = sorted(one["rank"] for one in told[place].values())
        assert ranks in ([1, 2], [1, 2, entry["rank"]])
    chat = server.post("/v1/chat/completions", {**CHAT, "prompt_logprobs": 0, "max_tokens": 1}).json()
    assert chat["prompt_logprobs"][0] is None
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_tokens_can_be_named_by_their_ids(server: Served) -> None:
    choice = choice_of(server, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True)
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)


def test_an_echo_alone_generates_nothing(server: Served) -> None:
    answer = server.complete(model="shared", max_tokens=0, echo=True, logprobs=1)
    [choice] = answer["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    chunks = server.chunks(
        "/v1/completions", {"model": "shared", "prompt": PROMPT, "max_tokens": 0, "echo": True}
    )
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT


def test_a_prompts_end_is_kept(server: Served) -> None:
    ids = server.runtime.tokenizer.encode(PROMPT)
    body: dict[str, Any] = {**GREEDY, "echo": True, "return_token_ids": True}
    kept = choice_of(server, **{**body, "prompt": PROMPT, "truncate_prompt_tokens": 3})
    assert kept["prompt_token_ids"] == ids[-3:]
    assert kept["text"].startswith(server.runtime.tokenizer.decode(ids[-3:]))
    fitted = choice_of(server, **{**body, "prompt": [5] * 1000, "truncate_prompt_tokens": -1})
    assert len(fitted["prompt_token_ids"]) == CONTEXT - GREEDY["max_tokens"]
    chat = server.post("/v1/chat/completions", {**CHAT, "truncate_prompt_tokens": 4, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_chunk_tells_the_usage_so_far(server: Served, path: str) -> None:
    body: dict[str, Any] = {**CHAT, "max_tokens": 8, "ignore_eos": True}
    if path == "/v1/completions":
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.chunks(path, {**body, "stream_options": options})
    made = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert made == sorted(made)
    assert made[-1] == 8
    for chunk in chunks:
        usage = chunk["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_answer_bears_the_requests_id(server: Served) -> None:
    body = {"model": "shared", "prompt": "a", "max_tokens": 1, "request_id": "from-the-body"}
    assert server.post("/v1/completions", body).json()["id"] == "cmpl-from-the-body"
    headers = {"X-Request-Id": "from-the-header"}
    assert server.post("/v1/completions", body, headers=headers).json()["id"] == "cmpl-from-the-header"
    chat = server.post("/v1/chat/completions", {**CHAT, "request_id": "chat-1", "max_tokens": 1}).json()
    assert chat["id"] == "chatcmpl-chat-1"
    plain = server.post("/v1/completions", {**body, "request_id": None})
    assert plain.json()["id"] == f"cmpl-{plain.headers['x-request-id']}"


def test_an_id_that_is_running_is_a_conflict_and_free_again_afterwards(server: Served) -> None:
    body = {**GREEDY, "prompt": PROMPT, "request_id": "twice", "max_tokens": 200, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as running:
        assert running.status_code == 200
        refused = server.post("/v1/completions", {**body, "stream": False})
        assert refused.status_code == 409
        assert error_of(refused)["param"] == "request_id"
    assert eventually(lambda: server.post("/v1/completions", {**body, "stream": False}).status_code == 200)


def test_a_seeded_answer_is_the_same_whoever_comes_and_goes_beside_it(server: Served) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPT,
        "seed": 11,
        "max_tokens": 60,
        "ignore_eos": True,
        "n": 2,
    }
    alone = [choice["text"] for choice in server.complete(**body)["choices"]]
    going = threading.Event()

    def noise(number: int) -> None:
        while not going.is_set():
            server.complete(
                model="beta", prompt=f"SORT: {number} river", max_tokens=3 + number, ignore_eos=True
            )

    others = [threading.Thread(target=noise, args=(number,)) for number in range(3)]
    for other in others:
        other.start()
    try:
        assert eventually(lambda: server.runtime.gauges().running > 0)
        beside = [[choice["text"] for choice in server.complete(**body)["choices"]] for _ in range(3)]
    finally:
        going.set()
        for other in others:
            other.join()
    assert beside == [alone] * 3


def test_special_tokens_are_added_as_asked(server: Served) -> None:
    for special in (True, False):
        choice = choice_of(server, add_special_tokens=special, return_token_ids=True)
        assert choice["prompt_token_ids"] == server.runtime.tokenizer.encode(
            PROMPT, add_special_tokens=special
        )


def test_neutral_fields_change_nothing(server: Served) -> None:
    plain = choice_of(server)
    neutral = {"metadata": {"job": "7"}, "store": False, "service_tier": "auto", "best_of": 1, "user": "x"}
    assert choice_of(server, **neutral) == plain
