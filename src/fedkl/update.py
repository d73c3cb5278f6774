"""What a client sends: named public tensors, checked against an allow-list, as safetensors bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from fedkl.errors import FedKLError, NewerFormatError, SecretError, UpdateError, gathered, shown
from fedkl.formats import check_version, version_of
from fedkl.parsing import parse_json_object, parse_tensors
from fedkl.types import NamedTensors

UpdateKind = Literal["gradient", "weights"]
_NAME, _VERSION = "fedkl-update", 1
_FORMAT = f"{_NAME}-{_VERSION}"

MAX_SAMPLES = 10**12  # more than any client holds; sums of so many weights stay exact in float64
_MAX_ROUND = 10**12


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and dtype that a named tensor must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of an existing tensor."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype)


@dataclass(frozen=True, kw_only=True)
class PublicSchema:
    """The allow-list of an update: which public tensors it holds, and which names are private.

    Attributes:
        kind: ``"gradient"`` (one FedSGD step) or ``"weights"`` (the state after local training).
        specs: Every public name with its shape and dtype; an update holds all of them and no other.
        private: The names that must never appear. Empty on the server, which does not know them.
    """

    kind: UpdateKind
    specs: Mapping[str, TensorSpec]
    private: frozenset[str] = frozenset()

    def check(self, tensors: NamedTensors, *, subject: str) -> None:
        """Checks tensors against the allow-list.

        Raises:
            SecretError: A private name is among them.
            UpdateError: Any other problem, all of them in one message.
        """
        leaked = sorted(self.private.intersection(tensors))
        if leaked:
            problems = [f"'{name}' is private" for name in leaked]
            raise SecretError(gathered(f"{subject} refused.", problems, _PRIVATE_REMEDY))
        remedy = "Send exactly the public tensors: lock.public_state() or lock.public_gradient(loss)."
        check_tensors(tensors, self.specs, subject=f"{subject} refused.", remedy=remedy)


_PRIVATE_REMEDY = (
    "Build an upload from lock.public_state() or lock.public_gradient(loss), never from "
    "model.parameters(): private tensors train, so parameters() contains them."
)


def check_tensors(
    tensors: NamedTensors,
    specs: Mapping[str, TensorSpec],
    *,
    subject: str,
    remedy: str,
    error: type[FedKLError] = UpdateError,
    finite: bool = True,
) -> None:
    """Checks that named tensors are exactly those specified, and finite.

    Args:
        tensors: What came.
        specs: What was expected.
        subject: First line of the message.
        remedy: Last line of the message.
        error: The exception's class.
        finite: Whether their values are looked at.

    Raises:
        FedKLError: Of class `error`: every missing, unexpected, wrongly shaped, wrongly typed or
            non-finite tensor by name. Values are never part of the message.
    """
    problems = [f"'{name}' is missing" for name in specs if name not in tensors]
    problems += [f"{shown(name)} is unexpected" for name in tensors if name not in specs]
    for name, spec in specs.items():
        if name in tensors:
            problem = _tensor_problem(tensors[name], spec, finite=finite)
            problems += [f"'{name}' {problem}"] if problem else []
    if problems:
        raise error(gathered(subject, problems, remedy))


def _tensor_problem(tensor: object, spec: TensorSpec, *, finite: bool) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, expected a Tensor"
    if tuple(tensor.shape) != spec.shape:
        return f"has shape {tuple(tensor.shape)}, expected {spec.shape}"
    if tensor.dtype != spec.dtype:
        return f"has dtype {tensor.dtype}, expected {spec.dtype}"
    if finite and not bool(torch.isfinite(tensor).all()):
        return "has non-finite values"
    return None


@dataclass(frozen=True, kw_only=True, eq=False)  # == of tensors is no truth value
class PublicUpdate:
    """Named public tensors that a client sends to the server.

    Building one checks it against the allow-list; the tensors are detached copies on the CPU.

    Attributes:
        schema: The allow-list it was built against.
        tensors: Public tensors by name, read-only mapping.
        num_samples: How many training samples stand behind it, at most `MAX_SAMPLES`: its weight in the
            average.
        round: The communication round it belongs to, from 0.

    Raises:
        SecretError: A private name is among the tensors.
        UpdateError: A tensor is missing, unexpected, wrongly shaped or typed, or non-finite, or the
            sample count or the round is not an integer in its range.
    """

    schema: PublicSchema = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    num_samples: int
    round: int

    def __post_init__(self) -> None:
        integers = type(self.num_samples) is type(self.round) is int  # a bool is no count
        if not integers or not (1 <= self.num_samples <= MAX_SAMPLES and 0 <= self.round <= _MAX_ROUND):
            expected = "integers of at most 10¹², num_samples ≥ 1 and round ≥ 0"
            got = f"num_samples={_short(self.num_samples)}, round={_short(self.round)}"
            raise UpdateError(f"PublicUpdate refused: expected {expected}, got {got}.")
        self.schema.check(self.tensors, subject="PublicUpdate")
        copies = {name: self.tensors[name].detach().cpu().clone() for name in self.schema.specs}
        object.__setattr__(self, "tensors", MappingProxyType(copies))

    @property
    def kind(self) -> UpdateKind:
        """``"gradient"`` or ``"weights"``."""
        return self.schema.kind

    def to_bytes(self) -> bytes:
        """The update as safetensors bytes; the counts travel in the header."""
        header = {"kind": self.kind, "num_samples": self.num_samples, "round": self.round}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, {"format": _FORMAT, "update": json.dumps(header)})

    @classmethod
    def from_bytes(cls, data: bytes, *, schema: PublicSchema) -> PublicUpdate:
        """Reads an update and checks it against the receiver's own allow-list.

        Raises:
            UpdateError: The bytes are not an update of this format and kind, or do not fit the schema.
        """
        tensors, header = _parsed(data)
        if header["kind"] != schema.kind:
            raise UpdateError(f"Update refused: expected kind '{schema.kind}', got '{header['kind']}'.")
        counts = {"num_samples": header["num_samples"], "round": header["round"]}
        return cls(schema=schema, tensors=tensors, **counts)


def _short(count: object) -> str:
    """A count that came from elsewhere; Python refuses to print integers of many thousand digits."""
    if type(count) is int and abs(count) > 10**30:
        return "more than 30 digits"
    return f"{count!r:.30}"


def _parsed(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an update, and its own header, strictly validated."""
    problem = UpdateError(f"Update refused: these are not the bytes of a {_FORMAT} file. Send it again.")
    try:
        tensors, beside = parse_tensors(data)
        check_version(version_of(beside["format"], name=_NAME), source="Update refused", reads=_VERSION)
        header = parse_json_object(beside["update"])
        counts_ok = all(type(header[name]) is int for name in ("num_samples", "round"))
        valid = beside["format"] == _FORMAT and counts_ok and header["kind"] in get_args(UpdateKind)
    except NewerFormatError as error:
        raise UpdateError(str(error)) from error
    except (ValueError, KeyError) as error:
        raise problem from error
    if not valid:
        raise problem
    return tensors, header
