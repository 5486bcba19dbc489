"""The pretrained model that `config.model.checkpoint` names, and the sizes that it has."""

from __future__ import annotations

import dataclasses

import ml_collections

from stepsearch_jax.hub import find_model
from stepsearch_jax.models.architecture import RopeScaling
from stepsearch_jax.models.huggingface import open_checkpoint
from stepsearch_jax.models.weights import COMPARED_FIELDS, Weights


def open_weights(config: ml_collections.ConfigDict) -> Weights | None:
    """Opens the weights that config.model.checkpoint names, None without one; reads no tensor.

    With model.num_layers=0 the config gets the checkpoint's sizes and form, so that config.json
    records them. Raises FileNotFoundError if the model is nowhere, and ValueError for one that is
    not supported, or for num_layers=0 without a checkpoint.
    """
    model_config = config.model
    if not model_config.checkpoint:
        if model_config.num_layers == 0:
            raise ValueError(
                "config.model.num_layers=0 takes the sizes from model.checkpoint, which is empty: "
                "name a pretrained model there, or give sizes"
            )
        return None
    weights = open_checkpoint(find_model(model_config.checkpoint, "weights", "model.checkpoint"))
    if model_config.num_layers == 0:
        scaling = weights.fields["rope_scaling"] or RopeScaling("none", 1.0, 0, 0.0, 0.0, 1.0)
        with config.unlocked():
            for field in (*COMPARED_FIELDS, "rope_theta", "tie_embeddings"):
                model_config[field] = weights.fields[field]
            model_config.rope_scaling.update(dataclasses.asdict(scaling))
    return weights
