"""Small Flower apps on a small model, and what their tests share."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn

from fedkl.defenses import KeyLock
from fedkl.flower import LockMod, current_client, public_arrays
from fedkl.flower.node import node_store
from tests.locking.leaks import encodings, patterns, secrets_of

DEFENSE = KeyLock(key_length=16)
WIDTH = 6


def net():
    """Two norms: the first is locked."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 3),
        )


def step(model, seed=0):
    """One step of training on random numbers, with which no private tensor stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(model.train()(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def metrics(**values):
    return MetricRecord({"num-examples": 8, **values})


def reply(message, arrays=None, **records):
    arrays = {} if arrays is None else {"arrays": arrays}
    return Message(RecordDict({**arrays, "metrics": metrics(), **records}), reply_to=message)


def honest(message, context):
    """What a client's function is."""
    model = current_client().model
    step(model, seed=int(context.node_config.get("partition-id", 0)))
    return reply(message, ArrayRecord(model.state_dict()))


def app_of(handler, *, defense=DEFENSE, build=net):
    app = ClientApp(mods=[LockMod(build, defense=defense)])
    for register in (app.train(), app.evaluate(), app.query()):
        register(handler)
    return app


def request(content=None, kind="train"):
    message = Message(content or good_content(), dst_node_id=7, message_type=kind)
    message.metadata.__dict__["_message_id"] = "1"
    return message


def good_content(**changes):
    """The server's message; `changes` are records beside or in place of its own."""
    arrays = public_arrays(net(), defense=DEFENSE)
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1}), **changes})


def arrays_with(changes):
    """The server's arrays with some changed; None removes one."""
    state = {name: torch.from_numpy(a.numpy()) for name, a in public_arrays(net(), defense=DEFENSE).items()}
    return ArrayRecord({name: t for name, t in {**state, **changes}.items() if t is not None})


def ask(app, content=None, kind="train", **node_config):
    config = {"partition-id": 0, **node_config}
    return app(message=request(content, kind), context=Context(1, 7, config, RecordDict(), {}))


def store():
    return node_store({})


def stored(name="client-0", build=net):
    """All private tensors of a client as they are on disk."""
    with store().client(name, model=build(), defense=DEFENSE) as client:
        return secrets_of(client.lock)


def server_of(run):
    """A ServerApp whose main function is `run(grid)`."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        run(grid)

    return app


def message_bytes(message):
    """Everything in a message: names, arrays, numbers in all precisions, texts, errors."""
    if message.has_error():
        return str(message.error.reason).encode()
    pieces = []
    for name, record in message.content.items():
        pieces.append(name.encode())
        for key, value in record.items():
            pieces.append(key.encode())
            if isinstance(record, ArrayRecord):
                pieces.append(value.data)
                pieces += encodings(torch.from_numpy(value.numpy()))
            elif isinstance(value, list) and value and isinstance(value[0], float):
                pieces += encodings(torch.tensor(value, dtype=torch.float64))
            pieces.append(value if isinstance(value, bytes) else str(value).encode())
    return b"|".join(pieces)


def found_in(messages, secrets):
    """Names of the private tensors whose numbers stand in any of the messages."""
    contents = [message_bytes(message) for message in messages]
    return sorted(
        name
        for name, tensor in secrets.items()
        if any(form in content for form in patterns(tensor) for content in contents)
    )
