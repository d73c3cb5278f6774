"""The server: Flower's FedAvg from the example's weights."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from quickstart import subject  # examples/audit, by PYTHONPATH

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One round, without evaluation."""
    nodes = int(context.run_config["nodes"])
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=nodes, min_train_nodes=nodes)
    arrays = ArrayRecord(subject().build().state_dict())
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1, timeout=300.0)
