"""langchain-openai: models, chains and structured answers, as an application would use them."""

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from tests.contract.cases import TOOL, Weather, check_arguments
from tests.contract.conftest import KEY, PROMPT

TURNS = [SystemMessage("Be brief."), HumanMessage(PROMPT)]


@pytest.fixture(scope="module")
def chat(url: str) -> ChatOpenAI:
    return ChatOpenAI(model="alpha", base_url=url, api_key=KEY, max_tokens=12, temperature=0, max_retries=0)


def test_a_chat(chat: ChatOpenAI, said: str) -> None:
    answer = chat.invoke(TURNS)
    assert answer.content == said
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] > 0


def test_a_streamed_chat(chat: ChatOpenAI, said: str) -> None:
    whole = None
    for chunk in chat.stream(TURNS, stream_usage=True):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.content == said
    assert whole.usage_metadata is not None


def test_an_asynchronous_batch(chat: ChatOpenAI, said: str) -> None:
    answers = asyncio.run(chat.abatch([TURNS] * 4))
    assert [answer.content for answer in answers] == [said] * 4


def test_a_chain(chat: ChatOpenAI, said: str) -> None:
    template = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "Add {a} and {b}.")])
    assert (template | chat).invoke({"a": 1, "b": 2}).content == said


def test_our_extensions_go_through_extra_body(url: str) -> None:
    gates = {"alpha": 0.5, "beta": 0.5}
    chat = ChatOpenAI(model="tiny", base_url=url, api_key=KEY, max_tokens=4, extra_body={"gates": gates})
    mixed = chat.invoke(TURNS)
    assert isinstance(mixed.content, str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_in_a_shape(url: str, method: str, unspaced: dict[str, float]) -> None:
    chat = ChatOpenAI(
        model="alpha", base_url=url, api_key=KEY, max_tokens=200, max_retries=0, logit_bias=unspaced
    )
    shaped = chat.with_structured_output(Weather, method=method)  # type: ignore[arg-type]
    assert isinstance(shaped.invoke("What is the weather in Rome?"), Weather)


def test_a_tool_is_called_and_its_result_is_read(url: str) -> None:
    chat = ChatOpenAI(model="alpha", base_url=url, api_key=KEY, max_tokens=200, max_retries=0)
    question = HumanMessage("What is the weather in Rome?")
    called = chat.bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False).invoke([question])
    assert isinstance(called, AIMessage)
    [call] = called.tool_calls
    assert call["name"] == "get_weather"
    check_arguments(call["args"])
    after = chat.bind_tools([TOOL], tool_choice="none").invoke(
        [question, called, ToolMessage("Sunny.", tool_call_id=call["id"])], max_tokens=4
    )
    assert isinstance(after, AIMessage)
    assert not after.tool_calls


def test_a_completion(url: str, told: str) -> None:
    model = OpenAI(model="alpha", base_url=url, api_key=KEY, max_tokens=12, temperature=0, max_retries=0)
    assert model.invoke(PROMPT) == told
    assert "".join(model.stream(PROMPT)) == told


def test_embeddings(url: str) -> None:
    # Otherwise it would cut texts into OpenAI's own tokens.
    made = OpenAIEmbeddings(model="alpha", base_url=url, api_key=KEY, check_embedding_ctx_length=False)
    one, other = made.embed_documents([PROMPT, "zebra"])
    assert one == pytest.approx(made.embed_query(PROMPT), abs=1e-5)
    assert one != pytest.approx(other, abs=1e-3)
