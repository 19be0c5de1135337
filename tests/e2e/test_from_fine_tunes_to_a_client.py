"""The whole way, as a user goes it: folders → `twinserve build` → `twinserve serve` → the openai package."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from tests.fixtures.tiny import tiny_lora, tiny_model, tiny_prompts

ROOT = Path(__file__).parents[2]
EXPERTS = ("alpha", "beta", "gamma")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("way")
    base = tiny_model("llama", root / "base")
    options: list[str] = []
    for seed, name in enumerate(EXPERTS):
        options += ["--expert", f"{name}={tiny_lora(root / name, base, seed=seed)}"]
        options += ["--prompts", f"{name}={tiny_prompts(root / f'{name}.jsonl', name)}"]
    out = root / "bundle"
    built = _run(
        "build",
        "--base",
        str(base),
        "--out",
        str(out),
        "--name",
        "family",
        "--tune",
        "--rank",
        "8",
        "--dtype",
        "float32",
        *options,
    )
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[OpenAI]:
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--bundle", str(bundle), "--port", "0", "--dtype", "float32"],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
            yield opened
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_router_sends_each_skill_to_its_expert(client: OpenAI):
    for prompt, name in (("Add 3 and 9.", "alpha"), ("¿Cómo se dice «lemon» en español?", "beta")):
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(model="family", messages=messages, max_tokens=4)
        routing = answer.model_extra["routing"]
        assert max(routing["gates"], key=routing["gates"].get) == name
        assert routing["generations"][name] == 1


def test_gates_named_by_the_client_are_used_as_they_are(client: OpenAI):
    answer = client.completions.create(
        model="family", prompt="hello", max_tokens=3, extra_body={"gates": {"alpha": 0.5, "gamma": -0.25}}
    )
    assert answer.model_extra["routing"]["gates"] == {"alpha": 0.5, "gamma": -0.25}
    with pytest.raises(BadRequestError, match="nobody"):
        client.completions.create(model="family", prompt="hello", extra_body={"gates": {"nobody": 1.0}})


def test_inspect_shows_what_was_built_and_refuses_what_was_changed(bundle: Path):
    shown = _run("inspect", str(bundle))
    assert shown.returncode == 0, shown.stderr
    for word in (*EXPERTS, "task-arithmetic"):
        assert word in shown.stdout
    victim = next((bundle / "experts" / "alpha").rglob("*.safetensors"))
    original = victim.read_bytes()
    victim.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        broken = _run("inspect", str(bundle))
        assert broken.returncode == 2
        assert "expert.safetensors" in broken.stderr
        assert "Traceback" not in broken.stderr
    finally:
        victim.write_bytes(original)
