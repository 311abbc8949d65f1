"""Tensor files: reading returns what was written, and invalid files are refused by name."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv_pl.blocksparse.tensor_format import LayerTensors, Metadata, TensorFileError, file_name, read, write

NAME = "tensors_seq24_layer8_sample1_20240219_120000.pt"
METADATA = Metadata(
    layer_idx=8,
    seq_len=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=40,
    batch_size=1,
    timestamp="20240219_120000",
    model_path="some/model",
)


def tensors(dtype: torch.dtype = torch.float32) -> LayerTensors:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 24, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    return LayerTensors(query, key, value, METADATA)


def content() -> dict[str, Any]:
    made = tensors()
    return {"Q": made.query, "K": made.key, "V": made.value, "metadata": dict(METADATA)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    written = tensors(dtype)
    path = write(tmp_path, 1, written)
    assert path.name == NAME == file_name(METADATA, 1)
    found = read(path)
    assert found.metadata == METADATA
    for name in ("query", "key", "value"):
        torch.testing.assert_close(getattr(found, name), getattr(written, name), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_view_is_written_without_what_it_looks_into(tmp_path: Path) -> None:
    made = tensors()
    many = made.query.repeat(50, 1, 1, 1).transpose(1, 2)  # as a layer has them
    path = write(tmp_path, 1, replace(made, query=many[3:4].transpose(1, 2)))
    numbers = made.query.numel() + made.key.numel() + made.value.numel()
    assert path.stat().st_size < 4 * numbers + 4096
    torch.testing.assert_close(read(path).query, made.query)


def refused(path: Path, wrong: str) -> None:
    with pytest.raises(TensorFileError) as caught:
        read(path)
    assert str(caught.value).startswith(path.name)
    assert wrong in str(caught.value)
    assert "collect.yaml" in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = write(tmp_path, 1, tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refused(path, "truncated")


def test_a_file_that_is_not_there_or_no_tensor_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / NAME, "does not exist")
    (tmp_path / NAME).write_text("not tensors at all")
    refused(tmp_path / NAME, "not in torch.save's zip format")


class Code:
    """Unpickling it makes the folder ``ran``."""

    def __init__(self, ran: str) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.ran,)


@pytest.mark.parametrize("kind", ["torch.save", "old torch.save", "pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / NAME
    evil = content() | {"Q": Code(str(ran))}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "torch.save")
    refused(path, "would run their code" if kind == "torch.save" else "not in torch.save's zip format")
    assert not ran.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert ran.exists(), "there was no code in it"


def without(name: str, of: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in of.items() if key != name}


def with_metadata(**changed: Any) -> dict[str, Any]:
    return content() | {"metadata": dict(METADATA) | changed}


def nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(2, torch.tensor([5]), torch.nan)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda: without("V", content()), "['K', 'Q', 'metadata'] instead of"),
        (lambda: [1, 2], "holds list instead of"),
        (lambda: content() | {"K": content()["K"][0]}, "floating-point numbers as K"),
        (lambda: content() | {"Q": content()["Q"].long()}, "floating-point numbers as Q"),
        (lambda: content() | {"Q": "text"}, "floating-point numbers as Q"),
        (lambda: content() | {"metadata": without("model_path", dict(METADATA))}, "has the metadata"),
        (lambda: with_metadata(num_heads=4.0), "num_heads=4.0, which should be of type int"),
        (lambda: with_metadata(batch_size=True), "batch_size=True"),
        (lambda: with_metadata(timestamp=20240219), "timestamp=20240219, which should be of type str"),
        (lambda: with_metadata(head_dim=16), "Q of shape (1, 4, 24, 8), but its metadata says (1, 4, 24, 16)"),
        (lambda: content() | {"K": content()["K"][:, :, 1:]}, "K of shape (1, 2, 23, 8)"),
        (lambda: content() | {"V": content()["V"][:, :1]}, "V of shape (1, 1, 24, 8)"),
        (
            lambda: with_metadata(num_kv_heads=3) | {n: content()["Q"][:, :3] for n in "KV"},
            "which 3 key/value heads cannot share",
        ),
        (lambda: content() | {"V": content()["V"].half()}, "of different types"),
        (lambda: content() | {"K": nan(content()["K"])}, "infinite or NaN"),
        (lambda: with_metadata(layer_idx=9), "a name that contradicts its metadata (tensors_seq24_layer9_sample1_"),
        (lambda: with_metadata(timestamp="20240219_120001"), "a name that contradicts its metadata"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Callable[[], Any], wrong: str) -> None:
    path = tmp_path / NAME
    torch.save(change(), path)
    refused(path, wrong)


@pytest.mark.parametrize("name", ["tensors_seq24_layer8_20240219_120000.pt", "tensors_seq24_layer8_sampleX_2024.pt"])
def test_a_name_that_says_no_sample_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1, tensors()).rename(tmp_path / name)
    refused(tmp_path / name, "has a name that contradicts its metadata")
