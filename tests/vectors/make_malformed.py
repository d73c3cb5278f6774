"""Writes the malformed vectors: ``python -m tests.vectors.make_malformed``; run once, then committed.

Each is a good file with one fault, most of them faults that were once not noticed, or ended in a traceback.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from fedkl import lockfile
from tests.vectors.make import PASSPHRASE

HERE = Path(__file__).parent
GOOD = HERE / "generation-1"
OUT = HERE / "malformed"
INDEX: dict[str, dict[str, str]] = {}


def put(kind: str, name: str, data: bytes, says: str) -> None:
    """Writes one, and what its refusal says."""
    (OUT / f"{kind}-{name}").write_bytes(data)
    INDEX[f"{kind}-{name}"] = {"kind": kind, "says": says}


def container(data: bytes) -> tuple[dict, bytes]:
    """Header and body of a key, lock or checkpoint file."""
    length = int.from_bytes(data[8:12], "big")
    return json.loads(data[12 : 12 + length]), data[12 + length :]


def sealed(fields: dict, body: bytes, *, digest: bool = False) -> bytes:
    """The inverse; with a new digest, the file is whole, and only its content is wrong."""
    text = json.dumps(fields, sort_keys=True).encode()
    header = b"FEDKLSEC" + len(text).to_bytes(4, "big") + text
    return header + (body[:-32] + hashlib.sha256(header + body[:-32]).digest() if digest else body)


def keys() -> None:
    plain, secret = ((GOOD / f"normal-{name}.key").read_bytes() for name in ("plain", "encrypted"))
    fields, body = container(secret)
    put("key", "empty", b"", "not a fedkl key")
    put("key", "foreign", b"PK\3\4" + bytes(60), "not a fedkl key")
    put("key", "cut-in-header", secret[:40], "header is not complete")
    put("key", "cut-in-body", secret[:-5], "truncated or extended")
    put("key", "extended", secret + b"\0", "truncated or extended")
    put("key", "body-altered", secret[:-1] + bytes([secret[-1] ^ 1]), "was altered after")
    put("key", "header-with-more", sealed(fields | {"more": 1}, body), "was altered after")
    put(
        "key",
        "two-gigabytes",
        sealed(fields | {"scrypt": {"n": 2**20, "r": 16, "p": 4}}, body),
        "header is",
    )
    put(
        "key",
        "cost-not-a-power",
        sealed(fields | {"scrypt": {"n": 3, "r": 8, "p": 1}}, body),
        "header is damaged",
    )
    put("key", "nonce-too-long", sealed(fields | {"nonce": "00" * 13}, body), "header is damaged")
    put("key", "salt-too-short", sealed(fields | {"salt": "00"}, body), "header is damaged")
    put(
        "key",
        "version-2",
        sealed(fields | {"version": 2}, body),
        "written by a newer fedkl (format 2; this one reads up to 1)",
    )
    deep = b"[" * 4000
    put("key", "header-nested", b"FEDKLSEC" + len(deep).to_bytes(4, "big") + deep, "header is damaged")
    fields, body = container(plain)
    put(
        "plainkey",
        "kind-changed",
        sealed(fields | {"kind": "lock"}, body),
        "expected a key file, this is a lock",
    )
    put("plainkey", "altered", plain[:-40] + b"\0" * 8 + plain[-32:], "was altered after")
    for name, tensor in {
        "zeros": torch.zeros(16, dtype=torch.float64),
        "not-finite": torch.full((16,), torch.nan),
        "matrix": torch.ones(4, 4),
        "integers": torch.ones(16, dtype=torch.int64),
    }.items():
        wrong = safetensors.torch.save({"key": tensor}, {"fedkl": '{"distribution": "normal"}'})
        head = fields | {"length": len(wrong) + 32}
        put("plainkey", name, sealed(head, wrong + bytes(32), digest=True), "holds no usable key")
    for name, text in {"meta-nested": "[" * 5000, "meta-is-a-list": "[]", "meta-not-json": "{"}.items():
        wrong = safetensors.torch.save({"key": torch.ones(16)}, {"fedkl": text})
        head = fields | {"length": len(wrong) + 32}
        put("plainkey", name, sealed(head, wrong + bytes(32), digest=True), "was altered after")


def locks() -> None:
    def changed(name: str, change: Callable[[dict, dict], None], says: str) -> None:
        meta, tensors = lockfile.read(GOOD / "first.lock", kind="lock", passphrase=PASSPHRASE)
        change(meta, tensors)
        lockfile.write(OUT / f"lock-{name}", kind="lock", meta=meta, tensors=tensors, passphrase=PASSPHRASE)
        INDEX[f"lock-{name}"] = {"kind": "lock", "says": says}

    changed("without-key", lambda meta, tensors: tensors.pop("key"), "holds no usable key")
    changed(
        "of-another-model", lambda meta, tensors: meta.update(structure="0" * 64), "belongs to another model"
    )
    changed(
        "layer-too-small", lambda m, t: t.update({"private/1.running_mean": torch.ones(1)}), "another model"
    )
    changed("layer-missing", lambda meta, tensors: tensors.pop("private/1.running_var"), "another model")
    changed("option-unknown", lambda meta, tensors: meta["options"].update(shape="round"), "unknown options")
    changed("options-are-a-list", lambda meta, tensors: meta.update(options=[]), "unknown options")
    changed(
        "activation-unknown", lambda meta, t: meta["options"].update(activation="gelu"), "unknown options"
    )
    changed("about-nested", lambda meta, tensors: meta.update(about={"client": ["a"]}), "unknown options")


def updates() -> None:
    tensors = safetensors.torch.load((GOOD / "weights.update").read_bytes())
    good = {"kind": "weights", "num_samples": 8, "round": 3}

    def header(name: str, says: str, **changes: object) -> None:
        text = json.dumps({**good, **changes})
        data = safetensors.torch.save(tensors, {"format": "fedkl-update-1", "update": text})
        put("update", name, data, says)

    header("samples-huge", "refused", num_samples=10**20)
    header("samples-zero", "refused", num_samples=0)
    header("samples-true", "refused", num_samples=True)
    header("samples-a-list", "refused", num_samples=[8])
    header("round-negative", "refused", round=-1)
    header("kind-unknown", "refused", kind="everything")
    header("kind-gradient", "expected kind 'weights'", kind="gradient")
    put(
        "update",
        "format-unknown",
        safetensors.torch.save(tensors, {"format": "x", "update": "{}"}),
        "not the bytes",
    )
    text = {"format": "fedkl-update-1", "update": "[" * 5000}
    put("update", "header-nested", safetensors.torch.save(tensors, text), "not the bytes")
    for name, tensor, says in (
        ("not-finite", torch.full((6,), torch.inf), "non-finite"),
        ("shape", torch.ones(1), "shape"),
        ("dtype", torch.ones(6, dtype=torch.float64), "dtype"),
    ):
        text = {"format": "fedkl-update-1", "update": json.dumps(good)}
        put("update", name, safetensors.torch.save({**tensors, "0.bias": tensor}, text), says)
    private = {**tensors, "1.running_mean": torch.ones(6)}
    put("update", "private-name", safetensors.torch.save(private, text), "'1.running_mean' is private")
    data = (GOOD / "weights.update").read_bytes()
    put("update", "cut", data[:-3], "refused")
    put("update", "empty", b"", "refused")
    size = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + size])
    fields["0.bias"]["dtype"] = "F8_E8M0"
    fields["0.bias"]["shape"] = [24]
    text = json.dumps(fields).encode()
    put("update", "dtype-unknown", len(text).to_bytes(8, "little") + text + data[8 + size :], "refused")


def texts() -> None:
    put("config", "key-of-20000-parts", b"a" + b".a" * 20_000 + b" = 1\n", "not a TOML file")
    put("config", "nested", b"a = " + b"[" * 3000, "not a TOML file")
    put("config", "latin-1", 'type = "caf\xe9"\n'.encode("latin-1"), "not a TOML file")
    put("config", "unknown-field", b'type = "train"\ncolour = "blue"\n', "not a usable experiment")
    put("config", "infinite", b'type = "train"\n[training.local]\nlr = inf\n', "not a usable experiment")


def main() -> None:
    """Writes all of them."""
    OUT.mkdir()
    for write in (keys, locks, updates, texts):
        write()
    (OUT / "index.json").write_text(json.dumps(INDEX, indent=1) + "\n")


if __name__ == "__main__":
    main()
