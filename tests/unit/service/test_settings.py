from pathlib import Path

import pytest
from pydantic import ValidationError

from service.cli import unknown_variables
from service.serve import runtime_config
from service.settings import Settings


def test_the_environment_sets_and_an_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINSERVE_PORT", "9001")
    monkeypatch.setenv("TWINSERVE_MAX_BATCH", "7")
    monkeypatch.setenv("TWINSERVE_LOG_LEVEL", "WARNING")
    settings = Settings(port=9002)
    assert (settings.port, settings.max_batch, settings.log_level) == (9002, 7, "warning")


def test_settings_cannot_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_keys_come_from_a_list_and_a_file_and_never_print(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\n\n  key-3  \n")
    monkeypatch.setenv("TWINSERVE_API_KEYS", "key-1, key-2,,")
    settings = Settings(api_keys_file=file, admin_key="key-4")
    assert [key.get_secret_value() for key in settings.all_api_keys()] == ["key-1", "key-2", "key-3"]
    assert "key-" not in repr(settings)


@pytest.mark.parametrize("content", [None, "", "# nothing\n", "admin\n"])
def test_a_key_file_that_would_leave_the_server_open_stops_it(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match="TWINSERVE_API_KEYS_FILE"):
        Settings(api_keys_file=file, admin_key="admin").all_api_keys()


def test_the_admin_key_must_be_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINSERVE_API_KEYS", "same")
    with pytest.raises(ValidationError, match="must differ"):
        Settings(admin_key="same")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("max_tokens", 0),
        ("max_gate", float("nan")),
        ("max_gate", float("inf")),
        ("router_threshold", 2),
        ("dtype", "int8"),
        ("keepalive_seconds", 0),
        ("no_such_setting", 1),
    ],
)
def test_an_impossible_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_a_misspelt_variable_is_noticed() -> None:
    environment = {"TWINSERVE_PRT": "1", "TWINSERVE_PORT": "1", "PATH": "/bin"}
    assert unknown_variables(environment) == ["TWINSERVE_PRT"]


def test_the_runtime_gets_its_part() -> None:
    config = runtime_config(Settings(max_batch=3, max_queue=4, router_top_k=2, prefill_chunk=32))
    assert (config.max_batch, config.max_queue, config.router_top_k) == (3, 4, 2)
    assert config.prefill_chunk_tokens == 32
