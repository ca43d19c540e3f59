"""The consistency table: its cells by hand, its Markdown to the letter, its files; and one response explained."""

import json

import pytest

from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.evaluation.table import Cell, Table, consistency_table, length_scores
from dmoerm_trl.markdown import display_width
from dmoerm_trl.scoring.explain import explanation


def row(task, responses=("long text", "short"), ranks=(1, 2)):
    prompt = [{"role": "user", "content": "Hello?"}]
    return PreferenceRow(prompt=prompt, responses=list(responses), ranks=list(ranks), task=task)


ROWS = [row("roleplay"), row("chitchat"), row("roleplay", ("a", "bb", "ccc"), (1, 2, 3)), row("others"), row(None)]
SCORES = {
    "single": [[1.0, 0.0], [0.0, 1.0], [3.0, 1.0, 2.0], [0.0, 0.0], [1.0, 0.0]],
    "DMoERM": [[1.0, 0.0], [1.0, 0.0], [3.0, 2.0, 1.0], [1.0, 0.0], [1.0, 0.0]],
    "length only": length_scores(ROWS),
}


def test_length_is_counted_in_characters():
    assert length_scores([row("roleplay", ("好的。", "", "ok\n"), (1, 2, 3))]) == [[3.0, 0.0, 3.0]]


def test_cells_by_hand():
    table = consistency_table(SCORES, ROWS, ["chitchat", "roleplay"])
    assert table.columns == ("chitchat", "roleplay", "others", "overall")
    means = {method: {c: cell.mean for c, cell in cells.items()} for method, cells in table.cells.items()}
    assert means == {
        "single": {"chitchat": 0, "roleplay": 3 / 4, "others": 1.5 / 2, "overall": 4.5 / 7},
        "DMoERM": {"chitchat": 1, "roleplay": 1, "others": 1, "overall": 1},
        "length only": {"chitchat": 1, "roleplay": 1 / 4, "others": 1, "overall": 4 / 7},
    }
    assert [table.cells["single"][column].pairs for column in table.columns] == [1, 4, 2, 7]
    for cells in table.cells.values():
        assert all(0 <= cell.low <= cell.mean <= cell.high <= 1 for cell in cells.values())


def test_the_others_column_stands_only_where_there_are_such_rows():
    scores = {"single": SCORES["single"][:2]}
    table = consistency_table(scores, ROWS[:2], ["roleplay", "chitchat", "objective_qa"])
    assert table.columns == ("roleplay", "chitchat", "objective_qa", "overall")
    assert "objective_qa" not in table.cells["single"]  # no row, no number
    assert table.to_markdown().splitlines()[2].split("|")[4].strip() == "–"


def test_a_column_without_an_overall_preference_has_no_number():
    rows = [row("roleplay"), row("chitchat", ranks=(1, 1)), row("others", ranks=(1, 1))]
    table = consistency_table({"single": [[1.0, 0.0]] * 3}, rows, ["roleplay", "chitchat"])
    assert table.columns == ("roleplay", "chitchat", "overall")
    assert {column: cell.mean for column, cell in table.cells["single"].items()} == {"roleplay": 1, "overall": 1}


def test_responses_with_the_same_text_are_no_pair():
    """A reward model can but tie them, which would count as half."""
    rows = [row("roleplay", ("a", "a", "b"), (1, 2, 3)), row("chitchat", ("a", "a")), row("roleplay", ("a", "bb"))]
    scores = {"single": [[2.0, 2.0, 1.0], [1.0, 1.0], [0.0, 1.0]], "length only": length_scores(rows)}
    table = consistency_table(scores, rows, ["roleplay", "chitchat"])
    assert table.cells["single"]["overall"].mean == 2 / 3 and table.cells["length only"]["overall"].mean == 1 / 3
    assert table.pairs == {"roleplay": 3, "overall": 3}  # chitchat has none
    with pytest.raises(ValueError, match="method 'single', column 'overall': prompt 1: got 3 rewards for 2 responses"):
        consistency_table({"single": [[1.0, 0.0, 0.0]] * 3}, rows, ["roleplay", "chitchat"])


def cells(roleplay, overall, low=0.6, high=0.75):
    return {"roleplay": Cell(roleplay, low, high, 40), "overall": Cell(overall, low, high, 90)}


TABLE = Table(
    columns=("roleplay", "chitchat", "overall"),
    cells={
        "ceiling": cells(0.81, 0.8, 0.79, 0.83),
        "length only": cells(0.52, 0.53),
        "single": cells(0.576, 0.582),
        "mean": cells(0.6201, 0.624),
        "WCO": cells(0.6204, 0.626),
        "DMoERM": cells(0.682, 0.707, 0.681, 0.7321),
    },
    confidence=0.95,
)


def test_markdown_to_the_letter():
    assert TABLE.to_markdown() == (
        "| method         | roleplay    | chitchat | overall                  |\n"
        "| -------------- | ----------: | -------: | -----------------------: |\n"
        "| single         | 57.6        | –        | 58.2 [60.0, 75.0]        |\n"
        "| mean           | <u>62.0</u> | –        | 62.4 [60.0, 75.0]        |\n"
        "| WCO            | <u>62.0</u> | –        | <u>62.6</u> [60.0, 75.0] |\n"
        "| DMoERM         | **68.2**    | –        | **70.7** [68.1, 73.2]    |\n"
        "\n"
        "| for comparison | roleplay    | chitchat | overall                  |\n"
        "| -------------- | ----------: | -------: | -----------------------: |\n"
        "| ceiling        | 81.0        | –        | 80.0 [79.0, 83.0]        |\n"
        "| length only    | 52.0        | –        | 53.0 [60.0, 75.0]        |\n"
        "| pairs          | 40          | –        | 90                       |\n"
        "\n"
        "Consistency with the labels, in percent; the brackets hold the 95% bootstrap interval over prompts. "
        "Best in bold, second best underlined.\n"
    )


def test_files(tmp_path):
    markdown, content = TABLE.save(tmp_path / "new" / "table.v1")
    assert (markdown.name, content.name) == ("table.v1.md", "table.v1.json")
    assert markdown.read_text(encoding="utf-8") == TABLE.to_markdown()
    report = json.loads(content.read_text(encoding="utf-8"))
    assert report["consistency"] == TABLE.to_dict()
    assert report["consistency"]["DMoERM"]["overall"] == {"mean": 0.707, "low": 0.681, "high": 0.7321}
    assert report["pairs"] == {"roleplay": 40, "overall": 90} and report["confidence"] == 0.95


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="row 1: got task 'chitchat', need 'others' or one of"):
        consistency_table(SCORES, ROWS, ["roleplay"])
    with pytest.raises(ValueError, match="method 'single': got scores of 4 rows, need those of all 5"):
        consistency_table({"single": SCORES["single"][:4]}, ROWS, ["roleplay", "chitchat"])
    broken = [*SCORES["single"][:3], [0.0, float("nan")], [1.0, 0.0]]
    with pytest.raises(ValueError, match="method 'single', column 'overall': prompt 3: got rewards .0.0, nan."):
        consistency_table({"single": broken}, ROWS, ["roleplay", "chitchat"])
    with pytest.raises(ValueError, match="are added automatically"):
        consistency_table(SCORES, ROWS, ["roleplay", "chitchat", "overall"])
    with pytest.raises(ValueError, match="got no scores"):
        consistency_table({}, ROWS, ["roleplay", "chitchat"])


def test_explanation_to_the_letter():
    text = explanation(
        prompt_text="Comfort me,\nI failed the exam.",
        response="Come here.",
        reward=0.8312,
        route="roleplay",
        route_probabilities={"roleplay": 0.75, "chitchat": 0.25},
        capability_scores={"empathy ability": 1.0, "logic": -0.5, "readability": 0.0},
    )
    assert text == (
        "prompt    Comfort me, I failed the exam.\n"
        "response  Come here.\n"
        "route     roleplay\n"
        "reward    +0.831\n"
        "\n"
        "task\n"
        "roleplay    75.0%  ██████████████████\n"
        "chitchat    25.0%  ██████\n"
        "\n"
        "capability point\n"
        "empathy ability    +1.000  ████████████████████████\n"
        "logic              -0.500  ░░░░░░░░░░░░\n"
        "readability        +0.000"
    )


def test_explanation_aligns_wide_characters_and_needs_no_router():
    text = explanation("你好", "", -2.0, "overall", {}, {"人设和情感带入": 3.0, "logic": -1.5})
    assert "response  (empty)" in text and "task" not in text
    first, second = text.splitlines()[-2:]
    assert display_width(first.split("+")[0]) == display_width(second.split("-")[0]) == 19
    assert (first.count("█"), second.count("░")) == (24, 12)  # above 1, the largest fills the bar


def test_explanation_counts_what_it_cuts_and_lets_no_control_character_through():
    text = explanation("x" * 500 + "end", "start" + "\x1b[2J" * 500, 0.0, "roleplay", {}, {"logic": 0.0})
    assert text.startswith("prompt    (245 more characters) … xxx") and "end\n" in text
    assert "response  start [2J" in text and "more characters)" in text.split("response")[1]
    assert "\x1b" not in text
    assert max(map(display_width, text.splitlines())) <= 96


def test_a_name_cannot_break_the_table_or_steer_a_terminal():
    rows = [PreferenceRow([{"role": "user", "content": "Hi?"}], ["a", "b"], [1, 2], "maths")]
    table = consistency_table({"a|b\x1b[2J\nc": [[1.0, 0.0]]}, rows, ["maths"]).to_markdown()
    assert "| a\\|b\\u001b[2J c |" in table and "\x1b" not in table
    scores = {"nan|\x9b": 0.5}
    shown = explanation("Hi?", "a", 0.1, "ma\x1bths", {"x\x1b]0;y\x07": 1.0}, scores)
    assert all(line.isprintable() for line in shown.splitlines())
