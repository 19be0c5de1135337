import json

import pytest
from transformers import AutoTokenizer

from tests.api.harness import Served, error_of, serving
from tests.fixtures.tiny import CONTEXT, VOCABULARY, TinyFamily

TEXT = "the quick 🦊 jumps"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def tokenizer(family: TinyFamily):
    return AutoTokenizer.from_pretrained(family.bundle / "shared")


def tokenize(server: Served, **body):
    answer = server.post("/tokenize", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_comes_back_as_the_tokens_that_a_completion_counts(server: Served, tokenizer) -> None:
    answer = tokenize(server, prompt=TEXT)
    assert answer == {
        "count": len(answer["tokens"]),
        "max_model_len": CONTEXT,
        "tokens": tokenizer.encode(TEXT),
        "token_strs": None,
    }
    usage = server.complete(prompt=TEXT, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == answer["count"]


def test_a_chat_comes_back_as_the_tokens_that_a_chat_completion_counts(server: Served, tokenizer) -> None:
    answer = tokenize(server, model="tiny", messages=CHAT)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    made = server.post("/v1/chat/completions", {"model": "tiny", "messages": CHAT, "max_tokens": 1}).json()
    assert made["usage"]["prompt_tokens"] == answer["count"]
    closed = tokenize(server, messages=CHAT, add_generation_prompt=False)
    assert answer["tokens"][: closed["count"]] == closed["tokens"]
    assert closed["count"] < answer["count"]
    begun = tokenize(
        server, messages=[*CHAT, {"role": "assistant", "content": "So"}], continue_final_message=True
    )
    assert begun["tokens"] == [*answer["tokens"], *tokenizer.encode("So")]


def test_tokens_are_shown_as_the_vocabulary_writes_them(server: Served, tokenizer) -> None:
    answer = tokenize(server, prompt=TEXT, return_token_strs=True)
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])


def test_a_text_longer_than_the_context_is_counted_all_the_same(server: Served) -> None:
    long = TEXT * 2000
    assert tokenize(server, prompt=long)["count"] > CONTEXT
    assert tokenize(server, prompt="")["tokens"] == []


def test_llama_cpps_form_is_understood(server: Served, tokenizer) -> None:
    plain = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenize(server, content=TEXT)["tokens"] == plain
    assert tokenize(server, content=TEXT, add_special=True)["tokens"] == tokenizer.encode(TEXT)
    pieces = tokenize(server, content="the quick", with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == tokenizer.encode("the quick", add_special_tokens=False)
    assert "".join(piece["piece"] for piece in pieces) == "the quick"


@pytest.mark.parametrize("text", [TEXT, "", "a\nb\tc", "<|im_start|>user\nhello<|im_end|>\n", "é" * 500])
def test_detokenize_undoes_tokenize(server: Served, text: str) -> None:
    tokens = tokenize(server, prompt=text)["tokens"]
    answer = server.post("/detokenize", {"model": "alpha", "tokens": tokens})
    assert answer.json() == {"prompt": text, "content": text}


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/tokenize", {}, None, "Give one of 'prompt', 'messages' and 'content'."),
        ("/tokenize", {"prompt": "a", "content": "a"}, None, "Give one of"),
        (
            "/tokenize",
            {"prompt": "a", "add_special": True, "add_special_tokens": True},
            "add_special",
            "another name",
        ),
        (
            "/tokenize",
            {"prompt": "a", "add_generation_prompt": True},
            "add_generation_prompt",
            "for messages",
        ),
        ("/tokenize", {"prompt": 5}, "prompt", "valid string"),
        ("/tokenize", {"prompt": "\ud800"}, None, "cannot be encoded"),
        ("/tokenize", {"messages": []}, "messages", "at least 1 item"),
        ("/tokenize", {"messages": CHAT, "chat_template": "x"}, "chat_template", "not supported"),
        (
            "/detokenize",
            {"tokens": [VOCABULARY]},
            "tokens",
            f"token id {VOCABULARY} is not in the vocabulary",
        ),
        ("/detokenize", {"tokens": [10**30]}, "tokens", "is not in the vocabulary"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "whole numbers from 0"),
        ("/detokenize", {"tokens": ["a"]}, "tokens", "whole numbers from 0"),
        ("/detokenize", {}, "tokens", "required"),
    ],
)
def test_bad_bodies_are_told_what_is_wrong(server: Served, path, body, param, says) -> None:
    headers = {"Content-Type": "application/json"}
    answer = server.http.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model_is_not_found(server: Served, path: str) -> None:
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [5]}
    answer = server.post(path, {"model": "nobody", **body})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


def test_they_need_a_key_where_the_rest_does_and_the_limit_of_messages_holds(family: TinyFamily) -> None:
    with serving(family.bundle, api_keys="secret", max_messages=1) as served:
        for path in ("/tokenize", "/detokenize"):
            assert served.post(path, {}).status_code == 401
        key = {"Authorization": "Bearer secret"}
        answer = served.post("/tokenize", {"messages": CHAT}, headers=key)
        assert error_of(answer)["code"] == "limit_exceeded"
        assert served.http.get("/version").json().keys() == {"version"}
        assert served.http.get("/v1/models/alpha", headers=key).json()["id"] == "alpha"
