"""Ctrl-C: a line that says what is kept and how to go on, and exit code 130."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

TRAIN = "train --rounds 100000 --set checkpoints.seconds=0 --set training.eval_every=100000"
ATTACK = "attack --arms no-norm --trials 500 --set chunk=1 --set attack.evaluations=2"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("words", [TRAIN.split(), ATTACK.split()], ids=["train", "attack"])
def test_what_was_finished_is_kept_and_the_same_command_goes_on(tmp_path, words):
    out = tmp_path / "a run"
    command = [*words, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FEDKL_PASSPHRASE": "correct horse"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkl", *command],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A suite in the background of a script ignores Ctrl-C, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        _wait_for_lines(out / "results.jsonl", 3, process)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, text
    assert "Traceback" not in text
    line = text.splitlines()[-1]
    assert line == (
        f"Interrupted. What was finished is kept in {out}; the same command goes on: "
        f"{shlex.join(['fedkl', *command])}"
    )
    assert all(json.loads(kept) for kept in (out / "results.jsonl").read_text().splitlines())
    assert not (out / "summary.json").exists()


def _wait_for_lines(path, count, process):
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path}: not {count} lines")


def test_before_anything_is_there(monkeypatch, capsys, tmp_path):
    from fedkl import cli

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedkl.cli.report.finish", interrupted)
    monkeypatch.setattr(sys, "argv", ["fedkl", "report", str(tmp_path / "\x1b[2J")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    text = capsys.readouterr().err
    assert text.startswith("Interrupted. ")
    assert "\\x1b[2J" in text
    assert "\x1b" not in text
