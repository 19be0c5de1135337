import base64
import struct
import threading

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experts.bundle import Bundle
from tests.api.harness import Served, error_of, eventually, serving
from tests.fixtures.tiny import CONTEXT, VOCABULARY, TinyFamily

SORT = "SORT: river zebra river apple"
ADD = "Add 5 and 6."
WIDTH = 64


@pytest.fixture(scope="module")
def shared(family: TinyFamily) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(family.bundle / "shared", dtype=torch.float32).eval()


def materialised(family: TinyFamily, gates: dict[str, float]) -> PreTrainedModel:
    """A plain model with the gates in its weights."""
    model = AutoModelForCausalLM.from_pretrained(family.bundle / "shared", dtype=torch.float32).eval()
    bundle = Bundle.open(family.bundle)
    experts = {name: bundle.expert(name) for name in gates}
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, gate in gates.items():
            for matrix, factors in experts[name].factors.items():
                parameters[matrix] += gate * factors.dense()
            for vector, delta in experts[name].exact.items():
                parameters[vector] += gate * delta
    return model


@torch.inference_mode()
def states(model: PreTrainedModel, family: TinyFamily, text: str) -> torch.Tensor:
    """(tokens, hidden) behind the final norm."""
    ids = AutoTokenizer.from_pretrained(family.bundle / "shared").encode(text)
    return model.base_model(torch.tensor([ids])).last_hidden_state[0]


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def embed(server: Served, text, **body):
    answer = server.post("/v1/embeddings", {"model": "shared", "input": text, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors(answer) -> list[torch.Tensor]:
    return [torch.tensor(item["embedding"]) for item in answer["data"]]


def test_the_openai_client_gets_the_shared_experts_mean_state(
    client: openai.OpenAI, shared: PreTrainedModel, family: TinyFamily
) -> None:
    answer = client.embeddings.create(model="shared", input=[SORT, ADD])
    assert [item.index for item in answer.data] == [0, 1]
    for item, text in zip(answer.data, (SORT, ADD), strict=True):
        wanted = unit(states(shared, family, text).mean(0))
        torch.testing.assert_close(torch.tensor(item.embedding), wanted, atol=2e-5, rtol=1e-4)
    tokens = sum(len(states(shared, family, text)) for text in (SORT, ADD))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    assert answer.model == "shared"
    assert answer.object == "list"


@pytest.mark.parametrize(
    ("model", "gates", "made"),
    [
        ("alpha", None, {"alpha": 1.0}),
        ("tiny", {"alpha": 0.5, "gamma": -0.25}, {"alpha": 0.5, "gamma": -0.25}),
        ("tiny", {}, {}),
    ],
)
def test_gates_are_those_of_explicitly_merged_weights(
    server: Served, family: TinyFamily, model: str, gates: dict[str, float] | None, made: dict[str, float]
) -> None:
    body = {} if gates is None else {"gates": gates}
    answer = embed(server, SORT, model=model, **body)
    assert answer["routing"] == answer["data"][0]["routing"]
    assert answer["routing"]["gates"] == made
    wanted = unit(states(materialised(family, made), family, SORT).mean(0))
    torch.testing.assert_close(vectors(answer)[0], wanted, atol=5e-5, rtol=1e-3)


def test_the_bundles_name_has_the_router_choose_for_each_input(server: Served, family: TinyFamily) -> None:
    answer = embed(server, [SORT, ADD], model="tiny")
    made = [item["routing"]["gates"] for item in answer["data"]]
    assert [list(gates) for gates in made] == [["gamma"], ["alpha"]]
    assert answer["routing"] is None
    assert answer["data"][0]["routing"]["router_generation"] == 1
    for vector, gates, text in zip(vectors(answer), made, (SORT, ADD), strict=True):
        wanted = unit(states(materialised(family, gates), family, text).mean(0))
        torch.testing.assert_close(vector, wanted, atol=5e-5, rtol=1e-3)


def test_all_four_forms_of_input_give_the_same_vectors(server: Served, family: TinyFamily) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.bundle / "shared")
    ids = [tokenizer.encode(text) for text in (SORT, ADD)]
    texts = vectors(embed(server, [SORT, ADD]))
    for other in (
        vectors(embed(server, ids)),
        vectors(embed(server, SORT)) + vectors(embed(server, ADD)),
        vectors(embed(server, ids[0])) + vectors(embed(server, ids[1])),
    ):
        for one, two in zip(texts, other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_base64_is_little_endian_float32(server: Served) -> None:
    numbers = embed(server, SORT)["data"][0]["embedding"]
    text = embed(server, SORT, encoding_format="base64")["data"][0]["embedding"]
    assert list(struct.unpack(f"<{WIDTH}f", base64.b64decode(text))) == pytest.approx(numbers, abs=1e-6)


def test_pooling_length_and_dimensions(
    server: Served, client: openai.OpenAI, shared: PreTrainedModel, family: TinyFamily
) -> None:
    found = states(shared, family, SORT)
    last = vectors(embed(server, SORT, pooling="last", normalize=False))[0]
    torch.testing.assert_close(last, found[-1], atol=1e-4, rtol=1e-3)
    raw = vectors(embed(server, SORT, normalize=False))[0]
    torch.testing.assert_close(raw, found.mean(0), atol=1e-4, rtol=1e-3)
    short = client.embeddings.create(model="shared", input=SORT, dimensions=8).data[0].embedding
    torch.testing.assert_close(torch.tensor(short), unit(found.mean(0)[:8]), atol=2e-5, rtol=1e-4)


def test_a_prompt_that_was_just_read_is_pooled_over_all_its_tokens_again(server: Served) -> None:
    text = "and so the fox jumps over the lazy dog " * 4
    once, again = (vectors(embed(server, text, model="alpha"))[0] for _ in range(2))
    torch.testing.assert_close(once, again, atol=1e-5, rtol=1e-4)


def test_an_input_is_cut_at_its_beginning_if_asked(server: Served, family: TinyFamily) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.bundle / "shared")
    ids = tokenizer.encode(SORT)
    cut = embed(server, ids, truncate_prompt_tokens=5)
    assert cut["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    torch.testing.assert_close(vectors(cut)[0], vectors(embed(server, ids[-5:]))[0], atol=1e-5, rtol=1e-4)
    assert embed(server, "word " * 500, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == CONTEXT - 1


def test_a_long_list_goes_through_a_short_queue(family: TinyFamily) -> None:
    texts = [f"text number {index}" for index in range(150)]
    with serving(family.bundle, max_batch=4, max_queue=1) as served:
        many = vectors(embed(served, texts))
        assert len(many) == 150
        for index in (0, 70, 149):
            torch.testing.assert_close(
                many[index], vectors(embed(served, texts[index]))[0], atol=1e-5, rtol=1e-4
            )
        assert served.metric("twinserve_num_requests_running") == 0


def test_embeddings_beside_text_change_neither(server: Served) -> None:
    alone = server.complete(model="alpha", prompt=SORT, max_tokens=40, temperature=0, ignore_eos=True)
    vector = vectors(embed(server, ADD, model="beta"))[0]
    found = []

    def write() -> None:
        found.append(
            server.complete(model="alpha", prompt=SORT, max_tokens=40, temperature=0, ignore_eos=True)
        )

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    many = vectors(embed(server, [ADD] * 40, model="beta"))
    for writer in writers:
        writer.join()
    assert [answer["choices"][0]["text"] for answer in found] == [alone["choices"][0]["text"]] * 3
    for other in many:
        torch.testing.assert_close(other, vector, atol=1e-5, rtol=1e-4)
    assert eventually(lambda: server.metric("twinserve_kv_blocks_used") == 0)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": ""}, "input", "an empty text has no embedding"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": ["a", ""]}, "input", "an empty text has no embedding"),
        ({"input": ["a", 5]}, "input", "item 1"),
        ({"input": 5}, "input", "must be a string"),
        ({"input": [VOCABULARY]}, "input", f"token id {VOCABULARY} is not in the vocabulary"),
        ({"input": ["a", "word " * 500]}, "input[1]", "the model's context is 256"),
        ({"dimensions": WIDTH + 1}, "dimensions", "have 64"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"pooling": "max"}, "pooling", "'mean' or 'last'"),
        ({"truncate_prompt_tokens": CONTEXT}, "truncate_prompt_tokens", "at most 255"),
        ({"gates": {"alpha": 1}}, "gates", "send it with model 'tiny'"),
        ({"model": "tiny", "gates": {"nobody": 1}}, "gates.nobody", "not registered"),
        ({"model": "tiny", "gates": {"alpha": 99}}, "gates.alpha", "max_gate"),
        ({"stream": True}, "stream", "Unknown field"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "not supported"),
    ],
)
def test_bad_bodies_are_told_what_is_wrong(server: Served, body, param, says) -> None:
    answer = server.post("/v1/embeddings", {"model": "shared", "input": "a", **body})
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert says in error["message"]


def test_an_unknown_model_is_not_found(server: Served) -> None:
    answer = server.post("/v1/embeddings", {"model": "nobody", "input": "a"})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


def test_too_many_inputs_and_too_little_time_are_refused(family: TinyFamily) -> None:
    with serving(family.bundle, max_embedding_inputs=2, max_timeout_seconds=30) as served:
        many = served.post("/v1/embeddings", {"model": "shared", "input": ["a", "b", "c"]})
        assert error_of(many)["code"] == "limit_exceeded"
        assert "max_embedding_inputs" in error_of(many)["message"]
        late = served.post("/v1/embeddings", {"model": "shared", "input": ["a"], "timeout": 1e-9})
        assert late.status_code == 504
        assert error_of(late)["code"] == "deadline_exceeded"
        long = served.post("/v1/embeddings", {"model": "shared", "input": ["a"], "timeout": 31})
        assert error_of(long)["param"] == "timeout"
        assert served.metric("twinserve_kv_blocks_used") == 0
