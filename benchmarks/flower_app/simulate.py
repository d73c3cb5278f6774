"""Runs the app with `flwr.simulation.run_simulation`, without a SuperLink. Started by launch.py.

Arguments: the configuration as JSON (see `[tool.flwr.app.config]` in pyproject.toml), and how many clients
train at once.
"""

from __future__ import annotations

import json
import sys

from fedkl_baseline.client_app import app as client_app
from fedkl_baseline.server_app import federate
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation


def main() -> None:
    """One run; the result goes to the configured file."""
    config, actors = json.loads(sys.argv[1]), int(sys.argv[2])
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        federate(grid, config)

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=config["clients"],
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": actors, "logging_level": "WARNING", "log_to_driver": False},
        },
    )


if __name__ == "__main__":
    main()
