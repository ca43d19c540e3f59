"""
What a tokenizer's chat template writes around an assistant's turn, read off the short chats that it renders.

A template may write one thing in a generation prompt and another in a whole chat, end the last turn otherwise than an earlier one,
and write the date. The reward model needs one form of each text, so the whole chat is taken for the form, on one fixed date.
"""

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import product, takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..modeling.response_opening import ResponseOpening

DATE = date(2024, 7, 26)
"""The date that chat templates write, on whatever day: that of Llama 3.1's template, which has no clock."""

THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""How models write their thoughts: for templates that open them in the generation prompt, or drop them from a whole chat."""

Turns = list[dict[str, Any]]


class ChatMarkers(NamedTuple):
    """What a chat template writes around an assistant's turn, as token ids."""

    response_marker: list[int]
    """The tokens right before the assistant's text, without white space at their end; empty without a template."""
    end_of_turn: list[int]
    """The single tokens that end an assistant's turn; the first is the one the template writes."""


class ChatFormat(NamedTuple):
    """All that is read off a chat template; a [`DMoERMConfig`] takes the first four under the same names."""

    response_marker: list[int]
    end_of_turn: list[int]
    response_opening: ResponseOpening | None
    """What stands between marker and response, where that is not always the same."""
    reads_end: bool
    """Whether a whole chat ends in an end of turn."""
    in_parts: bool
    """Whether the template renders text only as `[{"type": "text", "text": ...}]`, as those of some multimodal models do."""
    thoughts: tuple[str, str] | None
    """The texts between which a model of this template writes its thoughts."""


def chat_markers(tokenizer: PreTrainedTokenizerBase) -> ChatMarkers:
    """The first two of [`read_chat_format`]."""
    return ChatMarkers(*read_chat_format(tokenizer)[:2])


def fix_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Let the tokenizer's chat template write [`DATE`] in place of today's date, in place and wherever the tokenizer is saved, so
    that a text has the same tokens on every day.

    Raises:
        ValueError: if the template asks for the date in a way that is not a literal format.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _with_fixed_date(text, tokenizer) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = _with_fixed_date(template, tokenizer)


def _with_fixed_date(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    call = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""")
    fixed = call.sub(lambda match: match[1][0] + DATE.strftime(match[1][1:-1]) + match[1][0], template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ValueError(
            f"{tokenizer.name_or_path}: got a chat template that calls strftime_now with a format that is no literal, need a "
            "literal, because the date is fixed there: a reward must not change at midnight. Write a date into the template."
        )
    return fixed


def leave_thoughts(tokenizer: PreTrainedTokenizerBase, thoughts: tuple[str, str] | None) -> None:
    """
    Let the tokenizer leave the tokens that open and close thoughts as they are where [`render`] turns control tokens into text:
    chat templates look for them in earlier turns. Special tokens are turned into text whatever they are.
    """
    if thoughts is not None and getattr(tokenizer, "chat_control_tokens", None) is None:
        template = tokenizer.get_chat_template()
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        written = [token for token in added if token in template and not token.isspace()]
        tokenizer.chat_control_tokens = [token for token in written if token not in thoughts]


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns | Sequence[Turns], **options: Any) -> list[Any]:
    """
    The ids of a rendered chat, or of each of several, in which text that spells a special token is text.

    Raises:
        ValueError: if the chat template refuses the turns.
    """
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, sanitize_control_tokens=True, **options)
    except Exception as error:  # whatever a foreign program raises
        first = turns[0] if isinstance(turns[0], list) else turns
        raise ValueError(
            f"got a prompt with turns of {[turn['role'] for turn in first]}, which the tokenizer's chat template refuses "
            f"({error}): change the turns or the template."
        ) from error


class _Late(BaseException):
    """Passes through all that a template's errors are caught by."""


@contextmanager
def time_limit(tokenizer: PreTrainedTokenizerBase, seconds: float = 30) -> Iterator[None]:
    """
    Context manager in which a chat template that does not end is an error: it is a program of strangers. In a thread other than the main one there
    is no limit.

    Raises:
        ValueError: if the seconds are over.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: Any) -> None:
        raise _Late

    handler, timer = signal.signal(signal.SIGALRM, late), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late:
        raise ValueError(
            f"{tokenizer.name_or_path}: got a chat template that took over {seconds} seconds for a few short chats, need one that "
            "ends, because every text is rendered by it: fix the template."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def read_chat_format(tokenizer: PreTrainedTokenizerBase, score_thinking: bool = False) -> ChatFormat:
    """
    Read off the tokenizer's chat template how an assistant's turn begins and ends, by rendering short chats.

    - `response_marker` is what the generation prompt and the whole chat share after the user's turn, such as
      `<|im_start|>assistant`. If the template has no generation prompt (Mistral), it is what stands between a user's text and
      the assistant's, from its last special token on, such as `[/INST]`. White space at its end is left off, because it may
      merge with the response's first token when a chat is tokenised as one text.
    - `end_of_turn` is the special token after the assistant's text at a chat's end, the one after it in the middle of a chat, and
      the tokenizer's eos.

    Args:
        score_thinking (`bool`): whether thoughts are scored with the response, rather than left out.

    Raises:
        ValueError: if the template does not render the prompt, or renders a whole chat from which the response cannot be told.
    """
    if not tokenizer.chat_template:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        return ChatFormat([], [] if end is None else [end], None, True, False, None)
    chats = _Probe(tokenizer)
    prompt, answered = chats("one", open=True), chats("one", "one")
    thought = chats("one", "one", thoughts="one")
    shared = _prefix(prompt, answered, chats("one", "six"), thought, chats("one", "six", thoughts="six"))
    marker = shared[len(_prefix(chats("one"), prompt)) :]
    opened: list[int] = []
    if prompt == chats("one"):  # no generation prompt
        before = [_prefix(chats(user, "one"), chats(user, "six")) for user in ("one", "six")]
        marker = _suffix(*before)
        special = [i for i, token in enumerate(marker) if token in tokenizer.added_tokens_decoder]
        marker = marker[special[-1] :] if special else marker
        shared = before[0]
    elif not marker:
        raise ValueError(
            f"{tokenizer.name_or_path}: got a chat template whose generation prompt ends in {tokenizer.decode(prompt[-8:])!r}, which "
            "a whole chat does not have, need something in common, because without it the place where a response begins cannot "
            "be found: fix the template."
        )
    thinks = thought != answered
    if thinks and not chats.strip(_prefix(thought, chats("one", "one", thoughts="six"))[len(shared) :]):
        marker = chats.strip(marker)
        opened, marker = marker[-1:], marker[:-1]  # all three open thoughts, so that opens them
    marker = chats.strip(marker)
    start = _last_place(shared, marker) + len(marker)

    written = _prefix(answered, chats("one", "six"))[start:]
    rest = chats.strip(prompt[start:])
    thinking: list[list[int]] = []
    scored: list[list[int]] = []
    if thinks:
        scored = [
            _prefix(thought, chats("one", "one", thoughts="six"))[start:],
            chats.between(thought, chats("one", "one", thoughts="six"), chats("one", "six", thoughts="one")),
        ]
        close, name = chats.strip(scored[1]), chats.strip(written)
        if name and close[-len(name) :] == name:
            close = close[: -len(name)]  # gpt-oss: thoughts and response are two messages
        thinking = [chats.strip(scored[0]), close]
        opened = thinking[0]
    elif pair := next((pair for pair in THOUGHTS if tokenizer.decode(rest) == pair[0] or chats.drops(pair)), None):
        thinking = [tokenizer(text, add_special_tokens=False).input_ids for text in pair]
        opened = thinking[0]
    thoughts = (tokenizer.decode(thinking[0]), tokenizer.decode(thinking[1])) if thinking else None
    if score_thinking and not scored:
        raise ValueError(
            f"{tokenizer.name_or_path}: got score_thinking=True and a chat template that leaves thoughts out of a whole chat, need "
            "one that writes a turn's `reasoning_content`, because trainers would score a text without what others score: leave "
            "score_thinking off, or fix the template."
        )
    opening = None
    if blank := chats.writes_a_blank():  # a policy writes none where its prompt ends, or writes it itself
        written = prompt[start:]
    if thinking or blank or chats.strip(written) != rest:
        others = [ids for ids in (chats.strip(written), rest) if ids and ids != opened]
        opening = ResponseOpening(written, others, thinking, scored if score_thinking else [], chats.blanks)

    after = _suffix(answered, chats("one", "six"))
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    special = {*tokenizer.added_tokens_decoder, *eos}
    end = [token for token in chats.strip(after)[:1] if token in special]
    ends = list(dict.fromkeys([*end, *chats.after_earlier_turn(), *eos]))
    return ChatFormat(marker, ends, opening, bool(end), chats.in_parts, thoughts)


class _Probe:
    """Renders short chats and remembers them: `chats("one", "six")` is a user's "one" and the assistant's "six"."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.in_parts = False
        self._known: dict[Any, list[int]] = {}
        texts = ["".join(text) for length in range(1, 4) for text in product("\n ", repeat=length)] + ["\t", "\r\n"]
        tokens = {token for ids in tokenizer(texts, add_special_tokens=False).input_ids for token in ids}
        self.blanks = sorted(token for token in tokens if not tokenizer.decode([token]).strip())
        if not self._renders():
            self.in_parts = True
            self._known.clear()
            if not self._renders():
                raise ValueError(
                    f"{tokenizer.name_or_path}: got a chat template that renders the prompts 'one' and 'six' alike, need one that "
                    "writes what the user says, because all prompts would be one: fix the template."
                )

    def _renders(self) -> bool:
        try:
            return self("one", open=True) != self("six", open=True) and self("one", "one") != self("one", "six")
        except ValueError:
            if self.in_parts:
                raise
            return False

    def __call__(self, *contents: str, open: bool = False, thoughts: str | None = None) -> list[int]:
        key = contents, open, thoughts
        if key not in self._known:
            turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
            if thoughts is not None:
                turns[-1]["reasoning_content"] = thoughts
            self._known[key] = render(self.tokenizer, in_parts(turns) if self.in_parts else turns, **_open(open))
        return self._known[key]

    def writes_a_blank(self) -> bool:
        """Whether a whole chat has white space before the response that the generation prompt does not have."""
        render = self.tokenizer.apply_chat_template
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "one"}]
        turns = in_parts(turns) if self.in_parts else turns
        opened = render(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = render(turns, tokenize=False)
        rest = whole.removeprefix(opened)
        return rest != whole and rest[:1].isspace() and rest.lstrip().startswith("one")

    def drops(self, pair: tuple[str, str]) -> bool:
        """Whether a whole chat has no thoughts, though the assistant's text begins with them."""
        turns = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": f"{pair[0]}\neleven{pair[1]}twelve"},
        ]
        whole = self.tokenizer.apply_chat_template(in_parts(turns) if self.in_parts else turns, tokenize=False)
        return "twelve" in whole and "eleven" not in whole

    def strip(self, ids: list[int]) -> list[int]:
        """Tokens without the white space at their ends."""
        places = [i for i, token in enumerate(ids) if not _is_space(self.tokenizer, token)]
        return ids[places[0] : places[-1] + 1] if places else []

    def between(self, first: list[int], other_thoughts: list[int], other_response: list[int]) -> list[int]:
        """What stands between thoughts and response, from three chats, two of which differ in one of them alone."""
        tail = _suffix(first, other_thoughts)
        return tail[: len(tail) - (len(first) - len(_prefix(first, other_response)))]

    def after_earlier_turn(self) -> list[int]:
        """The special token that follows an assistant's turn before the last; empty where a chat has no two of them."""
        try:
            rest = _suffix(self("one", "one", "two"), self("one", "six", "two"))
        except ValueError:
            return []
        return [token for token in self.strip(rest)[:1] if token in self.tokenizer.added_tokens_decoder]


def in_parts(turns: Turns) -> Turns:
    """Turns whose content is a list of one part, as the templates of some multimodal models want it."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _open(open: bool) -> dict[str, bool]:
    return {"add_generation_prompt": True} if open else {}


def _prefix(*rows: list[int]) -> list[int]:
    """What all begin with."""
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))]


def _suffix(*rows: list[int]) -> list[int]:
    """What all end with."""
    return _prefix(*(row[::-1] for row in rows))[::-1]


def _last_place(ids: list[int], part: list[int]) -> int:
    return max(i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part)


def _is_space(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not tokenizer.decode([token]).strip()
