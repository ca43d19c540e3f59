"""Each set from a file of its shape, with invented content; what makes no row is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.data.preference_row import PreferenceRow, RowError
from dmoerm_trl.data.prepare import scored
from dmoerm_trl.data.prepare.audit import PartAudit
from dmoerm_trl.data.prepare.pairwise import hh
from dmoerm_trl.data.prepare.preparation import Preparation
from dmoerm_trl.data.prepare.prompts import helpsteer2_prompt, transcript
from dmoerm_trl.data.prepare.reading import open_set
from dmoerm_trl.data.prepare.sets import SETS
from dmoerm_trl.data.rows import LoadReport
from dmoerm_trl.tasks import TaskTable


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --------------------------------------------------------------------------------------------------- pairs


def test_hh(prepare):
    start = "\n\nHuman: Where is the sea?\n\nAssistant: In the west.\n\nHuman: Is it cold?"
    good = {"chosen": f"{start}\n\nAssistant: In winter, yes.", "rejected": f"{start}\n\nAssistant: No idea.\nSorry."}
    parted = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    unanswered = {"chosen": f"{start}\n\nAssistant:", "rejected": f"{start}\n\nAssistant: No."}
    ended_by_user = {"chosen": start, "rejected": start}
    plain = {"chosen": "The sea is cold.", "rejected": "The sea is warm."}
    rows, audit = prepare("hh", [good, parted, unanswered, ended_by_user, plain])
    prompt = [user("Where is the sea?"), assistant("In the west."), user("Is it cold?")]
    assert rows == [PreferenceRow(prompt, ["In winter, yes.", "No idea.\nSorry."], [1, 2])]
    assert audit.skipped == {
        "transcripts that differ before the last answer": 2,
        "empty response": 1,
        "no transcript": 1,
    }


words = (
    st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and "Human:" not in text and "Assistant:" not in text)
)


@given(st.lists(st.tuples(words, words), max_size=3), words, words, words)
def test_hh_transcripts_of_any_text(before, question, good, bad):
    start = "".join(f"\n\nHuman: {asked}\n\nAssistant: {answer}" for asked, answer in before)
    row = hh(
        {
            side: f"{start}\n\nHuman: {question}\n\nAssistant: {answer}"
            for side, answer in (("chosen", good), ("rejected", bad))
        }
    )
    turns = [turn for asked, answer in before for turn in (user(asked), assistant(answer))]
    assert row == PreferenceRow([*turns, user(question)], [good, bad], [1, 2])


def test_turns_of_one_speaker_in_a_row_are_one_turn():
    assert transcript("\n\nHuman: a\n\nHuman: b\n\nAssistant: c") == [user("a\n\nb"), assistant("c")]
    with pytest.raises(RowError, match="begins with 'Human:'"):
        transcript("Preface\n\nHuman: a")


SHP = {
    "history": "How do I boil an egg?",
    "human_ref_A": "In water.",
    "human_ref_B": "Ask a cook.",
    "domain": "askcooks_train",
}


@pytest.mark.parametrize(
    ("scores", "label", "options", "ranks"),
    [
        ((30, 10), 1, {}, [1, 2]),
        ((10, 30), 0, {}, [2, 1]),
        ((30, 10), 1, {"min_score_ratio": 3.0}, [1, 2]),
        ((30, 10), 1, {"min_score_ratio": 3.5}, "score ratio below the least"),
        ((30, 10), 1, {"tie_margin": 20}, "no two distinct ranks"),
        ((30, 10), 0, {}, "label against the scores"),
        ((30, 10), 2, {}, "label against the scores"),
    ],
)
def test_shp(prepare, scores, label, options, ranks):
    fields = {"score_A": scores[0], "score_B": scores[1], "labels": label, "score_ratio": max(scores) / min(scores)}
    other = SHP | {"history": "Tea?", "score_A": 90, "score_B": 1, "labels": 1, "score_ratio": 90.0}
    rows, audit = prepare("shp", [SHP | fields, other], options, task_column="domain")
    assert all(row.task == "askcooks" for row in rows)  # without the split
    if isinstance(ranks, str):
        assert (len(rows), audit.skipped) == (1, {ranks: 1})
    else:
        assert rows[0].prompt == [user("How do I boil an egg?")]
        assert (rows[0].responses, rows[0].ranks) == (["In water.", "Ask a cook."], ranks)


def helpsteer3(preference: int, *scores: int | None, **fields) -> dict:
    individual = [{"score": score, "reasoning": "So.", "feedback1": "", "feedback2": ""} for score in scores]
    return {
        "domain": "stem",
        "language": "english",
        "context": [user("Hi"), assistant("Hello."), user("Why is the sky blue?")],
        "response1": "Light scatters.",
        "response2": "It is paint.",
        "overall_preference": preference,
        "individual_preference": individual,
    } | fields


def test_helpsteer3(prepare):
    examples = [helpsteer3(-2, -1, -3), helpsteer3(1, 1, -1, domain="code"), helpsteer3(0, 0)]
    rows, audit = prepare("helpsteer3", examples, task_column="domain", task_names={"stem": "objective_qa"})
    assert [(row.ranks, row.task) for row in rows] == [([1, 2], "objective_qa"), ([2, 1], "code")]
    assert rows[0].prompt == helpsteer3(0)["context"]
    assert rows[0].responses == ["Light scatters.", "It is paint."]
    assert audit.skipped == {"no two distinct ranks": 1}


def test_helpsteer3_of_one_mind_and_by_a_margin(prepare):
    examples = [helpsteer3(-2, -1, -3), helpsteer3(1, 1, -1), helpsteer3(2, 2, 0), helpsteer3(2), helpsteer3(3, None)]
    rows, audit = prepare("helpsteer3", examples, {"annotators_agree": True})
    assert (len(rows), audit.skipped) == (1, {"annotators who disagree": 4})
    rows, audit = prepare("helpsteer3", examples, {"tie_margin": 1})
    assert (len(rows), audit.skipped) == (4, {"no two distinct ranks": 1})


def test_helpsteer2_preferences(prepare):
    base = {"prompt": "c", "response_1": "A", "response_2": "B", "split": "train"}
    examples = [base | {"preference_strength": -1}, base | {"preference_strength": 3, "split": "val"}]
    rows, _ = prepare("helpsteer2-preference", examples)
    assert [row.ranks for row in rows] == [[1, 2], [2, 1]]
    rows, audit = prepare("helpsteer2-preference", examples, where={"split": "train"})
    assert ([row.ranks for row in rows], audit.skipped) == ([[1, 2]], {"left out by `where`": 1})
    rows, _ = prepare("helpsteer2-preference", examples, where={"split": ["train", "val"]})
    assert len(rows) == 2


def test_pairs_under_other_names(prepare):
    base = {"instruction": [user("Hi")], "prompt": "not this", "a": "Hello.", "b": "Go."}
    examples = [base | {"better": better} for better in (1, 2, 0, 3)]
    columns = {"prompt": "instruction", "response_1": "a", "response_2": "b", "preferred": "better"}
    rows, audit = prepare("pairs", examples, columns=columns)
    assert rows == [PreferenceRow([user("Hi")], ["Hello.", "Go."], ranks) for ranks in ([1, 2], [2, 1])]
    assert audit.skipped == {"no two distinct ranks": 1, "unknown preference": 1}


# ------------------------------------------------------------------------------------------------- scores


def ultrafeedback(*completions: tuple[str, float, dict[str, str]]) -> dict:
    return {
        "source": "invented",
        "instruction": "Name a fish.",
        "models": ["m"] * len(completions),
        "completions": [
            {
                "model": "m",
                "principle": "helpfulness",
                "custom_system_prompt": "Help.",
                "response": response,
                "overall_score": score,
                "fine-grained_score": 1.0,
                "annotations": {
                    aspect: {"Rating": ratings.get(aspect, "N/A"), "Rationale": "So."}
                    for aspect in ("instruction_following", "helpfulness", "honesty", "truthfulness")
                },
            }
            for response, score, ratings in completions
        ],
    }


def test_ultrafeedback(prepare):
    aspects = {"instruction_following": "4", "helpfulness": "5"}
    example = ultrafeedback(
        ("Cod.", 8.5, aspects | {"honesty": "3"}),
        ("A whale.", 2.0, aspects | {"instruction_following": "1"}),
        ("Trout.", 8.5, aspects | {"honesty": "5"}),
        ("Tuna!", 7.0, aspects),
    )
    [row], _ = prepare("ultrafeedback", [example])
    assert row == PreferenceRow(
        [user("Name a fish.")],
        ["Cod.", "A whale.", "Trout.", "Tuna!"],
        [1, 3, 1, 2],
        "general",
        {"instruction_following": [1, 2, 1, 1], "helpfulness": [1, 1, 1, 1]},
        {"honesty": [[2, 0]]},  # two of four are rated; of truthfulness none is
    )
    [row], _ = prepare("ultrafeedback", [example], {"tie_margin": 2})
    assert (row.ranks, row.capability_pairs) == ([1, 2, 1, 1], {})
    _, audit = prepare("ultrafeedback", [example, ultrafeedback(("One.", 1.0, {})), ultrafeedback()])
    assert audit.skipped == {"fewer than two responses": 2}


def helpsteer2(prompt: str, response: str, *ratings: int) -> dict:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response} | dict(zip(names, ratings, strict=True))


def test_helpsteer2(prepare):
    prompt = "Hi\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nName a tree."
    examples = [
        *(helpsteer2(prompt, "Oak.", 4, 4, 3, 1, 0), helpsteer2(prompt, "Moss.", 1, 0, 3, 1, 1)),
        *(helpsteer2("Tie?", "A", 2, 1, 3, 1, 0), helpsteer2("Tie?", "B", 2, 0, 3, 1, 0)),
        *(helpsteer2("All tied?", "A", 2, 1, 3, 1, 0), helpsteer2("All tied?", "B", 2, 1, 3, 1, 1)),
        helpsteer2("Alone?", "Yes.", 4, 4, 4, 1, 1),
    ]
    points = {"verbosity": None, "correctness": "truth"}
    [row, tied], audit = prepare("helpsteer2", examples, points=points, task="advice")
    assert row.prompt == [user("Hi"), assistant("Hello."), user("Name a tree.")]
    assert (row.responses, row.ranks, row.task) == (["Oak.", "Moss."], [1, 2], "advice")
    assert row.capability_ranks == {"helpfulness": [1, 2], "truth": [1, 2], "coherence": [1, 1], "complexity": [1, 1]}
    assert (tied.ranks, tied.capability_ranks["truth"]) == ([1, 1], [1, 2])  # a row for the experts alone
    assert audit.skipped == {"no two distinct ranks": 1, "fewer than two responses": 1}  # verbosity is left out


def test_a_helpsteer2_prompt_of_one_turn():
    assert helpsteer2_prompt("What is\n\n<b>?") == [user("What is\n\n<b>?")]


def test_responses_with_scores(prepare):
    example = {"prompt": "Hi", "responses": ["A", "B", "C"], "scores": [0.1, 0.9, 0.5], "wit": [1, None, 2]}
    rows, audit = prepare("scored", [example, example | {"scores": [1.0]}], {"aspects": ["wit"]})
    assert rows == [
        PreferenceRow([user("Hi")], ["A", "B", "C"], [3, 1, 2], "general", capability_pairs={"wit": [[2, 0]]})
    ]
    assert audit.skipped == {"scores and responses of different lengths": 1}
    [row], _ = prepare("scored", [example | {"wit": None}], {"aspects": ["wit"]})
    assert (row.ranks, row.labelled_points) == ([3, 1, 2], [])
    [row], _ = prepare("scored", [example], {"tie_margin": 0.4})
    assert (row.ranks, row.task, row.labelled_points) == ([2, 1, 1], None, [])


def test_a_table_of_responses(prepare):
    """The responses to a prompt need not follow each other; without `prompt_id` the prompt itself tells them apart."""
    lines = [(1, "Hi", "A", 0.5), (2, "Hm", "B", 0.0), (1, "Hi", "C", 0.75), (3, "Hi", "D", 1.0), (2, "Hm", "E", 2.0)]
    examples = [
        {
            "prompt_id": number,
            "instruction": prompt,
            "prompt": "not this",
            "response": response,
            "gold": gold,
            "wit": gold if gold else None,
        }
        for number, prompt, response, gold in lines
    ]
    columns = {"prompt": "instruction", "score": "gold"}
    rows, audit = prepare("table", examples, {"aspects": ["wit"]}, columns=columns)
    assert rows == [
        PreferenceRow([user("Hi")], ["A", "C"], [2, 1], "general", {"wit": [2, 1]}),
        PreferenceRow([user("Hm")], ["B", "E"], [2, 1], "general"),  # of B the wit is not rated
    ]
    assert audit.skipped == {"fewer than two responses": 1}
    for example in examples:
        del example["prompt_id"]
    rows, _ = prepare("table", examples, columns=columns)
    assert [(row.responses, row.ranks) for row in rows] == [(["A", "C", "D"], [3, 2, 1]), (["B", "E"], [2, 1])]


def test_where_takes_single_responses_out_of_a_prompts(prepare):
    lines = [
        ("Hi", "A", "x"),
        ("Hi", "B", "a"),
        ("Hi", "C", "b"),
        ("Hm", "D", "x"),
        ("Ho", "E", "a"),
        ("Ho", "F", "x"),
    ]
    examples = [
        {"prompt": prompt, "response": response, "score": score, "generator": generator}
        for score, (prompt, response, generator) in enumerate(lines)
    ]
    rows, audit = prepare("table", examples, where={"generator": ["a", "b"]})
    assert rows == [PreferenceRow([user("Hi")], ["B", "C"], [2, 1])]
    assert audit.skipped == {"left out by `where`": 3, "fewer than two responses": 1}


def test_one_id_of_several_prompts(prepare):
    lines = [{"prompt_id": "x", "prompt": f"Hi {i // 2}", "response": str(i), "score": i} for i in range(4)]
    with pytest.raises(ValueError, match="'several prompts of one id': 1"):
        prepare("table", lines)


# -------------------------------------------------------------------------------------- accepted formats


def test_formats_that_training_accepts(prepare):
    implicit = {
        "chosen": [user("Sky?"), assistant("Blue.")],
        "rejected": [user("Sky?"), assistant("No.")],
        "score_chosen": 8.0,
    }
    rows, _ = prepare("trl", [implicit])
    assert rows == [PreferenceRow([user("Sky?")], ["Blue.", "No."], [1, 2])]
    explicit = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "No.", "task": "poetry"}
    rows, audit = prepare("trl", [explicit, explicit | {"task": None}, explicit | {"task": None, "chosen": None}])
    assert (len(rows), audit.skipped) == (1, {"unknown task": 1, "no `chosen`": 1})
    published = {"src": ["你好"], "tgt": [], "response": ["甲", "乙"], "rank": [2, 1], "label": "闲聊"}
    assert prepare("dmoerm", [published])[0] == [PreferenceRow([user("你好")], ["甲", "乙"], [2, 1], "chitchat")]
    own = {"prompt": "Hi", "responses": ["A", "B"], "ranks": [1, 2], "capability_ranks": {"wit": [2, 1]}}
    table = TaskTable({"talk": ("wit",)}, ("wit",))
    rows, _ = prepare("rows", [own], {"tasks": table}, tasks=table, task="talk")
    assert rows == [PreferenceRow([user("Hi")], ["A", "B"], [1, 2], "talk", {"wit": [2, 1]})]
    tied = own | {"ranks": [1, 1]}
    [row], audit = prepare("rows", [tied, tied | {"capability_ranks": {"wit": [2]}}], {"tasks": table}, task="talk")
    assert (row.ranks, row.capability_ranks) == ([1, 1], {"wit": [2, 1]})
    assert audit.skipped == {"ranks and responses of different lengths": 1}


# ------------------------------------------------------------------------------------------ settings, errors


@pytest.mark.parametrize("name", SETS)
def test_missing_columns_are_an_error_that_names_them(prepare, name):
    with pytest.raises(
        ValueError, match=r"set: got the columns \['text'\], need \[.*missing are \[.*say with `columns`"
    ):
        prepare(name, [{"text": "Hi"}])


def test_a_missing_column_of_the_settings(prepare):
    example = {"prompt": "Hi", "response_1": "A", "response_2": "B", "preferred": 1}
    for settings in ({"task_column": "kind"}, {"where": {"kind": 1}}, {"columns": {"prompt": "kind"}}):
        with pytest.raises(ValueError, match="missing are"):
            prepare("pairs", [example], **settings)


def test_rows_must_fit_a_table_that_is_given(prepare):
    examples = [helpsteer2("Hi", "A", 4, 4, 4, 4, 4), helpsteer2("Hi", "B", 0, 0, 0, 0, 0)]
    paper = TaskTable.paper()
    with pytest.raises(ValueError, match="got no row that can be used.*'unknown capability point': 1"):
        prepare("helpsteer2", examples, tasks=paper)
    points = dict.fromkeys(("complexity", "verbosity", "helpfulness")) | {"coherence": "logic"}
    [row], _ = prepare("helpsteer2", examples, tasks=paper, points=points, task="objective_qa")
    assert (row.task, row.capability_ranks) == ("objective_qa", {"correctness": [1, 2], "logic": [1, 2]})


def test_settings_that_the_set_does_not_have(prepare):
    with pytest.raises(ValueError, match="got `tie_margin`, which this set does not have"):
        prepare("hh", [], {"tie_margin": 1})
    with pytest.raises(ValueError, match="`points`: got 'wit', which the set does not have, need some of .*'honesty'"):
        prepare("ultrafeedback", [], points={"wit": "logic"})
    with pytest.raises(ValueError, match="all distinct"):
        prepare("ultrafeedback", [], points={"honesty": "helpfulness"})


# ------------------------------------------------------------------------------------------- what is in files


def test_numbers_of_csv_are_numbers_where_numbers_are_wanted(tmp_path):
    path = tmp_path / "source.csv"
    path.write_text(
        "prompt,response_1,response_2,preferred,year\nHi?,007,NA,2,2020\nHm?,a,b,0,2020\nHo?,a,b,two,2020\nHa?,a,b,1,1999\n"
    )
    audit = PartAudit()
    rows = list(Preparation(SETS["pairs"], where={"year": 2020}).rows(open_set(str(path)), audit))
    assert [(row.responses, row.ranks) for row in rows] == [(["007", "NA"], [2, 1])]
    assert audit.skipped == {"no two distinct ranks": 1, "unknown preference": 1, "left out by `where`": 1}

    path.write_text("prompt,response,score,wit\nHi?,a,1.5,NA\nHo?,x,1,1\nHi?,b,2,3\nHi?,c,nan,inf\nHi?,d,1,4\n")
    preference_set = SETS["table"].with_options({"aspects": ["wit"]})
    rows = list(Preparation(preference_set, where={"score": ["1.5", 2, 1]}).rows(open_set(str(path)), PartAudit()))
    assert [(row.responses, row.ranks, row.capability_pairs) for row in rows] == [
        (["a", "b", "d"], [2, 1, 3], {"wit": [[2, 1]]})
    ]


def test_a_line_that_cannot_be_read_is_counted_and_the_first_of_each_reason_is_named(write, tmp_path):
    path = write([SHP | {"score_A": 3, "score_B": 1, "labels": 1, "score_ratio": 3.0}])
    with open(path, "ab") as file:
        file.write(b'{"history": \n[1]\n{"history": "\xff"}\n[2]\n')
    audit = PartAudit()
    assert len(list(Preparation(SETS["shp"]).rows(open_set(path), audit))) == 1
    assert audit.skipped == {"broken JSON": 1, "unknown format": 2, "not UTF-8": 1}
    assert audit.examples["broken JSON"].startswith(f"{path}, line 2: got broken JSON")
    assert audit.examples["unknown format"].startswith(f"{path}, line 3: got [1], need an object")


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("hh", {"chosen": 3, "rejected": 3}),
        ("ultrafeedback", {"instruction": "Hi?", "completions": "text"}),
        ("ultrafeedback", {"instruction": "Hi?", "completions": ["text"]}),
        ("ultrafeedback", {"instruction": "Hi?", "completions": [{"annotations": {"honesty": "good"}}]}),
        ("helpsteer2", dict.fromkeys(("prompt", "response", *scored.HELPSTEER2_ATTRIBUTES), 3)),
        ("scored", {"prompt": "Hi?", "responses": "text", "scores": [1]}),
        ("scored", {"prompt": "Hi?", "responses": ["a", "b"], "scores": 2}),
    ],
)
def test_a_field_of_another_kind_is_counted(prepare, name, example):
    with pytest.raises(ValueError, match="'field of another kind': 1.*line 1: field `.*`: got "):
        prepare(name, [example])


def test_a_set_of_trls_counts_how_prompts_were_found(write):
    report = LoadReport("set")
    preference_set = SETS["trl"].with_options({"report": report})
    whole = {"prompt": "Hi?", **{side: [user("Hi?"), assistant(side)] for side in ("chosen", "rejected")}}
    examples = [
        {"chosen": "天空？蓝", "rejected": "天空？绿"},
        whole,
        {"chosen": "a", "rejected": "a", "prompt": "Same?"},
    ]
    audit = PartAudit()
    rows = list(Preparation(preference_set).rows(open_set(write(examples)), audit))
    assert [row.prompt[-1]["content"] for row in rows] == ["天空？", "Hi?", "Same?"]
    assert report.prompts_found == {"characters in common": 1} and audit.identical_pairs == 1
    assert audit.to_dict()["pairs of identical responses"] == 1


def test_a_task_that_no_table_can_have_is_counted(prepare):
    examples = [pair_of_task("talk"), pair_of_task("t" * 300), pair_of_task("!")]
    rows, audit = prepare("pairs", examples, task_column="kind")
    assert [row.task for row in rows] == ["talk"] and audit.skipped == {"bad task": 2}


def pair_of_task(task: str) -> dict:
    return {"prompt": "Hi?", "response_1": "a", "response_2": "b", "preferred": 1, "kind": task}
