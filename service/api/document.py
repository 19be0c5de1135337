"""The OpenAPI document: the framework's, with every error of the tree where it may come, and examples."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from service import errors
from service.api.links import add_links
from service.api.refusals import ANYWHERE, LOCKED, Responses, described, merged, refusals, with_body
from service.api.wire.answers import ErrorAnswer

_OPEN = ("/health", "/version")
_METHODS = ("get", "put", "post", "delete", "patch")
_FRAMEWORKS = ("HTTPValidationError", "ValidationError")
"""Schemas of answers that this server does not give."""


class DocumentedApp(FastAPI):
    """An app whose document tells every refusal."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            for path, methods in document.get("paths", {}).items():
                for method, operation in methods.items():
                    if method in _METHODS:
                        _complete(path, operation)
            _add_components(document)
            add_links(document)
            self.openapi_schema = document
        return self.openapi_schema


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Add what every such route may refuse to what it says itself."""
    own: dict[str, Any] = operation.setdefault("responses", {})
    if _is_frameworks(own.get("422", {})):
        del own["422"]
    for status, told in _common(path, operation).items():
        known = own.setdefault(str(status), {"description": "", "content": {}})
        new = told["content"]["application/json"]
        known["description"] = described(known["description"], new["examples"])
        content = known.setdefault("content", {}).setdefault("application/json", {"schema": new["schema"]})
        content["examples"] = {**new["examples"], **content.get("examples", {})}


def _common(path: str, operation: Mapping[str, Any]) -> Responses:
    parts = [refusals(*ANYWHERE)]
    if not path.startswith(_OPEN):
        parts.append(refusals(*LOCKED))
    if path.startswith("/admin"):
        parts.append(refusals(errors.AdminDisabledError))
    if "requestBody" in operation:
        parts.append(with_body())
    elif any(_is_checked(parameter) for parameter in operation.get("parameters", ())):
        parts.append(refusals(errors.InvalidRequestError))
    return merged(*parts)


def _is_checked(parameter: Mapping[str, Any]) -> bool:
    """A value can be wrong; any text is a name that nobody has."""
    schema: Mapping[str, Any] = parameter["schema"]
    any_text = {"type": "string", "title": schema.get("title")}
    return bool(parameter["in"] != "path" or schema != any_text)


def _is_frameworks(told: dict[str, Any]) -> bool:
    schema = told.get("content", {}).get("application/json", {}).get("schema", {})
    return str(schema.get("$ref", "")).endswith(_FRAMEWORKS[0])


def _add_components(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _FRAMEWORKS:
        schemas.pop(name, None)
    error = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(error.pop("$defs", {}))
    schemas["ErrorAnswer"] = error
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Only where the operator has set keys."}
    }
    document["security"] = [{}, {"key": []}]
