"""`fedkl reproduce`: the paper's tables. The adaptive matrix is in adaptive.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.options import (
    ArmsOption,
    Budget,
    BudgetOption,
    DeviceOption,
    FirstSeedOption,
    NormStatistics,
    Pairs,
    RootOption,
    RowsOption,
    SetOption,
    TableOption,
    TrialsOption,
    WorkersOption,
)
from fedkl.cli.terminal import names, print_table, progress_bar

app = typer.Typer(help="Repeats the paper's tables, and shows its figures beside ours.", no_args_is_help=True)
_TABLE1_ARMS = "centralized,centralized-lock,fedavg,fedbn,fedkl,fedkl-published"


@app.command("table1", cls=Continued)
def reproduce_table1(
    out: Annotated[Path, typer.Option("--out", help="Folder of the table; finished cells are kept.")],
    rows: Annotated[str, typer.Option(help="Comma-separated, e.g. resnet20/cifar10; all: every row.")] = (
        "lenet/mnist"
    ),
    arms: Annotated[str, typer.Option(help="Comma-separated.")] = _TABLE1_ARMS,
    seeds: Annotated[int, typer.Option(help="Runs of each cell.")] = 3,
    first_seed: Annotated[int, typer.Option(help="Seeds count from here.")] = 0,
    budget: Annotated[
        Budget, typer.Option(help="quick: minutes, marked as such. paper: 200 rounds.")
    ] = "quick",
    rounds: Annotated[int | None, typer.Option(help="Rounds, instead of the budget's.")] = None,
    pairs: Annotated[
        Pairs,
        typer.Option(help="matched: one network a row. published: the paper's two different ones."),
    ] = "matched",
    clients: Annotated[int, typer.Option(help="Clients of the federated arms; the paper has 3.")] = 3,
    partition: Annotated[str, typer.Option(help="iid, shards:<per client> or dirichlet:<alpha>.")] = "iid",
    norm_statistics: Annotated[
        NormStatistics,
        typer.Option(help="Private ones: recalibrated before each use, or kept from the last training."),
    ] = "recalibrated",
    device: DeviceOption = "cpu",
    data_root: RootOption = None,
) -> None:
    """Test accuracy with and without the lock, beside the paper's. An interrupted table goes on."""
    from fedkl import experiment_flags, reproduce

    table = reproduce.Table1(
        rows=tuple(reproduce.table1_rows()) if rows == "all" else names(rows),
        arms=names(arms),
        seeds=seeds,
        first_seed=first_seed,
        budget=budget,
        rounds=rounds,
        pairs=pairs,
        clients=clients,
        partition=experiment_flags.partition_of(partition),
        norm_statistics=norm_statistics,
        device=device,
        data_root=data_root,
    )
    reproduce.table1(table, out=out, progress=progress_bar)
    print_table(out)


@app.command("table6", cls=Continued)
def reproduce_table6(
    out: TableOption,
    rows: RowsOption = "all",
    arms: ArmsOption = "no-norm,public-norm,lock,lock-known-both",
    trials: TrialsOption = 20,
    budget: BudgetOption = "quick",
    seed: FirstSeedOption = 0,
    lpips: Annotated[
        bool,
        typer.Option("--lpips", help="Measure LPIPS too. It needs weights: docs/paper-tables.md."),
    ] = False,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    data_root: RootOption = None,
    settings: SetOption = None,
) -> None:
    """Reconstruction with and without the lock, beside the paper's. An interrupted table goes on."""
    from fedkl import reproduce

    table = reproduce.LeakageTable(
        rows=tuple(reproduce.leakage_rows()) if rows == "all" else names(rows),
        arms=names(arms),
        trials=trials,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.leakage(table, out=out, progress=progress_bar, lpips=lpips)
    print_table(out)


@app.command("threats", cls=Continued)
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
    from fedkl import reproduce

    table = reproduce.LeakageTable(
        rows=(attack_row,),
        arms=reproduce.grid_arms() if arms == "all" else names(arms),
        trials=trials,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.leakage(table, out=out, progress=progress_bar, name="threats", described=True)
    print_table(out)


@app.command("table4", cls=Continued)
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
    from fedkl import reproduce

    table = reproduce.LeakageTable(
        rows=reproduce.rows_of("dlg", "grnn") if rows == "all" else names(rows),
        arms=names(arms),
        trials=trials,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.gallery(table, title="Table 4: DLG and GRNN", out=out, progress=progress_bar)
    print_table(out, pictures=True)


@app.command("table5", cls=Continued)
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
    from fedkl import reproduce

    table = reproduce.LeakageTable(
        rows=reproduce.rows_of("ggl") if rows == "all" else names(rows),
        arms=names(arms),
        trials=trials,
        repeats=repeats,
        budget=budget,
        seed=seed,
        device=device,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    reproduce.gallery(table, title="Table 5: GGL", out=out, progress=progress_bar, name="table5")
    print_table(out, pictures=True)
