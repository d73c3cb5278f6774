"""An unmodified app of older style, but for the mod that records; and an audit of what its nodes sent."""

from __future__ import annotations

import json

from recorded_quickstart import record, recorded

from fedkl import auditing
from fedkl.auditing import audit_recorded, plan, read_recorded
from tests.auditing import recordings


def test_what_the_nodes_of_an_app_sent_gives_their_images_away(tmp_path, unchecked, monkeypatch):
    monkeypatch.setattr(plan, "available", tuple)  # presence only
    subject, members = recordings.subject(procedure=recordings.loop), recordings.members(4)
    record(subject, members, tmp_path / "updates")
    assert list(read_recorded(tmp_path / "updates")) == ["node-1000", "node-1001", "node-1002", "node-1003"]
    clients = recorded(tmp_path / "updates", members)
    assert [each.update.images for each in clients] == [recordings.SIZE] * 4  # as the nodes said
    assert sorted(clients[0].update.tensors) == ["0", "1", "2", "3"]  # as lists of arrays are sent
    audit = audit_recorded(subject, clients, out=tmp_path / "audit")
    (found,) = [each for each in audit.findings if each.exposure == "recorded"]
    assert (found.question, found.outcome, found.figures["clients"]) == ("presence", "leaks", 4.0)
    assert found.found.rate > 0.6
    records = [json.loads(line) for line in (tmp_path / "audit" / "results.jsonl").read_text().splitlines()]
    assert {each["exposure"] for each in records} == {"recorded", "gradient-of-1"}
    assert auditing.Audit.read(tmp_path / "audit") == audit
