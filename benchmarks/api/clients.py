"""The contract tests with real clients, counted by client."""

import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

CLIENTS = {
    "openai": "test_openai",
    "langchain-openai": "test_langchain",
    "litellm": "test_litellm",
    "lm-eval": "test_lm_eval",
}
"""Client → its module in tests/contract."""


@dataclass(frozen=True)
class Counted:
    """One client's tests.

    Attributes:
        properties: what tests recorded.
    """

    tests: int
    failed: int
    skipped: int
    properties: dict[str, float]

    @property
    def passed(self) -> int:
        """The others."""
        return self.tests - self.failed - self.skipped


def run(python: Path) -> dict[str, Counted]:
    """Run them in the environment of `python`.

    Raises:
        RuntimeError: pytest could not run them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        modules = [f"tests/contract/{module}.py" for module in CLIENTS.values()]
        done = subprocess.run(
            [python, "-m", "pytest", *modules, f"--junitxml={report}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode not in (0, 1):
            raise RuntimeError(
                f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        cases = list(ElementTree.parse(report).iter("testcase"))
    return {client: _count(cases, module) for client, module in CLIENTS.items()}


def _count(cases: list[ElementTree.Element], module: str) -> Counted:
    own = [case for case in cases if case.get("classname", "").endswith(module)]
    properties: dict[str, float] = {}
    for one in (one for case in own for one in case.iter("property")):
        name, value = str(one.get("name")), float(str(one.get("value")))
        properties[name] = max(value, properties.get(name, value))
    return Counted(
        tests=len(own),
        failed=sum(case.find("failure") is not None or case.find("error") is not None for case in own),
        skipped=sum(case.find("skipped") is not None for case in own),
        properties=properties,
    )
