"""Changes of packed files: what is inside is changed and packed again, with seals and checksums that fit."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import struct
import tarfile
import zlib
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from tests.fuzzing.bits import INTEGERS, mutated_bytes
from tests.fuzzing.tensors import mutated_safetensors
from tests.fuzzing.trees import mutated_json

PASSPHRASE = "correct horse"
_MAGIC = b"FEDKLSEC"
_MAX_UNPACKED = 1 << 16


def container_parts(data: bytes) -> tuple[dict[str, Any], bytes, bytes] | None:
    """Fields, header and body of a key, lock or checkpoint file; None for what is none."""
    size = int.from_bytes(data[8:12], "big")
    if not data.startswith(_MAGIC) or size > 4096:
        return None
    try:
        fields = json.loads(data[12 : 12 + size])
    except (ValueError, RecursionError):
        return None
    return (fields, data[: 12 + size], data[12 + size :]) if isinstance(fields, dict) else None


def opened(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Fields and plaintext of a sound container, written with `PASSPHRASE` or none."""
    parts = container_parts(data)
    if parts is None:
        return None
    fields, header, body = parts
    if fields.get("encryption") == "none":
        return fields, body[:-32]
    try:
        return fields, AESGCM(_secret(fields)[:32]).decrypt(bytes.fromhex(fields["nonce"]), body, header)
    except (ValueError, KeyError, TypeError, InvalidTag):
        return None


def sealed(fields: dict[str, Any], plain: bytes) -> bytes:
    """A container that opens: digest, tag and lengths fit."""
    encrypted = fields.get("encryption") == "aes-256-gcm"
    text = json.dumps(fields | {"length": len(plain) + (16 if encrypted else 32)}, sort_keys=True).encode()
    header = _MAGIC + len(text).to_bytes(4, "big") + text
    try:
        if encrypted:
            nonce = bytes.fromhex(fields["nonce"])
            return header + AESGCM(_secret(fields)[:32]).encrypt(nonce, plain, header)
    except (ValueError, KeyError, TypeError):
        pass
    return header + plain + hashlib.sha256(header + plain).digest()


def _secret(fields: dict[str, Any]) -> bytes:
    """The derived bytes, for the cheap setting of the seeds only."""
    if fields["scrypt"] != {"n": 2, "r": 1, "p": 1}:
        raise ValueError("a setting that was changed")
    return Scrypt(salt=bytes.fromhex(fields["salt"]), length=64, n=2, r=1, p=1).derive(PASSPHRASE.encode())


def mutated_container(data: bytes, rng: random.Random) -> bytes:
    """Changes the plaintext and seals it again, or the header."""
    draw = rng.random()
    found = opened(data)
    if found is None or draw < 0.15:
        return mutated_bytes(data, rng)
    fields, plain = found
    if draw < 0.75:
        return sealed(fields, mutated_safetensors(plain, rng))
    if draw < 0.8:
        return sealed(fields | {"kind": rng.choice(("key", "lock", "checkpoint"))}, plain)
    return _with_fields(mutated_json(json.dumps(fields, sort_keys=True).encode(), rng), plain)


def _with_fields(text: bytes, plain: bytes) -> bytes:
    """Any header's text; the digest of an unencrypted file fits."""
    try:
        fields = json.loads(text)
        return sealed(fields, plain)
    except (ValueError, RecursionError, TypeError, AttributeError):
        header = _MAGIC + len(text).to_bytes(4, "big") + text
        return header + plain + hashlib.sha256(header + plain).digest()


def mutated_idx(data: bytes, rng: random.Random) -> bytes:
    """Changes a number of the header, or the items."""
    if len(data) < 4 or rng.random() < 0.5:
        return mutated_bytes(data, rng)
    at = 4 * rng.randrange(min(4, len(data) // 4))
    value = (rng.choice(INTEGERS) + rng.choice((-1, 0, 1))) % 2**32
    return data[:at] + value.to_bytes(4, "big") + data[at + 4 :]


def mutated_png(data: bytes, rng: random.Random) -> bytes:
    """Changes one chunk and makes its checksum fit."""
    chunks = _chunks(data)
    if not chunks or rng.random() < 0.3:
        return mutated_bytes(data, rng)
    at = rng.randrange(len(chunks))
    kind, content = chunks[at]
    match rng.randrange(4):
        case 0:
            chunks[at] = (
                rng.choice((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"zTXt", b"acTL")),
                content,
            )
        case 1:
            chunks.insert(rng.randrange(len(chunks)), chunks[at])
        case _:
            chunks[at] = (kind, mutated_bytes(content, rng))
    return data[:8] + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while data.startswith(b"\x89PNG") and at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks.append((kind, data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def mutated_gzip(data: bytes, rng: random.Random) -> bytes:
    """Changes what is inside, or the packed bytes."""
    if rng.random() < 0.4:
        return mutated_bytes(data, rng)
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(_MAX_UNPACKED)
    except (OSError, EOFError, zlib.error):
        return mutated_bytes(data, rng)
    if rng.random() < 0.05:
        content += b"\0" * (1 << 24)  # a bomb: some kilobytes when packed
    return gzip.compress(mutated_idx(content, rng), mtime=0)


def packed_tar(files: dict[str, bytes]) -> bytes:
    """A gzipped tar file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0)


def mutated_tar(data: bytes, rng: random.Random) -> bytes:
    """Changes a member, a field of the archive, or the packed bytes."""
    draw = rng.random()
    if draw < 0.2:
        return mutated_bytes(data, rng)
    try:
        plain = gzip.decompress(data)
        if draw < 0.5:
            return gzip.compress(_mutated_header(plain, rng), mtime=0)
        with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
            files = {member.name: _content(tar, member) for member in tar.getmembers()}
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError):
        return mutated_bytes(data, rng)
    if not files:
        return mutated_bytes(data, rng)
    name = rng.choice(list(files))
    change = mutated_json if name.endswith(".json") else mutated_png
    files[rng.choice((name, name, name, os.path.normpath(f"{name}/../x")))] = change(files[name], rng)
    return packed_tar(files)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member) if member.isreg() and member.size < _MAX_UNPACKED else None
    return stream.read() if stream else b""


def _mutated_header(plain: bytes, rng: random.Random) -> bytes:
    """A member's header with one field changed and, mostly, the checksum that fits."""
    if len(plain) < 512:
        return mutated_bytes(plain, rng)
    block = bytearray(plain[:512])
    start, size = rng.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)))
    value = rng.choice(
        (b"\xff" * size, b"\0" * size, b"7" * size, b"\x80" + b"\0" * (size - 1), rng.randbytes(size))
    )
    block[start : start + size] = (
        value if size > 1 else rng.choice((b"1", b"2", b"3", b"5", b"x", b"g", b"S", b"L"))
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) % 8**6)
    return bytes(block) + plain[512:]
