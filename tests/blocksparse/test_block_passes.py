"""Block-sparse attention on cases: equal to a dense pass if all blocks are selected, otherwise to a masked one."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.attention.blocks import Blocks, TopBlocks
from sparsekv_pl.blocksparse.block_methods import (
    DENSE,
    BlockMethod,
    FirstDense,
    Watched,
    block_methods,
    oracle,
    thresholded,
)
from sparsekv_pl.blocksparse.block_passes import BlockPasses
from sparsekv_pl.blocksparse.control_blocks import LocalBlocks, RandomBlocks
from sparsekv_pl.blocksparse.gate import AttentionGates
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo
from tests.tiny_training import MakeBackbone

SIZE, CONTEXT, CONTINUATION = 8, 64, 12
LOCAL = BlockMethod("local", lambda: LocalBlocks(SIZE))


@pytest.fixture(scope="module")
def loaded(tiny_backbone: MakeBackbone) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = tiny_backbone(lora=None).load(trainable=False)
    return causal_lm(model), tokenizer


def batch(task: str = TEXT) -> CaseBatch:
    rows = torch.randint(2, 1024, (1, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    answers = () if task == TEXT else ("zebra",)
    return CaseBatch(
        context_ids=rows[:, :CONTEXT],
        continuation_ids=rows[:, CONTEXT:],
        continuation_lengths=torch.tensor([CONTINUATION]),
        cases=[CaseInfo(f"{task}/0", task, answers, max_new_tokens=4)],
    )


def masked_nll(model: PreTrainedModel, ids: Tensor, visible: Tensor) -> float:
    """Reference: one eager pass over everything with a mask of all pairs, summed over the continuation."""
    model.set_attn_implementation("eager")
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits = model(ids, attention_mask=mask).logits[0, CONTEXT:-1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, CONTEXT + 1 :], reduction="sum"))


@torch.no_grad()
@pytest.mark.parametrize("budget", [2, 3, 100])
def test_text_under_the_nearest_blocks_equals_a_masked_pass(loaded: tuple, budget: int) -> None:
    """Context and continuation both: block i sees the first block and those from i - budget + 2 on."""
    model, tokenizer = loaded
    dense, sparse = BlockPasses(model, tokenizer, batch()).records([LOCAL], [budget])
    ids = torch.cat([batch()["context_ids"], batch()["continuation_ids"]], 1)
    position = torch.arange(CONTEXT + CONTINUATION)
    row, column = position[:, None], position
    causal = column <= row
    near = (column // SIZE == 0) | (column // SIZE > row // SIZE - budget + 1)
    assert sparse["nll"] == pytest.approx(masked_nll(model, ids, causal & near), rel=1e-4)
    assert dense["nll"] == pytest.approx(masked_nll(model, ids, causal), rel=1e-4)
    assert sparse["tokens"] == dense["tokens"] == CONTINUATION - 1
    assert dense["kl"] == pytest.approx(0, abs=1e-5)
    assert (sparse["kl"] > 0.01) == (budget < 100)


def test_first_layers_are_dense_for_every_method_and_counted_so(loaded: tuple) -> None:
    """Both layers of the model dense: nothing is sparse."""
    methods = [LOCAL, BlockMethod("walk", lambda: SketchWalk(SIZE, 16, dense_layers=0))]
    passes = {dense: BlockPasses(*loaded, batch(), dense).records(methods, [2]) for dense in (0, 1, 2)}
    sparsity = {dense: [record["sparsity"] for record in records[1:]] for dense, records in passes.items()}
    assert sparsity[2] == [0, 0]
    assert sparsity[1] == pytest.approx([value / 2 for value in sparsity[0]])
    assert sparsity[0] == pytest.approx([1 - 15 / 36] * 2)
    assert all(record["kl"] == pytest.approx(0, abs=1e-5) for record in passes[2])


def test_a_needle_is_answered_under_every_method(loaded: tuple) -> None:
    gates = AttentionGates.for_model(loaded[0], block_size=SIZE, gate_dim=16)
    methods = [*block_methods(gates, SIZE, 16, 8, 1, [1.0, 0.25], 0.1, 0), oracle(SIZE)]
    records = BlockPasses(*loaded, batch("needle"), 1).records(methods, [100, 2])
    names = [(record["method"], record["budget"]) for record in records]
    assert names[0] == (DENSE, None)
    assert names.count((thresholded(0.1), None)) == 1
    assert len(names) == len(set(names)) == 1 + 2 * len(methods) - 1
    answers = {name: record["answer"] for name, record in zip(names, records, strict=True)}
    assert {answer for (_, budget), answer in answers.items() if budget == 100} == {answers[DENSE, None]}
    assert all(0 <= record["exact"] <= 1 and record["answers"] == ["zebra"] for record in records)


def test_a_dense_scorer_is_still_asked() -> None:
    """It may remember: Sketch&Walk's walk begins in the first layer."""
    asked: list[int] = []

    class Noted(RandomBlocks):
        def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
            asked.append(layer)
            return super().__call__(layer, query, key)

    selector = TopBlocks(FirstDense(Noted(SIZE), 2), 3)
    query, key = torch.zeros(1, 2, CONTEXT, 4), torch.zeros(1, 1, CONTEXT, 4)
    chosen = [selector(layer, query, key) for layer in range(3)]
    assert asked == [0, 1, 2]
    assert chosen[:2] == [None, None]
    assert isinstance(chosen[2], Blocks)


def test_watching_counts_the_context_alone() -> None:
    watched = Watched(TopBlocks(LocalBlocks(SIZE), 2))
    query, key = torch.zeros(1, 2, CONTEXT, 4), torch.zeros(1, 1, CONTEXT, 4)
    watched(0, query, key)
    watched(0, query[:, :, :1], torch.zeros(1, 1, CONTEXT + 1, 4))
    assert watched.sparsity() == pytest.approx(1 - 15 / 36)


def test_methods_without_gates() -> None:
    names = [method.name for method in block_methods(None, SIZE, 16, 8, 2, [0.5], 0.1, 0)]
    assert names == ["Sketch&Walk", "random", "local"]
