"""The client: loads the server's weights, trains or evaluates on its share, replies."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkl_baseline import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch on the client's own training images."""
    torch.set_num_threads(1)  # as many clients at once as there are cores
    config = message.content["config"]
    model = task.process_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data, samples = task.dataset(str(config["dataset"])), int(config["samples"])
    start = int(context.node_config["partition-id"]) * samples
    images, labels = data.train_images[start : start + samples], data.train_labels[start : start + samples]
    loss = task.train(model, images, labels, lr=0.01)
    metrics = MetricRecord({"num-examples": len(images), "loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy on the client's share of the test images: over all clients, each image is used once."""
    torch.set_num_threads(1)
    model = task.process_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = task.dataset(str(message.content["config"]["dataset"]))
    share, shares = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    images = data.test_images.tensor_split(shares)[share]
    labels = data.test_labels.tensor_split(shares)[share]
    accuracy = task.count_correct(model, images, labels) / len(images)
    metrics = MetricRecord({"num-examples": len(images), "accuracy": accuracy})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
