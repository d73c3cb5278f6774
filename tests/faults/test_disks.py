"""A disk that is full, and one that is read-only: one sentence, what was there stays, and then it goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

CASES = (
    "key", "lock", "store", "birth", "member", "memory", "cohort", "update", "checkpoint", "model",
    "run_directory", "privacy_ledger", "flower_round", "flower_metrics", "flower_calls", "recording",
    "audit_folder", "generator", "passphrase",
)  # fmt: skip
RAISES_OSERROR = {"recording", "audit_folder"}
"""Whose callers make a sentence of it: `RecordingMod` and the command line."""

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower needs Python 3.11")

MOUNT = 'mount -t tmpfs -o size=2m,mode=0700 tmpfs "$1" && exec "$2" -m tests.faults.disks "$1" "$3"'


@pytest.fixture(scope="module", params=["full", "read-only"])
def outcomes(request, tmp_path_factory):
    """What each write comes to, on a small disk of its own in a user namespace."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare(1): no disk can be made here")
    disk = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(disk), sys.executable, request.param],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "unshare" in done.stderr.partition("\n")[0] or "mount:" in done.stderr.partition("\n")[0]:
        pytest.skip(f"no namespace or mount here: {done.stderr[:200]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_are_tried(outcomes):
    assert set(outcomes) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_disk_that_takes_nothing(outcomes, case):
    found = outcomes[case]
    assert "No space left" in found["said"] or "Read-only" in found["said"] or case == "passphrase", found
    assert found["ours"] == (case not in RAISES_OSERROR), found
    assert len(found["said"].splitlines()) == 1, found
    assert found["same"], f"{case}: what was there before is not there any more"
    assert found["parts"] == []


@pytest.mark.parametrize("case", CASES)
def test_then_the_same_goes_on(outcomes, case):
    assert outcomes[case]["changed"] or case in ("store", "flower_calls"), case
