"""SentenceDropoutPress: drop whole sentences in training."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.presses.key_tokens import TOKEN_IDS, ReadsTokens, key_tokens
from sparsekv_pl.presses.model_tokenizer import tokenizer_of
from sparsekv_pl.presses.press_context import press_context_in
from sparsekv_pl.presses.sentences import SentenceTable, sentence_table
from sparsekv_pl.presses.span_dropout import Shown, SpanDropoutPress


@dataclass
class SentenceDropoutPress(ReadsTokens, SpanDropoutPress):
    """Drop random whole sentences in training.

    Sentence ends are found in the token ids (``SentenceTable``), in a prefill of many chunks in those of the whole
    context so far. The press needs every key's token, so ChunkPress and DecodingPress cannot wrap it. See
    ``SpanDropoutPress`` for the parameters not listed here.

    Parameters
    ----------
    max_tokens
        Most tokens of a sentence; longer ones are split.

    Raises
    ------
    ValueError
        If ``max_tokens`` is below 1, or the keys' tokens are unknown.
    """

    max_tokens: int = 128
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, init=False, repr=False, compare=False)
    """The tokenizer of the token ids; None takes the one beside the model's weights."""
    _table: SentenceTable | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least("max_tokens", 1)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Find the tokenizer and build its sentence table; ``ValueError`` if there is none."""
        super().post_init_from_model(model)
        self._table = sentence_table(tokenizer_of(model, self.tokenizer))

    def most_spans(self, shown: Shown) -> int:
        """See ``SpanDropoutPress``; sentences are numbered in the whole context, of which later chunks hold a part."""
        press_context = press_context_in(shown.kwargs)
        ids = shown.kwargs.get(TOKEN_IDS) if press_context is None else press_context.token_ids
        return shown.keys.shape[2] if ids is None else max(ids.shape[1], shown.keys.shape[2])

    def spans(self, shown: Shown) -> Tensor:
        """See ``SpanDropoutPress``."""
        if self._table is None:
            raise ValueError(
                "SentenceDropoutPress does not know the tokenizer, as the press around it never passes the model on: "
                "call its post_init_from_model(model) first"
            )
        tokens = key_tokens(shown.module, shown.keys, shown.kwargs)
        if tokens is None:
            raise ValueError(
                "SentenceDropoutPress does not know the keys' tokens, as for parts of a context (ChunkPress), after "
                "another press (ComposedPress) and in decoding: use it alone in a prefill, or take BlockDropoutPress"
            )
        length = tokens.ids.shape[1]
        padded = length == shown.place.shape[1]  # only one forward over the whole context takes padding
        place = shown.place if padded else torch.arange(length, device=tokens.ids.device).expand_as(tokens.ids)
        self._table = self._table.to(tokens.ids.device)
        return tokens.at_keys(self._table.sentences(tokens.ids, place, self.max_tokens))
