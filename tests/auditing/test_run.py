"""Audits of tiny subjects: what comes of them, what ends nothing, and that they go on where they stopped."""

from __future__ import annotations

import importlib
import json
import os
import re
import stat
import sys
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Literal

import pytest
import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl import Procedure, report
from fedkl.attacking.verdict import Areas, judge_presence, judge_share
from fedkl.attacks import ATTACKS, Attack, Reconstruction, register_attack
from fedkl.auditing import Audit, attackers, recognition, run
from fedkl.auditing.attackers import ATTACKERS, Attacker
from fedkl.auditing.findings import _simplest
from fedkl.auditing.plan import Planned, exposures_of
from fedkl.auditing.rebuilding import _arms, dataset_of
from fedkl.auditing.recognition import Pools
from fedkl.auditing.results import Measured
from fedkl.defenses import KeyLock, NoDefense
from fedkl.defenses.pruning import Pruning
from fedkl.errors import ConfigError, DataError, FolderError, NewerFormatError, TrainingError
from fedkl.protocol import Knowledge
from tests.auditing import audits
from tests.auditing.subjects import (
    EPOCH,
    Casting,
    Words,
    convnet,
    images,
    mlp,
    subject,
    tokens,
    trained,
    trains,
    transferred,
)

GRADIENT = Procedure()
LONG = 5.0  # minutes; none of these audits takes that long
(LINEAR_ROWS,) = (replace(each, images=6) for each in ATTACKERS if each.name == "linear-rows")


@dataclass(frozen=True, kw_only=True)
class Breaking(Attack):
    """Raises what nobody foresees."""

    type: Literal["test-breaking"] = "test-breaking"

    def _run(self, observations, generators, on_evaluation):
        raise KeyError("nothing\nforeseen")


@dataclass(frozen=True, kw_only=True)
class Backwards(Attack):
    """Finds a batch of images behind the first layer, in no order, too bright, and one not at all."""

    type: Literal["test-backwards"] = "test-backwards"

    def _run(self, observations, generators, on_evaluation):
        return [
            Reconstruction(
                images=torch.cat([torch.full((1, *o.image_shape), torch.nan), _truth(o).flip(0)[1:] + 0.01]),
                labels=o.labels, scaling="clip", loss=1.0, evaluations=1, start=0,
            )
            for o in observations
        ]  # fmt: skip


_POOLS = Pools.of(subject().images, subject().labels, seed=0)


def _truth(observation):  # a test's attacker may look
    starts = range(0, 80, observation.batch_size)
    parts = [_POOLS.audited.images[start : start + observation.batch_size] for start in starts]
    labels = [_POOLS.audited.labels[start : start + observation.batch_size] for start in starts]
    return next(x for x, y in zip(parts, labels, strict=True) if torch.equal(y, observation.labels))


BREAKING = Attacker(name="breaking", type="test-breaking", threat_model="B", images=4, each=1)
BACKWARDS = Attacker(name="backwards", type="test-backwards", threat_model="B", images=8, each=1)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Attackers that need a moment, and two that no audit has."""
    register_attack(Breaking)
    register_attack(Backwards)
    monkeypatch.setattr(attackers, "ATTACKERS", (LINEAR_ROWS,))
    monkeypatch.setattr(recognition, "MEMBERS", 12)
    yield lambda *given: monkeypatch.setattr(attackers, "ATTACKERS", given)
    ATTACKS.forget("test-breaking")
    ATTACKS.forget("test-backwards")


def audited(folder, *, build=mlp, minutes=LONG, batch_sizes=(1,), fields=None, **options):
    usual = {"images_per_client": 8, "procedure": GRADIENT, "weights": None}
    return fedkl.audit(
        subject(build, **(usual | (fields or {}))),
        out=folder, minutes=minutes, batch_sizes=batch_sizes, **options,
    )  # fmt: skip


def by_name(found):
    return {(each.question, each.attacker, each.exposure): each for each in found.findings}


def timeless(found):
    return [each.model_copy(update={"seconds": 0.0}) for each in found.findings]


def test_an_audit_of_an_mlp_finds_what_it_leaks(tmp_path):
    found = audited(tmp_path / "a")
    findings = by_name(found)
    single = findings["rebuilt", "linear-rows", "gradient-of-1"]
    assert (single.found.rate, single.outcome, single.found.n) == (1.0, "leaks", 6)
    assert single.reason == "6 of 6 images rebuilt"
    assert (single.threat_model, single.knew) == ("D", "labels, 120 auxiliary images")
    assert single.figures["psnr"] > 40
    assert single.figures["ssim"] > 0.9
    for exposure in ("gradient-of-1", "your-client"):
        presence = findings["presence", "presence", exposure]
        assert presence.outcome == "leaks"
        assert presence.threat_model == "D"
        assert presence.knew.startswith("120 labeled images of the same kind")
        assert presence.figures["auc_low"] <= presence.figures["auc"] <= presence.figures["auc_high"]
        assert presence.figures["clients"] >= 6
        assert presence.figures["false_alarms"] < 0.06
    assert findings["presence", "presence", "gradient-of-1"].figures["auc"] > 0.95
    assert found.summary.findings == len(found.findings) == len(findings)
    assert found.summary.not_run == len(found.not_run)
    assert found.settings.exposures[0].headline
    assert found.headlines()[0].exposure == "your-client"
    assert Audit.read(tmp_path / "a") == found


@pytest.mark.parametrize(
    ("dtype", "procedure"), [(torch.float64, GRADIENT), (torch.float64, trains), (torch.bfloat16, GRADIENT)]
)
def test_an_audit_of_a_network_that_computes_in_another_precision(tmp_path, dtype, procedure):
    found = audited(tmp_path / "a", build=lambda: Casting(dtype), fields={"procedure": procedure})
    findings = by_name(found)
    assert findings["presence", "presence", "your-client"].outcome == "leaks"
    if dtype == torch.float64:
        assert findings["rebuilt", "linear-rows", "gradient-of-1"].found.rate == 1.0


def test_verdicts_follow_the_one_rule(tmp_path):
    """Real clients are held against the simplest update, and that against nothing."""
    found = audited(tmp_path / "a", batch_sizes=(1, 2))
    findings = by_name(found)
    for (question, attacker, exposure), each in findings.items():
        control = None if exposure == "gradient-of-1" else findings[question, attacker, "gradient-of-1"].found
        assert each.control == control
        shares = {"floor": each.floor.model_dump(), "control": control and control.model_dump()}
        if question == "presence":
            ends = [each.figures.get(name, 0.0) for name in ("auc_surely", "auc_high", "control_auc_low")]
            areas = Areas(*ends) if control is not None else None
            ends = {end: each.figures[f"{end}_at_threshold"] for end in ("low", "high")}
            share = each.found.model_dump()
            verdict = judge_presence(share, at_threshold=share | ends, areas=areas, **shares)
        else:
            verdict = judge_share(each.found.model_dump(), what=question, **shares)
        assert (each.outcome, each.reason) == verdict
    assert {each.outcome for each in found.findings} > {"leaks"}


def pictures(folder, finding):
    return safetensors.torch.load_file(folder / finding.pictures)


def test_pictures_are_beside_their_own_originals(tmp_path, few):
    few(BACKWARDS)
    found = audited(tmp_path / "a", fields={"images_per_client": 4})
    finding = by_name(found)["rebuilt", "backwards", "your-client"]
    assert finding.pictures == "pictures/backwards-your-client.safetensors"
    tensors = pictures(tmp_path / "a", finding)
    assert torch.equal(tensors["truth"], _POOLS.audited.images[:8])
    images = tensors["found"]
    assert (images.shape, images.dtype) == (tensors["truth"].shape, torch.float32)
    assert 0 <= images.min() <= images.max() <= 1
    lost = (images == 0.5).flatten(1).all(1)
    assert lost.tolist() == [False, False, False, True] * 2  # the one that was not found
    torch.testing.assert_close(images[~lost], (tensors["truth"][~lost] + 0.01).clamp(0, 1), atol=1e-6, rtol=0)
    assert finding.found.rate == 0.75


def test_pictures_of_another_image_are_not_shown(tmp_path):
    found = audited(tmp_path / "a")
    for finding in found.findings:
        if finding.question != "presence":
            tensors = pictures(tmp_path / "a", finding)
            assert torch.equal(tensors["truth"], _POOLS.audited.images[: len(tensors["truth"])])
            assert 0 <= tensors["found"].min() <= tensors["found"].max() <= 1
    single = pictures(tmp_path / "a", by_name(found)["rebuilt", "linear-rows", "gradient-of-1"])
    torch.testing.assert_close(single["found"], single["truth"], atol=1e-3, rtol=0)


def test_tokens_get_presence_only(tmp_path):
    found = audited(tmp_path / "a", build=Words, fields={"inputs": tokens})
    assert {each.question for each in found.findings} == {"presence"}
    assert {each.kind for each in found.not_run} == {"does not apply"}
    assert found.findings[0].outcome == "leaks"


def test_a_function_that_trains_gets_presence_and_upper_bounds(tmp_path):
    found = audited(tmp_path / "a", fields={"procedure": trains})
    assert [each.question for each in found.headlines()] == ["presence"]
    assert ("rebuilt", "linear-rows", "gradient-of-1") in by_name(found)
    assert found.settings.exposures[0].steps == 0


def test_what_raises_ends_neither_the_audit_nor_the_others(tmp_path, few):
    few(BREAKING, LINEAR_ROWS)
    found = audited(tmp_path / "a")
    broken = [each for each in found.not_run if each.attacker == "breaking"]
    assert {(each.kind, each.exposure) for each in broken} == {
        ("broke", "gradient-of-1"), ("broke", "your-client"),
    }  # fmt: skip
    assert all("KeyError" in each.reason and "\n" not in each.reason for each in broken)
    assert ("rebuilt", "linear-rows", "gradient-of-1") in by_name(found)
    assert found.summary is not None


@pytest.mark.parametrize(
    "error", [AttributeError("x" * 3000 + "\x1b"), SystemExit(0)], ids=["raises", "exits"]
)
def test_presence_that_breaks_ends_nothing(tmp_path, monkeypatch, error):
    def breaks(clients, *, pools):
        raise error

    monkeypatch.setattr(run, "recognize", breaks)
    found = audited(tmp_path / "a")
    broken = [each for each in found.not_run if each.attacker == "presence"]
    assert [each.kind for each in broken] == ["broke", "broke"]
    assert {each.attacker for each in found.findings} == {"linear-rows"}


def test_without_time_presence_of_real_clients_is_measured_all_the_same(tmp_path):
    found = audited(tmp_path / "a", minutes=1e-9, batch_sizes=(1, 2))
    measured = [(each.attacker, each.exposure) for each in found.findings]
    assert measured == [("presence", "gradient-of-1"), ("presence", "your-client")]
    late = [each for each in found.not_run if each.kind == "no time left"]
    assert [(each.attacker, each.exposure) for each in late] == [
        ("linear-rows", "gradient-of-1"), ("linear-rows", "your-client"), ("linear-rows", "gradient-of-2"),
        ("presence", "gradient-of-2"),
    ]  # fmt: skip
    assert all("0 s were left of 1e-09 minutes" in each.reason for each in late)
    assert found.summary is not None


def test_what_cannot_end_in_the_time_left_does_not_begin(tmp_path, monkeypatch, few):
    few(replace(BACKWARDS, each=10**9), LINEAR_ROWS)
    found = audited(tmp_path / "a")
    late = {(each.attacker, each.kind) for each in found.not_run}
    assert late == {("backwards", "no time left")}
    reasons = [each.reason for each in found.not_run if each.exposure == "gradient-of-1"]
    assert [re.sub(r"\d+", "n", each) for each in reasons] == [
        "It may take n s, its first images n, and n s were left of n minutes."
    ]
    assert ("rebuilt", "linear-rows", "your-client") in by_name(found)


def test_an_attacker_stops_where_its_share_of_the_time_is_used_up(tmp_path, monkeypatch):
    """After the first lot of two: the clock is looked at between lots."""
    monkeypatch.setattr(attackers, "ATTACKERS", (BACKWARDS,))
    monkeypatch.setattr(run._Clock, "until", lambda self, share: lambda: True)
    found = audited(tmp_path / "a")
    assert by_name(found)["rebuilt", "backwards", "gradient-of-1"].found.n == 2
    monkeypatch.setattr(run._Clock, "until", lambda self, share: lambda: False)
    found = audited(tmp_path / "b")
    assert by_name(found)["rebuilt", "backwards", "gradient-of-1"].found.n == 8


def test_who_was_cut_short_begins_anew_with_more_minutes(tmp_path, monkeypatch, few):
    """Also who was held against a control that was cut short; in place of figures of fewer updates."""
    few(BACKWARDS)
    pairs = {"fields": {"images_per_client": 2}}
    whole = audited(tmp_path / "whole", **pairs)
    assert not any(each.cut_short for each in whole.findings)
    assert "cut_short" not in (tmp_path / "whole/results.jsonl").read_text()  # an older fedkl reads it
    real = run._Clock.until
    for name, over in (("all", lambda self, share: lambda: True), ("control", first_only(real))):
        monkeypatch.setattr(run._Clock, "until", over)
        short = audited(tmp_path / name, minutes=LONG / 2, **pairs)
        cut = {each.exposure for each in short.findings if each.cut_short}
        assert cut == ({"gradient-of-1"} if name == "control" else {"gradient-of-1", "your-client"})
        assert by_name(short)["rebuilt", "backwards", "gradient-of-1"].found.n == 2
        monkeypatch.setattr(run._Clock, "until", real)
        assert audited(tmp_path / name, minutes=LONG / 2, **pairs) == short
        longer = audited(tmp_path / name, minutes=LONG, **pairs)
        assert longer.settings.minutes == LONG
        assert sorted(timeless(longer), key=repr) == sorted(timeless(whole), key=repr)


def first_only(real):
    """A clock on which one attacker has no time but for its first lot."""
    asked = []

    def until(self, share):
        asked.append(share)
        return (lambda: True) if len(asked) <= 2 else real(self, share)

    return until


def test_who_had_no_control_for_want_of_time_begins_anew():
    single = audits.SINGLE.model_copy(update={"name": "gradient-of-1"})
    late = audits.not_run("span", exposure="gradient-of-1")
    control = {"control": audits.measured(3, 3)}
    present = audits.audit(
        audits.finding("rebuilt"),
        audits.finding("identified", **control),  # of the same attack
        audits.finding("rebuilt", attacker="ig"),
        audits.finding("rebuilt", attacker="span", exposure="sums", **control),  # something is hidden
        late,
        exposures=(audits.REAL, single, audits.SUMS),
    )
    assert run._cut_short(present) == {("span", "real")}


def test_a_sum_that_is_held_against_a_control_that_was_cut_short_begins_anew():
    """Beside single updates behind masks that is their control."""
    single = audits.SINGLE.model_copy(update={"name": "gradient-of-1"})
    open_one = {"control": audits.measured(3, 3)}
    present = audits.audit(
        audits.finding("rebuilt", 0, 3, exposure="gradient-of-1", cut_short=True, **open_one),
        audits.finding("rebuilt", 0, 30, exposure="sum-of-3", **open_one),
        audits.finding("rebuilt", 0, 30, control=audits.measured(30, 30)),
        exposures=(audits.REAL, single, audits.SUM),
    )
    assert run._cut_short(present) == {("span", "gradient-of-1"), ("span", "sum-of-3")}


class Stop:
    """Ctrl-C at some report of progress; counts what is done."""

    def __init__(self, after):
        self.texts, self.after = [], after

    def __call__(self, done, total, text):
        self.texts.append(text)
        if len([each for each in self.texts if "planning" not in each]) == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3, 6])
def test_an_interrupted_audit_goes_on(tmp_path, after):
    """6: between the two findings of one attacker, both of which are there."""
    whole = audited(tmp_path / "whole")
    stop = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        audited(tmp_path / "a", progress=stop)
    present = Audit.read(tmp_path / "a")
    assert present.summary is None
    assert len(present.findings) < len(whole.findings)
    again = Stop(10**9)
    found = audited(tmp_path / "a", progress=again, minutes=LONG + 1)  # more time is no other audit
    assert timeless(found) == timeless(whole)
    assert found.not_run == whole.not_run
    assert found.summary is not None
    for each in present.findings:
        title = next(e.title for e in found.settings.exposures if e.name == each.exposure)
        assert f"{each.attacker}: {title}" not in again.texts


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_pictures_and_the_report_that_shows_them_are_for_their_owner_only(tmp_path):
    """They are somebody's images, or those of a real client."""
    audited(tmp_path / "a")
    page = report.build(tmp_path / "a").html
    places = [page, *page.parent.glob("pictures/*"), *page.parent.glob("figures/*")]
    assert len(places) > 1
    assert {stat.S_IMODE(place.stat().st_mode) for place in places} == {0o600}
    assert stat.S_IMODE((tmp_path / "a/pictures").stat().st_mode) == 0o700


def test_a_finished_audit_is_only_read(tmp_path, monkeypatch):
    found = audited(tmp_path / "a")
    before = (tmp_path / "a/results.jsonl").read_bytes()
    monkeypatch.setattr(run, "plan", lambda *args, **options: pytest.fail("works again"))
    assert audited(tmp_path / "a") == found
    assert (tmp_path / "a/results.jsonl").read_bytes() == before


def test_the_summary_says_when_and_a_newer_one_is_called_so(tmp_path, few):
    few(BREAKING)
    before = datetime.now(timezone.utc).date().isoformat()
    summary = audited(tmp_path / "a").summary
    assert before <= summary.date <= datetime.now(timezone.utc).date().isoformat()
    path = tmp_path / "a/summary.json"
    newer = json.loads(path.read_text()) | {"version": 3, "unheard": 1}
    path.write_text(json.dumps(newer))
    with pytest.raises(NewerFormatError, match=r"summary\.json"):
        Audit.read(tmp_path / "a")


def test_half_a_last_line_is_dropped(tmp_path, few):
    few(BREAKING)
    whole = audited(tmp_path / "a")
    path = tmp_path / "a/results.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "a/summary.json").unlink()
    assert Audit.read(tmp_path / "a").not_run == whole.not_run[:-1]
    found = audited(tmp_path / "a")
    assert found.not_run == whole.not_run
    assert found.findings == whole.findings
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_finished_audit_that_lost_lines_or_has_some_twice_is_damaged(tmp_path):
    """The lines that are gone may be those that leak."""
    made = audits.audit(audits.finding(), audits.finding("rebuilt", 0, 100), audits.not_run())
    path = audits.write(tmp_path, made) / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert Audit.read(tmp_path) == made
    for kept, message in (
        (lines[1:], "expected 2 findings, as summary.json says, got 1"),
        (lines[:2], "expected 1 attackers that were not run, as summary.json says, got 0"),
        ([*lines[:2], lines[2][:-30]], "expected 1 attackers that were not run"),
        ([], "expected 2 findings, as summary.json says, got 0"),
        (2 * lines, "presence by span on real: expected once, got 2 times"),
        ([lines[0], *lines[::2]], "presence by span on real: expected once, got 2 times"),
        ([*lines, lines[2]], "gauss-newton on real, not run: expected once, got 2 times"),
    ):
        path.write_bytes(b"".join(kept))
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            Audit.read(tmp_path)
        assert str(caught.value).startswith(f"{path}: damaged.")
        assert "Repeat the audit" in str(caught.value)


def test_shares_outside_their_interval_and_exposures_of_one_name_are_damage(tmp_path):
    audits.write(tmp_path, audits.audit(audits.finding()))
    for name, old, new, message in (
        ("results.jsonl", '"low":0.6', '"low":0.7', "expected low ≤ rate ≤ high, got low 0.7"),
        ("results.jsonl", '"high":0.7', '"high":0.6', "expected low ≤ rate ≤ high, got low 0.6"),
        ("audit.json", '"name":"single"', '"name":"real"', "expected each name once, got real more than"),
    ):
        before = (tmp_path / name).read_text()
        assert before.count(old) == 1
        (tmp_path / name).write_text(before.replace(old, new))
        with pytest.raises(ConfigError, match=re.escape(message)):
            Audit.read(tmp_path)
        (tmp_path / name).write_text(before)
    rounded = Measured(rate=1.0, low=0.9, high=1 - 1e-9, n=3)
    assert rounded.high < rounded.rate


def hurried(network, inputs, labels):
    trains(network, inputs[:4], labels[:4])


@pytest.mark.parametrize(
    "fields",
    [{"weights": trained(mlp, lambda count, seed: images(count, seed=seed + 1))},
     {"inputs": lambda count, seed=3: images(count, seed=seed)}, {"procedure": replace(EPOCH, lr=1e-7)},
     {"procedure": replace(EPOCH, momentum=0.9)}, {"normalization": ((0.5,), (0.2,))}],
    ids=["weights", "images", "lr", "momentum", "normalization"],
)  # fmt: skip
def test_a_folder_of_other_weights_images_or_clients_is_refused(tmp_path, fields, few):
    few()
    audited(tmp_path / "a", minutes=1e-9)
    with pytest.raises(FolderError, match="weights, images, labels or procedure"):
        audited(tmp_path / "a", minutes=1e-9, fields=fields)


RATE = 1e-7


def at_a_rate(network, inputs, labels):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trains(network, inputs, labels)
    for name, tensor in network.state_dict().items():
        tensor.lerp_(before[name], 1 - RATE)


def test_a_folder_is_refused_after_an_edit_of_what_the_loop_names(tmp_path, monkeypatch, few):
    """The verdict in it is of another loop."""
    few()
    audited(tmp_path / "a", minutes=1e-9, fields={"procedure": at_a_rate})
    monkeypatch.setattr(sys.modules[__name__], "RATE", 1.0)
    with pytest.raises(FolderError, match="weights, images, labels or procedure"):
        audited(tmp_path / "a", minutes=1e-9, fields={"procedure": at_a_rate})


class Loop:
    def __init__(self, lr):
        self.lr = lr

    def __call__(self, network, inputs, labels):
        trains(network, inputs, labels)


def closure(lr):
    def loop(network, inputs, labels):
        trains(network, inputs, lr * labels)

    return loop


def test_loops_are_told_apart_by_their_source_and_settings():
    loops = [trains, hurried, partial(hurried, lr=0.1), partial(hurried, lr=0.2), Loop(1), Loop(2)]
    loops += [closure(1), closure(2)]
    prints = [subject(procedure=each).fingerprint() for each in loops]
    assert len(set(prints)) == len(loops)
    again = [trains, hurried, partial(hurried, lr=0.1), partial(hurried, lr=0.2), Loop(1), Loop(2)]
    assert prints[:6] == [subject(procedure=each).fingerprint() for each in again]


def test_a_comment_makes_no_other_subject(tmp_path, monkeypatch):
    """Nor does layout: baselines and folders would be refused for it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    prints = []
    for name, lines in {
        "of_one": ["    network(inputs).sum().backward()"],
        "of_two": ["    # a word on it", "", "    network( inputs ).sum().backward()  # another"],
        "of_three": ["    network(inputs).mean().backward()"],
    }.items():
        (tmp_path / f"{name}.py").write_text("\n".join(["def loop(network, inputs, labels):", *lines, ""]))
        prints.append(subject(procedure=importlib.import_module(name).loop).fingerprint())
    assert prints[0] == prints[1] != prints[2]


class Sigmoid(nn.Module):
    def forward(self, x):
        return x.sigmoid()


def test_a_network_that_computes_something_else_is_another():
    """With the same weights: an activation has none."""

    def with_a(kind):
        def model():
            return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), kind())

        return replace(subject(), model=model, weights=None).fingerprint()

    assert with_a(nn.ReLU) == with_a(nn.ReLU)
    assert len({with_a(kind) for kind in (nn.ReLU, nn.Sigmoid, Sigmoid)}) == 3


def test_an_audit_from_before_fingerprints_is_read_and_takes_no_other(tmp_path, few):
    """Nobody knows whose weights it is of, and its verdicts were too kind."""
    few()
    found = audited(tmp_path / "a", minutes=1e-9)
    path = tmp_path / "a/audit.json"
    settings = json.loads(path.read_text())
    del settings["fingerprint"]
    path.write_text(json.dumps(settings))
    assert Audit.read(tmp_path / "a").findings == found.findings
    with pytest.raises(FolderError, match="an older fedkl did not write down which"):
        audited(tmp_path / "a", minutes=1e-9)


@pytest.mark.parametrize(
    "changed",
    [{"batch_sizes": (2,)}, {"seed": 1}, {"defense": "keylock"}, {"masking": "blind"}, {"target": "other"},
     {"fields": {"name": "other"}}, {"fields": {"images_per_client": 4}}, {"fields": {"count": 100}}],
    ids=str,
)  # fmt: skip
def test_a_folder_of_another_audit_is_refused(tmp_path, changed, few):
    few()
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        audited(tmp_path / "a", progress=stop)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="holds an audit of something else or with other options"):
        audited(tmp_path / "a", **changed)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_function_that_moves_in_its_file_is_no_other(tmp_path, few):
    few()
    found = audited(tmp_path / "a", minutes=1e-9, source="mine.py", line=3)
    moved = audited(tmp_path / "a", minutes=1e-9, source="mine.py", line=4)
    assert moved == found.model_copy(update={"settings": found.settings.model_copy(update={"line": 4})})
    with pytest.raises(FolderError, match="other options: source"):
        audited(tmp_path / "a", minutes=1e-9, source="other.py", line=4)


def test_the_same_tensors_of_another_kind_are_another_recording():
    def settings(**kind):
        return audits.audit(recorded=("aa",), **kind).settings

    gradient, weights = settings(recorded_kind="gradient"), settings(recorded_kind="weights", anyway=True)
    assert run._differing(gradient, weights) == ["kind of the recorded updates"]
    assert run._differing(settings(), weights) == []  # an older file does not say
    assert "recorded_kind" not in settings().model_dump_json()


def test_more_minutes_are_for_those_who_had_none(tmp_path):
    whole = audited(tmp_path / "whole")
    short = audited(tmp_path / "a", minutes=1e-6)
    late = [each for each in short.not_run if each.kind == "no time left"]
    assert late
    again = audited(tmp_path / "a", minutes=1e-6)
    assert again == short  # as much time as before is no reason to begin again
    longer = audited(tmp_path / "a", minutes=LONG)
    assert longer.settings.minutes == LONG
    assert not [each for each in longer.not_run if each.kind == "no time left"]
    found = {(each.question, each.attacker, each.exposure): each.found for each in longer.findings}
    assert found == {(each.question, each.attacker, each.exposure): each.found for each in whole.findings}


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"expected an empty folder, it holds 'thesis.tex'"):
        audited(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_an_audit_only_just_began_is_no_other(tmp_path, few, monkeypatch):
    """Whenever it was killed: the settings come before everything else."""
    few()
    monkeypatch.setattr(run, "plan", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        audited(tmp_path / "a")
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["audit.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0.0}, "expected minutes above 0"),
        ({"minutes": -1.0}, "expected minutes above 0"),
        ({"minutes": float("nan")}, "expected minutes above 0"),
        ({"minutes": float("inf")}, "expected minutes above 0 and no infinite number"),
        ({"minutes": 1e308}, "expected minutes above 0 and no infinite number"),  # in seconds
        ({"target": "a\nb"}, "settings are not usable.\n  - target: "),
        ({"batch_sizes": (0,)}, "batch_sizes from 1"),
        ({"batch_sizes": (4, -1)}, "batch_sizes from 1"),
        ({"defense": "nose"}, "defense: expected one of"),
        ({"defense": "masked"}, "masks are `masking`"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        audited(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_wrong_masking_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="mode: expected one of blind"):
        audited(tmp_path / "a", masking="bland")


def test_a_network_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"expected class scores of shape \(2, 9\)"):
        audited(tmp_path / "a", fields={"classes": 9})
    assert not (tmp_path / "a").exists()


def test_a_client_that_cannot_train_ends_the_audit(tmp_path):
    def raises(network, x, y):
        raise ValueError("no")

    with pytest.raises(TrainingError, match="raised ValueError"):
        audited(tmp_path / "a", fields={"procedure": raises})


class Exits(nn.Sequential):
    """Ends the program while it is trained."""

    def forward(self, x):
        return sys.exit(0) if self.training else super().forward(x)


def test_a_network_that_ends_the_program_when_it_trains_ends_the_audit(tmp_path):
    exits = replace(subject(procedure=GRADIENT, weights=None), model=lambda: Exits(*mlp()))
    with pytest.raises(TrainingError, match=r"cannot send one gradient of 8 images \(SystemExit: 0\)"):
        fedkl.audit(exits, out=tmp_path / "a")


def test_behind_blind_masks_nothing_is_found_and_the_control_succeeds(tmp_path):
    found = by_name(audited(tmp_path / "a", masking="blind"))
    assert {each.outcome for each in found.values()} <= {"at the floor", "says nothing"}
    rebuilt = found["rebuilt", "linear-rows", "gradient-of-1"]
    assert (rebuilt.found.rate, rebuilt.control.rate) == (0.0, 1.0)
    presence = found["presence", "presence", "gradient-of-1"]
    assert presence.control.rate > 0.9
    assert abs(presence.figures["auc"] - 0.5) < 0.3  # masks are the operating system's: it varies by 0.07
    assert found["presence", "presence", "your-client"].control is not None


@pytest.mark.parametrize("masking", ["pairwise", "none"])
def test_a_sum_in_the_open_is_held_against_what_has_no_masks(tmp_path, masking):
    """Pairwise masks hide single updates and no sums: the masked figure was called that without masks."""
    found = by_name(audited(tmp_path / "a", masking=masking, fields={"images_per_client": 4}))
    for question, attacker in (("rebuilt", "linear-rows"), ("presence", "presence")):
        single = found[question, attacker, "gradient-of-1"]
        if masking == "none":
            assert found[question, attacker, "your-client"].control == single.found
            continue
        of_sums = found[question, attacker, "sum-of-3"]
        assert single.control.rate > 0.9 > single.found.rate
        assert of_sums.control == single.control
        assert found[question, attacker, "your-client"].control not in (single.control, single.found)
        if question == "presence":
            assert of_sums.figures["control_auc_low"] == single.figures["control_auc_low"] > 0.8


def test_without_a_control_of_the_easier_case_a_sum_has_none():
    """Where that broke, the figure behind masks is no figure without them."""
    clients = exposures_of(subject(), defense=NoDefense(), masking="pairwise", batch_sizes=(1,), seed=0)[1]
    masked = audits.finding("rebuilt", 0, 6, attacker="linear-rows", exposure="gradient-of-1")
    entry = Planned(attacker=LINEAR_ROWS, clients=clients, seconds=1.0, control_hides=True)
    assert _simplest(entry, "rebuilt", [masked]) == (None, None)
    assert _simplest(replace(entry, control_hides=False), "rebuilt", [masked]) == (masked.found, 0.0)


def test_a_baseline_of_something_else_is_refused_before_the_work(tmp_path, few, monkeypatch):
    """Not an hour later. Other weights are what it is for."""
    few()
    mine = {"weights": trained(mlp)}
    then = audited(tmp_path / "then", minutes=1e-9, fields=mine)
    others = trained(mlp, lambda count, seed: images(count, seed=seed + 1))
    assert audited(tmp_path / "a", minutes=1e-9, fields={"weights": others}, baseline=then).summary
    monkeypatch.setattr(run, "plan", lambda *args, **options: pytest.fail("works"))

    def inputs(count, seed=3):
        return images(count, seed=seed)

    for fields, said in (
        ({"inputs": inputs}, "images and labels: not those of then"),
        ({"procedure": replace(GRADIENT, lr=0.5)}, "network and procedure: not those of then"),
        ({"name": "other"}, "subject: other now, subject then"),
    ):
        with pytest.raises(ConfigError, match=said):
            audited(tmp_path / "b", minutes=1e-9, fields=mine | fields, baseline=then)
    assert not (tmp_path / "b").exists()


def test_an_audit_from_before_prints_of_its_parts_goes_on(tmp_path, few):
    """Its fingerprint is of all of them."""
    few()
    found = audited(tmp_path / "a", minutes=1e-9)
    path = tmp_path / "a/audit.json"
    settings = json.loads(path.read_text())
    del settings["images_fingerprint"], settings["training_fingerprint"]
    path.write_text(json.dumps(settings))
    assert audited(tmp_path / "a", minutes=1e-9).findings == found.findings


def test_what_is_trained_is_the_same_with_other_weights_and_not_frozen_otherwise():
    mine = subject()
    retrained = subject(weights=trained(mlp, lambda count, seed: images(count, seed=seed + 1)))
    assert mine.training_fingerprint() == retrained.training_fingerprint()
    assert mine.images_fingerprint() == retrained.images_fingerprint()
    assert mine.fingerprint() != retrained.fingerprint()
    others = [
        replace(mine, procedure=replace(EPOCH, lr=1e-7)), replace(mine, normalization=((0.5,), (0.2,))),
        subject(convnet), subject(transferred), mine,
    ]  # fmt: skip
    assert len({each.training_fingerprint() for each in others}) == len(others)
    shuffled = replace(mine, labels=mine.labels.flip(0))
    assert shuffled.images_fingerprint() != mine.images_fingerprint()
    assert shuffled.training_fingerprint() == mine.training_fingerprint()


def test_an_audit_of_a_lock(tmp_path, few):
    """Presence leaks through it."""
    few()
    found = audited(
        tmp_path / "a", build=convnet, defense="keylock", batch_sizes=(1,), fields={"images_per_client": 2}
    )
    presence = by_name(found)["presence", "presence", "gradient-of-1"]
    assert presence.control is not None
    assert presence.found.rate > presence.floor.rate
    assert found.settings.defense == "keylock"
    assert "broke" not in {each.kind for each in found.not_run}


def test_an_audit_of_a_defense_with_options(tmp_path, few):
    """As an object or as a text: one audit, which says which options it had."""
    few()
    options = {"batch_sizes": (1,), "minutes": 1e-9}
    found = audited(tmp_path / "a", defense=Pruning(keep=0.25), **options)
    assert found.settings.defense == "pruning:keep=0.25"
    assert audited(tmp_path / "a", defense="pruning:keep=0.250", **options) == found
    with pytest.raises(ConfigError, match="holds an audit of something else or with other options"):
        audited(tmp_path / "a", defense="pruning:keep=0.3", **options)


def test_a_lock_is_not_opened_for_its_attacker():
    """Servers that were granted its secrets are rungs of a ladder, and no part of an audit."""
    clients = exposures_of(subject(convnet), defense=KeyLock(), masking="none", batch_sizes=(1,), seed=0)[1]
    arms = _arms(LINEAR_ROWS, clients, dataset_of(clients, _POOLS))
    assert [arm.name for arm in arms] == ["public-norm", "lock"]
    assert arms[-1].knowledge == Knowledge(labels=True, auxiliary=120)


def test_the_plan_is_shown_before_the_work(tmp_path):
    seen = []
    audited(
        tmp_path / "a",
        planned=lambda entries: seen.append(len(entries)),
        progress=lambda done, total, text: seen.append(text),
    )
    assert seen[:2] == ["planning: one gradient of 8 images", "planning: one gradient of one image"]
    assert seen[2] == 4
    assert seen[3] == "presence: one gradient of one image"
    assert seen[4].startswith("presence: presence ")


def test_settings_say_what_was_audited(tmp_path, few):
    few()
    found = audited(
        tmp_path / "a",
        minutes=1e-9,
        seed=5,
        target="mine:subject",
        source="mine.py",
        line=3,
        batch_sizes=(1, 2),
    ).settings
    assert (found.target, found.source, found.line) == ("mine:subject", "mine.py", 3)
    assert (found.images, found.classes, found.seed, found.batch_sizes) == (200, 4, 5, (1, 2))
    assert (found.fedkl, found.environment) == (fedkl.__version__, {"torch": torch.__version__})
    assert (found.defense, found.masking, found.minutes) == ("none", "none", 1e-9)
