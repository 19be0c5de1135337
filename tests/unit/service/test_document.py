"""The OpenAPI document: every error of the tree, examples that fit their models, and no refusal of others."""

import inspect
from functools import cache
from typing import Any

import pytest

from service import errors
from service.api.refusals import GENERATING, merged, refusals
from service.api.wire.chat import ChatBody
from service.api.wire.completions import CompletionBody
from service.api.wire.routing import RouteBody
from service.errors import TwinserveError
from tests.unit.service.backend import ScriptedBackend
from tests.unit.service.edge import call

TREE = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, TwinserveError)]


@cache
def document() -> dict[str, Any]:
    return dict(call(ScriptedBackend(), None, "/openapi.json", "GET").json())


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
    ]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_is_told_under_its_status(kind: type[TwinserveError]) -> None:
    told = [
        operation["responses"].get(str(kind.status), {}).get("content", {}).get("application/json", {})
        for _, _, operation in operations()
    ]
    examples = [one["examples"][kind.code]["value"] for one in told if kind.code in one.get("examples", {})]
    assert examples
    for example in examples:
        assert example["error"]["code"] == kind.code
        assert example["error"]["type"] == kind.type


def test_no_operation_tells_of_refusals_that_never_come() -> None:
    text = str(document())
    assert "HTTPValidationError" not in text
    for path, method, operation in operations():
        for status, told in operation["responses"].items():
            assert told["description"], (path, method, status)


def test_every_reference_leads_somewhere() -> None:
    schemas = document()["components"]["schemas"]

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                assert node["$ref"].removeprefix("#/components/schemas/") in schemas, node["$ref"]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(document())


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, RouteBody])
def test_the_examples_of_a_body_are_such_bodies(body: Any) -> None:
    examples = body.model_json_schema()["examples"]
    assert len(examples) > 1
    for example in examples:
        body.model_validate(example)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_is_told_whole_and_streamed_with_its_headers(path: str) -> None:
    told = document()["paths"][path]["post"]["responses"]["200"]
    assert told["content"].keys() == {"application/json", "text/event-stream"}
    assert "X-Twinserve-Pattern" in told["headers"]
    name = told["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    assert document()["components"]["schemas"][name]["examples"][0]["choices"]


def test_merging_keeps_every_example_and_says_each_sentence_once() -> None:
    both = merged(refusals(errors.ConflictError), refusals(errors.ConflictError, errors.AlreadyRatedError))
    assert both[409]["content"]["application/json"]["examples"].keys() == {"conflict", "already_rated"}
    assert both[409]["description"].count("The name is taken") == 1
    assert GENERATING[504]["content"]["application/json"]["examples"].keys() == {"deadline_exceeded"}
