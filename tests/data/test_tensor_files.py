"""Tensor files grouped by their names, and the error if there are none."""

from pathlib import Path

import pytest

from data.tensor_files import NAME, TensorFiles
from sparsekv_pl.blocksparse.tensor_format import Metadata, file_name


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def name(length: int, layer: int, sample: int, stamp: str = "20240219_120000") -> str:
    return f"tensors_seq{length}_layer{layer}_sample{sample}_{stamp}.pt"


def groups(data: TensorFiles) -> list[list[str]]:
    data.setup("predict")
    return [[Path(path).name for path in paths] for paths in data.predict_dataloader()]


def test_one_sample_of_one_collection_is_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = "20240220_080000"
    wanted = [
        [name(512, 0, 0), name(512, 2, 0), name(512, 10, 0)],  # 10 comes after 2
        [name(512, 0, 0, later)],
        [name(512, 1, 3)],
        [name(4096, 0, 0)],
    ]
    touch(tmp_path, *(file for group in wanted for file in reversed(group)))
    touch(tmp_path, "summary_seq512_20240219_120000.json", "report.md", ".tensors_seq512_layer0_sample0_x.pt.77")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert groups(TensorFiles(str(tmp_path))) == groups(TensorFiles("~")) == wanted


def test_lengths_and_layers_are_chosen(tmp_path: Path) -> None:
    touch(tmp_path, *(name(length, layer, 0) for length in (512, 1024, 4096) for layer in (0, 1, 2)))
    data = TensorFiles(str(tmp_path), lengths=[4096, 512], layers=[0, 2])
    assert groups(data) == [[name(512, 0, 0), name(512, 2, 0)], [name(4096, 0, 0), name(4096, 2, 0)]]
    assert groups(TensorFiles(str(tmp_path), layers=[0])) == [[name(length, 0, 0)] for length in (512, 1024, 4096)]


def test_a_name_that_says_nothing_is_a_batch_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path, name(512, 0, 0), "tensors_broken.pt")
    assert groups(TensorFiles(str(tmp_path), lengths=[512])) == [[name(512, 0, 0)], ["tensors_broken.pt"]]


def test_names_are_those_that_are_written() -> None:
    metadata = Metadata(
        layer_idx=8,
        seq_len=4096,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_size=32,
        batch_size=1,
        timestamp="20240219_120000",
        model_path="some/model",
    )
    found = NAME.fullmatch(file_name(metadata, 17))
    assert found is not None
    assert found.groupdict() == {"length": "4096", "layer": "8", "sample": "17", "timestamp": "20240219_120000"}


def test_without_files_it_says_how_to_get_some(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"holds no tensors_\*.pt files: collect some first: .*collect.yaml"):
            TensorFiles(str(folder)).setup("predict")
    touch(tmp_path, name(512, 0, 0))
    with pytest.raises(ValueError, match=r"none of the 1 tensor files .* lengths=\[4096\]"):
        TensorFiles(str(tmp_path), lengths=[4096]).setup("predict")
