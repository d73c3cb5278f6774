"""What an installed fedkl must be able to do. Run by the Python it is installed for, in an empty folder.

``python -I smoke.py`` sees neither the sources nor a PYTHONPATH. The first check that fails ends it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

OPTIONAL = ("dp_accounting", "flwr", "onnx", "onnxruntime", "onnxscript", "pydicom", "tensorboard")
"""What only extras bring: a module may lack these and nothing else."""
TINY = {
    "training": "train --masking blind --set training.rounds=1 --set training.clients=3 "
    "--set training.local.batch_size=64",
    "closed-form": "attack --attack closed-form --arms lock --trials 1 --set model.initialization=default",
    "ggl": "attack --attack ggl --arms no-norm --trials 1 --set attack.generator=mnist "
    "--set attack.generations=2",
}
"""The smallest runs that read the sample of MNIST, a generator's weights and the report's templates."""

SUBJECT = """
from torch import nn
import fedkl
from fedkl import data

def subject():
    digits = data.load("mnist-sample")
    return fedkl.Subject(
        name="mine",
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)),
        images=digits.test_images,
        labels=digits.test_labels,
        procedure=fedkl.Procedure(algorithm="fedavg", epochs=1, batch_size=8, lr=0.05),
        images_per_client=32,
    )
"""


def lies_where_it_was_installed() -> None:
    """It is imported from this Python's own packages, says its version, and ships its types."""
    import fedkl

    home = Path(fedkl.__file__).resolve().parent
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"imported from {home}"
    assert importlib.metadata.version("fedkl") == fedkl.__version__
    assert (home / "py.typed").is_file()


def every_module_is_imported() -> None:
    """No module needs more than what an extra brings."""
    import fedkl

    def refused(name: str) -> None:
        reason = sys.exc_info()[1]
        assert reason is not None
        cause = reason.__cause__ or reason  # fedkl.flower says what to install
        missing = getattr(cause, "name", None) or ""
        assert missing.partition(".")[0] in OPTIONAL, f"{name}: {type(reason).__name__}: {reason}"

    for module in pkgutil.walk_packages(fedkl.__path__, "fedkl.", onerror=refused):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except Exception:
            refused(module.name)


def a_model_is_locked() -> None:
    """γ and β are in no upload."""
    import torch
    from torch import nn

    import fedkl

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    lock = fedkl.lock(model, key=fedkl.Key.generate())
    upload = lock.public_gradient(lock.model(torch.rand(3, 4)).sum())
    assert sorted(upload) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def an_update_travels_as_bytes() -> None:
    """And comes back, an empty tensor too."""
    import torch

    from fedkl.update import PublicSchema, PublicUpdate, TensorSpec

    tensors = {"weight": torch.rand(3, 2), "empty": torch.zeros(0, 2)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    schema = PublicSchema(kind="weights", specs=specs, private=frozenset())
    sent = PublicUpdate(schema=schema, tensors=tensors, num_samples=1, round=0).to_bytes()
    got = PublicUpdate.from_bytes(sent, schema=schema).tensors
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def fedkl(*words: str) -> str:
    """What the installed command prints."""
    command = Path(sys.executable).with_name("fedkl")
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (
        f"fedkl {' '.join(words)}: exit code {done.returncode}: {done.stderr[-1000:]}"
    )
    return done.stdout


def the_command_answers() -> None:
    """`--version`, `--help`, and the data that there are."""
    version = importlib.metadata.version("fedkl")
    assert fedkl("--version") == f"fedkl {version}\n"
    assert "audit" in fedkl("--help")
    assert "mnist-sample" in fedkl("data", "list")


def runs_end_in_a_report() -> None:
    """A training and two attacks, and one report of them all."""
    for name, words in TINY.items():
        fedkl(*words.split(), "--out", f"runs/{name}")
    fedkl("report", "runs")
    assert "<html" in Path("runs/report.html").read_text(encoding="utf-8")


def an_audit_ends_in_a_page() -> None:
    """Of a subject in a file, as in the tutorial."""
    Path("mine.py").write_text(SUBJECT, encoding="utf-8")
    fedkl("audit", "mine.py:subject", "--out", "audit", "--minutes", "0.1", "--batch-size", "1")
    assert "<html" in Path("audit/report.html").read_text(encoding="utf-8")


def main() -> int:
    """Runs all checks."""
    checks = (
        lies_where_it_was_installed,
        every_module_is_imported,
        a_model_is_locked,
        an_update_travels_as_bytes,
        the_command_answers,
        runs_end_in_a_report,
        an_audit_ends_in_a_page,
    )
    for check in checks:
        check()
        print(f"  {check.__name__.replace('_', ' ')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
