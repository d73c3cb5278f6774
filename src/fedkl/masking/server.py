"""The server's side of a round: it adds uploads up, and asks for what opens their sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import combinations
from math import comb

from fedkl.errors import MaskingError, gathered
from fedkl.masking import seal, sharing
from fedkl.masking.encoding import LONG, Bytes, Masks, Mean, add_to_tag, decoded, unmasked
from fedkl.masking.keyring import self_commitment, self_mask
from fedkl.masking.layout import Layout
from fedkl.masking.messages import NONCE, ListMessage, Reveal, SealedSum, Upload
from fedkl.masking.quorum import least_listed
from fedkl.masking.schedule import Call, Mode
from fedkl.masking.stream import MaskStream
from fedkl.types import NamedTensors

_DIGEST, _SHARE = 32, sharing.SIZE + 16  # bytes; a share with the tag of its encryption
_LIMIT = 20_000_000  # products that it takes at most to find false shares of one seed: some ten seconds


class MaskedSum:
    """One attempt of a round.

    Args:
        call: What was asked for.
        layout: Of the updates.
        mode: Which masks the members use.
        minimum: Uploads that a sum needs; members refuse one of fewer than their roster says.
    """

    def __init__(self, call: Call, *, layout: Layout, mode: Mode, minimum: int) -> None:
        self.call = call
        self.layout = layout
        self.mode: Mode = mode
        self._minimum = minimum
        self._words: Bytes | None = None
        self._uploads: dict[str, Upload] = {}  # without their words
        self._reveals: dict[str, Reveal] = {}
        self._false: dict[str, set[str]] = {}
        self._closed = False

    @property
    def offered(self) -> tuple[str, ...]:
        """Whose uploads are in, sorted."""
        return tuple(sorted(self._uploads))

    @property
    def upload_bytes(self) -> int:
        """Size of what one member sends; 0 if none has."""
        first = next(iter(self._uploads.values()), None)
        if first is None:
            return 0
        beside = len(first.nonce) + len(first.commitment) + sum(map(len, first.shares.values()))
        return self.layout.size + beside

    @property
    def minimum(self) -> int:
        """Members that a cohort needs."""
        return self._minimum

    @property
    def model(self) -> bytes:
        """Digest of the model that the uploads were trained on; empty: there is none yet."""
        first = next(iter(self._uploads.values()), None)
        return b"" if first is None else first.model

    @property
    def needed(self) -> int:
        """Uploads that a sum needs."""
        if self.mode == "blind":
            return self._minimum
        return least_listed(self.call.cohort, minimum=self._minimum)

    @cached_property
    def listed(self) -> dict[str, bytes]:
        """Nonces of the uploads that are in the sum, by member, sorted; later uploads stay out of it.

        Raises:
            MaskingError: There are too few.
        """
        if len(self._uploads) < self.needed:
            raise MaskingError(
                f"Round {self.call.round}: expected {self.needed} uploads or more, got {len(self._uploads)}."
            )
        self._closed = True
        return {name: self._uploads[name].nonce for name in self.offered}

    def offer(self, upload: Upload) -> None:
        """Adds an upload to the sum.

        Raises:
            MaskingError: It is refused, and the sum is as it was.
        """
        self._check(upload)
        words = upload.words
        if self._words is None:
            self._words = words.copy()
        else:
            add_to_tag(self._words, seal.number(words[: seal.SIZE].tobytes()))
            for part, kind in self._parts():
                into = self._words[part].view(kind)
                into += words[part].view(kind)
        self._uploads[upload.member] = Upload(**{**vars(upload), "words": words[:0]})

    def _check(self, upload: Upload) -> None:
        name = upload.member
        first = next(iter(self._uploads.values()), upload)
        pairs = self.mode != "blind"
        same = (first.context, first.model, first.transcript)
        problems = {
            "comes too late": self._closed,
            "was not asked": name not in self.call.cohort,
            "has uploaded already": name in self._uploads,
            f"sent other words than {self.layout.size} bytes": not self.layout.fits(upload.words),
            "sent a nonce of a wrong size": len(upload.nonce) != NONCE,
            "works with another roster, model or history than the first": (
                (upload.context, upload.model, upload.transcript) != same
            ),
            "sent shares for others than the cohort": (
                set(upload.shares) != (set(self.call.cohort) if pairs else set())
            ),
            "sent parts of a wrong size": (
                {*map(len, same)} != {_DIGEST}
                or len(upload.commitment) not in (0, _DIGEST)
                or not {*map(len, upload.shares.values())} <= {_SHARE}
            ),
            "sent no commitment": pairs != bool(upload.commitment),
        }
        for problem, holds in problems.items():
            if holds:
                raise MaskingError(f"Round {self.call.round}: {name} {problem}.")

    def list_for(self, member: str) -> ListMessage:
        """What a member needs in order to reveal.

        Raises:
            MaskingError: There are too few uploads.
        """
        listed = self.listed
        shares = {
            owner: upload.shares[member]
            for owner, upload in self._uploads.items()
            if owner in listed and member in upload.shares
        }
        return ListMessage(call=self.call, listed=listed, shares=shares)

    def offer_reveal(self, reveal: Reveal) -> None:
        """Takes what a member reveals.

        Raises:
            MaskingError: It reveals anything but what it was asked for, or is not listed.
        """
        name = reveal.member
        own = self._uploads.get(name)
        if own is None or name not in self.listed:
            raise MaskingError(f"Round {self.call.round}: {name} reveals, but is not listed.")
        around = set(own.shares)
        expected = around & set(self.listed), around - set(self.listed)
        if (set(reveal.shares), set(reveal.pairs)) != expected:
            raise MaskingError(f"Round {self.call.round}: {name} reveals other things than it was asked for.")
        sizes = {len(part) for part in (*reveal.shares.values(), *reveal.pairs.values())}
        if not sizes <= {sharing.SIZE}:
            raise MaskingError(f"Round {self.call.round}: {name} reveals parts of a wrong size.")
        self._reveals[name] = reveal

    @property
    def missing(self) -> list[str]:
        """What is still missing before the masks of the sum can be opened; empty: nothing."""
        return self.missing_if(self._reveals)

    def missing_if(self, revealing: Collection[str]) -> list[str]:
        """What would be missing if these members revealed, and no others; empty: nothing.

        Args:
            revealing: Names; of those who are not listed nothing is expected.
        """
        if self.mode == "blind":
            return []
        problems = []
        for name in self.listed:
            upload = self._uploads[name]
            held = sum(name in self._uploads[other].shares for other in self.listed if other in revealing)
            if held < self.needed:
                problems.append(f"{name}: {held} shares of {self.needed}")
            gone = [other for other in upload.shares if other not in self.listed]
            if gone and name not in revealing:
                problems.append(f"{name}: its pair seeds with {', '.join(gone)}")
        return problems

    @property
    def false_shares(self) -> dict[str, list[str]]:
        """Members whose shares were false, and of whose seeds: either of the two may have made them so."""
        return {holder: sorted(names) for holder, names in sorted(self._false.items())}

    def sealed(self) -> SealedSum:
        """The sum, its own and pair masks taken away. Once.

        Raises:
            MaskingError: Too few uploads, reveals are missing, or more revealed shares are false than can be
                left out.
        """
        listed = self.listed
        problems = self.missing
        if problems:
            remedy = "Whoever has revealed does so again, on this model, only for the same members."
            raise MaskingError(gathered(f"Round {self.call.round}: cannot be opened.", problems, remedy))
        if self._words is None:
            raise MaskingError(f"Round {self.call.round}: its sum is given once.")
        masks = Masks() if self.mode == "blind" else self._opened_masks()
        words, self._words = self._words, None
        unmasked(self.layout, words, masks=masks)
        first = next(iter(self._uploads.values()))
        return SealedSum(
            call=self.call, model=first.model, transcript=first.transcript, listed=listed, words=words
        )

    def _opened_masks(self) -> Masks:
        """Listed members' own masks, and theirs with those who are not listed."""
        plus: list[MaskStream] = []
        minus: list[MaskStream] = []
        for name in self.listed:
            minus.append(self_mask(self._seed(name)))
            for other, seed in self._reveals[name].pairs.items() if name in self._reveals else ():
                (minus if name < other else plus).append(MaskStream(seed))
        return Masks(plus=plus, minus=minus)

    def _seed(self, name: str) -> bytes:
        """A member's seed, without shares that are false, if they are few enough to be found."""
        places = {member: place for place, member in enumerate(self.call.cohort, start=1)}
        held = {
            holder: reveal.shares[name]
            for holder, reveal in sorted(self._reveals.items())
            if name in reveal.shares
        }
        numbers = [holder for holder, share in held.items() if sharing.is_share(share)]
        self._note_false(name, set(held) - set(numbers))
        trusted = sorted(numbers, key=self._false.__contains__)
        for holders in _choices(trusted, self.needed):
            seed = sharing.join({places[holder]: held[holder] for holder in holders})
            if self_commitment(seed) == self._uploads[name].commitment:
                self._note_false(name, set(trusted[: trusted.index(holders[-1])]) - set(holders))
                return seed
        raise MaskingError(
            f"Round {self.call.round}: a share of {name}'s seed is false; who sent it is not known. "
            f"{len(held)} came, {self.needed} right ones are needed. Nothing changes."
        )

    def _note_false(self, name: str, holders: Iterable[str]) -> None:
        for holder in holders:
            self._false.setdefault(holder, set()).add(name)

    def _parts(self) -> list[tuple[slice, str]]:
        head = self.layout.head
        return [(slice(seal.SIZE, head), LONG.str), (slice(head, None), self.layout.words.dtype.str)]


def opened_mean(total: SealedSum, *, layout: Layout, booleans: NamedTensors | None = None) -> Mean:
    """The means of a sum without blind masks: what the server itself may read.

    Args:
        total: The sum.
        layout: Of the updates.
        booleans: Boolean tensors of the model, which are not part of a sum.

    Raises:
        MaskingError: It is no sum of updates.
    """
    return decoded(layout, total.words, members=len(total.listed), booleans=booleans or {})


def _choices(holders: Sequence[str], count: int) -> Iterator[list[str]]:
    """So many holders: the first ones; of one more, all but one; of two more, all but two; and so on.

    Where they are the first that give the right seed, all that were left out gave false shares: with fewer of
    these, a choice before would have done.
    """
    for extra in range(len(holders) - count + 1):
        if extra and comb(count + extra, extra) * count**2 > _LIMIT:
            return
        among = holders[: count + extra]
        for without in combinations(among, extra):
            yield [holder for holder in among if holder not in without]
