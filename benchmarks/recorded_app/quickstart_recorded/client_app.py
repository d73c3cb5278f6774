"""The client. The environment says where the quickstart's network lies, and where recordings go."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from quickstart import subject  # examples/audit, by PYTHONPATH

from fedkl.flower import RecordingMod

RECORDINGS = Path(os.environ["QUICKSTART_RECORDINGS"])

app = ClientApp(mods=[RecordingMod(RECORDINGS)])  # was: ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """An epoch on the node's own images."""
    torch.set_num_threads(1)
    partition, seed = int(context.node_config["partition-id"]), int(context.run_config["seed"])
    torch.manual_seed(seed + partition)
    what = subject()
    order = torch.randperm(len(what.images), generator=torch.Generator().manual_seed(seed))
    members = order.split(what.images_per_client)[partition]
    network = what.build()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    what.procedure(network, what.inputs(what.images[members]), what.labels[members])
    # Node ids are Flower's: the audit is told whose images whose are.
    (RECORDINGS.parent / f"partition-{context.node_id}").write_text(str(partition), encoding="utf-8")
    content = RecordDict(
        {
            "arrays": ArrayRecord(network.state_dict()),
            "metrics": MetricRecord({"num-examples": len(members)}),
        }
    )
    return Message(content=content, reply_to=message)
