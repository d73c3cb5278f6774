"""The member of a node: its secret file, and what it does with the messages of masked sums."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from flwr.app import RecordDict

from fedkl.custody.member import admit, secret_file
from fedkl.custody.store import CLIENT, client_folder
from fedkl.dates import today
from fedkl.errors import ConfigError, MaskingError, UpdateError
from fedkl.files import PRIVATE_FILE
from fedkl.flower.mask_records import Who
from fedkl.flower.model_records import Base
from fedkl.flower.node import client_name, node_passphrase, store_folder
from fedkl.flower.records import tensors_of
from fedkl.masking import Call, Contribution, ListMessage, Member, MemberFile, Reveal, Upload
from fedkl.masking.contents import SUFFIX
from fedkl.masking.expiry import notices
from fedkl.masking.roster import Roster
from fedkl.modelfile import write_model
from fedkl.types import NamedTensors

MEMBER, COHORT = "fedkl-member", "fedkl-cohort"
"""Entries of a SuperNode's ``--node-config``."""

MEMBER_VARIABLE = "FEDKL_MEMBER"
_LOG = logging.getLogger("flwr.fedkl")  # among Flower's own lines, in its format
_TOLD: set[tuple[bytes, date]] = set()  # rosters, and the days on which this process has told of them


class NodeMember:
    """A member whose secret file is open.

    Args:
        file: The file.
        cohort: The cohort that this node trains in; None: the only one.

    Raises:
        MaskingError: The member has not joined it, or has joined several and none is named.
    """

    def __init__(self, file: MemberFile, cohort: str | None) -> None:
        self._file = file
        self._membership = file.membership(cohort)
        self._cohort = self._membership.roster.name

    @classmethod
    @contextmanager
    def of_node(cls, node_config: Mapping[str, object]) -> Iterator[NodeMember]:
        """The member that a node's own configuration names; nothing of it comes from the server.

        Its secret file is ``fedkl-member`` of the node's configuration, or `FEDKL_MEMBER`. Where that is a
        folder, it is the client's file in it, ``NAME.secret``. Where neither is given, it is the only one in
        the client's folder of the node's store. The passphrase is found as that of a store.

        Raises:
            ConfigError: No file is found, or several, or another process has it open.
            KeyFileError: It does not open.
            MaskingError: See `NodeMember` and `fedkl.custody.member.admit`.
        """
        home = _home(node_config)
        path = _secret_file(node_config, home)
        cohort = node_config.get(COHORT)
        with MemberFile.open(path, passphrase=node_passphrase(node_config)) as file:
            if home is not None and path.parent.resolve() == home.resolve():
                admit(home, file)
            node = cls(file, None if cohort is None else str(cohort))
            _tell_expiry(node._membership.roster, day=today())
            yield node

    @property
    def who(self) -> Who:
        """What the server has to know of it."""
        roster = self._membership.roster
        roster.check_date(today())
        return Who(
            member=self._membership.name,
            cohort=roster.name,
            epoch=roster.epoch,
            roster=roster.digest,
            members=roster.members,
            rules=roster.rules,
        )

    def receive(self, base: Base, content: RecordDict) -> tuple[Member, NamedTensors]:
        """Takes the model of a message: the last sum, opened and checked, or one in the clear.

        Returns:
            The member, for an update of this model, and the model.

        Raises:
            MaskingError: It is refused.
        """
        if base.total is not None:
            if base.total.call.run != base.run:
                raise MaskingError("Refused: the sum is of another run than the message.")
            member = self._member(base, base.booleans)
            mean = member.open(base.total)
            if mean.metrics:  # in blind modes nobody else reads them
                metrics = ", ".join(f"{name} {value:.4g}" for name, value in mean.metrics.items())
                _LOG.info("%s, means of the last sum: %s", self._cohort, metrics)
            return member, mean.tensors
        record = content.array_records.get(base.record)
        if record is None:
            raise MaskingError("Refused: the message has neither a sum nor a model.")
        try:
            model = tensors_of(record, subject="Model", names=base.specs)
        except UpdateError as error:
            raise MaskingError(str(error)) from error
        layout = base.layout(self._membership.roster.words)
        model = {name: model[name] for name in base.specs}  # an app may go by the order, so that is bound too
        member = self._member(base, {name: model[name] for name in layout.booleans})
        member.accept_model(base.run, model)
        return member, model

    def receive_mean(self, base: Base, content: RecordDict) -> tuple[Member, NamedTensors]:
        """Takes the model of a message as `receive` does, if members have made it.

        What an evaluation of models of the server's choice says of the data has no bound.

        Raises:
            MaskingError: It is refused.
        """
        if base.total is None and not self._membership.roster.rules.server_model:
            raise MaskingError("Refused: expected the trained model as a sum, got one of the server's.")
        return self.receive(base, content)

    def upload(self, member: Member, call: Call, contribution: Contribution) -> Upload:
        """Masks an update; with pair masks it is kept until the round is over."""
        update = self._file.update_file(self._cohort)
        if self._membership.roster.rules.mode != "blind" and call.attempt == 0:
            update.write(call, contribution)
        return member.upload(call, contribution)

    def again(self, base: Base, call: Call) -> Upload:
        """Masks the last update anew, for a further attempt of its round.

        Raises:
            MaskingError: There is none, or the attempt is refused.
        """
        member, contribution = self._kept(base, call)
        return member.upload(call, contribution)

    def reveal(self, base: Base, message: ListMessage) -> Reveal:
        """What opens the masks of a sum.

        Raises:
            MaskingError: It is refused.
        """
        member, _ = self._kept(base, message.call)
        return member.reveal(message)

    def deliver(self, base: Base, content: RecordDict) -> Path:
        """Writes the trained model down for use, in the clear: it is the cohort's.

        Returns:
            Where it is.

        Raises:
            MaskingError: It is refused.
            ConfigError: It cannot be written.
        """
        _, model = self.receive_mean(base, content)
        path = self._file.beside(self._cohort, "safetensors")
        write_model(path, model, rounds=base.rounds, replace=True, mode=PRIVATE_FILE)
        self._file.update_file(self._cohort).remove()
        return path

    def _kept(self, base: Base, call: Call) -> tuple[Member, Contribution]:
        """The member as it was when it uploaded, with its update."""
        contribution = self._file.update_file(self._cohort).read(call)
        tensors = contribution.tensors
        return self._member(base, {n: t for n, t in tensors.items() if t.dtype is torch.bool}), contribution

    def _member(self, base: Base, booleans: NamedTensors) -> Member:
        return Member(
            self._membership,
            layout=base.layout(self._membership.roster.words),
            memory=self._file.memory(self._cohort),
            booleans=booleans,
            today=today,
        )


def _tell_expiry(roster: Roster, *, day: date) -> None:
    """Says once a day what expires soon: a node that nobody looks at would end a training by it."""
    if (roster.digest, day) not in _TOLD:
        _TOLD.add((roster.digest, day))
        for notice in notices(roster, today=day):
            _LOG.warning("%s", notice)


def _home(node_config: Mapping[str, object]) -> Path | None:
    """The client's folder in the node's store; None: it names no store or no client, as masks alone need."""
    store = store_folder(node_config)
    named = CLIENT in node_config or "partition-id" in node_config
    return client_folder(store, client_name(node_config)) if store is not None and named else None


def _secret_file(node_config: Mapping[str, object], home: Path | None) -> Path:
    named = node_config.get(MEMBER) or os.environ.get(MEMBER_VARIABLE)
    if named:
        path = Path(str(named)).expanduser()
        return path / f"{client_name(node_config)}{SUFFIX}" if path.is_dir() else path
    found = None if home is None else secret_file(home)
    if found is None:
        place = "" if home is None else f", and none is in {home}"
        raise ConfigError(
            "This node has no member's secret file, as `fedkl member new` makes it. Start it with "
            f"--node-config '{MEMBER}=\"/a/folder/NAME.secret\" …', or set {MEMBER_VARIABLE}{place}."
        )
    return found
