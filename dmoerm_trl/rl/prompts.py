"""The prompts of a run: those that the policy is optimised on, and others on which it is measured."""

import hashlib
from collections.abc import Sequence

from ..data.formatting import Formatter
from ..data.rows import PreferenceRow
from ..evaluation.response_files import read_prompts


def load_prompts(
    prompts: str,
    formatter: Formatter,
    *,
    max_prompt_length: int,
    eval_prompts: str | None = None,
    reward_prompts: str | None = None,
    held_out: int = 100,
    seed: int = 0,
) -> tuple[list[dict], list[dict]]:
    """
    Reads the prompts of a run from files of prompts or of preference rows, and prints what became of them.

    The paper's appendix D.3 draws the reward model's training, the optimisation and the evaluation from different sets.
    With AlignBench for evaluation, PPO I is `prompts="alignbench.jsonl"`, of which `held_out` are split off, and PPO II is
    `prompts="ours.jsonl", eval_prompts="alignbench.jsonl"`; `reward_prompts` is what the reward model was trained on.

    Args:
        prompts (`str`): file of the prompts to optimise on, as of
            [`~dmoerm_trl.evaluation.response_files.read_prompts`].
        formatter (`Formatter`): with the policy's tokenizer.
        max_prompt_length (`int`): tokens. Longer prompts are left out and counted, since cutting them would have the
            reward model judge another conversation than was had.
        eval_prompts (`str`, *optional*): file of the prompts to measure on; without it they are split off from `prompts`.
        reward_prompts (`str`, *optional*): file of the prompts that the reward model was trained on, to check that none
            recurs.
        held_out (`int`): how many prompts to measure on; `monitor_prompts` of a recipe.

    Returns:
        A row with `prompt` for each prompt to optimise on, and for each of at most `held_out` prompts to measure on.

    Raises:
        ValueError: if sets that must not share a prompt do, or one is empty.
    """
    if max_prompt_length < 1 or held_out < 1:
        raise ValueError(
            f"got max_prompt_length={max_prompt_length} and {held_out} prompts to measure on, need at least 1 of each: raise "
            "`max_prompt_length` or `monitor_prompts`."
        )

    def read(path: str) -> list[dict]:
        unique = list({prompt_id(row): row for row in reversed(read_prompts(path))}.values())[::-1]
        try:
            fitting = [row for row in unique if formatter.prompt_length(row["prompt"]) <= max_prompt_length]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        print(f"{path}: {len(unique)} prompts, {len(unique) - len(fitting)} left out: over {max_prompt_length} tokens")
        return fitting

    optimised = read(prompts)
    if eval_prompts is None:
        measured, optimised = split_off(optimised, held_out, seed=seed)
    else:
        measured, _ = split_off(read(eval_prompts), held_out, seed=seed)
    sets = {"the prompts to optimise on": optimised, "the prompts to measure on": measured}
    if reward_prompts is not None:
        sets["the reward model's training prompts"] = read_prompts(reward_prompts)
    check_disjoint(sets)
    for name, rows in sets.items():
        print(f"{name}: {len(rows)}")
        if not rows:
            raise ValueError(f"got no rows left for {name}, need some: raise max_prompt_length or lower held_out.")
    return optimised, measured


def split_off(rows: Sequence[dict], count: int, *, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """
    The rows of `count` prompts, and the other rows. Which prompts they are hangs on the seed and the prompts alone, not on
    the order of the rows, and no prompt is in both.
    """
    ids = sorted(map(prompt_id, rows), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    chosen = set(list(dict.fromkeys(ids))[:count])
    return [row for row in rows if prompt_id(row) in chosen], [row for row in rows if prompt_id(row) not in chosen]


def check_disjoint(sets: dict[str, Sequence[dict]]) -> None:
    """
    Raises:
        ValueError: if a prompt is in two of the named sets, case and white space aside.
    """
    seen: dict[str, str] = {}
    for name, rows in sets.items():
        ids = {prompt_id(row): row for row in rows}
        if shared := [shared_id for shared_id in ids if shared_id in seen]:
            example = ids[shared[0]]["prompt"][-1]["content"][:80]
            raise ValueError(
                f"got {len(shared)} prompts that are both in {seen[shared[0]]} and in {name} (such as {example!r}), need sets "
                "without a prompt in common, because on a prompt seen before neither reward model nor policy shows what it "
                "does on new ones: take them out of one of the sets."
            )
        seen |= dict.fromkeys(ids, name)


def prompt_id(row: dict) -> str:
    """See [`~dmoerm_trl.data.rows.PreferenceRow.prompt_id`]."""
    return PreferenceRow(row["prompt"], [], []).prompt_id
