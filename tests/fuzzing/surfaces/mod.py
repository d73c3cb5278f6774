"""Messages of a server to a Flower client with a lock, and what its own app replies."""

from __future__ import annotations

import importlib
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

import fedkl
from fedkl.flower import ClientStore, LockMod, current_client, in_process, mod, public_arrays
from tests.flower.setting import DEFENSE, net
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.binaries import PASSPHRASE
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import ArchiveSurface
from tests.fuzzing.surfaces import records

_KINDS = ("train", "evaluate", "query", "train.more")
_TEXTS = (mod.REFUSED_MESSAGE, mod.REFUSED_REPLY, mod.FAILED)


class ModMessages(ArchiveSurface):
    """`LockMod`: whatever a server sends and an app replies, the client answers with public tensors only.

    Nothing may be raised; an error has one of the fixed texts; the stored lock opens afterwards. Files with
    the prefix ``m`` are the message, with ``r`` the app's reply; without the latter the app trains a step.
    """

    name = "mod"
    allowed = ()
    quick = 100
    target = "fedkl.flower.LockMod.__call__"

    def __init__(self) -> None:
        self._net = net()
        self._arrays = public_arrays(self._net, defense=DEFENSE)
        self._lock = b""

    def setting(self) -> AbstractContextManager[object]:
        """Messages ask who they are from."""
        return in_process._identity()

    def form_of(self, name: str) -> str:
        """By the kind of record."""
        return "choice" if name == "kind" else records.form_of(name)

    def load(self) -> None:
        """What the first optimizer imports takes seconds."""
        importlib.import_module("torch._dynamo")

    def seeds(self) -> list[bytes]:
        """Every kind of message, with a reply and without."""
        config = ConfigRecord({"server-round": 1, "names": ["0.bias", "a,b"], "lr": 0.1, "flag": True})
        sent = records.files_of(RecordDict({"arrays": self._arrays, "config": config}), "m")
        metrics = MetricRecord({"num-examples": 8, "loss": 0.5, "each": [0.1, 0.2, 0.3]})
        told = ConfigRecord({"note": "fine"})
        content = RecordDict({"arrays": self._arrays, "metrics": metrics, "more": told})
        replied = records.files_of(content, "r")
        seeds = [{"kind": kind.encode(), **sent} for kind in _KINDS]
        seeds += [{"kind": kind.encode(), **sent, **replied} for kind in _KINDS]
        return [packed(files) for files in (*seeds, {"kind": b"query", "m/C/config": b"{}"})]

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Lets the client answer."""
        files = unpacked(data)
        store = sandbox.place / "store"
        path = store / "client-0" / "lock.fedkl"
        path.parent.mkdir(parents=True)
        path.write_bytes(self._stored())
        (sandbox.place / "passphrase").write_text(PASSPHRASE)
        kind = files.get("kind", b"").decode("latin1").strip()
        asked = records.message(records.content_of(files, "m"), kind=kind if kind in _KINDS else "train")
        config = {"partition-id": 0, "fedkl-store": str(store)}
        config["fedkl-passphrase-file"] = str(sandbox.place / "passphrase")
        answer = self._app(files)(message=asked, context=Context(1, 7, config, RecordDict(), {}))
        self._check(answer)
        fedkl.load_lock(path, self._net, passphrase=PASSPHRASE)

    def _stored(self) -> bytes:
        """The lock that every input starts with."""
        if not self._lock:
            with tempfile.TemporaryDirectory() as folder:
                store = ClientStore(Path(folder), passphrase=PASSPHRASE)
                with store.client("client-0", model=self._net, defense=DEFENSE):
                    self._lock = store.path("client-0").read_bytes()
        return self._lock

    def _app(self, files: dict[str, bytes]) -> ClientApp:
        replies = any(name.startswith("r/") for name in files)
        app = ClientApp(mods=[LockMod(lambda: self._net, defense=DEFENSE)])

        def handler(message: Message, context: Context) -> Message:
            if "r/E" in files:
                raise RuntimeError(files["r/E"].decode("utf-8", "replace"))
            content = records.content_of(files, "r") if replies else _trained(current_client().model)
            return Message(content, reply_to=message)

        for register in (app.train(), app.train("more"), app.evaluate(), app.query()):
            register(handler)
        return app

    def _check(self, answer: object) -> None:
        if not isinstance(answer, Message):
            raise Finding(f"the client answered with a {type(answer).__name__}")
        if answer.has_error():
            if answer.error.reason not in _TEXTS:
                raise Finding("the text of an error is none of the fixed ones")
            return
        for record in answer.content.array_records.values():
            if set(record) != set(self._arrays):
                raise Finding("a reply holds other arrays than the public ones")


def _trained(model: nn.Module) -> RecordDict:
    loss = model.train()(torch.linspace(-1, 1, 16).reshape(4, 4)).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    metrics = MetricRecord({"num-examples": 4, "loss": float(loss.detach())})
    return RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
