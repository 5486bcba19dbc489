"""Every key there is, with its meaning and source. Other configs change only what differs.

As it stands it is the paper's setting: Qwen2.5-3B, in float32, which takes some 200 GB of memory.
On a laptop begin with another config, such as atlas_quickstart.py.

Sections follow the way of one question: data, prompt, search, model, rollout, reward, rl,
optimiser, supervised fine-tuning, evaluation, housekeeping. Names in brackets: [P] the paper's
appendix B, [C] the released code, [O] our choice.

Two presets, by the word after the colon (--config=configs/base.py:reference): "paper", which are
the defaults, and "reference", which computes what the released code computes.
"""

import ml_collections

VARIANTS = ("paper", "reference")
# where the released code departs from the defaults; bugs that no one can want (positions that
# drift, tags in documents) are not in it
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
    # The released script's numbers.
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
    config.seed = 0  # every random choice of a run follows from it
    config.iterations = 500  # one iteration = one rollout and its optimiser steps [P]

    config.data = data = ml_collections.ConfigDict()
    # atlas | musique | hotpotqa | 2wikimultihopqa | bamboogle | phantomwiki | stepsearch |
    # search_r1 (the form of their rows: data/)
    data.kind = "musique"
    data.path = ""  # folder with the official files; unused by atlas, which is made from its seed
    # Files of passages to search, with commas between them; of the second and later ones only what
    # is not in those before. "" = the file `corpus` in data.path, or, without one, the passages
    # that the rows bring along.
    data.corpus = ""
    data.cache_dir = "data_cache"  # prepared data sets, corpora and indexes are kept here
    data.train_split = "train"  # the split that training questions come from
    data.train_questions = 0  # use only the first so many training questions; 0 = all

    data.atlas = atlas = ml_collections.ConfigDict()
    atlas.seed = 0  # worlds and questions follow from it
    # entities in the train world; validation and test worlds have a quarter of it each
    atlas.entities = 400
    # graph shapes of the questions
    atlas.shapes = ("2hop", "3hop_chain", "3hop_join", "4hop_chain", "4hop_branch", "4hop_after")
    atlas.train_questions = 2000  # questions about the train world; 0 leaves a split out
    atlas.validation_questions = 200  # questions about the validation world
    atlas.test_questions = 300  # questions about the test world

    config.prompt = prompt = ml_collections.ConfigDict()
    prompt.template = "paper"  # paper | reference | short (templates in prompting/)
    # "atlas", a folder with tokenizer.json (a gzipped tokenizer.json.gz does as well), or a .gguf
    # file
    prompt.tokenizer = "atlas"
    prompt.max_prompt_tokens = 2048  # a longer prompt is refused before work starts [C]

    config.search = search = ml_collections.ConfigDict()
    # bm25 | dense: nearest by an encoder's vectors, as the paper has it; needs
    # rollout.search="host" | remote: a search server
    search.kind = "bm25"
    # remote: its address (python -m stepsearch_jax.serve, or any with Search-R1's /retrieve); it
    # must hold the corpus of data
    search.url = ""
    search.attempt_s = 4.0  # remote: time for a request to connect, and again for its answer
    # remote: requests before a search has failed; with their pauses they must fit into timeout_s
    search.attempts = 3
    # remote: longest pause after the first failed request, doubled after each; half of it or more
    # is slept, at random
    search.backoff_s = 0.5
    search.batch = 64  # remote: queries in one request
    search.k = 3  # documents a search [P]
    search.bm25_k1 = 0.9  # term saturation of BM25 [O]
    search.bm25_b = 0.4  # length normalisation of BM25 [O]
    # dense: Hugging Face folder of a BERT-type encoder (MiniLM, E5) with config.json, *.safetensors
    # and tokenizer.json
    search.encoder = ""
    search.query_prefix = ""  # dense: put before each query; "query: " for E5
    search.passage_prefix = ""  # dense: put before each document; "passage: " for E5
    # dense: of the documents' vectors and of the products with them: float32 | bfloat16
    search.embedding_dtype = "bfloat16"
    search.encode_batch = 64  # dense: texts embedded at a time on each device
    # an observation, header and documents together; documents are cut to share it [C]
    search.max_observation_tokens = 800
    # a search that takes longer ends the run with a message; remote: time in which a request must
    # be answered or given up
    search.timeout_s = 30.0
    # share of failed searches in an iteration above which the run stops
    search.max_failure_fraction = 0.0

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # copies of the model; -1 = all devices that the other axes leave
    mesh.fsdp = 1  # copies that share out parameters and optimiser state
    # pieces of heads, ffn and vocabulary; must divide the kv heads, and all pieces of one copy lie
    # within one host
    mesh.tensor = 1
    # TPU slices that the data-centre network joins; must divide data, the only axis that crosses
    # them
    mesh.slices = 1
    # Logical axes of the learner's parameters -> mesh axes (None: not cut). The rollout's copy is
    # cut over tensor only (sharding.ROLLOUT_RULES).
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

    config.model = model = ml_collections.ConfigDict()
    # Pretrained weights with which the policy begins: a Hugging Face folder of the Qwen2, Qwen3 or
    # Llama family (config.json, *.safetensors) or a .gguf file. The sizes below must be theirs. ""
    # = random parameters, or those of sft.checkpoint.
    model.checkpoint = ""
    # least rows of the embedding; 0 = the tokenizer's tokens or the checkpoint's rows, whichever
    # are more. Rounded up to 64
    model.vocab_size = 0
    model.num_layers = 36  # Qwen2.5-3B
    model.embed_dim = 2048  # model width
    model.num_heads = 16  # query heads
    model.num_kv_heads = 2  # key and value heads; each serves num_heads / num_kv_heads query heads
    model.head_dim = 128  # width of a head
    model.ffn_dim = 11008  # hidden width of the SwiGLU layers
    model.rope_theta = 1e6  # base of the rotary positions' wavelengths
    # Lower frequencies for longer contexts (models/architecture.py:RopeScaling). kind: none |
    # linear | llama3 | yarn; slow, fast: its low_freq_factor and high_freq_factor (llama3), or
    # beta_slow and beta_fast (yarn).
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
    # > 0: random policies start with heads that look at the tokens just before, with this peak
    # logit (needs qkv_bias)
    model.previous_token_peak = 0.0
    # Dtype of the learner's computation: float32 | bfloat16; master weights are float32. TPUs and
    # GPUs multiply float32 in lower precision unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    model.dtype = "float32"
    # computed again in the backward pass: none | dots: all but matrix products | layers: everything
    # within a layer; the least memory
    model.remat = "layers"

    config.rollout = rollout = ml_collections.ConfigDict()
    # callback: one program with the search inside | host: Python alternates decoding and searching
    rollout.search = "callback"
    rollout.prompts = 256  # questions an iteration [P]
    rollout.group_size = 1  # episodes a question (more than 1 for group baselines)
    rollout.max_turns = 5  # turns that may search; one more follows that may only answer [P]
    rollout.max_turn_tokens = 800  # tokens of one turn; a longer one is invalid [C]
    # prompt, actions and observations together; beyond it an episode ends truncated [C]
    rollout.context = 4096
    # So training samples; evaluation is greedy. Log-probabilities are of temperature 1 over the
    # whole vocabulary: ratios and KL are exact only at 1, 0, 1.
    rollout.temperature = 1.0  # above 0 [P]
    rollout.top_k = 0  # keep only the k likeliest tokens; 0 = all
    rollout.top_p = 1.0  # keep the likeliest tokens up to this probability
    # episodes that run at a time, each with its rows of the KV cache; one that ends makes room for
    # the next; 0 = all of an iteration
    rollout.slots = 0
    # search, and fill free slots, when this share of a shard's busy slots waits, or nobody can
    # decode
    rollout.flush_fraction = 0.5
    rollout.prefill_rows = 16  # waiting slots prefilled at a time
    # tokens prefilled of each at a time, filled up: least is wasted if a usual observation is a
    # whole multiple
    rollout.prefill_tokens = 128
    # cache positions read at a time; only blocks below the live length are read
    rollout.attention_block = 256
    rollout.dtype = "float32"  # dtype of the rollout's copy of the policy; bfloat16 on accelerators

    config.reward = reward = ml_collections.ConfigDict()
    # strict: the paper's format gate | ends_with_answer: the released code's
    reward.format_gate = "strict"
    # zero_answer: r_answer = 0 [P] | minus_one: the whole reward is -1, no step or key reward [C]
    reward.format_failure = "zero_answer"
    reward.gamma_key = 0.618  # weight of the search-key reward [C]
    reward.key_match = "max"  # max [P] | overwrite: a later, worse query lowers it [C]
    # What a search gained. gain: how much closer its documents are to the gold ones, G [P] |
    # answer_logprob: the rise, by its turn, of the policy's own mean log-probability per token of
    # "answer</answer>" behind "<answer>"; needs no gold documents (arXiv 2510.14967).
    reward.step_reward = "gain"
    reward.use_gain = True  # what a search gained, in the step reward
    reward.use_redundancy = True  # redundancy P in the step reward
    # earlier_turns: by corpus id [P] | rendered: by rendered text, within the round too, none
    # without gold [C]
    reward.redundancy_scope = "earlier_turns"
    # weight of the step reward [P]; 1.6 is the released code's effective one
    reward.step_scale = 1.0
    # corpus: one idf for the corpus [O] | pair: refitted on document and gold, normalised texts
    # without titles [C]
    reward.tfidf_fit = "corpus"
    # taken off at the token that closes each search, failed searches excepted; step_scale does not
    # touch it [O]
    reward.search_cost = 0.0
    # r_answer where the F1 is 0 but a retrieved document holds an accepted answer; the gate applies
    # as ever [O]
    reward.retrieved_answer_credit = 0.0
    # step: each reward at its turn's end | merged: the same total on the last action token
    reward.placement = "step"
    # True: the global reward replaces a step reward on the last action token instead of adding to
    # it [C]
    reward.outcome_overwrites = False
    # control: give every episode the rewards of another one (a step reward whose turn did not
    # search is added to the outcome reward)
    reward.shuffle = False

    config.rl = rl = ml_collections.ConfigDict()
    # gae: token GAE [P] | turn_gae: GAE with one state a turn | grpo, rloo: an episode against its
    # group | turn_return: turns against their group's. The last three train no value model and need
    # rollout.group_size > 1.
    rl.advantage = "gae"
    # discount, once an action token (gae) or once a turn (turn_gae, turn_return); grpo and rloo
    # have none [C]
    rl.gamma = 1.0
    rl.gae_lambda = 1.0  # of gae and turn_gae, as often as gamma [C]
    # True: gae, whitening and value loss over every token after the prompt, not over action tokens
    # alone [C]
    rl.over_observations = False
    rl.whiten_advantages = True  # of gae and turn_gae, over action tokens
    rl.clip_low = 0.2  # a ratio below 1 - clip_low is clipped [P]
    rl.clip_high = 0.2  # a ratio above 1 + clip_high is clipped [P]
    # What ratios compare with. learner: the learner's own log-probabilities before the updates, by
    # a forward pass more [C] | sampler: those recorded while sampling, without it, which needs
    # rollout.temperature=1, top_k=0, top_p=1; where rollout.dtype is not model.dtype they differ a
    # little, and ratios are not 1 before the first update (docs/losses.md) [O]
    rl.old_logprobs = "learner"
    # of old_logprobs="sampler": ratios above it weigh as much as it (truncated importance weights)
    # [O]
    rl.max_ratio = 2.0
    # token_mean: every action token of a minibatch counts the same [P] | sequence_mean: every
    # episode does
    rl.aggregation = "token_mean"
    rl.value_clip = 0.5  # [C]
    rl.entropy_coef = 0.0  # 1e-3 in the released code [C]
    rl.kl_coef = 1e-3  # beta, charged on action tokens [P]
    # reward: of the sampling policy, a constant [P] | loss: of the current policy, differentiated,
    # as GRPO has it
    rl.kl_placement = "reward"
    # k1 | k2 | k3; in the loss k1 has no gradient in expectation, and is refused: take k2 or k3
    # there
    rl.kl_estimator = "k1"
    # adapt beta, which must not be 0, towards this mean KL per token; 0 = beta is fixed
    rl.kl_target = 0.0
    # episodes over which the adaptive controller reacts: it moves beta by at most a fifth in so
    # many [C]
    rl.kl_horizon = 10000.0
    rl.minibatches = 4  # optimiser steps per epoch over a rollout [P]
    rl.ppo_epochs = 1  # passes over a rollout, in the same order each
    # a rollout is cut to its longest episode, rounded up to this; one compiled program per length
    rl.pad_to_multiple_of = 128
    # rows per forward and backward pass, gradients are accumulated; 0 = the whole minibatch
    rl.microbatch_size = 0

    for name, learning_rate, warmup in (("policy", 7e-7, 0.285), ("value", 7e-6, 0.015)):  # [P]
        config[name] = optimizer = ml_collections.ConfigDict()
        optimizer.optimizer = "adamw"  # adamw | sgd
        optimizer.learning_rate = learning_rate  # after the warm-up
        optimizer.warmup = warmup  # share of the iterations with which the run began; then constant
        optimizer.b1 = 0.9  # AdamW: decay of the mean gradient
        optimizer.b2 = 0.999  # AdamW: decay of the mean squared gradient
        optimizer.weight_decay = 0.01  # AdamW
        optimizer.max_grad_norm = 1.0  # gradients are clipped to this global norm; inf = never

    config.sft = sft = ml_collections.ConfigDict()
    # Begin with these parameters: a folder that `train` wrote as WORKDIR/start, also relative to
    # the repository; "" = random ones. Phases, if any, come on top.
    sft.checkpoint = ""
    sft.optimizer = "muon"  # muon | adamw
    # scripted episodes made for each phase, from the training questions; at least 6
    sft.demonstrations = 4000
    # scripted episodes on questions of this split are never trained on; their loss is the logged
    # one
    sft.held_out_split = "validation"
    sft.held_out = 128  # how many
    sft.log_every = 50  # steps between two looks at the held-out episodes
    # give names new words in every minibatch, so that facts cannot be learned by heart; needs
    # prompt.tokenizer="atlas"
    sft.rename = False
    # Phases run one after the other: (optimiser steps, rows a step, whether each sub-question is
    # asked alone, share of the script's decisions that are taken poorly, learning rate: 0.05 to
    # 0.01 suits muon from scratch, 1e-3 adamw).
    sft.phases = ()
    # Poor decisions are taken about the relations that the script does not know. It knows this
    # share of them, by a hash of their names (the last word of a query): so a policy that answers
    # greedily has, like the script, questions that it can search for and others that it cannot.
    sft.known_fraction = 0.0
    # A poor decision: relative frequency of each kind (rollout/scripted.py).
    sft.decision_weights = ml_collections.ConfigDict(
        dict(good=0.35, vague=0.4, repeat=0.05, wrong=0.08, early=0.12)
    )

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.split = "validation"  # greedy, every question once
    evaluation.questions = 0  # only the first so many; 0 = all
    evaluation.every = 0  # also every so many iterations; 0 = only before and after
    evaluation.controls = False  # also the scripted searchers
    # `evaluate` alone: measure these data sets instead of config.data, each KIND:FOLDER or
    # KIND:FOLDER:SPLIT (otherwise evaluation.split), with commas between; beside a run's policies,
    # or those of model.checkpoint where WORKDIR holds no run, stand direct answers, answers from
    # one search, and from gold documents.
    evaluation.datasets = ""
    # bootstrap draws of questions behind each interval of evaluation.datasets
    evaluation.resamples = 1000

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 10  # iterations of RL between checkpoints
    # also after the first iteration that ends so long after the last checkpoint; 0 = only every so
    # many iterations
    checkpoint.minutes = 0.0
    checkpoint.sft_every = 100  # steps of supervised fine-tuning between checkpoints
    checkpoint.keep = 2  # newest checkpoints that stay

    config.distributed = distributed = ml_collections.ConfigDict()
    # host:port of process 0; "" = one process, or what the platform announces (TPU pods)
    distributed.coordinator = ""
    distributed.processes = 1  # number of processes; 0 = as the platform announces
    distributed.process_id = 0  # number of this process, from 0
    # a process silent for so long is given up, and the run ends; where a search hangs, after
    # search.timeout_s
    distributed.heartbeat_s = 20

    if preset == "reference":
        config.update_from_flattened_dict(REFERENCE)
    return config
