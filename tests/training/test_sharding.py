"""A sharded backbone before it is filled, and what cannot be sharded; training: tests/distributed/test_fsdp.py."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvpress import SnapKVPress
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.local_gradients import LocalGradients
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.placement import Placement
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from sparsekv_pl.training.sharding import shard
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("train", ["lora", "full", "adapter"])
def test_a_sharded_backbone_has_every_weight_and_no_memory(
    kind: str, train: str, tiny_backbone: MakeBackbone, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings: dict[str, Any] = {} if train == "lora" else {"lora": None}
    if train == "adapter":
        settings["adapter"] = str(tmp_path_factory.mktemp("adapter"))
        tiny_backbone(kind).load()[0].save_pretrained(settings["adapter"])
    whole, _ = tiny_backbone(kind, **settings).load()
    empty, _ = tiny_backbone(kind, sharded=True, **settings).load()

    def described(model: Any) -> dict[str, Any]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    assert described(empty) == described(whole)
    assert empty.state_dict().keys() == whole.state_dict().keys()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.training == whole.training
    assert type(empty) is type(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit=true: 4-bit weights train under DDP"),
        ({"placement": Placement()}, "a placement: placements are for evaluation"),
    ],
)
def test_what_a_sharded_backbone_does_not_go_with(
    settings: dict[str, Any], message: str, tiny_backbone: MakeBackbone
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_backbone(sharded=True, **settings).load()


def test_evaluation_takes_no_sharded_backbone(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="sharded=true does not go with evaluation"):
        tiny_backbone(sharded=True).load(trainable=False)


def test_a_strategy_that_does_not_shard_is_refused(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(sharded=True), RealEviction(SnapKVPress(window_size=8)))
    with pytest.raises(ValueError, match=r"add --config configs/train/fsdp.yaml"):
        tiny_trainer(Curriculum(Fixed(0.5))).fit(module, tiny_data())


@pytest.fixture
def mesh() -> Iterator[Any]:
    """mesh(data, tensor): as ModelParallelStrategy makes it, of four ranks that are not there."""
    init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    names = "data_parallel", "tensor_parallel"

    def make(data: int, tensor: int) -> DeviceMesh:
        return init_device_mesh("cpu", (data, tensor), mesh_dim_names=names)

    yield make
    destroy_process_group()


def test_ranks_that_would_read_the_same_data_are_refused(mesh: Any) -> None:
    module = SimpleNamespace(backbone=SimpleNamespace(sharded=True), device_mesh=mesh(1, 4))
    with pytest.raises(ValueError, match=r"Set data_parallel_size=4 .* and tensor_parallel_size=1"):
        shard(module)


def test_a_whole_model_on_every_rank_is_refused(mesh: Any) -> None:
    module = SimpleNamespace(backbone=SimpleNamespace(sharded=False), device_mesh=mesh(4, 1))
    with pytest.raises(ValueError, match=r"set backbone.sharded=true"):
        shard(module)


@pytest.mark.parametrize(
    ("parameters", "lengths", "settings", "validates", "message"),
    [
        ({"temperature": torch.ones(1)}, range(96, 97), {}, {}, "SnapKVPress has parameters of its own"),
        ({}, range(64, 97), {}, {}, "set data.shortest_context=null"),
        ({}, range(96, 97), {"local_gradients": LocalGradients()}, {}, "set eviction.local_gradients=null"),
        ({}, range(96, 97), {"decoding": Decoding(80)}, {}, "set eviction.decoding=null"),
        ({}, range(96, 97), {}, {"decoding": Decoding(80)}, "set validation_eviction.decoding=null"),
        ({}, range(96, 97), {}, {"chunk_tokens": 70}, r"in 1 to 2 chunks \(chunk_tokens=70\)"),
    ],
)
def test_ranks_that_would_not_agree_are_refused(
    mesh: Any,
    parameters: dict[str, Any],
    lengths: range,
    settings: dict[str, Any],
    validates: dict[str, Any],
    message: str,
    tiny_backbone: MakeBackbone,
) -> None:
    data = SimpleNamespace(context_lengths=lengths, evicted_lengths=range(64, 97))
    module = SimpleNamespace(
        backbone=SimpleNamespace(sharded=True),
        device_mesh=mesh(4, 1),
        model=tiny_backbone(sharded=True).load()[0],
        press=SnapKVPress(),
        eviction=RealEviction(SnapKVPress(), **settings),
        validation_student=SimpleNamespace(eviction=RealEviction(SnapKVPress(), **validates)),
        press_parameters=parameters,
        trainer=SimpleNamespace(datamodule=data),
    )
    with pytest.raises(ValueError, match=message):
        shard(module)
