"""The page of an audit: what a reader meets first, whether its numbers are those of the results, Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import safetensors.torch

from fedkl import report
from fedkl.auditing import advice, words
from fedkl.auditing.attackers import ATTACKERS, PRESENCE
from fedkl.auditing.results import Audit
from tests.auditing.audits import (
    REAL,
    SINGLE,
    SUM,
    SUMS,
    audit,
    finding,
    measured,
    not_run,
    write,
    write_pictures,
)

EVIL = """<script>alert(1)</script>"'&{{ 7*7 }}"""


class Parsed(HTMLParser):
    """Tags with their attributes, headings, and the text that a reader sees, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._silent = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._silent += tag in ("script", "style", "title")

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style", "title")

    def handle_data(self, data):
        if not self._silent and data.strip():
            self.text.append(" ".join(data.split()))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def shown(self):
        return " ".join(self.text)


@pytest.fixture
def leaky(tmp_path):
    pictures = write_pictures(tmp_path, "rebuilt")
    return write(
        tmp_path,
        audit(
            finding("labels", 25, 240, attacker="bias", outcome="at the floor", control=measured(238, 240)),
            finding(figures={"auc": 0.871, "auc_low": 0.84, "auc_high": 0.9}, floor=measured(3, 300)),
            finding("rebuilt", 20, 30, attacker="ig", pictures=pictures, control=measured(29, 30)),
            finding("rebuilt", 30, 30, attacker="closed", exposure="single"),
            finding(successes=60, exposure="sums"),
            not_run("spear", kind="does not apply", reason="no ReLU"),
        ),
    )


def page(folder):
    return Parsed(report.build(folder).html.read_text(encoding="utf-8"))


def test_the_worst_comes_first_then_pictures_then_words_then_figures(leaky):
    shown = page(leaky).shown()
    places = [
        "What does hospital leak without a defense? (2026-11-29)",
        "The server rebuilds about 67 of 100 of a client's images (49 to 81) as pictures.",
        "What the server made of what your clients really send: 20 of 30 rebuilt",
        "original",
        "Left an image of a client",
        "recognizes about 67 of 100 of a client's images (61 to 72) as trained on",
        "Who could do it?",
        "threat model D",
        "What to do next",
        "Nothing found is not safe",
        "What your clients really send",
        "Upper bounds: not what happens at your clients",
        "Every finding",
        "no ReLU",
        "fedkl audit audits.mine:subject --out NEW --batch-size 1,16 --minutes 10 --seed 0",
    ]
    found = [shown.find(place) for place in places]
    assert -1 not in found
    assert found == sorted(found)


def test_every_number_is_one_of_the_results(leaky):
    parsed = page(leaky)
    made = Audit.read(leaky)
    ordered = [each for each in made.worst_first() if made.exposure(each.exposure).headline]
    ordered += [each for each in made.worst_first() if not made.exposure(each.exposure).headline]
    bars = [each for each in parsed.all("rect") if each["class"] == "bar"]
    assert [float(each["data-rate"]) for each in bars] == [each.found.rate for each in ordered]
    assert [float(each["width"]) for each in bars] == [100 * each.found.rate for each in ordered]
    ends = [(float(e["data-low"]), float(e["data-high"])) for e in parsed.all("path") if "data-low" in e]
    assert ends == [(each.found.low, each.found.high) for each in ordered]
    for name in ("floor", "control"):
        marks = [
            float(each["data-rate"])
            for each in parsed.all("line")
            if each["class"] == name and "data-rate" in each
        ]
        assert marks == [getattr(each, name).rate for each in ordered if getattr(each, name) is not None]
    every = [m for each in made.findings for m in (each.found, each.floor, each.control) if m is not None]
    shown = re.findall(r"\d+ % \[\d+–\d+ %\](?:, n = \d+)?", parsed.shown())
    assert {text for text in shown if "n =" in text} == {each.percent for each in every}
    assert {text.partition(",")[0] for text in shown} == {each.percent.partition(",")[0] for each in every}
    others = re.sub(r"\d+ % \[\d+–\d+ %\]", "", parsed.shown())
    assert set(re.findall(r"\d+ %", others)) == {"1 %", "95 %"}  # false alarms; the interval's name


def test_words_of_the_verdicts_are_explained_where_they_stand(leaky):
    shown = page(leaky).shown()
    text = (leaky / "report.md").read_text(encoding="utf-8")
    explained = ("AUC, of images that are recognized: how often", "Floor: what is found", "Control: what")
    for word in (*explained, "Undecided: neither", "counted at 1 % false alarms"):
        assert word in shown
        assert word in text


def test_one_file_that_asks_nothing_of_the_network(leaky):
    html = report.build(leaky).html.read_text(encoding="utf-8")
    assert not re.search(r"<(link|iframe|base|form)|https?://|@import|url\(|\son\w+=", html)
    sources = [each["src"] for each in Parsed(html).all("img")]
    assert len(sources) == 5  # three originals; of what was rebuilt, one is lost
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert html.count("<script>") == 1
    (policy,) = [each["content"] for each in Parsed(html).all("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'; ")
    assert (leaky / "figures" / "rebuilt.png").is_file()
    assert "figures/rebuilt.png" in (leaky / "report.md").read_text(encoding="utf-8")


def test_everything_is_named_for_those_who_do_not_see_it(leaky):
    parsed = page(leaky)
    assert all(each["alt"] for each in parsed.all("img"))
    labeled = [each for each in parsed.all("svg") if each.get("role") == "img"]
    assert len(labeled) == 5
    assert all("%" in each["aria-label"] for each in labeled)
    assert [each["type"] for each in parsed.all("button")] == ["button"]
    assert len(parsed.all("summary")) == len(parsed.all("details"))
    assert parsed.all("html") == [{"lang": "en"}]


@pytest.mark.parametrize("question", ["rebuilt", "presence"])
def test_names_from_users_stay_text(tmp_path, question):
    evil = REAL.model_copy(update={"title": EVIL})
    made = audit(
        finding(question, knew=EVIL, reason=EVIL),
        not_run(reason=EVIL),
        exposures=(evil,),
        environment={EVIL: EVIL},
        **dict.fromkeys(("subject", "target", "defense", "fedkl"), EVIL),
    )
    html = report.build(write(tmp_path, made)).html.read_text(encoding="utf-8")
    assert html.count("<script>") == 1
    assert "alert(1)" in html
    assert EVIL in Parsed(html).shown()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in re.sub(r"(?m)^ {4}.*$", "", text).replace("\\<script", "")


def test_presence_that_is_no_leak_does_not_read_like_one(tmp_path):
    quiet = finding(successes=4, outcome="at the floor", control=measured(183, 300))
    shown = page(write(tmp_path, audit(quiet, masking="blind"))).shown()
    assert (
        "recognizes about 1 of 100 of a client's images (1 to 3) as trained on. "
        "No leak is seen: without masks it recognizes 61 of 100. Shown" in shown
    )


def test_what_an_attacker_is_held_against_has_a_name(tmp_path):
    """One image alone, or the same without what protects them: "where nothing is hidden" may be both."""
    reason = "the attack finds only 9 of 96 of its control"
    undecided = finding("rebuilt", 0, 96, outcome="says nothing", reason=reason, control=measured(9, 96))
    for folder, changes, named, because in (
        ("plain", {}, "of one image alone", "the attack finds only 9 of 96 images sent alone"),
        (
            "masked",
            {"masking": "both"},
            "without masks",
            "the attack finds only 9 of 96 images without masks",
        ),
        ("locked", {"defense": "keylock"}, "without keylock", "finds only 9 of 96 images without keylock"),
    ):
        made = audit(undecided, **changes)
        shown = page(write(tmp_path / folder, made)).shown()
        assert f"control: found {named}" in shown
        assert f"Control, {named}" in shown
        assert because in shown
        assert not re.search("its control|nothing is hidden", shown)
    missing = finding(outcome="says nothing", reason="its control was not attacked")
    assert words.reason(audit(missing), missing) == "it was not tried on images sent alone"
    alone = missing.model_copy(update={"exposure": "single"})
    assert words.reason(audit(alone), alone) == "no easier case shows whether the attack works"


def test_no_leak_is_said_with_how_many_were_tried_and_what_they_find_otherwise():
    quiet = finding(successes=0, outcome="at the floor", control=measured(183, 300))
    others = [not_run(f"attack-{number}") for number in range(8)]
    assert words.verdict(audit(quiet, *others, masking="blind"), plain=True) == (
        "good",
        "One of nine attackers could be tried on what your clients send. It recognized 0 to 1 of 100 images; "
        "without masks 61.",
    )
    undecided = finding("rebuilt", 0, 30, attacker="ig", outcome="says nothing")
    said = words.verdict(audit(quiet, undecided), plain=True).text
    assert said == (
        "All two attackers were tried on what your clients send. Of those that can be judged, the best "
        "recognized 0 to 1 of 100 images; of one image alone 61. Undecided, ig: 0 of 30 rebuilt."
    )
    in_part = finding(successes=60, outcome="says nothing", exposure="sums")
    of_sums = SUMS.model_copy(update={"headline": True})
    assert words.verdict(audit(quiet, in_part, exposures=(REAL, SINGLE, of_sums))).tone == "open"
    assert "The only attacker was tried" in words.verdict(audit(quiet), plain=True).text


def test_attackers_are_said_by_what_they_do(tmp_path):
    assert set(words.ATTACKERS) == {PRESENCE, *(each.name for each in ATTACKERS)}
    made = audit(finding(attacker="presence"), not_run("linear-rows"))
    shown = page(write(tmp_path, made)).shown()
    assert "Recognizing given images: whoever reads the update" in shown
    assert "without a result: reading off a linear layer." in shown
    assert "reading off a linear layer (linear-rows)" in shown  # by that name it is looked up


def test_pictures_of_upper_bounds_are_marked_as_such(tmp_path):
    pictures = write_pictures(tmp_path, "bound")
    made = audit(
        finding("rebuilt", 30, 30, exposure="single", pictures=pictures), finding(outcome="at the floor")
    )
    shown = page(write(tmp_path, made)).shown()
    assert "no leak was found. Upper bound, one step on one image" in shown
    assert "Left a test image, sent alone; right what the server computed from it, by span." in shown
    assert "It leaks in this easier case: 30 of 30 rebuilt." in shown
    assert "×: no picture that can be seen." in shown  # the last one is lost
    assert "that client's update" not in shown
    assert "An easier case than yours: one step on one image. In your setting: no attacker that" in shown


def test_more_than_chance_is_no_good_news():
    """An area above one half, that is surely so: too little at few false alarms is not nothing."""
    seen = finding(successes=15, outcome="says nothing", figures={"auc": 0.66, "auc_surely": 0.6})
    quiet = finding("rebuilt", 0, attacker="linear-rows", outcome="at the floor")
    for plain in (False, True):
        found = words.verdict(audit(seen, quiet), plain=plain)
        assert found.tone == "open"
        assert "More images are recognized than by chance" in found.text
    chance = finding(successes=3, outcome="at the floor", figures={"auc": 0.5, "auc_surely": 0.4})
    assert words.verdict(audit(chance, quiet)).tone == "good"


def test_what_an_easier_case_is_easier_than_stands_above_its_pictures(tmp_path):
    pictures = write_pictures(tmp_path, "bound")
    made = audit(
        finding("rebuilt", 30, 30, exposure="single", pictures=pictures),
        finding("rebuilt", 0, 96, attacker="ig", outcome="at the floor"),
        finding("rebuilt", 0, 96, outcome="says nothing", reason="its control failed"),
        finding(),
    )
    shown = page(write(tmp_path, made)).shown()
    label = "An easier case than yours: one step on one image. In your setting: 0 of 96 rebuilt, undecided"
    assert -1 < shown.find("recognizes about 67 of 100") < shown.find(label) < shown.find("original")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert -1 < text.find(f"**{label}**") < text.find("![Originals")


def test_pictures_of_what_really_happens_come_before_those_of_upper_bounds(tmp_path):
    names = [write_pictures(tmp_path, name, seed=seed) for seed, name in enumerate(("bound", "real"))]
    made = audit(
        finding("rebuilt", 30, 30, exposure="single", pictures=names[0]),
        finding("identified", 20, 30, pictures=names[1]),
    )
    shown = page(write(tmp_path, made)).shown()
    assert "What the server made of what your clients really send: 20 of 30 told from many others" in shown


def test_pictures_that_answer_two_questions_are_shown_once(tmp_path):
    names = [write_pictures(tmp_path, name, seed=seed) for seed, name in enumerate(("first", "second"))]
    made = audit(
        *(finding(q, 20, 30, pictures=names[0]) for q in ("rebuilt", "identified")),
        *(finding(q, 20, 30, attacker="ig", pictures=names[1]) for q in ("rebuilt", "identified")),
    )
    assert len(page(write(tmp_path, made)).all("img")) == 10  # of each, three originals and two rebuilt


def test_what_says_nothing_is_shown_as_undecided_with_its_reason(tmp_path):
    made = audit(finding(successes=0, outcome="says nothing", reason="its control failed"))
    parsed = page(write(tmp_path, made))
    shown, text = parsed.shown(), (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Not decided" in shown
    assert (
        "Recognized as trained on span; your client: one epoch of 300 images Undecided: its control" in shown
    )
    assert "undecided 0 % [0–1 %], n = 300" in shown
    assert "| undecided: its control failed | span; your client" in text
    assert "* undecided: Recognized as trained on: 0 %" in text
    assert not re.search("says nothing", shown + text, re.IGNORECASE)
    assert Audit.read(tmp_path).findings[0].outcome == "says nothing"  # older files are read


def test_the_title_says_behind_what_and_when():
    for changes, title in (
        ({}, "What does hospital leak without a defense? (2026-11-29)"),
        ({"masking": "blind"}, "What does hospital leak with blind masks? (2026-11-29)"),
        ({"masking": "both"}, "What does hospital leak with blind and pairwise masks? (2026-11-29)"),
        (
            {"defense": "keylock", "masking": "pairwise"},
            "What does hospital leak with keylock and pairwise masks? (2026-11-29)",
        ),
        ({"finished": False}, "What does hospital leak without a defense? (interrupted)"),
    ):
        assert words.title(audit(finding(), **changes)) == title
    older = audit(finding())
    older = older.model_copy(
        update={"summary": older.summary.model_copy(update={"date": None, "version": None})}
    )
    assert words.title(older) == "What does hospital leak without a defense?"
    assert set(older.summary.model_dump()) == {"seconds", "findings", "not_run"}


def test_nothing_is_unfolded_and_tables_fit_paper_and_phones(leaky):
    parsed = page(leaky)
    assert not [each for each in parsed.all("details") if "open" in each]
    html = (leaky / "report.html").read_text(encoding="utf-8")
    for table in html.split("<table")[1:]:
        assert 1 < table.partition("</thead>")[0].count("<th ") <= 6
    cells = parsed.all("td")
    assert cells
    assert all(each["data-name"] for each in cells)  # a cell's heading, where cells are stacked
    paper, phone = (
        html.partition(f"@media {kind}")[2].partition("\n")[0] for kind in ("print", "screen and (max-width")
    )
    assert "break-inside: avoid" in paper
    assert "summary, caption, thead { break-after: avoid" in paper
    assert ".scroll td { display: block" in phone


def test_pictures_that_cannot_be_read_are_named_and_end_nothing(tmp_path):
    made = audit(finding("rebuilt", 20, 30, pictures="pictures/gone.safetensors"))
    shown = page(write(tmp_path, made)).shown()
    assert "Pictures missing: pictures/gone.safetensors cannot be shown" in shown
    assert "Pictures missing" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not (tmp_path / "figures").exists()


def test_large_pictures_are_made_small_and_the_page_stays_below_three_megabytes(tmp_path):
    names = [write_pictures(tmp_path, f"p{i}", images=20, size=224, seed=i) for i in range(6)]
    made = audit(
        *(finding("rebuilt", 20, 30, attacker=f"a{i}", pictures=name) for i, name in enumerate(names))
    )
    size = report.build(write(tmp_path, made)).html.stat().st_size
    assert 500_000 < size < 3_000_000


def test_advice_is_what_was_measured_and_nothing_else():
    leak = finding(successes=200)
    better = finding(successes=60, exposure="sums")
    first, masks = advice.next_steps(audit(leak, better))
    assert first.text.startswith("Recognized as trained on: 67 % [61–72 %] became at most 20 % [16–25 %]")
    assert first.text.endswith("the mean of 16 clients (16 clients instead of 1).")
    assert masks == (
        "Ask your engineers to repeat this audit with masks:",
        "fedkl audit audits.mine:subject --out NEW --masking blind --batch-size 1,16 --minutes 10 --seed 0",
    )
    untrained = REAL.model_copy(update={"name": "untrained", "headline": False, "trained": False})
    exposures = (REAL, SINGLE, SUMS, untrained)
    for unhelpful in (
        (leak, finding(successes=175, exposure="sums")),  # intervals overlap
        (leak, finding(successes=0, exposure="untrained")),  # nobody can choose not to have trained
        (leak, finding(successes=0, exposure="sums", attacker="ratio")),  # the worst one was not tried
        (leak, better, finding(successes=250, exposure="sums", attacker="ratio")),  # another one gets more
        (leak, finding("labels", 0, 300, exposure="sums")),
    ):
        assert len(advice.next_steps(audit(*unhelpful, exposures=exposures))) == 1
    assert advice.next_steps(audit(finding(outcome="at the floor"), better)) == []


def test_advice_on_a_defense_compares_with_its_control():
    helped = audit(finding(successes=60, control=measured(290, 300)), defense="keylock", masking="blind")
    step, *_ = advice.next_steps(helped)
    assert step.text.startswith(
        "With keylock and blind masks, 97 % [94–98 %] became 20 % [16–25 %]: it helps"
    )
    useless = audit(finding(successes=288, control=measured(290, 300)), defense="keylock")
    assert "leaks all the same" in advice.next_steps(useless)[0].text
    assert "--defense keylock --masking blind" in advice.next_steps(useless)[1].command


@pytest.mark.parametrize(
    ("masking", "left"),
    [("blind", "reads every update"), ("pairwise", "everyone sees the sum"), ("both", "less its own update")],
)
def test_an_audit_with_masks_says_what_they_leave(tmp_path, masking, left):
    made = audit(finding(outcome="at the floor"), masking=masking)
    first, *others = advice.next_steps(made)
    assert first.command is None
    assert left in first.text
    assert first.text.endswith(
        "Look after the members' keys: “The protocol of masked sums” (docs/masked.md)."
    )
    measurable = [step.command for step in others if step.command]  # the sum, where the server sees it
    assert ["--masking pairwise" in each for each in measurable] == [True] * (masking != "pairwise")
    shown = page(write(tmp_path, made)).shown()
    assert first.text in shown
    assert ("What members read of the sum was not tried." in shown) is (masking != "pairwise")


def test_a_picture_of_one_shade_is_shown_as_none(tmp_path):
    place = write_pictures(tmp_path, "flat")
    tensors = safetensors.torch.load_file(tmp_path / place)
    tensors["found"][0] = 0.5
    safetensors.torch.save_file(tensors, tmp_path / place)
    parsed = page(write(tmp_path, audit(finding("rebuilt", 20, 30, pictures=place))))
    assert len(parsed.all("img")) == 4  # three originals, one attempt
    assert "×: no picture that can be seen." in parsed.shown()


def test_commands_break_at_blanks_only(leaky):
    html = report.build(leaky).html.read_text(encoding="utf-8")
    assert '<span class="word">--out</span> NEW <span class="word">--batch-size</span> 1,16' in html
    assert ".word { display: inline-block; max-width: 100%; }" in html
    assert '<span class="once">(2026-11-29)</span>' in html


def test_masks_are_advised_by_a_command_that_can_be_run(tmp_path):
    recorded = audit(finding(), recorded=("aa",), target="my audits.py:subject", batch_sizes=())
    (step,) = advice.next_steps(recorded)
    assert step.command == (
        "fedkl audit 'my audits.py:subject' --out NEW --masking blind --minutes 10 --seed 0"
    )
    assert step.command in page(write(tmp_path, recorded)).shown()
    assert step.command in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("results", "tone", "text"),
    [
        ((finding(), finding("rebuilt", 3, 30)), "bad", "rebuilds 10 %"),
        ((finding("labels", 30, 300, outcome="at the floor"),), "good", "by span, which would find one"),
        ((finding(outcome="says nothing"),), "open", "no attacker was shown to be able"),
        ((finding(exposure="single"),), "open", "no result for what your clients really send"),
        ((), "open", "no result"),
    ],
)
def test_the_verdict_in_one_sentence(results, tone, text):
    found = words.verdict(audit(*results))
    assert found.tone == tone
    assert text in found.text
    interrupted = words.verdict(audit(*results, finished=False))
    assert interrupted.text == f"Interrupted, not all was tried. {found.text}"
    assert interrupted.tone == ("bad" if tone == "bad" else "open")


def test_what_repeats_it():
    made = audit(finding(), defense="keylock", masking="blind", target="my audits.py:subject", seed=3)
    assert advice.command(made) == (
        "fedkl audit 'my audits.py:subject' --out NEW --defense keylock --masking blind --batch-size 1,16 "
        "--minutes 10 --seed 3"
    )
    assert advice.command(audit(finding(), target="hospital", defense="keylock")) == (
        "fedkl.auditing.audit(subject, out=NEW, defense='keylock', batch_sizes=(1, 16), minutes=10.0, seed=0)"
    )


@pytest.mark.parametrize("name", ["mine: v2", "mine:v2", "at 10:30"])
def test_a_subject_whose_name_has_a_colon_is_not_repeated_on_the_command_line(name):
    made = audit(finding(), subject=name, target=name, source=None, line=None)
    assert advice.command(made).startswith("fedkl.auditing.audit(subject, out=NEW, ")


def test_what_repeats_the_audit_of_a_recording_says_its_kind_and_that_it_was_wanted_anyway():
    recorded = {"recorded": ("aa",), "batch_sizes": ()}
    for settings, flags in (
        ({}, ""),
        ({"recorded_kind": "gradient"}, ""),
        ({"recorded_kind": "difference"}, " --kind difference"),
        ({"recorded_kind": "weights", "anyway": True}, " --kind weights --anyway"),
    ):
        made = audit(finding(), **recorded, **settings)
        assert advice.command(made) == (
            f"fedkl audit audits.mine:subject --out NEW --recorded UPDATES --members MEMBERS{flags} "
            "--minutes 10 --seed 0"
        )
        assert "--kind" not in advice.command(made, masking="blind")
        assert "--anyway" not in advice.command(made, masking="blind")
    api = audit(finding(), **recorded, target="hospital", anyway=True)
    assert advice.command(api) == (
        "fedkl.auditing.audit_recorded(subject, clients, out=NEW, anyway=True, minutes=10.0, seed=0)"
    )
    assert "anyway" not in advice.command(api, masking="blind")


def test_who_failed_who_is_undecided_and_who_came_to_nothing_are_three_lists():
    made = audit(
        finding(outcome="says nothing"),
        finding(exposure="single"),  # what an easier case came to decides nothing
        finding(attacker="ig", outcome="at the floor"),
        finding("rebuilt", attacker="both", outcome="at the floor"),
        finding("identified", attacker="both", outcome="says nothing"),
        finding("labels", attacker="bias"),
        finding(attacker="bound", exposure="single", outcome="at the floor"),
        not_run("spear"),
    )
    assert words.failures(made) == (["ig"], ["span", "both"], ["bound", "spear"])
    assert words.caution(made) == (
        f"{words.NOT_SAFE} Found nothing in your setting, although able to: ig. Undecided: span, both. "
        "Not tried there, or without a result: bound, spear."
    )


def test_what_kept_presence_from_a_result_stands_in_the_verdict():
    """Mostly that there are too few images: whoever started the audit has to know it at once."""
    made = audit(finding(exposure="single"), not_run("presence"))
    reason = made.not_run[0].reason
    assert words.verdict(made).text == f"This audit has no result for what your clients really send. {reason}"
    assert words.verdict(audit(finding(exposure="single"), not_run("spear"))).text.endswith("really send.")


@pytest.mark.parametrize("plain", [False, True])
def test_nothing_is_good_of_which_a_part_was_not_tested(plain):
    """Single updates behind masks showed nothing, and of sums, which leak, presence was not tested."""
    quiet = finding(successes=3, attacker="presence", outcome="at the floor", control=measured(200, 300))
    rows = finding("rebuilt", 0, attacker="linear-rows", outcome="at the floor", control=measured(30, 30))
    of_sums = {"exposure": SUM.name}
    missing = not_run("presence", kind="does not apply", reason="Give more images.", **of_sums)
    sums = {"exposures": (REAL, SUM), "masking": "pairwise"}
    for results in (
        [quiet, missing],
        [quiet, missing, rows, rows.model_copy(update=of_sums)],
    ):
        found = words.verdict(audit(*results, **sums), plain=plain)
        assert found == (
            "open",
            f"{words.NO_LEAK}, but presence was not tested on {SUM.title}. Give more images.",
        )
    assert "presence" in words.failures(audit(quiet, missing, **sums)).undecided
    found = words.verdict(audit(rows, not_run("linear-rows", **of_sums), **sums), plain=plain)
    assert found == (
        "open",
        f"{words.NO_LEAK}, but no attacker was shown to be able to find one in all of it.",
    )
    whole = audit(quiet, quiet.model_copy(update=of_sums), rows, not_run("linear-rows", **of_sums), **sums)
    assert words.verdict(whole, plain=plain).tone == "good"
    assert words.failures(whole) == (["presence"], ["linear-rows"], [])


def test_the_page_says_shares_plainly_and_the_terminal_exactly():
    made = audit(finding(successes=144, figures={"auc": 0.95}))
    assert words.verdict(made, plain=True).text == (
        "The server recognizes about 48 of 100 of a client's images (42 to 54) as trained on."
    )
    assert words.verdict(made).text.endswith("48 % [42–54 %] at 1 % false alarms (AUC 0.95).")


def test_chromium_shows_it_with_its_script(leaky):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: its test of the page needs one on PATH")
    profile = leaky / "profile"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    target = report.build(leaky).html.as_uri()
    done = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", target],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (button,) = Parsed(done.stdout).all("button")
    assert "hidden" not in button  # the policy lets the page's own script run
    assert "CONSOLE" not in done.stderr  # nor was anything refused
    assert len(Parsed(done.stdout).all("img")) == 5
