"""
The tokens that a tokenizer's chat template writes around an assistant's turn, found by rendering short chats.

A template may write a generation prompt and a complete chat differently. It may also end the last turn differently from
earlier ones, and write the date. The reward model needs one form of each text: that of the complete chat, with a fixed date.
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
"""The fixed date that chat templates write, the same as in Llama 3.1's template, which does not read the clock."""

THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""
The texts that open and close a model's thoughts. They are tried for templates that open thoughts in the generation prompt
or drop them from a complete chat.
"""

Turns = list[dict[str, Any]]


class ChatMarkers(NamedTuple):
    """Token ids that a chat template writes around an assistant's turn."""

    response_marker: list[int]
    """The tokens right before the assistant's text, without trailing white space; empty without a template."""
    end_of_turn: list[int]
    """The tokens that can each end an assistant's turn; the first is the one that the template writes."""


class ChatFormat(NamedTuple):
    """Properties of a chat template. [`DMoERMConfig`] takes the first four under the same names."""

    response_marker: list[int]
    end_of_turn: list[int]
    response_opening: ResponseOpening | None
    """The tokens between the marker and the response; None if they are always the same."""
    reads_end: bool
    """Whether a complete chat ends with an end-of-turn token."""
    in_parts: bool
    """Whether the content of a turn must be `[{"type": "text", "text": ...}]`, as for some multimodal models."""
    thoughts: tuple[str, str] | None
    """The texts that open and close a model's thoughts with this template."""


def chat_markers(tokenizer: PreTrainedTokenizerBase) -> ChatMarkers:
    """Return the first two fields of [`read_chat_format`]."""
    return ChatMarkers(*read_chat_format(tokenizer)[:2])


def fix_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Replace today's date in the tokenizer's chat template by [`DATE`], so that a text has the same tokens every day.

    The template is changed in place, and is saved with the tokenizer.

    Raises:
        ValueError: If the template formats the date with anything but a literal.
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
            f"{tokenizer.name_or_path}: got a chat template that calls strftime_now with a format that is not a literal, need "
            "a literal, because the date is fixed there: a reward must not change at midnight. Write a date into the template."
        )
    return fixed


def leave_thoughts(tokenizer: PreTrainedTokenizerBase, thoughts: tuple[str, str] | None) -> None:
    """
    Exempt the tokens that open and close thoughts when [`render`] turns control tokens into text.

    Chat templates look for these tokens in earlier turns. Special tokens are always turned into text.
    """
    if thoughts is not None and getattr(tokenizer, "chat_control_tokens", None) is None:
        template = tokenizer.get_chat_template()
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        written = [token for token in added if token in template and not token.isspace()]
        tokenizer.chat_control_tokens = [token for token in written if token not in thoughts]


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns | Sequence[Turns], **options: Any) -> list[Any]:
    """
    Return the token ids of one rendered chat, or of each of several. Text that spells a special token stays text.

    Raises:
        ValueError: If the chat template refuses the turns.
    """
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, sanitize_control_tokens=True, **options)
    except Exception as error:  # a chat template may raise anything
        first = turns[0] if isinstance(turns[0], list) else turns
        raise ValueError(
            f"got a prompt with turns of {[turn['role'] for turn in first]}, which the tokenizer's chat template refuses "
            f"({error}): change the turns or the template."
        ) from error


class _Late(BaseException):
    """Timeout that no `except Exception` around a template catches."""


@contextmanager
def time_limit(tokenizer: PreTrainedTokenizerBase, seconds: float = 30) -> Iterator[None]:
    """
    Context manager that limits the time a chat template may take, because templates are untrusted programs.

    There is no limit in threads other than the main thread, or on systems without `signal.setitimer`.

    Raises:
        ValueError: If the time is over.
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
            f"{tokenizer.name_or_path}: got a chat template that took over {seconds} seconds for a few short chats, need "
            "one that ends, because every text is rendered by it: fix the template."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def read_chat_format(tokenizer: PreTrainedTokenizerBase, score_thinking: bool = False) -> ChatFormat:
    """
    Find out how the tokenizer's chat template begins and ends an assistant's turn, by rendering short chats.

    - `response_marker` holds the tokens that the generation prompt and the complete chat share after the user's turn, such
      as `<|im_start|>assistant`. If the template has no generation prompt (Mistral), it holds the tokens between the user's
      text and the assistant's, from the last special token on, such as `[/INST]`. Trailing white space is removed, because
      it may merge with the response's first token when a chat is tokenised as one text.
    - `end_of_turn` holds the special token after the assistant's text at the end of a chat, the one after it in the middle
      of a chat, and the tokenizer's eos.

    Args:
        score_thinking (`bool`): Whether thoughts are scored with the response. By default they are removed.

    Raises:
        ValueError: If the template does not render the prompt, or the response cannot be found in a complete chat.
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
            f"{tokenizer.name_or_path}: got a chat template whose generation prompt ends in {tokenizer.decode(prompt[-8:])!r}, "
            "which a complete chat does not have, need something in common, because the start of a response cannot be found "
            "without it: fix the template."
        )
    thinks = thought != answered
    if thinks and not chats.strip(_prefix(thought, chats("one", "one", thoughts="six"))[len(shared) :]):
        marker = chats.strip(marker)
        opened, marker = marker[-1:], marker[:-1]  # shared by all three chats, so it opens thoughts
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
            close = close[: -len(name)]  # gpt-oss: thoughts and response are separate messages
        thinking = [chats.strip(scored[0]), close]
        opened = thinking[0]
    elif pair := next((pair for pair in THOUGHTS if tokenizer.decode(rest) == pair[0] or chats.drops(pair)), None):
        thinking = [tokenizer(text, add_special_tokens=False).input_ids for text in pair]
        opened = thinking[0]
    thoughts = (tokenizer.decode(thinking[0]), tokenizer.decode(thinking[1])) if thinking else None
    if score_thinking and not scored:
        raise ValueError(
            f"{tokenizer.name_or_path}: got score_thinking=True and a chat template that leaves thoughts out of a complete "
            "chat, need one that writes a turn's `reasoning_content`, because trainers would score the text without its "
            "thoughts: leave score_thinking off, or fix the template."
        )
    opening = None
    if blank := chats.writes_a_blank():  # a policy does not write this white space, or writes it itself
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
    """Cached renderings of short chats: `chats("one", "six")` is a user's "one" and the assistant's "six"."""

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
                    f"{tokenizer.name_or_path}: got a chat template that renders the prompts 'one' and 'six' alike, need one "
                    "that writes the user's text, because all prompts would look the same: fix the template."
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
        """Return whether a complete chat has white space before the response that the generation prompt lacks."""
        render = self.tokenizer.apply_chat_template
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "one"}]
        turns = in_parts(turns) if self.in_parts else turns
        opened = render(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = render(turns, tokenize=False)
        rest = whole.removeprefix(opened)
        return rest != whole and rest[:1].isspace() and rest.lstrip().startswith("one")

    def drops(self, pair: tuple[str, str]) -> bool:
        """Return whether a complete chat omits the thoughts at the beginning of the assistant's text."""
        turns = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": f"{pair[0]}\neleven{pair[1]}twelve"},
        ]
        whole = self.tokenizer.apply_chat_template(in_parts(turns) if self.in_parts else turns, tokenize=False)
        return "twelve" in whole and "eleven" not in whole

    def strip(self, ids: list[int]) -> list[int]:
        """Return tokens without white space at either end."""
        places = [i for i, token in enumerate(ids) if not _is_space(self.tokenizer, token)]
        return ids[places[0] : places[-1] + 1] if places else []

    def between(self, first: list[int], other_thoughts: list[int], other_response: list[int]) -> list[int]:
        """
        Return the tokens between thoughts and response.

        The second chat differs from the first in its thoughts alone, the third in its response alone.
        """
        tail = _suffix(first, other_thoughts)
        return tail[: len(tail) - (len(first) - len(_prefix(first, other_response)))]

    def after_earlier_turn(self) -> list[int]:
        """Return the special token after an assistant's turn in the middle of a chat; empty if there is none."""
        try:
            rest = _suffix(self("one", "one", "two"), self("one", "six", "two"))
        except ValueError:
            return []
        return [token for token in self.strip(rest)[:1] if token in self.tokenizer.added_tokens_decoder]


def in_parts(turns: Turns) -> Turns:
    """Return turns whose content is a list of one text part, as the templates of some multimodal models need it."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _open(open: bool) -> dict[str, bool]:
    return {"add_generation_prompt": True} if open else {}


def _prefix(*rows: list[int]) -> list[int]:
    """Return the longest common prefix."""
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))]


def _suffix(*rows: list[int]) -> list[int]:
    """Return the longest common suffix."""
    return _prefix(*(row[::-1] for row in rows))[::-1]


def _last_place(ids: list[int], part: list[int]) -> int:
    return max(i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part)


def _is_space(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not tokenizer.decode([token]).strip()
