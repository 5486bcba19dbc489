"""What can be wrong with a config, found before any file is read."""

from __future__ import annotations

import math

import ml_collections
from jax.sharding import Mesh

from stepsearch_jax import sharding
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.rl.advantages import CRITIC_ESTIMATORS, GROUP_ESTIMATORS
from stepsearch_jax.run.folder import flatten
from stepsearch_jax.run.settings import LENGTH_GROUPS
from stepsearch_jax.search.bm25 import check_settings
from stepsearch_jax.search.embeddings import DTYPES

CHOICES = {  # keys whose value is one of a few words, checked before anything else
    "rollout.search": ("callback", "host"),
    "rollout.dtype": ("float32", "bfloat16"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "layers"),
    "model.rope_scaling.kind": ("none", "linear", "llama3", "yarn"),
    "reward.answer_gate": ("strict", "ends_with_answer"),
    "reward.format_failure": ("zero_answer", "minus_one"),
    "reward.key_match": ("max", "overwrite"),
    "reward.redundancy_scope": ("earlier_turns", "rendered"),
    "reward.tfidf_fit": ("corpus", "pair"),
    "reward.placement": ("step", "merged"),
    "reward.step_reward": ("gain", "answer_logprob"),
    "rl.advantage": (*CRITIC_ESTIMATORS, *GROUP_ESTIMATORS),
    "rl.aggregation": ("token_mean", "sequence_mean"),
    "rl.kl_placement": ("reward", "loss"),
    "rl.kl_estimator": ("k1", "k2", "k3", "abs"),
    "rl.old_logprobs": ("learner", "sampler"),
    "policy.optimizer": ("adamw", "sgd"),
    "value.optimizer": ("adamw", "sgd"),
    "imitation.optimizer": ("adamw", "muon"),
    "search.kind": ("bm25", "dense", "remote"),
    "search.embedding_dtype": DTYPES,
}

RANGES = {  # where numbers lie, as mathematics writes it: ("(", 0, 1, "]") is without 0; inf is allowed where it means something: that nothing is cut off
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
        "rl.micro_rows",
        "policy.learning_rate",
        "value.learning_rate",
        "policy.weight_decay",
        "value.weight_decay",
        "imitation.weight_decay",
        "imitation.warmup_steps",
        "imitation.shares.good",
        "imitation.shares.vague",
        "imitation.shares.repeat",
        "imitation.shares.wrong",
        "imitation.shares.early",
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
        "rollout.questions",
        "rollout.group_size",
        "rollout.max_turns",
        "rollout.max_turn_tokens",
        "rollout.prefill_rows",
        "rollout.prefill_tokens",
        "rollout.attention_block",
        "rl.kl_horizon",
        "rl.minibatches",
        "rl.epochs",
        "rl.length_multiple",
        "imitation.demonstrations",
        "imitation.held_out",
        "imitation.log_every",
        "checkpoint.every",
        "checkpoint.imitation_every",
        "checkpoint.keep",
    ),
    ("(", 0, math.inf, ")"): ("search.timeout_s", "model.rope_theta", "model.rope_scaling.factor"),
    ("[", 0, math.inf, "]"): ("rl.clip_low", "rl.clip_high", "rl.value_clip", "rl.max_ratio"),
    ("(", 0, math.inf, "]"): (
        "policy.max_grad_norm",
        "value.max_grad_norm",
        "imitation.max_grad_norm",
    ),
    ("[", 0, 1, "]"): (
        "search.max_failure_share",
        "rl.gamma",
        "rl.gae_lambda",
        "policy.warmup",
        "value.warmup",
        "imitation.skill",
        "imitation.final_share",
    ),
    ("[", 0, 1, ")"): ("policy.b1", "policy.b2", "value.b1", "value.b2", "imitation.b2"),
    ("(", 0, 1, "]"): ("rollout.flush_share", "rollout.top_p"),
}
NUMBERS = ("(", -math.inf, math.inf, ")")  # where all others lie

AXIS_SIZES = {  # logical axes of the parameters -> the sizes of a model that lie along them
    "vocab": ("vocab_size",),
    "embed": ("embed_dim",),
    "heads": ("num_heads",),
    "kv_heads": ("num_kv_heads",),
    "head_dim": ("head_dim",),
    "ffn": ("ffn_dim",),
    "norm": ("embed_dim", "head_dim"),
    "layers": ("num_layers",),
}
SUMMED = (
    "vocab",
    "heads",
    "kv_heads",
    "ffn",
)  # what the rollout's modules take as cut over tensor, the rest as whole


def check_config(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError for words that mean nothing, and for numbers that do not fit together: mesh and batch, lengths, minibatches."""
    r, l, p, s, i, m = (
        config.rollout,
        config.rl,
        config.prompt,
        config.search,
        config.imitation,
        config.model,
    )
    values = flatten(config.to_dict())
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ValueError(
                f"config.{key} is {values[key]!r}; it must be one of {', '.join(choices)}"
            )
    check_settings(s.bm25_k1, s.bm25_b)
    ranges = {key: bounds for bounds, keys in RANGES.items() for key in keys}
    for key, value in values.items():
        below, least, greatest, above = ranges.get(key, NUMBERS)
        open_ends = [least] * (below == "(") + [greatest] * (above == ")")
        if isinstance(value, int | float) and (
            not least <= value <= greatest or value in open_ends
        ):  # NaN lies nowhere
            raise ValueError(
                f"config.{key} is {value}; it must lie in {below}{least}, {greatest}{above}"
            )
    if s.kind == "dense" and r.search != "host":
        raise ValueError(
            f"search.kind=dense runs programs on the device, which a callback from inside one must not; rollout.search is {r.search!r}: set it to "
            "host"
        )
    if s.kind == "dense" and not s.encoder:
        raise ValueError(
            "search.kind=dense needs search.encoder, the folder of an encoder (config.json, *.safetensors, tokenizer.json)"
        )
    longest = 2 * s.attempts * s.attempt_s + (2 ** (s.attempts - 1) - 1) * s.backoff_s
    if s.kind == "remote" and not 0 < longest < s.timeout_s:
        raise ValueError(
            f"search.attempts={s.attempts} requests of search.attempt_s={s.attempt_s} for connection and answer each, with pauses from "
            f"search.backoff_s={s.backoff_s} on, take {longest:g} s; search.timeout_s={s.timeout_s} must be more, and they more than 0"
        )
    if m.num_heads % m.num_kv_heads or m.head_dim % 2:
        raise ValueError(
            f"model.num_heads={m.num_heads} must be a multiple of model.num_kv_heads={m.num_kv_heads}, and model.head_dim={m.head_dim} even"
        )
    scaling = m.rope_scaling
    if scaling.kind in ("llama3", "yarn") and not (
        0 < scaling.slow < scaling.fast and scaling.original_context > 0
    ):
        raise ValueError(
            f"model.rope_scaling.kind={scaling.kind} mixes frequencies between slow={scaling.slow} and fast={scaling.fast} turns in "
            f"original_context={scaling.original_context} tokens: all must be more than 0, and slow less than fast"
        )
    if m.previous_token_peak and not m.qkv_bias:
        raise ValueError(
            f"model.previous_token_peak={m.previous_token_peak} is set by biases of queries and keys: set model.qkv_bias to True, or it to 0"
        )
    if m.checkpoint and (i.checkpoint or m.previous_token_peak):
        raise ValueError(
            "config.model.checkpoint gives the policy its parameters; imitation.checkpoint must be empty, and model.previous_token_peak 0"
        )
    for phase in i.phases:
        if (
            len(phase) != 5
            or phase[0] < 1
            or phase[1] < 1
            or not 0 <= phase[3] <= 1
            or not 0 <= phase[4] < math.inf
        ):
            raise ValueError(
                f"imitation.phases holds {tuple(phase)}; a phase is (steps, rows, single hops, share spoilt, learning rate)"
            )
    if i.phases and i.demonstrations < LENGTH_GROUPS:
        raise ValueError(
            f"imitation.demonstrations={i.demonstrations} cannot be cut into the {LENGTH_GROUPS} groups of equal length that minibatches come "
            f"from: make it at least {LENGTH_GROUPS}"
        )
    if i.phases and i.rename and p.tokenizer != "atlas":
        raise ValueError(
            f"imitation.rename=True exchanges the words of names, which only prompt.tokenizer=atlas has whole; it is {p.tokenizer}: set "
            "imitation.rename to False"
        )
    if not sum(dict(i.shares).values()) > 0:
        raise ValueError(
            "config.imitation.shares are all 0: one of them must be more, or the script could not decide anything"
        )
    episodes, shards = r.questions * r.group_size, sharding.row_shards(mesh)
    if episodes % (shards * l.minibatches):
        raise ValueError(
            f"{episodes} episodes an iteration (rollout.questions x rollout.group_size) cannot be cut into {shards} mesh shards "
            f"(mesh.data x mesh.fsdp) times {l.minibatches} minibatches: make the product a divisor of the episodes"
        )
    if r.slots > episodes or r.slots % shards:
        raise ValueError(
            f"rollout.slots={r.slots} must be 0 (all), or a multiple of the {shards} mesh shards (mesh.data x mesh.fsdp) up to the {episodes} "
            "episodes of an iteration"
        )
    if l.micro_rows and (episodes // l.minibatches) % l.micro_rows or l.micro_rows % shards:
        raise ValueError(
            f"rl.micro_rows={l.micro_rows} must be a multiple of the {shards} mesh shards and divide the {episodes // l.minibatches} rows "
            "of a minibatch"
        )
    if l.advantage in GROUP_ESTIMATORS and r.group_size < 2:
        raise ValueError(
            f"rl.advantage={l.advantage} compares the episodes of one question, but rollout.group_size is {r.group_size}: set it to 2 or more "
            f"(and lower rollout.questions by as much), or rl.advantage to {' or '.join(CRITIC_ESTIMATORS)}"
        )
    if l.old_logprobs == "sampler" and not l.max_ratio >= 1 + l.clip_high:
        raise ValueError(
            f"rl.max_ratio={l.max_ratio} must be at least 1 + rl.clip_high={1 + l.clip_high:g}, above which ratios are clipped anyway"
        )
    if l.advantage in ("grpo", "turn_return") and l.kl_placement == "reward" and l.kl_coef > 0:
        raise ValueError(
            f"rl.advantage={l.advantage} divides rewards by their deviation within a group, and the KL in them too: where all episodes earn "
            "the same it would be all that is learned from. Set rl.kl_placement to loss and rl.kl_estimator to k3, or rl.kl_coef to 0"
        )
    if config.reward.shuffle and episodes < 2:
        raise ValueError(
            "reward.shuffle gives every episode another one's rewards, but an iteration has one episode (rollout.questions x rollout.group_size)"
        )
    if l.kl_target > 0 and l.kl_coef == 0:
        raise ValueError(
            f"rl.kl_target={l.kl_target} is approached by multiplying rl.kl_coef, which is 0 and would stay so: set it above 0, such as 0.001, or "
            "rl.kl_target to 0"
        )
    if l.kl_placement == "loss" and l.kl_estimator == "k1" and l.kl_coef > 0:
        raise ValueError(
            "rl.kl_estimator=k1 has no gradient in expectation, so rl.kl_placement=loss would hold the policy to nothing: take k2 or k3, or "
            "rl.kl_placement=reward"
        )
    if l.over_observations and l.advantage != "gae":
        raise ValueError(
            f"rl.over_observations=True widens token GAE, but rl.advantage is {l.advantage}: set it to gae, or rl.over_observations to False"
        )
    for rows in (*(phase[1] for phase in i.phases), i.held_out) if i.phases else ():
        if rows % shards:
            raise ValueError(
                f"{rows} rows of imitation (imitation.phases, imitation.held_out) cannot be cut into {shards} mesh shards (mesh.data x mesh.fsdp)"
            )
    needed = p.max_prompt_tokens + r.max_turn_tokens + s.max_observation_tokens
    if r.context < needed:
        raise ValueError(
            f"rollout.context={r.context} has no room for one prompt, one turn and one observation ({needed} tokens): raise it, or lower "
            "prompt.max_prompt_tokens, rollout.max_turn_tokens or search.max_observation_tokens"
        )


def check_cuts(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where the tables mesh.train_rules and mesh.rollout_rules cut something of the model in a way that nothing is made for."""
    g = config.mesh
    for table, rules in (
        ("train_rules", dict(g.train_rules)),
        ("rollout_rules", dict(g.rollout_rules)),
    ):
        for name, axis in rules.items():
            fixed = "tensor" if name in SUMMED else None
            known = (fixed,) if table == "rollout_rules" else (*sharding.AXES, None)
            if axis not in known:
                raise ValueError(
                    f"config.mesh.{table}.{name} is {axis!r}; it must be {' or '.join(map(str, known))}"
                )
            for size in (getattr(model, field) for field in (AXIS_SIZES[name] if axis else ())):
                if size % mesh.shape[axis]:
                    raise ValueError(
                        f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} axis of {size}, which mesh.{table} cuts over it: "
                        f"make it a divisor of {size}"
                    )


def check_sampling(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError where RL could not learn from what the rollout samples. Evaluation is greedy of itself, whatever the config says."""
    r, l = config.rollout, config.rl
    if not config.iterations:
        return
    if r.temperature == 0:
        raise ValueError(
            "config.rollout.temperature is 0, with which all episodes of a question are the same one, and nothing is tried: set it to 1 to train "
            "(evaluation is greedy in any case)"
        )
    if l.old_logprobs == "sampler" and (r.temperature, r.top_k, r.top_p) != (1, 0, 1):
        raise ValueError(
            "rl.old_logprobs=sampler takes the recorded log-probabilities for those with which tokens were drawn, and they are of temperature 1 "
            f"over the whole vocabulary: rollout.temperature={r.temperature}, top_k={r.top_k}, top_p={r.top_p} must be 1, 0 and 1, or "
            "rl.old_logprobs learner"
        )
