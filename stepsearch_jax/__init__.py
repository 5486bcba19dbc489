"""StepSearch in JAX: language models that learn to search, with a reward at every search step."""

__version__ = "0.1.0"
