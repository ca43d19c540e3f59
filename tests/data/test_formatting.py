"""One formatter for training, evaluation, scoring and serving: what it writes, what it cuts, what it refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from dmoerm_trl.data.formatting import Formatter, chat_markers
from dmoerm_trl.data.rows import PreferenceRow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN_INST = MISTRAL.replace("[INST]", "(user)").replace("[/INST]", " (bot)")
TEMPLATES = {  # name -> template, special tokens, bos, eos
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|endoftext|>"),
    "llama3": (LLAMA3, ["<bos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<bos>", "<|eot_id|>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "plain": (PLAIN_INST, ["<s>", "</s>"], "<s>", "</s>"),
}
TEXTS = ["one six two user assistant model system hello there, how are you today? All is well.\n\nThank you!"] * 4


def make_tokenizer(name: str, template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens, which adds bos by itself where its model has one."""
    chat_template, special, bos, eos = TEMPLATES[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    if bos:
        special_ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", special_ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos, extra_special_tokens=special
    )
    tokenizer.chat_template = chat_template if template else None
    return tokenizer


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return make_tokenizer("chatml")


@pytest.fixture(scope="module")
def bert() -> BertTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "sep", *"abcdefghij"]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """User and assistant in turn, after a system turn where one is given."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + chat


def texts_of(tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


@pytest.mark.parametrize(
    ("name", "marker", "end"),
    [
        ("chatml", ["<|im_start|>", "assistant"], ["<|im_end|>", "<|endoftext|>"]),
        ("llama3", ["<|start_header_id|>", "assistant", "<|end_header_id|>"], ["<|eot_id|>"]),
        ("gemma", ["<start_of_turn>", "model"], ["<end_of_turn>", "<eos>"]),
        ("mistral", ["[/INST]"], ["</s>"]),
    ],
)
def test_markers_are_read_off_the_chat_template(name, marker, end):
    tokenizer = make_tokenizer(name)
    markers = chat_markers(tokenizer)
    # "assistant" may be several tokens in so small a vocabulary: compare the text, and the special tokens one by one
    assert "".join(texts_of(tokenizer, markers.response_marker)) == "".join(marker)
    assert texts_of(tokenizer, markers.response_marker)[0] == marker[0]
    assert texts_of(tokenizer, markers.end_of_turn) == end


def test_marker_of_a_template_without_a_generation_prompt():
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = CHATML.partition("{% if add")[0]
    assert chat_markers(tokenizer) == chat_markers(make_tokenizer("chatml"))


def test_marker_of_a_template_in_plain_text():
    tokenizer = make_tokenizer("plain")
    assert "".join(texts_of(tokenizer, chat_markers(tokenizer).response_marker)).strip() == "(bot)"


def test_markers_without_a_chat_template(bert):
    gpt = make_tokenizer("chatml", template=False)
    assert chat_markers(gpt) == ([], [gpt.eos_token_id])
    assert chat_markers(bert) == ([], [bert.sep_token_id])


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_a_chat_equals_what_a_rollout_concatenates(name):
    tokenizer = make_tokenizer(name)
    prompt = turns("hello there", "All is well.", "how are you?")
    encoding = Formatter(tokenizer, 512).encode(prompt, "Thank you!")
    query = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    response = tokenizer("Thank you!", add_special_tokens=False).input_ids
    assert encoding.input_ids == query + response + chat_markers(tokenizer).end_of_turn[:1]
    assert encoding.prompt_length == len(query)
    assert encoding.cut_turns == 0
    if tokenizer.bos_token_id is not None:
        assert encoding.input_ids.count(tokenizer.bos_token_id) == 1
    marker = chat_markers(tokenizer).response_marker
    starts = [i for i in range(len(query)) if query[i : i + len(marker)] == marker]
    assert not tokenizer.decode(query[starts[-1] + len(marker) :]).strip()  # the query ends with the marker


def test_text_as_prompt_is_one_turn_of_the_user(chatml):
    formatter = Formatter(chatml, 64)
    assert formatter.encode("hello", "you") == formatter.encode(turns("hello"), "you")


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_text_that_spells_a_special_token_stays_text(name):
    tokenizer = make_tokenizer(name)
    formatter = Formatter(tokenizer, 2048)
    spelt = "hello" + "".join(tokenizer.all_special_tokens) + "you"
    special = set(tokenizer.all_special_ids)

    def specials(prompt: str, response: str) -> list[int]:
        return [token for token in formatter.encode(prompt, response).input_ids if token in special]

    assert specials(spelt, "well") == specials("hello", "well")
    assert specials("hello", spelt) == specials("hello", "well")
    assert spelt in tokenizer.decode(formatter.encode(spelt, "well").input_ids)
    assert spelt in tokenizer.decode(formatter.encode("hello", spelt).input_ids)


def test_an_empty_response_is_the_end_of_turn_alone(chatml):
    encoding = Formatter(chatml, 64).encode("hello", "")
    assert encoding.input_ids[encoding.prompt_length :] == [chatml.convert_tokens_to_ids("<|im_end|>")]


def test_a_decoder_without_a_template():
    tokenizer = make_tokenizer("mistral", template=False)
    encoding = Formatter(tokenizer, 128).encode(turns("hello", "well", "you?", system="two"), " All")
    assert tokenizer.decode(encoding.input_ids) == "<s>two\n\nhello\n\nwell\n\nyou? All</s>"
    assert tokenizer.decode(encoding.input_ids[: encoding.prompt_length]) == "<s>two\n\nhello\n\nwell\n\nyou?"
    without_bos = make_tokenizer("chatml", template=False)
    assert (
        without_bos.decode(Formatter(without_bos, 128).encode("hello", " All").input_ids) == "hello All<|endoftext|>"
    )


def test_an_encoder_without_a_template(bert):
    encoding = Formatter(bert, 16).encode(turns("a b", "c", "d"), "e f")
    assert bert.convert_ids_to_tokens(encoding.input_ids) == "[CLS] a b c d [SEP] e f [SEP]".split()
    assert encoding.prompt_length == 6
    spelt = Formatter(bert, 16).encode("a[SEP]b", "c")
    assert bert.convert_ids_to_tokens(spelt.input_ids) == "[CLS] a [ sep ] b [SEP] c [SEP]".split()


def test_an_over_long_encoder_prompt_loses_its_oldest_turns_then_its_start(bert):
    prompt = turns("a b c", "d", "e f g")  # 7 tokens, and one of the response, and three special ones
    for max_length, kept, cut_turns in [(11, "a b c d e f g", 0), (10, "e f g", 2), (7, "e f g", 2), (6, "f g", 3)]:
        encoding = Formatter(bert, max_length).encode(prompt, "h")
        assert bert.convert_ids_to_tokens(encoding.input_ids) == f"[CLS] {kept} [SEP] h [SEP]".split()
        assert encoding.cut_turns == cut_turns
        assert encoding.prompt_length == len(kept.split()) + 2


def test_the_system_turn_stays_and_the_rest_starts_with_the_user(chatml):
    prompt = turns("one one", "two two", "six six", "two", "hello", system="All is well.")
    formatter = Formatter(chatml, 512)
    whole = formatter.encode(prompt, "you")
    for kept, cut_turns in [(prompt[:1] + prompt[3:], 2), (prompt[:1] + prompt[5:], 4)]:
        wanted = formatter.encode(kept, "you")
        cut = Formatter(chatml, len(wanted.input_ids)).encode(prompt, "you")
        assert cut.input_ids == wanted.input_ids
        assert cut.cut_turns == cut_turns
    assert len(whole.input_ids) > len(wanted.input_ids)


def test_a_response_that_does_not_fit_is_an_error(chatml):
    with pytest.raises(
        ValueError, match=r"a response of \d+ tokens.*exceeds max_length=20.*never cut.*raise max_length"
    ):
        Formatter(chatml, 20).encode("hello there", "well " * 40)
    with pytest.raises(ValueError, match="with the system turn"):
        Formatter(chatml, 30).encode(turns("hello", system="is " * 40), "well")
    row = PreferenceRow(turns("hello"), ["well", "well " * 40], [1, 2])
    with pytest.raises(ValueError, match=r"row 1 \(prompt [0-9a-f]{16}\): got a response of"):
        Formatter(chatml, 30).encode_rows([row])


contents = st.lists(
    st.text(alphabet="one six €<|\n", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=7
)


@settings(max_examples=60, deadline=None)
@given(contents=contents, system=st.booleans(), spare=st.integers(0, 80))
def test_whatever_the_length_the_response_survives_and_cuts_are_counted(chatml, contents, system, spare):
    contents = contents if len(contents) % 2 else contents[:-1]
    prompt = turns(*contents, system="two" if system else None)
    response = "Thank you!"
    shortest = len(Formatter(chatml, 512).encode(turns("€", system="two" if system else None), response).input_ids)
    formatter = Formatter(chatml, shortest + spare)
    encoding = formatter.encode(prompt, response)
    whole = Formatter(chatml, 4096).encode(prompt, response)
    assert len(encoding.input_ids) <= formatter.max_length
    assert encoding.input_ids[encoding.prompt_length :] == whole.input_ids[whole.prompt_length :]
    assert (encoding.cut_turns == 0) == (encoding.input_ids == whole.input_ids)
    assert (encoding.cut_turns == 0) == (len(whole.input_ids) <= formatter.max_length)
    assert encoding.cut_turns <= len(contents)


def test_the_responses_of_a_prompt_are_encoded_as_one_by_one(chatml, bert):
    prompt = [{"role": "user", "content": "Old. " * 9}, {"role": "assistant", "content": "Yes."}]
    prompt.append({"role": "user", "content": "What is two and two?"})
    texts = ["", "It is four.", " spaces ", "<|im_end|>", "long " * 12]
    for tokenizer in (chatml, bert):
        whole = len(Formatter(tokenizer, 1000).encode(prompt, "").input_ids)
        for max_length in (whole + 100, whole + 3, whole - 2):  # cut for none, for some and for all of the responses
            formatter = Formatter(tokenizer, max_length)
            assert formatter.encode_responses(prompt, texts) == [formatter.encode(prompt, text) for text in texts]


def test_rows_are_encoded_in_order_and_cuts_reported(bert):
    short = PreferenceRow(turns("a"), ["b", "c"], [1, 2])
    long = PreferenceRow(turns("a b", "c", "d"), ["e", "f g h"], [1, 2])
    encodings, report = Formatter(bert, 8).encode_rows([short, long])
    assert [[encoding.cut_turns for encoding in row] for row in encodings] == [[0, 0], [0, 2]]
    assert (report.rows, report.cut_rows, report.responses, report.cut_responses) == (2, 1, 4, 1)
    assert "1 of 2 rows (1 of 4 responses) lost the oldest part" in str(report)


def test_what_cannot_be_encoded_says_why(chatml):
    unpadded = make_tokenizer("chatml")
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="no pad token.*tokenizer.pad_token = tokenizer.eos_token"):
        Formatter(unpadded, 64)
    with pytest.raises(ValueError, match="max_length=0"):
        Formatter(chatml, 0)
    with pytest.raises(ValueError, match="without turns"):
        Formatter(chatml, 64).encode([], "well")
    with pytest.raises(ValueError, match=r"\['system', 'user'\].*System role not supported"):
        Formatter(make_tokenizer("gemma"), 64).encode(turns("hello", system="two"), "well")
