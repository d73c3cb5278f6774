"""What masks cost: upload, opening, the server's addition; against training, and against the floor.

Everything runs on one thread. Times are CPU milliseconds, medians of `--repeats`; what is compared alternates
in one process. The floor of an upload is the key stream of one mask, the tag over the words and a copy.
Peak memory is the process's, above what it had with model and update in it.

    python benchmarks/masked_sums.py --model lenet --members 3 10 100
    python benchmarks/masked_sums.py --model resnet18 --members 3 10 100 --train
    python benchmarks/masked_sums.py --model vgg16 --members 3 10 100 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305
from torch.nn import functional as F

from fedkl import masking
from fedkl.masking.encoding import Bytes, Opening, decoded
from fedkl.masking.stream import CHUNK, MaskStream, Room
from fedkl.models import build_model
from fedkl.update import TensorSpec

RUN = bytes(16)
TODAY = date(2026, 11, 29)


def main() -> None:
    """Measures and prints one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="lenet", help="of the zoo; 10 classes, 3 channels")
    parser.add_argument("--members", type=int, nargs="+", default=[3, 10, 100])
    parser.add_argument("--modes", nargs="+", default=["blind", "pairwise", "both"])
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--train", action="store_true", help="also a round of 500 images of 32×32, batches of 64"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(options.model, channels=3, classes=10, seed=0, initialization="default")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    numbers = sum(tensor.numel() for tensor in state.values())
    train = round_of(model) if options.train else None
    for bits in options.bits:
        for members in options.members:
            for mode in options.modes:
                row = {
                    "model": options.model,
                    "numbers": numbers,
                    "bits": bits,
                    "members": members,
                    "mode": mode,
                }
                print(
                    json.dumps(
                        row
                        | Case(state, members=members, mode=mode, bits=bits).measure(options.repeats, train)
                    )
                )


def round_of(model: torch.nn.Module) -> Callable[[], None]:
    """A client's round: one epoch over 500 images."""
    images, labels = torch.rand(500, 3, 32, 32), torch.randint(10, (500,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()

    def run() -> None:
        for batch, wanted in zip(images.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), wanted).backward()
            optimizer.step()

    return run


class Case:
    """One member of a cohort, and the server."""

    def __init__(self, state: dict[str, torch.Tensor], *, members: int, mode: str, bits: int) -> None:
        keys = [masking.MemberKeys.new(f"m{place:03}", today=TODAY) for place in range(members)]
        rules = masking.Rules(mode=mode, bits=bits, max_samples=4096)  # type: ignore[arg-type]
        cards = [each.card() for each in keys]
        sealed = masking.new_roster(name="cost", cards=cards, rules=rules, signer=keys[0], today=TODAY)
        specs = {name: TensorSpec.of(tensor) for name, tensor in state.items()}
        self.layout = masking.Layout(specs=specs, words=sealed.roster.words)
        self.member = masking.Member(
            sealed.opened(keys[0]), layout=self.layout, memory=masking.Memory(), today=TODAY
        )
        self.state, self.names, self.mode = state, sealed.roster.members, mode
        self.member.accept_model(RUN, state)
        self.round = 0

    def upload(self) -> masking.Upload:
        """The next round's."""
        call = masking.Call(run=RUN, round=self.round, attempt=0, cohort=self.names)
        self.round += 1
        return self.member.upload(call, masking.Contribution(tensors=self.state, samples=500))

    def open(self, upload: masking.Upload) -> None:
        """Opens what stands for a sum of all.

        Nothing was added up: the tag is computed and not compared, and numbers are read from other words.
        """
        listed = {name: bytes(32) for name in self.names} | {upload.member: upload.nonce}
        call = masking.Call(run=RUN, round=self.round - 1, attempt=0, cohort=self.names)
        total = masking.SealedSum(
            call=call,
            model=upload.model,
            transcript=upload.transcript,
            listed=listed,
            words=upload.words,
        )
        context = self.member._context(call, model=upload.model, transcript=upload.transcript)
        compared = mock.patch.object(Opening, "holds", return_value=True)
        with compared, mock.patch("fedkl.masking.member.decoded", self.decoded):
            self.member._opened(total, context)

    def decoded(self, layout: masking.Layout, words: Bytes, **options: object) -> masking.Mean:
        """The numbers of readable words; writing these is part of the measured time."""
        words[layout.head :].view(f"<u{layout.words.bits // 8}")[:] = layout.words.offset(1)
        longs = words[: layout.head].view("<u8")
        longs[:] = 2**30
        longs[4:6] = 1
        return decoded(layout, words, **options)  # type: ignore[arg-type]

    def floor(self) -> None:
        """Key stream, tag and copy of as many bytes."""
        stream, tag, room = MaskStream(os.urandom(32)), Poly1305(os.urandom(32)), Room()
        words, size = np.zeros(CHUNK, dtype=np.uint8), self.layout.size
        for begin in range(0, size, CHUNK):
            part = min(CHUNK, size - begin)
            stream.next(part, room)
            tag.update(words[:part].data)
        np.zeros(size, dtype=np.uint8).copy()

    def measure(self, repeats: int, train: Callable[[], None] | None) -> dict[str, float]:
        """Medians in CPU milliseconds, ratios of pairs, MB."""
        uploads, floors, opens, adds, trains = [], [], [], [], []
        for _ in range(repeats):
            spent, upload = timed(self.upload)
            total = upload.words.view("<u8")
            uploads.append(spent)
            floors.append(timed(self.floor)[0])
            opens.append(timed(partial(self.open, upload))[0])
            adds.append(timed(partial(np.add, total, total, out=total.copy()))[0])
            if train is not None:
                trains.append(timed(train)[0])
        found = {
            "upload_ms": statistics.median(uploads),
            "upload_over_floor": statistics.median(a / b for a, b in zip(uploads, floors, strict=True)),
            "floor_ms": statistics.median(floors),
            "open_ms": statistics.median(opens),
            "server_add_ms": statistics.median(adds),
            "upload_MB": self.sent(upload) / 1e6,
            "upload_peak_over_update": peak(self.upload) / self.sent(upload),
            "open_peak_over_update": peak(partial(self.open, upload)) / self.sent(upload),
        }
        if train is not None:
            found["train_ms"] = statistics.median(trains)
            found["upload_over_train"] = statistics.median(
                a / b for a, b in zip(uploads, trains, strict=True)
            )
            found["open_over_train"] = statistics.median(a / b for a, b in zip(opens, trains, strict=True))
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def sent(self, upload: masking.Upload) -> int:
        """Bytes of an upload."""
        return len(upload.words) + sum(map(len, upload.shares.values())) + 64


def timed(task: Callable[[], object]) -> tuple[float, object]:
    """CPU milliseconds, and what the task gave."""
    start = time.process_time()
    found = task()
    return 1e3 * (time.process_time() - start), found


def peak(task: Callable[[], object]) -> int:
    """Bytes that a task needs at its worst, above what the process had (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    task()
    return memory("VmHWM") - before


def memory(field: str) -> int:
    """Bytes, from the process's own status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


if __name__ == "__main__":
    main()
