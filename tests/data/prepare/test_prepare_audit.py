"""What the report says of a few rows, by numbers worked out by hand."""

import json
from collections import Counter

import pytest

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.data.prepare.audit import PartAudit, can_tell_languages, language_of, leaks, save_report


def row(
    prompt: str, responses: list[str], ranks: list[int], task: str | None = None, before: int = 0, **labels
) -> PreferenceRow:
    turns = [{"role": role, "content": "x"} for _ in range(before) for role in ("user", "assistant")]
    return PreferenceRow([*turns, {"role": "user", "content": prompt}], responses, ranks, task, **labels)


ROWS = [
    row("Hi", ["long answer", "short"], [1, 2], "chat", before=2, capability_ranks={"wit": [1, 2], "tact": [1, 1]}),
    row("Hm?", ["a", "bb", "cc"], [1, 2, 1], "chat", capability_pairs={"wit": [[0, 2]]}),
    row("hi ", ["one", "two"], [2, 1], "maths"),
    row("Hm?", ["cc", "a", "bb"], [3, 2, 1]),
]


def audit_of(rows: list[PreferenceRow], **measures) -> PartAudit:
    audit = PartAudit(**measures)
    for each in rows:
        audit.add(each)
    return audit


@pytest.fixture
def audit() -> PartAudit:
    part = audit_of(
        ROWS,
        tokens=lambda row: [len(response.split()) for response in row.responses],
        language=lambda text: "xx" if "Hm" in text else "yy",
    )
    for kinds in ({"IBAN", "phone number"}, {"IBAN"}, set(), set(), set()):
        part.flag(kinds)
    part.skipped.update({"empty response": 2, "personal data": 1})
    part.routes.update({"chat": 3, "maths": 1})
    return part


def test_the_numbers(audit):
    report = audit.to_dict()
    assert (report["rows"], report["prompts"], report["duplicates"]) == (4, 3, 1)  # the first prompt has other turns
    assert report["skipped"] == {"empty response": 2, "personal data": 1}
    assert report["tasks"] == {
        "chat": {"rows": 2, "share": 0.5, "turns": 2.0},
        "maths": {"rows": 1, "share": 0.25, "turns": 1.0},
        "(none)": {"rows": 1, "share": 0.25, "turns": 1.0},
    }
    assert report["tasks by the router"] == {
        "chat": {"rows": 3, "share": 0.75},
        "maths": {"rows": 1, "share": 0.25},
    }
    assert report["languages"] == {"yy": {"rows": 2, "share": 0.5}, "xx": {"rows": 2, "share": 0.5}}
    assert report["capability points"] == {"wit": 2}  # tact ties
    assert report["personal data"] == {
        "looked at": 5,
        "flagged": 2,
        "share": 0.4,
        "kinds": {"IBAN": 2, "phone number": 1},
    }
    # Pairs, better > worse: 11 > 5 letters; 1 > 2, 2 > 2; 3 > 3; 1 > 2, 2 > 2, 2 > 1.
    assert report["longer response is the better"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 0 + 0.5 + 1) / 7)


def test_the_lengths(audit):
    lengths = audit.to_dict()["lengths"]
    assert lengths["turns of the user"] == {"mean": 1.5, "median": 1, "95%": pytest.approx(2.7), "greatest": 3}
    assert lengths["responses of a row"]["mean"] == 2.5
    assert lengths["characters of a prompt"] == {"mean": 3.75, "median": 3, "95%": pytest.approx(5.55), "greatest": 6}
    assert lengths["characters of a response"]["greatest"] == 11
    assert lengths["tokens of a prompt with a response"] == {
        "mean": 1.1,
        "median": 1,
        "95%": pytest.approx(1.55),
        "greatest": 2,
    }


def test_prompts_in_two_parts():
    train, test, other = audit_of(ROWS), audit_of([ROWS[2], ROWS[2]]), audit_of([row("Else?", ["a", "b"], [1, 2])])
    shouted = audit_of([row("  HM?\n", ["x", "y"], [1, 2])])
    parts = {"train": train.prompts, "test": test.prompts, "other": other.prompts, "shouted": shouted.prompts}
    found = {tuple(leak["parts"]): (leak["prompts"], *leak["rows"].values()) for leak in leaks(parts)}
    assert len(found) == 6
    assert found["train", "test"] == (1, 1, 2)
    assert found["train", "shouted"] == (1, 2, 1)
    assert found["train", "other"] == found["test", "shouted"] == (0, 0, 0)


def test_the_report_is_saved(audit, tmp_path):
    against = {"a|b.jsonl": Counter({ROWS[1].prompt_id: 5})}
    markdown, content = save_report({"train": audit}, against, tmp_path / "rows.report")
    assert (markdown.name, content.name) == ("rows.report.md", "rows.report.json")
    report = json.loads(content.read_text())
    assert report["parts"]["train"] == audit.to_dict()
    assert report["leaks"] == [{"parts": ["train", "a|b.jsonl"], "prompts": 1, "rows": {"train": 2, "a|b.jsonl": 5}}]
    text = markdown.read_text()
    for line in (
        "| chat | 2 | 50.0% | 2.00 |",
        "| rows with what looks like personal data, before any was dropped | 2 (40.0%) |",
        "| pairs in which the longer response is the better | 50.0% |",
        "| turns of the user | 1.5 | 1 | 2.7 | 3 |",
        "| empty response | 2 |",
        "| train and a\\|b.jsonl | 1 | 2 | 5 |",
    ):
        assert line in text.splitlines()


def test_what_was_not_looked_for_is_said(tmp_path):
    markdown, _ = save_report({"train": audit_of(ROWS[:1])}, {}, tmp_path / "rows.report")
    assert (
        "| rows with what looks like personal data, before any was dropped | not looked for |" in markdown.read_text()
    )
    assert "languages" not in markdown.read_text()


@pytest.mark.skipif(not can_tell_languages(), reason="needs the extra `prepare`")
@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The ship left the harbour early in the morning, long before the sun rose.", "en"),
        ("Das Schiff verließ den Hafen früh am Morgen, lange bevor die Sonne aufging.", "de"),
        ("船在清晨离开了港口，那时太阳还没有升起。", "zh"),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language
