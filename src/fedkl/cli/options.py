"""Options that several commands have.

A default or a name that the library has is written here as text, because to import the library takes seconds;
tests/test_cli_help.py compares each with the library's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

Budget = Literal["quick", "paper"]
"""As `fedkl.reproduce.Budget`."""

Pairs = Literal["matched", "published"]
"""As `fedkl.reproduce.Pairs`."""

NormStatistics = Literal["recalibrated", "kept"]
"""As `fedkl.federated.NormStatistics`."""

ATTACKS = (
    "closed-form",
    "feature-inversion",
    "disaggregation",
    "linear-rows",
    "mean-map",
    "positions",
    "wiener",
    "learned",
    "prior-only",
    "dlg",
    "gauss-newton",
    "ggl",
    "grnn",
    "idlg",
    "ig",
    "adaptive-matching",
)
DEFENSES = (
    "none",
    "keylock",
    "public-norm",
    "private-norm",
    "masked",
    "private-layers",
    "clipping",
    "client-dp",
    "gaussian-noise",
    "laplace-noise",
    "pruning",
    "combined",
    "dp-sgd",
    "local-dp-mod",
    "percentile",
    "precode",
    "soteria",
    "sparse-vector",
)
DATASETS = ("cifar10", "cifar100", "fashion-mnist", "imagefolder", "mnist", "mnist-sample")
MASKINGS = ("none", "blind", "pairwise", "both")


def one_of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """What a shell is told that completes a value: the names that begin as it was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


OutOption = Annotated[Path, typer.Option("--out", help="Run directory; a finished run is not repeated.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; flags override its fields.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of weights, partition, batches and attack starts.", show_default="0")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Dataset name, see `fedkl data list`; or a folder with train/CLASS/IMAGE and val/CLASS/IMAGE.",
        show_default="mnist-sample",
        autocompletion=one_of(DATASETS),
    ),
]
RootOption = Annotated[
    str | None,
    typer.Option(help="Folder of the datasets.", show_default="$FEDKL_DATA, or ~/.cache/fedkl/data"),
]
ModelOption = Annotated[str | None, typer.Option(help="Model of the zoo.", show_default="lenet")]
LockOption = Annotated[
    str | None, typer.Option(help="default, or published (uniform key, ReLU).", show_default="default")
]
LayersOption = Annotated[
    str | None, typer.Option(help="Locked layers: first, all or classifier.", show_default="first")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="PLACE=VALUE: any field of config.toml. May be repeated.")
]
TableOption = Annotated[Path, typer.Option("--out", help="Folder of the table; finished rows are kept.")]
RowsOption = Annotated[str, typer.Option(help="Comma-separated, e.g. dlg/lenet/mnist; all: every row.")]
ArmsOption = Annotated[str, typer.Option(help="Comma-separated, see `fedkl attack --list`.")]
TrialsOption = Annotated[int, typer.Option(help="Test images attacked, one network each.")]
BudgetOption = Annotated[Budget, typer.Option(help="quick: minutes, marked as such. paper: hours.")]
FirstSeedOption = Annotated[
    int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of weights and attacks.")
]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")]
WorkersOption = Annotated[int, typer.Option(help="Threads that share the trials; 0: all cores.")]
