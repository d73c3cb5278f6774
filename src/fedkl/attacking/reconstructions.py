"""What an attack found, and the truth, as files of its run."""

from __future__ import annotations

from torch import Tensor

from fedkl.errors import ConfigError
from fedkl.runs import RunDirectory


def save_reconstruction(
    run: RunDirectory, arm: str, *, trial: int, reconstruction: Tensor, truth: Tensor
) -> None:
    """Writes what an attack found, and what there was to find.

    Args:
        run: The attack's.
        arm: Name of the arm.
        trial: Its number.
        reconstruction: Images, shape ``(batch, channels, height, width)``; they need not be finite.
        truth: The true ones, of the same shape, in [0, 1].

    Raises:
        ConfigError: They cannot be written.
    """
    run.save_tensors(_place(arm, trial), {"reconstruction": reconstruction, "truth": truth})


def load_reconstruction(run: RunDirectory, arm: str, *, trial: int) -> tuple[Tensor, Tensor]:
    """Reads what `save_reconstruction` wrote: reconstructions, which may not be finite, and true images.

    Raises:
        ConfigError: The file is missing or damaged, or does not hold two batches of images of one shape,
            the true ones in [0, 1].
    """
    tensors = run.load_tensors(_place(arm, trial))
    found, truth = tensors.get("reconstruction"), tensors.get("truth")
    if found is None or truth is None or not _are_images(found, truth):
        raise ConfigError(f"{run.path / _place(arm, trial)}.safetensors: holds no pictures.")
    return found, truth


def _place(arm: str, trial: int) -> str:
    return f"reconstructions/{arm}-{trial}"


def _are_images(found: Tensor, truth: Tensor) -> bool:
    floating = found.is_floating_point() and truth.is_floating_point()
    if not floating or found.shape != truth.shape or truth.ndim != 4 or truth.numel() == 0:
        return False
    values = truth.double()
    return bool(((values >= -1e-6) & (values <= 1 + 1e-6)).all())
