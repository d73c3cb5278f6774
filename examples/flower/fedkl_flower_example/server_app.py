"""The server: Flower's FedAvg inside fedkl's guard. What fedkl adds to a Flower app is marked."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedkl.flower import Guard, Masked, public_arrays  # fedkl
from fedkl_flower_example import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, or those that a run before has left."""
    config = context.run_config
    needed = int(config["min-replies"])
    strategy = FedAvg(
        fraction_evaluate=float(config["fraction-evaluate"]),
        min_available_nodes=needed,
        min_train_nodes=needed,
        min_evaluate_nodes=needed,
    )
    strategy = Guard(  # fedkl
        strategy,
        checkpoints=str(config["checkpoints"]) or None,
        min_replies=needed,
        aggregation=Masked(metrics=("loss",)) if config["masked"] else None,  # masks
    )
    strategy.start(
        grid=grid,
        initial_arrays=public_arrays(task.net()),  # fedkl: in place of ArrayRecord(net().state_dict())
        num_rounds=int(config["rounds"]),
        timeout=float(config["timeout"]),
    )
