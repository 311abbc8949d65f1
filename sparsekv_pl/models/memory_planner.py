"""Estimate memory and time of a long context from the model's config alone, and warn if it will not fit."""

from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, PreTrainedConfig

from sparsekv_pl.models.backbone import resolve
from sparsekv_pl.models.cache_shape import CacheShape, cache_shape, kept_pairs
from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.models.duration import duration
from sparsekv_pl.models.layer_kinds import layer_kinds, windowed_alone
from sparsekv_pl.models.native_precision import AUTO, AskedDtype, decide
from sparsekv_pl.models.placement import in_bytes
from sparsekv_pl.models.quantisation import (
    four_bit,
    fused_expert_bytes,
    parameter_count,
    skeleton,
    stored_quantisation,
    weight_bytes,
)

GIB = 2**30
HIDDEN_COPIES, WIDTH_COPIES = 6, 3
"""Rough numbers of simultaneous activations in a decoder layer, of the hidden size and of the feed-forward width."""


@dataclass
class Plan:
    """The estimate for one context length. Sizes are in bytes, times in seconds, both for the whole batch."""

    name: str
    tokens: int
    batch: int
    dtype: str
    chunk_tokens: int
    """Tokens of the longest chunk; the whole context if it runs in one chunk."""
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    """Bytes per token of all layers and KV heads, for one row; layers with a window forget them again."""
    kv_bytes_full: int
    """Cache without eviction; layers with a window drop tokens outside it."""
    kv_bytes_kept: int
    """Cache after eviction; equal to ``kv_bytes_full`` without eviction."""
    kv_bytes_peak: int
    """Largest cache during the prefill: the kept pairs, and one layer's chunk before its eviction."""
    activation_bytes: int
    """Activations of one chunk, a rough estimate."""
    memory_limit: int
    """Memory that may be used."""
    memory: str
    """The origin of ``memory_limit``: given, or found on this machine."""
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Weights, largest cache and activations together."""
        return self.weight_bytes + self.kv_bytes_peak + self.activation_bytes

    def lines(self) -> list[str]:
        """Format the plan as lines of text; warnings come last."""
        context = f"{self.tokens:,} tokens" + (f" x {self.batch}" if self.batch > 1 else "")
        lines = [
            f"{self.name}: {self.parameters / 1e9:.2f} B parameters, a context of {context} in {self.dtype}",
            f"weights {gib(self.weight_bytes)}",
            f"KV cache without eviction {gib(self.kv_bytes_full)}, {self.kv_bytes_per_token / 1024:,.1f} KiB a token",
        ]
        if self.kv_bytes_kept != self.kv_bytes_full:
            share = self.kv_bytes_kept / self.kv_bytes_full
            lines.append(f"KV cache after eviction {gib(self.kv_bytes_kept)} ({share:.2%} of it)")
        lines += [
            f"activations about {gib(self.activation_bytes)} per chunk of {self.chunk_tokens:,} tokens",
            f"in all about {gib(self.total_bytes)} of {gib(self.memory_limit)} ({self.memory})",
        ]
        for what, seconds in (("prefill", self.prefill_seconds), ("decoding", self.decode_seconds)):
            if seconds is not None:
                lines.append(f"{what} {duration(seconds)}")
        return lines + self.notes + [f"WARNING: {warning}" for warning in self.warnings]


def plan(
    pretrained: str | PreTrainedConfig,
    tokens: int,
    *,
    dtype: AskedDtype = AUTO,
    load_in_4bit: bool = False,
    compression_ratio: float | None = None,
    budget: int | None = None,
    chunk_tokens: int | None = None,
    rerotates: bool = False,
    batch: int = 1,
    tokens_per_second: float | None = None,
    decode_tokens_per_second: float | None = None,
    new_tokens: int = 0,
    memory_limit: int | str | None = None,
    cache_dir: str | None = None,
) -> Plan:
    """Estimate memory and time of a context of ``tokens`` tokens without loading weights.

    Raises ``ValueError`` for settings out of range, and for a config that cannot be read or has no causal LM.

    Parameters
    ----------
    pretrained
        A hub id, folder, ``.gguf`` file or the embedded model, as in ``Backbone``; or its config.
    tokens, batch
        Length of a context, and the number of contexts run together.
    dtype, load_in_4bit, cache_dir
        As in ``Backbone``.
    compression_ratio, budget
        The share that eviction removes, and the most KV pairs per head that it keeps, in tokens; None for no limit.
    chunk_tokens
        Most tokens per chunk of the prefill; None runs the context in one chunk.
    rerotates
        Whether the press moves kept keys to the first positions (KeyRerotationPress), which frees positions.
    tokens_per_second, decode_tokens_per_second, new_tokens
        Rates of the prefill and of decoding ``new_tokens`` per row, over the whole batch; measure them on a short
        context.
    memory_limit
        Bytes, or a size such as ``80GiB``. None takes the free memory of all GPUs, or of RAM without a GPU.
    """
    _check(tokens, compression_ratio, budget, chunk_tokens, batch, tokens_per_second, decode_tokens_per_second)
    config = read_config(pretrained, cache_dir)
    decided = decide().dtype if dtype == AUTO else dtype
    torch_dtype: torch.dtype = getattr(torch, decided)
    quantised = load_in_4bit and not stored_quantisation(config)
    model = skeleton(config, torch_dtype, four_bit(config, torch_dtype) if quantised else None)
    shape, chunk = cache_shape(config), -(-tokens // -(-tokens // (chunk_tokens or tokens)))
    kept = kept_pairs(tokens, compression_ratio, budget)
    left = None if compression_ratio is None and budget is None else kept
    pair, states = batch * shape.pair_bytes * torch_dtype.itemsize, batch * shape.state_bytes(torch_dtype.itemsize)
    layers, largest = len(shape.windows), min(kept + chunk, tokens)
    limit, memory = _memory(memory_limit)
    planned = Plan(
        name=pretrained if isinstance(pretrained, str) else type(pretrained).__name__,
        tokens=tokens,
        batch=batch,
        dtype=decided,
        chunk_tokens=chunk,
        parameters=parameter_count(model),
        weight_bytes=weight_bytes(model),
        kv_bytes_per_token=layers * pair // batch,
        kv_bytes_full=shape.pairs(tokens, None) * pair + states,
        kv_bytes_kept=shape.pairs(tokens, left) * pair + states,
        kv_bytes_peak=(shape.pairs(tokens, left, chunk) + largest - kept) * pair + states,
        activation_bytes=_activation_bytes(config, shape, batch * chunk, largest, torch_dtype.itemsize)
        + largest * pair,
        memory_limit=limit,
        memory=memory,
        prefill_seconds=tokens * batch / tokens_per_second if tokens_per_second else None,
        decode_seconds=new_tokens * batch / decode_tokens_per_second if decode_tokens_per_second else None,
    )
    _judge(planned, config, shape, largest, fused_expert_bytes(model) if load_in_4bit else 0, rerotates)
    return planned


def _activation_bytes(config: PreTrainedConfig, shape: CacheShape, rows: int, keys: int, itemsize: int) -> int:
    """Estimate one layer's activations for ``rows`` tokens (batch x chunk) over ``keys`` pairs."""
    text = config.get_text_config(decoder=True)
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if experts:
        # Llama 4 runs every expert on every token; other models run the chosen ones.
        run = experts if text.model_type.startswith("llama4") else getattr(text, "num_experts_per_tok", 1)
        width = run * (getattr(text, "moe_intermediate_size", None) or width)
    queries = text.num_attention_heads * shape.head_dim
    numbers = HIDDEN_COPIES * text.hidden_size + WIDTH_COPIES * width + 2 * queries + shape.pair_bytes
    mask = 0 if keys == rows else keys * (1 + itemsize)  # bool, and the attention kernel's additive copy
    return rows * (numbers * itemsize + mask)


def _judge(
    planned: Plan, config: PreTrainedConfig, shape: CacheShape, largest: int, fused: int, rerotates: bool
) -> None:
    """Add warnings of what will not fit, and notes on the assumptions."""
    text, warn = config.get_text_config(decoder=True), planned.warnings.append
    trained = getattr(text, "max_position_embeddings", None)
    positions = largest if rerotates else planned.tokens
    if trained is not None and positions > trained:
        warn(
            f"{positions:,} positions are beyond the {trained:,} that the model was trained for: use a press "
            "that re-rotates keys (KeyRerotationPress) with a budget below that"
        )
    alone, total = windowed_alone(config), len(layer_kinds(config))
    if alone is not None and planned.kv_bytes_kept != planned.kv_bytes_full and positions >= alone:
        warn(f"every layer looks back {alone:,} tokens only: no press evicts from longer texts")
    elif alone is None and shape.evicted < total:
        planned.notes.append(
            f"presses evict in {shape.evicted} of {total} layers, those with full attention; the others keep their own "
            "caches, which are counted"
        )
    if fused:
        warn(
            f"{gib(fused)} of experts are fused, one parameter a layer and no Linear layers: bitsandbytes leaves them "
            f"in {planned.dtype}; a checkpoint stored in 4 bits (its experts apart) takes about a quarter of that"
        )
    method = stored_quantisation(config).get("quant_method")
    if method is not None and "bits" in str(method).lower():
        planned.notes.append(f"weights as the checkpoint stores them, quantised ({method})")
    elif method is not None:
        warn(f"the checkpoint is quantised with {method}, which is not counted: its weights take less than estimated")
    if planned.weight_bytes > planned.memory_limit:
        warn(
            f"the weights alone ({gib(planned.weight_bytes)}) exceed {gib(planned.memory_limit)} ({planned.memory}): "
            "use load_in_4bit, more devices, or a placement with CPU memory and an offload_folder"
        )
    elif planned.total_bytes > planned.memory_limit:
        warn(
            f"about {gib(planned.total_bytes)} are needed, {gib(planned.memory_limit)} are there ({planned.memory}): "
            "use a budget with chunk_tokens, a smaller batch, load_in_4bit, or more devices"
        )


def _check(
    tokens: int,
    compression_ratio: float | None,
    budget: int | None,
    chunk_tokens: int | None,
    batch: int,
    *rates: float | None,
) -> None:
    if compression_ratio is not None:
        check_compression_ratio("compression_ratio", compression_ratio)
    counts = {"tokens": tokens, "budget": budget, "chunk_tokens": chunk_tokens, "batch": batch}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if any(rate is not None and rate <= 0 for rate in rates):
        raise ValueError(f"tokens per second must be above 0, not {rates}")


def read_config(pretrained: str | PreTrainedConfig, cache_dir: str | None) -> PreTrainedConfig:
    if isinstance(pretrained, PreTrainedConfig):
        return pretrained
    source = resolve(pretrained, cache_dir)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the config of pretrained={pretrained!r} could not be read: {error}") from error


def _memory(limit: int | str | None) -> tuple[int, str]:
    """Return the bytes that may be used, and a description of their origin."""
    if limit is not None:
        return in_bytes(limit, "memory_limit"), "given"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return sum(torch.cuda.mem_get_info(index)[0] for index in range(count)), f"free on {count} GPU(s)"
    import psutil

    return psutil.virtual_memory().available, "RAM available"


def gib(size: float) -> str:
    """Format bytes in GiB with three significant digits.

    >>> gib(3 * 2**30), gib(2**20)
    ('3.00 GiB', '0.000977 GiB')
    """
    value = size / GIB
    return f"{value:,.0f} GiB" if value >= 100 else f"{value:#.3g} GiB"


if __name__ == "__main__":
    # python -m sparsekv_pl.models.memory_planner Qwen/Qwen3-8B 1000000 --budget 4096 --chunk_tokens 2048
    from jsonargparse import auto_cli

    print("\n".join(auto_cli(plan).lines()))
