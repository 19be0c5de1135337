"""Detached Ed25519 signatures over what a source consists of: whoever holds a trusted key vouches for its files.

What is signed is a digest of the accepted files' names, sizes and contents, so that a signature fits one set of files
wherever they lie. It does not say which expert they shall be: an administrator does.
"""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from experts.bundle_files import digest
from experts.bundle_manifest import FileEntry
from experts.errors import SignatureError
from experts.registry.sources.names import SIGNATURE_NAME, is_accepted

_DOMAIN = b"twinserve source v1\n"
"""What is signed for one purpose is worth nothing for another."""

_PUBLIC = "ed25519:"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_MAX_SIGNATURE = 1024

Keys = Mapping[str, Ed25519PublicKey]
"""Label → trusted public key."""


def digest_of_files(files: Mapping[str, FileEntry]) -> str:
    """sha256 over name, size and digest of every file but the signature, in the order of names; hexadecimal."""
    lines = [
        f"{entry.sha256} {entry.nbytes} {name}\n"
        for name, entry in sorted(files.items())
        if name != SIGNATURE_NAME
    ]
    return hashlib.sha256(_DOMAIN + "".join(lines).encode()).hexdigest()


def digest_of_source(folder: Path) -> str:
    """`digest_of_files` of the files in a folder that an expert can be made of.

    Raises:
        SignatureError: there are none.
    """
    names = sorted(name for name in os.listdir(folder) if is_accepted(name) and name != SIGNATURE_NAME)
    if not names:
        raise SignatureError(f"{folder} holds no file that an expert is made of, so there is nothing to sign")
    return digest_of_files({name: digest(folder / name) for name in names})


def new_keys() -> tuple[str, str]:
    """A private key as PEM, and its public key as a line for the file of trusted keys."""
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem.decode(), _line(private.public_key())


def sign(private_pem: str, source_digest: str) -> str:
    """The signature of a digest, base64.

    Raises:
        SignatureError: not an Ed25519 private key.
    """
    try:
        private = serialization.load_pem_private_key(private_pem.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise SignatureError(
            "the private key is not an unencrypted PEM file; make one with keygen"
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise SignatureError("the private key is not an Ed25519 one; make one with keygen")
    return base64.b64encode(private.sign(_message(source_digest))).decode()


def read_keys(path: Path) -> Keys:
    """Trusted keys, one a line: `[LABEL = ] ed25519:BASE64`, with # comments.

    Raises:
        SignatureError: the file cannot be read, holds none, or a line is none; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SignatureError(f"{path}: the trusted keys cannot be read: {error}") from error
    keys: dict[str, Ed25519PublicKey] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        label, separator, key = text.partition(" = ")
        if not separator:
            label, key = f"line {number}", text
        elif not _LABEL.fullmatch(label):
            raise SignatureError(f"{path}, line {number}: a label has 1 to 64 letters, digits and _ . @ -")
        if label in keys:
            raise SignatureError(f"{path}, line {number}: the label {label!r} is there twice")
        keys[label] = _public(key.strip(), f"{path}, line {number}")
    if not keys:
        raise SignatureError(f"{path} holds no key; put one a line, as keygen prints it")
    return keys


def verify(keys: Keys, source_digest: str, signature: str | None) -> str:
    """The label of the trusted key that made the signature.

    Raises:
        SignatureError: missing, malformed, or by none of the keys for other files.
    """
    if not signature:
        raise SignatureError(
            "the source is not signed, and this server takes signed ones only; sign it with "
            "`twinserve registry sign` and send the signature"
        )
    raw = decode(signature)
    for label, key in keys.items():
        try:
            key.verify(raw, _message(source_digest))
        except InvalidSignature:
            continue
        return label
    raise SignatureError(
        f"the signature does not fit the source (digest {source_digest}) and any of the {len(keys)} trusted keys; "
        "sign these very files with a trusted key"
    )


def decode(signature: str) -> bytes:
    """The 64 bytes of a signature.

    Raises:
        SignatureError: it is not base64 of 64 bytes.
    """
    try:
        raw = base64.b64decode(signature.strip()[:_MAX_SIGNATURE], validate=True)
    except (binascii.Error, ValueError) as error:
        raise SignatureError("the signature is not base64") from error
    if len(raw) != 64:
        raise SignatureError(f"the signature has {len(raw)} bytes; one of Ed25519 has 64")
    return raw


def signature_beside(folder: Path, given: str | None) -> str | None:
    """The signature that was sent, or else the one that lies in the folder.

    Raises:
        SignatureError: the file cannot be read as one.
    """
    path = folder / SIGNATURE_NAME
    if given is not None or not path.is_file():
        return given
    with path.open("rb") as file:
        raw = file.read(_MAX_SIGNATURE)
    try:
        return raw.decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise SignatureError(f"{SIGNATURE_NAME} is not base64") from error


def _message(source_digest: str) -> bytes:
    return _DOMAIN + source_digest.encode()


def _line(key: Ed25519PublicKey) -> str:
    return _PUBLIC + base64.b64encode(key.public_bytes_raw()).decode()


def _public(text: str, where: str) -> Ed25519PublicKey:
    if not text.startswith(_PUBLIC):
        raise SignatureError(f"{where}: a trusted key is written {_PUBLIC}BASE64, as keygen prints it")
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text.removeprefix(_PUBLIC), validate=True))
    except (binascii.Error, ValueError) as error:
        raise SignatureError(f"{where}: not an Ed25519 public key") from error
