"""Time of a training step with the lock, against the norm-matched plain model that `lock.bake()` gives.

Steps of both models alternate, so that a drift of the machine's speed meets both; the ratio of every pair is
taken and the median reported. The bar is 3 % extra, and 6 % for LeNet with all layers locked. The optimizer
is PyTorch's default SGD or, with --fused, the fused one that fedkl's trainer takes.

    python benchmarks/lock_overhead.py --steps 30 --batch 64 --threads 1
    python benchmarks/lock_overhead.py --model lenet --steps 300 --fused
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedkl
from fedkl.models import build_model


class Block(nn.Module):
    """A basic residual block with a 1×1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (batch, channels, height, width)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Sequential:
    """ResNet-18 as in the paper: 7×7 stem of stride 2, no max-pool."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class Trainer:
    """One model with its optimizer and the time of its steps."""

    def __init__(self, model: nn.Module, device: torch.device, *, fused: bool = False) -> None:
        self.model = model.to(device).train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
        self.device = device
        # On one CPU thread, CPU time: other processes of a busy machine do not count.
        on_one_thread = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if on_one_thread else time.perf_counter

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Seconds of one training step."""
        self._wait()
        start = self._clock()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self._wait()
        return self._clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def overhead(
    lock: fedkl.Lock, *, steps: int, batch: int, device: torch.device, fused: bool = False
) -> tuple[float, float, float]:
    """Median seconds of a plain and a locked step, and the median of their ratios."""
    plain, locked = (Trainer(model, device, fused=fused) for model in (lock.bake(), lock.model))
    images = torch.rand(batch, 3, 32, 32, device=device)
    labels = torch.arange(batch, device=device) % 10
    pairs = []
    for index in range(steps + 2):
        order = (plain, locked) if index % 2 else (locked, plain)
        seconds = {trainer: trainer.step(images, labels) for trainer in order}
        pairs.append((seconds[plain], seconds[locked]))
    pairs = pairs[2:]  # warm-up
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def lenet() -> nn.Module:
    """The paper's LeNet."""
    return build_model("lenet", channels=3, classes=10, seed=0)


MODELS = {"resnet18": resnet18, "lenet": lenet}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--steps", type=int, default=20, help="timed pairs of steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fused", action="store_true", help="the optimizer of fedkl's trainer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.model}, 32×32, batch {options.batch}, {options.threads} thread(s), {options.device}")
    print(f"{'layers':8}{'chained':9}{'plain ms':>10}{'locked ms':>11}{'extra %':>9}")
    for layers in ("first", "all"):
        for chained in (True, False):
            lock = fedkl.lock(MODELS[options.model](), layers=layers, chained=chained)
            device = torch.device(options.device)
            how = {"steps": options.steps, "batch": options.batch, "fused": options.fused}
            plain, locked, ratio = overhead(lock, device=device, **how)
            row = f"{1e3 * plain:10.1f}{1e3 * locked:11.1f}{100 * (ratio - 1):9.2f}"
            print(f"{layers:8}{chained!s:9}{row}", flush=True)


if __name__ == "__main__":
    main()
