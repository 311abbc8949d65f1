"""Which layer goes where, with devices that this machine does not have; and every wrong setting named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4TextConfig, LlamaConfig

from sparsekv_pl.models import placement
from sparsekv_pl.models.placement import Placement, in_bytes, spread
from sparsekv_pl.models.quantisation import four_bit, skeleton

LAYERS = [10] * 6


@pytest.mark.parametrize(
    ("rooms", "even", "expected"),
    [
        ({0: 100, "cpu": 100}, True, [0] * 6),
        ({"cpu": 100}, True, ["cpu"] * 6),
        ({0: 100, 1: 100}, True, [0, 0, 0, 1, 1, 1]),  # each may take half of all 65 and a layer; 5 are outside
        ({0: 100, 1: 100}, False, [0] * 6),
        ({0: 30, 1: 100}, True, [0, 0, 1, 1, 1, 1]),
        ({0: 35, 1: 30}, True, [0, 0, 0, 1, 1, 1]),
        ({0: 35, "cpu": 200}, True, [0, 0, "cpu", "cpu", "cpu", "cpu"]),  # GPU 0 has room to bring a layer in
        ({0: 35, "cpu": 85}, True, [0, 0, "cpu", "cpu", "disk", "disk"]),  # 40 a layer outside the GPUs
        ({0: 15, "cpu": 0}, True, ["disk"] * 6),
        ({"cpu": 45}, True, ["cpu", "cpu", "cpu", "disk", "disk", "disk"]),
    ],
)
def test_layers_fill_devices_in_order(rooms: dict[Any, int], even: bool, expected: list[Any]) -> None:
    assert spread(5, LAYERS, [40] * 6, rooms, even) == expected


def test_what_fits_nowhere_is_said() -> None:
    with pytest.raises(ValueError, match=r"embeddings, head and the largest layer take .* but 0 has"):
        spread(5, LAYERS, LAYERS, {0: 14, "cpu": 100}, True)
    with pytest.raises(ValueError, match="leaves no device"):
        spread(5, LAYERS, LAYERS, {}, True)


def test_head_and_embeddings_stay_on_the_first_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In 4 bits a layer on the CPU counts in full: transformers quantises nothing there."""
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=12)
    plain = skeleton(config, torch.bfloat16)
    model = skeleton(config, torch.bfloat16, four_bit(config, torch.bfloat16))
    small = placement.weight_bytes(model.model.layers[0])
    large = placement.weight_bytes(plain.model.layers[0])
    outside = placement.weight_bytes(model) - 12 * small
    rooms = {0: outside + 5 * small, "cpu": 3 * large}
    monkeypatch.setattr(Placement, "rooms", lambda _: rooms)
    placed = Placement(offload_folder=str(tmp_path)).arguments(model, plain)
    devices = placed["device_map"]
    assert small < 0.35 * large
    assert [devices.pop(f"model.layers.{i}") for i in range(12)] == [0] * 4 + ["cpu"] * 3 + ["disk"] * 5
    assert devices == {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    assert placed["offload_folder"] == str(tmp_path)


def test_llama_4_is_spread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Llama4TextConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    model = skeleton(config, torch.bfloat16)
    layer = placement.weight_bytes(model.model.layers[0])
    outside = placement.weight_bytes(model) - 4 * layer
    monkeypatch.setattr(Placement, "rooms", lambda _: {0: outside + 2 * layer, 1: 10 * layer})
    devices = Placement().arguments(model, model)["device_map"]
    assert [devices[f"model.layers.{i}"] for i in range(4)] == [0, 0, 1, 1]
    assert {devices[name] for name in devices if "layers" not in name} == {0}


def test_limits_are_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: {0: 100, 1: 100, "cpu": 50})
    assert Placement().rooms() == {0: 90, 1: 90, "cpu": 45}
    assert list(Placement(max_memory={"cpu": "1KiB", "1": "2KB"}).rooms().items()) == [(1, 2000), ("cpu", 1024)]
    with pytest.raises(ValueError, match=r"which names \['2', 'tpu'\], but this machine has \['0', '1', 'cpu'\]"):
        Placement(max_memory={"2": "1GiB", "tpu": "1GiB", "cpu": "1GiB"}).rooms()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "balanced"}, "device_map='balanced' must be one of"),
        ({"max_memory": {"cpu": "lots"}}, r"max_memory\['cpu'\]='lots' is no size"),
        ({"max_memory": {"0": "70 GiBs"}}, r"max_memory\['0'\]='70 GiBs' is no size"),
        ({"device_map": "cpu", "max_memory": {"cpu": "1GiB"}}, "max_memory has no effect with device_map='cpu'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**settings)


def test_devices_and_folders_are_checked_before_anything_loads(tmp_path: Path) -> None:
    model = skeleton(LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1), torch.float32)
    with pytest.raises(ValueError, match="device_map='cuda:99', but this machine has"):
        Placement("cuda:99").arguments(model, model)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"offload_folder=.*cannot be written to"):
        Placement(offload_folder=str(tmp_path / "file" / "folder")).arguments(model, model)


def test_sizes() -> None:
    assert [in_bytes(size, "x") for size in ("1KiB", "2MB", "1.5GiB", "12", 7)] == [1024, 2_000_000, 3 * 2**29, 12, 7]
