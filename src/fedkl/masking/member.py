"""A member's side of a round: upload, reveal, open. It refuses whatever the protocol does not allow."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any, NoReturn

import torch

from fedkl.errors import MaskingError, SecretError
from fedkl.masking.canonical import canonical, digest
from fedkl.masking.encoding import Contribution, Masks, Mean, Opening, decoded, encoded, unmasked
from fedkl.masking.keyring import Keyring, self_commitment
from fedkl.masking.layout import Layout
from fedkl.masking.memory import Memory, RunMemory
from fedkl.masking.messages import NONCE, ListMessage, Reveal, SealedSum, Upload, list_digest
from fedkl.masking.quorum import least_listed
from fedkl.masking.refusals import (
    check_call,
    check_listed,
    check_new,
    check_own_entry,
    check_run,
    check_same_start,
    check_sequence,
    names_digest,
)
from fedkl.masking.roster import Membership
from fedkl.masking.schedule import Call, Context
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec, check_tensors


class Member:
    """What a member does in rounds of one layout.

    Args:
        membership: Who it is, and its secrets.
        layout: Of the update; its words are those of the roster.
        memory: What it remembers.
        booleans: Boolean tensors of its model, which are not sent.
        model: What a model consists of; None: of what an update does.
        today: The date; one that is asked for anew at every upload and reveal, or one that stays.

    Raises:
        MaskingError: Roster or a card has expired, booleans are missing, or the layout's words are not those
            of the roster.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        layout: Layout,
        memory: Memory,
        booleans: NamedTensors | None = None,
        model: Mapping[str, TensorSpec] | None = None,
        today: date | Callable[[], date],
    ) -> None:
        self._today = today
        membership.roster.check_date(self._date)
        if layout.words != membership.roster.words:
            raise MaskingError("Member: expected a layout with the roster's words. Use roster.words.")
        self.roster = membership.roster
        self.name = membership.name
        self.layout = layout
        self.memory = memory
        self._model = layout.specs if model is None else model
        self._keyring = Keyring(membership)
        self._booleans = dict(booleans or {})
        check_tensors(
            self._booleans,
            layout.booleans,
            subject="Member: boolean tensors.",
            remedy="Give those of the model.",
            error=MaskingError,
        )

    def __repr__(self) -> str:
        return f"Member({self.name!r}, cohort={self.roster.name!r}, epoch={self.roster.epoch})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A Member holds secrets and cannot be pickled.")

    @property
    def _layout_digest(self) -> bytes:
        """Booleans are in no sum, and no tag holds them: they are part of what members agree on."""
        if not self._booleans:
            return self.layout.digest
        values = [self._booleans[name].cpu().contiguous().numpy().tobytes() for name in self.layout.booleans]
        return digest("layout.booleans", self.layout.digest, values)

    @property
    def _date(self) -> date:
        return self._today() if callable(self._today) else self._today

    def accept_model(self, run: bytes, model: NamedTensors) -> None:
        """Takes a model that the server sent in the clear: the first one, or any, where the rules allow it.

        Args:
            run: The run's name, 16 bytes.
            model: Named tensors.

        Raises:
            MaskingError: The run's name or the tensors do not fit, their booleans differ from the member's,
                or the run has a sum or an upload on another model already, and the rules want sums.
        """
        check_run(run)
        remembered = self._remembered(run)
        if remembered.opened >= 0 and not self.roster.rules.server_model:
            raise MaskingError(
                "Refused: the server sent a model of its own, but this run has a sum already, and the rules "
                "of the roster want the sum."
            )
        found = model_digest(self._model, model)
        self._check_booleans(model)
        check_same_start(found, remembered, self.roster)
        remembered.model = found.hex()
        remembered.transcript = remembered.transcript or digest("transcript", run).hex()
        self.memory.forget_unused()  # a server can begin any number of runs
        self._keep(run, remembered)

    def check(self, call: Call) -> None:
        """Checks that an upload would be made for a call, before anything is trained or kept for it.

        Raises:
            MaskingError: Roster or a card has expired, no model was accepted, or the call is refused.
        """
        self._new(call)

    def upload(self, call: Call, contribution: Contribution) -> Upload:
        """Masks an update for an attempt of a round; what must not be forgotten is written down before.

        Args:
            call: What the server asks for.
            contribution: Tensors after training, samples, metrics. For a further attempt of a round: those of
                the attempt before.

        Raises:
            MaskingError: Roster or a card has expired, the call is refused, no model was accepted, or the
                update does not fit into words.
        """
        context, remembered = self._new(call)
        self._check_booleans(contribution.tensors)
        nonce = secrets.token_bytes(NONCE)
        pairs = context.mode != "blind"
        words = encoded(
            self.layout,
            contribution,
            masks=self._keyring.masks(context, nonce),
            tag_key=self._keyring.tag_key(context, self.name, nonce),
        )
        upload = Upload(
            member=self.name,
            context=context.digest,
            model=context.model,
            transcript=context.transcript,
            nonce=nonce,
            words=words,
            shares=self._keyring.shares(context, nonce) if pairs else {},
            commitment=self_commitment(self._keyring.self_seed(context, nonce)) if pairs else b"",
        )
        if call.round > remembered.round:
            remembered.uploads, remembered.revealed, remembered.names = {}, {}, ""
        remembered.round, remembered.attempt = call.round, call.attempt
        sent = remembered.uploads.get(context.digest.hex(), "")  # with blind masks it may be asked again
        remembered.uploads[context.digest.hex()] = f"{sent} {nonce.hex()}".lstrip()
        self._keep(call.run, remembered)
        return upload

    def reveal(self, message: ListMessage) -> Reveal:
        """What opens the listed members' masks: for each other member its share, or its pair seed.

        Args:
            message: The list and this member's shares.

        Raises:
            MaskingError: It is refused: roster or a card has expired, there is nothing to reveal in this
                mode, the list is not in order or not the first one, or a share was altered. Nothing is then
                revealed.
        """
        self.roster.check_date(self._date)
        call, remembered = message.call, self._remembered(message.call.run)
        check_call(call, self.roster)
        least = least_listed(call.cohort, minimum=self.roster.rules.minimum)
        check_listed(message.listed, call, least=least)
        context = self._current(call, remembered)
        self._check_may_open(message, context, remembered)
        around = self._keyring.around(context)
        listed = [name for name in (*around, self.name) if name in message.listed]
        if set(message.shares) != set(listed):
            raise MaskingError("Refused: expected one share of each listed member, and no other.")
        shares = {
            name: self._keyring.opened_share(context, name, message.listed[name], message.shares[name])
            for name in listed
        }
        pairs = {
            name: self._keyring.pair_seed(context, name) for name in around if name not in message.listed
        }
        remembered.revealed[context.digest.hex()] = list_digest(message.listed).hex()
        remembered.names = self.memory.sets[remembered.model] = names_digest(message.listed)
        self._keep(call.run, remembered)
        return Reveal(member=self.name, shares=shares, pairs=pairs)

    def open(self, total: SealedSum) -> Mean:
        """Takes a sum for the new model, if it is that of the listed members' uploads.

        Args:
            total: The sum; not changed.

        Returns:
            The weighted means.

        Raises:
            MaskingError: Anything about it is not right; nothing of it is then returned.
        """
        context = self._context_of(total)
        remembered = self._remembered(total.call.run)
        check_own_entry(total, context, remembered, name=self.name)
        following = digest("transcript", total.transcript, context.digest, list_digest(total.listed))
        check_sequence(total, remembered, following)
        mean = self._opened(total, context)
        remembered.model = model_digest(self.layout.specs, mean.tensors).hex()
        remembered.opened, remembered.transcript = total.call.round, following.hex()
        self._keep(total.call.run, remembered)
        return mean

    def read(self, total: SealedSum) -> Mean:
        """What a sum says, e.g. the last one of a training. It is not taken for the new model.

        Args:
            total: The sum; not changed.

        Raises:
            MaskingError: It is not that of the listed members' uploads.
        """
        return self._opened(total, self._context_of(total))

    def _context_of(self, total: SealedSum) -> Context:
        check_call(total.call, self.roster)
        check_listed(total.listed, total.call, least=self.roster.rules.minimum)
        return self._context(total.call, model=total.model, transcript=total.transcript)

    def _opened(self, total: SealedSum, context: Context) -> Mean:
        if not self.layout.fits(total.words):
            raise MaskingError(f"Refused: expected a sum of {self.layout.size} bytes (this layout).")
        words, keyring = total.words.copy(), self._keyring
        entries = list(total.listed.items())
        blind = (
            [] if context.mode == "pairwise" else [keyring.blind_mask(context, *entry) for entry in entries]
        )
        opening = Opening(self.layout, r=keyring.tag_r(context))
        unmasked(self.layout, words, masks=Masks(minus=blind), on_chunk=opening.chunk)
        if not opening.holds([keyring.tag_s(context, *entry) for entry in entries]):
            raise MaskingError(
                "Refused: the sum is not that of the listed members' uploads: its tag does not fit."
            )
        return decoded(self.layout, words, members=len(entries), booleans=self._booleans)

    def _check_may_open(self, message: ListMessage, context: Context, remembered: RunMemory) -> None:
        """One list an attempt, one set of names a round and a model: two sums differ by somebody's update."""
        if context.mode == "blind":
            raise MaskingError("Refused: with blind masks alone nothing is ever revealed.")
        nonce = remembered.uploads.get(context.digest.hex())
        if nonce is None or message.call.round != remembered.round:
            raise MaskingError("Refused: this member has no upload in this attempt on its present model.")
        if message.listed.get(self.name) != bytes.fromhex(nonce):
            raise MaskingError("Refused: the list has not this member's own upload.")
        names = names_digest(message.listed)
        found = list_digest(message.listed).hex()
        if remembered.revealed.get(context.digest.hex(), found) != found:
            raise MaskingError("Refused: a second list for an attempt that was revealed for already.")
        if (remembered.names or names) != names:
            raise MaskingError(
                "Refused: in this round this member has revealed for other members, on another model. "
                "The difference of the two sums would give an update away."
            )
        if self.memory.sets.get(remembered.model, names) != names:
            raise MaskingError(
                "Refused: on this model this member has revealed for other members already. The difference "
                "of the two sums would give an update away. It goes on once the same members are listed. A "
                "training without one of them needs a new run with other initial weights."
            )

    def _new(self, call: Call) -> tuple[Context, RunMemory]:
        self.roster.check_date(self._date)
        check_call(call, self.roster)
        remembered = self._remembered(call.run)
        context = self._current(call, remembered)
        check_new(context, remembered, name=self.name)
        return context, remembered

    def _context(self, call: Call, *, model: bytes, transcript: bytes) -> Context:
        return Context(
            roster=self.roster.digest,
            layout=self._layout_digest,
            suite=self.roster.suite,
            mode=self.roster.rules.mode,
            call=call,
            model=model,
            transcript=transcript,
        )

    def _current(self, call: Call, remembered: RunMemory) -> Context:
        """The context of a call on the model that this member has now."""
        if not remembered.model:
            raise MaskingError("Refused: this member has accepted no model of this run yet.")
        model, transcript = bytes.fromhex(remembered.model), bytes.fromhex(remembered.transcript)
        return self._context(call, model=model, transcript=transcript)

    def _remembered(self, run: bytes) -> RunMemory:
        return self.memory.runs.get(run.hex()) or RunMemory()

    def _keep(self, run: bytes, remembered: RunMemory) -> None:
        self.memory.runs[run.hex()] = remembered
        self.memory.keep(self.memory)

    def _check_booleans(self, tensors: NamedTensors) -> None:
        for name, own in self._booleans.items():
            if name not in tensors or not torch.equal(tensors[name].cpu(), own.cpu()):
                raise MaskingError(f"Refused: '{name}' (bool) differs from this member's own model.")


def model_digest(specs: Mapping[str, TensorSpec], tensors: NamedTensors) -> bytes:
    """SHA-256 of a model's names, shapes, dtypes and numbers, 32 bytes.

    Args:
        specs: What it consists of, in this order.
        tensors: The model.

    Raises:
        MaskingError: They do not fit.
    """
    check_tensors(
        tensors,
        specs,
        subject="Model refused.",
        remedy="Send exactly the public tensors, finite.",
        error=MaskingError,
    )
    about = [(name, spec.shape, str(spec.dtype)) for name, spec in specs.items()]
    state = hashlib.sha256(canonical("model", about))
    for name in specs:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.digest()
