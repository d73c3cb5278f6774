"""Trained weights as the subject of an experiment."""

from __future__ import annotations

import json
from functools import partial

import pytest
import safetensors.torch
import torch

from fedkl import config as configs
from fedkl import experiment_flags, training
from fedkl.attacking.run import attack
from fedkl.configured import dataset_of, networks_of, prepared
from fedkl.errors import ConfigError
from fedkl.federated.fill_in import server_fill_ins
from fedkl.runs import RunDirectory
from fedkl.training import train
from tests.data import dicom_files

MODEL = {"name": "lenet", "initialization": "default"}


def attack_config(weights, **fields):
    values = {"type": "attack", "model": MODEL | {"weights": str(weights)}, "attack": {"type": "prior-only"}}
    return configs.parse(values | {"auxiliary": 20, "trials": 2} | fields, source="test")


def network(config, number=0):
    return networks_of(config, dataset_of(config.data))(number)


@pytest.mark.parametrize("values", ["window", "stored", (40.0, 400.0)])
def test_the_choice_for_dicom_reaches_the_images_and_a_file(tmp_path, values):
    pytest.importorskip("pydicom", reason="of the extra dicom")
    for part in ("train", "val"):
        (tmp_path / "scans" / part / "ill").mkdir(parents=True)
        window = [(0x00281050, "DS", "100 "), (0x00281051, "DS", "100 ")]
        scan = dicom_files.dicom(dicom_files.words(*[120] * 16), stored=12, more=window)
        (tmp_path / "scans" / part / "ill" / "1.dcm").write_bytes(scan)
    given = list(values) if isinstance(values, tuple) else values
    settings = (f"data.dicom={given}", "data.size=4", "data.channels=1")
    fields = {"data.name": f"{tmp_path}/scans"}
    config = experiment_flags.from_flags("train", file=None, fields=fields, settings=settings)
    (tmp_path / "config.toml").write_text(configs.dump(config))
    assert configs.load(tmp_path / "config.toml").data == config.data
    assert config.data.dicom == values
    expected = {"window": 20.5 / 99 + 0.5, "stored": 120 / 4095}.get(values, 80.5 / 399 + 0.5)
    torch.testing.assert_close(
        dataset_of(config.data).train_images[:], torch.full((1, 1, 4, 4), expected), atol=1e-4, rtol=0
    )


def test_only_a_folder_takes_the_place_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "scans").mkdir()
    named = {
        text: experiment_flags.from_flags("train", file=None, fields={"data.name": text}).data
        for text in ("mnist", "scans", "no-such", "./no-such")
    }
    assert [(data.name, data.root) for data in named.values()] == [
        ("mnist", None),
        ("imagefolder", "scans"),
        ("no-such", None),
        ("imagefolder", "./no-such"),
    ]


@pytest.fixture(scope="module", params=["none", "keylock"])
def trained(request, tmp_path_factory):
    values = {
        "type": "train",
        "data": {"train_images": 128, "test_images": 50},
        "model": MODEL,
        "defense": {"type": request.param},
        "training": {"clients": 2, "rounds": 1, "local": {"batch_size": 16}},
        "auxiliary": 10,
    }
    return train(configs.parse(values, source="test"), out=tmp_path_factory.mktemp("runs") / "train").path


def test_the_networks_of_an_attack_are_the_trained_one(trained):
    sent = safetensors.torch.load_file(trained / "global.safetensors")
    config = attack_config(trained)
    build = networks_of(config, dataset_of(config.data))
    assert build(0) is build(3)
    state = build(0).state_dict()
    assert set(sent) == set(state)  # a lock's own tensors are private
    assert all(torch.equal(state[name], tensor) for name, tensor in sent.items())
    locked = config.defense.for_images((3, 32, 32)).prepare(build(0)).public_state()
    assert all(torch.equal(locked[name], tensor) for name, tensor in sent.items())


@pytest.mark.filterwarnings("ignore:.*parametric layers run before the first lock")
def test_a_locked_run_is_no_trained_network_whose_norms_a_lock_has_to_keep(tmp_path, monkeypatch):
    """The initialization of what clients kept would be taken for trained values, and refused."""
    # The server's own model is not what is tested, and its refit takes 200 steps of a transformer.
    monkeypatch.setattr(training, "server_fill_ins", partial(server_fill_ins, refit_steps=1))
    model = {"name": "vit-tiny", "initialization": "uniform"}
    values = {
        "type": "train",
        "data": {"train_images": 32, "test_images": 20},
        "model": model,
        "defense": {"type": "keylock"},
        "training": {"clients": 2, "rounds": 1, "local": {"batch_size": 16}},
        "auxiliary": 10,
    }
    run = train(configs.parse(values, source="test"), out=tmp_path / "train")
    sent = safetensors.torch.load_file(run.path / "global.safetensors")
    attack = configs.parse({"type": "attack", "model": model | {"weights": str(run.path)}}, source="test")
    dataset = dataset_of(attack.data)
    network = networks_of(attack, dataset)(0)
    assert set(network.state_dict()) > set(sent)
    defense = prepared(attack.defense, config=attack, dataset=dataset)
    assert set(defense.prepare(network).public_state()) == set(sent)


def test_a_trained_network_is_attacked_as_it_trains(trained, tmp_path):
    local = {"algorithm": "fedavg", "epochs": 1, "batch_size": 4, "momentum": 0.9, "lr": 0.01}
    config = attack_config(
        trained,
        local=local,
        batch_size=8,
        arms=["no-norm", "lock"],
        attack={"type": "ig", "iterations": 2},
    )
    run = attack(config, out=tmp_path / "attack")
    assert run.summary["local_steps"] == 2
    assert run.config == config
    assert len([record for record in run.results() if record["event"] == "trial"]) == 4


def test_a_file_of_tensors_serves_too(tmp_path):
    plain = network(configs.parse({"type": "attack", "model": MODEL, "seed": 5}, source="test"))
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "w.safetensors")
    loaded = network(attack_config(tmp_path / "w.safetensors"), 7)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_weights_of_something_else_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ConfigError, match=r"model.weights: .* cannot be read \(No such file"):
        network(attack_config(path))
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match=r"model.weights: .* cannot be read \(not a safetensors file"):
        network(attack_config(path))
    state = network(configs.parse({"type": "attack"}, source="test")).state_dict()
    first, *_, last = state
    state["more"], state[last] = torch.zeros(1), torch.full_like(state[last], torch.nan)
    del state[first]
    safetensors.torch.save_file(state, path)
    with pytest.raises(ConfigError, match=rf"'{first}' is missing\n.*'more' is unexpected\n.*non-finite"):
        network(attack_config(path))


def test_a_run_of_another_model_is_refused(trained):
    other = attack_config(trained, model={"name": "resnet20", "weights": str(trained)})
    with pytest.raises(ConfigError, match="trained lenet"):
        network(other)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """It says the same, but lacks the fields that came later."""
    config = attack_config(tmp_path)
    run = RunDirectory.create(tmp_path / "run", config=config, version="0")
    run.append({"event": "trial"})
    text = (run.path / "config.toml").read_text()
    assert 'algorithm = "fedsgd"' in text
    (run.path / "config.toml").write_text(text.replace('algorithm = "fedsgd"\n', ""))
    RunDirectory.create(tmp_path / "run", config=config, version="0")
    (run.path / "config.toml").write_text(text.replace("trials = 2", "trials = 3"))
    with pytest.raises(ConfigError, match="another configuration"):
        RunDirectory.create(tmp_path / "run", config=config, version="0")
    assert json.loads((run.path / "environment.json").read_text())
