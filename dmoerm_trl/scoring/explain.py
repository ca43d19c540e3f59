"""Explain the score of a response in the terminal, by capability point."""

import textwrap

from ..markdown import display_width, pad
from ..messages import one_line

_WIDTH = 96  # columns of the terminal that an explanation fills
_INDENT = 10  # columns of the names at the left
_LINES = 3  # lines of a prompt or a response before it is cut
_BAR = 24  # columns of the longest bar


def explanation(
    prompt_text: str,
    response: str,
    reward: float,
    route: str,
    route_probabilities: dict[str, float],
    capability_scores: dict[str, float],
) -> str:
    """
    Render why a response got its reward: the route, and the score of each expert on its capability point.

    The heads were trained one by one, so a score compares responses at one point, not the points of one response. The scores do
    not add up to the reward either: equation 6 aggregates the experts' embeddings, not their scores.

    Args:
        prompt_text (`str`): The prompt; only the end of a long one is shown.
        response (`str`): The response; only the beginning of a long one is shown.
        reward (`float`): The normalised reward.
        route (`str`): The task whose inner model scored the response.
        route_probabilities (`dict[str, float]`): Task -> the router's probability; empty if there is no router.
        capability_scores (`dict[str, float]`): Capability point -> score r_i of equation 4.

    Returns:
        `str`: Some lines of plain text, with the number of characters that were left out of long texts. Control characters are
        shown as spaces.

    Example:

    ```python
    from dmoerm_trl import describe, explanation, load_reward_model

    model, formatter = load_reward_model("runs/demo/model", max_length=512)
    (scores,) = describe(model, formatter, [([{"role": "user", "content": "Hello?"}], "Hi!")])
    print(explanation("Hello?", "Hi!", **scores))
    ```
    """
    lines = _field("prompt", prompt_text, keep_end=True) + _field("response", response)
    lines += _field("route", route) + _field("reward", f"{reward:+.3f}")
    for title, values, spec in (("task", route_probabilities, ".1%"), ("capability point", capability_scores, "+.3f")):
        if values:
            lines += ["", *_bars(title, values, spec)]
    return "\n".join(lines)


def _field(name: str, text: str, keep_end: bool = False) -> list[str]:
    """Render a name and some lines of a text, its beginning or end, with the number of characters left out."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    columns = _WIDTH - _INDENT
    characters = max(1, columns * len(text) // max(1, display_width(text)))  # that fill the columns on average
    kept = characters * _LINES
    left_out = len(text) - kept
    if left_out > 0:
        count = f"({left_out} more characters)"
        text = f"{count} … {text[-kept:]}" if keep_end else f"{text[:kept]} … {count}"
    first, *rest = textwrap.wrap(text, characters) or ["(empty)"]
    return [f"{name:<{_INDENT}}{first}", *(" " * _INDENT + line for line in rest)]


def _bars(title: str, values: dict[str, float], spec: str) -> list[str]:
    """Render a heading and one bar per value. A full bar is 1 or the largest absolute value; hatched bars are negative."""
    values = {one_line(name): value for name, value in values.items()}
    names = max(display_width(name) for name in (title, *values))
    scale = max(1.0, *(abs(value) for value in values.values()))
    lines = [title]
    for name, value in values.items():
        bar = ("█" if value >= 0 else "░") * round(_BAR * abs(value) / scale)
        lines.append(f"{pad(name, names)}  {format(value, spec):>7}  {bar}".rstrip())
    return lines
