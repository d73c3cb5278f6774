"""The server's optimizers against their formulas, and its state on its way through a checkpoint."""

from __future__ import annotations

import pytest
import torch

from fedkl.errors import ConfigError, TrainingError, UpdateError
from fedkl.federated import Averaging, Server, ServerAdam, ServerSGD
from tests.federated.setting import differences

OPTIMIZERS = [
    Averaging(),
    ServerSGD(),
    ServerSGD(lr=0.5, momentum=0.8, nesterov=True, weight_decay=0.1),
    ServerAdam(),
]


def start():
    return {"w": torch.randn(4, 3), "b": torch.randn(2), "mean": torch.randn(3), "steps": torch.tensor(7)}


def averages(rounds):
    return [start() | {"steps": torch.tensor(10 * round)} for round in range(rounds)]


def server_of(state, optimizer=None):
    return Server(state, trained=["w", "b"], optimizer=optimizer)


def test_averages_replace_the_weights():
    server, (average,) = server_of(start()), averages(1)
    server.apply_weights(average)
    assert not differences(server.state, average)


def test_a_step_of_one_is_averaging():
    """ServerSGD(lr=1, momentum=0): w − (w − average), equal up to rounding."""
    server = server_of(start(), ServerSGD(lr=1.0, momentum=0.0))
    for average in averages(3):
        server.apply_weights(average)
        for name, tensor in average.items():
            torch.testing.assert_close(server.state[name], tensor)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_by_its_formula(nesterov):
    """Oracle (Hsu et al. 2019): v ← β v + Δ, w ← w − η v; Nesterov's steps along Δ + β v."""
    state = start()
    server = server_of(state, ServerSGD(lr=0.7, momentum=0.9, nesterov=nesterov))
    w, v = state["w"].double(), torch.zeros(4, 3, dtype=torch.float64)
    for average in averages(5):
        server.apply_weights(average)
        delta = w - average["w"].double()
        v = 0.9 * v + delta
        w = w - 0.7 * (delta + 0.9 * v if nesterov else v)
        torch.testing.assert_close(server.state["w"].double(), w, rtol=1e-5, atol=1e-5)


def test_fedadam_by_its_formula():
    """Oracle (Reddi et al. 2021, algorithm 2) with Kingma and Ba's bias correction."""
    state, options = start(), ServerAdam(lr=0.1, beta1=0.8, beta2=0.95, epsilon=0.01)
    server = server_of(state, options)
    w, m, v = state["b"].double(), 0, 0
    for step, average in enumerate(averages(5), start=1):
        server.apply_weights(average)
        delta = w - average["b"].double()
        m = 0.8 * m + 0.2 * delta
        v = 0.95 * v + 0.05 * delta**2
        w = w - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 0.01)
        torch.testing.assert_close(server.state["b"].double(), w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_buffers_are_averaged_whatever_the_optimizer(optimizer):
    server = server_of(start(), optimizer)
    for average in averages(3):
        server.apply_weights(average)
        for name in ("mean", "steps"):
            assert torch.equal(server.state[name], average[name])


@pytest.mark.parametrize("nesterov", [False, True])
def test_gradient_steps_are_torchs_sgd(nesterov):
    state = {"w": torch.randn(4), "b": torch.randn(2)}
    parameters = [torch.nn.Parameter(t.clone()) for t in state.values()]
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.05}
    oracle = torch.optim.SGD(parameters, lr=0.1, **options)
    server = Server(state, trained=["w", "b"], optimizer=ServerSGD(lr=0.1, **options))
    for round in range(4):
        factor = 0.2**round
        oracle.param_groups[0]["lr"] = 0.1 * factor
        gradients = {name: torch.randn_like(t) for name, t in state.items()}
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient.clone()
        oracle.step()
        server.apply_gradient(gradients, lr_factor=factor)
    for got, expected in zip(server.state.values(), parameters, strict=True):
        torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [*((o, "weights") for o in OPTIMIZERS), *((o, "gradient") for o in OPTIMIZERS[1:])],
)
def test_a_snapshot_continues_to_the_last_bit(optimizer, kind):
    def go(server, rounds):
        for average in rounds:
            if kind == "weights":
                server.apply_weights(average)
            else:
                server.apply_gradient({name: average[name] for name in ("w", "b")}, lr_factor=0.5)

    rounds = averages(6)
    whole, resumed = server_of(start(), optimizer), server_of(start(), optimizer)
    go(whole, rounds[:3])
    snapshot = whole.snapshot()
    go(whole, rounds[3:])
    go(resumed, rounds[3:])  # what it has so far must go
    resumed.restore(snapshot)
    go(resumed, rounds[3:])
    assert not differences(whole.snapshot(), resumed.snapshot())


@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:], ids=repr)
def test_the_optimizers_state_matters(optimizer):
    """Without it, a snapshot would not continue to the last bit: the test above can fail."""
    rounds = averages(4)
    whole, resumed = server_of(start(), optimizer), server_of(start(), optimizer)
    for average in rounds[:3]:
        whole.apply_weights(average)
    snapshot = {place: t for place, t in whole.snapshot().items() if place.startswith("state/")}
    resumed.restore(snapshot)
    for server in (whole, resumed):
        server.apply_weights(rounds[3])
    assert differences(whole.state, resumed.state)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("how", ["shape", "dtype", "missing", "more"])
def test_a_snapshot_of_another_server_is_refused_and_changes_nothing(optimizer, how):
    server = server_of(start(), optimizer)
    server.apply_weights(start())
    before = server.snapshot()
    for place, value in before.items():
        if how == "missing" and "momentum" in place:
            continue  # of a parameter that was never stepped there is none
        others = {name: tensor for name, tensor in before.items() if name != place}
        changed = {
            "shape": {place: torch.ones(1, 1, dtype=value.dtype)},
            "dtype": {place: value.double() if value.is_floating_point() else value.float()},
            "missing": {},
            "more": {place: value, f"{place}x": value},
        }[how]
        with pytest.raises(UpdateError, match=f"Server: a snapshot of another server(?s:.*){place}"):
            server.restore(others | changed)
        assert not differences(before, server.snapshot())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_nothing_given_or_taken_shares_memory(optimizer):
    given, (average,) = start(), averages(1)
    copies = [{name: t.clone() for name, t in tensors.items()} for tensors in (given, average)]
    server = server_of(given, optimizer)
    snapshot = server.snapshot()
    taken = server.state
    server.apply_weights(average)
    assert not differences(given, copies[0])
    assert not differences(average, copies[1])
    assert not differences(taken, copies[0])
    for tensor in server.state.values():
        tensor.zero_()
    for tensor in snapshot.values():
        tensor.zero_()
    assert server.state["w"].any()


@pytest.mark.parametrize("apply", ["weights", "gradient"])
@pytest.mark.parametrize(
    "optimizer", [ServerSGD(lr=1e38), ServerAdam(lr=1e38, beta1=0.5)], ids=lambda o: type(o).__name__
)
def test_a_step_that_overflows_changes_nothing_and_says_whose_it_is(optimizer, apply):
    server = server_of(start(), optimizer)
    average = {name: 1e3 * tensor for name, tensor in start().items() if apply == "weights" or name in "wb"}
    with torch.no_grad():  # a step that goes well, so that there are moments
        server._optimizer.param_groups[0]["lr"] = 0.1
        server.apply_weights(averages(1)[0])
        server._optimizer.param_groups[0]["lr"] = optimizer.lr
    before = server.snapshot()
    assert any(name.startswith("optimizer/") for name in before)
    if isinstance(optimizer, ServerAdam):
        average["w"] = average["w"] * 1e30  # its square overflows, and with it the second moment
    with pytest.raises(TrainingError, match=rf"{type(optimizer).__name__} with .*1e\+38") as caught:
        getattr(server, f"apply_{apply}")(average)
    assert "'w' or its moments become non-finite" in str(caught.value)
    assert "Lower the server's learning rate" in str(caught.value)
    assert not differences(before, server.snapshot())


def test_moments_that_overflow_alone_are_noticed():
    """The weights would stay as they are, and never move again."""
    server = server_of(start(), ServerAdam(lr=0.1))
    before = server.snapshot()
    with pytest.raises(TrainingError, match="'w' or its moments become non-finite") as caught:
        server.apply_gradient({"w": torch.full((4, 3), 1e30), "b": torch.ones(2)})
    assert "'b'" not in str(caught.value)
    assert not differences(before, server.snapshot())


def test_unknown_tensors_are_refused():
    server = server_of(start(), ServerSGD())
    before = server.snapshot()
    with pytest.raises(UpdateError, match="unknown tensors: 'v'"):
        server.apply_weights({"w": torch.zeros(4, 3), "v": torch.zeros(2)})
    with pytest.raises(UpdateError, match="unknown tensors: 'mean', 'v'"):
        server.apply_gradient({"v": torch.zeros(2), "mean": torch.zeros(3)})
    with pytest.raises(UpdateError, match="not in the state: u, v"):
        Server(start(), trained=["w", "v", "u"])
    assert not differences(before, server.snapshot())


def test_averaging_takes_no_gradients():
    with pytest.raises(UpdateError, match="Use ServerSGD or ServerAdam"):
        server_of(start()).apply_gradient({"w": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (ServerSGD, {"lr": 0.0}),
        (ServerSGD, {"lr": float("nan")}),
        (ServerSGD, {"lr": float("inf")}),
        (ServerSGD, {"momentum": 1.0}),
        (ServerSGD, {"momentum": -0.1}),
        (ServerSGD, {"weight_decay": -1.0}),
        (ServerSGD, {"weight_decay": float("inf")}),
        (ServerAdam, {"lr": -1.0}),
        (ServerAdam, {"beta1": 1.0}),
        (ServerAdam, {"beta2": -0.5}),
        (ServerAdam, {"epsilon": 0.0}),
        (ServerAdam, {"epsilon": float("nan")}),
    ],
)
def test_unusable_optimizers(kind, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: expected .* got .*{name}={value}"):
        kind(**bad)


def test_nesterov_needs_momentum():
    with pytest.raises(ConfigError, match="nesterov=True needs a momentum"):
        ServerSGD(momentum=0.0, nesterov=True)
