"""All config keys, each with its meaning and its source. Other configs change only what differs.

The defaults are the paper's setting: Qwen2.5-3B in float32, which takes some 200 GB of memory.
On a laptop start with another config, such as atlas_quickstart.py.

Sections follow the path of a question: data, prompt, search, model, rollout, reward, RL,
supervised fine-tuning, evaluation; then checkpoints and processes.
Sources: [P] the paper's appendix B, [C] the released code, [O] our choice.

There are two presets, chosen by a word after a colon (--config=configs/base.py:reference):
    paper       the defaults
    reference   computes what the released code computes
"""

import ml_collections

VARIANTS = ("paper", "reference")

# Where the released code departs from the defaults. Its plain bugs (positions that drift, tags
# inside documents) are left out.
REFERENCE = {
    "reward.format_gate": "ends_with_answer",
    "reward.format_failure": "minus_one",
    "reward.key_match": "overwrite",
    "reward.redundancy_scope": "rendered",  # no gold documents: no penalty
    "reward.tfidf_fit": "pair",
    "reward.step_scale": 1.6,
    "reward.outcome_overwrites": True,
    "rl.over_observations": True,
    "rl.entropy_coef": 1e-3,
    "rollout.top_p": 0.95,
    # The numbers of the released script.
    "iterations": 1120,  # at most
    "rollout.prompts": 128,
    "policy.learning_rate": 5e-7,
    "value.learning_rate": 5e-7,
    "value.warmup": 0.05,
}


def get_config(preset: str = "paper") -> ml_collections.ConfigDict:
    if preset not in VARIANTS:
        raise ValueError(
            f"configs/base.py:{preset} is not known; presets are {', '.join(VARIANTS)}"
        )
    config = ml_collections.ConfigDict()
    config.seed = 0  # all random choices of a run follow from it
    config.iterations = 500  # one iteration = one rollout and its optimiser steps [P]

    # --- Data: questions, and the passages to search

    config.data = data = ml_collections.ConfigDict()
    # Format of the data set: atlas | jsonl (one's own) | musique | hotpotqa | 2wikimultihopqa
    # | bamboogle | phantomwiki | stepsearch | search_r1 (read by data/).
    data.kind = "musique"
    data.path = ""  # folder with the official files; unused by atlas, which is generated
    # Files of passages to search, separated by commas. A later file adds only passages that the
    # files before it lack. "" = the file `corpus` in data.path, or, if there is none, the passages
    # that come with the questions.
    data.corpus = ""
    # Rows of questions that cannot be read: refuse = end with file, line and fault; skip = leave
    # them out, with one warning that counts them.
    data.on_bad_row = "refuse"
    data.cache_dir = "data_cache"  # prepared data sets, corpora and indexes are kept here
    data.train_split = "train"  # the split that training questions come from
    data.train_questions = 0  # use only this many training questions, the first ones; 0 = all

    # The generated data set: made-up worlds with multi-hop questions.
    data.atlas = atlas = ml_collections.ConfigDict()
    atlas.seed = 0  # worlds and questions follow from it
    # Entities in the train world; the validation and test worlds have a quarter as many each.
    atlas.entities = 400
    # Graph shapes of the questions.
    atlas.shapes = ("2hop", "3hop_chain", "3hop_join", "4hop_chain", "4hop_branch", "4hop_after")
    atlas.train_questions = 2000  # questions about the train world; 0 leaves a split out
    atlas.validation_questions = 200  # questions about the validation world
    atlas.test_questions = 300  # questions about the test world

    # --- Prompt

    config.prompt = prompt = ml_collections.ConfigDict()
    prompt.template = "paper"  # paper | reference | short (templates in prompting/)
    # "atlas", a folder with tokenizer.json or tokenizer.json.gz, a .gguf file, or a model on the
    # Hugging Face Hub.
    prompt.tokenizer = "atlas"
    prompt.max_prompt_tokens = 2048  # a longer prompt is refused before work starts [C]

    # --- Search

    config.search = search = ml_collections.ConfigDict()
    # bm25 | dense: nearest by an encoder's vectors, as in the paper; needs rollout.search="host"
    # | remote: a search server | "package.module:function" (docs/plugins.md).
    search.kind = "bm25"
    search.k = 3  # documents per search [P]
    # Tokens of an observation, header and documents together; documents are cut to share them [C].
    search.max_observation_tokens = 800
    # A search that takes longer ends the run with a message. remote: the limit for each request.
    search.timeout_s = 30.0
    # The run stops if a larger fraction of an iteration's searches fails.
    search.max_failure_fraction = 0.0
    search.bm25_k1 = 0.9  # bm25: term saturation [O]
    search.bm25_b = 0.4  # bm25: length normalisation [O]
    # dense: a BERT-type encoder such as MiniLM or E5, as a folder (config.json, *.safetensors,
    # tokenizer.json) or by its name on the Hugging Face Hub ("intfloat/e5-base-v2").
    search.encoder = ""
    search.query_prefix = ""  # dense: put before each query; "query: " for E5
    search.passage_prefix = ""  # dense: put before each document; "passage: " for E5
    # dense: dtype of the documents' vectors and of the products with them: float32 | bfloat16.
    search.embedding_dtype = "bfloat16"
    search.encode_batch = 64  # dense: texts embedded at a time on each device
    # remote: address of a server (python -m stepsearch_jax.serve, or any other with Search-R1's
    # /retrieve) that holds the corpus of config.data. If it needs a login,
    # http://USER:PASSWORD@HOST; run folders do not keep user and password.
    search.url = ""
    search.attempt_s = 4.0  # remote: time for a request to connect, and again for its answer
    # remote: requests before a search counts as failed. All of them and the pauses between them
    # must fit into search.timeout_s.
    search.attempts = 3
    # remote: longest pause after the first failed request; it doubles after each. The pause is
    # random, at least half of that.
    search.backoff_s = 0.5
    search.batch = 64  # remote: queries per request

    # --- Mesh of devices

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # copies of the model; -1 = all devices that the other axes leave
    # Shards of parameters and optimiser state; a batch's rows are split over data and fsdp.
    mesh.fsdp = 1
    # Shards of heads, ffn and vocabulary. It must divide model.num_kv_heads, and all shards of one
    # copy lie within one host.
    mesh.tensor = 1
    # TPU slices joined by the data-centre network. It must divide mesh.data, the only axis that
    # crosses slices.
    mesh.slices = 1
    # Logical axes of the learner's parameters -> mesh axes (None: not sharded). The rollout's copy
    # is sharded over tensor only (sharding.ROLLOUT_RULES).
    mesh.train_rules = ml_collections.ConfigDict(
        dict(
            vocab="tensor",
            embed="fsdp",
            heads="tensor",
            kv_heads="tensor",
            head_dim=None,
            ffn="tensor",
            norm=None,
            layers=None,
        )
    )

    # --- Model: its weights, sizes and dtype

    config.model = model = ml_collections.ConfigDict()
    # Pretrained weights of the policy: a model of the Qwen2, Qwen3 or Llama family, as a folder
    # (config.json, *.safetensors), by its name on the Hugging Face Hub (from its cache, or
    # downloaded: "Qwen/Qwen2.5-0.5B"), or a .gguf file. The sizes below must match it, or be left
    # to it: num_layers = 0. "" = random parameters, or those of sft.checkpoint.
    model.checkpoint = ""
    # Least rows of the embedding, rounded up to a multiple of 64; 0 = the larger of the
    # tokenizer's size and the checkpoint's rows.
    model.vocab_size = 0
    # Qwen2.5-3B. 0 = this and all keys down to tie_embeddings are the checkpoint's.
    model.num_layers = 36
    model.embed_dim = 2048  # model width
    model.num_heads = 16  # query heads
    model.num_kv_heads = 2  # key and value heads; each serves num_heads / num_kv_heads query heads
    model.head_dim = 128  # width of a head
    model.ffn_dim = 11008  # hidden width of the SwiGLU layers
    model.rope_theta = 1e6  # base of the rotary positions' wavelengths
    # Lower frequencies for longer contexts (models/architecture.py:RopeScaling).
    # kind: none | linear | llama3 | yarn. slow and fast: low_freq_factor and high_freq_factor of
    # llama3, beta_slow and beta_fast of yarn.
    model.rope_scaling = ml_collections.ConfigDict(
        dict(
            kind="none",
            factor=1.0,
            original_context=32768,
            slow=1.0,
            fast=32.0,
            attention_factor=1.0,
        )
    )
    model.norm_eps = 1e-6  # added to the mean square in RMSNorm
    model.qkv_bias = True  # biases on queries, keys and values
    model.qk_norm = False  # RMSNorm over each head of queries and keys (Qwen3)
    model.tie_embeddings = True  # one table for embedding and output
    # > 0: a random policy starts with heads that attend to the previous tokens, with this peak
    # logit (needs model.qkv_bias).
    model.previous_token_peak = 0.0
    # Dtype of the learner's computation: float32 | bfloat16; master weights are float32. TPUs and
    # GPUs multiply float32 in lower precision unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    model.dtype = "float32"
    # What the backward pass computes again: none | dots: all but matrix products | layers:
    # everything within a layer, which needs the least memory.
    model.remat = "layers"

    # --- Rollout: sampling episodes

    config.rollout = rollout = ml_collections.ConfigDict()
    # callback: one program with the search inside | host: Python alternates decoding and searching.
    rollout.search = "callback"
    rollout.prompts = 256  # questions per iteration [P]
    rollout.group_size = 1  # episodes per question (more than 1 for group baselines)
    rollout.max_turns = 5  # turns that may search; one more follows that may only answer [P]
    rollout.max_turn_tokens = 800  # tokens of one turn; a longer one is invalid [C]
    # Tokens of prompt, actions and observations together; an episode that exceeds it is truncated
    # [C].
    rollout.context = 4096
    # Sampling in training; evaluation is greedy. Log-probabilities are those of temperature 1 over
    # the whole vocabulary, so ratios and KL are exact only at temperature 1, top_k 0, top_p 1.
    rollout.temperature = 1.0  # above 0 [P]
    rollout.top_k = 0  # keep only the k likeliest tokens; 0 = all
    rollout.top_p = 1.0  # keep the likeliest tokens up to this probability
    # Episodes that run at a time, each with its rows of the KV cache. A finished episode makes room
    # for the next one. 0 = all episodes of an iteration.
    rollout.slots = 0
    # Search, and fill free slots, when this fraction of a shard's busy slots waits or when no slot
    # can decode.
    rollout.flush_fraction = 0.5
    rollout.prefill_rows = 16  # waiting slots prefilled at a time
    # Tokens of each slot prefilled at a time, padded. Padding is least if a typical observation is
    # a multiple of it.
    rollout.prefill_tokens = 128
    # Cache positions read at a time; only blocks below the live length are read.
    rollout.attention_block = 256
    rollout.dtype = "float32"  # dtype of the rollout's copy of the policy; bfloat16 on accelerators

    # --- Reward

    config.reward = reward = ml_collections.ConfigDict()
    # strict: the paper's format gate [P] | ends_with_answer: the released code's [C].
    reward.format_gate = "strict"
    # zero_answer: r_answer = 0 [P] | minus_one: the whole reward is -1, no step or key reward [C].
    reward.format_failure = "zero_answer"
    reward.gamma_key = 0.618  # weight of the search-key reward [C]
    reward.key_match = "max"  # max [P] | overwrite: a later, worse query lowers it [C]
    # What a search gained. gain: how much closer its documents are to the gold ones, G [P]
    # | answer_logprob: how much its turn raised the policy's own mean log-probability per token of
    # "answer</answer>" after "<answer>"; needs no gold documents (arXiv 2510.14967)
    # | "package.module:function" (docs/plugins.md).
    reward.step_reward = "gain"
    reward.use_gain = True  # the step reward counts what a search gained
    reward.use_redundancy = True  # the step reward counts redundancy P
    # earlier_turns: a document seen in an earlier turn, by corpus id [P] | rendered: the same text
    # at the same rank, and nothing without gold documents [C].
    reward.redundancy_scope = "earlier_turns"
    # Weight of the step reward [P]; the released code's effective weight is 1.6.
    reward.step_scale = 1.0
    # corpus: one idf for the corpus [O] | pair: refitted on document and gold document, normalised
    # texts without titles [C].
    reward.tfidf_fit = "corpus"
    # Subtracted at the token that closes each search that did not fail; reward.step_scale does not
    # apply to it [O].
    reward.search_cost = 0.0
    # r_answer if the F1 is 0 but a retrieved document contains an accepted answer; the format gate
    # applies as usual [O].
    reward.retrieved_answer_credit = 0.0
    # step: each reward at its turn's end | merged: the same total on the last action token.
    reward.placement = "step"
    # True: the global reward replaces a step reward on the last action token instead of adding to
    # it [C].
    reward.outcome_overwrites = False
    # Control experiment: give every episode the rewards of another one. A step reward whose turn
    # did not search is added to the outcome reward.
    reward.shuffle = False

    # --- RL: advantages, losses and updates

    config.rl = rl = ml_collections.ConfigDict()
    # gae: token GAE [P] | turn_gae: GAE with one state per turn | grpo, rloo: an episode against
    # its group | turn_return: what follows a turn, against its group's.
    # The last three train no value model and need rollout.group_size > 1.
    rl.advantage = "gae"
    # Discount per action token (gae) or per turn (turn_gae, turn_return); grpo and rloo have
    # none [C].
    rl.gamma = 1.0
    rl.gae_lambda = 1.0  # lambda of gae and turn_gae, applied as often as gamma [C]
    # True: gae, whitening and value loss run over every token after the prompt instead of action
    # tokens only [C].
    rl.over_observations = False
    rl.whiten_advantages = True  # of gae and turn_gae, over action tokens
    rl.clip_low = 0.2  # a ratio below 1 - clip_low is clipped [P]
    rl.clip_high = 0.2  # a ratio above 1 + clip_high is clipped [P]
    # Denominator of the ratios. learner: the learner's own log-probabilities before the updates,
    # from one more forward pass [C] | sampler: those recorded while sampling, without that pass;
    # needs rollout.temperature=1, top_k=0, top_p=1. If rollout.dtype differs from model.dtype, the
    # two differ slightly, and ratios are not 1 before the first update (docs/losses.md) [O].
    rl.old_logprobs = "learner"
    # sampler: larger ratios are cut to this value (truncated importance weights) [O].
    rl.max_ratio = 2.0
    # token_mean: every action token of a minibatch counts the same [P] | sequence_mean: every
    # episode counts the same.
    rl.aggregation = "token_mean"
    # An optimiser step whose gradient is not finite is skipped. After so many in a row the run ends
    # [O].
    rl.max_skipped_in_a_row = 8
    rl.value_clip = 0.5  # values move at most this far from the old ones in the value loss [C]
    rl.entropy_coef = 0.0  # weight of the entropy bonus; 1e-3 in the released code [C]
    rl.kl_coef = 1e-3  # beta, weight of the KL penalty on action tokens [P]
    # reward: KL of the sampling policy, a constant [P] | loss: KL of the current policy,
    # differentiated, as in GRPO.
    rl.kl_placement = "reward"
    # k1 | k2 | k3. In the loss k1 has no gradient in expectation and is refused: use k2 or k3.
    rl.kl_estimator = "k1"
    # Adapt beta, which must not be 0, towards this mean KL per token; 0 = beta is fixed.
    rl.kl_target = 0.0
    # Episodes over which the adaptive controller reacts: it moves beta by at most a fifth in so
    # many [C].
    rl.kl_horizon = 10000.0
    rl.minibatches = 4  # optimiser steps per epoch over a rollout [P]
    rl.ppo_epochs = 1  # passes over a rollout, all in the same order
    # Rows per forward and backward pass, gradients are accumulated; 0 = the whole minibatch. Rows
    # of similar length share a micro-batch.
    rl.microbatch_size = 0
    # Widths that a micro-batch may have: the smallest that holds its longest row, out of so many
    # up to rollout.context. Each is compiled; more of them mean less padding [O].
    rl.width_buckets = 4

    # --- Optimisers of the policy and of the value model

    for name, learning_rate, warmup in (("policy", 7e-7, 0.285), ("value", 7e-6, 0.015)):  # [P]
        config[name] = optimizer = ml_collections.ConfigDict()
        optimizer.optimizer = "adamw"  # adamw | sgd
        optimizer.learning_rate = learning_rate  # after the warm-up; constant
        optimizer.warmup = warmup  # fraction of the iterations that the run was started with
        optimizer.b1 = 0.9  # AdamW: decay of the mean gradient
        optimizer.b2 = 0.999  # AdamW: decay of the mean squared gradient
        optimizer.weight_decay = 0.01  # AdamW
        optimizer.max_grad_norm = 1.0  # gradients are clipped to this global norm; inf = never

    # --- Supervised fine-tuning on scripted searches, before RL

    config.sft = sft = ml_collections.ConfigDict()
    # Initial parameters: a folder that `train` wrote as WORKDIR/start; paths "configs/…" also name
    # those of this package. "" = random parameters. Phases, if any, train them further.
    sft.checkpoint = ""
    sft.optimizer = "muon"  # muon | adamw
    # Scripted episodes made for each phase, from the training questions; at least 6.
    sft.demonstrations = 4000
    # Held-out episodes, for the logged loss, are about questions of this split.
    sft.held_out_split = "validation"
    sft.held_out = 128  # number of held-out episodes
    sft.log_every = 50  # steps between two measurements on the held-out episodes
    # Give names new words in every minibatch, so that facts cannot be memorised; needs
    # prompt.tokenizer="atlas".
    sft.rename = False
    # Phases, one after the other: (optimiser steps, rows per step, whether each sub-question is
    # asked alone, fraction of poor decisions, learning rate). Learning rates that work: 0.05 to
    # 0.01 for muon from scratch, 1e-3 for adamw.
    sft.phases = ()
    # Fraction of relations about which the script always decides well, chosen by a hash of their
    # names (the last word of a query). So a greedy policy has, like the script, questions that it
    # can search for and others that it cannot.
    sft.known_fraction = 0.0
    # Relative frequency of each kind of poor decision (rollout/scripted.py).
    sft.decision_weights = ml_collections.ConfigDict(
        dict(good=0.35, vague=0.4, repeat=0.05, wrong=0.08, early=0.12)
    )

    # --- Evaluation: greedy, every question once

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.split = "validation"  # the split to evaluate on
    evaluation.questions = 0  # evaluate only this many questions, the first ones; 0 = all
    evaluation.every = 0  # iterations between evaluations during RL; 0 = only before and after
    evaluation.controls = False  # also evaluate the scripted searchers
    # Only for `evaluate`: data sets to evaluate on instead of config.data, each KIND:FOLDER or
    # KIND:FOLDER:SPLIT (default: evaluation.split), separated by commas. The table compares the
    # policies of the run (or model.checkpoint, if WORKDIR holds no run) with direct answers,
    # answers from one search, and answers from gold documents.
    evaluation.datasets = ""
    # Bootstrap resamples of questions for each interval of evaluation.datasets.
    evaluation.resamples = 1000

    # --- Checkpoints

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 10  # iterations of RL between checkpoints
    # Also save after the first iteration that ends this long after the last checkpoint; 0 = never.
    checkpoint.minutes = 0.0
    checkpoint.sft_every = 100  # steps of supervised fine-tuning between checkpoints
    checkpoint.keep = 2  # number of newest checkpoints to keep

    # --- Metrics: metrics.jsonl always; and copies of it

    config.metrics = metrics = ml_collections.ConfigDict()
    # Any of tensorboard | wandb (Weights & Biases; pip install wandb; WANDB_MODE=offline works).
    metrics.loggers = ("tensorboard",)
    metrics.wandb_project = "stepsearch_jax"  # wandb: the project of the run

    # --- Processes of a run on several hosts

    config.distributed = distributed = ml_collections.ConfigDict()
    # host:port of process 0; "" = one process, or what the platform announces (TPU pods).
    distributed.coordinator = ""
    distributed.processes = 1  # number of processes; 0 = as the platform announces
    distributed.process_id = 0  # number of this process, from 0
    # A process silent for this long counts as lost, and the run ends. If a search hangs, it ends
    # after search.timeout_s.
    distributed.heartbeat_s = 20

    if preset == "reference":
        config.update_from_flattened_dict(REFERENCE)
    return config
