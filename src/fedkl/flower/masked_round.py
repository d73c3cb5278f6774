"""One round of masked sums on Flower, the server's side."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedkl.aggregation import Seen, SeenUpload
from fedkl.errors import ConfigError, FedKLError, MaskingError, RoundLostError, UpdateError
from fedkl.flower import mask_records, model_records
from fedkl.flower.aggregation import ReplyPlan, ReplyRound, SeenReply
from fedkl.flower.kept_sums import Kept
from fedkl.flower.mask_records import Stage, Who
from fedkl.flower.model_records import Base
from fedkl.flower.records import arrays_of, only_arrays
from fedkl.flower.replies import ReplyRules, refused
from fedkl.masking import Call, MaskedSum, SealedSum, opened_mean
from fedkl.masking.attempts import RevealSets, further_attempt
from fedkl.masking.sums import sum_tensors

_LOG = logging.getLogger("flwr.fedkl")

Ask = Callable[[Sequence[Message]], Iterable[Message]]
"""Sends messages to nodes and waits for their replies, some of which may never come."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Whom a round asks.

    Attributes:
        who: What all of them say of their cohort.
        names: Their members by node.
    """

    who: Who = field(repr=False)
    names: Mapping[int, str]

    @property
    def cohort(self) -> tuple[str, ...]:
        """Names that the masks are made for: all members, or those that are asked, where the rules say so."""
        return tuple(sorted(self.names.values())) if self.who.rules.sampled else self.who.members


def addressed(message: Message, base: Base, stage: Stage, *, node: int | None = None) -> Message:
    """A message as a node gets it: with what it is asked for, and the model as a sum where there is one.

    Args:
        message: The strategy's own, not changed; one content may be in the messages to all nodes.
        base: The model.
        stage: What is asked for.
        node: Whom it is for; None: as the message says.
    """
    name = model_record(message.content)
    content = RecordDict(
        {key: record for key, record in message.content.items() if base.total is None or key != name}
    )
    mask_records.put_stage(content, stage)
    model_records.put_base(content, replace(base, record=name))
    if node is not None:
        return Message(content, dst_node_id=node, message_type=message.metadata.message_type)
    own = copy.copy(message)
    own.content = content
    return own


def is_refusal(reply: Message) -> bool:
    """Whether a member has refused, or failed; not: a node that cannot be reached."""
    return reply.has_error() and reply.error.reason == mask_records.MASKS_REFUSED


def model_record(content: RecordDict) -> str:
    """Name of the record that holds the model.

    Raises:
        UpdateError: There is none, or there are several.
    """
    record = only_arrays(content, subject="Message to a node")
    return next(name for name, each in content.array_records.items() if each is record)


class MaskedReplies(ReplyRound):
    """Uploads are added up; then the masks of the sum are opened, as far as they are to be.

    Args:
        plan: What is known.
        asked: Whom it asks.
        call: The first attempt.
        base: The model.
        sets: For which names members were asked to reveal before.
        ask: Reaches the nodes.
        record: Whether every upload is kept for `what_the_server_sees`.
        silent: Is told of nodes that were asked and sent nothing usable.
    """

    def __init__(
        self,
        plan: ReplyPlan,
        *,
        asked: Asked,
        call: Call,
        base: Base,
        sets: RevealSets,
        ask: Ask,
        record: bool,
        silent: Callable[[int], None],
    ) -> None:
        super().__init__(plan, clients=[str(node) for node in plan.nodes])
        self._asked, self._base, self._ask, self._silent = asked, base, ask, silent
        self._sets = sets
        self._nodes = {name: node for node, name in asked.names.items()}
        self._rules = asked.who.rules
        self._attempt = self._attempted(call)
        self._weight, self._record = "num-examples", "arrays"
        self._total: SealedSum | None = None
        self._seen: list[Seen] | None = [] if record else None
        self._refusing: set[int] = set()  # nodes

    def _attempted(self, call: Call) -> MaskedSum:
        layout = self._base.layout(self._asked.who.words)
        return MaskedSum(call, layout=layout, mode=self._rules.mode, minimum=self._rules.minimum)

    @property
    def needed(self) -> int:
        """Uploads without which no sum is opened, in this attempt or by a cohort of those who sent them."""
        return self._rules.minimum

    @property
    def enough(self) -> bool:
        """Whether a sum of what was offered would be opened."""
        return len(self._attempt.offered) >= self.needed

    @property
    def rejected(self) -> bool:
        """Whether there is no sum because most refuse: one before it with a tag that fits nothing, say.

        Where the server may change the model, members check no sum: they refuse for other reasons.
        """
        most = 2 * len(self._refusing) > len(self._asked.names)
        return not self._rules.server_model and not self.enough and most

    def told(self, errors: Sequence[Message]) -> None:
        """Counts the members that refuse; a node that cannot be reached says nothing of the model."""
        refusing = {each.metadata.src_node_id for each in errors if is_refusal(each)}
        self._refusing = refusing & set(self._asked.names)

    @property
    def passes_on(self) -> bool:
        """Whether the server can read the sum, and the strategy gets it."""
        return self._rules.mode == "pairwise"

    @property
    def update_bytes(self) -> int:
        """Size of one upload: words, nonce and shares."""
        return self._attempt.upload_bytes

    @property
    def kept(self) -> dict[str, Tensor]:
        """The sum, with what it takes to read it."""
        rules = self._rules
        about = Kept(mode=rules.mode, server_model=rules.server_model, metrics=self._base.metrics)
        return sum_tensors(self._total) | about.tensors

    def what_the_server_sees(self) -> tuple[Seen, ...]:
        """Each upload as it came, and in pairwise mode the mean.

        Raises:
            ConfigError: The round was begun without `record`.
        """
        if self._seen is None:
            raise ConfigError("Masked: this round is not recorded. Begin it with record=True.")
        return tuple(self._seen)

    def requests(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The strategy's messages to nodes whose members are known, with the call.

        Raises:
            ConfigError: They ask different nodes for different things.
        """
        chosen = [message for message in messages if message.metadata.dst_node_id in self._asked.names]
        made = []
        for message in chosen:
            self._record = model_record(message.content)
            made.append(addressed(message, self._base, "train"))
        asked = {mask_records.settings_of(message, model=self._record) for message in made}
        if len(asked) > 1:
            raise ConfigError(
                "Masked: the strategy asks different nodes for different things. Members take part in one "
                "sum only if all are asked the same. Send the same records to all, beside the model."
            )
        if asked:
            self._attempt = self._attempted(replace(self._attempt.call, settings=asked.pop()))
        for own in made:
            mask_records.put_call(own.content, self._attempt.call)
        return made

    def checked(self, reply: Message, *, rules: ReplyRules) -> Message:
        """A reply, of which nothing can be read yet: `offer` looks at its form."""
        self._weight = rules.weight
        return reply

    def _take(self, client: str, update: Message) -> None:
        self._offer(self._attempt, int(client), update)

    def _offer(self, attempt: MaskedSum, node: int, reply: Message) -> None:
        try:
            upload = mask_records.upload_of(reply.content)
            if upload.member != self._asked.names[node]:
                raise MaskingError("Upload refused: it is of another member than this node's.")
            attempt.offer(upload)
        except MaskingError as error:
            raise UpdateError(str(error)) from error
        if self._seen is not None:
            self._seen.append(SeenUpload(clients=(upload.member,), upload=upload, layout=attempt.layout))

    def _leave(self, client: str) -> None:
        if client not in self.offered:
            self._silent(int(client))

    def _result(self) -> list[Message]:
        try:
            self._total = self._opened()
            return [self._mean(self._total)] if self.passes_on else []
        except MaskingError as error:
            raise RoundLostError(str(error)) from error

    def _opened(self) -> SealedSum:
        """The sum of the first attempt that can be opened."""
        while self._rules.mode != "blind":
            attempt = self._attempt
            listed = list(attempt.offered)
            everybody = len(listed) == len(attempt.call.cohort)
            here = listed if everybody else list(self._replies("here", listed))
            left = further_attempt(attempt, here=here, sets=self._sets)
            if left is None:
                self._sets.add(attempt.model, listed)
                self._reveal(attempt)
                break
            self._again(attempt.call, left)
        try:
            return self._attempt.sealed()
        finally:
            for holder, names in self._attempt.false_shares.items():
                _LOG.warning(
                    "Round %d: shares from %s are false, or were when %s sent them to it. They are left out.",
                    *(self.plan.round, holder, ", ".join(names)),
                )

    def _again(self, before: Call, left: tuple[str, ...]) -> None:
        """A further attempt, by those who are left, or by those for whom members were asked to reveal."""
        _LOG.warning("Round %d: it is tried again with %d of the members.", self.plan.round, len(left))
        call = replace(before, attempt=before.attempt + 1, cohort=left)
        self._attempt = self._attempted(call)
        for name, reply in self._replies("again", left, call=call).items():
            try:
                self._offer(self._attempt, self._nodes[name], reply)
            except FedKLError as error:
                refused(self.plan.round, reply, str(error))

    def _reveal(self, attempt: MaskedSum) -> None:
        for name, reply in self._replies("reveal", attempt.listed).items():
            try:
                reveal = mask_records.reveal_of(reply.content)
                if reveal.member != name:
                    raise MaskingError("Reveal refused: it is of another member than this node's.")
                attempt.offer_reveal(reveal)
            except FedKLError as error:
                refused(self.plan.round, reply, str(error))

    def _replies(self, stage: Stage, names: Iterable[str], *, call: Call | None = None) -> dict[str, Message]:
        """What members answer, by name; who fails or is silent is left out."""
        replies: dict[str, Message] = {}
        for reply in self._ask(list(self._messages(stage, names, call))):
            name = self._asked.names.get(reply.metadata.src_node_id)
            if reply.has_error():
                refused(self.plan.round, reply, f"no answer to '{stage}'; its node's log may say why.")
            elif name is not None and name not in replies:
                replies[name] = reply
        return replies

    def _messages(self, stage: Stage, names: Iterable[str], call: Call | None) -> Iterator[Message]:
        round = str(self.plan.round)
        # What a member has uploaded it still has; of the model only the layout is needed.
        layout = replace(self._base, total=None)
        for name in names:
            content = RecordDict()
            mask_records.put_stage(content, stage)
            if stage == "reveal":
                mask_records.put_list(content, self._attempt.list_for(name))
            if call is not None:
                mask_records.put_call(content, call)
            if stage != "here":
                model_records.put_base(content, layout)
            yield Message(content, dst_node_id=self._nodes[name], message_type="train", group_id=round)

    def _mean(self, total: SealedSum) -> Message:
        """The one reply that the strategy gets."""
        layout = self._attempt.layout
        booleans = model_records.booleans_of(self.plan.arrays, layout.specs)
        mean = opened_mean(total, layout=layout, booleans=booleans)
        metrics = MetricRecord({**mean.metrics, self._weight: mean.samples})
        first = Message(RecordDict(), dst_node_id=next(iter(self._asked.names)), message_type="train")
        reply = Message(
            RecordDict({self._record: arrays_of(mean.tensors), "metrics": metrics}), reply_to=first
        )
        if self._seen is not None:
            self._seen.append(SeenReply(clients=tuple(total.listed), reply=reply))
        return reply
