"""What is run: each does in small what a client's machine does, in the current folder.

A command that handles keys or locks belongs here, as one row: it is then stopped at every stage, and all that
it left is searched.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

SMALL = ("--set", "data.train_images=64", "--set", "data.test_images=120")
PASSPHRASE = "correct horse"


def _fedkl(*words: str) -> None:
    """A command, as its entry point runs it; what it raises goes on."""
    from fedkl import cli

    sys.argv = ["fedkl", *words]
    try:
        cli.main()
    except SystemExit as end:
        if end.code not in (0, 3, None):  # 3: a short audit's evidence is incomplete
            raise


def train() -> None:
    """Two clients with locks, a checkpoint every round; the server's own model is fitted for two steps."""
    import functools

    from fedkl import training

    training.server_fill_ins = functools.partial(training.server_fill_ins, refit_steps=2)
    words = ("--defense", "keylock", "--clients", "2", "--rounds", "2", "--set", "checkpoints.seconds=0")
    _fedkl("train", "--out", "run", *words, "--set", "auxiliary=20", *SMALL)


def attack() -> None:
    """A locked model is attacked, and the attack learns or searches for its key."""
    _fedkl("attack", "--out", "run", "--trials", "1", "--set", "attack.evaluations=2", *SMALL)


def audit() -> None:
    """A defended audit of somebody's subject."""
    words = ("--defense", "keylock", "--minutes", "0.01", "--batch-size", "1")
    _fedkl("audit", "tests.hygiene.scenarios:subject", "--out", "run", *words)


def subject():
    """What is audited."""
    from tests.auditing import subjects

    return subjects.subject(subjects.convnet, count=120, images_per_client=4)


def keys() -> None:
    """A key is made, shown, rotated, and gets another passphrase."""
    os.environ["FEDKL_PASSPHRASE"] = PASSPHRASE
    os.environ["FEDKL_NEW_PASSPHRASE"] = PASSPHRASE + "2"
    for words in (("new",), ("info",), ("rotate",), ("passphrase",)):
        _fedkl("key", *words, "client.key")


def site():
    """Who joins, with a network that has seen nothing: what its norms start with is no secret."""
    from dataclasses import replace

    return replace(subject(), weights=None)


def enrollment() -> None:
    """A client joins a trained model, twice changes its key, and is backed up, checked and restored."""
    import fedkl
    from fedkl.modelfile import write_model

    os.environ |= {"FEDKL_PASSPHRASE": PASSPHRASE, "FEDKL_BACKUP_PASSPHRASE": PASSPHRASE + "3"}
    target, client = "tests.hygiene.scenarios:site", ("--store", "store", "--client", "a")
    write_model("public.safetensors", fedkl.lock(site().model()).public_state(), rounds=1)
    _fedkl("enroll", target, "--public", "public.safetensors", "--epochs", "2", *client)
    for more in (("--keep-function",), ("--epochs", "2")):
        _fedkl("key", "rotate", *client, "--target", target, "--public", "public.safetensors", *more)
    _fedkl("store", "backup", "store", "--client", "a", "--out", "a.backup")
    _fedkl("store", "check", "store")
    _fedkl("store", "restore", "a.backup", "--out", "elsewhere")


def flower() -> None:
    """Nodes with locks and masks train for two rounds."""
    from pathlib import Path

    from fedkl.flower import LockMod, Masked, MaskMod, public_arrays
    from tests.flower.cohorts import app_of, cohort, run
    from tests.flower.setting import DEFENSE, honest, net

    os.environ |= {"FEDKL_PASSPHRASE": PASSPHRASE, "FEDKL_STORE": "store", "FLWR_HOME": "flwr"}
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    folder = cohort(Path("members"), mode="both")
    app = app_of(MaskMod(), LockMod(net, defense=DEFENSE), train=honest)
    initial = public_arrays(net(), defense=DEFENSE)
    run(folder, app=app, checkpoints=Path("rounds"), initial=initial, aggregation=Masked())


def leak() -> None:
    """The control: a lock's numbers in a log, in five encodings one after another."""
    import base64
    import json
    import logging

    import fedkl
    from tests.flower.setting import net

    key = fedkl.lock(net()).key.reveal()
    form = os.environ["LEAK"]
    numbers = {
        "float32": lambda: key.float().numpy().tobytes(),
        "float64, big-endian": lambda: key.numpy().byteswap().tobytes(),
        "base64": lambda: base64.b64encode(b"x" + key.float().numpy().tobytes()),
        "hex": lambda: key.numpy().tobytes().hex().encode(),
        "decimal": lambda: json.dumps(key.tolist()).encode(),
    }[form]()
    with open("left", "wb") as file:  # noqa: PTH123 (as a user might)
        file.write(b"something else " + numbers)
    logging.getLogger("leak").debug("%s", numbers.decode("latin-1"))


SCENARIOS: dict[str, Callable[[], None]] = {
    "train": train,
    "attack": attack,
    "audit": audit,
    "keys": keys,
    "enrollment": enrollment,
    "flower": flower,
}
"""By name. Their calls of fedkl are the stages at which they are stopped."""
