"""The report's tables of trainings, from the summaries that the runs left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedkl import wording
from fedkl.data import IID
from fedkl.defenses import NoDefense
from fedkl.paper.published import published
from fedkl.report.collect import TrainRun
from fedkl.report.page import Table

ACCURACY_COLUMN = "Accuracy, mean (min–max)"
OWN_COLUMN = "On own classes, mean (min–max)"
PAPER_COLUMN = "Paper, full MNIST, 200 rounds"
_SIDE_BY_SIDE = 5  # runs that a page has room for; it has none for a column of each figure
_PAPER_ARMS = {
    ("none", 1): "centralized",
    ("keylock", 1): "centralized-lock",
    ("none", 3): "fedavg",
    ("keylock", 3): "fedkl",
}
"""The paper's name of a defense and a number of clients."""
_READS = {"updates": "every update", "sum": "the sum", "nothing": "nothing"}
_FILL_INS = {
    "neutral": "neutral: γ = 1, β = 0",
    "random-key": "random-key: a key and lock layers of its own",
    "mean-affine": "mean-affine: the clients' mean γ and β (ORACLE, no server has it)",
    "refit": "refit: γ and β fitted to the auxiliary labels",
}


def training_table(trains: Sequence[TrainRun]) -> Table:
    """Accuracy and cost of every training run; a column that says nothing of any run is left out."""
    cells: dict[str, Callable[[TrainRun], str]] = {
        "Run": lambda run: run.name,
        "Defense": _defense,
        "The server reads": lambda run: _READS[run.config.training.aggregation.server_learns],
        "Norm statistics": _statistics,
        "Clients": lambda run: str(run.summary["clients"]),
        "Rounds": lambda run: str(run.summary["rounds"]),
        ACCURACY_COLUMN: lambda run: _accuracy(run.summary["accuracy"], run.summary["accuracies"]),
        OWN_COLUMN: _own_classes,
        "Best round": lambda run: wording.percent(run.summary["best_accuracy"], digits=2),
        "Privacy spent": _privacy,
        "Public parameters": lambda run: f"{run.summary['public_parameters']:,}",
        "Private parameters": lambda run: f"{run.summary['private_parameters']:,}",
        "Bytes per update": lambda run: f"{run.summary['update_bytes']:,}",
        "Seconds": lambda run: f"{run.summary['seconds']:.0f}",
        PAPER_COLUMN: _paper,
    }
    columns = {name: [cell(run) for run in trains] for name, cell in cells.items()}
    usual = ({wording.NONE}, {_READS["updates"]})
    columns = {name: column for name, column in columns.items() if set(column) not in usual}
    essential = {"Run", "The server reads", "Rounds", "Privacy spent"}
    essential |= {ACCURACY_COLUMN, OWN_COLUMN, PAPER_COLUMN}
    return Table(
        title="Training runs",
        header=list(columns),
        rows=[list(row) for row in zip(*columns.values(), strict=True)],
        narrow=tuple(index for index, name in enumerate(columns) if name in essential),
        turned=len(trains) <= _SIDE_BY_SIDE,
        notes=_training_notes(trains, own_classes=OWN_COLUMN in columns),
    )


def _defense(run: TrainRun) -> str:
    """What protects its clients: the defense, the masks over its updates, or both."""
    defense, masks = run.config.defense, run.config.training.aggregation.describe()
    if not masks:
        return defense.describe()
    return masks if defense == NoDefense() else f"{defense.describe()} and {masks}"


def _training_notes(trains: Sequence[TrainRun], *, own_classes: bool) -> list[str]:
    notes = [
        "Test accuracy of the global model after the last round. Where clients keep private tensors, each "
        "adds its own: the table has mean and range over clients. One run per row: another seed gives "
        "another figure.",
    ]
    if own_classes:
        notes.append(
            "On own classes: the same model, tested on classes as frequent as in the client's own training "
            "images. It is what a client gets in its own use. A client of few classes has an easier test."
        )
    notes.append(
        "A lock adds norm layers to a network that has none, such as LeNet. public-norm is the network of "
        "the lock with public γ and β, and its difference to the lock is what the lock costs.",
    )
    return notes + _privacy_notes(trains) + _participation_notes(trains)


def _privacy(run: TrainRun) -> str:
    """ε of the client that spent most."""
    spent = run.summary.get("privacy")
    return wording.NONE if spent is None else f"ε = {max(spent['epsilon'].values()):.2f}"


def _privacy_notes(trains: Sequence[TrainRun]) -> list[str]:
    """What ε is of, and who spent it."""
    notes = []
    for run in trains:
        spent = run.summary.get("privacy")
        if spent is None:
            continue
        each, budget = spent["epsilon"].values(), spent["budget"]
        limit = "" if budget is None else f", budget {budget:g}"
        notes.append(
            f"{run.name}: clients spent ε = {min(each):.2f} to {max(each):.2f} at δ = {spent['delta']:g}"
            f"{limit}; protected: {spent['protects']}. Each round of each client is in ledger.jsonl."
        )
    return notes


def _participation_notes(trains: Sequence[TrainRun]) -> list[str]:
    """Runs in which not every client took part in every round, those with the same figures together."""
    said: dict[str, list[str]] = {}
    for run in trains:
        text = _participation(run)
        if text:
            said.setdefault(text, []).append(run.name)
    return [f"{', '.join(names)}: {text}." for text, names in said.items()]


def _participation(run: TrainRun) -> str:
    training, s = run.config.training, run.summary
    tested = len(s["accuracies"])
    lost = s.get("lost_rounds", 0)  # masks that could not be taken away: all updates were there
    skipped = s.get("skipped_rounds", 0) - lost
    reason = next((r["lost"].rstrip(".") for r in run.records if r.get("lost")), wording.NONE)
    parts = {
        f"{training.cohort_size} of {training.clients} clients sampled each round": (
            training.cohort_size < training.clients
        ),
        f"dropouts of sampled clients: {s.get('dropped')}": s.get("dropped"),
        f"updates refused: {s.get('failed')}": s.get("failed"),
        f"rounds skipped for lack of updates: {skipped}": skipped,
        f"rounds lost: {lost}, the first because: {reason}": lost,
        f"{tested} of {s['clients']} clients tested": tested < s["clients"],
    }
    return "; ".join(text for text, holds in parts.items() if holds)


def _own_classes(run: TrainRun) -> str:
    """Where all clients have the same class frequencies, or an older run did not test it: a dash."""
    mean = run.summary.get("local_accuracy")
    if mean is None or isinstance(run.config.training.partition, IID):
        return wording.NONE
    evaluated = [r["local_accuracies"] for r in run.records if r.get("local_accuracies")]
    return _accuracy(mean, evaluated[-1] if evaluated else {})


def _accuracy(mean: float, clients: Mapping[str, float]) -> str:
    text = wording.percent(mean, digits=2)
    each = clients.values()
    return f"{text} ({100 * min(each):.2f}–{100 * max(each):.2f})" if len(each) > 1 else text


def _statistics(run: TrainRun) -> str:
    """As recorded; None is a network whose norms have none, and an older run says nothing."""
    shared = {True: "shared", False: "private", None: "none"}
    return shared.get(run.summary.get("statistics_shared", wording.NONE), wording.NONE)


def _paper(run: TrainRun) -> str:
    """The printed figure, for the paper's network, data and clients."""
    model, data, training = run.config.model.name, run.config.data.name, run.config.training
    if model != "lenet" or data != "mnist" or not isinstance(training.partition, IID):
        return wording.NONE
    arm = _PAPER_ARMS.get((run.config.defense.type, training.clients))
    return wording.NONE if arm is None else f"{published('table1')['lenet/mnist']['expected'][arm]:.2f} %"


def fill_in_table(trains: Sequence[TrainRun]) -> Table:
    """Claim (b): the server's own completions beside the clients' models."""
    rows = [_fill_in_row(run, fill_in) for run in trains for fill_in in run.fill_ins]
    tested = {
        f"{run.summary['test_images'] - run.config.auxiliary} of the {run.summary['test_images']}"
        for run in trains
        if run.fill_ins and "test_images" in run.summary
    }
    text = f" ({'; '.join(sorted(tested))} here)" if tested else ""
    reasons: dict[str, list[str]] = {}
    for run in trains:
        if not run.fill_ins:
            unread = run.config.training.aggregation.server_learns == "nothing"
            why = "as the server cannot read their model" if unread else "as they keep no γ, β or layer"
            reasons.setdefault(why, []).append(run.name)
    notes = [f"Left out, {why}: {', '.join(names)}." for why, names in reasons.items()]
    return Table(
        title="The server completes the global model itself",
        header=["Run", "Fill-in", "Norm statistics", "Accuracy", "Clients' own", "Difference"],
        rows=rows,
        narrow=(0, 1, 2, 3, 4),
        notes=[
            "Auxiliary images are taken from the test set and not tested on, so fill-ins are tested on fewer "
            f"images than the clients' models{text}.",
            "A published implementation fills in γ = β = 0, with which any model fails: left out here.",
            *notes,
        ],
    )


def _fill_in_row(run: TrainRun, fill_in: dict[str, Any]) -> list[str]:
    statistics = {"initial": "mean 0, variance 1", "public": "public: the federation's own"}
    estimated = f"from {fill_in['auxiliary']} auxiliary images"
    own = run.summary["accuracy"]
    labels = f" ({fill_in['auxiliary']})" if fill_in["arm"] == "refit" else ""
    return [
        run.name,
        _FILL_INS.get(fill_in["arm"], fill_in["arm"]) + labels,
        statistics.get(fill_in["statistics"], estimated),
        wording.percent(fill_in["accuracy"], digits=2),
        wording.percent(own, digits=2),
        wording.points(fill_in["accuracy"] - own),
    ]
