"""The ledger: what each client's rounds have spent, and whether there is enough left for another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from fedkl.errors import ConfigError, gathered, shown
from fedkl.privacy.accounting import GaussianCost, check_installed, epsilon

_REL_TOL = 0.01  # another version of the accountant may reckon a little differently


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """What is accounted for.

    Attributes:
        delta: δ of (ε, δ), in (0, 1): well below one over the number of a client's images.
        budget: No client may spend more than this ε: the training stops before the round in which one would.
            None: it is only counted.

    Raises:
        ConfigError: A field is out of range.
    """

    delta: float = 1e-5
    budget: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ConfigError(f"privacy.delta: expected a value in (0, 1), got {self.delta}.")
        if self.budget is not None and not 0 < self.budget < float("inf"):
            raise ConfigError(f"privacy.budget: expected a finite ε > 0, got {self.budget}.")


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """A round that was begun, and what those that took part have spent by its end.

    Attributes:
        round: From 0. A round that was interrupted and done again stands there twice: it was sent twice.
        epsilon: By client.
    """

    round: int
    epsilon: Mapping[str, float]


class Ledger:
    """Counts the rounds of each client.

    Args:
        costs: What a round costs, by client.
        options: δ and the budget.

    Raises:
        ConfigError: dp-accounting is not installed, or δ is too small.

    >>> cost = GaussianCost(noise_multiplier=2.0, protects="one image more or less")
    >>> ledger = Ledger({"client-0": cost, "client-1": cost}, options=PrivacyOptions(budget=3.0))
    >>> ledger.affords(["client-0"])
    True
    >>> {client: round(spent, 2) for client, spent in ledger.charge(0, ["client-0"]).epsilon.items()}
    {'client-0': 1.99}
    >>> ledger.charge(1, ["client-0"]).epsilon["client-0"] < 3.0, ledger.affords(["client-0"])
    (True, False)
    >>> ledger.affords(["client-1"]), ledger.spent["client-1"]
    (True, 0.0)
    """

    def __init__(self, costs: Mapping[str, GaussianCost], *, options: PrivacyOptions) -> None:
        check_installed()
        self.options = options
        self.costs = dict(costs)
        self.on_charge: Callable[[LedgerEntry], None] | None = None
        self._rounds = Counter[str]()
        self._begun = set[int]()
        if not all(
            math.isfinite(epsilon(c, rounds=1, delta=options.delta)) for c in set(self.costs.values())
        ):
            raise ConfigError(
                f"privacy.delta: no finite ε can be computed at δ = {options.delta}. Choose a larger δ, well "
                "below one over the number of a client's images, or more noise."
            )

    @property
    def spent(self) -> dict[str, float]:
        """ε by client, 0 of those that never took part."""
        return {client: self._epsilon(client) for client in self.costs}

    def affords(self, clients: Collection[str]) -> bool:
        """Whether each of these clients can take part in another round within the budget."""
        budget = self.options.budget
        return budget is None or all(self._epsilon(client, more=1) <= budget for client in clients)

    def charge(self, round: int, clients: Collection[str]) -> LedgerEntry:
        """Counts a round, before it begins: what is sent cannot be taken back.

        Args:
            round: Its number.
            clients: Those that take part.

        Raises:
            ConfigError: The budget does not suffice.
        """
        if not self.affords(clients):
            raise ConfigError(
                f"Round {round}: the budget ε = {self.options.budget} does not suffice. Raise it "
                "(privacy.budget), add noise, or train for fewer rounds."
            )
        self._rounds.update(clients)
        self._begun.add(round)
        entry = LedgerEntry(round=round, epsilon={client: self._epsilon(client) for client in clients})
        if self.on_charge is not None:
            self.on_charge(entry)
        return entry

    def restore(self, entries: Iterable[LedgerEntry]) -> None:
        """Takes over what an earlier process counted.

        Raises:
            ConfigError: It counted clients that are not among these, or their rounds cost something else:
                what was spent would be reckoned anew. Nothing is taken over.
        """
        kept = list(entries)
        rounds = Counter(client for entry in kept for client in entry.epsilon)
        last = {client: spent for entry in kept for client, spent in entry.epsilon.items()}
        problems = [
            problem for client in last if (problem := self._differs(client, rounds[client], last[client]))
        ]
        if problems:
            raise ConfigError(
                gathered(
                    "The ledger of another training: expected what these clients have spent, got",
                    problems,
                    "Go on with the clients, the noise and the batches of before, or begin another training.",
                )
            )
        self._rounds = rounds
        self._begun = {entry.round for entry in kept}

    def _differs(self, client: str, rounds: int, spent: float) -> str:
        """What is wrong with ε as it was counted; empty: nothing."""
        if client not in self.costs:
            return f"{shown(client)}, who is not among them"
        expected = epsilon(self.costs[client], rounds=rounds, delta=self.options.delta)
        if math.isclose(spent, expected, rel_tol=_REL_TOL):
            return ""
        return f"{shown(client)}: ε = {spent:.4g} after {rounds} rounds, which cost {expected:.4g} here"

    def check_behind(self, first: int) -> None:
        """Checks that all rounds before round `first` were counted.

        Raises:
            ConfigError: One is missing: what it spent would be spent twice.
        """
        missing = set(range(first)) - self._begun
        if missing:
            raise ConfigError(
                f"Round {first}: the ledger does not know what round {min(missing)} spent. Before a training "
                "goes on, LedgerFile(path, delta=…).keep(federation.ledger, rounds=…), as from its start."
            )

    def _epsilon(self, client: str, *, more: int = 0) -> float:
        rounds = self._rounds[client] + more
        return epsilon(self.costs[client], rounds=rounds, delta=self.options.delta)
