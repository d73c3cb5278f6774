"""Federated training in one process.

client.py       a client: data, key, private state and optimizer, which persist over the rounds
server.py       the server: the public state and how updates change it
aggregation.py  the sample-weighted average of named tensors
simulation.py   rounds of clients and server with one model instance
fill_in.py      what the server's own model is worth without any client's lock
"""

from fedkl.federated.aggregation import weighted_average
from fedkl.federated.client import Client, LocalTraining
from fedkl.federated.fill_in import FillIn, server_fill_ins
from fedkl.federated.server import Server
from fedkl.federated.simulation import FederatedTraining, Federation, RoundResult

__all__ = [
    "Client",
    "FederatedTraining",
    "Federation",
    "FillIn",
    "LocalTraining",
    "RoundResult",
    "Server",
    "server_fill_ins",
    "weighted_average",
]
