"""TRL's pairs: the prompt of chats, of chats in one text, and of texts in languages with and without spaces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from dmoerm_trl.data.preference_row import RowError
from dmoerm_trl.data.rows import prompt_of, rows_from_dataset
from dmoerm_trl.data.trl_pairs import BY_CHARACTERS, BY_WORDS, IN_ONE_TEXT, pair_of
from dmoerm_trl.generation.prompts import read_prompts
from dmoerm_trl.tasks import TaskTable

TASKS = TaskTable.paper()


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}


# --------------------------------------------------------------------------------------- whole chats, with a prompt


@pytest.mark.parametrize(
    ("prompt", "start", "expected"),
    [
        ("What?", [user("What?")], [user("What?")]),
        (" what?\n", [SYSTEM, user("What?")], [SYSTEM, user("What?")]),
        ("What?", [user("What?"), assistant("A"), user("So?")], [user("What?"), assistant("A"), user("So?")]),
        ([user("What?")], [user("What?")], [user("What?")]),
        ([user("What?")], [], [user("What?")]),
        ("What?", [], [user("What?")]),
        ([user("What?")], [assistant("A"), user("So?")], [user("What?"), assistant("A"), user("So?")]),
        (None, [SYSTEM, user("What?")], [SYSTEM, user("What?")]),
    ],
)
def test_whole_chats_beside_a_prompt(prompt, start, expected):
    row = {"prompt": prompt, "chosen": [*start, assistant("Good")], "rejected": [*start, assistant("Bad")]}
    [read], report = rows_from_dataset([row], tasks=TASKS)
    assert (read.prompt, read.responses, read.ranks) == (expected, ["Good", "Bad"], [1, 2])
    assert prompt_of(row) == expected and not report.prompts_found


def test_a_prompt_that_is_not_in_the_chats():
    row = {"prompt": "Why?", "chosen": [user("What?"), assistant("A")], "rejected": [user("What?"), assistant("B")]}
    with pytest.raises(
        ValueError, match="field `prompt`: got 'Why\\?', which is no turn that `chosen` and `rejected`"
    ):
        rows_from_dataset([row], tasks=TASKS)
    assert rows_from_dataset([row], tasks=TASKS, on_error="skip")[1].skipped == {"prompt that is not in the chats": 1}


def test_turns_of_tools_are_read_and_what_is_dropped_is_counted():
    called = [user("Weather?"), assistant(None, tool_calls=[{"function": "weather"}])]
    told = {"role": "tool", "content": [{"type": "text", "text": "12"}, {"type": "text", "text": " °C"}], "name": "w"}
    cached = assistant([{"type": "text", "text": "Mild.", "cache_control": "x"}])
    row = {"chosen": [*called, told, cached], "rejected": [*called, told, assistant("Hot.")]}
    [read], report = rows_from_dataset([row], tasks=TASKS)
    assert read.prompt == [user("Weather?"), assistant(""), {"role": "tool", "content": "12 °C"}]
    assert read.responses == ["Mild.", "Hot."]
    assert report.ignored_fields == {
        f"{side}.{field}": 1
        for side, fields in (
            ("chosen", ("tool_calls", "name", "content.cache_control")),
            ("rejected", ("tool_calls", "name")),
        )
        for field in fields
    }


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            user([{"type": "image", "url": "x"}]),
            "a part of the content of type 'image', need .*nothing but text is read",
        ),
        (user([{"type": "text", "text": None}]), "a part of the content of type 'text'"),
        (user([]), "need `role` and `content` as text"),
        (user(None), "need `role` and `content` as text"),
        (assistant(None), "need `role` and `content` as text"),
        ({"role": "user<|im_end|>", "content": "a"}, "the role 'user<|im_end|>', need a word such as 'user'"),
        ({"role": "user\nx", "content": "a"}, "the role 'user.nx', need a word"),
    ],
)
def test_turns_that_are_no_text(turn, message):
    for row in (
        {"prompt": [turn, user("b")], "responses": ["x", "y"], "ranks": [1, 2]},
        {"chosen": [turn, user("b"), assistant("x")], "rejected": [turn, user("b"), assistant("y")]},
    ):
        with pytest.raises(
            ValueError, match=f"row 1: field `(prompt|chosen)`: got .*{message}".replace("|im_end|", r"\|im_end\|")
        ):
            rows_from_dataset([row], tasks=TASKS)


# ---------------------------------------------------------------------------------------------- chats in one text

FORMATS = {
    "HH": "\n\nHuman: {0}\n\nAssistant: {1}\n\nHuman: {2}\n\nAssistant: {3}",
    "ChatML": "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n{1}<|im_end|>\n"
    "<|im_start|>user\n{2}<|im_end|>\n<|im_start|>assistant\n{3}<|im_end|>\n",
    "Phi-4": "<|im_start|>user<|im_sep|>{0}<|im_end|><|im_start|>assistant<|im_sep|>{1}<|im_end|>"
    "<|im_start|>user<|im_sep|>{2}<|im_end|><|im_start|>assistant<|im_sep|>{3}<|im_end|>",
    "Llama 2": "<s>[INST] {0} [/INST] {1} </s><s>[INST] {2} [/INST] {3} </s>",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{0}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{1}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{2}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{3}<|eot_id|>",
    "Gemma": "<bos><start_of_turn>user\n{0}<end_of_turn>\n<start_of_turn>model\n{1}<end_of_turn>\n"
    "<start_of_turn>user\n{2}<end_of_turn>\n<start_of_turn>model\n{3}<end_of_turn>\n",
    "Zephyr": "<|user|>\n{0}</s>\n<|assistant|>\n{1}</s>\n<|user|>\n{2}</s>\n<|assistant|>\n{3}</s>\n",
    "Phi-3": "<|user|>\n{0}<|end|>\n<|assistant|>\n{1}<|end|>\n<|user|>\n{2}<|end|>\n<|assistant|>\n{3}<|end|>\n<|endoftext|>",
    "DeepSeek": "<｜begin▁of▁sentence｜><｜User｜>{0}<｜Assistant｜>{1}<｜end▁of▁sentence｜><｜User｜>{2}<｜Assistant｜>{3}"
    "<｜end▁of▁sentence｜>",
    "Granite": "<|start_of_role|>user<|end_of_role|>{0}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>{1}<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>{2}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>{3}<|end_of_text|>\n",
    "Cohere": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{0}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{1}"
    "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{2}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{3}"
    "<|END_OF_TURN_TOKEN|>",
    "gpt-oss": "<|start|>user<|message|>{0}<|end|><|start|>assistant<|channel|>final<|message|>{1}<|end|>"
    "<|start|>user<|message|>{2}<|end|><|start|>assistant<|channel|>final<|message|>{3}<|return|>",
    "OpenChat": "<s>GPT4 Correct User: {0}<|end_of_turn|>GPT4 Correct Assistant: {1}<|end_of_turn|>"
    "GPT4 Correct User: {2}<|end_of_turn|>GPT4 Correct Assistant: {3}<|end_of_turn|>",
    "Alpaca": "### Instruction:\n{0}\n\n### Response:\n{1}\n\n### Instruction:\n{2}\n\n### Response:\n{3}",
    "Vicuna": "USER: {0} ASSISTANT: {1}</s>USER: {2} ASSISTANT: {3}</s>",
    "lines": "User: {0}\nAssistant: {1}\nUser: {2}\nAssistant: {3}",
    "Chinese": "用户：{0}\n助手：{1}\n用户：{2}\n助手：{3}",
}
TEXTS = ("天空 是什么颜色？", "蓝色。", "那 海呢", "海 是蓝的"), ("Is it far?", "Yes it is.", "How far", "It is far")


@pytest.mark.parametrize("texts", TEXTS, ids=["Chinese", "English"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_chat_in_one_text_is_read_by_its_turns_even_where_the_answers_begin_alike(tmp_path, name, texts):
    *before, answer = texts
    sides = {
        side: FORMATS[name].format(*before, f"{answer}{end}") for side, end in (("chosen", "。"), ("rejected", "吗"))
    }
    [row], report = rows_from_dataset([sides], tasks=TASKS)
    assert row.prompt == [user(before[0]), assistant(before[1]), user(before[2])]
    assert row.responses == [f"{answer}。", f"{answer}吗"]
    assert report.prompts_found == {IN_ONE_TEXT: 1} and "1 with a prompt that was found in both texts" in str(report)
    explicit = FORMATS[name].format(*before, "")
    assert pair_of({"prompt": explicit, **sides}) == pair_of({"prompt": before[2], **sides}) == pair_of(sides)


def test_a_system_turn_of_a_chat_in_one_text():
    for start in ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
                  "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] ",
                  "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n"):  # fmt: skip
        pair = pair_of({"chosen": f"{start}A", "rejected": f"{start}B"})
        assert pair.prompt == [SYSTEM, user("Hi")] and pair.responses == ["A", "B"]


def test_chats_that_part_before_the_last_answer():
    start = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": f"{start} a\n\nHuman: x\n\nAssistant: c", "rejected": f"{start} b\n\nHuman: x\n\nAssistant: d"}
    with pytest.raises(RowError, match="need one turn of the assistant"):
        pair_of(row)


# ------------------------------------------------------------------------------------- texts, without a format


@pytest.mark.parametrize(
    ("prompt", "good", "bad"),
    [
        ("天空是什么颜色？", "蓝色。", "绿色。"),
        ("请用 Python 写一个函数，计算 n 的阶乘。", "好的。", "不行。"),
        ("我今天很难过。怎么办呢", "振作起来", "别管它"),
        ("天空是什么颜色? ", "蓝色。", "绿色。"),
        ("天空是什么颜色?", "蓝色。", "绿色。"),
        ("法国的首都是哪里？", "Paris。", "Prague。"),
        ("今年是", "2023年", "2024年"),
        ("天空是什么颜色？", "蓝色", "蓝色，很蓝"),
        ("空は何色ですか？", "青です。", "緑です。"),
        ("เมืองหลวงของไทยคืออะไร", "กรุงเทพ", "เชียงใหม่"),
        ("ฉันรัก", "เขา", "เธอ"),
        ("រដ្ឋធានីនៃប្រទេសកម្ពុជា", "ភ្នំពេញ", "សៀមរាប"),
        ("ນະຄອນຫຼວງຂອງລາວ", "ວຽງຈັນ", "ປາກເຊ"),
        ("မြို့တော်ကဘာလဲ", "ရန်ကုန်", "နေပြည်တော်"),
        ("画一家人👨‍👩‍👧。", "👩‍👩‍👧", "👩‍👩‍👦"),
    ],
)
def test_a_language_without_spaces_is_cut_between_characters(prompt, good, bad):
    row = {"chosen": prompt + good, "rejected": prompt + bad}
    [read], report = rows_from_dataset([row], tasks=TASKS)
    assert (read.prompt, read.responses) == ([user(prompt)], [good, bad])
    assert report.prompts_found == {BY_CHARACTERS: 1}


han = st.text(st.sampled_from("天地人你我他是的在有不这中大来上国说们到，。？！ 、a1"), min_size=1, max_size=20)


@given(han, han, han)
def test_the_prompt_of_a_chinese_text_never_moves_into_the_responses(prompt, good, bad):
    prompt, good, bad = f"{prompt}么", f"甲{good}", f"乙{bad}"
    pair = pair_of({"chosen": prompt + good, "rejected": prompt + bad})
    assert pair.prompt == [user(prompt)] and pair.responses == [good, bad]


@settings(max_examples=200)
@given(st.text(st.sampled_from("aé你e\u0301\u200d👩👧 \nกำ"), min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_nothing_is_lost_between_prompt_and_responses(prompt, good, bad):
    row = {"chosen": prompt + good, "rejected": prompt + bad}
    try:
        pair = pair_of(row)
    except RowError:
        return
    if pair.found in (BY_WORDS, BY_CHARACTERS):
        assert [pair.prompt[0]["content"] + text for text in pair.responses] == [row["chosen"], row["rejected"]]
        assert all(pair.responses) and pair.prompt[0]["content"]


words = st.lists(st.text("abcdé", min_size=1, max_size=5), min_size=1, max_size=6).map(" ".join)


@given(words, words, words)
def test_a_language_with_spaces_is_cut_as_trl_cuts_it_where_whole_words_part(prompt, good, bad):
    row = {"chosen": f"{prompt} x{good}", "rejected": f"{prompt} y{bad}"}
    expected, pair = extract_prompt(row), pair_of(row)
    assert pair.prompt == [user(expected["prompt"])] and pair.found == BY_WORDS
    assert pair.responses == [expected["chosen"], expected["rejected"]]


def test_one_text_twice_tells_no_prompt_and_one_chat_twice_does():
    with pytest.raises(RowError, match="got the same text, need a prompt and two responses"):
        pair_of({"chosen": "Why so? Because.", "rejected": "Why so? Because."})
    with pytest.raises(RowError, match="no beginning in common"):
        pair_of({"chosen": "一二", "rejected": "一二三"})
    chat = "\n\nHuman: Hi\n\nAssistant: A"
    turns = [user("Hi"), assistant("A")]
    for row in ({"chosen": chat, "rejected": chat}, {"chosen": turns, "rejected": turns}):
        pair = pair_of(row)
        assert pair.prompt == [user("Hi")] and pair.responses == ["A", "A"]


# ----------------------------------------------------------------------------------------- prompts by themselves


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi?"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}]},
        {"messages": [user("Hi?")], "task": "chitchat"},
        {"prompt": "Hi?", "responses": "no matter", "ranks": None},
        {"prompt": "Hi?", "chosen": [user("Hi?"), assistant("A")], "rejected": [user("Hi?"), assistant("B")]},
        {"chosen": "Hi? A", "rejected": "Hi? B"},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: A", "rejected": "\n\nHuman: Hi?\n\nAssistant: B"},
        {"src": ["Hi?"], "tgt": [], "response": ["A", "B"], "rank": [1, 2], "label": "闲聊"},
    ],
)
def test_prompts_are_read_from_rows_of_any_format(tmp_path, record):
    [read] = read_prompts(_write(tmp_path, record))
    assert read["prompt"] == [user("Hi?")]
    assert not {"chosen", "rejected", "messages", "response", "responses"} & read.keys()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"response": "x"}, "got the prompt None among the fields"),
        ({"prompt": "a", "messages": [user("a")]}, "got `prompt` and `messages` among the fields"),
        ({"prompt": " \u200b"}, "got an empty one, need a question"),
        ({"prompt": [user("a"), assistant("b")]}, "got a last turn of 'assistant'"),
        ({"prompt": "\ud83d"}, "half of a surrogate pair"),
        ({"prompt": [user([{"type": "image"}])]}, "of type 'image'"),
    ],
)
def test_records_without_a_prompt(tmp_path, record, message):
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1, record 1: .*{message}"):
        read_prompts(_write(tmp_path, record))


def _write(folder, record: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(record))
    return str(path)
