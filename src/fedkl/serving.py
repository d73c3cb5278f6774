"""A client's trained model, as a file that serves: its weights, a program of PyTorch, or ONNX.

**Each of them is as private as the lock.** γ, β, private layers and norm statistics are in it: who has the
file has the client's model, and needs no key. Each says so of itself, has mode 0600, and is
refused wherever public tensors are read. The key and the lock layers are not in it.

>>> import tempfile
>>> import fedkl
>>> from torch import nn
>>> lock = fedkl.lock(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
>>> with tempfile.TemporaryDirectory() as folder:
...     save_state(lock, f"{folder}/own.safetensors", client="hospital-a")
...     fedkl.modelfile.read_model(f"{folder}/own.safetensors")
Traceback (most recent call last):
fedkl.errors.ConfigError: ...
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from fedkl.errors import ConfigError, LockError
from fedkl.files import PRIVATE_FILE
from fedkl.locking import ExampleInputs, Split
from fedkl.modelfile import check_finite, private_mark, write_private_model, write_whole

MARK = "fedkl.json"
"""Name of the extra file of a program of PyTorch that says that it is private."""

_BATCH = 2  # of 0 and 1, PyTorch makes programs for this size only


def save_state(split: Split, path: str | Path, *, client: str, replace: bool = False) -> None:
    """Writes all tensors of a client's model as safetensors, for a network built in Python.

    Its metadata: ``format`` is ``fedkl-model-1``, ``kind`` is ``private``, ``client`` says whose it is.

    Args:
        split: The client's lock, or what another defense keeps.
        path: Where to; mode 0600, in private folders if there are none yet.
        client: Whose it is.
        replace: Whether a file that is there is replaced.

    Raises:
        UpdateError: A tensor is not finite.
        ConfigError: The file is there and is not to be replaced, or cannot be written.
    """
    write_private_model(path, split.bake().state_dict(), client=client, replace=replace)


def save_program(
    split: Split, path: str | Path, *, client: str, example_inputs: ExampleInputs, replace: bool = False
) -> None:
    """Writes a client's model as a program of `torch.export` (.pt2), in eval mode, for batches of any size.

    It runs with PyTorch alone: `torch.export.load(path).module()`. The same words as in `save_state` are in
    its extra file `MARK`.

    Args:
        split: The client's lock, or what another defense keeps.
        path: Where to; mode 0600, in private folders if there are none yet.
        client: Whose it is.
        example_inputs: As the model is called: a tensor, or a tuple or dict of arguments, the batch first in
            every tensor. Only shapes and dtypes are used: no image gets into the file.
        replace: Whether a file that is there is replaced.

    Raises:
        LockError: PyTorch cannot make a program of the model.
        UpdateError: A tensor is not finite.
        ConfigError: The file is there and is not to be replaced, or cannot be written.
    """
    program = _program(split, example_inputs, subject=f"{path}: not written")
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={MARK: json.dumps(private_mark(client))})
    write_whole(Path(path), data.getvalue(), mode=PRIVATE_FILE, replace=replace)


def save_onnx(
    split: Split, path: str | Path, *, client: str, example_inputs: ExampleInputs, replace: bool = False
) -> None:
    """Writes a client's model as ONNX, in eval mode, for batches of any size. Extra: ``fedkl[serving]``.

    The same words as in `save_state` are in its ``metadata_props``.

    Args:
        split: The client's lock, or what another defense keeps.
        path: Where to; mode 0600, in private folders if there are none yet.
        client: Whose it is.
        example_inputs: As for `save_program`.
        replace: Whether a file that is there is replaced.

    Raises:
        LockError: PyTorch cannot make ONNX of the model.
        UpdateError: A tensor is not finite.
        ConfigError: The extra is not installed; the file is there and is not to be replaced, or cannot be
            written.
    """
    if not all(find_spec(name) for name in ("onnx", "onnxscript")):
        raise ConfigError("save_onnx: ONNX is not installed. Install it with pip install 'fedkl[serving]'.")
    subject = f"{path}: not written"
    program = _program(split, example_inputs, subject=subject)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, about its own parts
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
            made.rename_axes({str(size): "batch" for size in _batch_sizes(program)})
            made.model.metadata_props.update(private_mark(client))
            data = made.model_proto.SerializeToString()
    except Exception as error:
        raise _not_made(subject, "ONNX", error) from None
    write_whole(Path(path), data, mode=PRIVATE_FILE, replace=replace)


def _program(split: Split, example_inputs: ExampleInputs, *, subject: str) -> ExportedProgram:
    """The model as a program: no key in it, no image, and nothing of this machine's file names."""
    plain = split.bake().cpu()
    plain.eval()
    check_finite(plain.state_dict(), subject=f"{subject}.")
    args, kwargs, shapes = _blank(example_inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(plain, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise _not_made(subject, "a program", error) from None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _not_made(subject: str, what: str, error: Exception) -> LockError:
    """Without the text of PyTorch's error, which may print numbers of the model."""
    return LockError(
        f"{subject}: PyTorch cannot make {what} of this model for batches of any size "
        f"({type(error).__name__}). A network that calls len(x) fixes the size: write x.shape[0]. PyTorch's "
        "own words may quote the model: torch.export.export(lock.bake().eval(), …) says them."
    )


def _blank(inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Arguments without their content, which a program would keep; and which of their sizes vary."""
    if isinstance(inputs, Mapping):
        named = {name: _zeros(value) for name, value in inputs.items()}
        return (), named, {name: _varying(value) for name, value in named.items()}
    args = tuple(_zeros(value) for value in (inputs if isinstance(inputs, tuple) else (inputs,)))
    return args, {}, tuple(_varying(value) for value in args)


def _zeros(value: Any) -> Any:
    has_batch = isinstance(value, Tensor) and value.dim() > 0
    return torch.zeros(_BATCH, *value.shape[1:], dtype=value.dtype) if has_batch else value


def _varying(value: Any) -> dict[int, Any] | None:
    return {0: Dim("batch")} if isinstance(value, Tensor) and value.dim() > 0 else None


def _batch_sizes(program: ExportedProgram) -> set[Any]:
    """How PyTorch calls the batch size in a program."""
    return set(program.range_constraints)
