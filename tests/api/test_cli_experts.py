"""`twinserve experts …` against a running server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import build_app
from service.remote import Server
from service.remote.sources import files_of
from service.remote.uploads import Remembered, send
from tests.api.harness import ADMIN_KEY, Served, eventually, serving
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora

RUNNER = CliRunner()
WIDTH = 80


@dataclass(frozen=True)
class Shell:
    """A command line, and the server that it talks to."""

    served: Served
    family: TinyFamily
    root: Path
    environment: dict[str, str]

    def run(self, *words: str, code: int = 0, **environment: str) -> str:
        """Standard output of a command that must end with `code`."""
        done = RUNNER.invoke(build_app(), ["experts", *words], env={**self.environment, **environment})
        assert done.exit_code == code, (done.output, done.exception)
        return done.stdout

    def json(self, *words: str, code: int = 0) -> Any:
        """Its JSON."""
        return json.loads(self.run(*words, "--json", code=code))

    def error(self, *words: str, code: int = 1, **environment: str) -> str:
        """Standard error of a command that must end with `code`."""
        done = RUNNER.invoke(build_app(), ["experts", *words], env={**self.environment, **environment})
        assert done.exit_code == code, (done.output, done.exception)
        return done.stderr

    def answer(self, expert: str) -> Any:
        """What an expert says, and how likely it thinks that is."""
        body = self.served.complete(model=expert, max_tokens=12, temperature=0, logprobs=3, ignore_eos=True)
        [choice] = body["choices"]
        return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    root = tmp_path_factory.mktemp("cli")
    family = tiny_family(root / "family")
    experts_root = root / "server"
    experts_root.mkdir()
    with serving(family.bundle, admin_key=ADMIN_KEY, experts_root=experts_root) as served:
        environment = {
            "TWINSERVE_URL": served.url,
            "TWINSERVE_ADMIN_KEY": ADMIN_KEY,
            "XDG_CACHE_HOME": str(root / "cache"),
            "COLUMNS": str(WIDTH),
        }
        yield Shell(served, family, experts_root, environment)


def test_a_folder_of_this_machine_is_uploaded_registered_and_served(shell: Shell, tmp_path: Path) -> None:
    folder = tiny_lora(tmp_path / "own", shell.family.base, seed=41)
    (folder / "optimizer.pt").write_bytes(b"stays here")
    told = shell.run("add", "uploaded", str(folder))
    assert "uploaded" in told
    assert "serving" in told
    shown = shell.json("show", "uploaded")
    assert (shown["generation"], shown["state"], shown["generations"][0]["source"]) == (1, "active", "lora")
    assert "uploaded" in {row["name"] for row in shell.json("list")}
    assert shell.answer("uploaded") == shell.answer("uploaded")
    assert shell.answer("uploaded") != shell.answer("shared")


def test_a_folder_of_the_server_is_named_by_its_path(shell: Shell) -> None:
    tiny_lora(shell.root / "there", shell.family.base, seed=42)
    job = shell.json("add", "there", "there", "--server-path", "--rank", "2")
    assert (job["state"], job["name"], job["generation"]) == ("succeeded", "there", 1)
    assert shell.json("show", "there")["max_rank"] == 2


@pytest.mark.parametrize("form", ["peft", "gguf", "expert"])
def test_an_exported_expert_registers_again_and_answers_exactly_the_same(
    form: str, shell: Shell, tmp_path: Path
) -> None:
    told = shell.json("export", "alpha", "--format", form, "--out", str(tmp_path / "out"))
    assert told["folder"] == str(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == told["files"]
    shell.run("add", f"again-{form}", str(tmp_path / "out"))
    assert shell.answer(f"again-{form}") == shell.answer("alpha")
    shown = shell.json("show", f"again-{form}")
    assert shown["generations"][0]["source"] == {"peft": "lora"}.get(form, form)


def test_a_model_with_gates_merged_in_is_exported_and_comes_back_as_a_fine_tune(
    shell: Shell, tmp_path: Path
) -> None:
    told = shell.run("export", "--gates", "alpha:1.0", "--out", str(tmp_path / "model"))
    assert "model.safetensors" in told
    shell.run("add", "whole", str(tmp_path / "model"))
    assert shell.json("show", "whole")["generations"][0]["source"] == "full"
    assert shell.answer("whole")[0] == shell.answer("alpha")[0]
    shell.error("export", "--gates", "alpha:1.0", "--out", str(tmp_path / "model"), code=2)


def test_generations_come_and_go(shell: Shell, tmp_path: Path) -> None:
    first = tiny_lora(tmp_path / "1", shell.family.base, seed=51)
    second = tiny_lora(tmp_path / "2", shell.family.base, seed=52)
    shell.run("add", "many", str(first))
    one = shell.answer("many")
    assert "exists" in shell.error("add", "many", str(second))
    assert shell.json("add", "many", str(second), "--if", "1")["generation"] == 2
    two = shell.answer("many")
    assert one != two
    assert shell.json("rollback", "many")["generation"] == 1
    assert shell.answer("many") == one
    assert "generation" in shell.error("activate", "many", "2", "--if", "2")
    assert shell.json("activate", "many", "2", "--if", "1")["generation"] == 2
    assert shell.answer("many") == two
    assert shell.json("pin", "many", "--generation", "1")["pinned"] is True
    assert shell.answer("many") == one
    assert shell.json("pin", "many", "--off")["pinned"] is False
    assert shell.json("trial", "many", "2", "--percent", "50", "--shadow")["trial"]["kind"] == "shadow"
    assert shell.json("trial", "many", "--end")["trial"] is None
    assert shell.json("disable", "many")["state"] == "disabled"
    assert shell.json("enable", "many")["state"] == "active"
    shell.run("alias", "lots", "many")
    assert shell.answer("lots") == one
    assert {"object": "alias", "alias": "lots", "expert": "many"} in shell.json("alias")
    shell.run("alias", "lots", "--remove")
    assert shell.json("retire", "many")["state"] == "retired"
    assert "many" not in {row["name"] for row in shell.json("list")}
    assert "no expert" in shell.error("show", "many").lower()


def test_jobs_are_listed_and_a_failed_one_says_why(shell: Shell, tmp_path: Path) -> None:
    broken = tiny_lora(tmp_path / "broken", shell.family.base, seed=61)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 99}))
    told = shell.error("add", "broken", str(broken))
    assert "rank" in told
    assert "--retry" in told
    [job, *_] = shell.json("jobs", "--name", "broken")
    assert job["state"] == "failed"
    assert job["error"]["message"] in shell.run("jobs", job["id"], COLUMNS="1000")
    assert shell.json("jobs", job["id"], "--retry", code=1)["state"] == "failed"
    assert "broken" in shell.run("jobs", "--state", "failed")


def test_an_upload_that_was_interrupted_goes_on_where_it_stopped(shell: Shell, tmp_path: Path) -> None:
    files = files_of(tiny_lora(tmp_path / "big", shell.family.base, rank=8, seed=71))
    remembered = Remembered(tmp_path / "uploads.json")
    server = Server(shell.served.url, ADMIN_KEY)
    seen: list[int] = []

    class _Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > total // 2:
            raise _Stopped

    with pytest.raises(_Stopped):
        send(server, files, remembered, stop, piece=4096)
    again: list[int] = []
    upload = send(
        server, files, Remembered(tmp_path / "uploads.json"), lambda done, _: again.append(done), piece=4096
    )
    server.close()
    total = sum(path.stat().st_size for path in files.values())
    assert seen[0] == 0
    assert again[0] == seen[-1] > total // 2
    assert again[-1] == total
    described = shell.served.http.get(
        f"/admin/uploads/{upload}", headers={"Authorization": f"Bearer {ADMIN_KEY}"}
    ).json()
    assert {entry["name"]: entry["bytes"] for entry in described["files"]} == {
        name: path.stat().st_size for name, path in files.items()
    }


def test_ctrl_c_asks_the_server_to_cancel_the_job(shell: Shell) -> None:
    tiny_lora(shell.root / "queue", shell.family.base, seed=81)
    for number in range(8):  # so that the next one waits
        shell.run("add", f"queued-{number}", "queue", "--server-path", "--detach")
    # Where the tests run in the background SIGINT is ignored, which a child would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "experts", "add", "stopped", "queue", "--server-path"],
            env={**os.environ, **shell.environment, "PYTHONWARNINGS": "default"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert eventually(lambda: bool(shell.json("jobs", "--name", "stopped")), 30)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 130, stderr
    assert "cancelled" in stderr
    [job] = shell.json("jobs", "--name", "stopped")
    assert job["state"] == "cancelled"
    for waiting in shell.json("jobs", "--state", "queued"):
        shell.run("jobs", waiting["id"], "--cancel")


def test_tables_fit_into_eighty_columns(shell: Shell, tmp_path: Path) -> None:
    long = "n" * 64
    folder = str(tiny_lora(tmp_path / "long", shell.family.base, seed=91))
    shell.run("add", long, folder)
    shell.run("add", long, folder, "--if", "1", "--no-activate")
    shell.run("trial", long, "2", "--percent", "12.5", "--shadow")
    shell.run("pin", long)
    for words in (["list"], ["show", long], ["jobs"], ["alias"], ["--help"], ["add", "--help"]):
        told = shell.run(*words)
        assert max(map(len, told.splitlines())) <= WIDTH, told
    assert "nnnn" in shell.run("list")


def test_refusals_end_with_one_and_one_line(shell: Shell) -> None:
    assert "key" in shell.error("list", TWINSERVE_ADMIN_KEY="wrong")
    assert "does not answer" in shell.error("list", "--url", "http://127.0.0.1:9")
    told = shell.json("show", "nobody", code=1)
    assert told["error"]["code"] == "expert_not_found"
    assert "no folder" in shell.error("add", "x", "nowhere", "--server-path").lower()
    assert "source_urls" in shell.error("add", "x", "https://example.com/lora").lower()
    assert "expert" in shell.error("export", "nobody")


@pytest.mark.parametrize(
    "words",
    [
        ["add", "x", "no-such-folder"],
        ["add", "x", "."],
        ["add", "x", "there", "--server-path", "--rank", "2", "--energy", "0.5"],
        ["add", "x", "there", "--server-path", "--prompts", "no-such-file"],
        ["export"],
        ["export", "alpha", "--gates", "alpha:1"],
        ["trial", "alpha"],
        ["pin", "alpha", "--off", "--generation", "1"],
        ["jobs", "--cancel"],
        ["alias", "--remove"],
        ["rebuild", "--merge", "ties"],
        ["list", "--url", "localhost"],
        ["list", "--state", "sleeping"],
        ["show"],
    ],
)
def test_wrong_calls_end_with_two_and_ask_no_server(words: list[str], shell: Shell) -> None:
    assert shell.error(*words, code=2, TWINSERVE_URL="http://127.0.0.1:9")


def test_a_rebuild_is_listed_and_left_again(tmp_path: Path) -> None:
    family = tiny_family(tmp_path / "family", experts=("alpha", "beta"))
    with serving(family.bundle, admin_key=ADMIN_KEY) as served:
        environment = {"TWINSERVE_URL": served.url, "TWINSERVE_ADMIN_KEY": ADMIN_KEY, "COLUMNS": str(WIDTH)}
        shell = Shell(served, family, tmp_path, environment)
        assert "no bundle to go back to" in shell.error("return")
        before = shell.answer("alpha")
        [first] = [row["build_id"] for row in shell.json("bundles")]
        shell.run("rebuild", "--merge", "method=task_arithmetic", "--merge", "scale=0.7")
        assert eventually(lambda: shell.answer("alpha") != before, 30)
        assert [row["returnable"] for row in shell.json("bundles")] == [False, True]
        assert first in shell.run("bundles")
        assert shell.json("return")["build_id"] == first
        assert eventually(lambda: shell.answer("alpha") == before, 30)
        assert "no bundle 'nothing'" in shell.error("return", "nothing")
