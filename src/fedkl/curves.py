"""The curves of a training as TensorBoard events (extra ``fedkl[tensorboard]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedkl.errors import ConfigError

_CURVES = ("accuracy", "local_accuracy", "loss", "lr", "updates", "seconds")


@contextmanager
def curves(folder: Path, *, first: int, enabled: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Opens the event files of a training.

    Args:
        folder: Where they go.
        first: The first round that will be written; what an interrupted run wrote from there on is hidden.
        enabled: If False nothing is written, and nothing needs to be installed.

    Yields:
        What takes the record of each round.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if not enabled:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard: TensorBoard is not installed. Install it with pip install 'fedkl[tensorboard]'."
        ) from error
    writer = SummaryWriter(folder, purge_step=first)

    def write(record: dict[str, Any]) -> None:
        for name in _CURVES:
            if record[name] is not None:
                writer.add_scalar(name, record[name], record["round"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
