"""Defenses that change what is sent: one row each; all are held to the same, in every place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import nn

from fedkl import data, experiments, report
from fedkl.attacking import SimulatedClients
from fedkl.attacks import PriorOnly
from fedkl.config import AttackConfig
from fedkl.defenses import DEFENSES, KeyLock, NoDefense, own_arms, register_defense
from fedkl.defenses.changing import UpdateDefense
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.combined import Combined
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.local_dp import LocalDpMod
from fedkl.defenses.noise import GaussianNoise, LaplaceNoise
from fedkl.defenses.percentile import Percentile
from fedkl.defenses.precode import PRECODE
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.sparse_vector import SparseVector
from fedkl.errors import ConfigError
from fedkl.federated import FederatedTraining, Federation
from fedkl.protocol import Procedure, Sending
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Halving(UpdateDefense):
    """Sends half of everything: what such a file needs at least."""

    type: Literal["test-halving"] = "test-halving"

    def changed(self, change, *, draws, client):
        return halved(change)

    @property
    def public_transform(self):
        return halved


def halved(tensors, seen=None):
    return {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


ROWS = [
    Halving(),
    GaussianNoise(deviation=0.01),
    LaplaceNoise(scale=0.01),
    Pruning(),
    Percentile(gamma=1e-4),
    SparseVector(fraction=0.3, epsilon=1e9, noise_var=1e3, tau=0.0),
    LocalDpMod(clipping_norm=1e-3, epsilon=100.0),
    Combined(parts=(GaussianNoise(deviation=0.01), Pruning())),
    Clipping(max_norm=1e-3),
    ClientDP(clip=0.01),
]


@pytest.fixture(autouse=True)
def halving():
    register_defense(Halving)
    yield
    DEFENSES.forget("test-halving")


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10))


@pytest.fixture(scope="module")
def images():
    whole = data.load("mnist-sample")
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    return replace(whole, **{part: getattr(whole, part)[:120] for part in parts})


@pytest.mark.parametrize("defense", ROWS, ids=lambda defense: defense.type)
def test_training_sends_what_it_changed(images, defense):
    def trained(defense):
        torch.manual_seed(0)
        training = FederatedTraining(clients=2, rounds=1)
        federation = Federation(net(), defense=defense, dataset=images, training=training, seed=0)
        list(federation.run())
        return federation.server.state

    plain, changed = trained(NoDefense()), trained(defense)
    assert all(not torch.equal(plain[name], changed[name]) for name in plain)
    assert all(tensor.isfinite().all() for tensor in changed.values())


def answered(model, mod, *, defense, start=None):
    """What an app sends that trained a model, behind a mod."""
    import flwr.clientapp as flwr
    from flwr.app import ArrayRecord, Context, Message, RecordDict

    from fedkl.flower import in_process, public_arrays

    def train(message, context):
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict())}), reply_to=message)

    app = flwr.ClientApp(mods=[mod])
    app.train()(train)
    sent = RecordDict({"arrays": public_arrays(net() if start is None else start, defense=defense)})
    with in_process._identity():
        message = Message(sent, dst_node_id=7, message_type="train")
        message.metadata.__dict__["_message_id"] = "1"
        answer = app(message=message, context=Context(1, 7, {}, RecordDict(), {}))
    return sent["arrays"].to_torch_state_dict(), answer.content["arrays"].to_torch_state_dict()


@pytest.mark.parametrize("defense", ROWS, ids=lambda defense: defense.type)
def test_flower_sends_what_it_changed(defense):
    pytest.importorskip("flwr")
    from fedkl.flower import TransformMod

    model = net()
    _, arrays = answered(model, TransformMod(defense), defense=defense)
    for name, tensor in model.state_dict().items():
        assert arrays[name].shape == tensor.shape
        assert not torch.equal(arrays[name], tensor)


def test_flower_sends_frozen_parameters_as_they_came():
    pytest.importorskip("flwr")
    from fedkl.flower import TransformMod

    model, noise = net(), GaussianNoise(deviation=0.01)
    model[0].requires_grad_(False)
    came, arrays = answered(model, TransformMod(noise, network=model), defense=noise)
    assert [name for name in came if torch.equal(arrays[name], came[name])] == ["0.weight", "0.bias"]


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(64, 64, bias=False)
        self.decode = nn.Linear(64, 64)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.decode(self.encode(x.flatten(1))))


@pytest.mark.parametrize("kind", ["weights", "gradient"])
def test_a_tensor_of_several_names_counts_once(kind):
    """The bound is that of the tensors, and what a share of the entries is of, is them."""
    sizes = {"a": 3, "again": 3, "b": 4, "once-more": 3, "frozen": 2, "frozen-again": 2}
    received = {name: torch.full((size,), 0.5) for name, size in sizes.items()}
    trained = {name: tensor + 3.0 for name, tensor in received.items()}
    schema = PublicSchema(kind=kind, specs={name: TensorSpec.of(t) for name, t in trained.items()})
    update = PublicUpdate(schema=schema, tensors=trained, num_samples=1, round=0)
    tied = {"again": "a", "once-more": "a", "frozen-again": "frozen", "elsewhere": "a", "b": "unsent"}
    frozen = frozenset({"frozen", "frozen-again"})
    at_hand = Sending(received=received, frozen=frozen, tied=tied)
    sent = ClientDP(clip=1.0, noise_multiplier=0.0).transform(update, client=at_hand).tensors
    start = received if kind == "weights" else dict.fromkeys(received, 0.0)
    change = {name: sent[name] - start[name] for name in sent}
    assert torch.cat([change["a"], change["b"]]).norm() == pytest.approx(1.0, rel=1e-5)
    noisy = ClientDP().transform(update, client=at_hand).tensors
    for found in (sent, noisy):
        assert torch.equal(found["again"], found["a"])
        assert torch.equal(found["once-more"], found["a"])
        assert torch.equal(found["frozen-again"], received["frozen-again"])
    assert not torch.equal(noisy["a"], sent["a"])
    assert noisy.keys() == sizes.keys()


def test_flower_changes_a_tied_weight_once():
    pytest.importorskip("flwr")
    from fedkl.flower import TransformMod

    model, noise = Tied(), GaussianNoise(deviation=0.01)
    _, arrays = answered(model, TransformMod(noise, network=model), defense=noise, start=model)
    assert torch.equal(arrays["encode.weight"], arrays["decode.weight"])
    assert not torch.equal(arrays["encode.weight"], model.encode.weight)


def test_a_mod_refuses_complex_weights_before_anything_is_trained():
    flower = pytest.importorskip("flwr.clientapp")
    from flwr.app import ArrayRecord, Context, Message, RecordDict

    from fedkl.flower import TransformMod, in_process, public_arrays

    model, noise, asked = net(), GaussianNoise(deviation=0.01), []
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"'phase' is torch\.complex64"):
        public_arrays(model, defense=noise)
    broken = net()
    nn.init.constant_(broken[0].bias, torch.inf)
    with pytest.raises(ConfigError, match=r"public_arrays: .*\n  - '0\.bias' has non-finite values"):
        public_arrays(broken, defense=noise)
    app = flower.ClientApp(mods=[TransformMod(noise)])
    app.train()(lambda message, context: asked.append(message))
    sent = RecordDict({"arrays": ArrayRecord(model.state_dict())})
    with in_process._identity():
        message = Message(sent, dst_node_id=7, message_type="train")
        message.metadata.__dict__["_message_id"] = "1"
        answer = app(message=message, context=Context(1, 7, {}, RecordDict(), {}))
    assert answer.has_error()
    assert not asked


def test_played_complex_weights_are_refused():
    with pytest.raises(ConfigError, match=r"'w' is torch\.complex64"):
        Halving().imitate_transform(
            {"w": torch.ones(1, 2, dtype=torch.complex64)}, clients=[], generator=torch.Generator()
        )


def test_flower_sends_a_frozen_tied_weight_as_it_came():
    pytest.importorskip("flwr")
    from fedkl.flower import TransformMod

    model, noise = Tied(), GaussianNoise(deviation=0.01)
    model.encode.weight.requires_grad_(False)
    came, arrays = answered(model, TransformMod(noise, network=model), defense=noise, start=model)
    same = [name for name in came if torch.equal(arrays[name], came[name])]
    assert same == ["encode.weight", "decode.weight"]


@pytest.mark.parametrize("defense", ROWS, ids=lambda defense: defense.type)
def test_it_is_attacked_and_reported_beside_its_control(tmp_path, defense):
    config = AttackConfig(attack=PriorOnly(), defense=defense, trials=2, auxiliary=50, networks="one")
    run = experiments.run(config, out=tmp_path / "run")
    names = [arm["name"] for arm in run.summary["arms"]]
    main = [name for name, arm in own_arms(defense).items() if arm.main]
    assert names == main == ["no-norm", defense.type]
    assert experiments.run(type(config).model_validate(config.model_dump()), out=tmp_path / "run").summary
    report.build(run.path)
    assert (
        f"against {defense.plain or defense.type}: {defense.describe()}"
        in (run.path / "report.md").read_text()
    )


@pytest.mark.parametrize(
    "procedure", [Procedure(), Procedure(algorithm="fedavg", steps=2)], ids=["one", "weights"]
)
@pytest.mark.parametrize("defense", ROWS, ids=lambda defense: defense.type)
def test_an_informed_server_plays_it(images, defense, procedure):
    """Clients that the server plays send what real ones send: the same size, and what is drawn repeats."""
    arm, model = own_arms(defense)[defense.type], net()
    batch = images.test_images[:3][:, None], images.test_labels[:3][:, None]

    def played(defense, seed=0):
        clients = SimulatedClients.of(
            replace(arm, defense=defense),
            defense.prepare(model),
            model,
            local=procedure,
            generator=torch.Generator().manual_seed(seed),
        )
        return clients(*batch)

    changed, again, plain = played(defense), played(defense), played(NoDefense())
    for name in plain:
        assert torch.equal(changed[name], again[name])
        assert not torch.equal(changed[name], plain[name])


def test_flowers_mod_takes_such_a_defense_only():
    pytest.importorskip("flwr")
    from fedkl.flower import TransformMod

    noise = GaussianNoise()
    for defense, why in {
        KeyLock(): "keeps tensors private",
        NoDefense(): "changes none",
        PRECODE(): "changes the network",
        DPSGD(): "changes how clients train",
        Combined(parts=(KeyLock(), noise)): "keeps tensors private",
        Combined(parts=(PRECODE(), noise)): "changes the network",
        Combined(parts=(DPSGD(), noise)): "changes how clients train",
    }.items():
        with pytest.raises(ConfigError, match=f"expected a defense that changes updates.*{why}"):
            TransformMod(defense)
