"""Keys: what a line of a key file means, which key a client has sent, and files that change while the server runs.

A key is written `[LABEL = ] KEY [rpm=N] [tpm=N] [concurrency=N]`. KEY is the key itself or `sha256:HASH`, so that
neither a file nor a setting needs to hold a secret; the three limits replace the server's own for this key. Two keys
may share a label while one takes over from the other. Knows no HTTP.
"""

import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from service.settings import ENV_PREFIX, Settings

_log = logging.getLogger(__name__)

HASHED = "sha256:"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWN_DIGITS = 16
_LIMITS = {"rpm": "requests", "tpm": "tokens", "concurrency": "concurrent"}
_LOOK_SECONDS = 1.0
"""A file is looked at that often at most."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may use; None is what the server's settings say."""

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """One key, of which only the hash is kept.

    Attributes:
        id: its label, or some digits of the hash: safe for logs and metrics, and whose share it counts against.
    """

    digest: bytes
    id: str
    limits: KeyLimits = field(default_factory=KeyLimits)


def digest_of(key: str) -> bytes:
    """The hash of a key; of equal length for `compare_digest`, whatever the client sent."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def new_key() -> str:
    """A key that nobody can guess."""
    return f"ts-{secrets.token_urlsafe(32)}"


def parse_key(line: str) -> Key:
    """The key that a line means.

    Raises:
        ValueError: it means none; the message does not repeat it.
    """
    label, words = "", line.split()
    if len(words) >= 3 and words[1] == "=":
        label, words = words[0], words[2:]
        if not _LABEL.fullmatch(label):
            raise ValueError("a label has 1 to 64 letters, digits and _ . @ -")
    if not words:
        raise ValueError("the key is missing")
    given, *options = words
    limits: dict[str, int] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _LIMITS or not (value.isascii() and value.isdigit() and int(value[:12]) > 0):
            raise ValueError("after a key only rpm=N, tpm=N and concurrency=N may stand, N at least 1")
        limits[_LIMITS[name]] = int(value[:12])
    if given.startswith(HASHED):
        hexadecimal = given.removeprefix(HASHED).lower()
        if not _DIGEST.fullmatch(hexadecimal):
            raise ValueError(f"{HASHED} needs 64 hexadecimal digits; `twinserve key` makes a pair")
        digest = bytes.fromhex(hexadecimal)
    else:
        digest = digest_of(given)
    return Key(digest, label or digest.hex()[:_OWN_DIGITS], KeyLimits(**limits))


def _parse(lines: Iterable[str], source: str) -> tuple[Key, ...]:
    keys = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            keys.append(parse_key(line))
        except ValueError as error:
            raise ValueError(f"{source}, entry {number}: {error}") from error
    return tuple(keys)


def _read(file: Path, variable: str) -> tuple[Key, ...]:
    """The keys of a file; one that holds none is an error, since it must not open what it should close."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{variable}: cannot read {file}: {error}") from error
    keys = _parse(lines, f"{variable}: {file}")
    if not keys:
        raise ValueError(f"{variable}: {file} holds no key; put one a line")
    return keys


class _Stamp(NamedTuple):
    modified: int
    size: int
    inode: int


@dataclass(slots=True)
class _Source:
    """Keys of one kind: those of the settings, and those of a file."""

    variable: str
    fixed: tuple[Key, ...]
    file: Path | None
    filed: tuple[Key, ...] = ()
    stamp: _Stamp | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        return self.fixed + self.filed

    def look(self) -> bool:
        """True where the file is another one than when it was last looked at."""
        found = None
        with contextlib.suppress(OSError):
            if self.file is not None:
                stat = self.file.stat()
                found = _Stamp(stat.st_mtime_ns, stat.st_size, stat.st_ino)
        changed, self.stamp = found != self.stamp, found
        return changed


class Keys:
    """The keys of a server, for inference and for /admin.

    Files are read again when they change, which is looked for once a second at most, when a key is asked for. A new
    file that cannot be used leaves the old keys in force and is logged.

    Args:
        clock: monotonic seconds.

    Raises:
        ValueError: a key or a file cannot be used, or a key is of both kinds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._inference = _Source(
            f"{ENV_PREFIX}API_KEYS_FILE",
            _parse((key.get_secret_value() for key in settings.api_keys), f"{ENV_PREFIX}API_KEYS"),
            settings.api_keys_file,
        )
        self._admin = _Source(
            f"{ENV_PREFIX}ADMIN_KEYS_FILE",
            _parse((key.get_secret_value() for key in settings.admin_key), f"{ENV_PREFIX}ADMIN_KEY"),
            settings.admin_keys_file,
        )
        for source in (self._inference, self._admin):
            if source.file is not None:
                source.look()
                source.filed = _read(source.file, source.variable)
        _check_apart(self._inference.keys, self._admin.keys)

    @property
    def inference(self) -> tuple[Key, ...]:
        """Those that open inference; none is no lock."""
        self._refresh()
        return self._inference.keys

    @property
    def admin(self) -> tuple[Key, ...]:
        """Those that open /admin; none closes it."""
        self._refresh()
        return self._admin.keys

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        for source, other in ((self._inference, self._admin), (self._admin, self._inference)):
            if source.file is None or not source.look():
                continue
            try:
                filed = _read(source.file, source.variable)
                _check_apart(source.fixed + filed, other.keys)
            except ValueError as error:
                _log.error("%s; the %d keys known before stay in force", error, len(source.keys))
                continue
            source.filed = filed
            _log.info("%s: %d keys read from %s", source.variable, len(filed), source.file)


def _check_apart(one: Sequence[Key], other: Sequence[Key]) -> None:
    """An admin key that also opens inference would be handed to every client."""
    if {key.digest for key in one} & {key.digest for key in other}:
        raise ValueError(
            f"a key of {ENV_PREFIX}ADMIN_KEY or {ENV_PREFIX}ADMIN_KEYS_FILE is one of {ENV_PREFIX}API_KEYS or "
            f"{ENV_PREFIX}API_KEYS_FILE too; they must differ"
        )


def find(keys: Sequence[Key], given: str) -> Key | None:
    """The key that was given, in a time that does not tell which one was nearly right."""
    digest, found = digest_of(given), None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found
