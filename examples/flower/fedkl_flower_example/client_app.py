"""The client. What fedkl adds to a Flower app is marked."""

from __future__ import annotations

from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedkl import data
from fedkl.flower import LockMod, current_client  # fedkl
from fedkl_flower_example import task

app = ClientApp(mods=[LockMod(task.net)])  # fedkl: the mod


@lru_cache(maxsize=1)
def dataset(name: str, images: int) -> data.Dataset:
    """The process's one copy of the data."""
    return task.load(name, images=images)


def own(context: Context) -> tuple[data.Dataset, Tensor]:
    """The data, and the indexes of this node's training images."""
    config, node = context.run_config, context.node_config
    images = dataset(str(config["dataset"]), int(config["images"]))
    index = task.samples(
        images,
        client=int(node["partition-id"]),
        clients=int(node["num-partitions"]),
        seed=int(config["seed"]),
    )
    return images, index


@app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch on the node's own images."""
    torch.set_num_threads(1)
    client = current_client()  # fedkl: in place of a new model and load_state_dict
    config = context.run_config
    images, index = own(context)
    place = (client.name, int(message.content["config"]["server-round"]) - 1)
    loss = task.train(client.model, client.memory, images, index, config=config, place=place)
    metrics = MetricRecord({"num-examples": len(index), "loss": loss})
    content = RecordDict({"arrays": ArrayRecord(client.model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy of the global model with the node's own lock."""
    torch.set_num_threads(1)
    client = current_client()  # fedkl: in place of a new model
    images, index = own(context)
    client.recalibrate_norms_(data.Subset(images.train_images, index))  # fedkl: of the weights that came
    accuracy = task.accuracy(client.model, images)
    metrics = MetricRecord({"num-examples": len(images.test_labels), "accuracy": accuracy})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
