"""Sharding (FSDP2, https://arxiv.org/abs/2304.11277): each rank holds a part of every weight and optimizer state.

A layer's weights are gathered only while it computes. This uses torch's ``fully_shard`` under Lightning's
ModelParallelStrategy. Each decoder layer is one group; the root's group holds the rest: embeddings, final norm and
head, tied or not. The root is the LightningModule, with its steps as forward methods, because passes call the decoder
and read the head's weight, and never call the causal LM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.cache_keyword import with_cache
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import linear_layers

STEPS = ("training_step", "validation_step")
SAME_LENGTHS = (
    "shortest_context draws lengths that differ between ranks, and so does the number of passes they run, while "
    "sharded ranks must run the same passes: set data.shortest_context=null, or train under DDP"
)


def shard(module: Any) -> None:
    """Shard ``module``'s model and its teacher's copy over the ranks and load their weights; for configure_model.

    ``module`` is an EITModule. Does nothing if its backbone is not sharded. Collective: every rank calls it.

    Raises
    ------
    ValueError
        If only one of backbone and strategy shards, if ranks would read the same data, or if settings would make ranks
        run different numbers of passes or update their own weights.
    """
    mesh = module.device_mesh
    if module.backbone.sharded and mesh is None:
        module.to_empty(
            device="cpu"
        )  # never written, so takes no memory; Lightning's teardown cannot move meta tensors
    _check_strategy(module.backbone.sharded, mesh)
    if mesh is None or isinstance(module, FSDPModule):
        return
    _check_module(module)
    settings = {"mesh": mesh["data_parallel"], "mp_policy": _mixed_precision(module.trainer.precision)}
    teacher = module.teacher.own_network
    for network in filter(None, (teacher, causal_lm(module.model))):
        layers = decoder_of(network).layers
        for layer in layers:
            fully_shard(layer, **settings)
        layers[-1].register_forward_hook(_tie_cache_to_output, with_kwargs=True)
    if teacher is not None:
        _shard_ends(teacher, settings)
    fully_shard(module, **settings)
    for step in STEPS:
        register_fsdp_forward_method(module, step)
    whole = replace(module.backbone, sharded=False).load()[0] if torch.distributed.get_rank() == 0 else None
    for network in filter(None, (teacher, module.model)):
        _fill(network, whole, module.trainer.strategy.root_device)
    if whole is not None:
        causal_lm(module.model).generation_config = causal_lm(whole).generation_config
    module.register_state_dict_post_hook(_keep_what_trains)


def gathered(module: Any) -> dict[str, Tensor] | None:
    """Gather the trainable weights of ``module.model`` in rank 0's CPU memory; other ranks get an empty dict.

    None if nothing is sharded. Collective: every rank calls it.
    """
    if not isinstance(module, FSDPModule):
        return None
    network: nn.Module = module.model  # type: ignore[attr-defined]
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(network, options=options)
    _keep_what_trains(network, weights, "", None)
    return cast(dict[str, Tensor], weights)


def exported(backbone: Backbone, folder: Path) -> PreTrainedModel:
    """Load in this process, unsharded, what a run with ``backbone`` exported to ``folder``: an adapter or a model."""
    alone = replace(backbone, sharded=False)
    if (folder / "adapter_config.json").exists():
        return replace(alone, adapter=str(folder)).load(trainable=False)[0]
    return replace(alone, pretrained=str(folder)).load(trainable=False)[0]


def _check_strategy(sharded: bool, mesh: DeviceMesh | None) -> None:
    if sharded and mesh is None:
        raise ValueError(
            "backbone.sharded=true leaves the weights to ModelParallelStrategy: add --config configs/train/fsdp.yaml, "
            "or set backbone.sharded=false"
        )
    if mesh is None:
        return
    if not sharded:
        raise ValueError(
            "ModelParallelStrategy with backbone.sharded=false would load the whole model on every rank: set "
            "backbone.sharded=true"
        )
    ranks, same = mesh.size(), mesh["tensor_parallel"].size()
    if same > 1:
        raise ValueError(
            f"data_parallel_size={ranks // same} and tensor_parallel_size={same}: groups of {same} ranks would have to "
            f"read the same data and share each layer's work, which is not supported. Set data_parallel_size={ranks} "
            "(the number of processes) and tensor_parallel_size=1 in trainer.strategy"
        )


def _check_module(module: Any) -> None:
    """Raise ``ValueError`` for settings under which ranks would run different passes: each pass gathers weights."""
    if len(module.press_parameters):
        raise ValueError(
            f"{type(module.press).__name__} has parameters of its own, which sharding would not keep equal on all "
            "ranks: train it under DDP (trainer.strategy=ddp), with backbone.sharded=false"
        )
    if getattr(module.eviction, "local_gradients", None) is not None:
        raise ValueError(
            "local_gradients leave layers without a gradient of their output, at which sharded weights are gathered "
            "again for backward: set eviction.local_gradients=null, or train under DDP with backbone.sharded=false"
        )
    if linear := linear_layers(causal_lm(module.model)):
        raise ValueError(
            f"layers {list(linear)} of this model have no attention, and sharded weights are gathered for backward by "
            "the gradients of keys and values: train it under DDP with backbone.sharded=false"
        )
    validates = module.validation_student.eviction
    for name, eviction in (("eviction", module.eviction), ("validation_eviction", validates)):
        if getattr(eviction, "decoding", None) is not None:
            raise ValueError(
                "decoding runs a continuation in as many passes as it is long, which differs between ranks, while "
                f"sharded ranks must run the same passes: set {name}.decoding=null, or train under DDP with "
                "backbone.sharded=false"
            )
    data = getattr(module.trainer, "datamodule", None)
    if len(getattr(data, "context_lengths", [0])) > 1:
        raise ValueError(SAME_LENGTHS)
    _check_validation_chunks(getattr(validates, "chunk_tokens", None), getattr(data, "evicted_lengths", [0]))


def _check_validation_chunks(chunk_tokens: int | None, lengths: Sequence[int]) -> None:
    """Raise ``ValueError`` if contexts of these ``lengths``, which ranks validate side by side, differ in chunks.

    In training all ranks read contexts of one length at a step.
    """
    from sparsekv_pl.eviction.chunking import chunk_bounds  # with kvpress, which the command line's help can do without

    fewest, most = (len(chunk_bounds(length, chunk_tokens)) for length in (min(lengths), max(lengths)))
    if fewest < most:
        raise ValueError(
            f"validation reads texts and questions in {fewest} to {most} chunks (chunk_tokens={chunk_tokens}), which "
            "differs between ranks, while sharded ranks must run the same passes: give model.validation_eviction with "
            "chunk_tokens=null, or train under DDP with backbone.sharded=false"
        )


def _mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Gather in bfloat16 what autocast would cast to it for the whole step, and reduce gradients in float32."""
    if precision != "bf16-mixed":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def _shard_ends(network: nn.Module, settings: dict[str, Any]) -> None:
    """Shard embeddings, final norm and head of a model outside the module, whose decoder is its own root."""
    decoder, head = decoder_of(network), network.get_output_embeddings()  # type: ignore[arg-type, operator]
    tied = head.weight is decoder.get_input_embeddings().weight
    fully_shard(decoder, **settings)
    if tied:
        head.weight = decoder.get_input_embeddings().weight
    else:
        fully_shard(head, **settings)


def _fill(network: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Copy the weights of ``whole``, which only rank 0 has, into ``network``, one tensor at a time."""
    network.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, {} if whole is None else whole.state_dict(), options=options)
    for name, buffer in network.named_buffers():  # RoPE's frequencies are in no state dict
        if whole is not None:
            buffer.copy_(whole.get_buffer(name))
        torch.distributed.broadcast(buffer, src=0)


def _keep_what_trains(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove frozen weights from a state dict: the keys that loading a sharded checkpoint asks for must be saved."""
    trains = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [name for name in state_dict if name not in trains]:
        del state_dict[name]


def _tie_cache_to_output(layer: nn.Module, _: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    """Route gradients of the last layer's cached keys and values through the layer's output.

    A layer gathers its weights for backward when the gradient of its output arrives. In a context's pass the last
    layer's output is unused, and only its keys and values get gradients, which would meet freed weights.
    """
    cache = with_cache(kwargs).get("past_key_values")
    hidden = output if isinstance(output, Tensor) else output[0]
    if cache is None or not hidden.requires_grad:
        return
    cached = cache.layers[layer.self_attn.layer_idx]  # type: ignore[union-attr]
    cached.keys, cached.values = _AfterOutput.apply(cached.keys, cached.values, hidden)


class _AfterOutput(torch.autograd.Function):
    """Pass keys and values through unchanged and give the output a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ctx.hidden = hidden.shape, hidden.dtype, hidden.device
        return keys.view_as(keys), values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, keys_grad: Tensor, values_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, dtype, device = ctx.hidden
        return keys_grad, values_grad, torch.zeros(shape, dtype=dtype, device=device)
