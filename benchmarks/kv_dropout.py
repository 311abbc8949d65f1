"""Cost of KV dropout: forward and backward of a model of SmolLM2-135M's shape at 2,048 tokens over no dropout.

Also its attention alone (9 query heads, 3 KV heads) over PyTorch's causal and masked attention.

Run from the checkout: ``python benchmarks/kv_dropout.py``. Takes some minutes and 6 GiB.
"""

from collections.abc import Callable

import torch
from measure import Ratio, paired_times, peak_memory, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekv_pl.attention.kept_columns import kept_columns_attention
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.models.anchors import Anchors, AnchorTable

TOKENS, CONTINUATION, COMPRESSION = 2_048, 64, 0.7
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 9, 3, 64, 49_152
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(dtype_name: str) -> LlamaForCausalLM:
    """A model with random weights; only the attention's projections get gradients, as with LoRA."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    model.to(dtype=DTYPES[dtype_name])  # type: ignore[call-arg]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "self_attn" in name
    return model


def build_step(method: str, dtype_name: str) -> Callable[[], None]:
    """A step of one forward and backward through the decoder, with a loss on the continuation's hidden states."""
    model = build_model(dtype_name)
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    context, continuation = ids[:, :-CONTINUATION], ids[:, -CONTINUATION:]
    kv_dropout = KVDropout(Anchors(special=False, punctuation=False))
    kv_dropout.tokenizer = AnchorTable(*torch.zeros(2, VOCABULARY, dtype=torch.bool))

    def hidden() -> Tensor:
        if method == "dropout":
            return kv_dropout(model, context, continuation, compression_ratio=COMPRESSION, step=0).hidden
        return model.get_decoder()(ids, use_cache=False).last_hidden_state[:, -CONTINUATION:]

    def step() -> None:
        model.zero_grad()
        hidden().float().square().mean().backward()

    return step


def build_attention(method: str, dtype_name: str) -> Callable[[], None]:
    """A step of one layer's attention, forward and backward, with a quarter of the keys kept and a window of 128."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, direction = (
        torch.randn(1, heads, TOKENS, HEAD_DIM, generator=generator).to(DTYPES[dtype_name]).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    order = torch.rand(1, KV_HEADS, TOKENS, generator=generator).argsort(dim=-1)
    kept = order[..., : TOKENS // 4].sort(dim=-1).values
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()

    def attend() -> Tensor:
        if method == "dropout":
            out = kept_columns_attention(query, key, value, kept, recent=128, query_chunk=128)
            return out.transpose(1, 2)
        if method == "causal":
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    def step() -> None:
        torch.autograd.grad(attend(), (query, key, value), direction)

    return step


def compare(
    build: Callable[[str, str], Callable[[], None]], reference: str, dtype: str, rounds: int
) -> tuple[Ratio, float]:
    """Time and peak memory of dropout as ratios to ``reference``."""
    time = paired_times(build("dropout", dtype), build(reference, dtype), rounds)
    peaks = [peak_memory(__file__, build.__name__, method, dtype) for method in ("dropout", reference)]
    return time, peaks[0] / peaks[1]


def main() -> None:
    cases = [
        ("step", build_step, "causal", {"time": 1.0, "memory": 1.2}, 3),
        ("attention", build_attention, "causal", {"time": 1.0}, 7),
        ("attention", build_attention, "mask", {"time": 1.0}, 7),
    ]
    rows, ratios, goals = [], {}, {}
    for what, build, reference, limits, rounds in cases:
        for dtype in DTYPES:
            time, memory = compare(build, reference, dtype, rounds)
            measured = {"time": time.median, "memory": memory}
            for cost, limit in limits.items():
                name = f"{cost}_{what}_over_{reference}_{dtype}"
                ratios[name], goals[name] = measured[cost], limit
            rows.append(
                {
                    "what": what,
                    "reference": reference,
                    "dtype": dtype,
                    "time ratio (low to high)": f"{time.median:.3f} ({time.low:.3f} to {time.high:.3f})",
                    "peak memory ratio": f"{memory:.3f}",
                }
            )
    report("kv_dropout", rows, ratios, floors={}, goals=goals)


if __name__ == "__main__":
    main()
