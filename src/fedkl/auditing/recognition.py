"""How many of a client's images a server recognizes: the presence test, measured on clients that are known.

Images are drawn anew for every client from one pool, and all others of the pool are no members of it. So
members and non-members are of one kind, and differ in nothing but whether they were trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from fedkl import rng
from fedkl.attacks.memory import at_once, size_of
from fedkl.auditing.clients import Clients
from fedkl.auditing.presence import LayerScores, PresenceTest
from fedkl.auditing.rows import layers_of, looked_at
from fedkl.errors import DataError
from fedkl.metrics import mean_interval, success_rate
from fedkl.metrics.statistics import Rate

FALSE_ALARMS = 0.01
"""Share of images that were not trained on at which the share of recognized ones is given."""

MEMBERS = 240
"""Images that are looked for, over all audited clients, at least; and in as many clients that are played."""

_FEWEST, _MOST = 6, 100  # clients
_POOL = 240  # images that are looked at under each update, of each kind, at least
_KEPT_BACK = 6000  # scores that set the threshold, over all updates
_LIKE = 10  # images of a recorded client's classes that are not its own
_COPIES = 4  # of what is looked at of an update: itself, whitened, its row space, and as a row
_SURELY = 3.29  # standard deviations, 99.9 %
_DRAWS = 400  # of clients and images, for an interval
_ALIKE = 0.05  # assumed correlation of a client's images, where none or all are recognized
_LEARNED_FROM = 2000  # images whose layers' inputs are looked at, once

_Read = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""What is kept of an update."""

LOOKED_AT = _LEARNED_FROM + 3 * _POOL
"""Images that go through the network at least, forward and back, for a verdict."""


@dataclass(frozen=True, kw_only=True)
class Recognized:
    """Of images that clients trained on.

    Attributes:
        share: Recognized, at a threshold that 1 % of the images reach that the server kept back; with an
            interval that knows how little so few images say of where that threshold is.
        at_threshold: The same with an interval at this very threshold, by client, or by image where there is
            one client only: to be held against `false_alarms` and `swapped`, which are at it, too.
        false_alarms: Of images that these clients did not train on, as many reach it.
        swapped: Of the images of another client as many reach it: a check of the test itself; None where
            there is no other client.
        auc: Probability that an image that was trained on has a higher score than one that was not; mean of
            the clients.
        auc_low: Lower end of its interval, by client; 0 to 1 where there is one only.
        auc_high: Upper end.
        auc_surely: Lower end of its 99.9 % interval.
        swapped_auc: The same with another client's images for the members; 0.5 where the test is sound; None
            where there is no other client.
        clients: Audited updates.
    """

    share: Rate
    at_threshold: Rate
    false_alarms: Rate
    swapped: Rate | None
    auc: float
    auc_low: float
    auc_high: float
    auc_surely: float
    swapped_auc: float | None
    clients: int


class Pool(NamedTuple):
    """Some images with their labels."""

    images: Tensor
    labels: Tensor

    def of(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Some of them."""
        return self.images[places], self.labels[places]

    def first(self, count: int) -> Pool:
        """At most so many."""
        return Pool(images=self.images[:count], labels=self.labels[:count])


def first_copies(images: Tensor) -> Tensor:
    """Places of images, each of which is no copy of one before it."""
    hashes = (hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images.cpu())
    return torch.tensor(
        sorted({each: place for place, each in reversed(list(enumerate(hashes)))}.values()), dtype=torch.int64
    )


class Pools(NamedTuple):
    """Images by whose they are; no image is in two of them, nor a copy.

    A copy of a client's image among those that set the threshold would be recognized as well, and hide it.

    Attributes:
        own: The server's, which it learns from.
        kept_back: The server's, which it learns nothing from: they set the threshold.
        audited: The clients'.
    """

    own: Pool
    kept_back: Pool
    audited: Pool

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, *, seed: int) -> Pools:
        """Random parts of all that are no copies: 40, 20 and 40 %."""
        single = first_copies(images)
        order = single[torch.randperm(len(single), generator=rng.generator(seed, "pools"))]
        first, last = int(0.4 * len(order)), int(0.6 * len(order))
        parts = order[:first], order[first:last], order[last:]
        return cls(*(Pool(images=images[part], labels=labels[part]) for part in parts))

    @property
    def server_images(self) -> int:
        """How many are the server's."""
        return len(self.own.images) + len(self.kept_back.images)

    @property
    def server(self) -> Pool:
        """All of the server's, copied together."""
        images, labels = (
            torch.cat([getattr(pool, name) for pool in (self.own, self.kept_back)])
            for name in ("images", "labels")
        )
        return Pool(images=images, labels=labels)


def recognize(
    clients: Clients,
    *,
    pools: Pools,
    progress: Callable[[float], None] = lambda share: None,
) -> Recognized:
    """Plays clients to learn the test, then applies it to real ones, recorded or simulated.

    Args:
        clients: What they do.
        pools: Whose images are whose.
        progress: Called with the share that is done, in [0, 1].

    Raises:
        DataError: There are too few images for clients of this size, or no layer to look for them in.
        TrainingError: See `Clients.update`.
    """
    size = clients.exposure.images_behind
    check_enough(size, pools)
    clients = clients.after_rounds(own=pools.own, others=pools.audited)
    count = clients_of(size)

    def steps(done: int) -> None:
        progress(0.7 * done / (2 * count))

    test = learn(clients, pools=pools, told=steps)[0]  # the played updates are not kept
    audited, seen, present = _audited(clients, pools, test.looked_at, told=lambda n: steps(count + n))
    kept_back = pools.kept_back.first(max(_POOL, _KEPT_BACK // len(seen)))
    real = clients.sent is not None  # whose classes may be few: an image of one of them is like its members
    null, found = test.both(
        seen, kept_back=kept_back, images=audited.images, labels=audited.labels, by_class=real
    )
    progress(1.0)
    rest, null_of = ~present, torch.ones_like(null, dtype=torch.bool)
    if real:
        rest = rest & _of_its_classes(present, audited.labels, audited.labels)
        few = int(rest.sum(1).min())
        if few < _LIKE:
            raise DataError(
                f"Presence: only {few} images of the classes of a client are not its own, expected at least "
                f"{_LIKE}, to tell its own from. Give the subject more of these classes."
            )
        like = _of_its_classes(present, audited.labels, kept_back.labels)
        null_of = like if int(like.sum()) >= 1 / FALSE_ALARMS else null_of
    owners = torch.tensor(clients.owners(len(found)))
    return _figures(KeptBack(null, null_of), found, present, rest, owners=owners, seed=clients.seed)


def learn(
    clients: Clients, *, pools: Pools, told: Callable[[int], None] = lambda number: None
) -> tuple[PresenceTest, list[dict[str, Tensor]]]:
    """The test, and the updates of the clients that were played for it.

    Args:
        clients: What they do.
        pools: Of the server's own images they are given some.
        told: Called with how many were played.
    """
    size = clients.exposure.images_behind
    own, view = pools.own.first(max(_POOL, 2 * size)), clients.view()

    def read(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return looked_at(layers_of(view, update), update)

    played, members = _drawn(own, clients, clients.played, read, purpose="played", told=told)
    images, labels = pools.own.first(_LEARNED_FROM)
    scores = LayerScores(view, played[0], images=images, labels=labels)
    test = PresenceTest(scores, played=played, members=members, images=own.images, labels=own.labels)
    return test, played


def _audited(
    clients: Clients, pools: Pools, read: _Read, *, told: Callable[[int], None]
) -> tuple[Pool, Sequence[Mapping[str, Tensor]], Tensor]:
    """The candidates, real updates, and which of the candidates are in each."""
    if clients.sent is not None:
        return pools.audited, clients.sent.updates, clients.sent.members(len(pools.audited.images))
    audited = pools.audited.first(max(_POOL, 2 * clients.exposure.images_behind))
    seen, present = _drawn(audited, clients, clients.update, read, purpose="audited", told=told)
    return audited, seen, present


def clients_of(size: int) -> int:
    """How many clients are played, and as many audited, where so many images are in an update."""
    return min(_MOST, max(_FEWEST, math.ceil(MEMBERS / size)))


def check_enough(
    size: int, pools: Pools, *, lower: str | None = "images_per_client", clients: int = 1
) -> None:
    """Raises DataError where there are fewer than two images for each that clients train on.

    Args:
        size: Images in an update.
        pools: Whose images are whose.
        lower: The option that says how many are in one; None: none does.
        clients: How many times so many are in one.
    """
    enough_for = min(len(pools.own.images), len(pools.audited.images)) // 2
    if enough_for < size:
        got = sum(len(pool.images) for pool in pools)
        each = enough_for // clients
        instead = "" if lower is None or each < 1 else f", or set {lower} to at most {each}"
        raise DataError(
            f"Presence: expected at least {5 * size} images, five times the {size} of an update, got {got}. "
            f"The server and the audited clients get two fifths each. Give more images{instead}."
        )


def _drawn(
    pool: Pool,
    clients: Clients,
    update: Callable[..., dict[str, Tensor]],
    read: _Read,
    *,
    purpose: str,
    told: Callable[[int], None],
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What is looked at of updates of clients with images of a pool, and which each trained on.

    As many as `clients_of` says; fewer, but not fewer than six, where the memory does not suffice.

    Returns:
        Updates, and a bool of shape ``(clients, images)``.
    """
    size = clients.exposure.images_behind
    count = clients_of(size)
    updates: list[dict[str, Tensor]] = []
    members = torch.zeros(count, len(pool.images), dtype=torch.bool)
    while len(updates) < count:
        number = len(updates)
        generator = rng.generator(clients.seed, "presence", purpose, number)
        places = torch.randperm(len(pool.images), generator=generator)[:size]
        members[number, places] = True
        updates.append(read(update(*pool.of(places), number=number)))
        if number == 0:
            count = min(count, max(_FEWEST, at_once(_COPIES * size_of(updates[0].values()))))
        told(number + 1)
    return updates, members[:count]


class KeptBack(NamedTuple):
    """Scores of the images that the server kept back, of which few are false alarms.

    Attributes:
        scores: Shape ``(clients, images)``.
        like: Which of them are of a kind with what a client is told from; the same shape, bool.
    """

    scores: Tensor
    like: Tensor

    def threshold(self) -> float:
        """What so few of them reach."""
        return float(self.scores[self.like].quantile(1 - FALSE_ALARMS))

    def drawn(self, clients: Tensor, generator: torch.Generator) -> KeptBack:
        """Of these clients, with as many images drawn from those that there are."""
        count = self.scores.shape[1]
        images = torch.randint(count, (count,), generator=generator)
        found = KeptBack(*(each[clients][:, images] for each in self))
        return found if found.like.any() else self


def _figures(
    null: KeptBack, scores: Tensor, members: Tensor, rest: Tensor, *, owners: Tensor, seed: int
) -> Recognized:
    """The figures of a test.

    Args:
        null: Of images that no client has.
        scores: Of the candidates; shape ``(clients, images)``.
        members: Which of them each client has; the same shape, bool.
        rest: Which others they are told from.
        owners: Whose secrets each client has, shape ``(clients,)``: for intervals those of one owner are one.
        seed: Of what is drawn for an interval.
    """
    threshold = null.threshold()
    reached = _reached(scores, members, threshold, owners)
    others = members.roll(1, 0) & rest
    areas = [_area(each[m], each[o]) for each, m, o in zip(scores, members, rest, strict=True)]
    swapped = [
        _area(each[o], each[r & ~o]) for each, r, o in zip(scores, rest, others, strict=True) if o.any()
    ]
    area = sum(areas) / len(areas)
    pairs = [(int(m.sum()), int(o.sum())) for m, o in zip(members, rest, strict=True)]
    chance = math.sqrt(sum((m + o + 1) / (12 * m * o) for m, o in pairs)) / len(areas)
    by_owner = [fmean(areas[row] for row in rows) for rows in _rows_of(owners)]
    low, high = mean_interval(by_owner) or _interval_of_one(areas[0], *pairs[0])
    surely, _ = mean_interval(by_owner, confidence=0.999) or (0.0, 1.0)
    return Recognized(
        share=_with_the_thresholds_error(reached, threshold, null, scores, members, owners=owners, seed=seed),
        at_threshold=reached,
        false_alarms=_reached(scores, rest, threshold, owners),
        swapped=_reached(scores, others, threshold, owners) if others.any() else None,
        auc=area,
        auc_low=max(0.0, low),
        auc_high=min(1.0, high),
        auc_surely=max(0.0, surely, area - _SURELY * chance),
        swapped_auc=sum(swapped) / len(swapped) if swapped else None,
        clients=len(scores),
    )


def _of_its_classes(members: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Which of some images are of a class that a client has; shape ``(clients, others)``, bool."""
    return torch.stack([torch.isin(others, labels[mine]) for mine in members])


def _interval_of_one(area: float, members: int, others: int) -> tuple[float, float]:
    """By image, for one client; around an area with one more member at chance, or 1 would have none.

    Source:
        Hanley and McNeil, "The meaning and use of the area under a ROC curve", 1982.
    """
    center = (members * area + 0.5) / (members + 1)
    both, twice = center / (2 - center), 2 * center**2 / (1 + center)
    variance = center * (1 - center) + (members - 1) * (both - center**2) + (others - 1) * (twice - center**2)
    half = 1.96 * math.sqrt(max(0.0, variance) / (members * others))
    return min(area, center - half), max(area, center + half)


def _rows_of(owners: Tensor) -> list[list[int]]:
    """Of each owner, the places of its clients."""
    return [(owners == one).nonzero()[:, 0].tolist() for one in sorted(set(owners.tolist()))]


def _reached(scores: Tensor, chosen: Tensor, threshold: float, owners: Tensor) -> Rate:
    """The share of chosen ones at or above a threshold, with an interval by owner if there are several."""
    groups: Sequence[int] | None = owners[chosen.nonzero()[:, 0]].tolist() if len(chosen) > 1 else None
    return success_rate(scores[chosen].tolist(), threshold=threshold, groups=groups, alike=_ALIKE)


def _with_the_thresholds_error(
    share: Rate,
    threshold: float,
    null: KeptBack,
    scores: Tensor,
    members: Tensor,
    *,
    owners: Tensor,
    seed: int,
) -> Rate:
    """A share at a threshold that was estimated, too: of few images, of which one or two may have set it.

    Clients (of a single one, its images) and images that were kept back are drawn again, with replacement;
    the interval has 95 % of the shares at the thresholds that these give. It is stretched by what the audited
    images scatter where several clients have the same, and is at least the one at the threshold as it is.

    Source:
        The percentile bootstrap: Efron and Tibshirani 1993, chapter 13. For clients that share images:
        Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering".
    """
    generator = rng.generator(seed, "presence", "interval")
    rows = _rows_of(owners)
    count = len(rows)
    reached = [each[mine].sort().values for each, mine in zip(scores, members, strict=True)]
    shares = []
    for _ in range(_DRAWS):
        picked = torch.randint(count, (count,), generator=generator)
        clients = torch.tensor([row for one in picked.tolist() for row in rows[one]])
        drawn_threshold = null.drawn(clients, generator).threshold()
        drawn = [reached[client] for client in clients.tolist()]
        if count == 1:  # nothing is known of how clients differ: how its images do is the least
            size = len(drawn[0])
            drawn = [drawn[0][torch.randint(size, (size,), generator=generator)].sort().values]
        above = sum(len(each) - int(torch.searchsorted(each, drawn_threshold)) for each in drawn)
        shares.append(above / sum(len(each) for each in drawn))
    found = torch.tensor(shares, dtype=torch.double)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    variance = float(found.var())
    alone = _scatter_of_images(scores, members, threshold)
    stretched = math.sqrt(1 + alone / variance) if variance else 1.0
    return share._replace(
        low=max(0.0, min(share.low, share.rate - stretched * (share.rate - low))),
        high=min(1.0, max(share.high, share.rate + stretched * (high - share.rate))),
    )


def _scatter_of_images(scores: Tensor, members: Tensor, threshold: float) -> float:
    """Variance of the share that comes from images which several clients have, beyond that of single hits."""
    hits = (scores >= threshold) & members
    number = int(members.sum())
    excess = (hits.double() - int(hits.sum()) / number) * members
    return max(0.0, float(excess.sum(0).square().sum() - excess.square().sum())) / number**2


def _area(members: Tensor, others: Tensor) -> float:
    """Area under the curve, by ranks; equal scores count half."""
    values, counts = torch.unique(torch.cat([members, others]), return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2
    mine = ranks[torch.searchsorted(values, members)].double().sum()
    pairs = len(members) * len(others)
    return float((mine - len(members) * (len(members) + 1) / 2) / pairs)
