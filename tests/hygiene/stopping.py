"""One run of a scenario in a process of its own: loud, stopped at a stage, its secrets noted elsewhere."""

from __future__ import annotations

import logging
import os
import pickle
import random
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch


class StoppedError(RuntimeError):
    """What is raised at a stage: an accident that nobody foresaw."""


class _Stages:
    """Counts the calls of fedkl's functions, and raises in one of them.

    Args:
        at: How the function begins, ``file:name:line``; the first call of one is stopped. None: none is.
    """

    def __init__(self, at: str | None) -> None:
        self._at = at
        self.stopped = False
        self.seen: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or "/fedkl/" not in frame.f_code.co_filename:
            return
        code = frame.f_code
        place = f"{code.co_filename.rpartition('/fedkl/')[2]}:{code.co_name}:{code.co_firstlineno}"
        if place not in self.seen:
            self.seen[place] = None
            if self._at is not None and not self.stopped and place.startswith(self._at):
                self.stopped = True
                raise StoppedError(f"stopped in {place}")


def _note_secrets(folder: Path) -> None:
    """Writes every key, and all that goes into an encrypted file, to a folder that is not searched."""
    from fedkl import keys, lockfile
    from fedkl.locking import keylock

    drawn = keys.Key.drawn.__func__  # type: ignore[attr-defined]
    made, locked, written = keys.Key.__init__, keylock.Lock.__init__, lockfile.write

    def note(tensors: dict[str, torch.Tensor]) -> None:
        floats = {
            n: t.detach().clone() for n, t in tensors.items() if t.is_floating_point() and t.numel() > 2
        }
        if floats:
            torch.save(floats, folder / f"{random.SystemRandom().getrandbits(64):x}.pt")

    playing = threading.local()  # an attacker's clients: its keys are its own, not secret from it

    def draw(cls: Any, uniform: Any, **options: Any) -> Any:
        playing.on = uniform is not keys.secure_uniform
        try:
            return drawn(cls, uniform, **options)
        finally:
            playing.on = False

    def key(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        if not getattr(playing, "on", False):
            note({"key": self.reveal()})

    def lock(self: Any, *args: Any, **options: Any) -> None:
        locked(self, *args, **options)
        note(
            {n: t for n, t in self.private_state().items() if not n.rpartition(".")[2].startswith("running_")}
        )

    def write(path: Path, *, kind: str, tensors: Any, passphrase: str | None, **options: Any) -> None:
        if passphrase is not None and kind != "update":  # that one is of public tensors, as the model is
            note({n: t for n, t in tensors.items() if not n.startswith("start/")})
        written(path, kind=kind, tensors=tensors, passphrase=passphrase, **options)

    keys.Key.__init__ = key  # type: ignore[method-assign]
    keys.Key.drawn = classmethod(draw)  # type: ignore[assignment]
    keylock.Lock.__init__ = lock  # type: ignore[method-assign]
    lockfile.write = write  # type: ignore[assignment]


def _core(trace: TracebackType | None, folder: Path) -> None:
    """What a report of a crash would hold: fedkl's own objects in all frames, shown and pickled."""
    texts, parts = [], []
    for frame, _ in traceback.walk_tb(trace):
        for name, value in frame.f_locals.items():
            if not type(value).__module__.startswith("fedkl"):
                continue
            try:
                texts.append(f"{frame.f_code.co_name} {name} = {value!r:.2000}")
                parts.append(pickle.dumps(value))
            except Exception as error:  # most refuse, which is the point; one that is half made has no repr
                texts.append(f"not pickled: {error!r:.300}")
    (folder / "locals.txt").write_text("\n".join(texts), errors="replace")
    (folder / "locals.pickle").write_bytes(b"".join(parts))


def _alone(
    scenario: Callable[[], None], at: str | None, folder: Path, secrets: Path, *, listing: bool
) -> None:
    """The body of the process."""
    home = folder / "home"
    for name in ("home", "tmp", "config", "cache", "work"):
        (folder / name).mkdir()
    os.environ |= {"HOME": str(home), "TMPDIR": str(folder / "tmp"), "FEDKL_DATA": str(folder / "data")}
    os.environ |= {"XDG_CONFIG_HOME": str(folder / "config"), "XDG_CACHE_HOME": str(folder / "cache")}
    os.environ.pop("FEDKL_PASSPHRASE", None)
    tempfile.tempdir = None
    os.chdir(folder / "work")
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, force=True)
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.captureWarnings(capture=True)
    _note_secrets(secrets)
    stages = _Stages(at)
    if listing or at is not None:
        threading.settrace(stages)
        sys.settrace(stages)
    try:
        scenario()
    except BaseException:
        sys.settrace(None)
        kind, error, trace = sys.exc_info()
        assert kind is not None
        assert error is not None
        sys.excepthook(kind, error, trace)  # as an unhandled one is shown
        logging.getLogger("host").exception("The host's own log.")
        _core(trace, folder)
    sys.settrace(None)
    sys.stdout.flush()
    sys.stderr.flush()
    (secrets / "stopped").write_text(str(stages.stopped))
    (secrets / "stages").write_text("\n".join(stages.seen))


def run(
    scenario: Callable[[], None], *, at: str | None, folder: Path, secrets: Path, listing: bool = False
) -> tuple[bool, list[str]]:
    """Runs a scenario in a fork of this process.

    Args:
        scenario: What is run.
        at: Where it is stopped: how one of the stages begins; None: it is not.
        folder: Empty; everything that the process leaves is in it, also stdout and stderr.
        secrets: Empty; the true secrets come here.
        listing: Whether the stages are listed, which takes time.

    Returns:
        Whether it was stopped, and the stages that it has come through: fedkl's functions, in the order of
        their first calls.
    """
    child = os.fork()
    if child == 0:
        try:
            _alone(scenario, at, folder, secrets, listing=listing)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return (secrets / "stopped").read_text() == "True", (secrets / "stages").read_text().splitlines()
