"""The attention that a batch's continuations pay to their contexts with the full cache, for OraclePress."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.batch import CaseBatch, Supervised
from sparsekv_pl.models.encoding import Encoder
from sparsekv_pl.objectives.attention_mass import AttentionMass


def continuation_mass(
    recorded: RecordedPrefill, batch: CaseBatch, tokenizer: PreTrainedTokenizerBase
) -> dict[int, Tensor]:
    """Return layer -> (B, K, L): the attention of the text, or of each question with its reference answers.

    The model of ``recorded`` runs as it is now, with its adapter on or off; see ``AttentionMass`` for the means.
    """
    full, (ids, lengths) = recorded.evicted(None), _whole(batch, tokenizer)
    columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    mass = AttentionMass(Supervised(columns, lengths), batch["context_ids"].shape[1])
    continue_from(recorded.model, ids, full.cache, full.next_position, observer=mass)
    return mass.mass


def _whole(batch: CaseBatch, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, list[int]]:
    """Return the continuations (B, T) with the reference answers at their ends, padded on the right; their lengths."""
    rows, encoder = [], Encoder(tokenizer)
    for ids, length, case in zip(
        batch["continuation_ids"], batch["continuation_lengths"].tolist(), batch["cases"], strict=True
    ):
        answer = encoder.encode(f" {', '.join(case.answers)}") if case.answers else []
        rows.append(torch.cat([ids[:length], ids.new_tensor(answer)]))
    return pad_sequence(rows, batch_first=True), [len(row) for row in rows]
