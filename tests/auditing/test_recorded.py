"""Recorded updates: a right one gives no alarm, and each wrong thing is named."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedkl import Procedure, data, rng
from fedkl.attacking.updates import local_update, trained_tensors
from fedkl.auditing import RecordedUpdate, Subject, fits
from fedkl.auditing.recorded.likeness import Likeness
from fedkl.auditing.recorded.naming import naming
from fedkl.errors import ConfigError, DataError
from fedkl.recordingfile import Recording

CLIENTS = 80
EPOCH = Procedure(algorithm="fedavg", batch_size=8, lr=0.05)
STEP = Procedure(algorithm="fedavg", lr=0.05)


@pytest.fixture(autouse=True)
def _unchecked(unchecked):
    """Thousands of clients are played, and the type checks of each call took longer than they."""


@pytest.fixture(scope="module")
def images():
    """For the subject, for real clients, and what networks were trained on: all of them others."""
    dataset = data.load("mnist-sample", size=16, channels=1)
    return (
        (dataset.train_images[1000:1400].clone(), dataset.train_labels[1000:1400]),
        (dataset.train_images[1400:].clone(), dataset.train_labels[1400:]),
        (dataset.train_images[:1000].clone(), dataset.train_labels[:1000]),
    )


def seeded(build, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def relu(seed=0):
    return seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)),
        seed,
    )


def norms(seed=0):
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        seed,
    )


@pytest.fixture(scope="module")
def trained(images):
    """A function that gives a network trained from this seed; each is trained once."""
    known = {}

    def give(build, seed=0):
        if (build, seed) not in known:
            x, y = images[2]
            network, generator = build(seed), rng.generator(seed, "trained")
            optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
            for _ in range(4):
                for batch in torch.randperm(len(x), generator=generator).split(32):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
                    optimizer.step()
            known[build, seed] = network
        return copy.deepcopy(known[build, seed])

    return give


@pytest.fixture
def subject_of(images):
    def give(network, **fields):
        (x, y), build = images[0], relu if len(network) == 4 else norms
        fields = {"model": build, "images_per_client": 8, **fields}
        return Subject(images=x, labels=y, weights=network.state_dict(), **fields)

    return give


@pytest.fixture
def client(images):
    """A real client's update, by kind."""

    def give(network, kind="gradient", *, number=0, count=8, mode="train", procedure=None):
        x, y = images[1]
        chosen = torch.randperm(len(x), generator=rng.generator(number, "client"))[:count]
        how = {"train_mode": mode == "train", "local": procedure or Procedure()}
        if kind == "gradient":
            return local_update(network, x[chosen], y[chosen], **how)
        after, before = (
            trained_tensors(network, x[chosen], y[chosen], private=(), **how),
            network.state_dict(),
        )
        return {name: after[name] if kind == "weights" else after[name] - t for name, t in before.items()}

    return give


def asked(subject, tensors, kind="gradient", **fields):
    recorded = RecordedUpdate(tensors=tensors, kind=kind, **fields)
    return fits(subject, recorded, clients=CLIENTS)


def about(fit):
    return [problem.about for problem in fit.problems]


def test_a_file_is_read_and_others_are_refused(tmp_path):
    tensors = {"0.weight": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "update.safetensors")
    recorded = RecordedUpdate.read(tmp_path / "update.safetensors", kind="difference")
    assert torch.equal(recorded.tensors["0.weight"], tensors["0.weight"])
    assert (recorded.kind, recorded.received, recorded.images) == ("difference", None, None)
    assert "1., 1." not in repr(recorded)
    (tmp_path / "damaged").write_bytes((tmp_path / "update.safetensors").read_bytes()[:-3])
    for name in ("missing", "damaged"):
        with pytest.raises(ConfigError, match=rf"{name}: not an update that can be read .*save_file"):
            RecordedUpdate.read(tmp_path / name)


def test_there_are_three_kinds():
    with pytest.raises(ConfigError, match="expected one of gradient, difference, weights, got 'state'"):
        RecordedUpdate(tensors={}, kind="state")


@pytest.mark.parametrize("build", [relu, norms])
@pytest.mark.parametrize(
    ("kind", "procedure"),
    [("gradient", Procedure()), ("weights", STEP), ("difference", EPOCH)],
)
def test_a_right_update_gives_no_alarm_and_is_what_attacks_take(
    trained, subject_of, client, build, kind, procedure
):
    network, count = trained(build), 8 if procedure is not EPOCH else 16
    subject = subject_of(network, procedure=procedure, images_per_client=count)
    for number in range(2):
        tensors = client(network, kind, number=number, count=count, procedure=procedure)
        fit = asked(subject, tensors, kind)
        assert fit.fits, str(fit)
        assert str(fit).startswith("The update fits.")
    x, y = subject.images, subject.labels
    expected = local_update(network, x[:count], y[:count], train_mode=True, local=procedure)
    sent = expected if kind == "gradient" else None
    if sent is None:
        after = trained_tensors(network, x[:count], y[:count], train_mode=True, local=procedure, private=())
        before = network.state_dict()
        sent = {n: after[n] if kind == "weights" else after[n] - t for n, t in before.items()}
    update = asked(subject, sent, kind).update
    assert list(update) == [name for name, _ in network.named_parameters()]
    for name, tensor in expected.items():
        torch.testing.assert_close(update[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "procedure"), [("gradient", Procedure()), ("difference", STEP), ("weights", STEP)]
)
def test_frozen_layers_may_be_missing_and_are_not_attacked(trained, subject_of, client, kind, procedure):
    network = trained(norms)
    network[:2].requires_grad_(False)
    subject = subject_of(network, procedure=procedure, model=lambda: copy.deepcopy(network))
    tensors = client(network, kind, procedure=procedure)
    learned = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    for sent in (tensors, {name: tensors[name] for name in learned}):
        fit = asked(subject, sent, kind)
        assert fit.fits, str(fit)
        assert list(fit.update) == learned
    numbered = {str(number): tensors[name] for number, name in enumerate(learned)}
    assert "the order of its trained parameters" in str(asked(subject, numbered, kind))


@pytest.mark.parametrize("build", [relu, norms])
@pytest.mark.parametrize("kind", ["gradient", "difference"])
def test_wrong_base_weights_are_named(trained, subject_of, client, build, kind):
    procedure = Procedure() if kind == "gradient" else STEP
    subject = subject_of(trained(build), procedure=procedure)
    names = [name for name, _ in build().named_parameters()]
    for network in (build(), trained(build, seed=1)):
        tensors = client(network, kind, procedure=procedure)
        fit = asked(subject, {name: tensors[name] for name in names}, kind)
        assert about(fit) == ["base weights"], str(fit)
        assert "These base weights do not fit" in str(fit)


def test_weights_after_another_training_are_named(trained, subject_of, client):
    subject = subject_of(trained(relu), procedure=STEP)
    tensors = client(trained(relu, seed=1), "weights", procedure=STEP)
    assert about(asked(subject, tensors, "weights")) == ["base weights"]


def test_weights_nearby_are_told_where_a_network_fixes_inner_products(trained, subject_of, client):
    network = trained(relu)
    before, generator = copy.deepcopy(network), rng.generator(0, "moved")
    with torch.no_grad():
        for parameter in before.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * parameter.norm() * noise / noise.norm()
    found = [about(asked(subject_of(network), client(before, number=number))) for number in range(5)]
    assert found.count(["base weights"]) >= 4


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["gradient", "difference"])
def test_the_other_norm_mode_is_named(trained, subject_of, client, kind, mode):
    network, procedure = trained(norms), Procedure() if kind == "gradient" else STEP
    other = "eval" if mode == "train" else "train"
    tensors = client(network, kind, mode=other, procedure=procedure)
    tensors = {name: tensors[name] for name, _ in network.named_parameters()}
    fit = asked(subject_of(network, norm_mode=mode, procedure=procedure), tensors, kind)
    assert about(fit) == ["norm mode"], str(fit)
    assert f'Subject(norm_mode="{other}")' in str(fit)


def test_a_reversed_sign_is_named_or_untold_and_never_called_right(trained, subject_of, client):
    network, named = trained(relu), 0
    for number in range(6):
        tensors = {name: -t for name, t in client(network, number=number, count=1).items()}
        fit = asked(subject_of(network, images_per_client=1), tensors)
        assert about(fit) in (["sign"], []), str(fit)
        assert fit.problems or "whether its sign is right." in fit.untold
        named += len(fit.problems)
    assert named >= 4


def test_a_scale_is_named_and_the_step_size_estimated(trained, subject_of, client):
    network = relu()  # whose clients' updates are of much the same size
    tensors = {name: 100 * t for name, t in client(network).items()}
    fit = asked(subject_of(network), tensors)
    assert about(fit) == ["scale"]
    assert "times as large" in str(fit)
    faster = Procedure(algorithm="fedavg", batch_size=8, lr=1.0)
    fit = asked(
        subject_of(network, procedure=EPOCH, images_per_client=32),
        client(network, "difference", count=32, procedure=faster),
        "difference",
    )
    assert about(fit) == ["scale"], str(fit)
    (says,) = [problem.says for problem in fit.problems]
    estimate = float(says.split("about ")[1].split(",")[0])
    assert 2 < estimate < 8  # 1 · 4 steps
    assert "the subject says 0.2" in says


def test_counted_batches_and_statistics_tell_steps_and_mode_for_sure(trained, subject_of, client):
    network = trained(norms)
    subject = subject_of(network, procedure=EPOCH, images_per_client=16)
    twice = Procedure(algorithm="fedavg", batch_size=8, lr=0.05, epochs=2)
    fit = asked(subject, client(network, "weights", count=16, procedure=twice), "weights")
    assert "norms counted 4 batches since the base weights, the subject says 2" in str(fit)
    assert "steps" in about(fit)
    right = asked(subject, client(network, "weights", count=16, procedure=EPOCH), "weights")
    assert "2 batches were counted" in str(right)
    assert "the mean of the client's batches shows" in str(right)
    still = client(network, "weights", count=16, mode="eval", procedure=EPOCH)
    fit = asked(subject, still, "weights")
    assert "running statistics did not move" in str(fit)
    fit = asked(
        subject_of(network, procedure=EPOCH, images_per_client=16, norm_mode="eval"),
        client(network, "difference", count=16, procedure=EPOCH),
        "difference",
    )
    assert "running statistics moved" in str(fit)


def test_what_the_numbers_are_is_told(trained, subject_of, client):
    network = trained(relu)
    weights = client(network, "weights", procedure=STEP)
    for kind, procedure in (("gradient", Procedure()), ("difference", STEP)):
        fit = asked(subject_of(network, procedure=procedure), weights, kind)
        assert about(fit) == ["kind"]
        assert "its numbers are weights" in str(fit)
    for tensors in (client(network, "difference", procedure=STEP), client(network)):
        fit = asked(subject_of(network, procedure=STEP), tensors, "weights")
        assert about(fit) == ["kind"], str(fit)
        assert "a gradient or a difference of weights" in str(fit)
    fit = asked(subject_of(network, procedure=STEP), network.state_dict(), "weights")
    assert "nothing was trained" in str(fit)
    state = trained(norms)
    fit = asked(subject_of(state), client(state, "difference", procedure=STEP))
    assert about(fit) == ["kind"]
    assert "only parameters have a gradient" in str(fit)


@pytest.mark.parametrize("rename", ["numbers", "module.", "model.network."])
def test_other_names_are_found_again_and_printed(trained, subject_of, client, rename):
    network, tensors = trained(norms), None
    tensors = client(network)
    renamed = {
        str(n) if rename == "numbers" else rename + name: t for n, (name, t) in enumerate(tensors.items())
    }
    shuffled = dict(sorted(renamed.items(), reverse=True))  # a file keeps no order
    fit = asked(subject_of(network), shuffled)
    assert fit.fits
    assert all(torch.equal(fit.update[name], t) for name, t in tensors.items())
    first = "0" if rename == "numbers" else f"{rename}0.weight"
    assert f"'{first}' is '0.weight'" in str(fit)


def test_numbers_count_the_whole_state_too_and_prefixes_may_be_the_networks_own():
    network = nn.Sequential(norms())
    state = network.state_dict()
    numbered = naming(network, {str(n): t for n, t in enumerate(state.values())})
    assert list(numbered.names.values()) == list(state)
    assert "in the order of its state" in numbered.how
    bare = naming(network, {name.removeprefix("0."): t for name, t in state.items()})
    assert set(bare.names.values()) == set(state)
    assert bare.missing == bare.missing_buffers == bare.unexpected == bare.shapes == ()


def test_all_that_is_wrong_is_said_at_once(subject_of):
    tensors = {
        "1.weight": torch.ones(256, 32),
        "1.bias": torch.full((32,), torch.inf),
        "3.weight": torch.ones(10, 32),
        "other": torch.ones(1),
    }
    fit = asked(subject_of(relu()), tensors)
    assert about(fit) == ["names", "names", "shapes", "values"]
    text = str(fit)
    assert "'3.bias' is missing" in text
    assert "'other' is not of the network" in text
    assert "'1.weight' has shape (256, 32), expected (32, 256)" in text
    assert "'1.bias' is not finite" in text
    assert all(problem.remedy for problem in fit.problems)
    assert fit.update is None
    zeros = {name: torch.zeros_like(p) for name, p in relu().named_parameters()}
    assert "All numbers are zero" in str(asked(subject_of(relu()), zeros))


def test_a_recording_tells_base_weights_and_images_exactly(trained, subject_of, client, tmp_path):
    network, other = trained(relu), trained(relu, seed=1)
    tensors = client(network, "weights", procedure=STEP)
    metrics = {"metrics": {"num-examples": 8}}
    Recording(received=network.state_dict(), sent=tensors, about={"round": 1, "metrics": metrics}).write(
        tmp_path / "round-1"
    )
    recorded = RecordedUpdate.from_recording(tmp_path / "round-1")
    fit = fits(subject_of(network, procedure=STEP), recorded, clients=CLIENTS)
    assert fit.fits, str(fit)
    assert not [what for what in fit.untold if "base weights" in what]
    fit = fits(subject_of(other, procedure=STEP, images_per_client=4), recorded, clients=CLIENTS)
    assert about(fit) == ["procedure", "base weights"]
    assert "The client trained on 8 images, the subject says 4" in str(fit)
    assert "4 of 4 tensors are not those that the client received" in str(fit)


def test_a_gradient_is_not_what_local_training_sends(trained, subject_of, client):
    network = trained(relu)
    fit = asked(subject_of(network, procedure=STEP), client(network))
    assert about(fit) == ["procedure"]
    assert "The file is a gradient, the subject's clients send weights" in str(fit)


def test_a_function_that_trains_is_played(trained, subject_of, images):
    network = trained(relu)

    def train(model, inputs, labels):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    x, y = images[1]
    for base, expected in ((network, []), (relu(), ["base weights"])):
        client = copy.deepcopy(base)
        train(client, x[:8], y[:8])
        before = dict(base.named_parameters())
        tensors = {name: (after - before[name]).detach() for name, after in client.named_parameters()}
        assert about(asked(subject_of(network, procedure=train), tensors, "difference")) == expected


def test_it_repeats_and_leaves_everything_as_it_was(trained, subject_of, client):
    network = trained(norms)
    subject, tensors = subject_of(network), client(network)
    kept = {name: t.clone() for name, t in tensors.items()}
    state = torch.random.get_rng_state()
    first, second = (str(asked(subject, tensors)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, kept[name]) for name, t in tensors.items())


def test_clients_that_cannot_be_played_and_too_few_are_refused(images, client):
    def flat():
        return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    x, y = images[0]
    subject = Subject(model=flat, images=x, labels=y)  # a batch of one has no statistics
    tensors = client(flat(), mode="eval")
    with pytest.raises(DataError, match="a client with 1 images cannot be played in train mode"):
        asked(subject, tensors)
    exits = Subject(model=flat, images=x, labels=y, procedure=lambda network, x, y: sys.exit(0))
    with pytest.raises(DataError, match=r"cannot be played in \w+ mode \(SystemExit: 0\)"):
        fits(exits, RecordedUpdate(tensors=client(flat(), mode="eval"), kind="weights"), clients=40)
    with pytest.raises(ConfigError, match="at least 40 clients"):
        fits(subject, RecordedUpdate(tensors=tensors), clients=39)


def test_no_played_client_that_was_kept_apart_is_a_stranger():
    generator = rng.generator(0, "likeness")
    weights = {"a": torch.randn(5, 4, generator=generator), "b": torch.zeros(5)}

    def draw():
        return {name: 1 + torch.randn(t.shape, generator=generator) for name, t in weights.items()}

    clients = [draw() for _ in range(80)]
    likeness = Likeness(clients, count=80, weights=weights)
    assert all(likeness.compare(each).fits for each in clients[60:])
    assert sum(likeness.compare(draw()).fits for _ in range(100)) >= 95
    turned = {"a": clients[70]["a"] * torch.tensor([30.0, -30, 30, -30]), "b": clients[70]["b"]}
    assert not likeness.compare(turned).fits
    scaled = likeness.compare({name: 50 * t for name, t in clients[70].items()})
    assert scaled.fits
    assert scaled.odd_size
    assert 25 < scaled.factor < 100
