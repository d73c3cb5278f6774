"""Noise, pruning, NVFlare's and Flower's filters, and combinations do exactly what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from fedkl.defenses import Draws, KeyLock, NoDefense, PrivateLayers, UpdateDefense
from fedkl.defenses.combined import Combined
from fedkl.defenses.local_dp import LocalDpMod
from fedkl.defenses.masked import MaskedUpload
from fedkl.defenses.noise import GaussianNoise, LaplaceNoise
from fedkl.defenses.percentile import Percentile
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.sparse_vector import SparseVector
from fedkl.errors import ConfigError
from fedkl.keys import imitated_uniform
from fedkl.protocol import Procedure, Sending
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec

SENDING = Sending(received={})
SURE = SparseVector(fraction=0.3, epsilon=1e12, noise_var=1e9, gamma=0.5, tau=0.2)
"""With so little noise that it does what it would do without."""


def changed(defense, change, seed=0):
    draws = Draws(imitated_uniform(torch.Generator().manual_seed(seed)))
    return defense.changed(change, draws=draws, client=SENDING)


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def change():
    return {"weight": some(30, 20), "bias": some(30, seed=1), "scale": torch.tensor(0.001)}


def test_laplace_noise_has_its_scale():
    noise = changed(LaplaceNoise(scale=0.5), {"w": torch.zeros(200_000)})["w"]
    assert float(noise.abs().mean()) == pytest.approx(0.5, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float((noise.abs() > 0.5 * math.log(100)).float().mean()) == pytest.approx(0.01, rel=0.1)
    assert float((noise > 0).float().mean()) == pytest.approx(0.5, abs=0.005)


def test_pruning_keeps_the_largest_of_each_tensor():
    sent = changed(Pruning(keep=0.4), {"w": torch.tensor([[3.0, -0.1, 0.2], [-5.0, 4.0, 0.0]]), "b": some(1)})
    assert sent["w"].tolist() == [[3.0, 0.0, 0.0], [-5.0, 4.0, 0.0]]  # 2.4 entries are 3
    assert torch.equal(sent["b"], some(1))


def nvflare_percentile(change, *, percentile, gamma, steps):
    """`PercentilePrivacy.process_dxo`, in NumPy as it stands there."""
    each = {name: tensor.numpy() / steps for name, tensor in change.items()}
    cutoff = np.percentile(np.concatenate([np.abs(a.ravel()) for a in each.values()]), percentile)
    sent = {}
    for name, array in each.items():
        if np.ndim(array) == 0:
            sent[name] = array * steps
            continue
        array[(array > -cutoff) & (array < cutoff)] = 0.0
        sent[name] = np.clip(array, -gamma, gamma) * steps
    return sent


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 75.0, 100.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_percentile_is_nvflares(percentile, steps):
    defense = Percentile(percentile=percentile, gamma=0.2, steps=steps)
    expected = nvflare_percentile(change(), percentile=percentile, gamma=0.2, steps=steps)
    sent = changed(defense, change())
    for name, array in expected.items():
        torch.testing.assert_close(sent[name], torch.from_numpy(np.asarray(array, dtype=np.float32)))
    zeros = int((sent["weight"] == 0).sum() + (sent["bias"] == 0).sum())
    assert zeros == pytest.approx(percentile / 100 * 631, abs=2)


def test_sparse_vector_sends_some_of_what_passes():
    """Without noise: what is at least τ, clipped to γ; drawn with replacement, so fewer than asked for."""
    before, sent = change(), changed(SURE, change())
    assert torch.equal(sent["scale"], before["scale"])
    for name in ("weight", "bias"):
        kept = sent[name] != 0
        assert (before[name][kept].abs() >= 0.2).all()
        torch.testing.assert_close(sent[name][kept], before[name][kept].clamp(-0.5, 0.5))
    wanted = math.ceil(0.3 * 631)
    passed = sum(int((tensor.abs() >= 0.2).sum()) for tensor in before.values())
    kept = sum(int((sent[name] != 0).sum()) for name in ("weight", "bias"))
    assert kept == pytest.approx(passed * (1 - (1 - 1 / passed) ** wanted), rel=0.1)
    assert kept < wanted


def test_sparse_vector_adds_noise_of_its_scale():
    sent = changed(replace(SURE, noise_var=0.5, tau=0.0), {"w": some(100_000)})["w"]
    kept = sent != 0
    noise = sent[kept] - some(100_000)[kept].clamp(-0.5, 0.5)
    assert float(noise.abs().mean()) == pytest.approx(2 * 0.5 / 0.5, rel=0.02)


def test_sparse_vectors_choice_is_noisy():
    """With the defaults it is next to a fair coin which entries pass, and in the second half as often."""
    sent = changed(SparseVector(gamma=1.0, tau=0.0), {"w": torch.cat([torch.ones(5000), torch.zeros(5000)])})
    first, second = ((part != 0).sum() for part in sent["w"].split(5000))
    assert abs(int(first) - int(second)) < 150
    assert int(first + second) == pytest.approx(1000, rel=0.15)


def test_sparse_vector_divides_by_the_steps_and_multiplies_again():
    one, many = changed(SURE, {"w": some(500)}), changed(replace(SURE, steps=4), {"w": 4 * some(500)})
    torch.testing.assert_close(many["w"], 4 * one["w"])


def test_sparse_vector_ends_where_nothing_passes():
    assert not changed(replace(SURE, tau=0.9), {"w": some(50)})["w"].any()


def test_local_dp_is_flowers():
    privacy = pytest.importorskip("flwr.supercore.differential_privacy")
    before, after = [some(30, 20).numpy(), some(30).numpy()], [some(30, 20, seed=2).numpy(), some(30).numpy()]
    after[1] = after[1] + 1
    change = {
        str(place): torch.from_numpy(b - a) for place, (a, b) in enumerate(zip(before, after, strict=True))
    }
    for norm in (0.5, 1e3):  # clipped, and not
        sent = changed(LocalDpMod(clipping_norm=norm, sensitivity=0.0), change)
        theirs = [array.copy() for array in after]
        privacy.compute_clip_model_update(theirs, before, norm)
        for place, array in enumerate(theirs):
            torch.testing.assert_close(
                sent[str(place)], torch.from_numpy(array - before[place]), atol=1e-6, rtol=1e-4
            )


def test_local_dp_has_flowers_noise(monkeypatch):
    """The deviation that Flower's mod computes, by its function for parameters, and in what is sent."""
    privacy = pytest.importorskip("flwr.supercore.differential_privacy")
    said = []
    monkeypatch.setattr(
        privacy, "add_gaussian_noise_inplace", lambda arrays, deviation: said.append(deviation)
    )
    monkeypatch.setattr(privacy, "parameters_to_ndarrays", lambda parameters: parameters)
    monkeypatch.setattr(privacy, "ndarrays_to_parameters", lambda arrays: arrays)
    privacy.add_localdp_gaussian_noise_to_params([], 0.3, 2.0, 1e-5)
    defense = LocalDpMod(sensitivity=0.3, epsilon=2.0, delta=1e-5)
    assert defense.noise_deviation == pytest.approx(said[0], rel=1e-12)
    noise = changed(defense, {"w": torch.zeros(100_000)})["w"]
    assert float(noise.std()) == pytest.approx(said[0], rel=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LaplaceNoise(scale=-1.0), lambda: LaplaceNoise(scale=math.inf),
        lambda: Pruning(keep=0.0), lambda: Pruning(keep=1.1),
        lambda: Percentile(percentile=101.0), lambda: Percentile(gamma=0.0), lambda: Percentile(steps=0),
        lambda: SparseVector(fraction=0.0), lambda: SparseVector(noise_var=0.0),
        lambda: SparseVector(epsilon=-1.0), lambda: SparseVector(tau=math.nan), lambda: SparseVector(steps=0),
        lambda: LocalDpMod(clipping_norm=0.0), lambda: LocalDpMod(sensitivity=-1.0),
        lambda: LocalDpMod(epsilon=0.0), lambda: LocalDpMod(delta=0.0),
        lambda: Combined(parts=()), lambda: Combined(parts=(KeyLock(), Pruning(), PrivateLayers())),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"expected .*got"):
        wrong()


@dataclass(frozen=True, kw_only=True)
class Adding(UpdateDefense):
    """Adds one, and trains an epoch more."""

    type: Literal["test-adding"] = "test-adding"

    def changed(self, change, *, draws, client):
        return {name: tensor + 1 for name, tensor in change.items()}

    @property
    def public_transform(self):
        return lambda change, observed: {name: tensor + 1 for name, tensor in change.items()}

    def procedure(self, procedure):
        return replace(procedure, epochs=2)


def test_parts_change_an_update_in_their_order():
    tensor = torch.tensor([3.0, -1.5, 0.25])
    schema = PublicSchema(kind="gradient", specs={"w": TensorSpec.of(tensor)}, private=frozenset())
    update = PublicUpdate(schema=schema, tensors={"w": tensor}, num_samples=1, round=0)
    for parts, expected in (
        ((Adding(), Pruning(keep=0.3)), [4.0, 0.0, 0.0]),
        ((Pruning(keep=0.3), Adding()), [4.0, 1.0, 1.0]),
    ):
        defense = Combined(parts=parts)
        observed = defense.transform(update, client=SENDING).tensors
        assert observed["w"].tolist() == expected
        played = defense.imitate_transform(
            {"w": tensor[None]}, clients=[SENDING], generator=torch.Generator().manual_seed(0)
        )
        assert played["w"].tolist() == [expected]
        own = defense.public_transform({"w": tensor}, observed)
        assert own["w"].tolist() == ([4.0, 0.0, 0.0] if expected[1] == 0 else [4.0, -0.5, 1.25])


def test_a_combination_among_the_parts_stands_for_its_parts():
    """What its server knows depends on what comes after each of them."""
    noise = GaussianNoise()
    assert Combined(parts=(Combined(parts=(Pruning(), Adding())), noise)) == Combined(
        parts=(Pruning(), Adding(), noise)
    )


def test_parts_say_what_a_combination_is():
    noise, locked = Combined(parts=(Pruning(), GaussianNoise())), Combined(parts=(KeyLock(), GaussianNoise()))
    assert (noise.keeps_tensors, noise.changes_updates) == (False, True)
    assert (locked.keeps_tensors, locked.changes_updates) == (True, True)
    assert not Combined(parts=(KeyLock(),)).changes_updates
    assert Combined(parts=(GaussianNoise(),)).public_transform is None
    assert Combined(parts=(NoDefense(), Adding())).procedure(Procedure(algorithm="fedavg")).epochs == 2
    with pytest.raises(ConfigError, match="cannot be trained with"):
        Combined(parts=(Pruning(), MaskedUpload())).check_training()
    assert Combined(parts=(KeyLock(granularity="element"),)).for_images((1, 8, 8)).parts[0].input_shape == (
        1,
        8,
        8,
    )
    assert Combined(parts=(KeyLock(),)).for_untrained().parts[0].start == "drawn"


def test_a_locked_combination_is_attacked_as_the_lock_is():
    """With the lock's guesses, control and baselines; every arm plays the whole combination."""
    lock, defense = KeyLock(), Combined(parts=(KeyLock(), GaussianNoise()))
    own = [arm for arm in lock.guesses() if arm.defense == lock]
    assert [arm.name for arm in defense.guesses()] == [f"combined-{arm.name}" for arm in own]
    for arm, theirs in zip(defense.guesses(), own, strict=True):
        assert (arm.defense, arm.knowledge, arm.control) == (defense, theirs.knowledge, "public-norm")
        assert "gaussian-noise" in arm.description
        assert not arm.open  # noise hides what knowing the lock does not
    assert defense.control() == lock.control()
    assert defense.baselines() == lock.baselines()
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28 * 28, 10))
    own, theirs = defense.prepare(model), lock.prepare(model)
    assert own.public_state().keys() == theirs.public_state().keys()
    assert own.private_parameters().keys() == theirs.private_parameters().keys() != set()
