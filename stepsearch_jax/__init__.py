"""StepSearch in JAX: language models that learn to search, with a reward at every search step."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == [
    "-m"
]:  # Python is looking for the command in `python -m stepsearch_jax.COMMAND`
    from stepsearch_jax import signals

    signals.listen()
