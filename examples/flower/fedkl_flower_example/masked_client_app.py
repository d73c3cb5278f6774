"""The same client, whose updates the server cannot read. What masks add is marked."""

from __future__ import annotations

from flwr.clientapp import ClientApp

from fedkl.flower import LockMod, MaskMod
from fedkl_flower_example import client_app, task

app = ClientApp(mods=[MaskMod(), LockMod(task.net)])  # masks: the first mod
app.train()(client_app.train)
app.evaluate()(client_app.evaluate)
