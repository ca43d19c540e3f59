"""Formatter that turns messages into tokens, the same for training, evaluation, scoring and serving."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..modeling.configuration_dmoerm import DMoERMConfig
from .chat_template import (
    ChatMarkers,
    chat_markers,
    fix_date,
    in_parts,
    leave_thoughts,
    read_chat_format,
    render,
    time_limit,
)
from .preference_row import PreferenceRow, turn_text

__all__ = ["ChatMarkers", "CutReport", "Encoding", "Formatter", "chat_markers"]


PROBE = " ".join(["one two three four five six seven eight nine ten"] * 4)
"""A text that a chat template must write in full."""


class Encoding(NamedTuple):
    """Tokens of one prompt with one response, including special tokens."""

    input_ids: list[int]
    """Prompt, response and end token, without padding. There are at most `max_length` tokens."""
    prompt_length: int
    """`input_ids[:prompt_length]` is the prompt, which a policy is given before it writes the response."""
    cut_turns: int
    """Number of turns dropped from the prompt, plus one if the last user turn was shortened; 0 if nothing was cut."""


@dataclass
class CutReport:
    """Numbers of encoded rows and responses, and of those whose prompt was cut because they were too long."""

    max_length: int
    rows: int = 0
    cut_rows: int = 0
    responses: int = 0
    cut_responses: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cut_rows} of {self.rows} rows ({self.cut_responses} of {self.responses} responses) lost the oldest part "
            f"of their prompt to fit into {self.max_length} tokens"
        )


class Formatter:
    """
    Encoder of prompts with responses.

    - With a chat template, a text is the complete chat as rendered, up to the token that ends the response. The ids are
      those of TRL's trainers. Text that spells a special token stays text, both in the prompt and in the response.
    - Without one, a decoder reads `[bos] prompt response eos`. The turns of the prompt are joined by blank lines.
    - Without one, an encoder such as BERT reads the pair of prompt and response, `[CLS] prompt [SEP] response [SEP]`.

    If a text is too long, the oldest turns of its prompt are dropped, so that the prompt begins with a turn of the user. A
    leading system turn is kept. If the last user turn alone is too long, its start is cut. The response is never cut.

    The formatter changes two settings of the given tokenizer. A chat template that writes today's date writes a fixed date
    instead, see [`~dmoerm_trl.data.chat_template.fix_date`]. Tokens of thoughts are not treated as control tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the reward model, with a pad token.
        max_length (`int`):
            Maximum length of `input_ids`, in tokens.
        score_thinking (`bool`, *optional*, defaults to `False`):
            Whether the thoughts of a reasoning model (`<think>...</think>` before a response) are scored with the response.
            By default they are removed, even if the chat template writes them. Thoughts that are never closed belong to
            the response.

    Raises:
        ValueError: If the tokenizer has no pad token, or its chat template does not give each text a single form.

    Example:

    ```python
    from dmoerm_trl import Formatter
    from transformers import AutoTokenizer

    formatter = Formatter(AutoTokenizer.from_pretrained("runs/demo/base"), max_length=512)
    encoding = formatter.encode([{"role": "user", "content": "Hello?"}], "Hi!")
    assert encoding.prompt_length < len(encoding.input_ids)
    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, score_thinking: bool = False):
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no pad token, need one because responses are batched: set "
                "tokenizer.pad_token = tokenizer.eos_token."
            )
        if max_length < 1:
            raise ValueError(f"got max_length={max_length}, need at least 1 token.")
        fix_date(tokenizer)
        self.tokenizer = tokenizer
        self.max_length = max_length
        with time_limit(tokenizer):
            self._read_template(score_thinking)

    def _read_template(self, score_thinking: bool) -> None:
        tokenizer = self.tokenizer
        self.format = read_chat_format(tokenizer, score_thinking)
        leave_thoughts(tokenizer, self.format.thoughts)
        self.markers = ChatMarkers(*self.format[:2])
        empty, some = tokenizer(["", "a"]).input_ids
        self._bos = empty[:1] if empty[:1] == some[:1] else []  # the token that the tokenizer puts before every text
        self._pair = None if tokenizer.chat_template else _around_pair(tokenizer)
        if tokenizer.chat_template:
            self._check_template()

    @classmethod
    def for_model(cls, config: DMoERMConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> "Formatter":
        """
        Return the formatter that writes texts in the form of a trained model's training.

        Args:
            config (`DMoERMConfig`): Configuration of the model.
            tokenizer (`PreTrainedTokenizerBase`): Tokenizer from the model's folder.
            max_length (`int`): Maximum length of `input_ids`, in tokens.

        Raises:
            ValueError: If the tokenizer's chat template is missing, or is not the model's.
        """
        opening = config.response_opening
        formatter = cls(tokenizer, max_length, score_thinking=bool(opening and opening["scored"]))
        formatter.check_model(config)
        return formatter

    def check_model(self, config: DMoERMConfig) -> None:
        """
        Check that this formatter writes texts in the form of a model's training.

        Raises:
            ValueError: If the model was trained on texts in a different form.
        """
        if not config.end_of_turn:
            return
        own = DMoERMConfig(**self.model_settings)
        names = ["response_marker"]
        if config.response_opening is not None:
            names += ["response_opening", "reads_end"]
        odd = [name for name in names if getattr(config, name) != getattr(own, name)]
        if odd or config.end_of_turn[0] not in own.end_of_turn[:1]:
            raise ValueError(
                f"{self.tokenizer.name_or_path}: got a tokenizer whose chat template "
                + (
                    f"differs from the model's in {odd or ['end_of_turn']}"
                    if self.tokenizer.chat_template
                    else "is missing"
                )
                + ", need the one of the model's training, because rewards of texts in another form are meaningless: "
                "take the tokenizer, with its chat_template.jinja, from the model's folder."
            )

    @property
    def model_settings(self) -> dict[str, Any]:
        """Arguments of [`DMoERMConfig`] for a model that reads the texts of this formatter."""
        names = ("response_marker", "end_of_turn", "response_opening", "reads_end")
        return {
            **{name: getattr(self.format, name) for name in names},
            "pad_token_id": self.tokenizer.pad_token_id,
            "added_bos": self._bos[0] if self._bos else None,
            "reads_bos": not self.tokenizer.chat_template or self._open([_user("one")])[:1] == self._bos,
        }

    def encode(self, prompt: list[dict] | str, response: str) -> Encoding:
        """
        Encode one prompt with one response.

        Args:
            prompt (`list[dict]` or `str`):
                Turns with `role` and `content`, oldest first. A string is one turn of the user.
            response (`str`):
                The assistant's answer, which may be empty.

        Raises:
            `ValueError`: If the response does not fit together with the shortest form of the prompt, or the chat template
                refuses the prompt.
        """
        turns = _turns(prompt)
        return self._fit(turns, lambda turns: self._join(turns, response))

    def encode_responses(self, prompt: list[dict] | str, responses: Sequence[str]) -> list[Encoding]:
        """Encode each response like [`encode`], but the shared prompt only once."""
        if not self.tokenizer.chat_template or not responses:
            return [self.encode(prompt, response) for response in responses]
        turns = _turns(prompt)
        whole = [Encoding(*joined, cut_turns=0) for joined in self._join_all(turns, responses)]
        return [
            encoding if len(encoding.input_ids) <= self.max_length else self.encode(prompt, response)
            for encoding, response in zip(whole, responses, strict=True)
        ]

    def batch(self, prompts: Sequence[list[dict] | str], responses: Sequence[str]) -> dict[str, Tensor]:
        """
        Return the inputs of a DMoERM's forward: `input_ids` and `attention_mask` of shape (B, T), padded on the right, and
        `prompt_lengths` of shape (B,), which mark where each response begins.
        """
        encodings = [self.encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        ids = [torch.tensor(encoding.input_ids) for encoding in encodings]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "prompt_lengths": torch.tensor([encoding.prompt_length for encoding in encodings]),
        }

    def generation_prompt(self, prompt: list[dict] | str) -> list[int]:
        """Return the tokens that a policy is given before it writes the response. They are cut as in [`encode`]."""
        if not self.tokenizer.chat_template:
            encoding = self.encode(prompt, "")
            return encoding.input_ids[: encoding.prompt_length]
        return self._fit(_turns(prompt), lambda turns: (ids := self._open(turns), len(ids))).input_ids

    def prompt_length(self, prompt: list[dict]) -> int:
        """Return the number of tokens of an uncut prompt, which may be more than `max_length`."""
        return len(self._open(prompt)) if self.tokenizer.chat_template else self._join(prompt, "")[1]

    def encode_rows(self, rows: Sequence[PreferenceRow]) -> tuple[list[list[Encoding]], CutReport]:
        """
        Encode every response of every row.

        Returns:
            One list of encodings per row, in the order of `row.responses`, and a [`CutReport`] to print.
        """
        encodings, report = [], CutReport(self.max_length)
        for number, row in enumerate(tqdm(rows, desc="tokenising", unit=" rows", delay=3), start=1):
            try:
                encodings.append(self.encode_responses(row.prompt, row.responses))
            except ValueError as error:
                raise ValueError(f"row {number} (prompt {row.prompt_id}): {error}") from error
            cuts = [encoding.cut_turns > 0 for encoding in encodings[-1]]
            report.rows += 1
            report.cut_rows += any(cuts)
            report.responses += len(cuts)
            report.cut_responses += sum(cuts)
        return encodings, report

    def _open(self, turns: list[dict]) -> list[int]:
        """Return a prompt's tokens with the generation prompt, rendered by the chat template."""
        return self._render([turns], add_generation_prompt=True)[0]

    def _join(self, turns: list[dict], response: str) -> tuple[list[int], int]:
        """Return the uncut ids, and how many of them belong to the prompt."""
        if self.tokenizer.chat_template:
            return self._join_all(turns, [response])[0]
        text = "\n\n".join(turn["content"] for turn in turns)
        if self._pair is not None:
            before, between, after = self._pair
            prompt_ids = before + self._text_ids(text) + between
            return prompt_ids + self._text_ids(response) + after, len(prompt_ids)
        prompt_ids = self._bos + self._text_ids(text)
        return prompt_ids + self._text_ids(response) + self.markers.end_of_turn[:1], len(prompt_ids)

    def _join_all(self, turns: list[dict], responses: Sequence[str]) -> list[tuple[list[int], int]]:
        """Apply [`_join`] to several responses, with the chat template."""
        opened, answers = self._open(turns), [self._answer(response) for response in responses]
        head = self._head(opened)
        (first,) = self._render([[*turns, answers[0]]])
        if first[:head] != opened[:head]:
            raise ValueError(
                f"got a prompt with turns of {[turn['role'] for turn in turns]}, which the tokenizer's chat template renders "
                "differently with a response and with a generation prompt, need the same tokens, because a text would have two "
                "rewards: change the turns or the template."
            )
        tails = [first[head:]]
        if len(answers) > 1:  # rendered after a short prompt, if that gives the same tokens
            short = [_user("one")]
            start = self._head(self._open(short))
            tails = [ids[start:] for ids in self._render([[*short, answer] for answer in answers])]
            if tails[0] != first[head:]:
                tails = [ids[head:] for ids in self._render([[*turns, answer] for answer in answers])]
        texts = [opened[:head] + self._response(tail) for tail in tails]
        return [(text, max(head, _shared(opened, text))) for text in texts]

    def _head(self, opened: list[int]) -> int:
        """Return the index after a prompt's last response marker."""
        marker = self.markers.response_marker
        ends = (i for i in range(len(opened), len(marker) - 1, -1) if opened[i - len(marker) : i] == marker)
        return next(ends, len(opened))

    def _render(self, chats: list[list[dict]], **options: Any) -> list[list[int]]:
        return render(self.tokenizer, [in_parts(chat) if self.format.in_parts else chat for chat in chats], **options)

    def _response(self, ids: list[int]) -> list[int]:
        """Return the tokens after the response marker: the normalised opening, the response and its end."""
        ends, opening = self.markers.end_of_turn, self.format.response_opening
        written, response = ([], ids) if opening is None else opening.read(ids, ends)
        end = next((i for i, token in enumerate(response) if token in ends), len(response))
        return written + response[:end] + (ends[:1] if self.format.reads_end else [])

    def _answer(self, response: str) -> dict[str, str]:
        """Return the assistant's last turn. Thoughts become a field of the turn if they are scored, else they are removed."""
        if self.format.thoughts is None:
            return {"role": "assistant", "content": response}
        opened, closed = self.format.thoughts
        thoughts, _, response = response.rpartition(closed)
        while response.lstrip().startswith(opened):
            response = response.lstrip().removeprefix(opened)
        turn = {"role": "assistant", "content": response}
        thoughts = thoughts.replace(opened, "").strip()
        scored = self.format.response_opening is not None and self.format.response_opening.scored
        return turn | {"reasoning_content": thoughts} if scored and thoughts else turn

    def _check_template(self) -> None:
        """
        Check that the chat template writes a prompt in full, and a complete chat like a prompt followed by its response.

        Raises:
            ValueError: If the template does not write all of a prompt, or if the complete chat differs from the prompt with
                a policy's own text.
        """
        for turns in ([_user(PROBE)], [_user("one"), self._answer(PROBE), _user(PROBE)]):
            try:
                opened = self._open(turns)
            except ValueError:
                if len(turns) > 1:  # the template allows one question only
                    continue
                raise
            if self._letters(self._text_ids(PROBE)) not in self._letters(opened):
                raise ValueError(
                    f"{self.tokenizer.name_or_path}: got a chat template that writes {self.tokenizer.decode(opened)!r} for a "
                    "longer prompt, need one that writes all of it, because the rest would not be read: fix the template."
                )
            whole = self._join(turns, PROBE)[0]
            head = self._head(opened)
            ends = self.markers.end_of_turn[:1]
            written = opened[:head] + self._response(opened[head:] + self._text_ids(PROBE) + ends)
            if self._letters(whole) != self._letters(written):
                raise ValueError(
                    f"{self.tokenizer.name_or_path}: got a chat template with which a complete chat ends in "
                    f"{self.tokenizer.decode(whole[head:])!r}, and a policy's own text in "
                    f"{self.tokenizer.decode(written[head:])!r}, need one form of both, because a text would have two rewards: "
                    "fix the template, or add the tokens that it writes around a response to the tokenizer."
                )

    def _letters(self, ids: list[int]) -> str:
        """Return the decoded text without white space, because a tokenizer may add some at the start."""
        return "".join(self.tokenizer.decode(ids).split())

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _fit(self, turns: list[dict], join: Callable[[list[dict]], tuple[list[int], int]]) -> Encoding:
        """Encode the turns with `join`, or as many of the last turns as fit."""
        whole = Encoding(*join(turns), cut_turns=0)
        return whole if len(whole.input_ids) <= self.max_length else self._shorten(turns, join)

    def _shorten(self, turns: list[dict], join_turns: Callable[[list[dict]], tuple[list[int], int]]) -> Encoding:
        head = turns[:1] if turns[0]["role"] == "system" else []
        starts = [i for i in range(len(head) + 1, len(turns)) if turns[i]["role"] == "user"]

        def join(start: int, cut: int = 0) -> tuple[list[int], int]:
            rest = turns[start:]
            if cut:
                rest = [{**rest[0], "content": rest[0]["content"][cut:]}, *rest[1:]]
            return join_turns(head + rest)

        def fits(start: int, cut: int = 0) -> bool:
            return len(join(start, cut)[0]) <= self.max_length

        kept = bisect_left(starts, True, key=fits)  # dropping more turns never makes a text longer, so bisection works
        if kept < len(starts):
            return Encoding(*join(starts[kept]), cut_turns=starts[kept] - len(head))

        last = starts[-1] if starts else len(head)
        text = turns[last]["content"] if last < len(turns) else ""
        cut = bisect_left(range(len(text)), True, key=lambda cut: fits(last, cut))  # in characters
        if cut >= len(text):
            shortest, prompt_length = join(last, max(len(text) - 1, 0))
            raise ValueError(
                f"got a response of {len(shortest) - prompt_length} tokens, which with the shortest form of its prompt "
                f"({prompt_length} tokens{', with the system turn' if head else ''}) exceeds max_length={self.max_length}; a "
                "response is never cut: raise max_length or drop the row."
            )
        return Encoding(*join(last, cut), cut_turns=last - len(head) + 1)


def _turns(prompt: list[dict] | str) -> list[dict]:
    turns = (
        [_user(prompt)]
        if isinstance(prompt, str)
        else [{**turn, "content": turn_text(turn, "prompt")} for turn in prompt]
    )
    if not turns:
        raise ValueError("got a prompt without turns, need at least one turn of the user.")
    return turns


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _around_pair(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]] | None:
    """
    Return the tokens that an encoder's tokenizer puts before, between and after two texts.

    Between them are one separator (BERT), two (RoBERTa), or the end of the text (T5). The result is None for a decoder's
    tokenizer, which puts nothing or the beginning of a text between them.
    """
    (first, second), pair = tokenizer(["a", "b"], add_special_tokens=False).input_ids, tokenizer("a", "b").input_ids
    for start in range(len(pair) - len(first) + 1):
        for middle in range(start + len(first), len(pair) - len(second) + 1):
            if pair[start : start + len(first)] == first and pair[middle : middle + len(second)] == second:
                between = pair[start + len(first) : middle]
                parts = tokenizer.sep_token_id in between or between == [tokenizer.eos_token_id]
                return (pair[:start], between, pair[middle + len(second) :]) if parts else None
    return None


def _shared(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix of two texts, in tokens."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
