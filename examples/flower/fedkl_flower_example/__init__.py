"""LeNet on MNIST with a private key-lock on every node.

task.py        model, data, one local epoch: nothing of Flower
client_app.py  the ClientApp
masked_client_app.py  the same with masks, which keep the server from reading updates
server_app.py  the ServerApp
"""
