"""An attack that does not apply, is too large or breaks halfway ends nothing, and is told apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import nn

from fedkl import data, experiments, report
from fedkl.attacking.floor import candidates_of, floor
from fedkl.attacking.grid import attack_arms
from fedkl.attacking.observing import observe, trials_of
from fedkl.attacking.simulating import SimulatedClients
from fedkl.attacking.verdict import judge
from fedkl.attacks import (
    ATTACKS,
    ClosedForm,
    MeanMap,
    Observation,
    PriorOnly,
    Wiener,
    register_attack,
)
from fedkl.config import AttackConfig, ModelConfig
from fedkl.defenses import Arm, Defense, KeyLock, NoDefense, PrivateNorm, PublicNorm, arms_of, own_arms
from fedkl.defenses.base import plain_arm
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.soteria import Soteria
from fedkl.errors import AttackError
from fedkl.metrics import assignment
from fedkl.protocol import Auxiliary, Knowledge, Procedure
from fedkl.runs import RunDirectory
from tests.attacking.breaking import Breaking


@pytest.fixture(scope="module")
def dataset():
    return data.load("mnist-sample")


@pytest.fixture
def breaking():
    register_attack(Breaking)
    yield Breaking()
    ATTACKS.forget("test-breaking")


def not_run(run):
    return [record for record in run.results() if record["event"] == "not-run"]


def test_an_arm_that_the_attack_refuses_ends_nothing(tmp_path):
    config = AttackConfig(
        attack=ClosedForm(), arms=("no-norm", "private-stem"), trials=2, networks="one", auxiliary=10
    )
    run = experiments.run(config, out=tmp_path / "run")
    assert [arm["name"] for arm in run.summary["arms"]] == ["no-norm"]
    assert {(r["arm"], r["trial"], r["kind"]) for r in not_run(run)} == {
        ("private-stem", trial, "does not apply") for trial in (0, 1)
    }
    (left_out,) = run.summary["not_run"]
    assert left_out["trials"] == 2
    assert "not observed: conv1.weight" in left_out["reason"]
    report.build(tmp_path / "run")
    assert "Not attacked: private-stem: does not apply" in (tmp_path / "run/report.md").read_text()


def normed():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(1800, 10))


def without_linear():
    return nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten())


@pytest.mark.parametrize(
    ("defense", "build", "reason"),
    [(DPSGD(), normed, "TrainingError"), (Soteria(), without_linear, "ConfigError")],
    ids=["dp-sgd", "soteria"],
)
def test_a_defense_that_does_not_fit_the_network_ends_nothing(dataset, defense, build, reason):
    found, refused = [], []
    arms = (plain_arm(), *defense.guesses())
    attack_arms(
        arms, attack=Breaking(), build=lambda index: build(), dataset=dataset,
        trials=trials_of(dataset, trials=1), seed=0,
        on_result=found.append, on_refusal=refused.append,
    )  # fmt: skip
    assert {each.arm for each in found} == {"no-norm"}
    assert {each.arm for each in refused} == {arm.name for arm in arms[1:]}
    assert all(each.reason.startswith(reason) for each in refused)


def test_an_attack_that_applies_to_nothing_leaves_its_folder_free(tmp_path):
    config = AttackConfig(attack=ClosedForm(), arms=("private-stem",), trials=1)
    with pytest.raises(AttackError, match="ClosedForm"):
        experiments.run(config, out=tmp_path / "run")
    assert not (tmp_path / "run/results.jsonl").exists()
    other = config.model_copy(update={"arms": ("no-norm",)})
    assert experiments.run(other, out=tmp_path / "run").summary is not None


def test_a_trial_that_breaks_breaks_alone_and_is_not_repeated(tmp_path, breaking):
    config = AttackConfig(attack=breaking, arms=("no-norm",), trials=3)
    run = experiments.run(config, out=tmp_path / "run")
    done = [record["trial"] for record in run.results() if record["event"] == "trial"]
    (broken,) = not_run(run)
    assert (broken["kind"], sorted([*done, broken["trial"]])) == ("broke", [0, 1, 2])
    assert broken["reason"].endswith("singular")
    (arm,) = run.summary["arms"]
    figures = (arm["success"]["n"], arm["identified"]["n"], arm["figures"]["psnr"]["failures"], arm["broke"])
    assert figures == (3, 3, 1, 1)  # it counts as not recovered
    (tmp_path / "run/summary.json").unlink()
    again = experiments.run(config, out=tmp_path / "run")
    assert [record["trial"] for record in again.results() if record["event"] == "trial"] == done


@pytest.mark.parametrize("attack", [ClosedForm(), Wiener(), MeanMap()], ids=lambda attack: attack.type)
def test_large_images_are_refused_with_the_size(attack):
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(10)
    )
    model(torch.zeros(1, 3, 224, 224))
    gradient = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    own = Auxiliary(images=torch.rand(200, 3, 2, 2), labels=torch.zeros(200).long(), simulate=lambda x, y: {})
    seen = Observation(
        model=model, gradient=gradient, image_shape=(3, 224, 224), classes=10, batch_size=1, auxiliary=own
    )
    assert attack.memory(seen) > 500 * 2**30
    small = Observation(
        model=model, gradient=gradient, image_shape=(3, 32, 32), classes=10, batch_size=1, auxiliary=own
    )
    assert attack.memory(small) < 2**30


def test_a_refusal_for_size_is_no_other(monkeypatch, dataset):
    (trial,) = trials_of(dataset, trials=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    seen = Observation(
        model=model,
        gradient={name: torch.ones_like(p) for name, p in model.named_parameters()},
        image_shape=(3, 32, 32), classes=10, batch_size=1, labels=trial.labels,
    )  # fmt: skip
    monkeypatch.setattr(Breaking, "memory", lambda self, observation: 2**60)
    refusal = Breaking().refusal(seen)
    assert refusal.kind == "too large"
    assert "1,073,741,824 GiB" in refusal.reason
    assert PriorOnly().refusal(seen).kind == "does not apply"


def test_a_guess_that_never_looks_is_no_leak(tmp_path):
    """Its floor is its own figures: nine in three hundred are above chance, and no leak."""
    config = AttackConfig(
        attack=PriorOnly(), arms=("public-norm", "lock"), trials=60, auxiliary=1500, networks="one"
    )
    run = experiments.run(config, out=tmp_path / "run")
    summary = run.summary
    for arm in summary["arms"]:
        assert arm["identified"] == summary["floor"]["identified"]
        found = judge(arm, floor=summary["floor"], control=None)
        assert found.kind == "says nothing"


def test_the_floor_of_a_batch_is_lifted_as_its_scores_are(dataset):
    """Matching with the truth helps a guess in a batch: the floor is measured there, not computed."""
    single = floor(dataset, trials_of(dataset, trials=64), seed=0)
    batches = floor(dataset, trials_of(dataset, trials=4, batch_size=16), seed=0)
    alone, together = (
        [score.identified for _, scores in found for score in scores] for found in (single, batches)
    )
    assert len(alone) == len(together) == 64
    assert sum(together) >= sum(alone)


def test_candidates_are_prepared_once(monkeypatch, dataset):
    """Scoring took 29 s an arm at 500 images: every trial standardized all candidates."""
    counted = []
    prepare = assignment.standardized

    def counting(images):
        counted.append(len(images))
        return prepare(images)

    monkeypatch.setattr(assignment, "standardized", counting)
    trials = trials_of(dataset, trials=30)
    candidates_of(dataset, trials)
    assert counted == [100]
    list(floor(dataset, trials, seed=0))
    assert counted.count(100) == 2  # and once more for the floor


def test_runs_of_the_first_version_are_read(tmp_path):
    config = AttackConfig(attack=PriorOnly(), arms=("no-norm",), trials=2, auxiliary=20)
    run = experiments.run(config, out=tmp_path / "run")
    summary = json.loads((run.path / "summary.json").read_text())
    for name in ("version", "floor", "not_run"):
        del summary[name]
    for arm in summary["arms"]:
        del arm["open"], arm["control"]
    (run.path / "summary.json").write_text(json.dumps(summary))
    report.build(run.path)
    assert RunDirectory.open(run.path).summary == summary


def test_imitated_secrets_repeat_from_the_seed(dataset):
    """They came from the operating system once, so that an attack did not repeat from its seed."""
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 3, 32, 32))
    arms = arms_of(KeyLock(layers="all", private=("3",)), auxiliary=20)
    arm, (trial,) = arms["lock"], trials_of(dataset, trials=1)
    victim = arm.defense.prepare(model)

    def looked(seed):
        generator = torch.Generator().manual_seed(seed)
        seen = observe(victim, arm=arm, model=model, trial=trial, classes=10, generator=generator)
        clients = SimulatedClients.of(arm, victim, model, local=Procedure(), generator=generator)
        return {**dict(seen.model.named_parameters()), **{f"drawn {n}": t for n, t in clients.draw().items()}}

    first, again, other = looked(0), looked(0), looked(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.norm.weight"], other["0.norm.weight"])
    assert not torch.equal(first["3.weight"], other["3.weight"])
    assert not torch.equal(first["0.norm.weight"], victim.bake().get_parameter("0.norm.weight"))


def test_a_known_key_is_the_imitated_clients_key(dataset):
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(2, 3, 32, 32))
    defense = KeyLock(layers="all")
    victim = defense.prepare(model)
    known = defense.known(victim, granted=Knowledge(key=True))
    imitated = defense.imitated(model, known=known, generator=torch.Generator())
    assert imitated.key is victim.key


@dataclass(frozen=True, kw_only=True)
class Closing(Defense):
    """Its public transform is another function each time it is asked."""

    type: Literal["test-closing"] = "test-closing"

    @property
    def public_transform(self):
        return lambda tensors, seen: {name: tensor / 2 for name, tensor in tensors.items()}


def test_observations_of_a_public_transform_are_of_one_kind(dataset):
    """Else what joins the updates of a client saw them one by one, on the defense and not on its control."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    arm = Arm(name="closing", description="", defense=Closing())
    kinds = {
        observe(Closing().prepare(model), arm=arm, model=model, trial=trial, classes=10).kind
        for trial in trials_of(dataset, trials=3)
    }
    assert len(kinds) == 1


def test_a_few_recovered_by_the_floor_do_not_hide_a_leak():
    def share(rate, low, high):
        return {"rate": rate, "low": low, "high": high, "n": 100}

    found = {"success": share(0.4, 0.31, 0.5), "identified": share(0.45, 0.36, 0.55)}
    floor = {"success": share(0.01, 0.0, 0.05), "identified": share(0.4, 0.31, 0.5)}
    control = {"success": share(1.0, 0.96, 1.0), "identified": share(1.0, 0.96, 1.0)}
    assert judge(found, floor=floor, control=control).kind == "leaks"


def test_a_control_of_another_network_is_none():
    arms = arms_of(PrivateNorm(like=KeyLock(layers="all")))
    assert arms["private-norm"].control == "public-norm"
    assert arms["public-norm"].defense.layers == "all"
    assert arms["lock"].defense.layers == "first"
    assert arms["lock"].control is None
    assert arms["private-head"].control == "no-norm"
    assert list(own_arms(PublicNorm())) == ["no-norm", "public-norm"]


def test_an_attack_that_broke_everywhere_is_tried_again(tmp_path, breaking, monkeypatch):
    config = AttackConfig(attack=breaking, arms=("no-norm",), trials=2)
    run = Breaking._run
    monkeypatch.setattr(Breaking, "_run", lambda *arguments: 1 / 0)
    with pytest.raises(AttackError, match="ZeroDivisionError"):
        experiments.run(config, out=tmp_path / "run")
    monkeypatch.setattr(Breaking, "_run", run)
    assert experiments.run(config, out=tmp_path / "run").summary is not None


@pytest.mark.filterwarnings("ignore:2 parametric layers")
def test_arms_of_other_defenses_know_that_networks_are_untrained(tmp_path):
    """Norms that are initialized unlike PyTorch's own look trained to a lock that is not told."""
    config = AttackConfig(
        attack=PriorOnly(), defense=NoDefense(), arms=("no-norm", "lock"), model=ModelConfig(name="vit-tiny"),
        trials=1, auxiliary=20,
    )  # fmt: skip
    run = experiments.run(config, out=tmp_path / "run")
    assert [arm["name"] for arm in run.summary["arms"]] == ["no-norm", "lock"]
