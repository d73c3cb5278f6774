"""Searches every public path of a lock for private tensors, by name and by bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch

from fedkl.errors import FedKLError

ENCODINGS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def secrets_of(lock, private=()) -> dict[str, torch.Tensor]:
    """Everything private, gathered without the lock's own split, so that a broken split shows.

    Args:
        lock: The lock.
        private: Names of layers that are private as a whole.
    """
    found = {"key": lock.key.reveal()}
    for name, module in lock.model.named_modules():
        for tensor_name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            generates = ".parametrizations." in f".{name}."
            statistic = tensor_name.startswith(("running_", "num_batches"))
            whole = any(f"{name}.".startswith(f"{layer}.") for layer in private)
            if (generates or statistic or whole) and tensor is not None:
                found[f"{name}.{tensor_name}".lstrip(".")] = tensor.detach().clone()
        for tensor_name in getattr(module, "parametrizations", ()):
            found[f"{name}.{tensor_name}".lstrip(".")] = getattr(module, tensor_name).detach().clone()
    return found


def encodings(tensor: torch.Tensor) -> set[bytes]:
    """The tensor's bytes in all floating-point encodings."""
    return {_bytes(form) for form in _forms(tensor)}


def patterns(secret: torch.Tensor) -> set[bytes]:
    """Its encodings that nothing else has by chance: with three different numbers besides zero.

    Constants carry no information, and the zeros of a dead ReLU stand in many a gradient; what a number
    becomes is asked after its rounding, for float16 makes zeros of small ones.
    """
    return {_bytes(form) for form in _forms(secret) if len(set(form.tolist()) - {0.0}) >= 3}


def public_paths(lock, loss) -> Iterator[tuple[str, set[str], bytes]]:
    """(path, names, bytes) of everything a client could send or log without touching a private name."""
    for name, module in lock.model.named_modules():
        prefix = f"{name}." if name else ""
        yield f"state_dict of '{name}'", *_contents(module.state_dict(), prefix)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        yield f"torch.save of the state of '{name}'", set(), buffer.getvalue()
    yield "repr", set(), (repr(lock) + repr(lock.model) + repr(lock.key)).encode()
    for kind in ("weights", "gradient"):
        try:
            tensors = (
                lock.public_state() if kind == "weights" else lock.public_gradient(loss, retain_graph=True)
            )
            yield kind, *_contents(tensors)
            update = lock.public_update(tensors, kind=kind, num_samples=1, round=0)
            yield f"update of {kind}", set(update.tensors), update.to_bytes() + repr(update).encode()
            lock.schema(kind).check({"x": torch.zeros(1)}, subject="probe")
        except FedKLError as error:
            yield f"error of {kind}", set(), str(error).encode()


def leaks(lock, loss, private=()) -> list[str]:
    """One line for every private tensor that some public path gives away."""
    secrets = secrets_of(lock, private)
    sought = {name: patterns(tensor) for name, tensor in secrets.items()}
    found = []
    for path, names, content in public_paths(lock, loss):
        found += [f"{path}: name {name}" for name in names.intersection(secrets)]
        found += [
            f"{path}: bytes of {name}"
            for name, forms in sought.items()
            if any(form in content for form in forms)
        ]
    return found


def _contents(tensors, prefix="") -> tuple[set[str], bytes]:
    names = {prefix + name for name in tensors}
    blobs = (encoded for tensor in tensors.values() for encoded in encodings(tensor))
    return names, b"|".join(blobs)


def _forms(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat = tensor.detach().flatten()
    return [flat.to(kind) for kind in (ENCODINGS if flat.is_floating_point() else (flat.dtype,))]


def _bytes(flat: torch.Tensor) -> bytes:
    return flat.contiguous().view(torch.uint8).numpy().tobytes()
