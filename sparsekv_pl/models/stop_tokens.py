"""The tokens that end an answer."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that the tokenizer or the model's generation config name as the end of a text."""
    config = model.generation_config
    known = [config.eos_token_id if config is not None else None, tokenizer.eos_token_id]
    return {i for item in known if item is not None for i in (item if isinstance(item, list) else [item])}
