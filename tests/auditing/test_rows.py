"""Rows of layers: what their gradients are made of, and a network that nothing is left behind in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkl.auditing.rows import Layer, _where_images_are, layers_of, looked_at, rows_of
from tests.auditing.subjects import CLASSES, Words, convnet, images, labels, mlp, tokens

COUNT = 7


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x):
        x = self.conv(F.relu(self.conv(x), inplace=True))
        return self.fc(self.shared(torch.tanh(self.shared(x))).flatten(1))


class Odd(nn.Module):
    """With layers that have no rows, beside one that has some."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.uncalled = nn.Linear(8, 8)
        self.table = nn.Linear(8, 8)
        self.auxiliary = nn.Linear(128, 3)
        self.fc = nn.Linear(128, CLASSES)
        self.codes = nn.Parameter(torch.eye(8)[None, None])

    def forward(self, x):
        x = self.grouped(x.expand(-1, 2, -1, -1)) + self.table(self.codes)
        self.auxiliary(x.flatten(1))
        return self.fc(x.flatten(1))


class Noting(nn.Module):
    """Raises from its second call on."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls >= 2:
            raise RuntimeError("no more")
        return self.fc(x.flatten(1))


class Sequences(nn.Module):
    """Rows of an image as a sequence, which may come before the images, as PyTorch has it."""

    def __init__(self, *, images_first=False):
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=images_first)
        self.fc = nn.Linear(6, CLASSES)
        self.images_first = images_first

    def forward(self, x):
        x = x[:, 0] if self.images_first else x[:, 0].transpose(0, 1)
        return self.fc(self.encoder(self.embed(input=x)).mean(1 if self.images_first else 0))


class Untold(nn.Module):
    """One layer gets all images in one dimension, another pairs of them, a third one number."""

    def __init__(self):
        super().__init__()
        self.folded = nn.Linear(8, 5)
        self.pairs = nn.Linear(1, 5)
        self.number = nn.Linear(1, 1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x):
        sequences = x[:, 0].transpose(0, 1)
        folded = self.folded(sequences.flatten(0, 1)).mean()
        pairs = self.pairs((x.flatten(1) @ x.flatten(1).T)[..., None]).mean()
        return self.fc(x.flatten(1)) + folded + pairs + self.number(x.mean()[None])


class OfOneSize(nn.Module):
    """Takes batches of so many only."""

    def __init__(self, size):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)
        self.size = size

    def forward(self, x):
        assert len(x) == self.size
        return self.fc(x.flatten(1))


def conv(*, outputs=3, activation=nn.Sigmoid, **options):
    layer = nn.Conv2d(1, outputs, **{"kernel_size": 3, **options})
    return nn.Sequential(layer, activation(), nn.Flatten(), nn.LazyLinear(CLASSES))


def attention():
    return nn.Sequential(
        nn.Flatten(1, 2), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.Flatten(),
        nn.Linear(24, CLASSES),
    )  # fmt: skip


NETWORKS = {
    "linear": mlp,
    "linear, places": attention,
    "batch norm, relu in place": convnet,
    "stride": lambda: conv(stride=(2, 1), padding=1),
    "dilation": lambda: conv(dilation=2, padding=(1, 2)),
    "same": lambda: conv(padding="same", kernel_size=(3, 2), dilation=(1, 2)),
    "valid": lambda: conv(padding="valid"),
    "circular": lambda: conv(padding=(1, 2), padding_mode="circular", stride=2),
    "reflect, same": lambda: conv(padding="same", padding_mode="reflect"),
    "no bias": lambda: conv(bias=False),
    "relu in place": lambda: conv(activation=lambda: nn.ReLU(inplace=True)),
    "called twice": Twice,
    "sequence first": Sequences,
    "sequences, images first": lambda: Sequences(images_first=True),
}


def built(build, *, x=None):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = build()
        network(images(2) if x is None else x)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
    return network


def all_rows(network, *, x=None, chunk=3, observed=None):
    x = images(COUNT) if x is None else x
    layers = layers_of(network, dict(network.named_parameters()) if observed is None else observed)
    return layers, list(rows_of(network, x, labels(len(x)), layers=layers, chunk=chunk))


def gradient_of_sum(network, x):
    network = copy.deepcopy(network).eval()
    F.cross_entropy(network(x), labels(len(x)), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def summed(chunks, name):
    return sum(torch.einsum("npo,npi->oi", rows[name].outputs, rows[name].inputs) for rows in chunks)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradient_is_the_sum_of_rows(name):
    network, x = built(NETWORKS[name]), images(COUNT)
    layers, chunks = all_rows(network)
    wanted = gradient_of_sum(network, x)
    expected = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert [layer.name for layer in layers] == expected
    for layer in layers:
        if layer.name.endswith("self_attn.out_proj"):  # whose weight is read, and which is not called
            assert layer.name not in chunks[0]
            continue
        assert layer.bias == (f"{layer.name}.bias" in wanted)
        found = summed(chunks, layer.name)
        assert found.shape == (layer.outputs, layer.inputs)
        torch.testing.assert_close(found, layer.matrix(wanted), atol=1e-5, rtol=1e-4)


def test_a_gradient_of_tokens_is_the_sum_of_rows():
    network = built(Words, x=tokens(2))
    layers, chunks = all_rows(network, x=tokens(COUNT))
    wanted = gradient_of_sum(network, tokens(COUNT))
    assert [layer.name for layer in layers] == ["hidden", "fc"]
    for layer in layers:
        torch.testing.assert_close(summed(chunks, layer.name), layer.matrix(wanted), atol=1e-5, rtol=1e-4)


def test_rows_are_of_each_image_alone():
    network = built(convnet)
    layers, chunks = all_rows(network, chunk=3)
    assert [len(each["0"].inputs) for each in chunks] == [3, 3, 1]
    for layer in layers:
        rows = torch.cat([each[layer.name].inputs for each in chunks])
        back = torch.cat([each[layer.name].outputs for each in chunks])
        for image in range(COUNT):
            network.eval().zero_grad()
            F.cross_entropy(network(images(COUNT)[[image]]), labels(COUNT)[[image]]).backward()
            wanted = layer.matrix({name: p.grad for name, p in network.named_parameters()})
            torch.testing.assert_close(back[image].T @ rows[image], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [8, 7], ids=["as many as places", "others"])
def test_it_does_not_matter_whether_sequences_or_images_come_first(count):
    """As many images as a sequence is long are no sequence."""
    ours, theirs = built(Sequences), built(lambda: Sequences(images_first=True))
    theirs.load_state_dict(ours.state_dict())
    (found,), (wanted,) = (all_rows(each, x=images(count), chunk=64)[1] for each in (ours, theirs))
    assert {"embed", "encoder.linear1", "encoder.linear2", "fc"} == found.keys() == wanted.keys()
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name].inputs, rows.inputs)
        torch.testing.assert_close(found[name].outputs, rows.outputs)


def test_layers_of_which_nobody_can_say_what_is_of_which_image_are_left_out():
    """In a chunk of one image, too, where much has the size 1."""
    _, chunks = all_rows(built(Untold))
    assert [set(each) for each in chunks] == 3 * [{"fc"}]


def test_of_a_network_that_takes_batches_of_one_size_images_come_first():
    network = OfOneSize(COUNT)
    _, (chunk,) = all_rows(network, chunk=COUNT)
    assert torch.equal(chunk["fc"].inputs[:, 0, :-1], images(COUNT).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_float32_whatever_the_network_computes_in(dtype):
    class Casting(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(dtype))

    network = Casting(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, CLASSES)).to(dtype)
    layers, (chunk,) = all_rows(network, chunk=COUNT)
    wanted = gradient_of_sum(network, images(COUNT))
    for layer in layers:
        found, expected = summed([chunk], layer.name), layer.matrix(wanted)
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.05)


def test_layers_of_complex_numbers_are_left_out():
    network = nn.ModuleDict({"real": nn.Linear(4, 1), "complex": nn.Linear(4, 1, dtype=torch.cfloat)})
    assert [layer.name for layer in layers_of(network, dict(network.named_parameters()))] == ["real"]


def test_a_bias_that_is_not_observed_is_no_input():
    network = built(mlp)
    layers, chunks = all_rows(network, observed={"1.weight": network[1].weight, "3.bias": network[3].bias})
    assert layers == [Layer(name="1", bias=False, inputs=64, outputs=32)]
    torch.testing.assert_close(
        summed(chunks, "1"), gradient_of_sum(network, images(COUNT))["1.weight"], atol=1e-5, rtol=1e-4
    )


def test_layers_without_rows_are_left_out():
    network = built(Odd)
    layers, chunks = all_rows(network)
    assert "grouped" not in [layer.name for layer in layers]
    assert set(chunks[0]) == {"auxiliary", "fc"}  # not: uncalled, nor what is not called with the images
    assert chunks[0]["auxiliary"].outputs.abs().max() == 0  # the loss does not look there
    torch.testing.assert_close(
        summed(chunks, "fc")[:, :-1], gradient_of_sum(network, images(COUNT))["fc.weight"]
    )


def test_frozen_layers_are_left_out():
    network = built(convnet)
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    _, chunks = all_rows(network)
    assert set(chunks[0]) == {"3", "7"}
    wanted = gradient_of_sum(network, images(COUNT))
    torch.testing.assert_close(summed(chunks, "7")[:, :-1], wanted["7.weight"], atol=1e-5, rtol=1e-4)


def test_nothing_trained_gives_no_rows():
    network = built(mlp).requires_grad_(False)
    assert all_rows(network)[1] == [{}, {}, {}]


def test_the_widest_layer_has_4096_inputs():
    network = nn.ModuleDict(
        {
            "fits": nn.Linear(4095, 1),
            "bare": nn.Linear(4096, 1, bias=False),
            "wide": nn.Linear(4096, 1),
            "conv": nn.Conv2d(456, 1, 3),
        }
    )
    assert [layer.name for layer in layers_of(network, dict(network.named_parameters()))] == ["fits", "bare"]


def state_of(network):
    return (
        [module.training for module in network.modules()],
        [len(module._forward_hooks) for module in network.modules()],
        [parameter.grad for parameter in network.parameters()],
        {name: tensor.clone() for name, tensor in network.state_dict().items()},
    )


def same(before, after):
    return before[:3] == after[:3] and all(torch.equal(after[3][name], t) for name, t in before[3].items())


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training):
    network = built(convnet).train(training)
    network[1].train(not training)  # a frozen norm, say
    before = state_of(network)
    with torch.no_grad():
        _, chunks = all_rows(network)
    assert same(before, state_of(network))
    assert not any(rows.inputs.requires_grad or rows.outputs.requires_grad for rows in chunks[0].values())


def test_the_network_is_left_as_it_was_after_an_exception():
    network = Noting().train()
    before = state_of(network)
    with pytest.raises(RuntimeError, match="no more"):
        all_rows(network)
    assert same(before, state_of(network))


def test_the_network_is_left_as_it_was_by_who_stops_halfway():
    network = built(convnet).train()
    before = state_of(network)
    chunks = rows_of(
        network, images(COUNT), labels(COUNT), layers=layers_of(network, network.state_dict()), chunk=3
    )
    next(chunks)
    chunks.close()
    assert same(before, state_of(network))


@pytest.mark.parametrize("most", [1, 3, 100])
def test_as_many_images_at_once_as_fit_into_the_memory(monkeypatch, most):
    model = convnet()
    layers = layers_of(model, dict(model.named_parameters()))
    x, y = images(COUNT), labels(COUNT)
    (whole,) = rows_of(model, x, y, layers=layers)
    asked = []
    monkeypatch.setattr("fedkl.auditing.rows.at_once", lambda each: (asked.append(each), most)[1])
    chunks = list(rows_of(model, x, y, layers=layers))
    assert max(len(next(iter(chunk.values())).inputs) for chunk in chunks) == min(most, COUNT)
    for name, rows in whole.items():
        torch.testing.assert_close(torch.cat([chunk[name].inputs for chunk in chunks]), rows.inputs)
        torch.testing.assert_close(torch.cat([chunk[name].outputs for chunk in chunks]), rows.outputs)
    one = sum(rows.inputs[:1].nbytes + rows.outputs[:1].nbytes for rows in whole.values())
    assert asked[0] > 2 * one


class Odder(nn.Module):
    """Draws in eval mode, works in place, and takes batches of its own size only."""

    def __init__(self, least=1):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)
        self.least = least

    def forward(self, x):
        if len(x) < self.least:
            raise ValueError("too few")
        return self.fc(F.dropout(x.sub_(0.5).flatten(1), training=True))


@pytest.mark.parametrize("least", [1, 2, 5], ids=["any", "not one", "not two"])
def test_asking_how_many_fit_changes_nothing(monkeypatch, least):
    model, x, y = Odder(least), images(COUNT), labels(COUNT)
    before, layers = x.clone(), layers_of(model, dict(model.named_parameters()))
    found = []
    for asked in (2, 100):
        monkeypatch.setattr("fedkl.auditing.rows._ASKED", asked)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            found += rows_of(model, x, y, layers=layers)
    assert torch.equal(x, before)
    asked, unasked = (each["fc"].inputs for each in found)
    assert torch.equal(asked, unasked)


def test_finding_the_dimension_of_the_images_changes_nothing():
    model, x = Odder(), images(COUNT)
    before, layers = x.clone(), layers_of(model, dict(model.named_parameters()))
    random = torch.get_rng_state()
    assert _where_images_are(model, x, layers, most=3) == {"fc": [0]}
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_no_more_images_at_once_than_are_of_use(monkeypatch):
    model = convnet()
    layers = layers_of(model, dict(model.named_parameters()))
    asked = []
    monkeypatch.setattr("fedkl.auditing.rows.at_once", lambda each: (asked.append(each), 100)[1])
    list(rows_of(model, images(COUNT), labels(COUNT), layers=layers))
    monkeypatch.setattr("fedkl.auditing.rows._ENOUGH", 3 * asked[0] + 1)
    chunks = list(rows_of(model, images(COUNT), labels(COUNT), layers=layers))
    assert [len(next(iter(chunk.values())).inputs) for chunk in chunks] == [3, 3, 1]


def test_what_is_looked_at_of_an_update():
    """Norms, grouped convolutions and layers that are too wide are not."""
    model = Odd()
    update = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    update["table.bias"] = torch.zeros(8)
    del update["uncalled.bias"]
    found = looked_at(layers_of(model, update), update)
    expected = {"uncalled.weight", "table.weight", "table.bias", "auxiliary.weight", "auxiliary.bias"}
    assert set(found) == expected | {"fc.weight", "fc.bias"}
    assert all(found[name] is update[name] for name in found)
