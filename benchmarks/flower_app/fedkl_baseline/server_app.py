"""The server: FedAvg over all clients; it notes when each round ended and writes that to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedkl_baseline import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains with the run's configuration."""
    federate(grid, context.run_config)


def federate(grid: Grid, config: Mapping[str, bool | float | int | str]) -> None:
    """All rounds of FedAvg; writes the result file.

    Args:
        grid: The way to the clients.
        config: See `[tool.flwr.app.config]` in pyproject.toml.
    """
    clients, evaluated = int(config["clients"]), bool(config["evaluate"])
    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=float(evaluated),
        min_train_nodes=clients,
        min_evaluate_nodes=clients,
        min_available_nodes=clients,
    )
    ends: list[float] = []

    def note_time(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        ends.append(time.perf_counter())
        return None

    torch.set_num_threads(1)
    settings = ConfigRecord({"dataset": str(config["dataset"]), "samples": int(config["samples"])})
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(task.new_model().state_dict()),
        num_rounds=int(config["rounds"]),
        train_config=settings,
        evaluate_config=ConfigRecord(dict(settings)),
        evaluate_fn=note_time,
    )
    accuracies = [float(record["accuracy"]) for record in result.evaluate_metrics_clientapp.values()]
    losses = [float(record["loss"]) for record in result.train_metrics_clientapp.values()]
    rounds = [later - earlier for earlier, later in pairwise(ends)]
    report = {"round_seconds": rounds, "losses": losses, "accuracies": accuracies}
    path = Path(str(config["result-file"]))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report))
    partial.replace(path)  # whoever waits for the file must not see half of it
