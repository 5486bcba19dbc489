"""Checks of a config that need no files: choices, ranges, and keys that must fit together."""

from __future__ import annotations

import math

import ml_collections
from jax.sharding import Mesh

from stepsearch_jax import sharding
from stepsearch_jax.choices import CHOICES, CRITIC_ESTIMATORS, GROUP_ESTIMATORS, check_choice
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.run.folder import flatten
from stepsearch_jax.run.settings import LENGTH_GROUPS
from stepsearch_jax.search.bm25 import check_settings

# Ranges of numbers -> keys: ("(", 0, 1, "]") excludes 0 and includes 1. inf is included where it
# means "no limit".
RANGES = {
    ("[", 0, math.inf, ")"): (
        "seed",
        "iterations",
        "data.train_questions",
        "data.atlas.seed",
        "search.backoff_s",
        "model.vocab_size",
        "model.norm_eps",
        "model.previous_token_peak",
        "rollout.temperature",
        "rollout.top_k",
        "rollout.slots",
        "reward.gamma_key",
        "reward.step_scale",
        "reward.search_cost",
        "reward.retrieved_answer_credit",
        "rl.entropy_coef",
        "rl.kl_coef",
        "rl.kl_target",
        "rl.microbatch_size",
        "policy.learning_rate",
        "value.learning_rate",
        "policy.weight_decay",
        "value.weight_decay",
        "sft.decision_weights.good",
        "sft.decision_weights.vague",
        "sft.decision_weights.repeat",
        "sft.decision_weights.wrong",
        "sft.decision_weights.early",
        "evaluation.questions",
        "evaluation.every",
        "evaluation.resamples",
        "checkpoint.minutes",
    ),
    ("[", 1, math.inf, ")"): (
        "prompt.max_prompt_tokens",
        "search.attempts",
        "search.batch",
        "search.k",
        "search.encode_batch",
        "search.max_observation_tokens",
        "model.num_layers",
        "model.embed_dim",
        "model.num_heads",
        "model.num_kv_heads",
        "model.head_dim",
        "model.ffn_dim",
        "rollout.prompts",
        "rollout.group_size",
        "rollout.max_turns",
        "rollout.max_turn_tokens",
        "rollout.prefill_rows",
        "rollout.prefill_tokens",
        "rollout.attention_block",
        "rl.kl_horizon",
        "rl.minibatches",
        "rl.ppo_epochs",
        "rl.max_skipped_in_a_row",
        "rl.width_buckets",
        "sft.demonstrations",
        "sft.held_out",
        "sft.log_every",
        "checkpoint.every",
        "checkpoint.sft_every",
        "checkpoint.keep",
    ),
    ("(", 0, math.inf, ")"): ("search.timeout_s", "model.rope_theta", "model.rope_scaling.factor"),
    ("[", 0, math.inf, "]"): ("rl.clip_low", "rl.clip_high", "rl.value_clip", "rl.max_ratio"),
    ("(", 0, math.inf, "]"): ("policy.max_grad_norm", "value.max_grad_norm"),
    ("[", 0, 1, "]"): (
        "search.max_failure_fraction",
        "rl.gamma",
        "rl.gae_lambda",
        "policy.warmup",
        "value.warmup",
        "sft.known_fraction",
    ),
    ("[", 0, 1, ")"): ("policy.b1", "policy.b2", "value.b1", "value.b2"),
    ("(", 0, 1, "]"): ("rollout.flush_fraction", "rollout.top_p"),
}
NUMBERS = ("(", -math.inf, math.inf, ")")  # range of all other numbers

# Logical axes of the parameters -> sizes of the model along them.
AXIS_SIZES = {
    "vocab": ("vocab_size",),
    "embed": ("embed_dim",),
    "heads": ("num_heads",),
    "kv_heads": ("num_kv_heads",),
    "head_dim": ("head_dim",),
    "ffn": ("ffn_dim",),
    "norm": ("embed_dim", "head_dim"),
    "layers": ("num_layers",),
}


def check_config(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError for values that mean nothing, and for keys that do not fit together.

    The first fault found is reported: choices and ranges of all keys, then section by section.
    """
    _check_values(config)
    _check_search(config.search, config.rollout)
    _check_model(config.model, config.sft)
    _check_sft(config.sft, config.prompt)
    _check_batches(config.rollout, config.rl, sharding.row_shards(mesh))
    _check_rl(config.rl, config.rollout, config.reward)
    _check_sft_batches(config.sft, sharding.row_shards(mesh))
    _check_context(config.rollout, config.prompt, config.search)


def _check_values(config: ml_collections.ConfigDict) -> None:
    """Each key by itself: the words of a choice, and the range of a number."""
    values = flatten(config.to_dict())
    for key in CHOICES:
        check_choice(key, values[key])
    check_settings(config.search.bm25_k1, config.search.bm25_b)
    ranges = {key: bounds for bounds, keys in RANGES.items() for key in keys}
    for key, value in values.items():
        if not isinstance(value, int | float):
            continue
        below, least, greatest, above = ranges.get(key, NUMBERS)
        open_ends = [least] * (below == "(") + [greatest] * (above == ")")
        inside = least <= value <= greatest  # false for NaN
        if not inside or value in open_ends:
            raise ValueError(
                f"config.{key} is {value}; it must lie in {below}{least}, {greatest}{above}"
            )


def _check_search(search_config, rollout_config) -> None:
    # A dense index runs programs on the device and needs an encoder.
    if search_config.kind == "dense" and rollout_config.search != "host":
        raise ValueError(
            "search.kind=dense runs programs on the device, which a callback from inside one must "
            f"not; rollout.search is {rollout_config.search!r}: set it to host"
        )
    if search_config.kind == "dense" and not search_config.encoder:
        raise ValueError(
            "search.kind=dense needs search.encoder, the folder of an encoder (config.json, "
            "*.safetensors, tokenizer.json)"
        )
    # All requests of a remote search, with the pauses between them, end before its time limit.
    requests_s = 2 * search_config.attempts * search_config.attempt_s
    pauses_s = (2 ** (search_config.attempts - 1) - 1) * search_config.backoff_s
    longest = requests_s + pauses_s
    if search_config.kind == "remote" and not 0 < longest < search_config.timeout_s:
        raise ValueError(
            f"search.attempts={search_config.attempts} requests of search.attempt_s="
            f"{search_config.attempt_s} for connection and answer each, with pauses from "
            f"search.backoff_s={search_config.backoff_s} on, take {longest:g} s; "
            f"search.timeout_s={search_config.timeout_s} must be more, and they more than 0"
        )


def _check_model(model_config, sft_config) -> None:
    # Heads and rotary positions.
    if model_config.num_heads % model_config.num_kv_heads or model_config.head_dim % 2:
        raise ValueError(
            f"model.num_heads={model_config.num_heads} must be a multiple of "
            f"model.num_kv_heads={model_config.num_kv_heads}, and "
            f"model.head_dim={model_config.head_dim} even"
        )
    scaling = model_config.rope_scaling
    if scaling.kind in ("llama3", "yarn") and not (
        0 < scaling.slow < scaling.fast and scaling.original_context > 0
    ):
        raise ValueError(
            f"model.rope_scaling.kind={scaling.kind} mixes frequencies between "
            f"slow={scaling.slow} and fast={scaling.fast} turns in "
            f"original_context={scaling.original_context} tokens: all must be more than 0, and "
            "slow less than fast"
        )
    # Initial parameters come from one source only.
    if model_config.previous_token_peak and not model_config.qkv_bias:
        raise ValueError(
            f"model.previous_token_peak={model_config.previous_token_peak} is set by biases of "
            "queries and keys: set model.qkv_bias to True, or it to 0"
        )
    if model_config.checkpoint and (sft_config.checkpoint or model_config.previous_token_peak):
        raise ValueError(
            "config.model.checkpoint gives the policy its parameters; sft.checkpoint must be "
            "empty, and model.previous_token_peak 0"
        )


def _check_sft(sft_config, prompt_config) -> None:
    for phase in sft_config.phases:
        if (
            len(phase) != 5
            or phase[0] < 1
            or phase[1] < 1
            or not 0 <= phase[3] <= 1
            or not 0 <= phase[4] < math.inf
        ):
            raise ValueError(
                f"sft.phases holds {tuple(phase)}; a phase is (steps, rows, single hops, poor "
                "fraction, learning rate)"
            )
    if sft_config.phases and sft_config.demonstrations < LENGTH_GROUPS:
        raise ValueError(
            f"sft.demonstrations={sft_config.demonstrations} cannot be cut into the "
            f"{LENGTH_GROUPS} groups of equal length that minibatches come from: make it at least "
            f"{LENGTH_GROUPS}"
        )
    if sft_config.phases and sft_config.rename and prompt_config.tokenizer != "atlas":
        raise ValueError(
            "sft.rename=True exchanges the words of names, which only prompt.tokenizer=atlas has "
            f"whole; it is {prompt_config.tokenizer}: set sft.rename to False"
        )
    if not sum(dict(sft_config.decision_weights).values()) > 0:
        raise ValueError(
            "config.sft.decision_weights are all 0: set at least one of them above 0, so that the "
            "script can decide"
        )


def _check_batches(rollout_config, rl_config, shards: int) -> None:
    # Minibatches, slots and microbatches are split evenly over the mesh shards.
    episodes = rollout_config.prompts * rollout_config.group_size
    if episodes % (shards * rl_config.minibatches):
        raise ValueError(
            f"{episodes} episodes an iteration (rollout.prompts x rollout.group_size) cannot be "
            f"cut into {shards} mesh shards (mesh.data x mesh.fsdp) times {rl_config.minibatches} "
            "minibatches: make the product a divisor of the episodes"
        )
    if rollout_config.slots > episodes or rollout_config.slots % shards:
        raise ValueError(
            f"rollout.slots={rollout_config.slots} must be 0 (all), or a multiple of the {shards} "
            f"mesh shards (mesh.data x mesh.fsdp) up to the {episodes} episodes of an iteration"
        )
    rows, size = episodes // rl_config.minibatches, rl_config.microbatch_size
    if size and rows % size or size % shards:
        raise ValueError(
            f"rl.microbatch_size={size} must be a multiple of the {shards} mesh shards and divide "
            f"the {rows} rows of a minibatch"
        )


def _check_rl(rl_config, rollout_config, reward_config) -> None:
    # Advantages within groups need groups; ratios are cut above the clipping range only.
    if rl_config.advantage in GROUP_ESTIMATORS and rollout_config.group_size < 2:
        raise ValueError(
            f"rl.advantage={rl_config.advantage} compares the episodes of one question, but "
            f"rollout.group_size is {rollout_config.group_size}: set it to 2 or more (and lower "
            f"rollout.prompts by as much), or rl.advantage to {' or '.join(CRITIC_ESTIMATORS)}"
        )
    if rl_config.old_logprobs == "sampler" and not rl_config.max_ratio >= 1 + rl_config.clip_high:
        raise ValueError(
            f"rl.max_ratio={rl_config.max_ratio} must be at least 1 + rl.clip_high="
            f"{1 + rl_config.clip_high:g}, above which ratios are clipped anyway"
        )
    # Rewards: estimators that divide by the group's deviation take no KL in them; shuffling needs
    # two episodes.
    normalises = rl_config.advantage in ("grpo", "turn_return")
    if normalises and rl_config.kl_placement == "reward" and rl_config.kl_coef > 0:
        raise ValueError(
            f"rl.advantage={rl_config.advantage} divides rewards by their deviation within a "
            "group, and the KL in them too: where all episodes earn the same it would be all that "
            "is learned from. Set rl.kl_placement to loss and rl.kl_estimator to k3, or "
            "rl.kl_coef to 0"
        )
    if not reward_config.use_gain and reward_config.step_reward != "gain":
        raise ValueError(
            "reward.use_gain=False leaves nothing of "
            f"reward.step_reward={reward_config.step_reward}: set one of them back"
        )
    if reward_config.shuffle and rollout_config.prompts * rollout_config.group_size < 2:
        raise ValueError(
            "reward.shuffle gives every episode another one's rewards, but an iteration has one "
            "episode (rollout.prompts x rollout.group_size)"
        )
    # The KL penalty must be able to act.
    if rl_config.kl_target > 0 and rl_config.kl_coef == 0:
        raise ValueError(
            f"rl.kl_target={rl_config.kl_target} is approached by multiplying rl.kl_coef, which is "
            "0 and would stay so: set it above 0, such as 0.001, or rl.kl_target to 0"
        )
    in_loss = rl_config.kl_placement == "loss"
    if in_loss and rl_config.kl_estimator == "k1" and rl_config.kl_coef > 0:
        raise ValueError(
            "rl.kl_estimator=k1 has no gradient in expectation, so rl.kl_placement=loss would "
            "have no effect: take k2 or k3, or rl.kl_placement=reward"
        )
    if rl_config.over_observations and rl_config.advantage != "gae":
        raise ValueError(
            "rl.over_observations=True widens token GAE, but rl.advantage is "
            f"{rl_config.advantage}: set it to gae, or rl.over_observations to False"
        )


def _check_sft_batches(sft_config, shards: int) -> None:
    if not sft_config.phases:
        return
    for rows in (*(phase[1] for phase in sft_config.phases), sft_config.held_out):
        if rows % shards:
            raise ValueError(
                f"{rows} rows of supervised fine-tuning (sft.phases, sft.held_out) cannot be cut "
                f"into {shards} mesh shards (mesh.data x mesh.fsdp): make them a multiple"
            )


def _check_context(rollout_config, prompt_config, search_config) -> None:
    needed = (
        prompt_config.max_prompt_tokens
        + rollout_config.max_turn_tokens
        + search_config.max_observation_tokens
    )
    if rollout_config.context < needed:
        raise ValueError(
            f"rollout.context={rollout_config.context} has no room for one prompt, one turn and "
            f"one observation ({needed} tokens): raise it, or lower prompt.max_prompt_tokens, "
            "rollout.max_turn_tokens or search.max_observation_tokens"
        )


def check_cuts(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError if mesh.train_rules or the rollout's rules cannot shard this model."""
    known = (*sharding.AXES, None)
    for name, axis in config.mesh.train_rules.items():
        if axis not in known:
            raise ValueError(
                f"config.mesh.train_rules.{name} is {axis!r}; it must be "
                f"{' or '.join(map(str, known))}"
            )
    for rules in (config.mesh.train_rules, sharding.ROLLOUT_RULES):
        for name, axis in rules.items():
            for size in (getattr(model, field) for field in (AXIS_SIZES[name] if axis else ())):
                if size % mesh.shape[axis]:
                    raise ValueError(
                        f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} axis "
                        f"of {size}, which the mesh cuts over it: make it a divisor of {size}"
                    )


def check_sampling(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if RL could not learn from what the rollout samples.

    Not needed for evaluation, which is always greedy.
    """
    rollout_config, rl_config = config.rollout, config.rl
    if not config.iterations:
        return
    if rollout_config.temperature == 0:
        raise ValueError(
            "config.rollout.temperature is 0, so all episodes of a question are the same and "
            "nothing new is tried: set it to 1 to train (evaluation is greedy in any case)"
        )
    sampling = rollout_config.temperature, rollout_config.top_k, rollout_config.top_p
    if rl_config.old_logprobs == "sampler" and sampling != (1, 0, 1):
        raise ValueError(
            "rl.old_logprobs=sampler needs tokens drawn with the recorded log-probabilities, those "
            "of temperature 1 over the whole vocabulary: "
            f"rollout.temperature={rollout_config.temperature}, top_k={rollout_config.top_k}, "
            f"top_p={rollout_config.top_p} must be 1, 0 and 1, or rl.old_logprobs learner"
        )
