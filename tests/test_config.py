from __future__ import annotations

import dataclasses

import pytest
import tomllib

from fedkl import config as configs
from fedkl.attacks import DLG, IDLG
from fedkl.config import AttackConfig, ModelConfig, TrainConfig
from fedkl.data import Dirichlet
from fedkl.defenses import KeyLock, NoDefense, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError
from fedkl.federated import CosineSchedule, Execution, FederatedTraining, LocalTraining, ServerAdam

EXPERIMENTS = [
    TrainConfig(),
    TrainConfig(defense=KeyLock(layers=("conv1", "conv2"), activation="relu")),
    TrainConfig(defense=PublicNorm(), seed=3),
    TrainConfig(defense=PrivateNorm(like=KeyLock(layers="all"))),
    TrainConfig(defense=KeyLock(granularity="element", private=("head",), input_shape=(1, 32, 32))),
    TrainConfig(training=FederatedTraining(local=LocalTraining(lock_weight_decay=0.1, optimizer="adam"))),
    TrainConfig(
        training=FederatedTraining(
            clients=9,
            cohort=4,
            partition=Dirichlet(alpha=0.1),
            schedule=CosineSchedule(),
            server=ServerAdam(),
        ),
        execution=Execution(workers=2),
    ),
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
        ({"type": "train", "defense": {"type": "keylock", "activation": "gelu"}}, "activation"),
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": ["no-norm", "lock", "lock"]}, "arms: .* got lock more than once"),
        ({"attack": {"type": "idlg"}, "batch_size": 2}, "batch_size: iDLG infers the label of one image"),
        ({"cohort": 3, "batch_size": 4}, "cohort: expected a divisor of batch_size = 4, got 3"),
        ({"updates_per_client": 2, "trials": 4}, "updates_per_client: expected a divisor .* networks"),
        ({"updates_per_client": 3, "trials": 4, "networks": "one"}, "a divisor of the number of trials"),
    ],
)
def test_fields_that_do_not_go_together(values, message):
    with pytest.raises(ConfigError, match=message):
        configs.parse({"type": "attack", **values}, source="here")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("values", "place"),
    [
        ('type = "train"\ntraining.local.{} = {}', "lr"),
        ('type = "train"\ntraining.local.{} = {}', "momentum"),
        ('type = "train"\ntraining.local.{} = {}', "weight_decay"),
        ('type = "train"\ntraining.local.{} = {}', "lock_weight_decay"),
        ('type = "train"\ntraining.schedule.type = "step"\ntraining.schedule.{} = {}', "decay"),
        ('type = "attack"\nattack.type = "dlg"\nattack.{} = {}', "box"),
    ],
)
def test_numbers_are_finite(tmp_path, values, place, value):
    path = tmp_path / "config.toml"
    path.write_text(values.format(place, value), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{place}: .*finite"):
        configs.load(path)


def file_of(tmp_path, experiment):
    path = tmp_path / "given.toml"
    path.write_text(configs.dump(experiment), encoding="utf-8")
    return path


LOCK = KeyLock(key_length=77, chained=False)
PUBLISHED = KeyLock(key_distribution="uniform", activation="relu", initialization="published")
PUBLISHED_77 = dataclasses.replace(PUBLISHED, key_length=77, chained=False)


@pytest.mark.parametrize(
    ("before", "flags", "after"),
    [
        (None, {}, NoDefense()),
        (None, {"defense": "keylock", "lock": "published", "layers": "all"},
         dataclasses.replace(PUBLISHED, layers="all")),
        (None, {"defense": "public-norm", "lock": "published"}, PublicNorm(like=PUBLISHED)),
        (LOCK, {}, LOCK),
        (LOCK, {"defense": "keylock"}, LOCK),
        (LOCK, {"lock": "published"}, PUBLISHED_77),
        (PUBLISHED_77, {"lock": "default"}, LOCK),
        (LOCK, {"layers": "all"}, dataclasses.replace(LOCK, layers="all")),
        (LOCK, {"layers": "classifier"}, dataclasses.replace(LOCK, layers="classifier")),
        (None,
         {"defense": "keylock", "settings": ["defense.granularity=element", 'defense.private=["head"]']},
         KeyLock(granularity="element", private=("head",))),
        (LOCK, {"defense": "private-norm", "lock": "published"}, PrivateNorm(like=PUBLISHED_77)),
        (LOCK, {"defense": "none"}, NoDefense()),
        (PublicNorm(like=LOCK), {"layers": "all"}, PublicNorm(like=dataclasses.replace(LOCK, layers="all"))),
        (PublicNorm(like=LOCK), {"defense": "private-norm"}, PrivateNorm(like=LOCK)),
        (PrivateNorm(like=LOCK), {"defense": "keylock"}, LOCK),
    ],
)  # fmt: skip
def test_flags_change_the_fields_they_name_and_no_other(tmp_path, before, flags, after):
    file = None if before is None else file_of(tmp_path, TrainConfig(defense=before, seed=7))
    experiment = configs.from_flags("train", file=file, fields={"training.rounds": 5}, **flags)
    expected = TrainConfig(defense=after, seed=0 if file is None else 7)
    assert experiment == expected.model_copy(update={"training": FederatedTraining(rounds=5)})


@pytest.mark.parametrize("before", [None, NoDefense(), LOCK])
@pytest.mark.parametrize("flags", [{"lock": "published"}, {"lock": "default"}, {"layers": "all"}])
def test_a_lock_is_not_described_in_vain(tmp_path, before, flags):
    file = None if before is None else file_of(tmp_path, TrainConfig(defense=before))
    defense = "none" if before == LOCK else None
    with pytest.raises(ConfigError, match=r"the defense 'none' has no lock.*keylock, public"):
        configs.from_flags("train", file=file, fields={}, defense=defense, **flags)


def test_flags_of_an_attack(tmp_path):
    attack = IDLG(evaluations=9, restarts=2)
    file = file_of(tmp_path, AttackConfig(lock=LOCK, attack=attack, labels_known=True))
    fields = {"labels_known": False, "attack.restarts": 3, "attack.type": None, "trials": None}
    experiment = configs.from_flags("attack", file=file, fields=fields, lock="published")
    changed = dataclasses.replace(attack, restarts=3)
    assert experiment == AttackConfig(lock=PUBLISHED_77, attack=changed, labels_known=False)


@pytest.mark.parametrize(
    ("setting", "place", "value"),
    [
        ("training.local.proximal=0.1", ("training", "local", "proximal"), 0.1),
        ("training.schedule.milestones=[0.5]", ("training", "schedule", "milestones"), (0.5,)),
        ("training.partition.type=shards", ("training", "partition", "type"), "shards"),
        ("checkpoints.keep=5", ("checkpoints", "keep"), 5),
    ],
)
def test_any_field_can_be_set(setting, place, value):
    found = configs.from_flags("train", file=None, fields={}, settings=[setting])
    for name in place:
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.local.proximal", "PLACE=VALUE"),
        ("=1", "PLACE=VALUE"),
        ("training.local.lr.x=1", "'lr' is a value"),
        ("training.lokal.lr=1", "lokal"),
        ("training.local.lr=fast", "lr"),
    ],
)
def test_settings_that_make_no_sense(setting, message):
    with pytest.raises(ConfigError, match=message):
        configs.from_flags("train", file=None, fields={}, settings=[setting])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("iid", {"type": "iid"}),
        ("shards", {"type": "shards"}),
        ("shards:3", {"type": "shards", "per_client": 3}),
        ("dirichlet:0.25", {"type": "dirichlet", "alpha": 0.25}),
    ],
)
def test_partitions_in_short(text, expected):
    assert configs.partition_fields(text) == expected


def test_a_partition_that_is_none():
    with pytest.raises(ConfigError, match="--partition dirichlet:much"):
        configs.partition_fields("dirichlet:much")


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
    rates = [round(training.lr_at(r), 6) for r in (0, 59, 60, 119, 120, 159, 160)]
    assert rates == [0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004, 8e-05]
    assert TrainConfig().defense == NoDefense()
