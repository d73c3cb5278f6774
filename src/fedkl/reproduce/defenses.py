"""What stops it: every defense, what it costs in accuracy, and what attackers who know it still read.

Each defense is trained with, and audited (`fedkl.audit`) on the plain network's trained weights: one training
and one audit a cell, in folders of their own, so that a table goes on over many sittings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from fedkl import configured, experiments
from fedkl.aggregation import MaskedAggregation, PlainAggregation
from fedkl.attacking.matrix import ROWS, start_of
from fedkl.attacking.records import Record
from fedkl.auditing import Audit, Finding, Subject, audit
from fedkl.auditing.results import Masking
from fedkl.config import AttackConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.defenses import DEFENSES, Defense
from fedkl.errors import ConfigError, FedKLError, FolderError
from fedkl.federated import FederatedTraining, LocalTraining
from fedkl.files import write_atomically
from fedkl.parsing import parse_toml
from fedkl.protocol import Procedure
from fedkl.report import figures
from fedkl.reproduce.defenses_table import Exposed, markdown, points
from fedkl.runs import RunDirectory
from fedkl.study import OpenProgress, check_names, run_cells, write_table

NAME = "defenses"
PLAIN = "none"
_FIGURE = "defenses.png"
_AXIS = "Images recognized or identified (%)"
_LR = {"lenet": 0.03}  # of 0.1 the plain network learns as well, a locked one not at all
_USUAL_LR = 0.05
_AUDITED = 4000  # test images, which no training has seen


class Compared(BaseModel):
    """A defense of the table.

    Attributes:
        title: In words.
        defense: With its options.
        masking: Mode of masks over it.
        lr: Learning rate in place of the table's, with which it would diverge.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    defense: Annotated[Defense, DEFENSES]
    masking: Masking = "none"
    lr: float | None = None


@cache
def compared() -> dict[str, Compared]:
    """The table's defenses by name."""
    text = (files("fedkl.reproduce") / "defenses.toml").read_text(encoding="utf-8")
    found: dict[str, Compared] = TypeAdapter(dict[str, Compared]).validate_python(parse_toml(text))
    return found


@dataclass(frozen=True, kw_only=True)
class DefensesTable:
    """Which cells are run, and how long.

    Attributes:
        row: Network and data, a name of `fedkl.attacking.matrix.ROWS`; not used where there is a `subject`.
        subject: Somebody's own, which is audited and not trained; None: the row's.
        defenses: Names of `compared`; empty: all.
        rounds: Of a training.
        clients: Share the training images, IID.
        images: Training images of all clients together; None: all there are.
        seeds: Trainings of each defense.
        images_per_client: Behind an audited epoch.
        minutes: Of an audit.
        seed: The first training's, and the audits'.
        data_root: Folder of the datasets; None: the usual one.

    Raises:
        ConfigError: A name is not known, or a number out of range.
    """

    row: str = "lenet/mnist"
    subject: Subject | None = None
    defenses: tuple[str, ...] = ()
    rounds: int = 20
    clients: int = 3
    images: int | None = 12_000
    seeds: int = 1
    images_per_client: int = 100
    minutes: float = 4.0
    seed: int = 0
    data_root: str | None = None

    def __post_init__(self) -> None:
        check_names((self.row,), ROWS, place=NAME)
        if self.defenses:
            check_names(self.defenses, compared(), place=NAME)
        counts = {name: getattr(self, name) for name in ("rounds", "clients", "seeds", "images_per_client")}
        wrong = [f"{name} ≥ 1, got {value}" for name, value in counts.items() if value < 1]
        if wrong or not self.minutes > 0:
            expected = ", ".join([*wrong, *([] if self.minutes > 0 else ["minutes above 0"])])
            raise ConfigError(f"reproduce {NAME}: expected {expected}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The defenses, the plain network first: it is what all are compared with."""
        return tuple(dict.fromkeys((PLAIN, *(self.defenses or compared()))))

    @property
    def plan(self) -> str:
        """What is run, and the time of the audits, in a sentence."""
        trained, audited = len(self.trainings()), len(self.names)
        trainings = (
            f"{trained} training{'s' * (trained > 1)} of {self.rounds} rounds, then " if trained else ""
        )
        return (
            f"Plan: {trainings}{audited} audit{'s' * (audited > 1)} of up to about {self.minutes:g} minutes "
            f"each, {self.minutes * audited:g} together. What is done already is not repeated."
        )

    def trainings(self) -> list[Training]:
        """Every training, the plain network's first; none of somebody's own subject."""
        if self.subject is not None:
            return []
        return [
            Training(name=name, place=Path("trained", f"{name}-seed-{seed}"), experiment=experiment)
            for seed in range(self.seed, self.seed + self.seeds)
            for name in self.names
            for experiment in [self._experiment(compared()[name], seed)]
        ]

    def _experiment(self, wanted: Compared, seed: int) -> TrainConfig:
        return TrainConfig(
            seed=seed,
            data=DataConfig(name=ROWS[self.row][1], root=self.data_root, train_images=self.images),
            model=self._model(),
            defense=wanted.defense,
            training=FederatedTraining(
                clients=self.clients,
                rounds=self.rounds,
                eval_every=self.rounds,
                local=self._procedure(LocalTraining(), wanted),
                aggregation=(
                    PlainAggregation() if wanted.masking == "none" else MaskedAggregation(mode=wanted.masking)
                ),
            ),
        )

    def _model(self, weights: str | None = None) -> ModelConfig:
        name = ROWS[self.row][0]
        return ModelConfig(name=name, initialization=start_of(name), standardize=True, weights=weights)

    def _procedure(self, like: Any, wanted: Compared) -> Any:
        """What clients do: an epoch of SGD with momentum."""
        lr = wanted.lr or _LR.get(ROWS[self.row][0], _USUAL_LR)
        how = {"algorithm": "fedavg", "batch_size": 32, "lr": lr, "momentum": 0.9, "weight_decay": 0.0}
        return replace(like, **how)

    def audited(self, out: Path) -> Subject:
        """What is audited: somebody's own, or the row's network with the weights of its plain training."""
        if self.subject is not None:
            return self.subject
        plain = next(each for each in self.trainings() if each.name == PLAIN)
        data = DataConfig(name=ROWS[self.row][1], root=self.data_root)
        about = AttackConfig(data=data, model=self._model(str(out / plain.place)), networks="one")
        dataset = configured.dataset_of(data)
        trained = configured.networks_of(about, dataset)(0)
        untrained = configured.networks_of(about.model_copy(update={"model": self._model()}), dataset)
        images = dataset.test_images[:_AUDITED]
        return Subject(
            name=self.row,
            model=lambda: untrained(self.seed),
            weights={name: tensor.detach().clone() for name, tensor in trained.state_dict().items()},
            images=images,
            labels=dataset.test_labels[: len(images)],
            procedure=self._procedure(Procedure(algorithm="fedavg"), compared()[PLAIN]),
            images_per_client=self.images_per_client,
            classes=dataset.spec.classes,
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of the table.

    Attributes:
        name: The defense's.
        place: Its run directory, below the table's folder.
        experiment: What is run.
    """

    name: str
    place: Path
    experiment: TrainConfig


def defenses(wanted: DefensesTable, *, out: Path, progress: OpenProgress) -> list[Record]:
    """Trains and audits what is not done yet, and sets one beside the other.

    A defense that cannot be trained with, or not audited, on this network stands in the table with the
    reason.

    Args:
        wanted: What.
        out: The table's folder: table.json, table.md and defenses.png are written.
        progress: Opens a progress display for a cell's name.

    Returns:
        One record a defense.

    Raises:
        ConfigError: The folder is another table's, or one below it holds a run or an audit with other
            settings; no table is written then.
        DataError: The data are not there.
    """
    trained: dict[str, list[RunDirectory | FedKLError]] = {name: [] for name in wanted.names}
    cells = run_cells(
        wanted.trainings(),
        experiments.run,
        table=NAME,
        out=out,
        progress=progress,
        passed_over=(FedKLError,),
    )
    for cell, found in cells:
        trained[cell.name].append(found)
    subject = wanted.audited(out)
    records: list[Record] = []
    for name in wanted.names:
        audited = _audited(wanted, name, subject, out=out, progress=progress)
        records.append(_record(name, trained[name], audited))
        write_table(out, records, markdown(records, row=subject.name))
    write_atomically(out / _FIGURE, figures.frontier(points(records, row=subject.name), share=_AXIS))
    return records


def _audited(
    wanted: DefensesTable, name: str, subject: Subject, *, out: Path, progress: OpenProgress
) -> Audit | FedKLError:
    each = compared()[name]
    own = wanted.subject is not None  # whose learning rate is the owner's, as nothing is trained here
    if each.lr is not None and not own and isinstance(subject.procedure, Procedure):
        subject = replace(subject, procedure=replace(subject.procedure, lr=each.lr))
    place = Path("audited", name)
    with progress(str(place)) as step:
        try:
            return audit(
                subject,
                out=out / place,
                defense=each.defense,
                masking=each.masking,
                minutes=wanted.minutes,
                seed=wanted.seed,
                progress=step,
            )
        except FolderError:
            raise  # says nothing of the defense
        except FedKLError as error:
            return error


def _record(name: str, trained: Sequence[RunDirectory | FedKLError], found: Audit | FedKLError) -> Record:
    each = compared()[name]
    summaries = [run.summary for run in trained if isinstance(run, RunDirectory) and run.summary is not None]
    accuracies = [float(summary["accuracy"]) for summary in summaries]
    reasons = [str(problem) for problem in (*trained, found) if isinstance(problem, FedKLError)]
    return {
        "name": name,
        "title": each.title,
        "defense": each.defense.describe(),
        "masking": each.masking,
        "accuracy": fmean(accuracies) if accuracies else None,
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "seeds": len(accuracies),
        "epsilon": max((_epsilon(summary) for summary in summaries if summary["privacy"]), default=None),
        "exposed": {} if isinstance(found, FedKLError) else _exposed(found),
        "reasons": list(dict.fromkeys(reasons)),
    }


def _epsilon(summary: Mapping[str, Any]) -> float:
    """Of the client that spent most."""
    return float(max(summary["privacy"]["epsilon"].values()))


def _exposed(found: Audit) -> dict[str, Exposed]:
    """By exposure: what presence and the worst attacker of pictures found."""
    exposed: dict[str, Exposed] = {}
    for exposure in found.settings.exposures:
        here = [each for each in found.findings if each.exposure == exposure.name]
        presence = [each for each in here if each.question == "presence"]
        pictures = [each for each in here if each.question == "identified"]
        worst = max(pictures, key=_severity, default=None)
        undecided = [each for each in pictures if each.outcome == "says nothing"]
        exposed[exposure.name] = {
            "title": exposure.title,
            "presence": _share(presence[0]) if presence else None,
            "identified": _share(worst) | {"undecided": _better(undecided, worst)} if worst else None,
        }
    return exposed


def _severity(each: Finding) -> tuple[bool, bool, float]:
    """Leaks first, then what says something, then the larger share."""
    return each.outcome == "leaks", each.outcome == "at the floor", each.found.rate


def _better(undecided: Sequence[Finding], worst: Finding) -> list[str]:
    """Attackers that found more than the one that something can be said of, and nothing can of them."""
    return [each.attacker for each in undecided if each.found.rate > worst.found.rate]


def _share(each: Finding) -> dict[str, Any]:
    return {
        "attacker": each.attacker,
        "outcome": each.outcome,
        **each.found.model_dump(),
        "floor": None if each.floor is None else each.floor.rate,
        "auc": each.figures.get("auc"),
    }
