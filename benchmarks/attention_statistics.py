"""Attention statistics against transformers' eager attention, which returns the matrices (output_attentions=True).

Run from the checkout: ``python benchmarks/attention_statistics.py``. Takes ten minutes or more, and 9 GiB.

Ours computes every figure: attention received, entropy, top-k coverage, block sparsity and the share of a token set.
Eager only returns its matrices; computing figures from them is not in its time and memory. Models have SmolLM2-135M's
shape and random weights, in float32. Both run all of their layers: ours in chunks, with few activations beside the
cache; eager in one pass, because one call returns the matrices. The whole model is compared if the matrices fit. At
8,192 tokens they do not: ours is then compared with their computed size.
"""

import time
from collections.abc import Callable

import torch
from measure import paired_times, peak_memory, report
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from sparsekv_pl.analysis.statistics_analysis import run_observed
from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.statistics import AttentionStatistics, StatisticsSettings, attention_statistics

TOKENS, FITTING_TOKENS, CHUNK_TOKENS, LAYERS = 8_192, 2_048, 512, 30
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 9, 3, 64, 1_024
GOALS = {"memory": 1 / 20, "time": 1.0, "last_query": 1 / 50}


def config(layers: int) -> LlamaConfig:
    """A random model; its vocabulary is small, because no logits are computed."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=1_536,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=TOKENS,
    )


def build_pass(method: str, layers: int, tokens: int) -> Callable[[], object]:
    """A full-cache pass whose attention is observed ("statistics") or returned ("eager")."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(layers)).eval().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> object:
        if method == "eager":
            with attention_implementation(model, "eager"):
                return model.model(ids, output_attentions=True)
        observer = AttentionStatistics(tokens=ids % 8 == 0)
        run_observed(model, ids, observer, CHUNK_TOKENS)
        return observer

    return step


def build_attention(method: str, tokens: int) -> Callable[[], object]:
    """Attention of random queries and keys; "eager" computes the matrix and attends with it, as a layer does."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, tokens, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    layer = LlamaAttention(config(1), 0).eval()
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    marked = torch.arange(tokens)[None] % 8 == 0
    window = {"statistics": None, "last query": 1}.get(method)

    def step() -> object:
        if method == "eager":
            return eager_attention_forward(layer, query, key, key, mask, HEAD_DIM**-0.5)
        return attention_statistics(query, key, StatisticsSettings(window=window), tokens=marked)

    return step


def matrices(layers: int, tokens: int) -> int:
    """Bytes of the attention matrices of all heads of ``layers`` layers in float32."""
    return layers * HEADS * tokens**2 * 4


def compare(
    name: str, build: Callable[..., Callable[[], object]], *shape: int, method: str = "statistics", rounds: int = 3
) -> tuple[dict[str, object], dict[str, float]]:
    """A row of the table, and time and peak memory as ratios to eager's."""
    took = paired_times(build(method, *shape), build("eager", *shape), rounds)
    ours, eager = (peak_memory(__file__, build.__name__, kind, *shape) for kind in (method, "eager"))
    row = {
        "what": name,
        "tokens": shape[-1],
        "time over eager (low to high)": f"{took.median:.4f} ({took.low:.4f} to {took.high:.4f})",
        "peak": f"{ours / 2**20:,.0f} MiB",
        "peak of eager": f"{eager / 2**20:,.0f} MiB",
        "peak over eager": f"{ours / eager:.4f}",
    }
    return row, {"time": took.median, "memory": ours / eager}


def alone(layers: int, tokens: int) -> dict[str, object]:
    """A row for sizes at which eager cannot run."""
    started = time.perf_counter()
    ours = peak_memory(__file__, build_pass.__name__, "statistics", layers, tokens)
    bound = matrices(layers, tokens)
    return {
        "what": f"{layers} layers, eager not run",
        "tokens": tokens,
        "time over eager (low to high)": f"ours took {time.perf_counter() - started:.0f} s, start included",
        "peak": f"{ours / 2**20:,.0f} MiB",
        "peak of eager": f"arithmetic: matrices alone {bound / 2**20:,.0f} MiB",
        "peak over eager": f"arithmetic: {ours / bound:.4f}",
    }


@torch.no_grad()
def main() -> None:
    """Print the table and the ratios."""
    rows, ratios, goals = [], {}, {}
    cases: list[tuple[str, Callable[..., Callable[[], object]], tuple[int, ...], str, str]] = [
        ("queries and keys", build_attention, (TOKENS,), "statistics", "attention"),
        ("queries and keys, last query alone", build_attention, (TOKENS,), "last query", "last_query"),
        ("1 layer", build_pass, (1, TOKENS), "statistics", "layer"),
        (f"{LAYERS} layers", build_pass, (LAYERS, FITTING_TOKENS), "statistics", "model"),
    ]
    for what, build, shape, method, name in cases:
        row, costs = compare(what, build, *shape, method=method)
        rows.append(row)
        for cost, ratio in costs.items():
            ratios[f"{cost}_{name}"] = ratio
            goals[f"{cost}_{name}"] = GOALS["last_query" if (cost, name) == ("time", "last_query") else cost]
    rows.append(alone(LAYERS, TOKENS))
    report("attention_statistics", rows, ratios, floors={}, goals=goals)


if __name__ == "__main__":
    main()
