"""The DataModule: shares, shapes, disjoint splits, and resuming to the token."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from data import EvictionData
from data.mixture_stream import MixtureStream
from data.resumable import RankStatefulLoader
from data.text import Splits
from sparsekv_pl.models.batch import IGNORE


def _data(tokenizer, source, **options) -> EvictionData:
    small: dict[str, Any] = {
        "context_tokens": 300,
        "continuation_tokens": 20,
        "batch_size": 2,
        "splits": Splits(0.6, 0.2, 0.2),
        "validation_windows": 3,
        "validation_needles": 3,
    }
    data = EvictionData(source, **(small | options))
    data.tokenizer = tokenizer
    data.setup()
    return data


def _take(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def _same(one, other):
    return all(torch.equal(one[k], other[k]) for k in ("context_ids", "continuation_ids", "labels")) and (
        (one["document_ids"], one["tasks"]) == (other["document_ids"], other["tasks"])
    )


def test_batches_keep_their_shapes_and_kinds(tokenizer, numbered):
    batches = _take(_data(tokenizer, numbered).train_dataloader(), 40)
    for batch in batches:
        assert batch["context_ids"].shape == (2, 300)
        assert batch["continuation_ids"].shape == batch["labels"].shape
        assert batch["labels"][:, 0].eq(IGNORE).all()
        supervised = batch["labels"] != IGNORE
        assert supervised.any(dim=1).all()
        assert torch.equal(batch["labels"][supervised], batch["continuation_ids"][supervised])
        assert batch["tasks"] in (["text"] * 2, ["needle"] * 2)
        assert len(batch["document_ids"]) == 2
    needles = sum(batch["tasks"][0] == "needle" for batch in batches)
    assert 14 <= needles <= 34


@pytest.mark.parametrize(("share", "task"), [(0.0, "text"), (1.0, "needle")])
def test_share_at_its_ends(tokenizer, numbered, share, task):
    batches = _take(_data(tokenizer, numbered, retrieval_share=share).train_dataloader(), 5)
    assert {name for batch in batches for name in batch["tasks"]} == {task}


def test_splits_share_no_document(tokenizer, numbered):
    data = _data(tokenizer, numbered)
    loaders = {
        "train": _take(data.train_dataloader(), 30),
        "validation": data.val_dataloader(),
    }
    texts = {document.id: document.text for document in numbered.documents()}
    for split, batches in loaders.items():
        seen = {name for batch in batches for row in batch["document_ids"] for name in row.split(" + ")}
        assert seen
        assert {data.splits.of(texts[name]) for name in seen} == {split}


def test_validation_is_deterministic_and_counts_its_cases(tokenizer, numbered):
    one, other = (list(_data(tokenizer, numbered).val_dataloader()) for _ in range(2))
    assert all(map(_same, one, other))
    tasks = [task for batch in one for task in batch["tasks"]]
    assert tasks == ["text"] * 3 + ["needle"] * 3
    more = list(_data(tokenizer, numbered, validation_needles=7, validation_windows=0).val_dataloader())
    assert _same(one[2], more[0])  # a case does not depend on how many there are


def test_state_of_other_ranks_is_refused(tokenizer, numbered):
    loader = _data(tokenizer, numbered).train_dataloader()
    saved = loader.state_dict()
    with pytest.raises(ValueError, match="ranks was 2, is 1"):
        loader.load_state_dict(saved | {"settings": saved["settings"] | {"ranks": 2}})


def _rank_resumes(rank, tokenizer, source, folder):
    """One of two gloo ranks: take 3 batches, save as rank 0 would for all, go on in a new loader."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def loader():
        data = _data(tokenizer, source)
        return RankStatefulLoader(MixtureStream(data, rank, 2), 100, 0)

    first = loader()
    iterator = iter(first)
    seen = [next(iterator) for _ in range(3)]
    states = [first.state_dict()]
    torch.distributed.broadcast_object_list(states, src=0)
    rest = [next(iterator) for _ in range(4)]
    second = loader()
    second.load_state_dict(states[0])
    assert all(map(_same, rest, _take(second, 4)))
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_each_rank_gets_its_own_state_back(tokenizer, numbered, tmp_path):
    torch.multiprocessing.start_processes(_rank_resumes, (tokenizer, numbered, tmp_path), nprocs=2, start_method="fork")
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert [batch["tasks"] for batch in zero] == [batch["tasks"] for batch in one]
    assert not any(map(_same, zero, one))


def test_trainer_without_an_end_is_refused(tokenizer, numbered):
    data = _data(tokenizer, numbered)
    for options, name in (
        ({"max_epochs": 1}, "max_steps"),
        ({"max_steps": 5, "limit_train_batches": 2}, "limit_train_batches"),
    ):
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
        with pytest.raises(ValueError, match=f"trainer.{name}"):
            data.train_dataloader()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("context_tokens", 0),
        ("continuation_tokens", 1),
        ("batch_size", 0),
        ("num_workers", -1),
        ("retrieval_share", 1.5),
        ("needles", (0, 2)),
        ("validation_needles", -1),
    ],
)
def test_bad_arguments_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} is"):
        EvictionData(**{option: value})


def test_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        EvictionData().setup()
