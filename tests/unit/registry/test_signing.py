"""A signature fits one set of files and one trusted key."""

import base64
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experts.errors import SignatureError
from experts.registry.sources import (
    SIGNATURE_NAME,
    digest_of_source,
    new_keys,
    read_keys,
    sign,
    signature_beside,
    verify,
)
from service.cli_registry import build_app as app


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def trusted(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trusted"
    path.write_text("# who may sign\n\n" + "".join(f"{line}\n" for line in lines))
    return path


def test_a_signature_by_a_trusted_key_tells_whose_it_is(tmp_path: Path, source: Path) -> None:
    (mine, public), (_, other) = new_keys(), new_keys()
    keys = read_keys(trusted(tmp_path, f"ann = {public}  # research", other))
    assert list(keys) == ["ann", "line 4"]
    signature = sign(mine, digest_of_source(source))
    assert verify(keys, digest_of_source(source), signature) == "ann"
    assert verify(keys, digest_of_source(source), f"\n{signature}\n") == "ann"


def test_the_digest_is_of_the_files_an_expert_has_and_of_nothing_else(source: Path) -> None:
    before = digest_of_source(source)
    (source / "README.md").write_text("anything")
    (source / SIGNATURE_NAME).write_text("anything")
    assert digest_of_source(source) == before
    seen = {before}
    (source / "config.json").write_text("{}")
    seen.add(digest_of_source(source))
    (source / "config.json").rename(source / "expert.json")
    seen.add(digest_of_source(source))
    (source / "expert.json").write_text("{ }")
    seen.add(digest_of_source(source))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("signature", "why"),
    [
        (None, "not signed"),
        ("", "not signed"),
        ("%%%", "base64"),
        ("aGVsbG8=", "5 bytes"),
        (base64.b64encode(bytes(64)).decode(), "does not fit"),
        ("é", "base64"),
    ],
)
def test_what_is_no_signature_is_refused(
    tmp_path: Path, source: Path, signature: str | None, why: str
) -> None:
    keys = read_keys(trusted(tmp_path, new_keys()[1]))
    with pytest.raises(SignatureError, match=why):
        verify(keys, digest_of_source(source), signature)


def test_a_changed_file_another_key_and_another_purpose_are_refused(tmp_path: Path, source: Path) -> None:
    mine, public = new_keys()
    keys = read_keys(trusted(tmp_path, public))
    digest = digest_of_source(source)
    with pytest.raises(SignatureError, match="does not fit"):
        verify(keys, digest, sign(new_keys()[0], digest))
    signature = sign(mine, digest)
    (source / "adapter_model.safetensors").write_bytes(b"weighty")
    with pytest.raises(SignatureError, match="does not fit"):
        verify(keys, digest_of_source(source), signature)


def test_a_signature_lies_beside_the_files_unless_one_was_sent(source: Path) -> None:
    assert signature_beside(source, None) is None
    (source / SIGNATURE_NAME).write_text("beside\n")
    assert signature_beside(source, None) == "beside"
    assert signature_beside(source, "sent") == "sent"
    (source / SIGNATURE_NAME).write_bytes(b"\xff")
    with pytest.raises(SignatureError, match="base64"):
        signature_beside(source, None)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "holds no key"),
        ("ssh-ed25519 AAAA", "ed25519:BASE64"),
        ("ed25519:AAAA", "not an Ed25519"),
        ("ed25519:!", "not an Ed25519"),
        ("a b = ed25519:AAAA", "label"),
    ],
)
def test_a_file_of_keys_with_a_mistake_names_the_line(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(SignatureError, match=why):
        read_keys(trusted(tmp_path, line))


def test_keys_that_cannot_be_read_or_used_are_told(tmp_path: Path) -> None:
    public = new_keys()[1]
    with pytest.raises(SignatureError, match="twice"):
        read_keys(trusted(tmp_path, f"a = {public}", f"a = {public}"))
    with pytest.raises(SignatureError, match="cannot be read"):
        read_keys(tmp_path / "nothing")
    with pytest.raises(SignatureError, match="PEM"):
        sign("no key", "0" * 64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SignatureError, match="nothing to sign"):
        digest_of_source(tmp_path / "empty")


def test_the_commands_make_a_key_that_signs_a_folder(tmp_path: Path, source: Path) -> None:
    run = CliRunner()
    private = tmp_path / "private.pem"
    made = run.invoke(app(), ["keygen", str(private), "--label", "ann"])
    assert made.exit_code == 0, made.output
    assert private.stat().st_mode & 0o777 == 0o600
    keys = read_keys(trusted(tmp_path, made.output.strip()))
    again = run.invoke(app(), ["keygen", str(private)])
    assert again.exit_code == 1
    assert "exists" in again.stderr
    signed = run.invoke(app(), ["sign", str(source), "--key", str(private)])
    assert signed.exit_code == 0, signed.output
    assert signature_beside(source, None) == signed.output.strip()
    assert verify(keys, digest_of_source(source), signed.output) == "ann"
    (source / SIGNATURE_NAME).unlink()
    assert (
        run.invoke(app(), ["sign", str(source), "--key", str(private), "--detached"]).output == signed.output
    )
    assert not (source / SIGNATURE_NAME).exists()
    for wrong in (tmp_path / "nothing", source / "adapter_config.json"):
        refused = run.invoke(app(), ["sign", str(source), "--key", str(wrong)])
        assert (refused.exit_code, "Error" in refused.stderr) == (1, True)
