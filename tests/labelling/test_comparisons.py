"""Which questions are asked: the points of a row, all pairs or some, and sorts that need fewer."""

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import TASKS, row

from dmoerm_trl.labelling.comparisons import Plan, agreed, both_orders, every_pair, insertion_bound, insertion_sort


def made(comparisons, better) -> list[tuple[tuple[int, int], int | None]]:
    """The comparisons that are made if `better(pair)` decides them, each with its outcome."""
    steps, verdicts = [], None
    while True:
        try:
            pairs = comparisons.send(verdicts)
        except StopIteration:
            return steps
        verdicts = [better(pair) for pair in pairs]
        steps += zip(pairs, verdicts, strict=True)


# Pairs.


@given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 5))
def test_every_pair_or_as_many_as_the_limit(count, limit, seed):
    every = [*combinations(range(count), 2)]
    (all_of_them,) = every_pair(range(count), random.Random(seed))
    (some,) = every_pair(range(count), random.Random(seed), limit)
    (more,) = every_pair(range(count), random.Random(seed), limit + 1)
    assert all_of_them == every
    assert len(some) == min(limit, len(every)) == len(set(some))
    assert set(some) <= set(more) <= set(every)


def test_drawn_pairs_are_drawn_evenly():
    drawn = [pair for seed in range(600) for pairs in every_pair(range(4), random.Random(seed), 2) for pair in pairs]
    assert all(150 < drawn.count(pair) < 250 for pair in combinations(range(4), 2))  # 200 expected


# Sorting.


@given(st.permutations(range(8)), st.integers(2, 8), st.integers(0, 5))
def test_a_sort_finds_the_order_with_few_comparisons(order, count, seed):
    order = [response for response in order if response < count]  # the best first
    steps = made(insertion_sort(range(count), random.Random(seed)), lambda pair: min(pair, key=order.index))
    assert len({pair for pair, _ in steps}) == len(steps) <= insertion_bound(count)
    labels = {(better, sum(pair) - better) for pair, better in steps}
    assert set(zip(order, order[1:], strict=False)) <= labels  # neighbours cannot be told apart otherwise


def test_the_most_comparisons_of_a_sort_worked_out_by_hand():
    """Placing one among 1, 2, 3, 4, ... takes 1, 2, 2, 3, 3, 3, 3, 4, ... comparisons."""
    assert [insertion_bound(count) for count in range(10)] == [0, 0, 1, 3, 5, 8, 11, 14, 17, 21]
    assert all(insertion_bound(count) < count * (count - 1) / 2 for count in range(4, 20))


@given(st.integers(0, 9), st.integers(0, 5))
def test_a_sort_without_any_agreement_compares_each_response_once_with_the_first(count, seed):
    steps = made(insertion_sort(range(count), random.Random(seed)), lambda pair: None)
    assert len(steps) == max(0, count - 1)
    if count > 1:
        assert set.intersection(*({*pair} for pair, _ in steps))


@given(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7))), st.integers(0, 5))
def test_where_a_sort_does_not_agree_it_goes_on_without_that_response(disagreed, seed):
    """Responses are as good as their index is low; some pairs have no winner."""
    steps = made(insertion_sort(range(8), random.Random(seed)), lambda pair: None if pair in disagreed else pair[0])
    left_out = set()
    for pair, better in steps:
        assert not left_out & {*pair}
        if better is None:  # the one of the two that was being placed is seen no more
            later = {response for other, _ in steps[steps.index((pair, better)) + 1 :] for response in other}
            left_out |= {*pair} - later
            assert {*pair} - later


# Rows.


@pytest.mark.parametrize(
    "settings, task, points",
    [
        ({}, "chitchat", ["empathy ability", "logic"]),
        ({}, "others", ["logic", "readability"]),
        ({"overall_points": True}, "chitchat", ["empathy ability", "logic", "readability"]),
        ({"overall_points": True}, "maths", ["correctness", "logic", "readability"]),
        ({"points": ["logic"]}, "chitchat", ["logic"]),
        ({"points": ["logic"]}, "maths", []),
        ({"without_task": "overall"}, None, ["logic", "readability"]),
    ],
)
def test_a_row_is_asked_about_at_the_points_of_its_task(settings, task, points):
    assert Plan(TASKS, **settings).points_of(row("a", "b", task=task)) == points


def test_a_point_with_labels_is_not_asked_about():
    labelled = row(
        "a", "b", task="chitchat", capability_ranks={"logic": [1, 2]}, capability_pairs={"empathy ability": []}
    )
    assert Plan(TASKS).wanted_points(labelled) == ["empathy ability", "logic"]
    assert Plan(TASKS).points_of(labelled) == []


def test_a_row_without_a_task_is_an_error_unless_told_otherwise():
    with pytest.raises(
        ValueError, match=r"a row without a task \(its prompt ends 'How much\?'\), need one.*without_task: overall"
    ):
        Plan(TASKS).points_of(row("a", "b", task=None))


@pytest.mark.parametrize("order", ["all", "sort"])
def test_a_text_is_not_compared_with_itself(order):
    plan = Plan(TASKS, order=order)
    steps = made(plan.comparisons(row("a", "b", "a", "b", "b"), "correctness"), min)
    assert [pair for pair, _ in steps] == [(0, 1)]
    assert plan.most_comparisons(row("a", "b", "a", "b", "b")) == 1


@pytest.mark.parametrize("settings", [{"max_pairs": 3}, {"order": "sort"}])
def test_the_pairs_depend_on_the_row_the_point_and_the_seed(settings):
    rows = [row(*"abcdef", prompt=f"{number}") for number in range(5)]

    def pairs(seed: int, point: str) -> list:
        plan = Plan(TASKS, seed=seed, **settings)
        return [[pair for pair, _ in made(plan.comparisons(row, point), min)] for row in rows]

    assert pairs(0, "logic") == pairs(0, "logic")
    assert len({repr(pairs(0, "logic")), repr(pairs(1, "logic")), repr(pairs(0, "readability"))}) == 3
    assert len({repr(of_row) for of_row in pairs(0, "logic")}) > 1


@pytest.mark.parametrize(
    "settings, most", [({}, 15), ({"max_pairs": 4}, 4), ({"max_pairs": 40}, 15), ({"order": "sort"}, 11)]
)
def test_the_most_comparisons_of_a_row(settings, most):
    plan = Plan(TASKS, **settings)
    assert plan.most_comparisons(row(*"abcdef")) == most
    assert len(made(plan.comparisons(row(*"abcdef"), "logic"), min)) <= most


def test_what_rows_before_took_of_a_prompts_pairs_is_not_drawn_again():
    plan, six = Plan(TASKS, max_pairs=4), row(*"abcdef")
    for taken, most in ((0, 4), (3, 1), (4, 0), (7, 0)):
        assert plan.most_comparisons(six, taken) == most == len(made(plan.comparisons(six, "logic", taken), min))
    assert Plan(TASKS).most_comparisons(six, 7) == 15


def test_both_orders_of_a_question_and_what_they_agree_on():
    first, swapped = both_orders(row("a", "b", "c"), (0, 2), "logic")
    assert (first.first, first.second, swapped.first, swapped.second) == ("a", "c", "c", "a")
    assert first.point == swapped.point == "logic" and first.task == "maths"
    decided = {(one, two): agreed((0, 2), one, two) for one in (1, 2, None) for two in (1, 2, None)}
    assert decided.pop((1, 2)) == 0 and decided.pop((2, 1)) == 2
    assert len(decided) == 7 and set(decided.values()) == {None}


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            {"points": ["logik"]},
            r"`points`: got \['logik'\].*need some of \['empathy ability', 'logic', 'correctness'",
        ),
        ({"order": "merge"}, "`order`: got 'merge', need 'all'"),
        ({"max_pairs": 0}, "`max_pairs`: got 0"),
        ({"max_pairs": 2, "order": "sort"}, "`max_pairs`: got 2 with `order: sort`"),
        ({"without_task": "drop"}, "`without_task`: got 'drop'"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings, says):
    with pytest.raises(ValueError, match=says):
        Plan(TASKS, **settings)
