"""Our own OpenAPI document thrown at our own server by schemathesis: nothing undocumented, nothing of 5xx.

The document is narrowed, never widened: names that models and experts really have, and small numbers where large
ones only take long. Otherwise nearly every request would end as 404 or at a limit.
"""

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.api.served import Server

# Not `negative_data_rejection`: what a narrowed document forbids may be allowed.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "missing_required_header",
    "use_after_free",
    "ensure_resource_availability",
)
ADMIN_KEY = "schemathesis"
_SETTINGS = {"admin_key": ADMIN_KEY, "max_tokens": 64, "max_queue": 256, "feedback": True}
_SMALL = {
    "max_tokens": 16,
    "max_completion_tokens": 16,
    "max_output_tokens": 16,
    "n": 3,
    "max_new_tokens": 16,
}
"""Most that is asked for, by field."""

_SERVER_ERROR = "Server error"
"""Schemathesis's title of `not_a_server_error`."""

_NAMED = ("model", "adapter_id")
"""Fields that name a model."""


@dataclass(frozen=True)
class Thrown:
    """What a run showed.

    Attributes:
        operations: of the document, that were tried.
        links: between operations, that the document tells.
        failures: by what is wrong; what kept a part from running counts too.
        accepted: of the cases whose answer was told apart, those that were not refused.
        report: for people.
    """

    operations: int
    links: int
    cases: int
    failures: Counter[str]
    accepted: int
    refused: int
    seconds: float
    report: str

    @property
    def server_errors(self) -> int:
        """Failures that are answers of 5xx."""
        return self.failures[_SERVER_ERROR]


def run(
    python: Path, bundle: Path, *, examples: int, seconds: int, experts_root: Path, seed: int = 1
) -> Thrown:
    """Throw the document at a server of its own.

    Args:
        python: of the environment that has schemathesis.
        examples: cases of each operation, at most.
        seconds: for all of it.
        experts_root: where `/admin` registers from.
    """
    with Server(bundle, {**_SETTINGS, "experts_root": str(experts_root)}) as server:
        return throw(python, server.url, ADMIN_KEY, examples=examples, seconds=seconds, seed=seed)


def throw(python: Path, url: str, key: str, *, examples: int, seconds: int, seed: int = 1) -> Thrown:
    """The same at a running server.

    Raises:
        RuntimeError: schemathesis itself failed.
    """
    with tempfile.TemporaryDirectory() as scratch, httpx.Client(base_url=url) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        whole = client.get("/openapi.json").json()
        document, report = Path(scratch) / "openapi.json", Path(scratch) / "report.json"
        document.write_text(json.dumps(narrowed(whole, names)), encoding="utf-8")
        done = subprocess.run(
            [
                python.absolute(), "-m", "schemathesis.cli", "run", document, "--url", url,
                "--checks", ",".join(CHECKS),
                "--max-examples", str(examples), "--max-time", str(seconds), "--seed", str(seed),
                # One thread: Hypothesis parses sources, which CPython 3.11 does not bear from two at once.
                "--workers", "1",
                "--continue-on-failure", "--header", f"Authorization: Bearer {key}", "--report", "json",
                "--report-json-path", report, "--generation-database", "none", "--no-color", "--warnings", "off",
                "--suppress-health-check", "all", "--request-timeout", "60",
            ],
            capture_output=True, text=True, check=False, cwd=scratch, timeout=seconds + 600,
        )  # fmt: skip
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(f"schemathesis ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        links = sum(
            len(answer.get("links", {}))
            for _, operation in operations(whole)
            for answer in operation.get("responses", {}).values()
        )
        return _read(json.loads(report.read_text(encoding="utf-8")), done.stdout, links)


def operations(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """`POST /path` and what the document says of it."""
    methods = ("get", "put", "post", "delete", "patch")
    return [
        (f"{method.upper()} {path}", operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in methods
    ]


def narrowed(document: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The document with real names and small numbers in its requests."""
    made: dict[str, Any] = json.loads(json.dumps(document))
    for _, operation in operations(made):
        for parameter in operation.get("parameters", []):
            if parameter["name"] in _NAMED and parameter["in"] != "path":
                parameter["schema"] = {**parameter["schema"], "enum": list(names)}
            if parameter["name"] == "wait":
                # Jobs end within seconds here; who does not wait finds them half done.
                parameter["schema"] = {**parameter["schema"], "minimum": 5, "maximum": 30}
                parameter["required"] = True
    for schema in made.get("components", {}).get("schemas", {}).values():
        for field, told in schema.get("properties", {}).items():
            _narrow(field, told, names)
    return made


def _narrow(field: str, told: dict[str, Any], names: Sequence[str]) -> None:
    for option in (told, *told.get("anyOf", [])):
        if field in _NAMED and option.get("type") == "string":
            option["enum"] = list(names)
        if field == "timeout" and option.get("type") in ("number", "integer"):
            # 504 is what a shorter one asks for.
            option["minimum"] = 60
        if field in _SMALL and option.get("type") == "integer":
            option["maximum"] = min(_SMALL[field], option.get("maximum", _SMALL[field]))


def _read(report: Mapping[str, Any], told: str, links: int) -> Thrown:
    failures: Counter[str] = Counter()
    for group in (*report["failures"], *report["errors"]):
        failures[group["title"]] += group["count"]
    rates = [rate for phases in report["valid_rates"].values() for rate in phases.values()]
    return Thrown(
        operations=report["operations"]["tested"],
        links=links,
        cases=report["test_cases"]["generated"],
        failures=failures,
        accepted=sum(rate["accepted"] for rate in rates),
        refused=sum(rate["rejected"] for rate in rates),
        seconds=report["running_time"],
        report=told,
    )
