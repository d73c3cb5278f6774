from __future__ import annotations

import dataclasses
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from fedkl import config as configs
from fedkl import experiment_flags
from fedkl.attacks import DLG, IDLG
from fedkl.config import AttackConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.data import Dirichlet
from fedkl.defenses import KeyLock, NoDefense, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError
from fedkl.federated import CosineSchedule, Execution, FederatedTraining, LocalTraining, ServerAdam

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXPERIMENTS = [
    TrainConfig(),
    TrainConfig(defense=KeyLock(layers=("conv1", "conv2"), activation="relu")),
    TrainConfig(defense=PublicNorm(), seed=3, training=FederatedTraining(norm_statistics="kept")),
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
        ({"type": "train", "training": {"norm_statistics": "counted"}}, "norm_statistics: .*'recalibrated'"),
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


HUGE = "9" * 5000


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
    experiment = experiment_flags.from_flags("train", file=file, fields={"training.rounds": 5}, **flags)
    expected = TrainConfig(defense=after, seed=0 if file is None else 7)
    assert experiment == expected.model_copy(update={"training": FederatedTraining(rounds=5)})


@pytest.mark.parametrize("before", [None, NoDefense(), LOCK])
@pytest.mark.parametrize("flags", [{"lock": "published"}, {"lock": "default"}, {"layers": "all"}])
def test_a_lock_is_not_described_in_vain(tmp_path, before, flags):
    file = None if before is None else file_of(tmp_path, TrainConfig(defense=before))
    defense = "none" if before == LOCK else None
    with pytest.raises(ConfigError, match=r"the defense 'none' has no lock.*keylock, public"):
        experiment_flags.from_flags("train", file=file, fields={}, defense=defense, **flags)


def test_flags_of_an_attack(tmp_path):
    attack = IDLG(evaluations=9, restarts=2)
    file = file_of(tmp_path, AttackConfig(defense=LOCK, attack=attack, labels_known=True))
    fields = {"labels_known": False, "attack.restarts": 3, "attack.type": None, "trials": None}
    experiment = experiment_flags.from_flags("attack", file=file, fields=fields, lock="published")
    changed = dataclasses.replace(attack, restarts=3)
    assert experiment == AttackConfig(defense=PUBLISHED_77, attack=changed, labels_known=False)


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
    found = experiment_flags.from_flags("train", file=None, fields={}, settings=[setting])
    for name in place:
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.local.proximal", "PLACE=VALUE"),
        ("=1", "PLACE=VALUE"),
        ("training.local.lr.x=1", "'training.local.lr.x': 'lr' is a value"),
        ("lock=[[]]", "lock"),
        ("defense=3", "defense"),
        ("defense=[]", "defense"),
        ("defense.type=3", "defense"),
        ("training={}x", "training"),
        ("type=[]", "type"),
        ("seed=2020-01-01", "seed"),
        ("seed=1\nx = 2", "seed"),
        (f"seed={HUGE}", "seed"),
        (f"seed={10**30}", "seed: expected a number of at most 64 bits"),
        ("a." * 50_000 + "a=1", "expected at most 8 parts, got 50001"),
        ("." * 9 + "=1", "expected at most 8 parts, got 10"),
        ("...=1", "not a usable experiment"),
        ("seed=" + "[" * 50_000 + "]" * 50_000, "seed"),
        ("seed=" + "a." * 20_000 + "a", "seed"),
        ("x" * 100_000, "expected PLACE=VALUE"),
        ("\x1b[2J=1", "not a usable experiment"),
        ("training.lokal.lr=1", "lokal"),
        ("training.local.lr=fast", "lr"),
    ],
)
def test_settings_that_make_no_sense(setting, message):
    with pytest.raises(ConfigError, match=message) as caught:
        experiment_flags.from_flags("train", file=None, fields={}, settings=[setting])
    assert len(str(caught.value)) < 1000
    assert all(c.isprintable() or c == "\n" for c in str(caught.value))


@pytest.mark.parametrize("flags", [{"lock": "published"}, {"layers": "all"}])
@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("attack", "lock=[[]]"),
        ("attack", "lock=3"),
        ("train", "defense=3"),
        ("train", "defense=[[]]"),
        ("train", "defense.type=3"),
        ("train", "defense={type = 'public-norm', like = 3}"),
        ("train", "defense={type = 'keylock', layers = 3}"),
    ],
)
def test_a_lock_that_is_none_is_not_described(kind, setting, flags):
    with pytest.raises(
        ConfigError, match=r"The command line is not a usable experiment\.\n  - \S*(lock|defense)"
    ):
        experiment_flags.from_flags(kind, file=None, fields={}, settings=[setting], **flags)


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
    assert experiment_flags.partition_fields(text) == expected


def test_a_partition_that_is_none():
    with pytest.raises(ConfigError, match=r"--partition .dirichlet:much.: expected iid"):
        experiment_flags.partition_fields("dirichlet:much")


NO_TOML = {
    "nonsense": b"not = = toml",
    "not UTF-8": b"\xff\xfe",
    "a dotted key": b"a." * 20_000 + b"a = 1",
    "deep lists": b"a = " + b"[" * 100_000 + b"]" * 100_000,
    "deep tables": b"a = " + b"{b = " * 20_000 + b"1" + b"}" * 20_000,
    "a huge number": f"a = {HUGE}".encode(),
    "a long key twice": b"a" * 50_000 + b" = 1\n" + b"a" * 50_000 + b" = 1\n",
}


@pytest.mark.parametrize("content", NO_TOML.values(), ids=NO_TOML)
def test_files_that_are_no_toml(content, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"bad\.toml: not a TOML file \(.*\)\.$") as caught:
        configs.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    assert peak < 50e6


def test_a_file_is_small(tmp_path):
    path = tmp_path / "large.toml"
    path.write_text("# comment\n" * 30_000)
    with pytest.raises(ConfigError, match=r"large\.toml: cannot be read \(it has 300000 bytes"):
        configs.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/null"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = Path(kind) if kind.startswith("/") else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ConfigError, match=rf"{kind}: cannot be read \((it is not an ordinary|Is a dir)"):
        configs.load(path)


@pytest.mark.parametrize(
    "values",
    [
        {"type": "x" * 100_000},
        {"type": "train", "defense": {"type": "x" * 100_000}},
        {"type": "train", "x" * 100_000: 1},
        {"type": "train", "\x1b[2J\nError": 1},
        {"type": "train", "training": {"local": {"augmentation": "x" * 100_000}}},
        {"type": "train", "data": {"name": "x" * 100_000}},
        {"type": "train", "data": {"root": "x" * 100_000}},
        {"type": "attack", "arms": ["x" * 100_000] * 2},
        {"type": "attack", "arms": ["\x1b[2J"] * 2},
        {"type": "attack", "arms": list(range(10_000))},
    ],
    ids=range(10),
)
def test_what_came_never_fills_the_message(values):
    with pytest.raises(ConfigError) as caught:
        configs.parse(values, source="here")
    text = str(caught.value)
    assert len(text) < 50 * 320
    assert max(map(len, text.splitlines())) < 400
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"type": "train", "seed": 2**63}, "seed"),
        ({"type": "train", "training": {"local": {"batch_size": 10**30}}}, "training.local.batch_size"),
        ({"type": "attack", "trials": -(10**5000)}, "trials"),
        ({"type": "train", "defense": {"type": "keylock", "layers": ["a", 2**64]}}, "defense.layers"),
    ],
)
def test_numbers_have_64_bits_as_in_toml(values, place):
    with pytest.raises(ConfigError, match=f"{place}: expected a number of at most 64 bits"):
        configs.parse(values, source="here")
    assert configs.parse({"type": "train", "seed": 2**63 - 1}, source="here").seed == 2**63 - 1


def test_what_could_not_be_read_again_is_not_kept():
    experiment = experiment_flags.from_flags("train", file=None, fields={"data.root": "../" * 200})
    with pytest.raises(ConfigError, match=r"cannot be kept as TOML .*more than 200 dots"):
        configs.dump(experiment)


@pytest.mark.parametrize("text", ["\x00", "\x1b[2J", "\r\n", "\u2028", "\\", "'\"'", "#", "é", "'''", '"""'])
def test_any_text_survives_its_file(tmp_path, text):
    test_survives_its_file(TrainConfig(data=DataConfig(name=text, root=f" {text} ")), tmp_path)


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
