"""The command line: parses arguments, shows progress and errors; no logic of its own."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import fedkl
from fedkl import config as configs
from fedkl import data, demo, experiments, lockfile, report, reproduce, study
from fedkl import generator_training as generators
from fedkl.attacks import ATTACKS
from fedkl.errors import ConfigError, FedKLError
from fedkl.lockfile import PASSPHRASE_VARIABLE
from fedkl.runs import RunDirectory

app = typer.Typer(
    name="fedkl",
    help="What does my federated learning leak, and what stops it?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Datasets: list and fetch.", no_args_is_help=True)
key_app = typer.Typer(help="Key files: new, info, rotate, passphrase.", no_args_is_help=True)
generator_app = typer.Typer(help="The generators that the attack ggl searches.", no_args_is_help=True)
reproduce_app = typer.Typer(help="The paper's tables, beside the print.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(key_app, name="key")
app.add_typer(generator_app, name="generator")
app.add_typer(reproduce_app, name="reproduce")

console = Console(emoji=False)
_NEW_PASSPHRASE_VARIABLE = "FEDKL_NEW_PASSPHRASE"  # noqa: S105 (a name, not a passphrase)

OutOption = Annotated[Path, typer.Option("--out", help="Run directory; a finished run is not repeated.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; flags override its fields.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of weights, partition, batches and attack starts.")
]
DataOption = Annotated[str | None, typer.Option("--data", help="Dataset name; see `fedkl data list`.")]
RootOption = Annotated[str | None, typer.Option(help="Folder of the datasets.")]
ModelOption = Annotated[str | None, typer.Option(help="Model of the zoo.")]
LockOption = Annotated[str | None, typer.Option(help="default, or published (uniform key, ReLU).")]
LayersOption = Annotated[str | None, typer.Option(help="Locked layers: first, all or classifier.")]
InitOption = Annotated[str | None, typer.Option(help="Initial weights: default or uniform (U(−0.5, 0.5)).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of config.toml: training.local.proximal=0.01.")
]
TableOption = Annotated[Path, typer.Option("--out", help="Folder of the table; finished rows are kept.")]
RowsOption = Annotated[str, typer.Option(help="Comma-separated, e.g. dlg/lenet/mnist; all: every row.")]
ArmsOption = Annotated[str, typer.Option(help="Comma-separated, see `fedkl reproduce threats`.")]
TrialsOption = Annotated[int, typer.Option(help="Test images attacked, one network each.")]
BudgetOption = Annotated[reproduce.Budget, typer.Option(help="quick: minutes, marked as such. paper: hours.")]
FirstSeedOption = Annotated[
    int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of weights and attacks.")
]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")]
WorkersOption = Annotated[int, typer.Option(help="Threads that share the trials; 0: all cores.")]
PlainOption = Annotated[bool, typer.Option("--unencrypted", help="Leave the file unencrypted.")]


@contextmanager
def _progress(title: str) -> Iterator[study.Progress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task(title, total=None, note="")

        def step(done: int, total: int, note: str, /) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield step


def _run(
    experiment: configs.TrainConfig | configs.AttackConfig, out: Path, *, tensorboard: bool = False
) -> None:
    with _progress(experiment.type) as progress:
        run = experiments.run(experiment, out=out, progress=progress, tensorboard=tensorboard)
    _finish(run.path)


@app.command()
def train(
    out: OutOption,
    config: ConfigOption = None,
    defense: Annotated[
        str | None,
        typer.Option(
            help="none, keylock, private-layers, or the norm-matched controls public-norm and private-norm."
        ),
    ] = None,
    lock: LockOption = None,
    layers: LayersOption = None,
    data_name: DataOption = None,
    data_root: RootOption = None,
    model: ModelOption = None,
    initialization: InitOption = None,
    standardize: Annotated[
        bool | None,
        typer.Option("--standardize/--raw", help="Let the model standardize its input by channel."),
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients sampled each round; all if not given.")] = None,
    centralized: Annotated[bool, typer.Option("--centralized", help="One client with all the data.")] = False,
    partition: Annotated[
        str | None, typer.Option(help="iid, shards:<per client> or dirichlet:<alpha>.")
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="fedavg (weights) or fedsgd (gradients).")] = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local epochs of a round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, before its schedule.")] = None,
    augmentation: Annotated[
        str | None, typer.Option(help="none, flip, crop-flip or resized-crop-flip.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Rounds between evaluations.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Clients that train at once; 0: automatic.")] = None,
    settings: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, as its config.toml says.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard events too (fedkl[tensorboard]).")
    ] = False,
    seed: SeedOption = None,
) -> None:
    """Federated training in one process, then the server's own model under every fill-in.

    The same command goes on with a run that was interrupted; --resume does so without the other flags.
    """
    if centralized and clients not in (None, 1):
        raise ConfigError(f"--centralized is one client; got --clients {clients}. Give one of the two.")
    fields = {
        "seed": seed,
        "data.name": data_name,
        "data.root": data_root,
        "model.name": model,
        "model.initialization": initialization,
        "model.standardize": standardize,
        "training.clients": 1 if centralized else clients,
        "training.cohort": cohort,
        "training.partition": None if partition is None else configs.partition_fields(partition),
        "training.rounds": rounds,
        "training.eval_every": eval_every,
        "training.local.algorithm": algorithm,
        "training.local.epochs": epochs,
        "training.local.batch_size": batch_size,
        "training.local.lr": lr,
        "training.local.augmentation": augmentation,
        "execution.device": device,
        "execution.workers": workers,
    }
    experiment: configs.TrainConfig | configs.AttackConfig
    if resume:
        experiment = _resumed(
            out,
            fields | {"config": config, "defense": defense, "lock": lock, "layers": layers, "set": settings},
        )
    else:
        experiment = configs.from_flags(
            "train",
            file=config,
            fields=fields,
            defense=defense,
            lock=lock,
            layers=layers,
            settings=settings or (),
        )
    _run(experiment, out, tensorboard=tensorboard)


def _resumed(out: Path, flags: dict[str, object]) -> configs.TrainConfig:
    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise ConfigError(f"--resume takes the experiment from {out}; leave out {', '.join(given)}.")
    experiment = RunDirectory.open(out).config
    if not isinstance(experiment, configs.TrainConfig):
        raise ConfigError(f"{out}: not a training. Repeat the command that started it to go on with it.")
    return experiment


@app.command()
def attack(
    out: OutOption,
    config: ConfigOption = None,
    kind: Annotated[str | None, typer.Option("--attack", help=f"{', '.join(ATTACKS.names())}.")] = None,
    arms: Annotated[
        str | None, typer.Option(help="Comma-separated arms; the lock and its controls if not given.")
    ] = None,
    lock: LockOption = None,
    layers: LayersOption = None,
    labels: Annotated[
        bool | None, typer.Option("--labels-known/--labels-unknown", help="Grant the labels, in every arm.")
    ] = None,
    auxiliary: Annotated[int | None, typer.Option(help="Labeled images that the server owns.")] = None,
    trials: Annotated[int | None, typer.Option(help="Test images, or batches of them, attacked.")] = None,
    networks: Annotated[str | None, typer.Option(help="each: one per trial; one: the same for all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images behind one gradient.")] = None,
    updates_per_client: Annotated[
        int | None, typer.Option(help="Trials in a row with one client's key; needs --networks one.")
    ] = None,
    cohort: Annotated[
        int | None, typer.Option(help="Clients that share a batch; their mean is seen.")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(help="Budget of one start, in evaluations.")] = None,
    restarts: Annotated[int | None, typer.Option(help="Starts per image.")] = None,
    weighting: Annotated[str | None, typer.Option(help="Of layers: none, sqrt or full.")] = None,
    history: Annotated[int | None, typer.Option(help="Correction pairs of L-BFGS.")] = None,
    box: Annotated[float | None, typer.Option(help="Weight of the prior that pixels are in [0, 1].")] = None,
    norm_mode: Annotated[str | None, typer.Option(help="Of the client's norms: train or eval.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="SGD steps behind one update.")] = None,
    data_name: DataOption = None,
    data_root: RootOption = None,
    model: ModelOption = None,
    initialization: InitOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that share the trials; 0: all cores.")] = None,
    settings: SetOption = None,
    seed: SeedOption = None,
) -> None:
    """Gradient inversion of the key-lock and its controls. An interrupted attack goes on.

    Attacks differ in their options; --set attack.NAME=VALUE sets any of them.
    """
    fields = {
        "seed": seed,
        "data.name": data_name,
        "data.root": data_root,
        "model.name": model,
        "model.initialization": initialization,
        "arms": None if arms is None else _names(arms),
        "labels_known": labels,
        "auxiliary": auxiliary,
        "trials": trials,
        "networks": networks,
        "batch_size": batch_size,
        "updates_per_client": updates_per_client,
        "cohort": cohort,
        "norm_mode": norm_mode,
        "local.steps": local_steps,
        "device": device,
        "workers": workers,
        "attack.evaluations": evaluations,
        "attack.restarts": restarts,
        "attack.weighting": weighting,
        "attack.history": history,
        "attack.box": box,
    }
    experiment = configs.from_flags(
        "attack",
        file=config,
        fields=fields,
        attack=kind,
        lock=lock,
        layers=layers,
        settings=settings or (),
    )
    _run(experiment, out)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Where the runs and the report go.")] = Path("runs/demo"),
) -> None:
    """The main job end to end on real images: train with and without the lock, attack both, report."""
    demo.run(out, progress=_progress)
    _finish(out)


@reproduce_app.command("table1")
def reproduce_table1(
    out: Annotated[Path, typer.Option("--out", help="Folder of the table; finished cells are kept.")],
    rows: Annotated[str, typer.Option(help="Comma-separated, e.g. resnet20/cifar10; all: every row.")] = (
        "lenet/mnist"
    ),
    arms: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(reproduce.Table1.arms),
    seeds: Annotated[int, typer.Option(help="Runs of each cell.")] = 3,
    first_seed: Annotated[int, typer.Option(help="Seeds count from here.")] = 0,
    budget: Annotated[
        reproduce.Budget, typer.Option(help="quick: minutes, marked as such. paper: 200 rounds.")
    ] = "quick",
    rounds: Annotated[int | None, typer.Option(help="Rounds, instead of the budget's.")] = None,
    pairs: Annotated[
        reproduce.Pairs,
        typer.Option(help="matched: one network a row. published: the paper's two different ones."),
    ] = "matched",
    clients: Annotated[int, typer.Option(help="Clients of the federated arms; the paper has 3.")] = 3,
    partition: Annotated[str, typer.Option(help="iid, shards:<per client> or dirichlet:<alpha>.")] = "iid",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")] = "cpu",
    data_root: RootOption = None,
) -> None:
    """Test accuracy with and without the lock, beside the paper's. An interrupted table goes on."""
    table = reproduce.Table1(
        rows=tuple(reproduce.table1_rows()) if rows == "all" else _names(rows),
        arms=_names(arms),
        seeds=seeds,
        first_seed=first_seed,
        budget=budget,
        rounds=rounds,
        pairs=pairs,
        clients=clients,
        partition=configs.partition_of(partition),
        device=device,
        data_root=data_root,
    )
    reproduce.table1(table, out=out, progress=_progress)
    _print_table(out)


@reproduce_app.command("table6")
def reproduce_table6(
    out: TableOption,
    rows: RowsOption = "all",
    arms: ArmsOption = "no-norm,public-norm,lock,lock-known-both",
    trials: TrialsOption = 20,
    budget: BudgetOption = "quick",
    seed: FirstSeedOption = 0,
    lpips: Annotated[
        bool,
        typer.Option("--lpips", help="Measure LPIPS too; its weights must be there, see docs/attacks.md."),
    ] = False,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    data_root: RootOption = None,
    settings: SetOption = None,
) -> None:
    """Reconstruction with and without the lock, beside the paper's. An interrupted table goes on."""
    table = reproduce.LeakageTable(
        rows=tuple(reproduce.leakage_rows()) if rows == "all" else _names(rows),
        arms=_names(arms),
        trials=trials,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.leakage(table, out=out, progress=_progress, lpips=lpips)
    _print_table(out)


@reproduce_app.command("threats")
def reproduce_threats(
    out: TableOption,
    attack_row: Annotated[str, typer.Option(help="The row of Table 6 that is attacked.")] = "dlg/lenet/mnist",
    arms: ArmsOption = "all",
    trials: TrialsOption = 20,
    budget: BudgetOption = "quick",
    seed: FirstSeedOption = 0,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    data_root: RootOption = None,
    settings: SetOption = None,
) -> None:
    """One attack in every cell of the threat-model grid: what the server knows, and what it gets from it."""
    table = reproduce.LeakageTable(
        rows=(attack_row,),
        arms=reproduce.grid_arms() if arms == "all" else _names(arms),
        trials=trials,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.leakage(table, out=out, progress=_progress, described=True)
    _print_table(out)


@reproduce_app.command("table4")
def reproduce_table4(
    out: TableOption,
    rows: RowsOption = "all",
    arms: ArmsOption = "no-norm,lock",
    trials: TrialsOption = 8,
    budget: BudgetOption = "quick",
    seed: FirstSeedOption = 0,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    data_root: RootOption = None,
    settings: SetOption = None,
) -> None:
    """The pictures of DLG and GRNN: true, without lock, with lock."""
    table = reproduce.LeakageTable(
        rows=reproduce.rows_of("dlg", "grnn") if rows == "all" else _names(rows),
        arms=_names(arms),
        trials=trials,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.gallery(table, title="Table 4: DLG and GRNN", out=out, progress=_progress)
    _print_table(out, pictures=True)


@reproduce_app.command("table5")
def reproduce_table5(
    out: TableOption,
    rows: RowsOption = "all",
    arms: ArmsOption = "no-norm,lock",
    trials: TrialsOption = 4,
    repeats: Annotated[int, typer.Option(help="Results of each image and arm; the paper shows 4.")] = 4,
    budget: BudgetOption = "quick",
    seed: FirstSeedOption = 0,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    data_root: RootOption = None,
    settings: SetOption = None,
) -> None:
    """The pictures of GGL: true, four without lock, four with lock."""
    table = reproduce.LeakageTable(
        rows=reproduce.rows_of("ggl") if rows == "all" else _names(rows),
        arms=_names(arms),
        trials=trials,
        repeats=repeats,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.gallery(table, title="Table 5: GGL", out=out, progress=_progress)
    _print_table(out, pictures=True)


@reproduce_app.command("adaptive")
def reproduce_adaptive(
    out: TableOption,
    rows: RowsOption = "lenet/mnist",
    arrangements: Annotated[
        str, typer.Option(help=f"What clients keep, of {', '.join(reproduce.ARRANGEMENTS)}; or every.")
    ] = ",".join(reproduce.Matrix.arrangements),
    batches: Annotated[str, typer.Option(help="Images behind an update.")] = "1,4,16",
    steps: Annotated[str, typer.Option(help="Local steps behind an update.")] = "1,5",
    cohorts: Annotated[str, typer.Option(help="Clients over whose updates the server sees the mean.")] = "1",
    rungs: Annotated[str, typer.Option(help=f"Of {', '.join(reproduce.RUNGS)}.")] = "floor,learned",
    images: Annotated[
        int | None, typer.Option(min=1, help="Images counted in a cell, about; 20 or 100 if not given.")
    ] = None,
    auxiliary: Annotated[int, typer.Option(min=1, help="Labeled images that the server owns.")] = 8000,
    norm_mode: Annotated[str, typer.Option(help="Of the clients' norms: train or eval.")] = "train",
    accuracy: Annotated[
        bool, typer.Option("--frontier", help="Train too: what each arrangement costs, and a figure.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of --frontier's trainings; 20.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of --frontier's trainings; 3.")] = None,
    test_images: Annotated[
        int | None, typer.Option(min=1, help="On which --frontier's trainings are tested; all.")
    ] = None,
    seed: FirstSeedOption = 0,
    workers: WorkersOption = 0,
    data_root: RootOption = None,
    settings: SetOption = None,
) -> None:
    """Attackers who know the lock: the worst rung of every arrangement, its control and the floor."""
    matrix = reproduce.Matrix(
        rows=tuple(reproduce.ROWS) if rows == "all" else _names(rows),
        arrangements=tuple(reproduce.ARRANGEMENTS) if arrangements == "every" else _names(arrangements),
        batches=_numbers(batches),
        steps=_numbers(steps),
        cohorts=_numbers(cohorts),
        rungs=tuple(reproduce.RUNGS) if rungs == "all" else _names(rungs),
        images=images,
        auxiliary=auxiliary,
        norm_mode=norm_mode,
        seed=seed,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    given = {"rounds": rounds, "seeds": seeds, "test_images": test_images}
    trained = {name: number for name, number in given.items() if number is not None}
    if trained and not accuracy:
        named = ", ".join("--" + name.replace("_", "-") for name in trained)
        raise typer.BadParameter(f"{named}: only with --frontier, which trains.")
    if not accuracy:
        reproduce.adaptive(matrix, out=out, progress=_progress)
        _print_table(out)
        return
    wanted = reproduce.Frontier(matrix=matrix, **trained)
    reproduce.frontier(wanted, out=out, progress=_progress)
    _print_table(out)
    _print_table(out / "frontier")


def _print_table(out: Path, *, pictures: bool = False) -> None:
    text = (out / "table.md").read_text(encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Table: {out / 'table.md'}", soft_wrap=True, highlight=False)
    if pictures:
        console.print(f"Pictures: {out / 'pictures.html'}", soft_wrap=True, highlight=False)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(name) for name in _names(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text:.100}: expected whole numbers, e.g. 1,4,16.") from error
    if max(numbers) > 10**6:
        raise typer.BadParameter(f"{text:.100}: expected numbers up to a million.")
    return numbers


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="A run directory, or a folder of run directories.")],
) -> None:
    """(Re)builds the report of a run: report.html, report.md and figures."""
    _finish(run)


def _finish(path: Path) -> None:
    """Builds the report, prints its tables and where it is."""
    built = report.build(path)
    for title, header, rows in built.tables:
        table = Table(title=escape(title), title_justify="left")
        for name in header:
            table.add_column(escape(name))
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(f"Report: {built.html}", soft_wrap=True)


@data_app.command("list")
def data_list() -> None:
    """Known datasets."""
    for name, line in data.DATASETS.items():
        console.print(f"{name}: {line}", highlight=False)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Dataset name.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the datasets.")] = None,
) -> None:
    """Fetches a dataset, checked against known digests; what is there already is kept."""
    with _progress(f"fetch {name}") as progress:

        def step(what: str, done: int, total: int | None) -> None:
            progress(done, total or max(done, 1), what)

        where = data.fetch(name, root=root, progress=step)
    console.print(f"{name}: {where}", soft_wrap=True, highlight=False)


def _passphrase(*, unencrypted: bool, confirm: bool) -> str | None:
    if unencrypted:
        return None
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is not None:
        return given
    answer: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm)
    return answer


@key_app.command("new")
def key_new(
    path: Annotated[Path, typer.Argument(help="Where to write the key.")],
    length: Annotated[int, typer.Option(help="How many secret numbers.")] = 1024,
    distribution: Annotated[
        str, typer.Option(help="normal (zero mean, unit norm) or uniform (published).")
    ] = "normal",
    unencrypted: PlainOption = False,
) -> None:
    """Draws a new key. The passphrase is asked for, or taken from FEDKL_PASSPHRASE."""
    if path.exists():  # before a passphrase is asked for; whether it is there later is asked again
        raise ConfigError(f"{path}: exists already. Use `fedkl key rotate` or another path.")
    key = fedkl.Key.generate(length=length, distribution=distribution)  # type: ignore[arg-type]
    fedkl.save_key(key, path, passphrase=_passphrase(unencrypted=unencrypted, confirm=True), replace=False)
    console.print(f"{path}: {key}", highlight=False, soft_wrap=True)


@key_app.command("info")
def key_info(
    path: Annotated[Path, typer.Argument(help="A key file.")], unencrypted: PlainOption = False
) -> None:
    """Checks that a key file opens, and says what it holds without showing it."""
    key = fedkl.load_key(path, passphrase=_passphrase(unencrypted=unencrypted, confirm=False))
    console.print(f"{path}: {key}", highlight=False, soft_wrap=True)


@key_app.command("rotate")
def key_rotate(
    path: Annotated[Path, typer.Argument(help="A key file.")], unencrypted: PlainOption = False
) -> None:
    """Replaces a key by a new one of the same length and distribution. Lock layers must be trained again.

    The old file is kept beside it, as NAME.old-1, NAME.old-2 and so on: locks trained with it need it.
    """
    passphrase = _passphrase(unencrypted=unencrypted, confirm=False)
    old = fedkl.load_key(path, passphrase=passphrase)
    key = fedkl.Key.generate(length=old.length, distribution=old.distribution)
    copy = lockfile.keep_copy(path)
    fedkl.save_key(key, path, passphrase=passphrase)
    console.print(f"{path}: replaced by a new {key}", highlight=False, soft_wrap=True)
    console.print(f"{copy}: the old one", highlight=False, soft_wrap=True)


@key_app.command("passphrase")
def key_passphrase(
    path: Annotated[
        Path, typer.Argument(help="A key file, or a lock file such as <store>/<client>/lock.fedkl.")
    ],
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="The file is not encrypted yet; it will be.")
    ] = False,
) -> None:
    """Changes the passphrase of a key or lock file. Copies and backups of it keep the old one.

    The new one is asked for, or taken from FEDKL_NEW_PASSPHRASE.
    """
    old = _passphrase(unencrypted=unencrypted, confirm=False)
    new = os.environ.get(_NEW_PASSPHRASE_VARIABLE)
    if new is None:
        new = typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True)
    lockfile.change_passphrase(path, old=old, new=new)
    console.print(f"{path}: opens with the new passphrase only", highlight=False, soft_wrap=True)


@generator_app.command("train")
def generator_train(
    data_name: Annotated[str, typer.Option("--data", help="Dataset name; see `fedkl data list`.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    seed: Annotated[
        int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of weights, order and noise.")
    ] = 0,
    latent: Annotated[int, typer.Option(help="Length of the latent vector.")] = 64,
    noise: Annotated[float, typer.Option(help="Standard deviation of a pixel; small: sharp.")] = 0.15,
    data_root: RootOption = None,
) -> None:
    """Trains a generator on a dataset's training images; a new file, or an old one replaced at the end."""
    options = generators.GeneratorTraining(
        data=data_name, data_root=data_root, epochs=epochs, seed=seed, latent=latent, noise=noise
    )
    with _progress(f"generator {data_name}") as progress:
        trained = generators.train(options, progress=progress)
    generators.save_generator(trained, out)
    ceiling = generators.held_out_psnr(trained, options)
    console.print(f"{out}: draws {ceiling:.1f} dB near held-out images", highlight=False, soft_wrap=True)


@generator_app.command("samples")
def generator_samples(
    source: Annotated[str, typer.Argument(help="A generator's file or folder, or mnist or cifar10.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write: a row for each class.")],
    columns: Annotated[int, typer.Option(min=1, max=1000, help="Samples of each class.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the latent vectors.")] = 0,
) -> None:
    """Draws samples of a generator."""
    generators.write_samples(generators.load_generator(source), out, columns=columns, seed=seed)
    console.print(f"Samples: {out}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point. Exit codes: 0 ok, 2 wrong usage, configuration or data, or files that cannot be used."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FedKLError as error:
        _fail(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        kept = "What was finished is kept; once this is mended, the same command goes on."
        _fail(f"{place}{error.strerror or error}. {kept}")


def _fail(text: str) -> NoReturn:
    Console(stderr=True, emoji=False).print(
        f"Error: {text}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    sys.exit(2)
