"""The weighted average against numpy, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkl.errors import UpdateError
from fedkl.federated import Server, weighted_average
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec


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


def test_the_servers_gradient_step_is_torchs_nesterov_sgd():
    start = {"w": torch.randn(4), "b": torch.randn(2)}
    parameters = [torch.nn.Parameter(t.clone()) for t in start.values()]
    oracle = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05)
    server = Server(start, lr=0.1, momentum=0.9, weight_decay=0.05)
    for round in range(4):
        gradients = {name: torch.randn_like(t) for name, t in start.items()}
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient.clone()
        oracle.step()
        server.aggregate([update(gradients, kind="gradient", round=round)])
    for got, expected in zip(server.state.values(), parameters, strict=True):
        torch.testing.assert_close(got, expected.detach())


def test_the_server_refuses_unknown_tensors():
    with pytest.raises(UpdateError, match="unknown tensors: v"):
        Server({"w": torch.zeros(2)}).aggregate([update({"v": torch.zeros(2)})])
