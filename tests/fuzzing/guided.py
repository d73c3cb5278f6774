"""The same work under Atheris: libFuzzer chooses what to change by the branches that inputs reach.

It is a program of its own, started by the engine: Atheris instruments modules when they are imported, and
never gives the process back.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
from pathlib import Path
from typing import Any


def available() -> bool:
    """Whether Atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


def main(arguments: list[str]) -> None:
    """Fuzzes one surface; ends the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("surface")
    for name in ("--state", "--beat", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--end", "--patience"):
        parser.add_argument(name, type=float, required=True)
    for name in ("--inputs", "--seed", "--memory"):
        parser.add_argument(name, type=int, required=True)
    _fuzz(parser.parse_args(arguments))


def _fuzz(options: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(include=["fedkl"]):
        from tests.fuzzing import surfaces

        surface = surfaces.surface(options.surface)
    _Target(atheris, surface, options).run()


class _Target:
    """What libFuzzer calls: `mutated` for a new input, then `tried` with it."""

    def __init__(self, atheris: Any, surface: Any, options: argparse.Namespace) -> None:
        from tests.fuzzing.state import Store
        from tests.fuzzing.worker import Beat, Limits

        self._atheris = atheris
        self._surface = surface
        self._options = options
        self._store = Store(options.state, surface.name)
        self._beat = Beat(options.beat)
        self._limits = Limits(patience=options.patience, memory=options.memory)
        self._fresh = False
        self._engine = os.getppid()

    def run(self) -> None:
        """Never returns."""
        from tests.fuzzing.worker import LONGEST, isolate

        self._surface.load()
        for seed in self._surface.prepared():
            self._store.keep(seed)
        options = self._options
        flags = [
            f"-max_len={LONGEST}",
            f"-seed={1 + options.seed % 2**31}",
            f"-artifact_prefix={options.folder}/",
            "-timeout=0",  # ours names the place
            "-rss_limit_mb=0",  # the same
            "-len_control=0",
            "-verbosity=0",
        ]
        corpus = str(self._store.corpus_folder)
        self._atheris.Setup([sys.argv[0], *flags, corpus], self.tried, custom_mutator=self.mutated)
        isolate(self._limits)  # libFuzzer may have set signals of its own
        self._atheris.Fuzz()

    def mutated(self, data: bytes, longest: int, seed: int) -> bytes:
        """Our own changes mostly, libFuzzer's else."""
        self._fresh = True
        rng = random.Random(seed)
        if rng.random() < 0.25:
            changed: bytes = self._atheris.Mutate(data, longest)
            return changed
        return bytes(self._surface.mutate(data, rng))[:longest]

    def tried(self, data: bytes) -> None:
        """Findings are kept and do not end the run; inputs of the corpus that are read again do not count."""
        from tests.fuzzing.contract import Finding
        from tests.fuzzing.worker import tried

        self._beat.begin(data, counts=self._fresh)
        self._fresh = False
        outcome = tried(self._surface, data, self._options.folder, patience=self._options.patience)
        self._beat.end()
        if isinstance(outcome, Finding):
            self._store.record(data, outcome)
        done = self._beat.inputs >= self._options.inputs >= 0 or time.monotonic() > self._options.end
        if done or os.getppid() != self._engine:
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
