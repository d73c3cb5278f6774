"""Clients of a subject, and what a server sees of them: real ones, and those that the server plays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking import SimulatedClients
from fedkl.attacking.observing import sent_by
from fedkl.attacking.updates import difference, mean_of
from fedkl.auditing.results import Exposure
from fedkl.auditing.subject import LocalLoop, Subject
from fedkl.defenses import Arm, Defense, plain_arm
from fedkl.defenses.completion import Completion
from fedkl.errors import ConfigError, FedKLError, TrainingError, printable
from fedkl.locking import Split, make_public
from fedkl.protocol import Knowledge, Procedure, Sending

_LOOP_LR = 1.0  # weights of a function that trains are compared as they are


class Sent(NamedTuple):
    """What real clients sent, as it was recorded.

    Attributes:
        updates: By tensor name, as `Clients.update` returns them.
        places: Of the images that each trained on, among the audited ones.
    """

    updates: tuple[Mapping[str, Tensor], ...]
    places: tuple[Tensor, ...]

    def members(self, count: int) -> Tensor:
        """Which of `count` audited images each trained on; shape ``(updates, count)``, bool."""
        return torch.stack([torch.zeros(count, dtype=torch.bool).index_fill(0, p, True) for p in self.places])


@dataclass(frozen=True, kw_only=True, eq=False)
class Clients:
    """Clients that do the same.

    Attributes:
        subject: Whose.
        exposure: How many, of how many images.
        procedure: What each would do without the defense.
        defense: What each does against a curious server.
        seed: Of what is drawn; clients' own secrets come from the operating system.
        network: What they receive; as `Subject.classifier` gives it, or as the owner calls it where a
            function of the owner's trains.
        sent: What real ones sent; None: they are simulated.
    """

    subject: Subject
    exposure: Exposure
    procedure: Procedure | LocalLoop
    defense: Defense
    seed: int
    network: nn.Module = field(repr=False)
    sent: Sent | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        subject: Subject,
        *,
        exposure: Exposure,
        procedure: Procedure | LocalLoop,
        defense: Defense,
        seed: int,
    ) -> Clients:
        """Clients of a subject."""
        network = subject.build(trained=exposure.trained)
        if isinstance(procedure, Procedure):
            network = subject.classifier(network)
        if subject.is_pictures:
            channels, height, width = subject.images.shape[1:]
            defense = defense.for_images((channels, height, width))
        if not exposure.trained and subject.weights is not None:
            defense = defense.for_untrained()  # else the defense sees for itself what `model` builds
        if not isinstance(procedure, Procedure) and defense.changes_procedure:
            raise ConfigError(
                f"{subject.name}: {defense.describe()} changes how clients train, and a function of the "
                "owner's that trains cannot be changed. State the training as a fedkl.Procedure."
            )
        return cls(
            subject=subject,
            exposure=exposure,
            procedure=procedure,
            defense=defense,
            seed=seed,
            network=network,
        )

    @property
    def guesses(self) -> tuple[Arm, ...]:
        """Servers that know the defense and nothing of a client's secrets, the plainest first.

        Not what else a defense compares itself with: servers that were granted secrets, other defenses. One
        at least, for defenses that name none or only those.
        """
        if self.defense == plain_arm().defense:
            return (plain_arm(),)
        found = [each for each in self.defense.guesses() if each.main and each.defense == self.defense]
        usual = Arm(name=self.defense.type, description=self.defense.describe(), defense=self.defense)
        return tuple(each for each in found if each.knowledge == Knowledge()) or (usual,)

    @property
    def arm(self) -> Arm:
        """The plainest of them."""
        return self.guesses[0]

    @property
    def hides(self) -> bool:
        """Whether the defense hides anything."""
        return bool(self.defense.guesses())

    def open(self) -> Clients:
        """The same clients with nothing hidden: an attacker that fails on them says nothing.

        Of a lock that is its own network, with the norms that it made, and their γ and β are known.
        """
        plain, control = plain_arm().defense, self.defense.control().defense
        if control == plain:
            return replace(self, defense=plain)
        network = control.prepare(self.network).bake()
        make_public(network)
        return replace(self, defense=plain, network=network)

    def view(self) -> nn.Module:
        """The network as a server can call it, with γ = 1 and β = 0 where it does not know them."""
        split = self.defense.prepare(self.network)
        generator = rng.generator(self.seed, "guessed")
        view = self.defense.server_view(split, self.network, granted=self.arm.knowledge, generator=generator)
        model = Completion(view.model, split).neutral(start=self.network).model
        return model if isinstance(self.procedure, Procedure) else self.subject.classifier(model)

    def update(self, images: Tensor, labels: Tensor, *, number: int) -> dict[str, Tensor]:
        """What the server sees of real clients that share images evenly, each with secrets of its own.

        Args:
            images: In [0, 1], or tokens; of all of the exposure's clients.
            labels: Theirs.
            number: Makes what these clients draw their own.

        Returns:
            By name: the mean of the clients' gradients, or of (before − after) / lr. Of a function that
            trains: before − after.

        Raises:
            TrainingError: The function that trains raised, or trains nothing.
        """
        shares = self._shared(images, labels)
        return mean_of(
            [
                self._real(self.defense.prepare(self.network), x, y, number=f"{number}-{member}")
                for member, (x, y) in enumerate(shares)
            ]
        )

    def played(self, images: Tensor, labels: Tensor, *, number: int) -> dict[str, Tensor]:
        """The same of clients that the server plays, which draws what it does not know; see `update`."""
        generator = rng.generator(self.seed, "imitated", number)
        split = self.defense.prepare(self.network)
        if isinstance(self.procedure, Procedure):
            members = self.exposure.clients
            simulate = SimulatedClients.of(
                self.arm,
                split,
                self.network,
                train_mode=self.exposure.norm_mode == "train",
                local=self.procedure,
                cohort=members,
                generator=generator,
            )
            simulate = replace(simulate, played=itertools.count(number * members))
            return {name: tensor[0] for name, tensor in simulate(images[None], labels[None]).items()}
        known = self.defense.known(split, granted=self.arm.knowledge)
        return mean_of(
            [
                self._imitated(
                    self.defense.imitated(self.network, known=known, generator=generator),
                    *(x, y),
                    number=f"played-{number}-{member}",
                    generator=generator,
                )
                for member, (x, y) in enumerate(self._shared(images, labels))
            ]
        )

    def _shared(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = torch.arange(len(images)).chunk(self.exposure.clients)
        return [(images[part], labels[part]) for part in parts]

    def _real(self, client: Split, images: Tensor, labels: Tensor, *, number: str) -> dict[str, Tensor]:
        if isinstance(self.procedure, Procedure):
            return sent_by(
                client,
                self.arm,
                images,
                labels,
                train_mode=self.exposure.norm_mode == "train",
                local=self.defense.procedure(self.procedure),
                generator=rng.generator(self.seed, "audited-augmentation", number),
            )
        at_hand = self._at_hand(client, images, labels)
        before, state = self._looped_state(client, images, labels, number=number)
        sent = client.public_update(state, kind="weights", num_samples=len(images), round=0, search=False)
        return difference(before, self.defense.transform(sent, client=at_hand).tensors, lr=_LOOP_LR)

    def _imitated(
        self, client: Split, images: Tensor, labels: Tensor, *, number: str, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What a client sends that trains by the owner's function, and that the server plays."""
        at_hand = self._at_hand(client, images, labels)
        before, state = self._looped_state(client, images, labels, number=number)
        change = {name: (state[name] - tensor)[None] for name, tensor in before.items()}
        changed = self.defense.imitate_transform(change, clients=[at_hand], generator=generator)
        return {name: -tensor[0] / _LOOP_LR for name, tensor in changed.items()}

    def _at_hand(self, client: Split, images: Tensor, labels: Tensor) -> Sending:
        """Of a client that has not trained yet."""
        received = {name: tensor.detach().clone() for name, tensor in client.public_state().items()}
        return Sending.of(received, client.model, self.subject.inputs(images), labels)

    def _looped_state(
        self, client: Split, images: Tensor, labels: Tensor, *, number: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Public parameters before, and the public state after the owner's function trained a client.

        Without those that were frozen before and were not changed.
        """
        loop = cast(LocalLoop, self.procedure)
        before = {name: tensor.detach().clone() for name, tensor in client.public_parameters().items()}
        trained = set(client.trained_parameters())
        seed = rng.generator(self.seed, "loop", number).initial_seed()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU only: others are not put back
            try:
                loop(client.model.train(), self.subject.inputs(images), labels)
            except FedKLError:
                raise
            except Exception as error:
                raise TrainingError(
                    f"{self.subject.name}: the function that trains raised {type(error).__name__} "
                    f"({printable(str(error))}) on {len(images)} images. It is called as "
                    "procedure(network, inputs, labels), on the CPU."
                ) from error
        state = client.public_state()
        if all(torch.equal(before[name], state[name]) for name in before):
            raise TrainingError(
                f"{self.subject.name}: the function that trains changed no weight of the network that it was "
                "given. Train that network in place, not a copy."
            )
        trained |= {name for name, tensor in before.items() if not torch.equal(tensor, state[name])}
        return {name: tensor for name, tensor in before.items() if name in trained}, state
