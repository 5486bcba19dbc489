"""How to call the losses in a test of your own: arrays in, a number and its gradients out.

    pytest examples/losses_in_a_test.py

The one episode has a prompt of two tokens, a search of two, an observation of three and an answer
of two; one token is padding. All defaults are the paper's, so arrays are all that a call needs.
"""

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax.rl import stepwise_ppo_loss

ACTION = jnp.array([[0, 0, 1, 1, 0, 0, 0, 1, 1, 0]], bool)  # sampled by the policy
LOGPROBS = jnp.where(ACTION, -1.0, 0.0)  # [B=1, T=10]
VALUES = jnp.full((1, 10), 0.5)

EPISODE = dict(
    old_logprobs=LOGPROBS,  # of the policy that sampled
    ref_logprobs=LOGPROBS,  # of the policy before RL
    old_values=VALUES,
    entropy=jnp.zeros((1, 10)),
    token_mask=jnp.arange(10)[None] < 9,  # not padding
    action_mask=ACTION,
    turn_ids=jnp.array([[-1, -1, 0, 0, 0, 0, 0, 1, 1, -1]]),  # -1: prompt and padding
    group_ids=jnp.array([0]),  # episodes of one question share it
    search_end=jnp.array([[3, -1]]),  # [B, K=2]: the token that closes each turn's search
    step_rewards=jnp.array([[0.25, 0.0]]),  # [B, K]: information gain minus redundancy
    outcome_rewards=jnp.array([1.0]),  # [B]: answer and search keys
)


def test_step_rewards_reach_the_tokens_of_their_search_and_none_of_the_observation():
    def loss(logprobs, step_rewards):
        arrays = EPISODE | dict(step_rewards=step_rewards)
        return stepwise_ppo_loss(
            logprobs=logprobs, values=VALUES, whiten_advantages=False, **arrays
        )[0]

    gradient = jax.grad(loss)
    with_reward = gradient(LOGPROBS, EPISODE["step_rewards"])
    without = gradient(LOGPROBS, jnp.zeros((1, 2)))
    # The loss is a mean over four action tokens, so a reward of 0.25 pushes each of the search's
    # two tokens by a quarter of it. The answer comes later, and the observation is not sampled.
    expected = [0, 0, -0.25 / 4, -0.25 / 4, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(with_reward - without, [expected], atol=1e-6)


def test_a_perfect_value_model_has_no_value_loss():
    returns = jnp.where(jnp.arange(10) < 7, 1.25, 1.0)[None]  # undiscounted, as in the paper
    perfect = EPISODE | dict(old_values=returns)
    _, metrics = stepwise_ppo_loss(logprobs=LOGPROBS, values=returns, **perfect)
    np.testing.assert_allclose(metrics["value_loss"], 0, atol=1e-10)
    assert metrics["reward"] == 1.25
