"""Audits of recorded updates: what is found is in them, held against the members, who are no attacker's."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedkl import auditing, data
from fedkl.auditing import (
    RecordedClient,
    RecordedUpdate,
    audit_recorded,
    plan,
    read_members,
    read_recorded,
    suspect,
)
from fedkl.auditing.attackers import ATTACKERS
from fedkl.auditing.recordings import _pools
from fedkl.errors import ConfigError
from fedkl.recordingfile import Recording
from tests.auditing import recordings

ROWS = replace(next(each for each in ATTACKERS if each.name == "linear-rows"), images=8)


@pytest.fixture(autouse=True)
def _quick(unchecked, monkeypatch):
    """Few clients are played, without a type check of each call; of the attackers one that needs an update
    only, and one that replays clients, shortened.
    """
    matching = next(each for each in ATTACKERS if each.name == "matching")
    some = (ROWS, replace(matching, images=4, options={"iterations": 3}))
    monkeypatch.setattr(plan, "available", lambda: some)
    monkeypatch.setattr(auditing.recordings, "fits", partial(auditing.fits, clients=40))


@pytest.fixture
def audited():
    return recordings.subject()


@pytest.fixture
def only_rows(monkeypatch):
    monkeypatch.setattr(plan, "available", lambda: (ROWS,))


def finding(audit, attacker="presence", question="presence", exposure="recorded"):
    return next(
        each
        for each in audit.findings
        if (each.attacker, each.question, each.exposure) == (attacker, question, exposure)
    )


def test_members_are_recognized_and_the_records_say_of_what(audited, tmp_path, only_rows):
    clients = recordings.clients(audited, 12)
    audit = audit_recorded(audited, clients, out=tmp_path / "a")
    assert audit.exposure("recorded").headline
    assert audit.exposure("recorded").title == "12 recorded updates, one gradient of 4 images"
    assert not audit.exposure("gradient-of-1").headline
    seen = finding(audit)
    assert (seen.found.n, seen.figures["clients"], seen.outcome) == (48, 12.0, "leaks")
    assert seen.found.rate > 0.6
    assert seen.floor.rate < 0.1
    assert seen.figures["false_alarms"] < 0.05
    assert 0.35 < seen.figures["swapped_auc"] < 0.65
    assert seen.control.rate > 0.9  # the simplest update, of a client that is simulated


def test_pictures_are_rebuilt_from_the_updates_and_held_against_the_members(tmp_path, only_rows):
    audited = recordings.subject(images_per_client=1)
    clients = recordings.clients(audited, 8)
    audit = audit_recorded(audited, clients, out=tmp_path)
    rebuilt = finding(audit, "linear-rows", "rebuilt")
    assert (rebuilt.outcome, rebuilt.found.rate, rebuilt.found.n) == ("leaks", 1.0, 8)
    pictures = load_file(tmp_path / rebuilt.pictures)
    originals = audited.images[[place for client in clients for place in client.members]]
    assert torch.equal(pictures["truth"], originals)
    assert torch.allclose(pictures["found"], originals, atol=1e-3)


def test_what_is_found_is_in_the_updates_and_not_in_the_members(tmp_path, only_rows):
    """The updates of some clients beside the images of others: nothing is to be found."""
    audited = recordings.subject(images_per_client=1)
    clients = recordings.clients(audited, 16)
    wrong = [
        RecordedClient(update=one.update, members=other.members)
        for one, other in zip(clients[:8], clients[8:], strict=True)
    ]
    audit = audit_recorded(audited, wrong, out=tmp_path)
    assert finding(audit).outcome == "says nothing"
    assert finding(audit).found.rate <= 0.25  # an image that is like the client's own
    assert finding(audit, "linear-rows", "rebuilt").found.rate == 0


def test_one_recording_is_told_by_image_and_says_so(audited, tmp_path, only_rows):
    seen = finding(audit_recorded(audited, recordings.clients(audited, 1), out=tmp_path))
    assert (seen.found.n, seen.figures["clients"]) == (4, 1.0)
    assert 0.4 < seen.figures["auc_low"] < seen.figures["auc"] <= seen.figures["auc_high"] <= 1
    assert "swapped_auc" not in seen.figures
    assert seen.reason.endswith("one client, so the intervals are by image and say nothing of others")
    assert seen.found.high - seen.found.low < 0.9  # of four images, not of one client


def test_a_function_that_trains(tmp_path):
    """Attackers that replay clients refuse, and leave no upper bound; one that needs an update only runs."""
    audited = recordings.subject(procedure=recordings.loop)
    audit = audit_recorded(audited, recordings.clients(audited, 6), out=tmp_path)
    assert finding(audit).outcome == "leaks"
    assert finding(audit, "linear-rows", "identified").found.n == 8
    refused = [(each.attacker, each.exposure, each.kind) for each in audit.not_run]
    assert refused == [("matching", "recorded", "does not apply")]
    assert not [each for each in audit.findings if each.attacker == "matching"]


def test_where_the_clients_do_what_a_procedure_says_matching_runs_too(audited, tmp_path):
    audit = audit_recorded(audited, recordings.clients(audited, 2), out=tmp_path, minutes=3)
    for exposure in ("recorded", "gradient-of-1"):
        assert finding(audit, "matching", "identified", exposure).found.n == 4


def test_a_misfit_ends_with_its_sentences_unless_it_is_wanted_anyway(audited, tmp_path, only_rows):
    clients = recordings.clients(audited, 2)
    other = replace(audited, weights=None)
    with pytest.raises(ConfigError, match=r"do not fit the subject(.|\n)*node: base weights: ") as caught:
        audit_recorded(other, clients, out=tmp_path)
    assert str(caught.value).count("node: ") == 2
    assert not list(tmp_path.iterdir())
    assert finding(audit_recorded(other, clients, out=tmp_path, anyway=True)).found.n == 8
    half = RecordedClient(update=RecordedUpdate(tensors={"1.weight": torch.ones(32, 256)}), members=[0])
    with pytest.raises(ConfigError, match=r"'1\.bias', '3\.weight', '3\.bias' are missing"):
        audit_recorded(audited, [half], out=tmp_path / "b", anyway=True)  # there is nothing to go on with


def test_members_that_are_none_are_all_named(audited, tmp_path):
    update = recordings.sent(audited, [0, 1, 2, 3])
    with pytest.raises(ConfigError) as caught:
        audit_recorded(
            audited,
            [RecordedClient(update=update, members=each) for each in ([], [400, -1, 0], [3, 3])],
            out=tmp_path,
        )
    for part in ("no members", r"from 0 to 399, got [400, -1]", "named twice"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="none is given"):
        audit_recorded(audited, [], out=tmp_path)
    few = replace(audited, images_per_client=398)
    with pytest.raises(ConfigError, match="only 2 images are of no recorded client"):
        audit_recorded(few, [RecordedClient(update=update, members=range(398))], out=tmp_path)


def test_members_that_are_left_out_are_missed(audited, tmp_path):
    """They would be taken for images that nobody trained on, and the leak seem smaller."""
    update = recordings.sent(audited, [0, 1, 2, 3])
    for sent, expected in (
        (update, "expected 4 members, as Subject.images_per_client is, got 3"),
        (replace(update, images=5), "expected 5 members, as the update says, got 3"),
    ):
        with pytest.raises(ConfigError, match=expected):
            audit_recorded(audited, [RecordedClient(update=sent, members=[0, 1, 2])], out=tmp_path)
    few = RecordedClient(update=update, members=[0, 1, 2])
    found = audit_recorded(audited, [few], out=tmp_path, anyway=True)
    assert finding(found).found.n == 3
    assert (found.settings.recorded_kind, found.settings.anyway) == ("gradient", True)


def test_infinite_minutes_are_refused(audited, tmp_path):
    with pytest.raises(ConfigError, match="expected minutes above 0 and no infinite number, got inf"):
        audit_recorded(audited, recordings.clients(audited, 1), out=tmp_path, minutes=float("inf"))


def test_a_finished_audit_is_read_and_another_recording_is_another_audit(audited, tmp_path, only_rows):
    clients = recordings.clients(audited, 3)
    first = audit_recorded(audited, clients[:2], out=tmp_path)
    assert audit_recorded(audited, clients[:2], out=tmp_path) == first
    for others in (clients[1:], [clients[0], replace(clients[1], members=clients[2].members)]):
        with pytest.raises(ConfigError, match="holds an audit of something else"):
            audit_recorded(audited, others, out=tmp_path)


def test_without_members_those_that_look_trained_on_are(audited):
    chosen = recordings.members(3)
    found = suspect(audited, [recordings.sent(audited, each) for each in chosen])
    assert found.scores.shape == (3, 400)
    assert found.by_chance == 4
    hits = sum(int((found.scores[n, each] >= found.threshold).sum()) for n, each in enumerate(chosen))
    assert hits >= 7  # of 12
    assert int(found.recognized.sum()) - hits < 36  # of 1188 that were not trained on
    again = suspect(audited, [recordings.sent(audited, chosen[0])])
    assert torch.allclose(again.scores[0], found.scores[0], atol=1e-4)


def test_recordings_are_found_by_folder_and_name(tmp_path):
    for place in ("node-2/round-1", "node-2/round-10", "node-1/round-3"):
        number = float(place.rpartition("-")[2])
        recording = Recording(received={}, sent={"w": torch.full((1,), number)}, about={"round": 1})
        recording.write(tmp_path / place)
    (tmp_path / "node-2" / "round-11").mkdir()  # not whole
    found = read_recorded(tmp_path)
    assert {name: float(each.tensors["w"]) for name, each in found.items()} == {"node-1": 3, "node-2": 10}
    assert float(read_recorded(tmp_path / "node-2")["node-2"].tensors["w"]) == 10
    assert float(read_recorded(tmp_path / "node-2" / "round-1")["node-2"].tensors["w"]) == 1
    (tmp_path / "files").mkdir()
    for name in ("b", "a"):
        save_file({"w": torch.ones(1)}, tmp_path / "files" / f"{name}.safetensors")
    files = read_recorded(tmp_path / "files", kind="difference")
    assert [(name, each.kind) for name, each in files.items()] == [("a", "difference"), ("b", "difference")]
    assert list(read_recorded(tmp_path / "files" / "b.safetensors")) == ["b"]
    with pytest.raises(ConfigError, match=r"no recorded update\. Give a safetensors file"):
        read_recorded(tmp_path / "files" / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": [1, 2], "c": [1]}, "'b' is missing"),
        ({"a": [1], "b": [2], "c": [1]}, "'c' is no recorded client"),
        ({"a": [1], "b": ["2"]}, "b"),
        ([1, 2], "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_members_files_that_do_not_fit(tmp_path, content, message):
    path = tmp_path / "members.json"
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        read_members(path, clients=["a", "b"])
    assert 'Write e.g. {"a": [0, 1, 2]}' in str(caught.value)


def test_a_members_file(tmp_path):
    path = tmp_path / "members.json"
    path.write_text('{"b": [3], "a": [0, 2]}')
    assert read_members(path, clients=["a", "b"]) == {"a": [0, 2], "b": [3]}


def test_an_image_of_a_clients_class_is_not_therefore_its_own(tmp_path, only_rows):
    """An update tells which classes a client has; images of them that nobody trained on are no members."""
    dataset = data.load("mnist-sample", size=16, channels=1)
    given = {"images": dataset.train_images[1000:2000].clone(), "labels": dataset.train_labels[1000:2000]}
    skewed = recordings.subject(**given, images_per_client=6, procedure=recordings.loop)
    places = [(skewed.labels == label).nonzero()[:, 0].tolist() for label in (0, 1, 3, 6)]
    sent = [recordings.sent(skewed, each[:6]) for each in places]
    true, placebo = (
        [RecordedClient(update=u, members=each[part]) for u, each in zip(sent, places, strict=True)]
        for part in (slice(6), slice(6, 12))
    )
    found = finding(audit_recorded(skewed, true, out=tmp_path / "true"))
    nothing = finding(audit_recorded(skewed, placebo, out=tmp_path / "placebo"))
    assert found.figures["auc"] > 0.8
    assert nothing.outcome != "leaks"
    assert nothing.figures["auc"] < 0.62  # by all classes together it is .70
    assert nothing.found.rate < 0.3


def test_a_copy_of_a_member_is_no_other_image(audited):
    """It would be recognized as well, and be counted as a false alarm."""
    copied = audited.images.clone()
    copied[50:] = copied[:1]
    pools, _ = _pools(replace(audited, images=copied), [[0, 1], [1, 2]], seed=0)
    assert torch.equal(pools.audited.images[:3], copied[:3])
    others = torch.cat([pools.own.images, pools.kept_back.images, pools.audited.images[3:]])
    assert len(others) == 47
    assert not any(torch.equal(each, copied[0]) for each in others)


def test_too_few_images_of_a_clients_classes_are_said(audited, tmp_path, only_rows):
    places = (audited.labels == 1).nonzero()[:, 0].tolist()
    skewed = replace(audited, images_per_client=len(places) - 5, procedure=recordings.loop)
    mine = places[: len(places) - 5]
    client = RecordedClient(update=recordings.sent(skewed, mine), members=mine)
    made = audit_recorded(skewed, [client], out=tmp_path)
    assert "images of the classes of a client are not its own" in " ".join(
        each.reason for each in made.not_run
    )
