"""Access to the decoder, the stack of layers inside a causal LM."""

from typing import Any

from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the module that maps token ids to hidden states; Llama 4's ``get_decoder`` returns the causal LM."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder
