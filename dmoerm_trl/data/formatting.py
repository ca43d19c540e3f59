"""The one formatter that turns messages into tokens: for training, evaluation, scoring and serving alike."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .rows import PreferenceRow


class Encoding(NamedTuple):
    """One prompt with one response as tokens, special tokens included."""

    input_ids: list[int]
    """Prompt, response and the token that ends it, without padding; at most `max_length` tokens."""
    prompt_length: int
    """`input_ids[:prompt_length]` are the prompt: what a policy is given before it writes the response."""
    cut_turns: int
    """How many turns of the prompt were dropped, plus one if the last user turn was shortened. 0: nothing was cut."""


@dataclass
class CutReport:
    """How many of the encoded rows and responses lost turns of their prompt because they were over-long."""

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


class ChatMarkers(NamedTuple):
    """What a chat template writes around an assistant's turn, as token ids."""

    response_marker: list[int]
    """The tokens right before the assistant's text, without white space at their end; empty without a template."""
    end_of_turn: list[int]
    """The single tokens that end an assistant's turn; the first is the one the template writes."""


class Formatter:
    """
    Encodes prompts with responses.

    - With a chat template: the template's generation prompt, the response, the end-of-turn token. The response is
      tokenised apart from the prompt, so the ids are those a policy's rollout concatenates. Text that spells a special
      token stays text, in the prompt as in the response.
    - Without one, a decoder: `[bos] prompt response eos`, the prompt's turns joined by blank lines.
    - Without one, an encoder such as BERT: `[CLS] prompt [SEP] response [SEP]`.

    What is over-long loses the oldest turns of its prompt: whole turns, up to a turn of the user, while a leading system
    turn stays. If the last user turn alone is too long, it loses its start. The response is never cut.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the reward model, with a pad token.
        max_length (`int`):
            The greatest length of `input_ids`, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no pad token, need one because responses are batched: set "
                "tokenizer.pad_token = tokenizer.eos_token."
            )
        if max_length < 1:
            raise ValueError(f"got max_length={max_length}, need at least 1 token.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.markers = chat_markers(tokenizer)
        begins = tokenizer("").input_ids[:1]
        self._bos = begins if begins == [tokenizer.bos_token_id] else []
        self._is_encoder = tokenizer.sep_token_id is not None and begins == [tokenizer.cls_token_id]

    def encode(self, prompt: list[dict] | str, response: str) -> Encoding:
        """
        Encodes one prompt with one response.

        Args:
            prompt (`list[dict]` or `str`):
                Turns with `role` and `content`, oldest first; text is one turn of the user.
            response (`str`):
                The assistant's answer; may be empty.

        Raises:
            `ValueError`: If the response does not fit beside the shortest form of the prompt, or the chat template
                refuses the prompt.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not turns:
            raise ValueError("got a prompt without turns, need at least one turn of the user.")
        whole = Encoding(*self._join(turns, response), cut_turns=0)
        return whole if len(whole.input_ids) <= self.max_length else self._shorten(turns, response)

    def prompt_length(self, prompt: list[dict]) -> int:
        """Tokens of a whole prompt, up to where the response begins, even if they are more than `max_length`."""
        return self._join(prompt, "")[1]

    def encode_responses(self, prompt: list[dict] | str, responses: Sequence[str]) -> list[Encoding]:
        """What [`encode`] gives for each response; a chat template renders the prompt once for all of them."""
        if not self.tokenizer.chat_template:
            return [self.encode(prompt, response) for response in responses]
        empty = self.encode(prompt, "")
        head, end = empty.input_ids[: empty.prompt_length], empty.input_ids[empty.prompt_length :]
        encodings = []
        for response, text in zip(responses, self._text_ids(list(responses)), strict=True):
            fits = not empty.cut_turns and len(head) + len(text) + len(end) <= self.max_length
            encodings.append(Encoding(head + text + end, len(head), 0) if fits else self.encode(prompt, response))
        return encodings

    def encode_rows(self, rows: Sequence[PreferenceRow]) -> tuple[list[list[Encoding]], CutReport]:
        """
        Encodes every response of every row.

        Returns:
            One list of encodings a row, in the order of `row.responses`, and a [`CutReport`] to print.
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

    def _join(self, turns: list[dict], response: str) -> tuple[list[int], int]:
        """The uncut ids, and how many of them are the prompt."""
        if self.tokenizer.chat_template:
            prompt_ids = _apply(self.tokenizer, turns, add_generation_prompt=True)
            return prompt_ids + self._text_ids(response) + self.markers.end_of_turn[:1], len(prompt_ids)
        text = "\n\n".join(turn["content"] for turn in turns)
        if self._is_encoder:
            ids = self.tokenizer(text, response, split_special_tokens=True).input_ids
            return ids, ids.index(self.tokenizer.sep_token_id) + 1
        prompt_ids = self._bos + self._text_ids(text)
        return prompt_ids + self._text_ids(response) + self.markers.end_of_turn[:1], len(prompt_ids)

    def _text_ids(self, text: str | list[str]) -> list[Any]:
        """The ids of a text, or those of each of several."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _shorten(self, turns: list[dict], response: str) -> Encoding:
        head = turns[:1] if turns[0]["role"] == "system" else []
        starts = [i for i in range(len(head) + 1, len(turns)) if turns[i]["role"] == "user"]

        def join(start: int, cut: int = 0) -> tuple[list[int], int]:
            rest = turns[start:]
            if cut:
                rest = [{**rest[0], "content": rest[0]["content"][cut:]}, *rest[1:]]
            return self._join(head + rest, response)

        def fits(start: int, cut: int = 0) -> bool:
            return len(join(start, cut)[0]) <= self.max_length

        kept = bisect_left(starts, True, key=fits)  # dropping more never makes it longer, so halving finds the first
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
                "response is never cut: raise max_length or leave the row out."
            )
        return Encoding(*join(last, cut), cut_turns=last - len(head) + 1)


def chat_markers(tokenizer: PreTrainedTokenizerBase) -> ChatMarkers:
    """
    Reads off the tokenizer's chat template how an assistant's turn begins and ends, by rendering short chats.

    `response_marker` is what `add_generation_prompt` appends, such as `<|im_start|>assistant`. If that is nothing (the
    templates of Mistral), it is what stands between a user's text and the assistant's, from its last special token on,
    such as `[/INST]`. White space at its end is left off, because it may merge with the response's first token when a
    chat is tokenised as one text. `end_of_turn` is the first token after the assistant's text, and the tokenizer's eos.
    """
    if not tokenizer.chat_template:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        return ChatMarkers([], [] if end is None else [end])

    def render(*contents: str, **kwargs) -> list[int]:
        roles = ("user", "assistant")
        return _apply(tokenizer, [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], **kwargs)

    question, prompt = render("one"), render("one", add_generation_prompt=True)
    marker = prompt[len(_common_prefix(question, prompt)) :]
    if not marker:
        before = [_common_prefix(render(user, "one"), render(user, "six")) for user in ("one", "six")]
        marker = _common_prefix(before[0][::-1], before[1][::-1])[::-1]
        special = [i for i, token in enumerate(marker) if token in tokenizer.added_tokens_decoder]
        marker = marker[special[-1] :] if special else marker
    while marker and _is_space(tokenizer, marker[-1]):
        marker.pop()

    after = _common_prefix(render("one", "one")[::-1], render("one", "six")[::-1])[::-1]
    end = [token for token in after if not _is_space(tokenizer, token)][:1]
    end += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return ChatMarkers(marker, list(dict.fromkeys(end)))


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict], **kwargs) -> list[int]:
    """The ids of the rendered chat, in which text that spells a special token is text."""
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, sanitize_control_tokens=True, **kwargs)
    except TemplateError as error:
        roles = [turn["role"] for turn in turns]
        raise ValueError(
            f"got a prompt with turns of {roles}, which the tokenizer's chat template refuses ({error}): change the turns "
            "or the template."
        ) from error


def _common_prefix(first: list[int], second: list[int]) -> list[int]:
    return [pair[0] for pair in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def _is_space(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not tokenizer.decode([token]).strip()
