"""The ensemble baselines: equations 8 to 10 on hand-computed numbers, and what must hold for any."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.scoring.aggregation import mean_reward, uncertainty_weighted_reward, worst_case_reward

REWARDS = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])  # (3 members, 2 responses)

members = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3), min_size=k, max_size=k)
)


def test_mean_by_hand():
    torch.testing.assert_close(mean_reward(REWARDS), torch.tensor([3.0, 1.0]))


def test_worst_case_by_hand():
    torch.testing.assert_close(worst_case_reward(REWARDS), torch.tensor([1.0, 0.0]))


def test_uncertainty_weighted_by_hand():
    # Population variances: ((1-3)^2 + (2-3)^2 + (6-3)^2) / 3 = 14/3 and (1 + 1 + 4) / 3 = 2.
    torch.testing.assert_close(uncertainty_weighted_reward(REWARDS), torch.tensor([3 - 7 / 3, 0.0]))
    torch.testing.assert_close(uncertainty_weighted_reward(REWARDS, coefficient=0.1), torch.tensor([3 - 1.4 / 3, 0.8]))


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3)])
def test_only_the_members_are_reduced(shape):
    rewards = torch.randn(shape)
    for aggregate in (mean_reward, worst_case_reward, uncertainty_weighted_reward):
        assert aggregate(rewards).shape == shape[1:]


@given(members)
def test_the_mean_is_the_upper_bound_and_members_may_be_in_any_order(values):
    rewards = torch.tensor(values, dtype=torch.float64)
    mean = mean_reward(rewards)
    assert (worst_case_reward(rewards) <= mean + 1e-9).all()
    assert (uncertainty_weighted_reward(rewards) <= mean + 1e-9).all()
    torch.testing.assert_close(uncertainty_weighted_reward(rewards, coefficient=0.0), mean)
    torch.testing.assert_close(uncertainty_weighted_reward(rewards.flip(0)), uncertainty_weighted_reward(rewards))


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=4), st.integers(1, 5))
def test_members_that_agree_give_their_own_reward(values, k):
    reward = torch.tensor(values, dtype=torch.float64)
    for aggregate in (mean_reward, worst_case_reward, uncertainty_weighted_reward):
        torch.testing.assert_close(aggregate(reward.expand(k, -1)), reward)


@pytest.mark.parametrize("shape", [(), (0, 4)])
def test_an_ensemble_without_members_is_an_error(shape):
    for aggregate in (mean_reward, worst_case_reward, uncertainty_weighted_reward):
        with pytest.raises(ValueError, match="need .members, .... with at least one member"):
            aggregate(torch.zeros(shape))
