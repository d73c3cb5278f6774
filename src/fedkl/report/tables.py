"""The report's tables, from the summaries that the runs left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedkl import wording
from fedkl.attacking.results import SSIM_SUCCESS, SUCCESS_DB
from fedkl.attacking.verdict import CONTROL_SHARE, SAFE_FROM, Verdict
from fedkl.attacking.views import chosen_arms
from fedkl.attacks import IDLG
from fedkl.data import IID
from fedkl.paper.published import published
from fedkl.report import verdict
from fedkl.report.collect import AttackRun, TrainRun
from fedkl.report.page import Table

ACCURACY_COLUMN = "Accuracy, mean (min–max)"
OWN_COLUMN = "On own classes, mean (min–max)"
PAPER_COLUMN = "Paper, full MNIST, 200 rounds"
_PAPER_ARMS = {
    ("none", 1): "centralized",
    ("keylock", 1): "centralized-lock",
    ("none", 3): "fedavg",
    ("keylock", 3): "fedkl",
}
"""The paper's name of a defense and a number of clients."""
_SCALING = {"clip": "clipped to [0, 1]", "prior": "stretched to [0, 1]"}
_READS = {"updates": "every update", "sum": "the sum", "nothing": "nothing"}
_FILL_INS = {
    "neutral": "neutral: γ = 1, β = 0",
    "random-key": "random-key: a key and lock layers of its own",
    "mean-affine": "mean-affine: the clients' mean γ and β (ORACLE, no server has it)",
    "refit": "refit: γ and β fitted to the auxiliary labels",
}


def verdict_table(findings: Sequence[verdict.Finding]) -> Table:
    """Question, measurement, verdict."""
    return Table(
        title="Question by question",
        header=["Question", "Measured", "Verdict"],
        rows=[[finding.question, finding.measured, finding.verdict] for finding in findings],
        tones=[finding.tone for finding in findings],
        notes=[
            f"An image is recovered from {SUCCESS_DB:.0f} dB on, and identified if of all candidates it "
            "correlates best with the picture. A leak is what lies above the floor: above what the mean of "
            "other images with the same label gives. An arm is at the floor only where the same attack finds "
            f"at least {CONTROL_SHARE:.0%} of its control's images, and with at least {SAFE_FROM} images; "
            "otherwise it says nothing. A leak that is seen counts in any case. Controls hide nothing from "
            "the server: they test the attack.",
        ],
    )


def training_table(trains: Sequence[TrainRun]) -> Table:
    """Accuracy and cost of every training run; a column that says nothing of any run is left out."""
    cells: dict[str, Callable[[TrainRun], str]] = {
        "Run": lambda run: run.name,
        "Defense": lambda run: run.config.defense.describe(),
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
        notes=_training_notes(trains, own_classes=OWN_COLUMN in columns),
    )


def _training_notes(trains: Sequence[TrainRun], *, own_classes: bool) -> list[str]:
    notes = [
        "Test accuracy of the global model after the last round; with private tensors each client adds "
        "its own, hence mean and range over clients. One run per row: another seed gives another figure.",
    ]
    if own_classes:
        notes.append(
            "On own classes: the same model on a test set in which the classes are as frequent as in the "
            "client's own training images, where these differ between clients. It is what a client gets in "
            "its own use; a client of few classes has an easier test."
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
    parts = {
        f"{training.cohort_size} of {training.clients} clients sampled each round": (
            training.cohort_size < training.clients
        ),
        f"dropouts of sampled clients: {s.get('dropped')}": s.get("dropped"),
        f"updates refused: {s.get('failed')}": s.get("failed"),
        f"rounds skipped for lack of updates: {s.get('skipped_rounds')}": s.get("skipped_rounds"),
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
    if model != "lenet" or not data.startswith("mnist") or not isinstance(training.partition, IID):
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
    left_out = [run.name for run in trains if not run.fill_ins]
    notes = [f"Left out, as they keep nothing private: {', '.join(left_out)}."] if left_out else []
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


def attack_table(run: AttackRun, *, titled: bool) -> Table:
    """Everything measured about the arms of an attack run."""
    judgments = [verdict.judge(arm, run) for arm in run.arms.values()]
    name, size = verdict.attack_name(run), run.config.batch_size
    where = f" ({run.name})" if titled else ""
    return Table(
        title=f"{name}{where}: {run.config.trials} trials, batch size {size}, {_networks(run)}",
        header=[
            "Arm",
            "The server knows",
            "Scale fixed by",
            "n (images)",
            "Failures",
            "PSNR in dB, median [95 %]",
            "PSNR in dB, mean ± std",
            "SSIM, median",
            "PSNR in dB after the best affine fit, median (diagnostic: uses the truth)",
            f"Recovered, ≥ {SUCCESS_DB:.0f} dB [95 %]",
            f"Attack success rate, SSIM ≥ {SSIM_SUCCESS} [95 %]",
            "Identified [95 %]",
            "Candidates",
            "Label found",
            "Evaluations, median",
            "Attacker's loss, median",
            "Verdict",
        ],
        rows=[_attack_row(arm, run, j) for arm, j in zip(run.arms.values(), judgments, strict=True)],
        narrow=(0, 5, 9, 11),
        turned=True,
        notes=_attack_notes(run),
    )


def _networks(run: AttackRun) -> str:
    if run.config.model.weights is not None:
        return "a trained network"
    return f"untrained networks ({run.summary['initialization']} initialization)"


def _attack_notes(run: AttackRun) -> list[str]:
    batch_size = run.config.batch_size
    notes = [
        "Failures (no finite picture) count in n as not recovered and not identified; medians and means are "
        "over the others. Intervals: of the median by order statistics (a dash: too few trials), of shares "
        "after Wilson.",
        "Behind a norm the gradient leaves the picture's scale open; the attacker then stretches it to fill "
        "[0, 1]. Identified: of all candidates the true image correlates best, which no scale can change.",
    ]
    if run.summary.get("floor"):
        guess = run.summary["floor"]["identified"]
        notes.append(f"The floor, a guess from the labels alone: {wording.count_interval(guess)} identified.")
    for each in run.summary.get("not_run", []):
        trials = f", {each['trials']} of {run.config.trials} trials" if each["kind"] == "broke" else ""
        notes.append(f"Not attacked: {each['arm']}{trials}: {each['kind']}. {each['reason']}")
    if batch_size > 1:
        notes.append(
            "In a batch, pictures are matched to the true images first, which lifts identification by chance "
            f"to at most {batch_size} in as many as there are candidates."
        )
    return notes


def _attack_row(arm: dict[str, Any], run: AttackRun, judgment: Verdict) -> list[str]:
    figures = arm["figures"]
    given = run.config.labels_known and not isinstance(run.config.attack, IDLG)
    return [
        arm["name"],
        _knows(arm, run),
        _SCALING[arm["scaling"]],
        str(figures["psnr"]["n"]),
        str(figures["psnr"]["failures"]),
        wording.median_interval(figures["psnr"]),
        wording.mean_spread(figures["psnr"]),
        wording.number(figures["ssim"]["median"], digits=2),
        wording.number(figures["psnr_affine"]["median"]),
        wording.count_interval(arm["success"]),
        _similar(arm),
        wording.count_interval(arm["identified"]),
        str(arm["candidates"]),
        "given" if given else wording.count(arm["label_correct"]),
        wording.number(arm["evaluations"]["median"], digits=0),
        wording.small(arm["loss"]["median"]),
        judgment.text,
    ]


def _similar(arm: dict[str, Any]) -> str:
    """Summaries of older runs have no rate of similar images."""
    rate = arm.get("ssim_success")
    return wording.NONE if rate is None else wording.count_interval(rate)


def _knows(arm: dict[str, Any], run: AttackRun) -> str:
    """What the server was granted and the attack uses: iDLG infers the label, granted or not."""
    if not isinstance(run.config.attack, IDLG):
        return str(arm["knows"])
    unlabeled = run.config.model_copy(update={"labels_known": False})
    knowledge = {other.name: other.knowledge for other in chosen_arms(unlabeled)}[arm["name"]]
    return f"{knowledge.describe()}; label inferred"
