"""How much memory there is, and how much of a work fits into it at once."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

_CPU = torch.device("cpu")
_TAKEN = 2  # one part in so many of what is left
_thread = threading.local()
_one_asks = threading.Lock()  # who asks puts PyTorch's generator back to where it was


def shared_by(workers: int) -> None:
    """Tells this thread's `at_once` that so many threads take what is left."""
    _thread.workers = workers


def at_once(each: int, *, device: torch.device = _CPU) -> int:
    """How many computations of so many bytes each fit into half of the memory that is left; 1 at least."""
    left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return max(1, left // (_TAKEN * getattr(_thread, "workers", 1)) // max(1, each))


def kept_for_backward(model: nn.Module, inputs: Tensor) -> int:
    """Bytes that a network keeps of inputs on their way forward, to find the way back; weights included.

    0 of a network that cannot be asked: it takes what it takes.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            size = min(tensor.nbytes, tensor.untyped_storage().nbytes())  # of a view; of what is expanded
            kept[tensor.data_ptr()] = max(size, kept.get(tensor.data_ptr(), 0))
        return tensor.detach()  # the tensor itself would never be freed

    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with (
        contextlib.suppress(Exception),  # a user's network may raise anything
        _one_asks,
        torch.random.fork_rng(devices=devices),  # what a network draws is not to depend on this
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        asked = inputs.detach().clone().requires_grad_(inputs.is_floating_point())
        output = model(asked.clone())  # lives until all is counted: memory that is free is given out again
        del output
        return sum(kept.values())
    return 0


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, or of a control group of its if that is less.

    Args:
        root: Where `/proc` and `/sys` are.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return max(min([free, *_left_in_groups(root)]), 0)


_GROUP_FILES = (  # limit, use, and the name of a cache in memory.stat: version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the limits of this process's control groups, and of those around them, leave."""
    for folder in _groups(root):
        for limit, used, cache in _GROUP_FILES:
            # Without a limit, version 2 says "max", and version 1 a number that is larger than any memory.
            with contextlib.suppress(OSError, ValueError, KeyError):
                numbers = [int((folder / name).read_text(encoding="ascii")) for name in (limit, used)]
                lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
                given_up = int(dict(line.split() for line in lines)[cache])  # when memory is needed
                yield numbers[0] - numbers[1] + given_up


def _groups(root: Path) -> list[Path]:
    """Folders of the control groups; in a container the own one may be where the root's would be."""
    mount = root / "sys/fs/cgroup"
    folders = [mount, mount / "memory"]
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            parts = [part for part in path.split("/") if part]
            if ".." in parts or not (controllers == "" or "memory" in controllers.split(",")):
                continue
            base = mount / "memory" if controllers else mount
            folders += [base.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders
