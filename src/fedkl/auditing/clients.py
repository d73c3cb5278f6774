"""Clients of a subject, and what a server sees of them: real ones, and those that the server plays."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking import SimulatedClients
from fedkl.attacking.observing import sent_by
from fedkl.attacking.updates import difference, mean_of
from fedkl.auditing.results import Exposure
from fedkl.auditing.settling import REAL, Settled, is_to_be_fitted, seconds, settled
from fedkl.auditing.subject import LocalLoop, Subject
from fedkl.defenses import Arm, Defense, plain_arm
from fedkl.defenses.completion import Completion
from fedkl.errors import ConfigError, FedKLError, TrainingError, printable, shown
from fedkl.locking import Split, make_public
from fedkl.protocol import Knowledge, Procedure, Sending
from fedkl.update import UpdateKind

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
        settled: What they and the server have of earlier rounds; None: it is their first, or they keep
            nothing to themselves that was trained.
    """

    subject: Subject
    exposure: Exposure
    procedure: Procedure | LocalLoop
    defense: Defense
    seed: int
    network: nn.Module = field(repr=False)
    sent: Sent | None = field(default=None, repr=False)
    settled: Settled | None = field(default=None, repr=False)

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
        """Clients of a subject.

        Raises:
            ConfigError: The defense cannot change all that they send, or not how a function of the owner's
                trains.
        """
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
        if defense.changes_updates:
            kind: UpdateKind = "weights"
            if isinstance(procedure, Procedure) and procedure.algorithm == "fedsgd":
                kind = "gradient"
            defense.check_sent(defense.prepare(network).schema(kind))
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

    def after_rounds(self, *, own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> Clients:
        """The same clients when they have taken part before, and a server that fits what it does not know.

        Of an untrained network they are as they were: its clients take part for the first time.

        Args:
            own: Images and labels that the server fits to.
            others: That clients trained on before.

        Raises:
            TrainingError: Nothing can be fitted so.
        """
        if not self._keep_what_is_trained():
            return self
        network = self._called(copy.deepcopy(self.network))
        return replace(self, settled=settled(self.defense, network, own=own, others=others, seed=self.seed))

    def seconds_of_rounds(self, own: tuple[Tensor, Tensor]) -> float:
        """What `after_rounds` takes at most, of one core."""
        return seconds(self._called(copy.deepcopy(self.network)), *own) if self._keep_what_is_trained() else 0

    def _keep_what_is_trained(self) -> bool:
        """Whether they keep tensors to themselves that earlier rounds made others than a fresh client's."""
        if not self.exposure.trained or self.sent is not None:
            return False
        return is_to_be_fitted(self.defense.prepare(self.network), self.network)

    def open(self) -> Clients:
        """The same clients with nothing hidden: an attacker that fails on them says nothing.

        Of a lock that is its own network, with the norms that it made, and their γ and β are known.
        """
        plain, control = plain_arm().defense, self.defense.control().defense
        if control == plain:
            return replace(self, defense=plain, settled=None)
        network = control.prepare(self.network).bake()
        make_public(network)
        return replace(self, defense=plain, network=network, settled=None)

    def view(self) -> nn.Module:
        """The network as a server can call it: with what it fitted, or γ = 1 and β = 0, for what it lacks."""
        split = self.defense.prepare(self.network)
        if self.settled is not None:
            self.settled.put_view(split)
            return self._called(split.bake())
        generator = rng.generator(self.seed, "guessed")
        view = self.defense.server_view(split, self.network, granted=self.arm.knowledge, generator=generator)
        model = Completion(view.model, split).neutral(start=self.network).model
        return self._called(model)

    def _called(self, network: nn.Module) -> nn.Module:
        """As attackers call it; changed in place."""
        return network if isinstance(self.procedure, Procedure) else self.subject.classifier(network)

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
            TrainingError: The function that trains raised, trains nothing, or leaves another network.
        """
        shares, turns = self._shared(images, labels), self._turns(number)
        found = []
        for member, (x, y) in enumerate(shares):
            client = self.defense.prepare(self.network)
            if self.settled is not None:
                self.settled.put_real(client, next(turns))
            found.append(self._real(client, x, y, number=f"{number}-{member}"))
        return mean_of(found)

    def played(self, images: Tensor, labels: Tensor, *, number: int) -> dict[str, Tensor]:
        """The same of clients that the server plays, which draws what it does not know; see `update`."""
        generator = rng.generator(self.seed, "imitated", number)
        split, turns = self.defense.prepare(self.network), self._turns(number)

        def settle(client: Split) -> None:
            if self.settled is not None:
                self.settled.put_played(client, next(turns))

        if isinstance(self.procedure, Procedure):
            simulate = SimulatedClients.of(
                self.arm,
                split,
                self.network,
                train_mode=self.exposure.norm_mode == "train",
                local=self.procedure,
                cohort=self.exposure.clients,
                generator=generator,
            )
            simulate = replace(simulate, played=self._turns(number), settle=settle)
            return {name: tensor[0] for name, tensor in simulate(images[None], labels[None]).items()}
        known, found = self.defense.known(split, granted=self.arm.knowledge), []
        for member, (x, y) in enumerate(self._shared(images, labels)):
            client = self.defense.imitated(self.network, known=known, generator=generator)
            settle(client)
            numbered = f"played-{number}-{member}"
            found.append(self._imitated(client, x, y, number=numbered, generator=generator))
        return mean_of(found)

    def owners(self, count: int) -> list[int]:
        """Of so many updates, by number: whose secrets each is made with, where that is one client's.

        Few states of clients that took part before are fitted, so that several updates have the same secrets.
        """
        one = self.settled is not None and self.exposure.clients == 1
        return [number % REAL if one else number for number in range(count)]

    def _turns(self, number: int) -> Iterator[int]:
        """Numbers of the clients behind an update, no two of which share any."""
        return itertools.count(number * self.exposure.clients)

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
        frozen = frozenset(client.public_parameters()).difference(before)
        frozen |= {name for name, first in at_hand.tied.items() if first in frozen}
        at_hand = replace(at_hand, frozen=frozen)
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
        inputs, tied = self.subject.inputs(images), client.tied_names()
        return Sending.of(received, client.model, inputs, labels, tied=tied)

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
        with rng.seeded(seed):
            try:
                client.model.train()
                loop(client.model, self.subject.inputs(images), labels)
            except FedKLError:
                raise
            except (Exception, SystemExit) as error:
                raise TrainingError(
                    f"{self.subject.name}: the function that trains raised {type(error).__name__} "
                    f"({printable(str(error))}) on {len(images)} images. It is called as "
                    "procedure(network, inputs, labels), on the CPU."
                ) from error
        state = client.public_state()
        lost = [name for name in before if name not in state or state[name].shape != before[name].shape]
        if lost:
            raise TrainingError(
                f"{self.subject.name}: the function that trains left no {shown(lost[0])} of shape "
                f"{tuple(before[lost[0]].shape)} in the network that it was given. Let it undo what it does "
                "to modules, e.g. parametrizations and pruning, before it returns."
            )
        if all(torch.equal(before[name], state[name]) for name in before):
            raise TrainingError(
                f"{self.subject.name}: the function that trains changed no weight of the network that it was "
                "given. Train that network in place, not a copy."
            )
        trained |= {name for name, tensor in before.items() if not torch.equal(tensor, state[name])}
        return {name: tensor for name, tensor in before.items() if name in trained}, state
