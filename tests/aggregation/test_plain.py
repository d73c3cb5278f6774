"""The weighted average against numpy, and what it refuses."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from fedkl.errors import UpdateError
from fedkl.federated import RunningAverage, weighted_average
from fedkl.update import MAX_SAMPLES, PublicSchema, PublicUpdate, TensorSpec


def update(tensors, *, num_samples=1, round=0, kind="weights"):
    schema = PublicSchema(kind=kind, specs={name: TensorSpec.of(t) for name, t in tensors.items()})
    return PublicUpdate(schema=schema, tensors=tensors, num_samples=num_samples, round=round)


def test_weights_by_sample_counts():
    rng = np.random.default_rng(0)
    arrays, counts = rng.normal(size=(3, 4, 5)).astype(np.float32), [1, 2, 7]
    updates = [update({"w": torch.from_numpy(a)}, num_samples=n) for a, n in zip(arrays, counts, strict=True)]
    expected = np.average(arrays.astype(np.float64), axis=0, weights=counts)
    np.testing.assert_allclose(weighted_average(updates)["w"].numpy(), expected, rtol=1e-6)


def test_one_client_is_left_exactly_as_it_is():
    tensors = {"w": torch.randn(7), "half": torch.randn(3).half(), "steps": torch.tensor(5)}
    average = weighted_average([update(tensors, num_samples=13)])
    assert all(torch.equal(average[name], tensor) for name, tensor in tensors.items())
    assert average["half"].dtype == torch.float16


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tensors": {"w": torch.zeros(2)}, "round": 1}, "expected updates of"),
        ({"tensors": {"w": torch.zeros(2)}, "kind": "gradient"}, "expected updates of"),
        ({"tensors": {"w": torch.zeros(3)}}, r"'w' has shape \(3,\)"),
        ({"tensors": {"v": torch.zeros(2)}}, "'w' is missing"),
    ],
)
def test_updates_that_do_not_belong_together(other, message):
    with pytest.raises(UpdateError, match=message):
        weighted_average([update({"w": torch.zeros(2)}), update(**other)])


def test_no_update_at_all():
    with pytest.raises(UpdateError, match="at least one"):
        weighted_average([])


def test_counts_of_batches_are_averaged_and_rounded():
    """Clients with shares of different size have seen different numbers of batches."""
    a = update({"n": torch.tensor(10), "mask": torch.tensor([True])}, num_samples=1)
    b = update({"n": torch.tensor(15), "mask": torch.tensor([True])}, num_samples=3)
    average = weighted_average([a, b])
    assert average["n"].item() == 14
    assert average["n"].dtype == torch.int64
    assert average["mask"].item() is True


def test_booleans_must_agree():
    a, b = update({"mask": torch.tensor([True])}), update({"mask": torch.tensor([False])})
    with pytest.raises(UpdateError, match="'mask'"):
        weighted_average([a, b])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_is_a_float64_oracle_in_every_dtype(dtype):
    """Sums in the tensors' own dtype would be off by many roundings."""
    counts = torch.arange(1, 201)
    updates = [update({"w": torch.rand(5, 3).add(1000).to(dtype)}, num_samples=n) for n in counts.tolist()]
    stacked = torch.stack([u.tensors["w"].double() for u in updates])
    expected = (stacked * counts[:, None, None]).sum(0) / counts.sum()
    assert torch.equal(weighted_average(updates)["w"], expected.to(dtype))


def test_a_running_average_counts_and_measures():
    average = RunningAverage()
    assert (average.count, average.update_bytes) == (0, 0)
    tensors = {"w": torch.zeros(5), "n": torch.tensor(3)}
    for count in (1, 2):
        average.add(update(tensors))
        assert (average.count, average.update_bytes) == (count, 5 * 4 + 8)


def test_what_is_refused_changes_nothing():
    average = RunningAverage()
    average.add(update({"w": torch.ones(2), "v": torch.ones(3)}))
    with pytest.raises(UpdateError):
        average.add(update({"w": torch.full((2,), 9.0), "v": torch.ones(4)}))
    assert average.count == 1
    assert torch.equal(average.result()["w"], torch.ones(2))


def test_averaging_changes_no_update():
    updates = [update({"w": torch.ones(2)}, num_samples=n) for n in (1, 3)]
    weighted_average(updates)
    assert all(torch.equal(u.tensors["w"], torch.ones(2)) for u in updates)


def test_the_most_samples_that_an_update_may_have_are_weighed_exactly():
    """Oracle: rational arithmetic. 9,000 such counts add up to less than float64's last exact integer."""
    values, counts = [3.0, 5.0, 7.0], [MAX_SAMPLES, MAX_SAMPLES - 1, 1]
    updates = [update({"w": torch.tensor([v])}, num_samples=n) for v, n in zip(values, counts, strict=True)]
    exact = sum(Fraction(v) * n for v, n in zip(values, counts, strict=True)) / sum(counts)
    assert weighted_average(updates)["w"].item() == np.float32(float(exact))
    assert 9_000 * MAX_SAMPLES < 2**53


def test_sums_that_are_not_finite_are_refused_by_name():
    huge = {"w": torch.full((2,), 1e300, dtype=torch.float64), "v": torch.ones(1)}
    updates = [update(huge, num_samples=10**9) for _ in range(2)]
    with pytest.raises(UpdateError, match=r"Aggregation refused\.\n  - 'w' has values too large") as caught:
        weighted_average(updates)
    assert "'v'" not in str(caught.value)
    assert "e+300" not in str(caught.value)


def test_integers_that_float64_does_not_hold_are_refused():
    """Rounded to 2⁶³ they would come back as the most negative integer."""
    with pytest.raises(UpdateError, match="'n' has values too large to be averaged"):
        weighted_average([update({"n": torch.tensor(2**63 - 1)}), update({"n": torch.tensor(2**63 - 2)})])
    assert weighted_average([update({"n": torch.tensor(2**53)})])["n"].item() == 2**53


@pytest.mark.parametrize("value", [2**60, 2**63 - 1, -(2**63)])
def test_integers_that_all_have_stay_as_they_are(value):
    """A constant, such as the seed of a hash, needs no average."""
    updates = [update({"n": torch.tensor([value, 3]), "w": torch.ones(1)}, num_samples=k) for k in (3, 4)]
    average = weighted_average(updates)["n"]
    assert average.tolist() == [value, 3]
    average.zero_()
    assert updates[0].tensors["n"][0] == value


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_against_numpy(dtype):
    values, counts = torch.randn(3, 5, dtype=dtype), [1, 2, 7]
    updates = [update({"z": z}, num_samples=n) for z, n in zip(values, counts, strict=True)]
    expected = np.average(values.to(torch.complex128).numpy(), axis=0, weights=counts)
    average = weighted_average(updates)["z"]
    assert average.dtype == dtype
    np.testing.assert_allclose(average.numpy(), expected, rtol=1e-6)
