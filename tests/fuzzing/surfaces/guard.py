"""Replies of clients that the Flower guard lets through to a strategy, or refuses."""

from __future__ import annotations

from contextlib import AbstractContextManager

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Strategy

from fedkl.flower import Guard, InProcessGrid, in_process, public_arrays
from tests.flower.setting import DEFENSE, net
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import ArchiveSurface
from tests.fuzzing.surfaces import records

_SETTINGS = {"min_available_nodes": 1, "min_train_nodes": 1, "min_evaluate_nodes": 1}
_STRATEGIES = ("FedAvg", "FedAdam", "FedAvgM", "FedYogi", "FedMedian", "FedTrimmedAvg", "Krum")


class GuardReplies(ArchiveSurface):
    """`Guard.aggregate_train` and `aggregate_evaluate`: whatever comes, the round goes on.

    Nothing may be raised, and what is aggregated is finite and looks like what was sent, or is None.
    """

    name = "guard"
    allowed = ()
    quick = 200
    target = "fedkl.flower.Guard.aggregate_train"

    def __init__(self) -> None:
        self._initial = public_arrays(net(), defense=DEFENSE)
        self._specs = {name: a.numpy() for name, a in self._initial.items()}
        self._grid = InProcessGrid(ClientApp(), clients=2)

    def setting(self) -> AbstractContextManager[object]:
        """Messages ask who they are from."""
        return in_process._identity()

    def form_of(self, name: str) -> str:
        """By the kind of record."""
        return "choice" if name == "strategy" else records.form_of(name)

    def seeds(self) -> list[bytes]:
        """Some replies for every strategy."""
        return [packed({"strategy": name.encode(), **self._replies()}) for name in _STRATEGIES]

    def _replies(self) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for number, value in enumerate((1.0, 2.0, 0.5)):
            arrays = {name: Array((array * value).astype(array.dtype)) for name, array in self._specs.items()}
            metrics = MetricRecord({"num-examples": 8 + number, "loss": value, "each": [1.0, value]})
            content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
            files |= records.files_of(content, str(number)) | {f"{number}/N": str(5 + number).encode()}
        return files | {"3/E": b"out of memory"}

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """One round with these replies."""
        files = unpacked(data)
        strategy = _strategy(files.pop("strategy", b"").decode("latin1").strip())
        guard = Guard(strategy, checkpoints=sandbox.place)
        guard.expect(self._initial)
        replies = records.replies_of(files)
        guard.configure_train(1, self._initial, ConfigRecord(), self._grid)
        self._check(*guard.aggregate_train(1, replies))
        guard.configure_evaluate(1, self._initial, ConfigRecord(), self._grid)
        _check_metrics(guard.aggregate_evaluate(1, records.replies_of(files)))

    def _check(self, arrays: ArrayRecord | None, metrics: MetricRecord | None) -> None:
        _check_metrics(metrics)
        if arrays is None:
            return
        found = {name: array.numpy() for name, array in arrays.items()}
        if list(found) != list(self._specs):
            raise Finding("the aggregated arrays have other names than those that were sent")
        for name, array in found.items():
            sent = self._specs[name]
            if (array.shape, array.dtype) != (sent.shape, sent.dtype):
                raise Finding("an aggregated array has another shape or dtype than the one that was sent")
            if array.dtype.kind == "f" and not abs(array).max() < float("inf"):
                raise Finding("an aggregated array is not finite")


def _strategy(name: str) -> Strategy:
    made: Strategy = getattr(strategies, name if name in _STRATEGIES else "FedAvg")(**_SETTINGS)
    return made


def _check_metrics(metrics: object) -> None:
    if metrics is not None and not isinstance(metrics, MetricRecord):
        raise Finding(f"the aggregated metrics are a {type(metrics).__name__}")
