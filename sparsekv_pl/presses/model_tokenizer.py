"""The tokenizer of a model, for presses that read text."""

from functools import lru_cache

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.models.anchors import special_ids


def tokenizer_of(model: PreTrainedModel, given: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """Return ``given`` if it is not None, else the tokenizer beside the weights of ``model``, loaded once.

    Code that comes with a tokenizer is never run.

    Raises
    ------
    ValueError
        If none is given and none can be loaded, for example for a model built in memory.
    """
    return _loaded(model.name_or_path) if given is None else given


@lru_cache(maxsize=8)
def _loaded(source: str) -> PreTrainedTokenizerBase:
    advice = "set its tokenizer (press.tokenizer = ...) before it is put on the model"
    if not source:
        raise ValueError(f"this press reads text, but the model has no name_or_path to load a tokenizer from: {advice}")
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"this press needs a tokenizer, but {source!r} has none ({error}): {advice}") from error
    # If a folder has no tokenizer files, transformers may build one that has only special tokens.
    if special_ids(loaded).issuperset(loaded.get_vocab().values()):
        raise ValueError(f"this press needs a tokenizer, but {source!r} has none with words in it: {advice}")
    return loaded
