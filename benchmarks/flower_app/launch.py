"""Starts one Flower simulation of this app, times it, and ends every process that it left behind.

Flower, its SuperLink and ray get a private home, private ports and a private temporary folder. Whatever they
start inherits a mark in its environment; by that mark it is found and ended, by process id, also when the run
fails or takes too long (ray's daemons leave their process group, so that the group alone is not enough).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from processes import MARK, end_marked, free_ports

APP = Path(__file__).resolve().parent

Engine = Literal["run_simulation", "flwr-run"]


class FlowerRunError(RuntimeError):
    """Flower did not finish; the message ends with the last lines of its log."""


def run_flower(
    python: Path,
    config: dict[str, bool | int | str],
    *,
    engine: Engine,
    actors: int,
    timeout: float,
) -> dict[str, Any]:
    """One whole simulation in fresh processes.

    The clock starts before the first process is started. `ready_s` stops when the result is written, before
    anything is shut down; `wall_s` stops when the command returns. Ending what is left, and making the
    temporary folder, are outside. With "flwr-run" the start of the local SuperLink is inside, as it is for
    the first `flwr run` of a user.

    Args:
        python: The interpreter that has Flower, ray, torch and fedkl.
        config: See `[tool.flwr.app.config]` in pyproject.toml, without the result file.
        engine: "run_simulation" (deprecated by Flower, but without a SuperLink) or "flwr-run".
        actors: Clients that train at once, one intra-op thread each.
        timeout: Seconds until the run is ended.

    Returns:
        `wall_s`, `ready_s`, and what the ServerApp wrote: `round_seconds`, `losses`, `accuracies`.

    Raises:
        FlowerRunError: The command failed, wrote no result, or took too long.
    """
    with _private_folder() as folder:
        config = {**config, "result-file": str(folder / "result.json")}
        environment, mark = _environment(python, folder)
        start = time.perf_counter()
        log_path = folder / "log.txt"
        with log_path.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 (the interpreter that the caller names)
                _command(python, config, engine=engine, actors=actors),
                cwd=APP,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                times = _wait(process, folder / "result.json", start=start, timeout=timeout)
            finally:
                end_marked(mark, process)
        if "ready_s" not in times or process.returncode != 0:
            tail = log_path.read_text(errors="replace").splitlines()[-30:]
            raise FlowerRunError("\n".join([f"Flower ({engine}) gave no result ({times}).", *tail]))
        return {**times, **json.loads((folder / "result.json").read_text())}


def _command(python: Path, config: dict[str, bool | int | str], *, engine: Engine, actors: int) -> list[str]:
    if engine == "run_simulation":
        return [str(python), "simulate.py", json.dumps(config), str(actors)]
    # `key=value` in TOML, in which JSON's spelling of strings, integers and booleans is valid.
    overrides = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
    simulation = (
        f"num-supernodes={config['clients']} client-resources-num-cpus=1 "
        f"init-args-num-cpus={actors} init-args-log-to-driver=false"
    )
    command = [str(python.with_name("flwr")), "run", ".", "--stream"]
    return [*command, "--run-config", overrides, "--federation-config", simulation]


def _environment(python: Path, folder: Path) -> tuple[dict[str, str], str]:
    """The environment of the run and the mark in it."""
    mark = uuid.uuid4().hex
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local-in-memory:"\n'
    )
    runtime, control = free_ports(2)
    return {
        **os.environ,
        MARK: mark,
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(runtime),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }, mark


@contextmanager
def _private_folder() -> Iterator[Path]:
    # Short: ray's sockets live below it, and the path of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="fk"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(
    process: subprocess.Popen[bytes], result: Path, *, start: float, timeout: float
) -> dict[str, float]:
    """Seconds from `start` until the result was there and until the command returned."""
    times: dict[str, float] = {}
    while time.perf_counter() - start < timeout:
        ended = process.poll() is not None
        if "ready_s" not in times and result.exists():
            times["ready_s"] = time.perf_counter() - start
        if ended:
            times["wall_s"] = time.perf_counter() - start
            break
        time.sleep(0.01)
    return times
