"""The example's masked client, with a mod in front that writes down of every upload what its masks come from.

`flower_harness.masked_example` copies this file into its copy of the app.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from fedkl_flower_example import client_app, task
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from fedkl.flower import LockMod, MaskMod, mask_records


def recorded(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Appends to ``uploads.jsonl`` beside the members' folder, before the reply leaves."""
    reply = call_next(message, context)
    stage = mask_records.stage_of(message.content)
    about = {"client": context.node_config["partition-id"], "stage": stage, "error": reply.has_error()}
    if not reply.has_error() and stage in ("train", "again"):
        upload = mask_records.upload_of(reply.content)
        words = hashlib.sha256(upload.words.tobytes()).hexdigest()
        about |= {"nonce": upload.nonce.hex(), "context": upload.context.hex(), "words": words}
    path = Path(str(context.node_config["fedkl-member"])).parent / "uploads.jsonl"
    line = json.dumps(about) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)
    return reply


app = ClientApp(mods=[recorded, MaskMod(), LockMod(task.net)])
app.train()(client_app.train)
app.evaluate()(client_app.evaluate)
