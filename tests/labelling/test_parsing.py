"""What of a judge's answers can be read, and that nothing else is."""

import json
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dmoerm_trl.labelling.parsing import read_choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("1", 1),
        (" 2\n", 2),
        ("１", 1),
        ("２。", 2),
        ("【1】", 1),
        ("【２】。", 2),
        ("1.", 1),
        ("**2**", 2),
        ("Answer: 1", 1),
        ("ANSWER:2.", 2),
        ("**Answer:** 1", 1),
        ("答案：２", 2),
        ("答案: 【1】", 1),
        ("The first is vague. The second is exact.\n\nAnswer: 2\n", 2),
        ("Answer: 1 would be wrong.\nAnswer: 2", 2),
        ("<think>\nAnswer: 1? No.\n</think>\n\n2", 2),
        ("Answer: 1? No.</think> 2", 2),
        ("It quotes </think> and <think>.\n</think>\nAnswer: 2", 2),
        ("[THINK]1?[/THINK]2", 2),
        ("<reasoning>1?</reasoning>\n**2**", 2),
        ("1?</seed:think>2", 2),
    ],
)
def test_reads_the_number_alone_or_on_the_last_line(text, choice):
    assert read_choice(text) == choice


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I prefer 1 over 2",
        "10",
        "12",
        "3",
        "0",
        "-1",
        "1.5",
        "1 2",
        "1\n2",
        "1*2",
        "①",
        "¹",
        "١",  # the Arabic digit one
        "one",
        "Response 1",
        "回复2",
        "【12】",
        "【1",
        "Answer: 10",
        "Answer: 1 or 2",
        "Answer: both",
        "Answer: 1\nThank you!",
        "The Answer: 1",
        "My answer: 2",
        "Answer 1",
        "<think>1</think>",
        "<think>1",
        "<think>\nAnswer: 1",
        "[THINK]\nAnswer: 1",
        "</think>",
        "Answer: 1</think>",
        "2</think>\nI prefer 1 over 2",
        '{"choice": 1}',
    ],
)
def test_all_else_is_unreadable(text):
    assert read_choice(text) is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ('{"choice": 1}', 1),
        (' {"choice":2}\n', 2),
        ("1", None),
        ('Well... {"choice": 1}? No.</think>{"choice": 2}', 2),
    ],
)
def test_a_structured_answer_is_json_and_nothing_else(text, choice):
    assert read_choice(text, structured=True) == choice


@pytest.mark.parametrize(
    "text",
    [
        '{"choice": 3}',
        '{"choice": "1"}',
        '{"choice": true}',
        '{"choice": 1.0}',
        '{"choice": 1, "choice": 2}',
        '{"choice": 1, "why": "shorter"}',
        '{"Choice": 1}',
        '[["choice", 1]]',
        '["choice"]',
        '{"choice": 1} {"choice": 1}',
        '{"choice": 1',
        "Answer: 1",
        "[" * 100_000,
        "null",
    ],
)
def test_other_json_is_unreadable(text):
    assert read_choice(text, structured=True) is None


words = st.text(string.ascii_letters + string.digits + " .,:\n*【】１２答案：", max_size=60)


@given(words)
def test_what_lacks_the_pattern_is_unreadable(text):
    last = text.replace("*", "").strip().split("\n")[-1].strip()
    alone = text.replace("*", "").strip()
    numbers = [
        number + stop
        for number in ("1", "2", "１", "２", "【1】", "【2】", "【１】", "【２】")
        for stop in ("", ".", "。")
    ]
    assume(alone not in numbers)
    assume(not any(last.endswith(number) and last.lower().startswith(("answer", "答案")) for number in numbers))
    assert read_choice(text) is None


@given(st.sampled_from(["1", "2"]), words.filter(lambda text: not text.startswith("<think>")))
def test_only_the_last_line_counts(number, text):
    assert read_choice(f"{text}\nAnswer: {number}") == int(number)
    assert read_choice(f"Answer: {number}\n{text}x") is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["choice", "why"]), inner, max_size=2)
        ),
    )
)
def test_structured_answers_are_read_only_where_the_object_is_the_choice(value):
    right = value in ({"choice": 1}, {"choice": 2}) and type(value["choice"]) is int
    assert read_choice(json.dumps(value), structured=True) == (value["choice"] if right else None)


@given(st.text(max_size=60), st.sampled_from(["1", "2"]))
def test_what_precedes_the_end_of_thinking_does_not_matter(thoughts, number):
    assert read_choice(f"{thoughts}</think>\n{number}") == int(number)
    assert read_choice(f"<think>{thoughts}</think>Answer: {number}") == int(number)
