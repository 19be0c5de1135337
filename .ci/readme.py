"""Hold the README to its word: run its marked examples against a live server, compare its table of settings.

An example is a fenced `bash` or `python` block below an HTML comment:

    <!-- ci: choices.0.message.content routing.gates -->     JSON output that has these members
    <!-- ci: "data: [DONE]" -->                             output that contains this text
    <!-- ci -->                                             any output

Every block must exit 0 and print something; for `curl` a status of 400 or more is a failure. Blocks find what is
installed beside the Python that runs this.
Knows nothing of how the server was started.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README_BASE = "http://127.0.0.1:8000"
EXAMPLE = re.compile(
    r"^<!-- ci(?:: (?P<expect>.*?))? -->\n+```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"^<!-- ci\b", re.MULTILINE)
SETTINGS = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)
# A README's curl stays short; what makes a refusal fail the example is added here.
PRELUDE = 'curl() { command curl --silent --show-error --fail-with-body --max-time 120 "$@"; }\n'


@dataclass(frozen=True)
class Example:
    """One marked block."""

    expect: str
    language: str
    code: str


def find_examples(text: str) -> list[Example]:
    """Every marked block, in order.

    Raises:
        ValueError: a mark without a block below it, or no mark at all.
    """
    found = [Example(m["expect"] or "", m["language"], m["code"]) for m in EXAMPLE.finditer(text)]
    marks = len(MARK.findall(text))
    if not found or len(found) != marks:
        raise ValueError(f"{marks} marks `<!-- ci -->`, {len(found)} of them with a fenced block below")
    return found


def run(example: Example, base: str) -> str:
    """The block's standard output, with the server's real address in the README's place.

    Raises:
        ValueError: it exited with an error.
    """
    code = example.code.replace(README_BASE, base)
    commands = {
        "bash": ["bash", "-euo", "pipefail", "-c", PRELUDE + code],
        "python": [sys.executable, "-c", code],
    }
    if example.language not in commands:
        raise ValueError(f"cannot run a block of {example.language!r}; mark bash or python blocks only")
    done = subprocess.run(  # noqa: S603 - the README is ours
        commands[example.language],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    if done.returncode != 0:
        raise ValueError(f"exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(example: Example, output: str) -> None:
    """Raise ValueError unless the output is what the mark promises."""
    if not output.strip():
        raise ValueError("printed nothing")
    if example.expect.startswith('"'):
        text = json.loads(example.expect)
        if text not in output:
            raise ValueError(f"the output lacks {text!r}:\n{output}")
        return
    if example.expect:
        answer = json.loads(output)
        for path in example.expect.split():
            member(answer, path)


def member(answer: Any, path: str) -> Any:
    """The member at a dotted path; numbers index lists. ValueError if there is none."""
    value = answer
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"the answer lacks {path!r}: {json.dumps(answer)}") from error
    return value


def settings_table() -> str:
    """Markdown rows of every setting, from the code."""
    from service.settings import ENV_PREFIX, Settings

    rows = ["| variable | default | what it is |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "–" if field.default is None or field.default == () else f"`{field.default}`"
        rows.append(f"| `{ENV_PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "".join(row + "\n" for row in rows)


def main() -> int:
    """Run every example, in order; 1 if one fails."""
    parser = argparse.ArgumentParser(description="Run the README's marked examples.")
    parser.add_argument("readme", type=Path)
    parser.add_argument("--base", default=README_BASE, help="address of the server")
    parser.add_argument("--write-settings", action="store_true", help="write the table of settings and stop")
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    if options.write_settings:
        options.readme.write_text(SETTINGS.sub(lambda _: settings_table(), text), encoding="utf-8")
        return 0
    failed = 0
    table = SETTINGS.search(text)
    if table is None or table.group() != settings_table():
        failed += 1
        print(
            f"FAILED: the settings table is not the code's; run: python {' '.join(sys.argv)} --write-settings"
        )
    examples = find_examples(text)
    for example in examples:
        print(f"--- {example.language}\n{example.code}", end="")
        try:
            output = run(example, options.base)
            check(example, output)
            print(f"→ {output.strip()[:600]}\n")
        except (ValueError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAILED: {error}\n")
    print(f"readme: {len(examples) + 1 - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
