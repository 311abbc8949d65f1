"""The numbers that decide what a training step holds and computes: the model's widths and the run's settings."""

from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from torch import nn
from transformers import PreTrainedConfig

from sparsekv_pl.eviction.chunking import chunk_bounds, staying
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.cache_shape import cache_shape
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.models.quantisation import four_bit, parameter_count, skeleton, stored_quantisation, weight_bytes
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.nesting import presses_in, scorers_in
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.traits import traits_of

SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Projections that read one tensor."""


@dataclass(frozen=True)
class Adapted:
    """A linear layer with an adapter, in every decoder layer."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder's widths and bytes. E hidden, F feed-forward, Q all query heads, KV all key heads, V vocabulary."""

    name: str
    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    normed_heads: bool
    """Whether queries and keys are normed (Qwen3)."""
    capped: bool
    """Whether logits are capped, which takes one more buffer."""
    parameters: int
    weight_bytes: int
    layer_bytes: int
    """Bytes of one decoder layer's weights."""
    layer_weights: int
    """Numbers in one layer's linear weights."""
    mlp_weights: int
    """Those of its feed-forward part."""
    largest_weight: int
    """Numbers in the largest linear weight of a layer."""
    adapted: tuple[Adapted, ...]
    rank: int
    four_bit: bool

    @property
    def queries(self) -> int:
        """Q, the width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """KV, the width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def trained(self) -> int:
        """Count of numbers in the adapters."""
        return self.layers * self.rank * sum(one.inputs + one.outputs for one in self.adapted)


@dataclass(frozen=True)
class StepShape:
    """What one step on one device runs. Tokens count one row, whose parts have at most these lengths."""

    context_tokens: int
    continuation_tokens: int
    compression_ratio: float
    """The least ratio of the run, at which most pairs are kept."""
    press: BasePress | None
    """None with ``dropout``."""
    rows: int = 1
    chunk_tokens: int | None = None
    budget: int | None = None
    checkpoint: bool = False
    local: bool = False
    """Whether gradients stay in the layer: see ``LocalGradients``."""
    teacher: bool = True
    scores: bool = True
    """Whether a selection loss aligns scores."""
    first_chunk: bool = False
    """Whether the context's first chunk carries loss."""
    full_cache: bool = False
    """Whether the continuation also runs after the whole cache."""
    read_again: int = 0
    """Tokens of evicted text that are predicted after the evicted cache (Reconstruction)."""
    compared_layers: int = 0
    """Kinds of layer outputs that are compared with the teacher's (Layerwise)."""
    press_losses: bool = False
    """Whether SparseRegPress's losses are added."""
    decoding: Decoding | None = None
    turn_ends: tuple[int, ...] = ()
    """Tokens after the context at which a turn ends."""
    dropout: bool = False
    """Whether keys are dropped at random in one pass (KVDropout)."""
    dtype: torch.dtype = torch.bfloat16
    """Of matrix products and of the base weights; an adapter's own weights are float32."""
    on_cpu: bool = False
    """Count the CPU's leaner norms and adapters (models/cpu_kernels.py)."""
    devices: int = 1
    sharded: bool = False

    @property
    def chunks(self) -> list[tuple[int, int, int]]:
        """Per chunk: its tokens, the keys that it attends to, and the pairs per head kept after it."""
        found, held = [], 0
        ratio = self.compression_ratio if self.decoding is None or self.decoding.context else 0.0
        for start, stop in chunk_bounds(self.context_tokens, self.chunk_tokens):
            keys = held + stop - start
            held = staying(keys, stop, ratio, self.budget)
            found.append((stop - start, keys, held))
        return found

    @property
    def held_tokens(self) -> int:
        """Tokens of the context's first chunk if they carry loss, else 0."""
        return self.chunks[0][0] if self.first_chunk else 0

    @property
    def kept(self) -> int:
        """Pairs per head that the continuation attends to."""
        return self.chunks[-1][2]

    @property
    def evicted_after(self) -> list[int]:
        """The tokens, the context's included, after which the continuation is evicted from."""
        decoding, context = self.decoding, self.context_tokens
        return [] if decoding is None else decoding.evictions(context, self.continuation_tokens, self.turn_ends)

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """The same as ``chunks`` of the continuation; nothing is evicted after the last."""
        found, held, before = [], self.kept, self.context_tokens
        for end in self.evicted_after:
            keys = held + end - before
            assert self.decoding is not None
            budget = self.decoding.pairs(self.context_tokens, self.compression_ratio, self.budget)
            held = staying(keys, end, self.compression_ratio if self.decoding.grows else 0.0, budget)
            found.append((end - before, keys, held))
            before = end
        left = self.context_tokens + self.continuation_tokens - before
        return [*found, (left, held + left, held + left)]

    @property
    def losing(self) -> list[SparseRegPress]:
        """The presses whose own losses are added."""
        if not self.press_losses or self.press is None:
            return []
        return [press for press in presses_in(self.press) if isinstance(press, SparseRegPress)]

    @property
    def scorers(self) -> list[BasePress]:
        """The presses whose scores hold tensors until backward: all that a selection loss aligns in one step."""
        if not self.scores or self.press is None:
            return []
        found = [scorer for scorer in scorers_in(self.press) if traits_of(scorer).trainable]
        drawn_alone = isinstance(self.press, EvictionAugPress) and not self.press.score_all
        return found[-1:] if drawn_alone else found

    @property
    def supervised(self) -> int:
        """Most supervised tokens of a row."""
        return max(1, self.continuation_tokens - 1)


def model_shape(name: str, config: PreTrainedConfig, lora: Lora, dtype: torch.dtype, load_in_4bit: bool) -> ModelShape:
    """Read a model's shape from its ``config``; nothing is loaded.

    Raises ``ValueError`` for mixtures of experts, and for adapters on layers that the decoder does not have.
    """
    text: Any = config.get_text_config(decoder=True)
    if any(getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ValueError(f"{name} is a mixture of experts, whose training is not planned: plan a dense model")
    cache = cache_shape(config)
    quantised = load_in_4bit and not stored_quantisation(config)
    model = skeleton(config, dtype, four_bit(config, dtype) if quantised else None)
    layer = model.get_decoder().layers[0]
    linear = {key: module for key, module in layer.named_modules() if isinstance(module, nn.Linear)}
    sizes = {key: module.in_features * module.out_features for key, module in linear.items()}
    adapted = [
        Adapted(key.rsplit(".", 1)[-1], module.in_features, module.out_features)
        for key, module in linear.items()
        if key.rsplit(".", 1)[-1] in lora.targets
    ]
    if missing := sorted(set(lora.targets) - {one.name for one in adapted}):
        raise ValueError(f"lora.targets {missing} are not in the decoder of {name}; its layers have {sorted(linear)}")
    whole = weight_bytes(model)
    if quantised:  # peft keeps what is not quantised in float32
        whole += sum(p.numel() * (4 - p.element_size()) for p in model.parameters() if p.is_floating_point())
    return ModelShape(
        name=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        width=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=cache.kv_heads,
        head_dim=cache.head_dim,
        vocabulary=text.vocab_size,
        normed_heads=any(key.endswith("q_norm") for key, _ in layer.named_modules()),
        capped=getattr(text, "final_logit_softcapping", None) is not None,
        parameters=parameter_count(model),
        weight_bytes=whole,
        layer_bytes=weight_bytes(layer),
        layer_weights=sum(sizes.values()),
        mlp_weights=sum(size for key, size in sizes.items() if key.startswith("mlp")),
        largest_weight=max(sizes.values()),
        adapted=tuple(adapted),
        rank=lora.r,
        four_bit=load_in_4bit,
    )
