"""Federated training in one process.

options.py      what a training is, as data
schedules.py    learning rates over the rounds
client.py       what a client keeps: samples, key, private state, optimizer state
worker.py       model instances that are lent to clients; several clients train at once
server.py       the server: the public state and how averages change it
simulation.py   rounds of clients and server
checkpoint.py   rounds on disk: what is written when, and which are gone back to
manifest.py     the names of a checkpoint's files, and the file that lists them
private_files.py  clients' states of a checkpoint, encrypted
fill_in.py      what the server's own model is worth without any client's lock
"""

from fedkl.aggregation import RunningAverage, weighted_average
from fedkl.federated.checkpoint import Checkpoints
from fedkl.federated.client import Client
from fedkl.federated.fill_in import FillIn, server_fill_ins
from fedkl.federated.options import Execution, FederatedTraining, LocalTraining, NormStatistics
from fedkl.federated.round_result import RoundResult
from fedkl.federated.schedules import AnySchedule, ConstantSchedule, CosineSchedule, StepSchedule
from fedkl.federated.server import AnyServerOptimizer, Averaging, Server, ServerAdam, ServerSGD
from fedkl.federated.simulation import Federation

__all__ = [
    "AnySchedule",
    "AnyServerOptimizer",
    "Averaging",
    "Checkpoints",
    "Client",
    "ConstantSchedule",
    "CosineSchedule",
    "Execution",
    "FederatedTraining",
    "Federation",
    "FillIn",
    "LocalTraining",
    "NormStatistics",
    "RoundResult",
    "RunningAverage",
    "Server",
    "ServerAdam",
    "ServerSGD",
    "StepSchedule",
    "server_fill_ins",
    "weighted_average",
]
