"""What every defense does, and what a server that knows it would try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fedkl.defenses.server_view import Known, ServerView
from fedkl.errors import ConfigError
from fedkl.keys import Key, imitated_uniform
from fedkl.locking import Split, copied
from fedkl.privacy import GaussianCost
from fedkl.protocol import Knowledge, Procedure, Sending, Transform
from fedkl.registration import Kinds
from fedkl.update import PublicSchema, PublicUpdate

AnyProcedure = TypeVar("AnyProcedure", bound=Procedure)

Regressed = Literal["nothing", "key", "affine"]

FilledIn = Literal["drawn", "neutral", "calibrated"]


@dataclass(frozen=True, kw_only=True)
class Defense:
    """Base of all defenses: an undefended client.

    A defense of your own derives from it, is a frozen dataclass with a field `type`, and is registered with
    `register_defense`. It overrides what differs from an undefended client; the rest follows: it can be
    trained with, attacked by every attack, and compared with its control.
    """

    plain: ClassVar[str] = ""  # its name for those who know no term of the field; empty: its type
    unaware: ClassVar[str] = ""  # how a server errs that does not know of it; empty: no such arm
    type: str = "undefended"

    @property
    def keeps_tensors(self) -> bool:
        """Whether some tensors may stay with the client."""
        return type(self).prepare is not Defense.prepare and not self.changes_network

    @property
    def changes_network(self) -> bool:
        """Whether clients train another network than the model, all of whose tensors are public."""
        return False

    @property
    def changes_updates(self) -> bool:
        """Whether what is sent may be another update than what was trained."""
        return type(self).transform is not Defense.transform

    @property
    def changes_procedure(self) -> bool:
        """Whether clients may train in another way than without it."""
        return type(self).procedure is not Defense.procedure

    @property
    def shares_statistics(self) -> bool:
        """Whether norms' running statistics are sent with a gradient, too; with weights they always are."""
        return False

    @property
    def looks_at_images(self) -> bool:
        """Whether `transform` looks at the client's network or images, and not at the update only.

        In a combination, one that does not say so has neither at hand: what is done to a private update costs
        no privacy if the update is all that it sees.
        """
        return False

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Splits a copy of the model into private and public tensors.

        Args:
            model: The plain model; not changed.
            key: The client's key, for defenses that use one; a new one if None.

        Raises:
            ConfigError: The model cannot be copied.
        """
        return Split(copied(model, subject=self.describe(), error=ConfigError))

    def for_images(self, shape: tuple[int, int, int]) -> Defense:
        """The same defense, for a model that is called with images of this shape.

        Args:
            shape: Of one image, ``(channels, height, width)``.
        """
        return self

    def for_untrained(self) -> Defense:
        """The same defense, for a model that is known to be untrained: no γ and β of it are kept.

        Where norms are initialized with other values than γ = 1 and β = 0, they look trained.
        """
        return self

    def check_training(self) -> None:
        """Refuses a training, where the defense is one for attacks only.

        Raises:
            ConfigError: It is.
        """

    def procedure(self, procedure: AnyProcedure) -> AnyProcedure:
        """How a client trains that would train so without the defense; of what this gives, the same again."""
        return procedure

    def privacy(self, procedure: Procedure, *, samples: int) -> GaussianCost | None:
        """What a round costs a client in differential privacy; None where nothing is guaranteed.

        Args:
            procedure: How the client trains, with what the defense makes of that.
            samples: How many images it has.
        """
        return None

    def check_sent(self, schema: PublicSchema) -> None:
        """Refuses a network whose updates `transform` cannot change as it says, before anything is spent.

        Args:
            schema: Of the updates.

        Raises:
            ConfigError: It is one.
        """

    def transform(self, update: PublicUpdate, *, client: Sending) -> PublicUpdate:
        """What the client does to an update before it is sent.

        Args:
            update: A gradient, or the weights after training, with buffers.
            client: What it has at hand.
        """
        return update

    @property
    def public_transform(self) -> Transform | None:
        """What an attacker does to the change that a client with its own images would send.

        A change is a gradient or, where weights are sent, the weights after minus before training. The
        function is called with it and with the one that was observed, both by name: of a pruned update, what
        was not kept says nothing. Differentiable, without secrets and without chance, works under
        `torch.vmap`; None where nothing is done, or where what is done is drawn by chance and leaves the mean
        alone. A defense that overrides `transform` overrides this or `imitate_transform`: the attacker knows
        the defense.
        """
        return None

    @property
    def noise_deviation(self) -> float:
        """Standard deviation of the noise that `transform` adds to every entry; 0 where it adds none."""
        return 0.0

    def transform_under_noise(self, deviation: float) -> Transform | None:
        """`public_transform` where another defense adds noise afterwards, so that no zeros are seen.

        Args:
            deviation: Of that noise, in the units of the change.
        """
        return self.public_transform

    def imitate_transform(
        self, changes: Mapping[str, Tensor], *, clients: Sequence[Sending], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """What `transform` does to the changes of clients that the server plays itself.

        Args:
            changes: By name, several stacked: shape ``(clients, …)`` each; see `public_transform`.
            clients: What each of them has at hand.
            generator: The attacker's, for what `transform` draws.
        """
        public = self.public_transform
        return changes if public is None else dict(torch.vmap(public)(dict(changes), dict(changes)))

    def server_view(
        self,
        victim: Split,
        model: nn.Module,
        *,
        granted: Knowledge,
        generator: torch.Generator | None = None,
    ) -> ServerView:
        """What the server can build, with one fill-in for what it was not granted.

        The server knows the architecture and the defense: it prepares the model as a client would, with
        secrets of its own, and puts in the public tensors and whatever it was granted.

        Args:
            victim: The client's split; only what is public or granted is read.
            model: What the server started from: the architecture, and of a trained model γ and β too. Never
                one with values that the client has found since.
            granted: The secrets that the server knows.
            generator: The attacker's; see `imitated`.
        """
        if granted.affine:
            return ServerView(model=victim.bake())
        known = self.known(victim, granted=granted)
        view = self.imitated(model, known=known, generator=generator)
        private = tuple(view.private_parameters())
        generate = view.generation()
        if generate is None:
            return ServerView(model=view.bake(), private=private)
        secrets = view.reveal_secrets()
        layers = (name for name in private if name not in secrets)
        return ServerView(
            model=view.bake(),
            private=(*(link.tensor for link in generate.links), *layers),
            secrets=secrets,
            generate=generate,
        )

    def informed(self, model: nn.Module, seen: Mapping[str, Tensor]) -> nn.Module:
        """The server's network once it has an update that gives away what the client drew.

        Args:
            model: Of `server_view`; may be changed.
            seen: The update, by name, as in the `gradient` of `Observation.as_gradient`.
        """
        return model

    def known(self, victim: Split, *, granted: Knowledge) -> Known:
        """What the server has of a client: what is public, and the key and lock layers if granted."""
        return Known(
            public=victim.public_state(),
            key=victim.key if granted.key else None,
            private=victim.private_parameters() if granted.lock_layers else {},
        )

    def imitated(self, model: nn.Module, *, known: Known, generator: torch.Generator | None = None) -> Split:
        """A client as the server would build it: with what it knows, and draws of its own for the rest.

        Where clients start at a trained model's γ and β, so does this one, since the server knows that model;
        what the client made of them since, it does not know.

        Args:
            model: What the server started from, as for `server_view`.
            known: Of the client that is imitated.
            generator: The attacker's, of the draws, so that an attack repeats from its seed; None: the
                operating system's, as for a client.
        """
        split = self.prepare(model, key=known.key)
        if generator is not None:
            split.redraw(key=known.key, uniform=imitated_uniform(generator))
        split.load_public_state(known.public)
        with torch.no_grad():
            for name, parameter in split.private_parameters().items():
                if name in known.private:
                    parameter.copy_(known.private[name])
        return split

    def control(self) -> Arm:
        """The same client with nothing hidden: an attack that fails here says nothing about the defense."""
        return plain_arm()

    def guesses(self) -> tuple[Arm, ...]:
        """What a server that knows this defense would try, the plainest first.

        Then, where it errs in a way of its own, what one would that does not: it is run where it is named.
        """
        control = self.control().name
        known = Arm(name=self.type, description=self.describe(), defense=self, control=control)
        if not self.unaware:
            return (known,)
        description, knowledge = f"{known.description}, {self.unaware}", Knowledge(defense=False)
        name = f"{self.type}-naive"
        return known, replace(known, name=name, description=description, knowledge=knowledge, main=False)

    def baselines(self) -> tuple[tuple[Defense, str], ...]:
        """What a training with it is compared with, the closest first, and what differs, in words."""
        return ((plain_arm().defense, "plain network"),)

    @classmethod
    def variants(cls) -> tuple[Defense, ...]:
        """With which options it is offered where another defense is attacked."""
        return (cls(),)

    def describe(self) -> str:
        """Its name and options in one line, for tables."""
        return self.type


DEFENSES: Kinds[Defense] = Kinds("defense", Defense)
"""All defenses, by the `type` that configurations name."""

register_defense = DEFENSES.register


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One column of a comparison: a defense, and a server that knows so much of it and guesses so.

    Attributes:
        name: Short name.
        description: What stands behind it, in one line.
        defense: What the client does.
        knowledge: What the server is granted.
        regress: What the attack finds together with the images, instead of relying on the server's guess:
            the key, or the private parameters themselves.
        filled_in: What the server puts where it knows neither: what secrets of its own generate, γ = 1 and
            β = 0, or what fits its auxiliary images and labels best.
        open: Whether nothing is hidden from the server: such an arm tests the attack, not a defense.
        control: Name of the arm that it is compared with; None for one that is a control itself.
        main: Whether it is run where no arms are named.
    """

    name: str
    description: str
    defense: Defense
    knowledge: Knowledge = field(default_factory=Knowledge)
    regress: Regressed = "nothing"
    filled_in: FilledIn = "drawn"
    open: bool = False
    control: str | None = None
    main: bool = True


@register_defense
@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """Plain federated learning: everything is public, norm statistics included."""

    plain: ClassVar[str] = "no protection"
    type: Literal["none"] = "none"

    def guesses(self) -> tuple[Arm, ...]:
        """None: there is nothing to guess."""
        return ()

    def baselines(self) -> tuple[tuple[Defense, str], ...]:
        """None: it is the baseline."""
        return ()


def plain_arm() -> Arm:
    """The plain network without any defense."""
    return Arm(
        name="no-norm", description="plain network, no lock", defense=NoDefense(), open=True, control=None
    )
