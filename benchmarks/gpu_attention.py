"""Attention compared with its references, and FSDP2 on one rank with a plain process, for gpu_parts.py."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparsekv_pl.attention.block_sparse import block_sparse_attention
from sparsekv_pl.attention.blocks import TopBlocks
from sparsekv_pl.attention.kept_columns import kept_columns_attention, kept_columns_mask
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk

Cost = Callable[..., tuple[float, float]]
HEADS, KV_HEADS, HEAD_DIM, RECENT = 32, 8, 64, 128


def states(device: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of one row."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    return query, key, value


def dropout_against_reference(device: str, tokens: int, cost: Cost) -> dict[str, Any]:
    """Largest differences of outputs and gradients in float32, and time in 16 bits on a GPU.

    A quarter of the keys and the newest 128 are kept. FlexAttention has no backward on a CPU.
    """
    order = torch.rand(1, KV_HEADS, tokens, generator=torch.Generator().manual_seed(1)).argsort(-1)
    kept = order[..., : tokens // 4].sort(-1).values
    real = torch.ones(1, tokens, dtype=torch.bool, device=device)
    mask = kept_columns_mask(kept.to(device), RECENT, real)
    dense = mask.repeat_interleave(HEADS // KV_HEADS, 1)
    blocks = create_block_mask(
        lambda row, head, query, key: dense[row, head, query, key], 1, HEADS, tokens, tokens, device
    )
    compiled = torch.compile(flex_attention) if device == "cuda" else flex_attention

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True)

    def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kept_columns_attention(query, key, value, kept, recent=RECENT, query_chunk=128).transpose(1, 2)

    def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=blocks, enable_gqa=True)  # type: ignore[return-value]

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ways: dict[str, Callable[..., Tensor]] = {"own": own, "flex": flex}
    figures: dict[str, Any] = {}
    for name, way in ways.items():
        backward = name == "own" or device == "cuda"
        figures |= {
            f"{name}, {what} off by": value for what, value in _differences(way, reference, device, tokens, backward)
        }
    for name, way in {"reference": reference, **ways}.items():
        if name != "flex" or device == "cuda":
            inputs = states(device, tokens, dtype)
            figures[f"{name}, forward and backward, s"] = cost(partial(_both_ways, way, inputs), device)[0]
    return figures


def _differences(
    way: Callable[..., Tensor], reference: Callable[..., Tensor], device: str, tokens: int, backward: bool
) -> list[tuple[str, float]]:
    """The largest differences of values, and of the gradients of queries, keys and values."""
    inputs = states(device, tokens, torch.float32)
    if not backward:
        inputs = inputs[0].detach(), inputs[1].detach(), inputs[2].detach()
        return [("values", float((way(*inputs) - reference(*inputs)).abs().max()))]
    found, wanted = way(*inputs), reference(*inputs)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(device)
    pairs = zip(*(torch.autograd.grad(out, inputs, direction) for out in (found, wanted)), strict=True)
    gradients = [float((mine - its).abs().max()) for mine, its in pairs]
    return [("values", float((found - wanted).detach().abs().max())), ("gradients", max(gradients))]


def _both_ways(way: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    out = way(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


@torch.no_grad()
def sketch_walk_against_dense(device: str, lengths: tuple[int, ...], cost: Cost) -> dict[str, Any]:
    """Seconds of a layer's attention over 16 blocks of 64 with the selection, and of dense causal attention."""
    figures: dict[str, Any] = {}
    for tokens in lengths:
        query, key, value = states(device, tokens, torch.bfloat16 if device == "cuda" else torch.float32)
        select, layers = TopBlocks(SketchWalk(dense_layers=0)), count()
        select(next(layers), query, key)
        sparse = partial(_sparse, select, layers, query, key, value)
        dense = partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        seconds = {"Sketch&Walk": cost(sparse, device)[0], "dense": cost(dense, device)[0]}
        figures |= {f"{name}, {tokens} tokens, s": value for name, value in seconds.items()}
    return figures


def _sparse(select: TopBlocks, layers: Iterator[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A layer in the middle of the walk."""
    chosen = select(next(layers), query, key)
    assert chosen is not None
    return block_sparse_attention(query, key, value, chosen)


def losses_of_three_steps(model: str, adapter: str, device: str, sharded: bool) -> list[float]:
    """Losses of three EIT steps under SnapKV from the same adapter, in this process or under FSDP2 with one rank."""
    from fsdp_runs import Losses, Rows
    from kvpress import SnapKVPress
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy

    from sparsekv_pl.eviction.real import RealEviction
    from sparsekv_pl.models.backbone import Backbone
    from sparsekv_pl.training.eit_module import EITModule

    backend = "nccl" if device == "cuda" else "gloo"
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend=backend)
    losses = Losses()
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        strategy=strategy if sharded else "auto",
        precision="bf16-true" if device == "cuda" else "32-true",
        max_steps=3,
        use_distributed_sampler=False,  # the default would shuffle
        callbacks=[losses],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    backbone = Backbone(model, adapter=adapter, sharded=sharded)
    module = EITModule(backbone, RealEviction(SnapKVPress(window_size=8)))
    module.compression_ratio = 0.5
    trainer.fit(module, Rows(1, 96, 32, 3))
    if sharded:
        torch.distributed.destroy_process_group()
    return [round(loss, 4) for loss in losses.losses]
