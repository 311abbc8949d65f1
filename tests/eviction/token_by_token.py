"""The slow reference of eviction while a continuation is read: transformers' own forward, one token at a time."""

import sys
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import ScorerPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.presses.nesting import press_name

CONTEXT, CONTINUATION, INTERVAL, RATIO, ROWS = 30, 15, 4, 0.5, 2
TURNS = (5, 9)
"""Tokens of the continuation after which a turn ends."""


def ids(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make distinct tokens: in the first layer equal ones have keys of one length, which Knorm cannot tell apart."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(64, generator=generator)[: CONTEXT + CONTINUATION] for _ in range(ROWS)])
    return drawn[:, :CONTEXT], drawn[:, CONTEXT:]


@dataclass
class TokenByToken:
    """Run contexts at once and continuations token by token, with an eviction at each of ``ends``."""

    model: PreTrainedModel
    press: ScorerPress
    ends: Container[int]
    """The tokens read, the context's included, after which it evicts."""
    budgets: Any
    """Maps the tokens read to the pairs that an eviction then leaves."""
    cache: DynamicCache = field(default_factory=DynamicCache)
    places: list[Tensor] = field(default_factory=list)
    """(B, K, S) per layer, the positions of the kept pairs."""
    selections: list[Selection] = field(default_factory=list)
    seen: int = 0
    since: list[list[dict[str, Any]]] = field(default_factory=list)
    """Per layer, the keywords of the forwards since the last eviction."""

    def run(self, tokens: Tensor) -> Tensor:
        """Run (B, T) tokens in one forward, and evict if they end there."""
        layers = self.model.model.layers
        self.since = self.since or [[] for _ in layers]
        hooks = [
            layer.self_attn.register_forward_pre_hook(lambda _m, _a, kw, of=of: of.append(kw), with_kwargs=True)
            for layer, of in zip(layers, self.since, strict=True)
        ]
        positions = torch.arange(self.seen, self.seen + tokens.shape[1])[None]
        hidden = self.model.model(tokens, past_key_values=self.cache, position_ids=positions).last_hidden_state
        for hook in hooks:
            hook.remove()
        self.seen += tokens.shape[1]
        if self.seen in self.ends:
            for index in range(len(layers)):
                self.evict(index)
            self.since = []
        return hidden

    def evict(self, index: int) -> None:
        """Keep the highest scores of a layer's pairs, in the order of their positions."""
        layer, calls = self.cache.layers[index], self.since[index]
        new = sum(call["hidden_states"].shape[1] for call in calls)
        fresh = torch.arange(self.seen - new, self.seen).expand(*layer.keys.shape[:2], -1)
        places = torch.cat([self.places[index], fresh], -1) if len(self.places) > index else fresh
        kept = min(self.budgets(self.seen), layer.keys.shape[2])
        if kept < layer.keys.shape[2]:
            self.press.compression_ratio = 1 - (kept + 0.5) / layer.keys.shape[2]  # StreamingLLM's scores depend on it
            self.model.model.layers[index].self_attn.rotary_emb = self.rotary_from(self.seen - new)
            scores = self.press.score(
                self.model.model.layers[index].self_attn,
                torch.cat([call["hidden_states"] for call in calls], 1),
                layer.keys,
                layer.values,
                None,
                {
                    "position_embeddings": [
                        torch.cat(part, 1) for part in zip(*(c["position_embeddings"] for c in calls), strict=True)
                    ]
                },
            )
            self.selections.append(Selection(index, press_name(self.press), scores, places, kept=kept, seen=self.seen))
            order = scores.topk(kept, dim=-1).indices.sort(-1).values
            where = order[..., None].expand(-1, -1, -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, where), layer.values.gather(2, where)
            places = places.gather(-1, order)
        self.places[index : index + 1] = [places]

    def rotary_from(self, start: int) -> torch.nn.Module:
        """Rotate from position ``start`` on: ExpectedAttention's future queries come after what was read."""
        rotary = self.model.model.rotary_emb

        class Shifted(torch.nn.Module):
            def forward(self, x: Tensor, position_ids: Tensor) -> Any:
                return rotary(x, position_ids + start)

        return Shifted()

    def read(self, context: Tensor, continuation: Tensor) -> Tensor:
        """Read the context at once, then the continuation token by token; return its hidden states."""
        self.run(context)
        return torch.cat([self.run(continuation[:, place : place + 1]) for place in range(continuation.shape[1])], 1)


def ends_of(decoding: Decoding) -> Container[int]:
    """Return the context's end and, from there on, those of intervals or of ``TURNS``."""
    if decoding.interval == "turn":
        return {CONTEXT, *(CONTEXT + end for end in TURNS)}
    return range(CONTEXT, sys.maxsize, decoding.interval)


def budgets(decoding: Decoding) -> Any:
    half = int(CONTEXT * (1 - RATIO))

    def of(seen: int) -> int:
        if seen == CONTEXT:
            return half if decoding.context else CONTEXT
        return int(seen * (1 - RATIO)) if decoding.grows else (decoding.budget or half)

    return of
