"""Clients that have taken part before: what they keep to themselves was trained, and a server fits its own.

A private layer or a lock that was drawn a moment ago makes noise of all that follows it, and a server's own
draw says nothing of what another drew. Neither lasts: after some rounds a client's private tensors fit the
public ones, and a server, which has those and labeled images, fits some itself. A test that leaves this out
takes the first round for protection.

Real clients' are fitted, with the public tensors as they are, to images of all audited clients, and not to
the few behind one update: rounds together make a private layer better than its own client's images alone.
Some of the candidates are among these images, whether the update is of them or not: what tells the two apart
is the update only.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from time import process_time

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.defenses import Defense
from fedkl.enrollment.fitting import LEAST_IMAGES, Fitting, fit_private_
from fedkl.keys import Key, imitated_uniform
from fedkl.locking import Split
from fedkl.protocol.procedure import loss_of

PLAYED, REAL = 3, 6
"""States of clients that the server plays, and of real ones; clients take turns with them, for each takes the
time of many updates. Six are as many as there are clients at least, so that each of few has its own.
"""

IMAGES = 1000
"""That each is fitted to, at most; a fifth of them says when to stop."""

FITTING = Fitting(epochs=10)
"""How: at most ten epochs of Adam at 0.02, batches of 64, the state with the lowest held-out loss.

The start is a candidate too: a server that can fit nothing keeps what it drew.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Private:
    """What one client keeps to itself.

    Attributes:
        key: Of a lock.
        state: Private parameters and statistics.
    """

    key: Key | None = field(repr=False)
    state: dict[str, Tensor] = field(repr=False)

    def put(self, split: Split) -> None:
        """Gives it to a client of the same network and defense."""
        split.use_key(self.key)
        split.load_private_state(self.state)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settled:
    """What clients keep to themselves after earlier rounds, and what the server has instead.

    Attributes:
        view: Of the network as the server calls it.
        played: Of clients that the server plays.
        real: Of clients, with secrets of the operating system.
    """

    view: Private = field(repr=False)
    played: tuple[Private, ...] = field(repr=False)
    real: tuple[Private, ...] = field(repr=False)

    def put_view(self, split: Split) -> None:
        """Makes a client what the server takes it for."""
        self.view.put(split)

    def put_played(self, split: Split, turn: int) -> None:
        """Makes it the next one that the server plays."""
        self.played[turn % len(self.played)].put(split)

    def put_real(self, split: Split, turn: int) -> None:
        """Makes it the next real one."""
        self.real[turn % len(self.real)].put(split)


def is_to_be_fitted(split: Split, network: nn.Module) -> bool:
    """Whether a client keeps a parameter that is trained, and that is not the given network's.

    Where it is, as γ and β of a trained model that a lock keeps, it was trained with the rest already.
    """
    given, public = dict(network.named_parameters()), set(split.public_parameters())
    if not any(parameter.requires_grad for parameter in split.private_parameters().values()):
        return False
    private = {name: p for name, p in split.bake().named_parameters() if name not in public}
    return any(
        name not in given or not torch.allclose(parameter, given[name], rtol=1e-3)
        for name, parameter in private.items()
    )


def seconds(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """What `settled` takes at most, of one core, by one step on a batch of the server's images."""
    client, batch = copy.deepcopy(network), slice(FITTING.batch_size)
    start = process_time()
    loss_of(client(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
    steps = FITTING.epochs * math.ceil(min(IMAGES, len(labels)) / FITTING.batch_size)
    return (process_time() - start) * steps * (1 + PLAYED + REAL)


def settled(
    defense: Defense,
    network: nn.Module,
    *,
    own: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    seed: int,
) -> Settled | None:
    """Fits private tensors with the public ones as they are.

    Args:
        defense: What clients do.
        network: What they receive, as a classifier; not changed.
        own: The server's images and labels.
        others: Clients'.
        seed: Of the server's draws, and of which images each is fitted to; never of a client's secrets.

    Returns:
        None where there are too few images to fit to.

    Raises:
        TrainingError: See `fit_private_`.
    """
    if min(len(own[1]), len(others[1])) < LEAST_IMAGES:
        return None

    def fit(split: Split, pool: tuple[Tensor, Tensor], *purpose: str | int) -> Private:
        places = torch.randperm(len(pool[1]), generator=rng.generator(seed, "settled", *purpose))[:IMAGES]
        fit_private_(split, images=pool[0][places], labels=pool[1][places], fitting=FITTING)
        return Private(key=split.key, state=split.private_state())

    def imitated(number: int) -> Split:
        split = defense.prepare(network)
        split.redraw(uniform=imitated_uniform(rng.generator(seed, "settled", "secrets", number)))
        return split

    view, *played = [fit(imitated(number), own, "own", number) for number in range(1 + PLAYED)]
    real = [fit(defense.prepare(network), others, "others", number) for number in range(REAL)]
    return Settled(view=view, played=tuple(played), real=tuple(real))
