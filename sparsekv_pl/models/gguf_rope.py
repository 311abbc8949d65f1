"""RoPE's scaling in a GGUF file, which transformers does not read from it."""

from typing import Any

import numpy as np
import torch

from sparsekv_pl.models.gguf_file import GgufFile

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3.1's scaling; every published model has these two values."""
TRAINED_LENGTH = 8192
"""Llama 3.1's original_max_position_embeddings."""


def check_rope(file: GgufFile) -> None:
    """Raise ``ValueError`` for a scaling that is not carried over: every position would be another one."""
    kind = file.of_architecture("rope.scaling.type")
    factor = file.of_architecture("rope.scaling.factor") or file.of_architecture("rope.scale_linear")
    if kind not in (None, "none") or factor not in (None, 0.0, 1.0):
        raise file.refused(f"scales RoPE by {kind or 'linear'}, factor {factor}, which is not carried over here")
    if file.rope_factors is not None and file.fields.get("general.architecture") != "llama":
        raise file.refused(
            f"has {len(file.rope_factors)} factors of RoPE beside its weights, which are not carried over here"
        )


def scale_rope(config: Any, file: GgufFile) -> None:
    """Write Llama 3.1's scaling into ``config`` if ``file`` has its factors.

    Raises ``ValueError`` if these are not the ones that the scaling computes.
    """
    if file.rope_factors is None:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = config.rope_parameters
    theta = plain["rope_theta"]
    scaled = {**plain, **LLAMA3, "factor": float(file.rope_factors.max())}
    scaled["original_max_position_embeddings"] = TRAINED_LENGTH
    config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(file.rope_factors)
    wanted = theta ** -(np.arange(0, size, 2) / size) / file.rope_factors
    if len(frequencies) != len(wanted) or not np.allclose(frequencies.numpy(), wanted, rtol=1e-3):
        raise file.refused("scales RoPE by factors that are not Llama 3.1's")
