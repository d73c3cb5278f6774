"""All scenarios, stopped at many stages: ``python -m tests.hygiene [--stages NUMBER] [--scenario …]``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from fedkl import lockfile
from tests.hygiene.scenarios import SCENARIOS
from tests.hygiene.searching import Found, search, secrets_in
from tests.hygiene.stopping import run


def attempt(name: str, *, at: str | None, root: Path, listing: bool = False) -> tuple[Found, bool, list[str]]:
    """Runs a scenario in a new folder and searches what it leaves.

    Returns:
        What was found, whether it was stopped, and the stages that it came through, if they are listed.
    """
    folder, secrets = (Path(tempfile.mkdtemp(dir=root)) for _ in range(2))
    stopped, stages = run(SCENARIOS[name], at=at, folder=folder, secrets=secrets, listing=listing)
    return search(folder, secrets_in(secrets)), stopped, stages


def chosen(stages: list[str], count: int) -> list[str]:
    """So many of them, evenly spread."""
    step = max(1, len(stages) / count)
    return [stages[int(place * step)] for place in range(min(count, len(stages)))]


def _cpu() -> float:
    return sum(os.times()[:4])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Prints a line for each scenario; the exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.hygiene")
    parser.add_argument("--stages", type=int, default=20)
    parser.add_argument("--scenario", nargs="*", default=list(SCENARIOS), choices=SCENARIOS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lockfile._SCRYPT = {"n": 2, "r": 1, "p": 1}
    leaks = 0
    for name in options.scenario:
        start = _cpu()
        with tempfile.TemporaryDirectory() as root:
            found, _, stages = attempt(name, at=None, root=Path(root), listing=True)
            all_found = [found]
            for at in chosen(stages, options.stages):
                all_found.append(attempt(name, at=at, root=Path(root))[0])
                for line in all_found[-1].leaks:
                    _say(f"{name}, stopped in {at}: {line}")
        for line in found.leaks:
            _say(f"{name}: {line}")
        count = sum(len(each.leaks) for each in all_found)
        leaks += count
        files, size = sum(each.files for each in all_found), sum(each.bytes for each in all_found)
        secrets = sum(each.secrets for each in all_found)
        _say(
            f"{name}: {len(stages)} stages, stopped at {len(all_found) - 1}; {files} files, {size} bytes, "
            f"{secrets} secrets; {count} findings; {_cpu() - start:.0f} s of CPU",
        )
    return int(leaks > 0)


if __name__ == "__main__":
    sys.exit(main())
