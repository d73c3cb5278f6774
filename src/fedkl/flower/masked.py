"""Masked sums on Flower, the server's side of a training: who takes part, and on which model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import flwr.serverapp.strategy as flower
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedkl.aggregation import Seen, ServerLearns
from fedkl.errors import ConfigError, FedKLError, shown
from fedkl.flower import mask_records, model_records
from fedkl.flower.aggregation import ReplyAggregation, ReplyPlan, ReplyRound, TrainingPlan
from fedkl.flower.calls import Calls
from fedkl.flower.kept_sums import Kept
from fedkl.flower.mask_records import Who
from fedkl.flower.masked_round import Asked, MaskedReplies, addressed, is_refusal
from fedkl.flower.model_records import Base
from fedkl.flower.records import only_arrays
from fedkl.flower.replies import refused, specs_of
from fedkl.flower.strategy_memory import nested
from fedkl.masking import Call, Rules
from fedkl.masking.sums import sum_of
from fedkl.types import NamedTensors

_LOG = logging.getLogger("flwr.fedkl")

_OF_SINGLE_UPDATES = (
    *(flower.Bulyan, flower.Krum, flower.MultiKrum, flower.FedMedian, flower.FedTrimmedAvg, flower.QFedAvg),
    *(flower.FedXgbBagging, flower.FedXgbCyclic),
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)
"""Strategies that compute with each client's own update, or with their number: a mean is no substitute."""


@dataclass(frozen=True, kw_only=True)
class Masked(ReplyAggregation):
    """Nodes with a `MaskMod` send masked updates; the server reads their sum, or not even that.

    Which, and who takes part, the members have agreed on in their cohort; their nodes tell the server. In
    modes blind and both the server's global arrays stay what they were, and a checkpoint holds a sum that
    only members can open. In mode pairwise the strategy gets one reply, the mean. After the last round every
    node writes the model down. See docs/flower.md.

    Attributes:
        metrics: Names of a training's metrics that are averaged, inside the sum; of others nothing is sent.

    Raises:
        ConfigError: `metrics` are no names, or one is there twice.
    """

    may_reject: ClassVar[bool] = True
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names: object = self.metrics
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"Masked: metrics: expected names, got {shown(names)}. Give a tuple of texts, ('loss',)."
            )
        twice = [name for name, count in Counter(self.metrics).items() if count > 1]
        if twice:
            raise ConfigError(f"Masked: metrics: {shown(twice[0])} is there twice. Name each metric once.")
        object.__setattr__(self, "metrics", tuple(names))  # as a checkpoint gives them back

    @property
    def server_learns(self) -> ServerLearns:  # type: ignore[override]
        """At most the sum: whether that, is known once the nodes have said of which cohort they are."""
        return "sum"

    def for_training(self, plan: TrainingPlan) -> MaskedTraining:
        """What aggregates the rounds of one training.

        Raises:
            ConfigError: What was kept is damaged.
        """
        return MaskedTraining(self, plan)

    def begin(self, plan: ReplyPlan, *, record: bool = False) -> NoReturn:
        """Not here: rounds need to know those before.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("Masked: rounds are begun in a training. Call Guard.start.")


class MaskedTraining(ReplyAggregation):
    """One training: the run's name, who the nodes' members are, and the last sum.

    Args:
        options: The user's.
        plan: What is known.

    Raises:
        ConfigError: What was kept is damaged.
    """

    may_reject: ClassVar[bool] = True

    def __init__(self, options: Masked, plan: TrainingPlan) -> None:
        self._options, self._plan = options, plan
        self._who: dict[int, Who] = {}
        self._proven: set[int] = set()  # nodes whose uploads were in sums that members have taken
        self._names: dict[int, Mapping[int, str]] = {}  # members by node, of the last calls by their round
        self._listed: set[int] = set()  # nodes whose uploads are in the last sum
        self._rules: Rules | None = None
        self._roster = b""  # the last one that was asked
        self._last = sum_of(plan.kept)
        self._kept = Kept.of(plan.kept)
        if plan.kept and self._kept.metrics != options.metrics:
            names = ", ".join(map(repr, self._kept.metrics)) or "none"
            raise ConfigError(
                f"Masked: metrics: the rounds so far have {names} in their sums. Go on with the same."
            )
        self._calls = Calls(plan.folder, self._last)

    @property
    def server_learns(self) -> ServerLearns:  # type: ignore[override]
        """The sum in pairwise mode, otherwise nothing."""
        return "sum" if self._kept.mode == "pairwise" else "nothing"

    def begin(self, plan: ReplyPlan, *, record: bool = False) -> ReplyRound:
        """Begins a round: asks nodes that nobody knows yet who they are, then counts the round.

        Raises:
            ConfigError: Strategy or server want what this cohort does not let the server read.
        """
        grid = plan.grid
        if grid is None:
            raise ConfigError("Masked: a round needs nodes. Let Guard.configure_train choose them.")
        asked = self._asked(plan, grid)
        if asked is None:
            return _Nobody(plan)
        self._adopt(asked.who.rules)
        self._roster = asked.who.roster
        call = Call(run=self._calls.run, round=self._calls.next(), attempt=0, cohort=asked.cohort)
        last = 0 if self._last is None else self._last.call.round
        self._names = {round: names for round, names in self._names.items() if round >= last}
        self._names[call.round] = asked.names
        return MaskedReplies(
            plan,
            asked=asked,
            call=call,
            base=self._base(plan.arrays),
            sets=self._calls.sets,
            ask=lambda messages: grid.send_and_receive(messages, timeout=self._plan.timeout),
            record=record,
            silent=self._forget,
        )

    def evaluation(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The model as it is sent for training; none before there is one that members have made."""
        if self._last is None or not messages:
            return []
        base = self._base(only_arrays(messages[0].content, subject="Message"))  # one model for all nodes
        return [addressed(message, base, "evaluate") for message in messages]

    def goes_on(self, kept: NamedTensors) -> None:
        """Takes a sum for the last one; one after it shows that members have taken that."""
        total, before = sum_of(kept), self._last
        newer = total is not None and (before is None or total.call.round > before.call.round)
        self._proven |= self._listed if newer else set()
        names = {} if total is None else self._names.get(total.call.round, {})
        self._listed = {node for node, name in names.items() if total is not None and name in total.listed}
        self._last = total

    def finish(self, grid: Grid, arrays: ArrayRecord) -> bool:
        """Has every node write the model down; nothing before there is one."""
        if self._last is None:
            return True
        base = self._base(arrays)
        message = Message(RecordDict({"arrays": arrays}), dst_node_id=0, message_type="train")
        nodes = set(grid.get_node_ids())
        messages = [addressed(message, base, "deliver", node=node) for node in sorted(nodes)]
        replies = list(grid.send_and_receive(messages, timeout=self._plan.timeout))
        done = {reply.metadata.src_node_id for reply in replies if not reply.has_error()}
        _LOG.info("%d of %d nodes have written the trained model down.", len(done), len(nodes))
        for node in sorted(nodes - done):
            _LOG.warning("Node %d has not written the trained model down; its log may say why.", node)
        return len(done) >= sum(map(is_refusal, replies))

    def _base(self, arrays: ArrayRecord) -> Base:
        specs = specs_of(arrays)
        return Base(
            run=self._calls.run,
            specs=specs,
            metrics=self._options.metrics,
            rounds=self._calls.count,
            total=None if self._kept.server_model else self._last,
            booleans=model_records.booleans_of(arrays, specs),
        )

    def _forget(self, node: int) -> None:
        """A node was asked and sent nothing that can be used; it may come back as another member."""
        self._who.pop(node, None)

    def _asked(self, plan: ReplyPlan, grid: Grid) -> Asked | None:
        """Whom to ask: those who are of the cohort that most are of, or were of; None: too few say so.

        A node can claim any cohort, with any rules: what few claim neither ends a training nor changes it.
        """
        self._learn_who(plan, grid)
        known = {node: self._who[node] for node in plan.nodes if node in self._who}
        if not known:
            _LOG.warning("Round %d: no node has said who its member is; nothing changes.", plan.round)
            return None
        votes = Counter((who.roster, who.members, who.rules) for who in known.values())
        enough = [about for about, count in votes.most_common() if count >= about[2].minimum]
        usual = next((about for about in enough if about[0] == self._roster), (*enough, None)[0])
        if usual is None:
            _LOG.warning("Round %d: too few nodes are of one cohort; nothing changes.", plan.round)
            self._who.clear()
            return None
        names: dict[int, str] = {}
        usable = {node: who for node, who in known.items() if (who.roster, who.members, who.rules) == usual}
        seats = self._seats(usable, plan.round)
        for node, who in known.items():
            if node not in usable:
                problem = (
                    f"is of another cohort or epoch ({shown(who.cohort)}, {who.epoch}) than the training"
                )
            elif seats[who.member] != node:
                problem = f"says that it is {shown(who.member)}, as another does"
            else:
                names[node] = who.member
                continue
            _LOG.warning("Round %d: node %d %s; it is not asked.", plan.round, node, problem)
            self._who.pop(node)
        return Asked(who=next(who for node, who in known.items() if node in names), names=names)

    def _seats(self, who: Mapping[int, Who], round: int) -> dict[str, int]:
        """The node that is asked for each member: a node can say that it is any.

        One whose updates members have taken, if there is one; else those that say so take turns. A false one
        costs its rounds, as members refuse sums with what it sends.
        """
        claims: dict[str, list[int]] = {}
        for node in sorted(who):
            claims.setdefault(who[node].member, []).append(node)
        for name, nodes in claims.items():
            claims[name] = [node for node in nodes if node in self._proven] or nodes
        return {name: nodes[round % len(nodes)] for name, nodes in claims.items()}

    def _learn_who(self, plan: ReplyPlan, grid: Grid) -> None:
        messages = []
        for node in plan.nodes:
            if node not in self._who:
                content = RecordDict()
                mask_records.put_stage(content, "who")
                messages.append(Message(content, dst_node_id=node, message_type="train"))
        for reply in grid.send_and_receive(messages, timeout=self._plan.timeout) if messages else ():
            if reply.has_error():
                refused(plan.round, reply, "it does not say who its member is. Has its app a MaskMod?")
                continue
            try:
                self._who[reply.metadata.src_node_id] = mask_records.who_of(reply.content)
            except FedKLError as error:
                refused(plan.round, reply, str(error))

    def _adopt(self, rules: Rules) -> None:
        """Takes a cohort's rules over.

        Raises:
            ConfigError: Strategy or server cannot work with them.
        """
        if rules == self._rules:
            return
        strategies = [strategy for _, strategy in nested(self._plan.strategy)]
        for strategy in strategies:
            if isinstance(strategy, _OF_SINGLE_UPDATES):
                raise ConfigError(
                    f"Masked: {type(strategy).__name__} computes with each client's own update, which no "
                    "masks let the server read. Take FedAvg, or noise and clipping on the clients."
                )
        reads = rules.mode == "pairwise"
        if self._plan.evaluates and not reads:
            raise ConfigError(
                f"Masked: evaluate_fn: in mode {rules.mode} the server has no model to evaluate. Leave it "
                "out (clients evaluate), or found the cohort with --mode pairwise."
            )
        if not rules.server_model and not _averages(strategies[-1]):
            name = type(strategies[-1]).__name__
            remedy = "with --server-model" if reads else "with --mode pairwise --server-model"
            raise ConfigError(
                f"Masked: {name} makes a model of its own of the clients' mean, and this cohort's members "
                f"take nothing but the mean. Take FedAvg, or found the cohort {remedy}."
            )
        self._rules, self._kept = (
            rules,
            Kept(mode=rules.mode, server_model=rules.server_model, metrics=self._options.metrics),
        )
        _LOG.info("Masked sums, mode %s: the server learns %s.", rules.mode, self.server_learns)
        available = getattr(strategies[-1], "min_available_nodes", rules.minimum)
        if available < rules.minimum:
            _LOG.warning(
                "A sum needs %d members, but the strategy begins a round with %d nodes. Set its "
                "min_available_nodes to %d or more. Otherwise rounds are lost while nodes are away.",
                *(rules.minimum, available, rules.minimum),
            )


class _Nobody(ReplyRound):
    """A round that asks nobody."""

    def __init__(self, plan: ReplyPlan) -> None:
        super().__init__(plan, clients=[str(node) for node in plan.nodes])

    @property
    def update_bytes(self) -> int:
        """Nothing is sent."""
        return 0

    def requests(self, messages: Sequence[Message]) -> Sequence[Message]:
        """None."""
        return []

    def what_the_server_sees(self) -> tuple[Seen, ...]:
        """Nothing."""
        return ()

    def _take(self, client: str, update: Message) -> None:
        raise ConfigError("Masked: nobody was asked in this round.")

    def _result(self) -> list[Message]:
        return []


def _averages(strategy: Strategy) -> bool:
    """Whether what a strategy makes of one reply is that reply."""
    return getattr(type(strategy), "aggregate_train", None) is FedAvg.aggregate_train
