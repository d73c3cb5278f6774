"""A Flower server's rounds on disk, from which it goes on."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam

from fedkl.export import export
from fedkl.flower import Guard, InProcessGrid, in_process, public_arrays
from fedkl.flower.round_files import RoundFiles
from tests.flower.setting import DEFENSE, net
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import ArchiveSurface

_SETTINGS = {
    "min_available_nodes": 1,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 0,
    "fraction_evaluate": 0.0,
}


def _app() -> ClientApp:
    """Clients that send back what they got."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 4, "loss": 0.5})
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        return Message(content, reply_to=message)

    return app


class FlowerRounds(ArchiveSurface):
    """`RoundFiles.newest` and `history`, `export`, and a guard that goes on for one round from there."""

    name = "rounds"
    precious = ("notes.txt",)
    confined = True
    quick = 120
    target = "fedkl.flower.round_files.RoundFiles.newest"

    def __init__(self) -> None:
        self._initial = public_arrays(net(), defense=DEFENSE)
        self._grid = InProcessGrid(_app(), clients=1)

    def setting(self) -> AbstractContextManager[object]:
        """Messages ask who they are from."""
        return in_process._identity()

    def seeds(self) -> list[bytes]:
        """What three rounds leave."""
        with tempfile.TemporaryDirectory() as folder:
            self._start(Path(folder), until=3)
            return [packed({path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())})]

    def _start(self, folder: Path, *, until: int) -> object:
        guard = Guard(FedAdam(**_SETTINGS), checkpoints=folder)
        return guard.start(self._grid, self._initial, num_rounds=until)

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Reads the rounds, then goes on."""
        sandbox.write(unpacked(data))
        files = RoundFiles(sandbox.place)
        saved = files.newest()
        number = saved.round if saved else 0
        if type(number) is not int or number < 0:
            raise Finding(f"a round that is none was read: {type(number).__name__}")
        files.history(until=number)
        self.attempt(lambda: export(sandbox.place, out=sandbox.place / "exported.safetensors"))
        self._start(sandbox.place, until=number + 1)
