"""Importing a pretrained model and exporting it again: seconds, host memory, equal logits.

--model names a Hugging Face folder or a .gguf file. It is read as a run reads it, tensor by tensor
into float32 arrays. Meanwhile the host's memory is watched: the report has the most that it holds
beyond the parameters themselves (on CPU these are in the host's memory, too). Then the model is
written with `export`'s function and read by transformers (torch). The logits of made-up tokens,
half of the rows padded, must agree to 1e-3, or the run ends with an error.
"""

from __future__ import annotations

import pathlib
import platform
import statistics
import tempfile
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import sharding
from stepsearch_jax.benchmark.sample_model import check_logits
from stepsearch_jax.benchmark.timing import time_call
from stepsearch_jax.models.huggingface import export_policy, open_checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.rl.model_state import describe_params

ROWS, TOKENS = 4, 64  # of the made-up texts
MIB = 2**20
LOOK_S = 0.002  # between two looks at the host's memory


def measure(*, repeats: int, seed: int, model: pathlib.Path) -> dict:
    """-> figures: seconds ("_s", the import's are medians), MiB of host memory ("_mib"), logits.

    Raises ImportError without torch, ValueError for an unsupported model or logits that differ,
    FileNotFoundError for a model that is not there.
    """
    try:  # before the work
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "this benchmark needs torch and transformers: pip install -r requirements-bench.txt"
        ) from error

    # The shapes of its parameters, on one device.
    open_s, weights = time_call(open_checkpoint, model)
    config = weights.model_config(
        weights.fields["vocab_size"], dtype=jnp.float32, remat="none", attention_block=256
    )
    policy = Policy(config)
    mesh = sharding.make_mesh(1, 1, 1, 1, config.num_kv_heads, devices=jax.devices()[:1])
    axes = ("vocab", "embed", "heads", "kv_heads", "head_dim", "ffn", "norm", "layers")
    abstract_params, _ = describe_params(policy, mesh, dict.fromkeys(axes))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params))

    # The import, with the host's memory.
    seconds, beyond = [], []
    for _ in range(repeats):
        params = None  # the last ones make room
        with HostMemory() as memory:
            load = lambda: jax.block_until_ready(load_policy(weights, config, abstract_params))
            spent, params = time_call(load)
        seconds.append(spent)
        beyond.append(memory.risen - (size if jax.default_backend() == "cpu" else 0))

    # The export, read again by transformers.
    tokens, length = make_texts(seed, config.vocab_size)
    ours = np.asarray(jax.jit(partial(policy.apply, method=Policy.init_all))(params, tokens))
    with tempfile.TemporaryDirectory() as folder:
        written = pathlib.Path(folder) / "model"
        export_s, _ = time_call(
            export_policy,
            written,
            params,
            config,
            dtype="float32",
            shard_bytes=2**30,
            context=4096,
            end_ids=(0,),
            pad_id=0,
            other_files={},
        )
        theirs = compute_peer_logits(written, tokens, length)
    real = np.arange(TOKENS) < length[:, None]
    difference = check_logits("transformers", ours[real], theirs[real])
    return dict(
        model=model.name,
        parameters=size // 4,
        open_s=open_s,
        import_s=statistics.median(seconds),
        export_s=export_s,
        runs_s=seconds,
        parameters_mib=size / MIB,
        beyond_mib=max(beyond) / MIB,
        tensor_mib=max(np.prod(tensor.shape) for tensor in weights.tensors.values()) * 4 / MIB,
        largest_difference=difference,
        logit_spread=float(ours[real].std()),
        repeats=repeats,
        seed=seed,
        python=platform.python_version(),
        jax=jax.__version__,
    )


def render(figures: dict) -> str:
    """The figures as text."""
    return (
        "{model}: {millions:.1f}M parameters, {parameters_mib:.0f} MiB as float32\n"
        "opened in {open_s:.2f} s, imported in {import_s:.2f} s (median of {repeats}), exported in "
        "{export_s:.2f} s\n"
        "host memory at most {beyond_mib:.0f} MiB beyond the parameters; the largest tensor has "
        "{tensor_mib:.0f} MiB as float32\n"
        "largest difference between our logits and those of transformers on the export: "
        "{largest_difference:.1e} (they spread by {logit_spread:.1f})"
    ).format(millions=figures["parameters"] / 1e6, **figures)


def make_texts(seed: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (tokens [ROWS, TOKENS], length [ROWS]): every other row is half as long, then zeros."""
    rng = np.random.default_rng(seed)
    length = np.where(np.arange(ROWS) % 2, TOKENS // 2, TOKENS)
    tokens = rng.integers(vocabulary, size=(ROWS, TOKENS))
    return np.where(np.arange(TOKENS) < length[:, None], tokens, 0).astype(np.int32), length


def compute_peer_logits(folder: pathlib.Path, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The logits [B, T, V] of transformers' model in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mask = torch.from_numpy(np.arange(tokens.shape[1]) < length[:, None]).long()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.numpy()


class HostMemory:
    """How far this process's memory, without mapped files, rises in a `with` block.

    risen: bytes; 0 if the system does not say (not Linux).
    """

    def __enter__(self) -> HostMemory:
        self._start = self._peak = read_own_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            self._peak = max(self._peak, read_own_memory())

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        self.risen = max(self._peak, read_own_memory()) - self._start


def read_own_memory() -> int:
    """Bytes of this process's memory that no file backs; 0 if the system does not say."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
