from __future__ import annotations

import pytest
import tomllib

from fedkl import config as configs
from fedkl.attacks import DLG, IDLG
from fedkl.config import AttackConfig, ModelConfig, TrainConfig
from fedkl.defenses import KeyLock, NoDefense, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError
from fedkl.federated import FederatedTraining, LocalTraining

EXPERIMENTS = [
    TrainConfig(),
    TrainConfig(defense=KeyLock(layers=("conv1", "conv2"), activation="relu")),
    TrainConfig(defense=PublicNorm(), seed=3),
    TrainConfig(defense=PrivateNorm(like=KeyLock(layers="all"))),
    TrainConfig(training=FederatedTraining(local=LocalTraining(lock_weight_decay=0.1, lr_milestones=()))),
    AttackConfig(),
    AttackConfig(attack=IDLG(restarts=3), arms=("lock",), model=ModelConfig(initialization="default")),
    AttackConfig(attack=DLG(weighting="full"), labels_known=False),
]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=repr)
def test_survives_its_file(experiment, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(configs.dump(experiment), encoding="utf-8")
    assert configs.load(path) == experiment


def test_the_file_is_complete():
    values = tomllib.loads(configs.dump(TrainConfig(defense=KeyLock())))
    assert values["defense"]["key_length"] == 1024
    assert values["training"]["local"]["momentum"] == 0.9


def test_all_problems_are_named_at_once():
    values = {"type": "train", "seeed": 1, "auxiliary": 0, "defense": {"type": "none"}}
    with pytest.raises(ConfigError) as refusal:
        configs.parse(values, source="x.toml")
    for part in ("x.toml", "seeed", "auxiliary"):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "trian"}, "train"),
        ({"type": "train", "defense": {"type": "magic"}}, "magic"),
        ({"type": "train", "defense": {"type": "keylock", "activation": "tanh"}}, "activation"),
        ({"type": "attack", "attack": {"type": "dlg", "evaluations": "many"}}, "evaluations"),
        ({"type": "attack", "trials": 0}, "trials"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ConfigError, match=message):
        configs.parse(values, source="here")


def test_out_of_range_values_of_components():
    with pytest.raises(ConfigError, match="clients"):
        configs.parse({"type": "train", "training": {"clients": 0}}, source="here")


@pytest.mark.parametrize("content", [b"not = = toml", b"\xff\xfe"])
def test_files_that_are_no_toml(content, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a TOML file"):
        configs.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.load(tmp_path / "none.toml")


def test_defaults_are_the_papers():
    training = TrainConfig().training
    local = training.local
    assert (training.clients, training.rounds, local.batch_size, local.epochs) == (3, 200, 64, 1)
    assert (local.lr, local.momentum, local.weight_decay) == (0.01, 0.9, 5e-4)
    assert [round(local.lr_at(r), 6) for r in (0, 59, 60, 120, 160)] == [0.01, 0.01, 0.002, 0.0004, 8e-05]
    assert TrainConfig().defense == NoDefense()
