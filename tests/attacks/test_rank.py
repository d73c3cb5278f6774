"""Counts of equations and unknowns, against those of the paper's LeNet by hand."""

from __future__ import annotations

from fedkl import lock, models
from fedkl.attacks.algebraic.rank import passable_layers


def lenet(layers):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    locked = lock(model, layers=layers)
    return locked.bake(), locked.public_state()


def test_the_first_lock_of_the_lenet():
    model, public = lenet("first")
    third, second, first = passable_layers(model, image_shape=(3, 32, 32), observed=public)
    assert [p.name for p in (third, second, first)] == ["conv3", "conv2", "conv1"]
    assert (third.equations, third.unknowns) == (12 * 64 + 3600, 768)
    assert (second.equations, second.unknowns) == (4368, 3072)
    assert (first.equations, first.unknowns) == (3072 + 900, 3072 + 24)
    assert [p.locked for p in (third, second, first)] == [False, False, True]
    assert all(p.passable for p in (third, second, first))


def test_dead_channels_leave_the_image_to_the_prior():
    """The prototype's count: about 1,650 equations for 3,080 unknowns with five live channels."""
    model, public = lenet("first")
    *above, first = passable_layers(model, image_shape=(3, 32, 32), observed=public, live=5 / 12)
    assert (first.equations, first.unknowns) == (1655, 3082)
    assert not first.passable
    assert all(p.passable for p in above)
    assert above[-1].unknowns == 5 * 256 + 7


def test_a_chain_of_locks_can_be_passed_as_far_as_counting_goes():
    model, public = lenet("all")
    found = passable_layers(model, image_shape=(3, 32, 32), observed=public)
    assert all(p.passable and p.locked for p in found)
    assert found[1].unknowns == 3072 + 24


def test_public_norms_are_not_called_locked():
    model, _ = lenet("all")
    assert not any(p.locked for p in passable_layers(model, image_shape=(3, 32, 32)))


def test_weights_that_read_a_constant_input_say_one_thing():
    """So that behind ReLU keys in all layers the second convolution cannot be passed."""
    model, public = lenet("all")
    third, second, _ = passable_layers(model, image_shape=(3, 32, 32), observed=public, live=0.5)
    assert (third.equations, third.unknowns) == (6 * (64 + 25 * 6) + 6, 6 * 64 + 6 + 12)
    assert (second.equations, second.unknowns) == (6 * (64 + 25 * 6) + 6, 6 * 256 + 6 + 12)
    assert third.passable
    assert not second.passable
