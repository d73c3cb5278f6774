"""`fedkl generator`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.commands import Command
from fedkl.cli.options import DATASETS, RootOption, one_of
from fedkl.cli.terminal import console, progress_bar

app = typer.Typer(help="The generators that the attack ggl searches.", no_args_is_help=True)


@app.command("train", cls=Command)
def generator_train(
    data_name: Annotated[
        str,
        typer.Option("--data", help="Dataset name; see `fedkl data list`.", autocompletion=one_of(DATASETS)),
    ],
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
    from fedkl import generator_training as generators

    options = generators.GeneratorTraining(
        data=data_name, data_root=data_root, epochs=epochs, seed=seed, latent=latent, noise=noise
    )
    with progress_bar(f"generator {data_name}") as progress:
        trained = generators.train(options, progress=progress)
    generators.save_generator(trained, out)
    ceiling = generators.held_out_psnr(trained, options)
    console.print(f"{out}: draws {ceiling:.1f} dB near held-out images", highlight=False, soft_wrap=True)


@app.command("samples", cls=Command)
def generator_samples(
    source: Annotated[str, typer.Argument(help="A generator's file or folder, or mnist or cifar10.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write: a row for each class.")],
    columns: Annotated[int, typer.Option(min=1, max=1000, help="Samples of each class.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the latent vectors.")] = 0,
) -> None:
    """Draws samples of a generator."""
    from fedkl import generator_training as generators

    generators.write_samples(generators.load_generator(source), out, columns=columns, seed=seed)
    console.print(f"Samples: {out}", highlight=False, soft_wrap=True)
