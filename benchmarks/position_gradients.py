"""What `positions` rebuilds from a vision transformer's updates (`examples/audit/vit.py`): a Markdown table.

    python benchmarks/position_gradients.py

Trained and untrained weights: the gradient of one image, and of two; weights after epochs of SGD on one
image; a lock on every LayerNorm, behind the positions; and a lock right behind the patch projection, before
them, with γ and β of the server's own draw. PSNR: median and range, cut to [0, 1].
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedkl.attacking import attack_arms, trials_of
from fedkl.attacks import Positions
from fedkl.auditing import target
from fedkl.auditing.subject import Subject
from fedkl.data import Dataset, load
from fedkl.defenses import Defense, KeyLock, NoDefense, own_arms
from fedkl.protocol import Procedure

EXACT_DB = 40.0
EXAMPLE = Path(__file__).parents[1] / "examples" / "audit" / "vit.py"
PROJECTION = "vit.embeddings.patch_embeddings.projection"


def cases(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a client does, in words, and how it is observed."""
    yield "one gradient of one image", {}
    yield "one gradient of 2 images", {"batch_size": 2}
    for count in (1, 5, 20, 50):
        local = Procedure(algorithm="fedavg", epochs=count, lr=0.01, momentum=0.9)
        yield f"weights after {count} epochs of SGD on one image", {"local": local}
    norms = tuple(name for name in names if "layernorm" in name)
    yield "every LayerNorm locked", {"defense": KeyLock(layers=norms, activation="identity")}  # as trained
    yield "a lock behind the patch projection", {"defense": KeyLock(layers=(PROJECTION,))}


def attacked(
    subject: Subject,
    dataset: Dataset,
    *,
    trials: int,
    seed: int,
    defense: Defense | None = None,
    batch_size: int = 1,
    local: Procedure | None = None,
) -> str:
    """A cell of the table."""
    arms = own_arms(defense or NoDefense())
    arm = arms.get("lock", arms["no-norm"])
    network = subject.classifier()
    found, reasons = [], []
    attack_arms(
        (arm,),
        attack=Positions(),
        build=lambda number: network,
        dataset=dataset,
        trials=trials_of(dataset, trials=trials, batch_size=batch_size),
        seed=seed,
        local=local,
        on_result=found.append,
        on_refusal=reasons.append,
    )
    if reasons:
        return f"– | – | {reasons[0].reason}"
    scores = [score for each in found for score in each.scores]
    values = sorted(score.psnr or 0.0 for score in scores)  # None: it failed
    exact, identified = sum(v > EXACT_DB for v in values), sum(score.identified for score in scores)
    return (
        f"{exact} of {len(values)} | {identified} of {len(values)} | "
        f"{statistics.median(values):.1f} [{values[0]:.1f}, {values[-1]:.1f}]"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="This model is trained|.*run before the first lock")
    trained = target.load(f"{EXAMPLE}:subject").subject
    dataset = load("mnist-sample", size=28, channels=1)
    print("| weights | a client sends | above 40 dB | identified | PSNR in dB |\n|---|---|---|---|---|")
    for title, subject in (("trained", trained), ("untrained", replace(trained, weights=None))):
        names = [name for name, _ in subject.build().named_modules()]
        for what, about in cases(names):
            cell = attacked(subject, dataset, trials=given.trials, seed=given.seed, **about)
            print(f"| {title} | {what} | {cell} |", flush=True)


if __name__ == "__main__":
    main()
