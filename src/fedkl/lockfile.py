"""Key, lock, checkpoint and members' files: one container, encrypted or explicitly not, atomic, mode 0600.

Layout: ``FEDKLSEC``, header length (4 bytes, big-endian), header (JSON), body. The header names the kind,
the encryption, its public parameters and the body's length; it is authenticated together with the body.
The plaintext body is one safetensors file. Files of all versions that must stay readable are in
``tests/vectors``.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from torch import Tensor

from fedkl.errors import KeyFileError, shown
from fedkl.files import PRIVATE_FILE, create_once, exclusive, held, put, read_file
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object, parse_tensors
from fedkl.passphrases import default_passphrase as default_passphrase  # pages name it here
from fedkl.types import NamedTensors

FileKind = Literal["key", "lock", "checkpoint", "member", "memory", "update", "backup"]

MAGIC = b"FEDKLSEC"
"""How these files begin."""
VERSIONS: dict[str, int] = dict.fromkeys(get_args(FileKind), 1)
"""By kind: of the container and of what is in it."""

_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_MAX_HEADER = 4096
MAX_SCRYPT_WORK = 2**21
"""Most that a file may ask for as n · r · p: eight times what we write; 256 MiB and about a second."""


def byte_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor, uint8, shape ``(bytes,)``: what these files hold are tensors."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of `byte_tensor`.

    Raises:
        ValueError: It is another kind of tensor.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"expected bytes in a row, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.numpy().tobytes()


def keep_copy(path: Path) -> Path:
    """Keeps what a file holds now beside it, under the first free name ``<name>.old-<number>``, mode 0600.

    Returns:
        The copy.

    Raises:
        KeyFileError: It cannot be read or the copy cannot be written.
    """
    try:
        content = read_file(path)
        for number in count(1):
            copy = path.with_name(f"{path.name}.old-{number}")
            if create_once(copy, content, mode=PRIVATE_FILE):
                return copy
    except OSError as error:
        raise KeyFileError(f"{path}: no copy of it can be kept ({error.strerror}).") from error
    raise AssertionError  # numbers do not end


def change_passphrase(path: str | Path, *, old: str | None, new: str | None) -> None:
    """Encrypts a key, lock or member's file anew; what it holds stays the same.

    Copies and backups of the file still open with the old passphrase.

    Args:
        path: The file.
        old: Its passphrase; None if it is not encrypted.
        new: The new one; None leaves it unencrypted.

    Raises:
        KeyFileError: It does not open with `old`, is none of these, is a link, or cannot be written; it stays
            as it was.
        ConfigError: Another process has it open, e.g. its node.
    """
    path = Path(path)
    kind = _parse(path)[1]["kind"]
    if kind not in ("key", "lock", "member"):
        raise KeyFileError(f"{path}: expected a key or lock file, this is a {shown(kind)} file.")
    if path.is_symlink():  # the file behind it would keep the old one
        raise KeyFileError(f"{path}: expected a file, got a symbolic link. Give the file itself.")
    with held(path) if kind == "member" else exclusive(path.parent):
        meta, tensors = read(path, kind=kind, passphrase=old)
        write(path, kind=kind, meta=meta, tensors=tensors, passphrase=new)


def write(
    path: Path,
    *,
    kind: FileKind,
    meta: dict[str, Any],
    tensors: NamedTensors,
    passphrase: str | None,
    salt: bytes | None = None,
    replace: bool = True,
) -> None:
    """Writes tensors and metadata as one container; see the module's text.

    What writes of this file that were killed have left beside it is removed.

    Args:
        path: Where to.
        kind: What it is.
        meta: Anything that JSON can hold.
        tensors: By name.
        passphrase: Encrypts it; None leaves it unencrypted.
        salt: Of the encryption key; a new one if None. Files of one process may share theirs, which saves
            the derivation: every file has its own nonce.
        replace: Whether a file that is there is replaced.

    Raises:
        KeyFileError: The passphrase is empty or is no text, or the file cannot be written.
    """
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    plain = safetensors.torch.save(contiguous, {"fedkl": json.dumps(meta)})
    if passphrase is None:
        header = _header({"kind": kind, "encryption": "none", "length": len(plain) + 32})
        body = plain + hashlib.sha256(header + plain).digest()
    else:
        salt, nonce = salt or os.urandom(16), os.urandom(12)
        secret, check = _derive(_normal(path, passphrase), salt, _SCRYPT)
        public = {"salt": salt.hex(), "nonce": nonce.hex(), "check": check, "scrypt": _SCRYPT}
        header = _header({"kind": kind, "encryption": "aes-256-gcm", "length": len(plain) + 16, **public})
        body = AESGCM(secret).encrypt(nonce, plain, header)
    _write_container(path, header + body, replace=replace)


def read(path: Path, *, kind: FileKind, passphrase: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `write` wrote; every way in which a file can be unusable gives one clear error.

    Raises:
        KeyFileError: It cannot be used.
        NewerFormatError: A newer fedkl wrote it.
    """
    header, fields, body = _parse(path)
    if fields["kind"] != kind:
        raise KeyFileError(f"{path}: expected a {kind} file, this is a {shown(fields['kind'])[1:-1]} file.")
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


def version_of(path: Path) -> int:
    """The version of a file's format.

    Raises:
        KeyFileError: It cannot be read, or is none of these files.
    """
    version: int = _parse(path)[1]["version"]
    return version


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
    for candidate in _forms(path, passphrase):
        secret, check = _derive(candidate, bytes.fromhex(fields["salt"]), fields["scrypt"])
        if hmac.compare_digest(check, fields["check"]):
            break
    else:
        raise KeyFileError(f"{path}: wrong passphrase (or the file's header was altered).")
    try:
        return AESGCM(secret).decrypt(bytes.fromhex(fields["nonce"]), body, header)
    except InvalidTag as error:
        raise altered from error


def _forms(path: Path, passphrase: str) -> Iterator[bytes]:
    """A passphrase as we write it, and as it was typed: files of earlier versions took that."""
    normal = _normal(path, passphrase)
    yield normal
    if passphrase.encode() != normal:
        yield passphrase.encode()


def _normal(path: Path, passphrase: str) -> bytes:
    """One form for all ways to type it: an é may be one character or two (Unicode NFC and NFD)."""
    if not passphrase:
        raise KeyFileError(f"{path}: the passphrase is empty. Give one, or None for an unencrypted file.")
    try:
        return unicodedata.normalize("NFC", passphrase).encode()
    except UnicodeEncodeError:  # its text would quote the passphrase
        raise KeyFileError(
            f"{path}: the passphrase is not text in UTF-8. Give one that is, e.g. of `openssl rand -hex 32`."
        ) from None


def _derive(passphrase: bytes, salt: bytes, cost: dict[str, int]) -> tuple[bytes, str]:
    """The encryption key, and a value by which a wrong passphrase is told from an altered file."""
    derived = _scrypt(passphrase, salt, cost["n"], cost["r"], cost["p"])
    return derived[:32], hashlib.sha256(derived[32:]).hexdigest()


@functools.lru_cache(maxsize=8)
def _scrypt(passphrase: bytes, salt: bytes, n: int, r: int, p: int) -> bytes:
    """64 derived bytes; slow on purpose, so that files with one salt, as those of a checkpoint, share it."""
    return Scrypt(salt=salt, length=64, n=n, r=r, p=p).derive(passphrase)


def _header(fields: dict[str, Any]) -> bytes:
    text = json.dumps({"version": VERSIONS[fields["kind"]], **fields}, sort_keys=True).encode()
    return MAGIC + len(text).to_bytes(4, "big") + text


def _parse(path: Path) -> tuple[bytes, dict[str, Any], bytes]:
    try:
        data = read_file(path)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:  # a null character in the name
        raise KeyFileError(f"{shown(path)}: not the name of a file.") from error
    if not data.startswith(MAGIC):
        raise KeyFileError(f"{path}: not a fedkl key or lock file.")
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "big")
    if len(data) < start + length or length > _MAX_HEADER:
        raise KeyFileError(f"{path}: truncated: the header is not complete.")
    try:
        fields = parse_json_object(data[start : start + length])
        check_version(fields["version"], source=path, reads=VERSIONS.get(str(fields.get("kind")), 1))
        _check_fields(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise KeyFileError(f"{path}: the header is damaged.") from error
    return data[: start + length], fields, data[start + length :]


def _check_fields(fields: dict[str, Any]) -> None:
    if type(fields["version"]) is not int or fields["version"] < 1:
        raise ValueError
    if fields["encryption"] not in ("none", "aes-256-gcm"):
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
    if not power_of_two or min(cost.values()) < 1 or cost["n"] * cost["r"] * cost["p"] > MAX_SCRYPT_WORK:
        raise ValueError
    if len(bytes.fromhex(fields["nonce"])) != 12 or len(bytes.fromhex(fields["salt"])) != 16:
        raise ValueError
    if not isinstance(fields["check"], str) or not fields["check"].isascii():
        raise TypeError


def _unpack(plain: bytes, altered: KeyFileError) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        tensors, beside = parse_tensors(plain)
        return parse_json_object(beside["fedkl"]), tensors
    except (ValueError, KeyError) as error:
        raise altered from error


def _write_container(path: Path, data: bytes, *, replace: bool) -> None:
    try:
        if not put(path, data, mode=PRIVATE_FILE, replace=replace):
            raise KeyFileError(f"{path}: exists already. Choose another path.")
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be written ({error.strerror}).") from error
