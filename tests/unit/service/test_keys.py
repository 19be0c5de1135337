import logging
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.keys import KeyLimits, Keys, digest_of, find, new_key, parse_key
from service.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def kept(file: Path, text: str) -> None:
    """Replace the file as an operator's tools do, in one step."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


def opened(**settings: Any) -> tuple[Keys, Clock]:
    clock = Clock()
    return Keys(Settings(**settings), clock), clock


def test_a_key_is_kept_as_its_hash_alone_and_named_by_it() -> None:
    key = parse_key("my-secret")
    assert key.digest == digest_of("my-secret")
    assert key.digest.hex().startswith(key.id)
    assert "my-secret" not in repr(key)


def test_a_line_may_name_hash_and_limit_its_key() -> None:
    line = f"alice = sha256:{digest_of('my-secret').hex().upper()} rpm=60 tpm=9000 concurrency=4"
    key = parse_key(line)
    assert (key.id, key.digest) == ("alice", digest_of("my-secret"))
    assert key.limits == KeyLimits(60, 9000, 4)


@pytest.mark.parametrize(
    "line",
    [
        "two words",
        "a b = key",
        "-a = key",
        "sha256:12",
        "sha256:1",
        f"sha256:{'g' * 64}",
        "key rpm=0",
        "key rpm=-1",
        "key rpm=1.5",
        "key rpm=",
        "key rate=4",
        "key rpm=٣",
    ],
)
def test_a_line_that_means_no_key_is_refused_without_repeating_it(line: str) -> None:
    with pytest.raises(ValueError, match=r"label|after a key|sha256:") as refused:
        parse_key(line)
    assert line not in str(refused.value)


def test_the_right_key_is_found_and_nothing_like_it() -> None:
    keys, _ = opened(api_keys=f"first, bob = sha256:{digest_of('second').hex()}")
    found = find(keys.inference, "second")
    assert found is not None
    assert found.id == "bob"
    for wrong in ("", "secon", "second ", "SECOND", digest_of("second").hex(), "\ud800"):
        assert find(keys.inference, wrong) is None


def test_keys_of_settings_and_files_add_up_and_never_print(tmp_path: Path) -> None:
    file, admins = tmp_path / "keys", tmp_path / "admins"
    file.write_text("# comment\n\n  key-3  \nlabelled = key-4\n")
    admins.write_text("key-6\n")
    settings = Settings(
        api_keys="key-1, key-2,,", api_keys_file=file, admin_key="key-5", admin_keys_file=admins
    )
    keys = Keys(settings)
    assert [key.digest for key in keys.inference] == [digest_of(f"key-{n}") for n in (1, 2, 3, 4)]
    assert [key.digest for key in keys.admin] == [digest_of("key-5"), digest_of("key-6")]
    assert "key-" not in repr(settings)


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe", b"admin\n", b"a b c\n"])
@pytest.mark.parametrize("kind", ["api", "admin"])
def test_a_key_file_that_cannot_be_used_stops_the_start(
    tmp_path: Path, content: bytes | None, kind: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    other = {"api": "admin_key", "admin": "api_keys"}[kind]
    with pytest.raises(ValueError, match=f"TWINSERVE_{kind.upper()}_KEYS_FILE"):
        opened(**{f"{kind}_keys_file": file, other: "admin"})


def test_a_key_cannot_be_both_for_inference_and_for_admin() -> None:
    with pytest.raises(ValueError, match="must differ"):
        opened(api_keys="other,same", admin_key=f"sha256:{digest_of('same').hex()}")


def test_a_changed_file_is_read_again_after_a_second(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys, clock = opened(api_keys_file=file)
    kept(file, "new\nother\n")
    clock.now = 0.9
    assert find(keys.inference, "old")
    clock.now = 1.1
    assert find(keys.inference, "old") is None
    assert find(keys.inference, "new")
    assert find(keys.inference, "other")


@pytest.mark.parametrize("broken", ["", "# all gone\n", "not a key\n", "admin\n", None])
def test_a_broken_new_file_leaves_the_old_keys_in_force_and_is_logged_once(
    tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys, clock = opened(api_keys_file=file, admin_key="admin")
    if broken is None:
        file.unlink()
    else:
        kept(file, broken)
    with caplog.at_level(logging.INFO):
        for clock.now in (2.0, 4.0, 6.0):
            assert find(keys.inference, "old")
            assert find(keys.inference, "admin") is None
        [complaint] = caplog.records
        assert complaint.levelno == logging.ERROR
        kept(file, "mended\n")
        clock.now = 8.0
        assert find(keys.inference, "mended")
        assert find(keys.inference, "old") is None


def test_the_command_makes_a_key_and_the_line_that_knows_it() -> None:
    shown = CliRunner().invoke(app, ["key", "--label", "alice"]).output.splitlines()
    key, line = shown
    assert len(key) > 40
    parsed = parse_key(line)
    assert parsed.id == "alice"
    assert find([parsed], key) is parsed
    assert key not in line
    assert new_key() != new_key()
    refused = CliRunner().invoke(app, ["key", "--label", "not a label"])
    assert refused.exit_code == 2
    assert "label" in refused.output
