"""Preference rows: the accepted formats, every kind of bad row with its message, duplicates, the round trip."""

import json
import re
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.data.preference_row import PreferenceRow, check_row
from dmoerm_trl.data.rows import (
    LoadReport,
    check_capability_labels,
    iter_rows,
    load_rows,
    merge_same_tokens,
    rows_from_dataset,
    write_rows,
)
from dmoerm_trl.tasks import TaskTable

TASKS = TaskTable.paper()
GOOD = {"prompt": "Who are you?", "responses": ["A pirate.", "No idea."], "ranks": [1, 2], "task": "roleplay"}


def write(path, *rows) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def load_one(tmp_path, row: dict, tasks: TaskTable = TASKS) -> PreferenceRow:
    """The same row from a JSONL file and from a dataset in memory."""
    [from_file], _ = load_rows(write(tmp_path / "rows.jsonl", row), tasks=tasks)
    [from_dataset], _ = rows_from_dataset(Dataset.from_list([row]), tasks=tasks)
    assert from_file == from_dataset
    return from_file


# --------------------------------------------------------------------------------------------------- formats


def test_our_format_with_text_and_with_turns(tmp_path):
    labels = {"logic": [2, 1], "readability": [1, 1]}
    turns = [{"role": "system", "content": "Be brief."}, *user("Hi"), *assistant("Hello."), *user("Who are you?")]
    row = {"messages": turns, "responses": ["A", "B"], "ranks": [2, 1], "task": "chitchat", "capability_ranks": labels}
    assert load_one(tmp_path, row) == PreferenceRow(turns, ["A", "B"], [2, 1], "chitchat", labels)
    assert load_one(tmp_path, {k: v for k, v in GOOD.items() if k != "task"}) == PreferenceRow(
        user("Who are you?"), GOOD["responses"], [1, 2]
    )


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", [" blue.", " green."]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is", [" blue.", " black."]),
        ({"chosen": "Why so?\nBut", "rejected": "Why so?\nBut no."}, "Why so?\n", ["But", "But no."]),
        (
            {"prompt": user("Sky?"), "chosen": assistant("Blue."), "rejected": assistant("No.")},
            "Sky?",
            ["Blue.", "No."],
        ),
        (
            {"chosen": user("Sky?") + assistant("Blue."), "rejected": user("Sky?") + assistant("No.")},
            "Sky?",
            ["Blue.", "No."],
        ),
    ],
    ids=[
        "standard",
        "standard, implicit prompt",
        "standard, one the beginning of the other",
        "conversational",
        "conversational, implicit prompt",
    ],
)
def test_trl_preference_format(tmp_path, row, prompt, responses):
    assert load_one(tmp_path, row) == PreferenceRow(user(prompt), responses, [1, 2])


def test_capability_pairs_beside_capability_ranks(tmp_path):
    three = GOOD | {"responses": ["A", "B", "C"], "ranks": [1, 2, 2]}
    labels = {
        "capability_ranks": {"logic": [2, 1, 2]},
        "capability_pairs": {"readability": [[2, 0], [1, 2], [0, 1]]},
    }
    row = load_one(tmp_path, three | labels)
    assert (row.capability_ranks, row.capability_pairs) == tuple(labels.values())
    pair = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "No.", "capability_pairs": {"logic": [[1, 0]]}}
    assert load_one(tmp_path, pair).capability_pairs == {"logic": [[1, 0]]}


def test_the_papers_published_rows(tmp_path):
    row = {
        "src": ["你好", "讲个笑话"],
        "tgt": ["你好！"],
        "response": ["甲", "乙", "丙"],
        "rank": [3, 1, 1],
        "label": "闲聊",
    }
    turns = user("你好") + assistant("你好！") + user("讲个笑话")
    assert load_one(tmp_path, row) == PreferenceRow(turns, ["甲", "乙", "丙"], [3, 1, 1], "chitchat")
    assert load_one(tmp_path, row, TaskTable.paper("zh")).task == "闲聊"
    path = write(tmp_path / "rows.jsonl", row | {"label": "翻译"}, row | {"src": ["a", "b"], "label": ""})
    [other, unlabelled], report = load_rows(path, tasks=TASKS)
    assert (other.task, unlabelled.task) == ("others", None)
    assert "1 with a label that was read as others (翻译: 1)" in str(report)
    with pytest.raises(ValueError, match="line 1: fields `src` and `tgt`.*one more in `src`"):
        load_rows(write(tmp_path / "rows.jsonl", row | {"tgt": []}), tasks=TASKS)


def test_a_response_may_answer_a_tool(tmp_path):
    turns = [*user("Weather?"), {"role": "tool", "content": "12"}]
    assert load_one(tmp_path, GOOD | {"prompt": turns}).prompt == turns


@pytest.mark.parametrize("kind", ["parquet", "json", "folder", "saved"])
def test_what_datasets_loads(tmp_path, kind):
    """In arrow a point that is absent from a row and present in another is None."""
    labelled = GOOD | {"capability_ranks": {"empathy ability": [1, 2]}, "capability_pairs": {"readability": [[1, 0]]}}
    other = GOOD | {"prompt": "Where?", "capability_ranks": {"readability": [1, 1]}, "capability_pairs": {"logic": []}}
    dataset, path = Dataset.from_list([labelled, other, GOOD | {"prompt": "When?"}]), tmp_path / "source"
    if kind == "saved":
        dataset.save_to_disk(path)
    else:
        path.mkdir()
        file = path / ("train.parquet" if kind != "json" else "train.json")
        dataset.to_parquet(file) if kind != "json" else dataset.to_json(file)
        path = path if kind == "folder" else file
    rows, report = load_rows(path, tasks=TASKS)
    assert [(row.capability_ranks, row.capability_pairs) for row in rows] == [
        ({"empathy ability": [1, 2]}, {"readability": [[1, 0]]}),
        ({"readability": [1, 1]}, {"logic": []}),
        ({}, {}),
    ]
    assert (rows[0].prompt, rows[0].responses, rows[0].ranks) == (user(GOOD["prompt"]), GOOD["responses"], [1, 2])
    assert str(report) == f"{path}: 3 rows"


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.jsonl', which does not exist: need a file ending in .jsonl"):
        load_rows(tmp_path / "missing.jsonl", tasks=TASKS)
    with pytest.raises(FileNotFoundError, match="a kind that is not read"):
        load_rows(write(tmp_path / "rows.txt", GOOD), tasks=TASKS)


def test_a_row_may_have_a_preference_at_a_capability_point_alone(tmp_path):
    tied = GOOD | {"ranks": [1, 1]}
    kept = [
        tied | {"capability_ranks": {"logic": [2, 1], "empathy ability": [1, 1]}},
        tied | {"prompt": "Where?", "capability_pairs": {"logic": [[0, 1]]}},
    ]
    nothing = tied | {"capability_ranks": {"logic": [1, 1]}, "capability_pairs": {"empathy ability": []}}
    path = write(tmp_path / "rows.jsonl", *kept)
    rows, _ = load_rows(path, tasks=TASKS)
    assert [(row.pairs_of(), row.pairs_of("logic")) for row in rows] == [([], [(1, 0)]), ([], [(0, 1)])]
    path = write(tmp_path / "bad.jsonl", *kept, nothing)
    with pytest.raises(ValueError, match="line 3: .* better and a worse response, overall or at a capability point"):
        load_rows(path, tasks=TASKS)


# -------------------------------------------------------------------------------------------------- bad rows

BAD = {  # reason -> what differs from GOOD (or the line), what the message says
    "no two distinct ranks": ({"ranks": [1, 1]}, r"field `ranks`: got \[1, 1\], need two distinct ranks because"),
    "empty response": ({"responses": ["A", " \n"]}, "field `responses`: got .* as response 2, need text because"),
    "unknown task": ({"task": "poetry"}, r"field `task`: got 'poetry', need one of \['text_creation', .*'others'\]"),
    "ranks and responses of different lengths": ({"ranks": [1, 2, 3]}, "field `ranks`: got 3 ranks for 2 responses"),
    "fewer than two responses": ({"responses": ["A"], "ranks": [1]}, "field `responses`: got .* two or more"),
    "ranks that are not integers": ({"ranks": [0.9, 0.1]}, r"field `ranks`: got \[0.9, 0.1\], need integers"),
    "empty prompt": ({"prompt": " "}, "field `prompt`: got an empty one"),
    "last turn not the user's": (
        {"prompt": user("a") + assistant("b")},
        "got a last turn of 'assistant', need one of 'user'",
    ),
    "unknown capability point": (
        {"capability_ranks": {"expressiveness": [1, 2]}},
        r"got the point 'expressiveness', which task 'roleplay' does not have, need some of .*'empathy ability'",
    ),
    "broken JSON": ('{"prompt": ', r"got broken JSON \(Expecting value.*need one JSON object"),
    "unknown format": ({"responses": None, "ranks": None}, r"got the fields \['prompt', 'task'\], need `prompt` or"),
    "missing field": ({"ranks": None}, "got no field `ranks`"),
    "bad prompt": ({"prompt": [{"role": "user"}]}, "field `prompt`: got the turn {'role': 'user'}, need `role` and"),
}
MORE_BAD = [
    ("unknown format", "[1, 2]", "need an object with"),
    ("empty response", {"responses": ["A", "\u200b\ufeff \u2060\u3164"]}, "got '.u200b.*as response 2, need text"),
    ("empty prompt", {"prompt": "\u200d\n"}, "field `prompt`: got an empty one"),
    ("ranks that are not integers", {"ranks": [1, 2**53]}, r"field `ranks`: .*need integers below 2\*\*53"),
    (
        "ranks that are not integers",
        '{"prompt": "a", "responses": ["b", "c"], "ranks": [1, NaN]}',
        "field `ranks`: got",
    ),
    ("ranks that are not integers", {"ranks": [1.0, 2.0]}, "need integers"),
    ("half a character", {"task": "\ud83d"}, "field `task`: got"),
    (
        "content that is not text",
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "of type 'image', need",
    ),
    ("broken JSON", '{"prompt": NaN', "broken JSON"),
    ("ranks that are not integers", {"ranks": [True, 2]}, "need integers"),
    ("ranks that are not integers", {"ranks": ["1", "2"]}, "need integers"),
    ("ranks and responses of different lengths", {"ranks": 1}, "field `ranks`: got 1 for 2 responses"),
    ("fewer than two responses", {"responses": "text"}, "got 'text', need a list"),
    ("bad task", {"task": ["chitchat"]}, r"field `task`: got \['chitchat'\], need a name as text"),
    (
        "half a character",
        {"responses": ["A", "B \ud83d."]},
        r"field `responses`: got '\\ud83d' at place 2 of a text, half of a surrogate pair, need whole characters",
    ),
    ("half a character", {"prompt": user("\ude00")}, "field `prompt`: got .* need whole characters"),
    ("empty prompt", {"prompt": []}, "field `prompt`: got an empty one"),
    ("bad prompt", {"messages": user("a")}, "exactly one of `prompt` and `messages`"),
    ("bad prompt", {"prompt": 3}, "field `prompt`: got 3, need text or a list of turns"),
    (
        "ranks and responses of different lengths",
        {"capability_ranks": {"content richness": [1]}},
        "field `capability_ranks.content richness`: got 1 ranks for 2 responses",
    ),
    ("ranks that are not integers", {"capability_ranks": {"logic": [0.5, 1]}}, "field `capability_ranks.logic`"),
    ("bad capability_ranks", {"capability_ranks": [1, 2]}, "need point -> ranks"),
    ("unknown capability point", {"task": "others", "capability_ranks": {"empathy ability": [1, 2]}}, "does not have"),
    (
        "unknown capability point",
        {"capability_pairs": {"expressiveness": [[0, 1]]}},
        "field `capability_pairs`: got the point 'expressiveness', which task 'roleplay' does not have",
    ),
    ("bad capability_pairs", {"capability_pairs": [[0, 1]]}, "field `capability_pairs`.*need point -> pairs"),
    (
        "capability point with ranks and pairs",
        {"capability_ranks": {"logic": [1, 2]}, "capability_pairs": {"logic": [[0, 1]]}},
        "`capability_ranks` and `capability_pairs`: got the point 'logic' in both",
    ),
    (
        "pairs that are not of two responses",
        {"capability_pairs": {"logic": [[0, 2]]}},
        r"field `capability_pairs.logic`: got the pair \[0, 2\] for 2 responses, need two different indices from 0 to 1",
    ),
    ("pairs that are not of two responses", {"capability_pairs": {"logic": [[-1, 0]]}}, "indices from 0 to 1"),
    ("pairs that are not of two responses", {"capability_pairs": {"logic": [[1, 1]]}}, "two different indices"),
    (
        "pairs given twice or both ways round",
        {"capability_pairs": {"logic": [[0, 1], [0, 1]]}},
        r"field `capability_pairs.logic`: got the pair \[0, 1\] twice, need at most one",
    ),
    (
        "pairs given twice or both ways round",
        {"capability_pairs": {"logic": [[0, 1], [1, 0]]}},
        r"got the pair \[1, 0\] and \[0, 1\], need at most one",
    ),
    *(
        (
            "pairs that are not two integers",
            {"capability_pairs": {"logic": pairs}},
            r"write each pair as \[better, worse\]",
        )
        for pairs in (7, [0, 1], [[0, 1, 1]], [[0]], [[0, 1.0]], [["0", "1"]], [[False, True]], {"0": 1})
    ),
]


@pytest.mark.parametrize(("reason", "change", "message"), [(reason, *case) for reason, case in BAD.items()] + MORE_BAD)
def test_a_bad_row_is_an_error_or_skipped_on_request(tmp_path, reason, change, message):
    bad = change if isinstance(change, str) else GOOD | change
    path = write(tmp_path / "rows.jsonl", GOOD, "", bad)
    with pytest.raises(ValueError, match=message) as error:
        load_rows(path, tasks=TASKS)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "on_error='skip'" in str(error.value)

    rows, report = load_rows(path, tasks=TASKS, on_error="skip")
    assert len(rows) == report.rows == 1
    assert report.skipped == {reason: 1}
    assert f"1 rows; 1 skipped ({reason}: 1)" in str(report)


def test_a_bad_row_of_a_dataset_is_named_by_its_number():
    dataset = Dataset.from_list([GOOD, GOOD | {"ranks": [2, 2]}])
    with pytest.raises(ValueError, match="^train set, row 2: field `ranks`"):
        rows_from_dataset(dataset, tasks=TASKS, name="train set")
    with pytest.raises(ValueError, match="got on_error='ignore'"):
        rows_from_dataset(dataset, tasks=TASKS, on_error="ignore")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "as response 1, need text because an empty response"),
        ({"chosen": "same", "rejected": assistant("b")}, "both as text or both as turns"),
        ({"chosen": "one", "rejected": "two"}, "no beginning in common with `rejected`.*add `prompt`"),
        (
            {"chosen": user("a"), "rejected": user("a") + assistant("b")},
            r"field `chosen`: got turns of \[\] after the",
        ),
        (
            {"prompt": user("a"), "chosen": assistant("b") + user("c") + assistant("d"), "rejected": assistant("e")},
            r"field `chosen`: got turns of \['assistant', 'user', 'assistant'\] after the prompt, need one turn",
        ),
    ],
)
def test_bad_rows_in_trl_format(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "rows.jsonl", row), tasks=TASKS)


def test_fields_that_are_not_read_are_said(tmp_path):
    row = GOOD | {"capability_rank": {}, "prompt": [{"role": "user", "content": "Hi", "name": "Ann", "weight": None}]}
    _, report = load_rows(write(tmp_path / "rows.jsonl", row), tasks=TASKS)
    assert report.ignored_fields == {"capability_rank": 1, "prompt.name": 1}
    assert "2 fields not read" in str(report) and "capability_rank: 1" in str(report)
    _, report = load_rows(write(tmp_path / "rows.jsonl", GOOD | {"chosen": ["a", {"role": "user"}]}), tasks=TASKS)
    assert report.ignored_fields == {"chosen": 1}


# ---------------------------------------------------------------------------------------- duplicates, files


def test_duplicates_are_removed_and_counted(tmp_path):
    turned = GOOD | {"prompt": "  who ARE\nyou?", "responses": GOOD["responses"][::-1], "ranks": [2, 1]}
    contradiction = GOOD | {"ranks": [2, 1]}
    other = GOOD | {"responses": ["A pirate.", "A king."]}
    rows, report = load_rows(write(tmp_path / "rows.jsonl", GOOD, GOOD, turned, contradiction, other), tasks=TASKS)
    assert [row.responses for row in rows] == [GOOD["responses"], other["responses"]]
    assert rows[0].ranks == [1, 2]
    assert (report.duplicates, report.contradictions) == (3, 1)
    assert "2 rows; 3 duplicates removed (1 of them with other labels)" in str(report)


def test_duplicates_contradict_when_they_mean_other_labels_not_when_they_write_them_otherwise(tmp_path):
    three = {"prompt": "Who are you?", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}
    first = three | {"capability_ranks": {"logic": [1, 2, 2]}}
    same = [
        three | {"capability_pairs": {"logic": [[0, 2], [0, 1]]}},
        {
            "prompt": "Who are you?",
            "responses": ["c", "a", "b"],
            "ranks": [9, 4, 5],
            "capability_pairs": {"logic": [[1, 0], [1, 2]]},
        },
    ]
    _, report = load_rows(write(tmp_path / "rows.jsonl", first, *same), tasks=TASKS)
    assert (report.rows, report.duplicates, report.contradictions) == (1, 2, 0)
    other = [
        three | {"capability_pairs": {"logic": [[0, 1]]}},
        three | {"capability_pairs": {"logic": [[0, 1], [2, 0]]}},
        three | {"capability_ranks": {"readability": [1, 2, 2]}},
        three,
    ]
    _, report = load_rows(write(tmp_path / "rows.jsonl", first, *other), tasks=TASKS)
    assert (report.rows, report.duplicates, report.contradictions) == (1, 4, 4)


def test_responses_with_the_same_text_are_no_pair_and_are_counted(tmp_path):
    same = GOOD | {"responses": ["A", "A"]}
    three = GOOD | {"responses": ["A", "B", "A"], "ranks": [1, 2, 3], "capability_ranks": {"logic": [2, 1, 1]}}
    paired = GOOD | {"responses": ["C", "C"], "ranks": [1, 1], "capability_pairs": {"logic": [[0, 1]]}}
    trl = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Blue."}
    path = write(tmp_path / "rows.jsonl", same, three, paired, trl, same)
    rows, report = load_rows(path, tasks=TASKS)
    assert [row.pairs_of() for row in rows] == [[], [(0, 1), (1, 2)], [], []]
    assert [row.pairs_of("logic") for row in rows] == [[], [(1, 0)], [], []]
    assert [row.identical_pairs for row in rows] == [[(0, 1)], [(0, 2)], [(0, 1)], [(0, 1)]]
    assert (report.identical_pairs, report.duplicates, report.skipped) == (4, 1, {})
    assert "4 pairs of responses with the same text and different labels" in str(report)
    counted = LoadReport("rows")
    assert (
        len(list(iter_rows(path, tasks=TASKS, report=counted))) == counted.rows == 5 and counted.identical_pairs == 5
    )
    with pytest.raises(ValueError, match="no labels for the capability points of task 'roleplay': 'logic'"):
        check_capability_labels([rows[2]], TaskTable({"roleplay": ("logic",)}, ("logic",)))


def test_responses_that_are_the_same_tokens_get_one_text():
    labels = {"logic": [1, 2, 3]}
    rows = [
        PreferenceRow(user("a"), ["x", "x ", "y"], [1, 2, 3], None, labels),
        PreferenceRow(user("a"), ["x", "y"], [2, 1]),
    ]
    encodings = [[SimpleNamespace(input_ids=[len(text.strip())]) for text in row.responses] for row in rows]
    encodings[0][2].input_ids = [7]
    encodings[1][1].input_ids = [9]
    (merged, other), pairs = merge_same_tokens(rows, encodings)
    assert merged.responses == ["x", "x", "y"] and pairs == 1 and other is rows[1]
    assert merged.pairs_of() == merged.pairs_of("logic") == [(0, 2), (1, 2)]


text = st.text(alphabet='aé你😀 \n\u2028"\\', max_size=12).map(lambda t: t + ".")


@st.composite
def preference_rows(draw) -> PreferenceRow:
    count = draw(st.integers(2, 4))
    ranks = st.lists(st.integers(1, 4), min_size=count, max_size=count)
    distinct = st.permutations([1, 2, *draw(ranks)[2:]])
    task = draw(st.sampled_from([None, "others", *TASKS.tasks]))
    points = st.sampled_from([*TASKS.tasks.get(task, ()), *TASKS.overall])
    labels = draw(st.dictionaries(points, ranks))
    pairs = st.lists(st.sampled_from([*combinations(range(count), 2)]), unique=True)
    either_way = pairs.flatmap(lambda pairs: st.tuples(*(st.permutations(pair) for pair in pairs)).map(list))
    return PreferenceRow(
        prompt=[{"role": "system", "content": draw(text)}, *user(draw(text))],
        responses=draw(st.lists(text, min_size=count, max_size=count)),
        ranks=draw(distinct),
        task=task,
        capability_ranks=labels,
        capability_pairs=draw(st.dictionaries(points.filter(lambda point: point not in labels), either_way)),
    )


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(preference_rows(), max_size=4, unique_by=lambda row: row.prompt_id))
def test_written_rows_are_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(rows, path)
    assert load_rows(path, tasks=TASKS)[0] == rows
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_the_prompt_id_is_stable():
    row = PreferenceRow(user("Who are you?"), ["a", "b"], [1, 2])
    assert row.prompt_id == PreferenceRow(user(" WHO are\n\nyou? "), ["c", "d"], [2, 1]).prompt_id
    assert row.prompt_id != PreferenceRow(user("Who is he?"), ["a", "b"], [1, 2]).prompt_id
    assert row.prompt_id != PreferenceRow(assistant("x") + user("Who are you?"), ["a", "b"], [1, 2]).prompt_id
    assert re.fullmatch("[0-9a-f]{16}", row.prompt_id)


# ----------------------------------------------------------------------------------------- capability labels


def test_the_pairs_of_a_row():
    row = PreferenceRow(
        user("a"),
        ["b", "c", "d"],
        [2, 1, 2],
        capability_ranks={"wit": [3, 7, 3], "rhyme": [1, 1, 1]},
        capability_pairs={"logic": [[2, 0], [1, 2], [0, 1]], "brevity": []},  # logic: a cycle
    )
    assert row.pairs_of() == row.pairs_of(None) == [(1, 0), (1, 2)]
    assert row.pairs_of("wit") == [(0, 1), (2, 1)]
    assert row.pairs_of("logic") == [(0, 1), (1, 2), (2, 0)]
    assert row.pairs_of("rhyme") == row.pairs_of("brevity") == row.pairs_of("grammar") == []
    assert set(row.labelled_points) == {"wit", "rhyme", "logic", "brevity"}


@given(ranks=st.lists(st.integers(-3, 3), min_size=2, max_size=6), data=st.data())
def test_ranks_and_the_pairs_that_they_imply_are_the_same_labels(ranks, data):
    texts = [str(number) for number in range(len(ranks))]
    implied = [[i, j] for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    ranked = PreferenceRow(user("a"), texts, [1, *[2] * (len(ranks) - 1)], "chitchat", {"logic": ranks})
    paired = replace(ranked, capability_ranks={}, capability_pairs={"logic": data.draw(st.permutations(implied))})
    check_row(paired, TASKS)
    assert paired.pairs_of("logic") == ranked.pairs_of("logic") == [tuple(pair) for pair in implied]


def test_every_capability_point_needs_labels():
    table = TaskTable({"poetry": ("rhyme", "wit"), "prose": ("wit",)}, overall=("wit",))

    def row(task: str, **labels) -> PreferenceRow:
        return PreferenceRow(user("a"), ["b", "c"], [1, 2], task, labels)

    check_capability_labels([row("poetry", rhyme=[1, 2], wit=[2, 1]), row("prose", wit=[1, 2])], table)
    paired = PreferenceRow(user("a"), ["b", "c"], [1, 2], "poetry", capability_pairs={"rhyme": [[1, 0]]})
    check_capability_labels([paired, row("poetry", wit=[2, 1]), row("prose", wit=[1, 2])], table)
    tied = [row("poetry", rhyme=[1, 1], wit=[2, 1]), replace(paired, capability_pairs={"rhyme": []})]
    with pytest.raises(ValueError, match=r"task 'poetry': 'rhyme'; task 'prose': 'wit'\. Need `capability_ranks`"):
        check_capability_labels(tied, table)
    with pytest.raises(ValueError, match="task 'overall': 'wit'"):
        check_capability_labels([], table)
    only_poetry = TaskTable({"poetry": ("rhyme",)}, overall=("wit",))
    check_capability_labels([row("poetry", rhyme=[1, 2])], only_poetry, overall=False)
