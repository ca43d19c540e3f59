"""Splits by prompt: no prompt in two parts, exact sizes, the same whatever the order of the rows."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.data.splits import PARTS, split_rows, split_rows_beside_test


def row(prompt: str, task: str | None = "roleplay", responses: tuple[str, str] = ("a", "b")) -> PreferenceRow:
    return PreferenceRow([{"role": "user", "content": prompt}], list(responses), [1, 2], task)


def ids(rows: list[PreferenceRow]) -> set[str]:
    return {row.prompt_id for row in rows}


def test_sizes_are_the_shares_of_each_task():
    rows = [row(f"{task} {i}", task) for task in ("roleplay", "chitchat") for i in range(100)]
    split = split_rows(rows)
    for task in ("roleplay", "chitchat"):
        counts = {part: sum(row.task == task for row in split[part]) for part in PARTS}
        # 20 for the test; 48 and 32 for the phases, of which 4.8 and 3.2 validate
        assert counts == {
            "phase1_train": 43, "phase1_validation": 5, "phase3_train": 29, "phase3_validation": 3, "test": 20
        }  # fmt: skip


@pytest.mark.parametrize("test", [0.0, 0.2])
def test_rows_that_train_only_experts_take_no_place_in_the_other_parts(test):
    rows = [row(f"prompt {i}") for i in range(50)]
    tied = [
        PreferenceRow([{"role": "user", "content": f"more {i}"}], ["a", "b"], [1, 1], "roleplay") for i in range(200)
    ]
    alone, split = split_rows(rows, test=test), split_rows(tied[:100] + rows + tied[100:], test=test)
    assert {part: [row for row in split[part] if row.pairs_of()] for part in PARTS} == alone
    unranked = {part: sum(not row.pairs_of() for row in split[part]) for part in PARTS}
    assert {part: count for part, count in unranked.items() if count} == {"phase1_train": 180, "phase1_validation": 20}
    partly = PreferenceRow(rows[0].prompt, ["c", "d"], [1, 1], "roleplay")  # beside a ranked row of the same prompt
    assert [row.prompt_id for part in split_rows([*rows, partly], test=test).values() for row in part].count(
        partly.prompt_id
    ) == 2


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.dictionaries(st.integers(0, 999), st.sampled_from(["roleplay", "chitchat", None]), min_size=1),
    repeats=st.integers(1, 3),
    test=st.sampled_from([0.0, 0.2, 0.5]),
    validation=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_parts_share_no_prompt_and_hang_on_the_seed_alone(prompts, repeats, test, validation, seed, data):
    prompts |= {1000 + i: task for i, task in enumerate(["roleplay", "chitchat"] * 8)}
    rows = [row(f"prompt {i}", task, (f"a{n}", "b")) for i, task in prompts.items() for n in range(repeats)]
    split = split_rows(rows, test=test, validation=validation, seed=seed)
    assert tuple(split) == PARTS

    parts = [ids(split[part]) for part in PARTS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(prompts)  # no prompt in two parts, none lost
    assert sum(map(len, split.values())) == len(rows)
    assert (split["test"] == []) == (test == 0)
    for task, count in Counter(prompts.values()).items():
        sizes = {part: len(ids([row for row in split[part] if row.task == task])) for part in PARTS}
        phase1 = sizes["phase1_train"] + sizes["phase1_validation"]
        phase3 = sizes["phase3_train"] + sizes["phase3_validation"]
        assert abs(sizes["test"] - test * count) <= 1
        assert abs(phase1 - 0.6 * (phase1 + phase3)) <= 1
        assert abs(sizes["phase3_validation"] - validation * phase3) <= 1
        if task is not None:
            assert sizes["phase1_train"] and sizes["phase3_train"]
            assert not validation or (sizes["phase1_validation"] and sizes["phase3_validation"])

    shuffled = split_rows(data.draw(st.permutations(rows)), test=test, validation=validation, seed=seed)
    assert [ids(shuffled[part]) for part in PARTS] == parts


def test_seeds_differ_and_rows_keep_their_order():
    rows = [row(f"prompt {i:03d}") for i in range(50)]
    first, second = split_rows(rows, seed=0), split_rows(rows, seed=1)
    assert ids(first["test"]) != ids(second["test"])
    texts = [row.prompt[0]["content"] for row in first["phase1_train"]]
    assert texts == sorted(texts)


def test_case_and_white_space_do_not_make_another_prompt():
    rows = [row(f"prompt {i}") for i in range(20)] + [row(f"  Prompt\n{i} ") for i in range(20)]
    assert all(len(part) == 2 * len(ids(part)) for part in split_rows(rows).values())


def test_a_prompt_with_two_tasks_is_in_one_part():
    rows = [row(f"prompt {i}", task) for i in range(30) for task in ("roleplay", "chitchat")]
    split = split_rows(rows)
    assert sum(len(ids(part)) for part in split.values()) == 30


def test_a_task_with_too_few_prompts_is_an_error():
    enough = [row(f"prompt {i}") for i in range(20)]
    assert all(split_rows([*enough, *(row(f"chat {i}", "chitchat") for i in range(5))]).values())
    few = [row(f"chat {i}", "chitchat") for i in range(4)]
    with pytest.raises(
        ValueError, match=r"task 'chitchat': got 4 prompts.*none for phase3_validation.*need at least 5"
    ):
        split_rows([*enough, *few])
    split_rows(
        [*enough, row("something else", "others"), row("who knows", None)]
    )  # no inner model is trained on these


@pytest.mark.parametrize("shares", [{"test": 1.0}, {"phase1": 0.0}, {"validation": -0.1}])
def test_shares_out_of_range_are_errors(shares):
    with pytest.raises(ValueError, match=f"got {next(iter(shares))}="):
        split_rows([row("prompt")], **shares)


def test_test_rows_of_their_own_leave_the_training():
    rows = [row(f"prompt {i}") for i in range(40)]
    test_rows = [row(f"PROMPT {i}") for i in range(30, 50)]
    split, removed = split_rows_beside_test(rows, test_rows)
    assert removed == 10
    assert split["test"] == test_rows
    assert sum(len(split[part]) for part in PARTS[:-1]) == 30
    assert not ids(test_rows) & set.union(*(ids(split[part]) for part in PARTS[:-1]))
