"""A training that is killed again and again ends as if it had never been: the same bytes, every round once.

Each life of the training is a process of its own that runs `fedkl train`. They are forked from one process
that has imported fedkl, since importing takes longer than the training.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fedkl import config as configs
from fedkl import data
from fedkl.config import CheckpointConfig, TrainConfig
from fedkl.configured import networks_of
from fedkl.defenses import KeyLock
from fedkl.federated import (
    Checkpoints,
    Execution,
    FederatedTraining,
    Federation,
    LocalTraining,
    ServerSGD,
)
from fedkl.runs import RunDirectory
from tests.federated.setting import differences, everything

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

CLIENTS, ROUNDS = 10, 8
CONFIG = TrainConfig(
    defense=KeyLock(layers="all", key_length=16),
    training=FederatedTraining(
        clients=CLIENTS,
        cohort=3,
        dropout=0.2,
        rounds=ROUNDS,
        server=ServerSGD(),
        eval_every=3,
        eval_clients=2,
        local=LocalTraining(optimizer="adam", batch_size=64),
    ),
    execution=Execution(workers=2),
    checkpoints=CheckpointConfig(seconds=0.0),
    auxiliary=2,
)

# Reads one job a line, forks a process for it, tells its number and, when asked, waits and tells its status.
# `die_at` = n: the process kills itself in place of its n-th operation that changes the disk.
NURSERY = """
import functools, json, os, signal, sys
import torch._dynamo  # which torch.optim imports at its first use
import fedkl.cli, fedkl.experiments, fedkl.lockfile

# What takes long, but does not matter here: reports, strong passphrases, fitting the server's own model.
fedkl.cli.train.finish = lambda run: None
fedkl.lockfile._SCRYPT["n"] = 16
fill_ins = fedkl.training.server_fill_ins
fedkl.training.server_fill_ins = functools.partial(fill_ins, refit_steps=2)

def die_at(last):
    count = 0
    def mortal(operation):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return wrapped
    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))

def live(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["die_at"]:
        die_at(job["die_at"])
    sys.argv = ["fedkl", *job["arguments"]]
    code = 1
    try:
        fedkl.cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)

print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    pid = os.fork()
    if pid == 0:
        live(json.loads(line))
    print(pid, flush=True)
    sys.stdin.readline()  # until then its number is its own, even if it has ended
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Nursery:
    """Starts lives of `fedkl train`; one at a time."""

    def __init__(self, folder):
        self.log = folder / "log.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FEDKL_PASSPHRASE": "horse"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout.readline() == "ready\n"

    def _ask(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, *arguments, die_at=0):
        job = {"arguments": ["train", *map(str, arguments)], "log": str(self.log), "die_at": die_at}
        return self._ask(json.dumps(job))

    def status(self):
        """Waits for the life that was started last."""
        return self._ask("")

    def run(self, *arguments, die_at=0):
        self.start(*arguments, die_at=die_at)
        return self.status()

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def until(condition, *, seconds=60.0):
    """Whether the condition came true; looks as often as it can."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0002)
    return False


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    started = Nursery(tmp_path_factory.mktemp("nursery"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def born(nursery, tmp_path_factory):
    """A run that was killed when it had its first checkpoint: its keys exist, and hardly anything else."""
    folder = tmp_path_factory.mktemp("born")
    run, file = folder / "run", folder / "config.toml"
    file.write_text(configs.dump(CONFIG), encoding="utf-8")
    pid = nursery.start("--out", run, "--config", file)
    assert until((run / "checkpoints" / "round-000000.json").exists), nursery.log.read_text()
    os.kill(pid, signal.SIGKILL)
    assert nursery.status() == signal.SIGKILL
    assert not (run / "summary.json").exists()
    assert len(list(RunDirectory.open(run).results())) < ROUNDS
    return run


@pytest.fixture(scope="module")
def whole(nursery, born):
    """The same run, never killed again, and how many seconds that took."""
    run = born.with_name("whole")
    shutil.copytree(born, run)
    start = time.monotonic()
    assert nursery.run("--out", run, "--resume") == 0, nursery.log.read_text()
    return run, time.monotonic() - start


def restored(run):
    """All that server and clients keep, from the last checkpoint."""
    dataset = data.load(CONFIG.data.name)
    federation = Federation(
        networks_of(CONFIG, dataset)(0),
        defense=CONFIG.defense,
        dataset=dataset,
        training=CONFIG.training,
        seed=CONFIG.seed,
        execution=CONFIG.execution,
    )
    assert Checkpoints(run / "checkpoints", passphrase="horse").restore(federation) == ROUNDS
    return everything(federation)


def records(run, event):
    timings = ("seconds", "elapsed")
    found = [record for record in RunDirectory.open(run).results() if record["event"] == event]
    return [{name: value for name, value in r.items() if name not in timings} for r in found]


def assert_as_if_never_killed(run, whole):
    assert (run / "global.safetensors").read_bytes() == (whole / "global.safetensors").read_bytes()
    state, expected = restored(run), restored(whole)
    assert not differences(state, expected)
    assert sum(name.endswith("/key") for name in state) == CLIENTS
    assert any("/optimizer/" in name for name in state)
    rounds = records(run, "round")
    assert [record["round"] for record in rounds] == list(range(ROUNDS))
    assert rounds == records(whole, "round")
    assert records(run, "partition") == records(whole, "partition")
    assert len(records(run, "partition")) == 1
    fill_ins = [
        [(r["arm"], r["statistics"], r["auxiliary"]) for r in records(each, "fill-in")]
        for each in (run, whole)
    ]
    assert fill_ins[0] == fill_ins[1]
    assert len(set(fill_ins[0])) == len(fill_ins[0])
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert all(name.startswith(("round-", "public-", "private-")) for name in names)
    assert len([name for name in names if name.startswith("round-")]) == CONFIG.checkpoints.keep


def test_a_training_that_is_killed_at_any_moment_ends_the_same(nursery, born, whole, tmp_path):
    """From outside: while a checkpoint is being written, then at random moments."""
    reference, seconds = whole
    run, draws, kills = tmp_path / "run", random.Random(0), 0
    shutil.copytree(born, run)

    def lines():
        path = run / "results.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def writing(kind, before):
        """Whether such a file is half written; what is too short to be seen ends two rounds later."""
        return any((run / "checkpoints").glob(f".{kind}-*")) or lines() >= before + 2

    for moment in ["private", "public", "round", *(draws.uniform(0.05, 0.8) for _ in range(4))]:
        before = lines()
        pid = nursery.start("--out", run, "--resume")
        if isinstance(moment, str):
            assert until(lambda kind=moment, before=before: writing(kind, before)), nursery.log.read_text()
        else:
            time.sleep(moment * seconds)
        os.kill(pid, signal.SIGKILL)
        status = nursery.status()
        assert status in (0, signal.SIGKILL), nursery.log.read_text()
        kills += status == signal.SIGKILL
    assert kills >= 3
    assert nursery.run("--out", run, "--resume") == 0, nursery.log.read_text()
    assert_as_if_never_killed(run, reference)


def test_a_training_that_is_killed_at_every_file_operation_ends_the_same(nursery, born, whole, tmp_path):
    """From inside: a life ends in place of its n-th operation that changes the disk, for n = 1, 2, 3, …"""
    reference, _ = whole
    run, kills = tmp_path / "run", 0
    shutil.copytree(born, run)
    for operation in (*range(1, 15), *range(16, 200, 2)):
        status = nursery.run("--out", run, "--resume", die_at=operation)
        if status == 0:
            break
        assert status == signal.SIGKILL, nursery.log.read_text()
        kills += 1
    assert kills > 14
    assert status == 0
    assert_as_if_never_killed(run, reference)


def test_a_lost_checkpoint_would_show(nursery, born, whole, tmp_path):
    """These tests can fail: keys that are drawn again give another training."""
    reference, _ = whole
    run = tmp_path / "run"
    shutil.copytree(born, run)
    shutil.rmtree(run / "checkpoints")
    assert nursery.run("--out", run, "--resume") == 0, nursery.log.read_text()
    assert [r["round"] for r in records(run, "round")] == list(range(ROUNDS))
    assert (run / "global.safetensors").read_bytes() != (reference / "global.safetensors").read_bytes()
    assert differences(restored(run), restored(reference))


def test_what_killed_writes_have_left_in_the_run_directory_goes(nursery, born, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(born, run)
    (run / ".results.jsonl.0123abcd.part").write_bytes(b"half")
    RunDirectory.create(run, config=CONFIG, version="0")
    assert not list(run.glob(".*"))
