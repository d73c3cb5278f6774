"""The server's guard: around any Flower strategy, rounds that survive bad replies, drop-outs and crashes."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedkl.errors import ConfigError, FedKLError, UpdateError
from fedkl.files import exclusive
from fedkl.flower.records import arrays_of, fitted, only_arrays, tensors_of
from fedkl.flower.round_files import History, RoundFiles, SavedRound, arrays_in, put_arrays
from fedkl.update import TensorSpec, check_tensors

_LOG = logging.getLogger("flwr.fedkl")  # among Flower's own lines, in its format
_TRAIN, _EVALUATE, _SERVER = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]


class Guard(Strategy):
    """A strategy around a strategy: it lets sound replies through, and remembers rounds on disk.

    * A reply whose arrays are not exactly those that were sent (names, shapes, dtypes, finite values), or
      whose metrics do not fit, is refused by name and logged; the round goes on with the others.
    * With fewer than `min_replies` sound replies the global arrays stay as they were.
    * Averages keep each tensor's own dtype (Flower's leave a BatchNorm's count of batches as float64).
    * With `checkpoints`, every aggregated round is written to disk; `start` with the same folder goes on
      after the last one, with the strategy's own arrays (e.g. FedAdam's moments) restored.

    Which replies come is left to Flower: give `start` a `timeout`, and the strategy a `min_available_nodes`
    that drop-outs leave reachable, else Flower itself waits.

    Args:
        strategy: Any strategy of `flwr.serverapp.strategy` whose train replies hold one ArrayRecord.
        checkpoints: The folder of the rounds; None: none are written.
        min_replies: Sound replies that a round needs.

    Raises:
        ConfigError: `min_replies` is below 1.
    """

    def __init__(
        self, strategy: Strategy, *, checkpoints: str | Path | None = None, min_replies: int = 1
    ) -> None:
        if min_replies < 1:
            raise ConfigError(f"Guard: min_replies: expected at least 1, got {min_replies}.")
        self.strategy = strategy
        self._files = None if checkpoints is None else RoundFiles(Path(checkpoints).expanduser())
        self._min_replies = min_replies
        self._done = 0  # rounds of earlier runs
        self._specs: dict[str, TensorSpec] = {}
        self._history: History = {}

    def summary(self) -> None:
        """Logs the settings, after those of the strategy."""
        self.strategy.summary()
        folder = self._files.folder if self._files else "none"
        _LOG.info("Guard: at least %d sound replies; checkpoints: %s", self._min_replies, folder)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFunction | None = None,
    ) -> Result:
        """Runs all rounds, or those that a run before has left; the arguments are Flower's.

        Returns:
            Flower's result; metrics are those of all rounds, earlier runs included.

        Raises:
            UpdateError: The initial arrays are not finite, or are no arrays of numbers.
            ConfigError: Another process uses the folder of the checkpoints, or it cannot be written.
            FedKLError: There are checkpoints, but none can be read, or they are of another model.
        """
        self.expect(initial_arrays)
        with self._alone():
            arrays = self._resumed(initial_arrays)
            left = max(0, num_rounds - self._done)
            evaluate = self._numbered(evaluate_fn) if evaluate_fn else None
            result = super().start(grid, arrays, left, timeout, train_config, evaluate_config, evaluate)
        result.arrays = result.arrays or arrays  # no round was aggregated, or none was left
        for kind, rounds in self._history.items():
            setattr(result, kind, {number: MetricRecord(values) for number, values in rounds.items()})
        return result

    def expect(self, arrays: ArrayRecord) -> None:
        """Says what every reply has to look like; `start` does it.

        Raises:
            UpdateError: The arrays are not finite, or are no arrays of numbers.
        """
        self._specs = _specs(arrays)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's, in rounds of the whole training."""
        return self.strategy.configure_train(self._done + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's, of sound replies only; then the checkpoint."""
        number = self._done + server_round
        sound = self._sound(replies, number, with_arrays=True)
        if sum(reply.has_content() for reply in sound) < self._min_replies:
            _LOG.warning("Round %d: fewer than %d sound replies; nothing changes.", number, self._min_replies)
            return None, None
        arrays, metrics = self.strategy.aggregate_train(number, sound)
        arrays = self._usable(arrays, number)
        if arrays is not None and self._files is not None:
            tensors = tensors_of(arrays, subject="Aggregate")
            saved = SavedRound(round=number, arrays=tensors, memory=arrays_in(self.strategy))
            self._files.save(saved)
        self._note(_TRAIN, number, metrics)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's, in rounds of the whole training."""
        return self.strategy.configure_evaluate(self._done + server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's, of sound replies only."""
        number = self._done + server_round
        sound = self._sound(replies, number, with_arrays=False)
        metrics = self.strategy.aggregate_evaluate(number, sound)
        self._note(_EVALUATE, number, metrics)
        return metrics

    def _alone(self) -> AbstractContextManager[None]:
        return exclusive(self._files.folder) if self._files else nullcontext()

    def _resumed(self, initial: ArrayRecord) -> ArrayRecord:
        """The arrays to start from; what earlier runs left is taken over."""
        self._done, self._history = 0, {}
        saved = self._files.newest() if self._files else None
        if self._files is None or saved is None:
            return initial
        check_tensors(
            saved.arrays,
            self._specs,
            subject=f"{self._files.folder}: the checkpoint of another model.",
            remedy="Use another folder for the checkpoints, or the model that it was written with.",
            error=ConfigError,
        )
        put_arrays(self.strategy, saved.memory)
        self._done, self._history = saved.round, self._files.history(until=saved.round)
        _LOG.info("Going on after round %d of %s.", saved.round, self._files.folder)
        return arrays_of(saved.arrays)

    def _numbered(self, evaluate: EvaluateFunction) -> EvaluateFunction:
        def numbered(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            number = self._done + server_round
            metrics = evaluate(number, arrays)
            self._note(_SERVER, number, metrics)
            return metrics

        return numbered

    def _note(self, kind: str, number: int, metrics: MetricRecord | None) -> None:
        if metrics is None:
            return
        self._history.setdefault(kind, {})[number] = dict(metrics)
        if self._files is not None:
            self._files.save_history(self._history)

    def _sound(self, replies: Iterable[Message], number: int, *, with_arrays: bool) -> list[Message]:
        """Replies that fit, and errors, which strategies count themselves; the others are refused by name."""
        errors, fine = [], []
        weight = str(getattr(self.strategy, "weighted_by_key", "num-examples"))
        for reply in replies:
            if reply.has_error():
                errors.append(reply)
                continue
            try:
                self._check(reply, weight, with_arrays=with_arrays)
                fine.append(reply)
            except FedKLError as error:
                _refused(number, reply, str(error))
        layouts = [_layout(reply, with_arrays=with_arrays) for reply in fine]
        usual = Counter(layouts).most_common(1)
        kept = []
        for reply, layout in zip(fine, layouts, strict=True):
            if layout == usual[0][0]:
                kept.append(reply)
            else:
                _refused(number, reply, "its records or metrics have other names or kinds than most have.")
        return errors + kept

    def _check(self, reply: Message, weight: str, *, with_arrays: bool) -> None:
        if with_arrays:
            record = only_arrays(reply.content, subject="Reply")
            check_tensors(
                tensors_of(record, subject="Reply"),
                self._specs,
                subject="Reply refused.",
                remedy="Reply with exactly the tensors that were sent.",
            )
        metrics = list(reply.content.metric_records.values())
        if len(metrics) != 1:
            raise UpdateError(f"Reply refused: expected exactly one MetricRecord, got {len(metrics)}.")
        value = metrics[0].get(weight)
        if not isinstance(value, (int, float)) or not (0 < value < math.inf):
            raise UpdateError(f"Reply refused: expected the metric '{weight}' as a finite number > 0.")

    def _usable(self, arrays: ArrayRecord | None, number: int) -> ArrayRecord | None:
        """An average in the dtypes of the model; None if it is not finite."""
        if arrays is None:
            return None
        tensors = fitted(tensors_of(arrays, subject="Aggregate"), self._specs)
        try:
            check_tensors(
                tensors, self._specs, subject="Aggregate refused.", remedy="Lower the server's learning rate."
            )
        except UpdateError as error:
            _LOG.error("Round %d: %s The global arrays stay as they were.", number, error)
            return None
        return arrays_of(tensors)


def _specs(arrays: ArrayRecord) -> dict[str, TensorSpec]:
    """What every reply has to look like; the initial arrays themselves must be sound."""
    tensors = tensors_of(arrays, subject="Initial arrays")
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    remedy = "Start from fedkl.flower.public_arrays(model)."
    check_tensors(tensors, specs, subject="Initial arrays refused.", remedy=remedy)
    return specs


def _layout(reply: Message, *, with_arrays: bool) -> tuple[object, ...]:
    """Names of records and metrics, and how long lists are; a strategy ends the run when these differ."""
    name, metrics = next(iter(reply.content.metric_records.items()))
    kinds = tuple(sorted((key, len(v) if isinstance(v, list) else -1) for key, v in metrics.items()))
    return (tuple(reply.content.array_records) if with_arrays else (), name, kinds)


def _refused(number: int, reply: Message, reason: str) -> None:
    _LOG.warning("Round %d: reply of node %d refused: %s", number, reply.metadata.src_node_id, reason)
