"""Flower's side of the benchmark: FedAvg of fedkl's LeNet on MNIST, written as a Flower user would.

task.py        data, model, one local epoch: nothing of Flower
client_app.py  the ClientApp
server_app.py  the ServerApp; it writes the times of its rounds to a file
"""
