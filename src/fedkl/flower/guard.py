"""The server's guard: around any Flower strategy, rounds that survive bad replies, drop-outs and crashes."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Result, Strategy

from fedkl.errors import ConfigError, UpdateError
from fedkl.files import exclusive
from fedkl.flower.aggregation import (
    OnSeenReplies,
    PassedOn,
    ReplyAggregation,
    ReplyPlan,
    ReplyRound,
    TrainingPlan,
    collect,
)
from fedkl.flower.records import arrays_of, tensors_of
from fedkl.flower.replies import (
    ReplyRules,
    constants,
    odd_metric,
    record_of,
    refused,
    sorted_out,
    specs_of,
    usable,
)
from fedkl.flower.round_files import (
    EVALUATE,
    SERVER,
    TRAIN,
    History,
    RoundFiles,
    SavedRound,
)
from fedkl.flower.strategy_memory import StrategyMemory, arrays_in, nested, put_arrays
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec, check_tensors

_LOG = logging.getLogger("flwr.fedkl")  # among Flower's own lines, in its format
_OF_REPLIES = (InconsistentMessageReplies, AggregationError)  # Flower's other exits are on purpose

_T = TypeVar("_T")
EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]


class Guard(Strategy):
    """A strategy around a strategy: it lets sound replies through, and remembers rounds on disk.

    * A reply whose arrays are not exactly those that were sent (names, shapes, dtypes, finite values), whose
      weight or metrics do not fit, or that is not the first one of its node, is refused by name and logged;
      the round goes on with the others.
    * With fewer than `min_replies` sound replies the global arrays stay as they were.
    * If the strategy raises, or its average is not finite or not of the model, the round is given up: the
      global arrays and the strategy's own stay as they were. The log says what was raised, and where. What
      Flower raises to end a run (a privacy budget is spent) goes through, and so does what is no `Exception`.
    * If most clients refuse the model of the last round, as members do with a masked sum that was altered, it
      goes on from the round before, with the strategy's own arrays of then; next time the other way round.
    * Averages keep each tensor's own dtype (Flower's leave a BatchNorm's count of batches as float64).
    * With `checkpoints`, every aggregated round is written to disk; `start` with the same folder goes on
      after the last one, with the strategy's own arrays (e.g. FedAdam's moments) restored.

    Which replies come is left to Flower: give `start` a `timeout`, and the strategy a `min_available_nodes`
    that drop-outs leave reachable, else Flower itself waits.

    Args:
        strategy: Any strategy of `flwr.serverapp.strategy` whose train replies hold one ArrayRecord.
        checkpoints: The folder of the rounds; None: none are written.
        min_replies: Sound replies that a round needs.
        aggregation: What becomes of replies before the strategy gets them; None: it gets them as they came.
        on_seen: Is told, once a round, what was asked and what the server has of the training replies.

    Raises:
        ConfigError: `min_replies` is below 1.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        checkpoints: str | Path | None = None,
        min_replies: int = 1,
        aggregation: ReplyAggregation | None = None,
        on_seen: OnSeenReplies | None = None,
    ) -> None:
        if min_replies < 1:
            raise ConfigError(f"Guard: min_replies: expected at least 1, got {min_replies}.")
        self.strategy = strategy
        self._files = None if checkpoints is None else RoundFiles(Path(checkpoints).expanduser())
        self._min_replies = min_replies
        self._aggregation = aggregation or PassedOn()
        self._running = self._aggregation  # that of the training which is under way
        self._on_seen = on_seen
        self._round: ReplyRound | None = None  # that messages were sent for
        self._done = 0  # rounds of earlier runs
        self._specs: dict[str, TensorSpec] = {}
        self._history: History = {}
        self._raised: set[int] = set()  # rounds of this run in which the strategy did
        self._first: SavedRound | None = None  # what the training began with
        self._last = 0  # the last round that counts
        self._held: tuple[SavedRound | None, ...] = (None, None)  # without files: the one before, and it

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
            ConfigError: The folder of the checkpoints is a link, cannot be written, or is another process's.
            FedKLError: There are checkpoints, but none can be read, or they are of another model.
        """
        self.expect(initial_arrays)
        self._raised.clear()
        with self._alone():
            arrays, kept = self._resumed(initial_arrays)
            self._running = self._aggregation.for_training(
                TrainingPlan(
                    strategy=self.strategy,
                    evaluates=evaluate_fn is not None,
                    timeout=timeout,
                    folder=self._files.folder if self._files else None,
                    kept=kept,
                )
            )
            left = max(0, num_rounds - self._done)
            evaluate = self._numbered(evaluate_fn) if evaluate_fn else None
            result = super().start(grid, arrays, left, timeout, train_config, evaluate_config, evaluate)
            result.arrays = self._finish(grid, result.arrays or arrays) or result.arrays
            self._first, self._held = None, (None, None)
        if self._raised:
            _LOG.error("The strategy raised in %d of the rounds of this run; see above.", len(self._raised))
        if self._running.server_learns != "nothing":  # of a model that it cannot read it has no arrays
            result.arrays = result.arrays or arrays  # no round was aggregated, or none was left
        for kind, rounds in self._history.items():
            setattr(result, kind, {number: MetricRecord(values) for number, values in rounds.items()})
        return result

    def expect(self, arrays: ArrayRecord) -> None:
        """Says what every reply has to look like; `start` does it.

        Raises:
            UpdateError: The arrays are not finite, or are no arrays of numbers.
        """
        self._specs = specs_of(arrays)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's, in rounds of the whole training."""
        number = self._done + server_round
        messages = list(self.strategy.configure_train(number, arrays, config, grid))
        nodes = tuple(message.metadata.dst_node_id for message in messages)
        plan = ReplyPlan(round=number, nodes=nodes, specs=self._specs, arrays=arrays, grid=grid)
        self._round = self._begin(plan)
        return self._round.requests(messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's, of sound replies only; then the checkpoint.

        Raises:
            ConfigError: The checkpoint cannot be written.
        """
        number = self._done + server_round
        collected, self._round = self._begun(number), None
        passed = collect(collected, replies, self._rules(), least=self._min_replies)
        if self._on_seen is not None:
            self._on_seen(collected.plan, collected.what_the_server_sees())
        if passed is None:
            before = self._gone_back(number) if collected.rejected else None
            return (arrays_of(before.arrays) if before and collected.passes_on else None), None
        aggregated = self._aggregated if collected.passes_on else self._left_sealed
        saved, metrics = aggregated(collected, passed)
        if saved is not None:
            self._keep(saved)
        noted = self._noted(TRAIN, number, metrics)
        return None if saved is None or not collected.passes_on else arrays_of(saved.arrays), noted

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's, in rounds of the whole training."""
        number = self._done + server_round
        return self._running.evaluation(list(self.strategy.configure_evaluate(number, arrays, config, grid)))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's, of sound replies only."""
        number = self._done + server_round
        rules = replace(self._rules(), specs=None, loss=None)
        errors, sound = sorted_out(replies, rules.checked, round=number, with_arrays=False)
        passed = errors + sound
        metrics = self._attempted(lambda: self.strategy.aggregate_evaluate(number, passed), number)
        return self._noted(EVALUATE, number, metrics)

    def _keep(self, saved: SavedRound) -> None:
        """A round counts: what comes goes on from it.

        Raises:
            ConfigError: The checkpoint cannot be written.
        """
        if self._files is not None:
            self._files.save(saved)
        elif self._running.may_reject:
            self._held = (self._held[1], saved)
        self._last = saved.round
        self._running.goes_on(saved.kept)

    def _earlier(self) -> SavedRound | None:
        """What counted before the last round: the start, where that was the first one; None if none did."""
        if self._last == 0:
            return None
        return (self._files.earlier(self._last) if self._files else self._held[0]) or self._first

    def _gone_back(self, round: int) -> SavedRound | None:
        """Goes on from the round before the last one, which nobody takes; the next time the other way round.

        Raises:
            ConfigError: The checkpoint cannot be written.
        """
        before = self._earlier()
        if before is None:
            return None
        _LOG.error(
            "Round %d: most members refuse the model of round %d. If their nodes' logs say that the sum was "
            "altered, an upload in it was broken or forged. It goes on from the model before; outside blind "
            "mode all who were in the sum have to come back for that. Without one of them, begin in a new "
            "folder with other initial weights.",
            *(round, self._last),
        )
        put_arrays(self.strategy, before.memory)
        saved = replace(before, round=round)
        self._keep(saved)
        return saved

    def _finish(self, grid: Grid, arrays: ArrayRecord) -> ArrayRecord | None:
        """Ends the training; the arrays in place of those that are given, if members have refused these."""
        if self._running.finish(grid, arrays):
            return None
        before = self._gone_back(self._last)
        if before is None:
            return None
        earlier = arrays_of(before.arrays)
        self._running.finish(grid, earlier)
        return earlier if self._running.server_learns != "nothing" else None

    def _begin(self, plan: ReplyPlan) -> ReplyRound:
        return self._running.begin(plan, record=self._on_seen is not None)

    def _begun(self, number: int) -> ReplyRound:
        """The round that messages were sent for; one without them if nobody asked for any."""
        if self._round is not None and self._round.plan.round == number:
            return self._round
        return self._begin(ReplyPlan(round=number, nodes=(), specs=self._specs))

    def _alone(self) -> AbstractContextManager[None]:
        return exclusive(self._files.folder, follow=False) if self._files else nullcontext()

    def _resumed(self, initial: ArrayRecord) -> tuple[ArrayRecord, NamedTensors]:
        """The arrays to start from, and what the aggregation kept; what earlier runs left is taken over."""
        self._done, self._history = 0, {}
        self._last = 0
        if self._aggregation.may_reject:
            first = tensors_of(initial, subject="Initial arrays", names=self._specs)
            self._first = SavedRound(round=0, arrays=first, memory={})
        saved = self._files.newest() if self._files else None
        if self._files is None or saved is None:
            return initial, {}
        check_tensors(
            saved.arrays,
            self._specs,
            subject=f"{self._files.folder}: the checkpoint of another model.",
            remedy="Use another folder for the checkpoints, or the model that it was written with.",
            error=ConfigError,
        )
        put_arrays(self.strategy, saved.memory)
        self._last = saved.round
        self._specs = {name: self._specs[name] for name in saved.arrays}  # the order that the memory goes by
        self._done, self._history = saved.round, self._files.history(until=saved.round)
        _LOG.info("Going on after round %d of %s.", saved.round, self._files.folder)
        return arrays_of(saved.arrays), saved.kept

    def _numbered(self, evaluate: EvaluateFunction) -> EvaluateFunction:
        def numbered(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            number = self._done + server_round
            return self._noted(SERVER, number, evaluate(number, arrays))

        return numbered

    def _noted(self, kind: str, number: int, metrics: object) -> MetricRecord | None:
        """Metrics, once they are in the history; None if they are no metrics."""
        if metrics is None:
            return None
        record = record_of(metrics)
        if record is None or odd_metric(record) is not None:
            _LOG.error("Round %d: the metrics are no MetricRecord of numbers of 64 bits; left out.", number)
            return None
        self._history.setdefault(kind, {})[number] = dict(record)
        if self._files is not None:
            self._files.save_history(self._history)
        return record

    def _rules(self) -> ReplyRules:
        weight, loss = self._setting("weighted_by_key"), self._setting("train_loss_key")
        return ReplyRules(
            specs=self._specs,
            weight=str(weight or "num-examples"),
            loss=None if loss is None else str(loss),  # QFedAvg computes with it as with a weight
        )

    def _setting(self, name: str) -> object:
        """An attribute of the strategy, or of one that it wraps."""
        owners = (owner for _, owner in nested(self.strategy) if hasattr(owner, name))
        return getattr(next(owners, None), name, None)

    def _left_sealed(self, collected: ReplyRound, passed: list[Message]) -> tuple[SavedRound, object]:
        """A round whose result only the clients can read; all arrays are as they were."""
        plan = collected.plan
        for reply in passed:
            refused(plan.round, reply, str(reply.error.reason))
        _LOG.info("Round %d: a sum of %d updates, for members to open.", plan.round, len(collected.offered))
        arrays = tensors_of(plan.arrays, subject="Global arrays", names=self._specs)
        memory = arrays_in(self.strategy)
        return SavedRound(round=plan.round, arrays=arrays, memory=memory, kept=collected.kept), None

    def _aggregated(self, collected: ReplyRound, passed: list[Message]) -> tuple[SavedRound | None, object]:
        """The strategy's average and metrics; if it cannot be used, all arrays are what they were."""
        number = collected.plan.round

        def aggregate() -> tuple[object, object]:
            arrays, metrics = self.strategy.aggregate_train(number, passed)
            return arrays, metrics

        before = StrategyMemory(self.strategy)
        made = self._attempted(aggregate, number)
        arrays, metrics = made or (None, None)
        if made is None:
            before.put_back()
        if arrays is None:
            return None, metrics
        memory = arrays_in(self.strategy)
        try:
            constant = constants(passed, collected.plan.arrays, self._specs)
            tensors = usable(arrays, self._specs, spoilt=before.spoilt(memory), constant=constant)
        except UpdateError as error:
            before.put_back()
            _LOG.error("Round %d: %s The global arrays stay as they were.", number, error)
            return None, metrics
        return SavedRound(round=number, arrays=tensors, memory=memory, kept=collected.kept), metrics

    def _attempted(self, aggregate: Callable[[], _T], number: int) -> _T | None:
        """What the strategy makes of replies; None, and its mistake in the log, if it raises.

        The text of what it raised may quote what a client sent, and is not logged. Whether the mistake is in
        the replies or in the strategy cannot be told here.
        """
        try:
            return aggregate()
        except Exception as error:
            if isinstance(error, AppExitException) and not isinstance(error, _OF_REPLIES):
                raise  # Flower means to end the run
            self._raised.add(number)
            frames = traceback.extract_tb(error.__traceback__, limit=-3)
            places = ", ".join(
                f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reversed(frames)
            )
            name, kind = type(self.strategy).__name__, type(error).__name__
            _LOG.error("Round %d: %s raised %s at %s. Nothing changes.", number, name, kind, places)
            return None
