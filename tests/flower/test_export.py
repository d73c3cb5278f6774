"""The trained model gets out of a Flower deployment: of the server, and with its lock of a node."""

from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import fedkl
from fedkl import cli, lockfile
from fedkl.errors import ConfigError, KeyFileError, UpdateError
from fedkl.export import export
from fedkl.flower import Guard, LockMod, current_client, public_arrays, run_in_process
from fedkl.flower.round_files import RoundFiles, SavedRound
from tests.flower.setting import DEFENSE, net, reply, server_of, step, store
from tests.fuzzing.surfaces.run_directories import _train

CLIENTS, ROUNDS = 3, 3
X = torch.linspace(-1, 1, 20).reshape(5, 4)


def logits(model):
    with torch.no_grad():
        return model.eval()(X)


def deployed(folder):
    """A training; what each node's model said when it was evaluated last."""
    app, said = ClientApp(mods=[LockMod(net, defense=DEFENSE)]), {}

    @app.train()
    def train(message, context):
        model = current_client().model
        step(model, seed=context.node_config["partition-id"])
        return reply(message, ArrayRecord(model.state_dict()))

    @app.evaluate()
    def evaluate(message, context):
        said[f"client-{context.node_config['partition-id']}"] = logits(current_client().model)
        return reply(message)

    def main(grid):
        strategy = FedAvg(min_available_nodes=CLIENTS, min_train_nodes=CLIENTS, min_evaluate_nodes=CLIENTS)
        guard = Guard(strategy, checkpoints=folder)
        guard.start(grid, public_arrays(net(), defense=DEFENSE), num_rounds=ROUNDS)

    run_in_process(server_of(main), app, clients=CLIENTS)
    return said


def test_a_node_has_its_model_from_its_lock_and_the_servers_file(tmp_path):
    said = deployed(tmp_path / "rounds")
    done = export(tmp_path / "rounds", out=tmp_path / "model.safetensors")
    assert (done.rounds, done.lock, done.whole) == (ROUNDS, None, None)
    saved = RoundFiles(tmp_path / "rounds").newest().arrays
    tensors = safetensors.torch.load_file(done.model)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved.items())
    assert len(said) == CLIENTS
    for name, expected in said.items():
        path = store().path(name)
        lock = fedkl.load_lock(path, net(), passphrase="correct horse", public=done.model)
        assert torch.equal(logits(lock.model), expected)
        alone = fedkl.load_lock(path, net(), passphrase="correct horse")
        assert not torch.allclose(logits(alone.model), expected), "a lock alone is not the trained model"


def rounds(folder, *numbers, **arrays):
    files = RoundFiles(folder)
    for number in numbers:
        own = {"w": torch.full((2,), float(number)), **arrays}
        files.save(SavedRound(round=number, arrays=own, memory={"moments/dict/w": torch.ones(2)}))
    return folder


def test_a_damaged_round_gives_way_to_the_one_before(tmp_path):
    folder = rounds(tmp_path / "rounds", 8, 9)
    assert export(folder, out=tmp_path / "model").rounds == 9
    path = folder / "round-000009.fedkl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="The checkpoint of round 8 is used instead"):
        assert export(folder, out=tmp_path / "earlier").rounds == 8
    assert safetensors.torch.load_file(tmp_path / "earlier")["w"].tolist() == [8, 8]
    (folder / "round-000008.fedkl").unlink()
    with pytest.raises(KeyFileError, match="truncated"):
        export(folder, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_arrays_that_are_no_trained_model_are_refused(tmp_path):
    with pytest.raises(UpdateError, match="'v' has non-finite values"):
        export(rounds(tmp_path / "rounds", 3, v=torch.tensor([float("inf")])), out=tmp_path / "model")
    lockfile.write(
        tmp_path / "empty" / "round-000001.fedkl",
        kind="checkpoint",
        meta={"round": 1, "order": []},
        tensors={},
        passphrase=None,
    )
    with pytest.raises(UpdateError, match="there are no tensors"):
        export(tmp_path / "empty", out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_folders_without_a_round_are_refused(tmp_path):
    for name in ("round-1.fedkl", "round-x.fedkl"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="expected the run directory of a training"):
        export(tmp_path, out=tmp_path / "model")
    with pytest.raises(ConfigError, match="a Flower server has no locks"):
        export(rounds(tmp_path / "rounds", 1), out=tmp_path / "model", client="client-0")
    assert not (tmp_path / "model").exists()


def test_the_command_prints_both_lines(tmp_path, monkeypatch, capsys):
    folder = rounds(tmp_path / "rounds", 1)
    monkeypatch.setattr("sys.argv", ["fedkl", "export", str(folder), "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    text = capsys.readouterr().out
    assert "the public tensors after 1 round\n" in text
    assert "If clients have locks, this is not their model: γ, β" in text
    assert f"fedkl.load_lock('lock.fedkl', Net(), passphrase=…, public={str(tmp_path / 'model')!r})" in text
    assert f"model.load_state_dict(safetensors.torch.load_file({str(tmp_path / 'model')!r}))" in text


def test_run_directories_need_no_flower_and_rounds_say_so(tmp_path):
    run, folder = _train(tmp_path / "run"), rounds(tmp_path / "rounds", 1)
    program = (
        "import sys; sys.modules['flwr'] = None\n"
        "from fedkl.cli import main\n"
        "sys.argv = ['fedkl', 'export', *sys.argv[1:]]\n"
        "main()\n"
    )

    def called(source):
        words = [sys.executable, "-c", program, str(source), "--out", str(tmp_path / f"{source.name}.model")]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    done = called(run)
    assert done.returncode == 0, done.stderr
    refused = called(folder)
    assert refused.returncode == 2
    assert "pip install 'fedkl[flower]'" in refused.stderr
