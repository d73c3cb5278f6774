"""Key, lock and checkpoint files: one container, encrypted or explicitly not, atomic, mode 0600.

Layout: ``FEDKLSEC``, header length (4 bytes, big-endian), header (JSON), body. The header names the kind,
the encryption, its public parameters and the body's length; it is authenticated together with the body.
The plaintext body is one safetensors file.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from safetensors import SafetensorError
from torch import Tensor

from fedkl.errors import KeyFileError, LockError
from fedkl.files import create_once, write_atomically
from fedkl.keys import Key
from fedkl.types import NamedTensors

FileKind = Literal["key", "lock", "checkpoint"]

PASSPHRASE_VARIABLE = "FEDKL_PASSPHRASE"  # noqa: S105 (a name, not a passphrase)

_MAGIC = b"FEDKLSEC"
_VERSION = 1
_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_MAX_HEADER = 4096
_MAX_SCRYPT_N = 2**20


def save_key(key: Key, path: str | Path, *, passphrase: str | None) -> None:
    """Writes a key to a file, mode 0600, atomically.

    Args:
        key: The key.
        path: Where to; an existing file is replaced.
        passphrase: Encrypts the file; None, given explicitly, leaves it unencrypted.

    Raises:
        KeyFileError: The passphrase is empty, or the file cannot be written.
    """
    meta = {"distribution": key.distribution}
    write(Path(path), kind="key", meta=meta, tensors={"key": key.reveal()}, passphrase=passphrase)


def load_key(path: str | Path, *, passphrase: str | None) -> Key:
    """Reads a key from a file that `save_key` wrote.

    Raises:
        KeyFileError: The file is missing, truncated, altered, foreign, of another kind, or does not open
            with this passphrase.
    """
    meta, tensors = read(Path(path), kind="key", passphrase=passphrase)
    return key_of(Path(path), meta, tensors)


def key_of(path: Path, meta: dict[str, Any], tensors: NamedTensors) -> Key:
    """The key that a file's content holds.

    Raises:
        KeyFileError: It holds none, or not one that could be used.
    """
    try:
        return Key(tensors["key"], distribution=meta["distribution"])
    except (KeyError, LockError) as error:
        raise KeyFileError(f"{path}: holds no usable key; written by another version of fedkl?") from error


def write(
    path: Path,
    *,
    kind: FileKind,
    meta: dict[str, Any],
    tensors: NamedTensors,
    passphrase: str | None,
    salt: bytes | None = None,
) -> None:
    """Writes tensors and metadata as one container; see the module's text.

    Args:
        path: Where to.
        kind: What it is.
        meta: Anything that JSON can hold.
        tensors: By name.
        passphrase: Encrypts it; None leaves it unencrypted.
        salt: Of the encryption key; a new one if None. Files of one process may share theirs, which saves
            the derivation: every file has its own nonce.
    """
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    plain = safetensors.torch.save(contiguous, {"fedkl": json.dumps(meta)})
    if passphrase is None:
        header = _header({"kind": kind, "encryption": "none", "length": len(plain) + 32})
        body = plain + hashlib.sha256(header + plain).digest()
    else:
        salt, nonce = salt or os.urandom(16), os.urandom(12)
        secret, check = _derive(path, passphrase, salt, _SCRYPT)
        public = {"salt": salt.hex(), "nonce": nonce.hex(), "check": check, "scrypt": _SCRYPT}
        header = _header({"kind": kind, "encryption": "aes-256-gcm", "length": len(plain) + 16, **public})
        body = AESGCM(secret).encrypt(nonce, plain, header)
    _write_container(path, header + body)


def read(path: Path, *, kind: FileKind, passphrase: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `write` wrote; every way in which a file can be unusable gives one clear error."""
    header, fields, body = _parse(path)
    if fields["kind"] != kind:
        raise KeyFileError(f"{path}: expected a {kind} file, this is a {fields['kind']} file.")
    if len(body) != fields["length"]:
        raise KeyFileError(
            f"{path}: truncated or extended: {len(body)} bytes after the header, expected {fields['length']}."
        )
    altered = KeyFileError(f"{path}: the file was altered after it was written. Restore it from a backup.")
    if fields["encryption"] == "none":
        if passphrase is not None:
            raise KeyFileError(f"{path}: the file is not encrypted. Pass passphrase=None to accept that.")
        plain, digest = body[:-32], body[-32:]
        if not hmac.compare_digest(hashlib.sha256(header + plain).digest(), digest):
            raise altered
    else:
        plain = _decrypt(path, header, fields, body, passphrase, altered)
    return _unpack(plain, altered)


def _decrypt(
    path: Path,
    header: bytes,
    fields: dict[str, Any],
    body: bytes,
    passphrase: str | None,
    altered: KeyFileError,
) -> bytes:
    if passphrase is None:
        raise KeyFileError(f"{path}: the file is encrypted. Give its passphrase.")
    secret, check = _derive(path, passphrase, bytes.fromhex(fields["salt"]), fields["scrypt"])
    if not hmac.compare_digest(check, fields["check"]):
        raise KeyFileError(f"{path}: wrong passphrase (or the file's header was altered).")
    try:
        return AESGCM(secret).decrypt(bytes.fromhex(fields["nonce"]), body, header)
    except InvalidTag as error:
        raise altered from error


def _derive(path: Path, passphrase: str, salt: bytes, cost: dict[str, int]) -> tuple[bytes, str]:
    """The encryption key, and a value by which a wrong passphrase is told from an altered file."""
    if not passphrase:
        raise KeyFileError(f"{path}: the passphrase is empty. Give one, or None for an unencrypted file.")
    derived = _scrypt(passphrase, salt, cost["n"], cost["r"], cost["p"])
    return derived[:32], hashlib.sha256(derived[32:]).hexdigest()


@functools.lru_cache(maxsize=8)
def _scrypt(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    """64 derived bytes; slow on purpose, so that files with one salt, as those of a checkpoint, share it."""
    return Scrypt(salt=salt, length=64, n=n, r=r, p=p).derive(passphrase.encode())


def _header(fields: dict[str, Any]) -> bytes:
    text = json.dumps({"version": _VERSION, **fields}, sort_keys=True).encode()
    return _MAGIC + len(text).to_bytes(4, "big") + text


def _parse(path: Path) -> tuple[bytes, dict[str, Any], bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror}).") from error
    if not data.startswith(_MAGIC):
        raise KeyFileError(f"{path}: not a fedkl key or lock file.")
    start = len(_MAGIC) + 4
    length = int.from_bytes(data[len(_MAGIC) : start], "big")
    if len(data) < start + length or length > _MAX_HEADER:
        raise KeyFileError(f"{path}: truncated: the header is not complete.")
    try:
        fields = json.loads(data[start : start + length])
        _check_fields(fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeyFileError(f"{path}: the header is damaged, or of an unknown version.") from error
    return data[: start + length], fields, data[start + length :]


def _check_fields(fields: dict[str, Any]) -> None:
    if fields["version"] != _VERSION or fields["encryption"] not in ("none", "aes-256-gcm"):
        raise ValueError
    if type(fields["length"]) is not int or not isinstance(fields["kind"], str):
        raise TypeError
    if fields["encryption"] == "none":
        return
    cost = fields["scrypt"]
    if not isinstance(cost, dict) or set(cost) != {"n", "r", "p"}:
        raise TypeError
    if not all(type(value) is int for value in cost.values()):
        raise TypeError
    power_of_two = cost["n"] > 1 and cost["n"] & (cost["n"] - 1) == 0
    if not power_of_two or cost["n"] > _MAX_SCRYPT_N or not 1 <= cost["r"] <= 16 or not 1 <= cost["p"] <= 4:
        raise ValueError
    if len(bytes.fromhex(fields["nonce"])) != 12 or not bytes.fromhex(fields["salt"]):
        raise ValueError
    if not isinstance(fields["check"], str) or not fields["check"].isascii():
        raise TypeError


def _unpack(plain: bytes, altered: KeyFileError) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        size = int.from_bytes(plain[:8], "little")
        meta = json.loads(json.loads(plain[8 : 8 + size])["__metadata__"]["fedkl"])
        return dict(meta), safetensors.torch.load(plain)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise altered from error


def default_passphrase() -> str:
    """`FEDKL_PASSPHRASE`, or else a random one of this user on this machine, made at its first use.

    It encrypts what is only ever read back here, such as checkpoints: a run directory that is handed on does
    not give the clients' keys away.

    Raises:
        KeyFileError: It can be neither read nor made.
    """
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    try:
        path = folder.expanduser() / "fedkl" / "passphrase"
        if not path.exists():
            create_once(path, secrets.token_hex(32).encode(), mode=0o600)
        passphrase = path.read_text(encoding="utf-8").strip()  # read back: another process may have won
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: there is no home
        raise KeyFileError(
            f"{folder}/fedkl/passphrase: the passphrase of this machine is not usable "
            f"({type(error).__name__}). Set {PASSPHRASE_VARIABLE}."
        ) from error
    if not passphrase:
        raise KeyFileError(f"{path}: empty. Restore it, or set {PASSPHRASE_VARIABLE}.")
    return passphrase


def _write_container(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data, mode=0o600)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be written ({error.strerror}).") from error
