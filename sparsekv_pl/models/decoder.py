"""The stack of layers inside a causal LM."""

from typing import Any

from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """What turns token ids into hidden states. Llama 4's ``get_decoder`` gives the causal LM itself."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder
