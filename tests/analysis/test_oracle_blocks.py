"""A run of the oracle blocks: Scout-KV's layout, agreement with eager attention, and resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.question_sources import LocalQuestions, PlantedQuestions
from data.questions import QuestionData
from data.text import EmbeddedText
from sparsekv_pl.analysis.oracle_blocks import OracleBlocks, bm25_scores
from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.eviction import prefill
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeTrainer

Run = Callable[..., OracleBlocks]
BLOCK = 32


def questions(samples: int = 4) -> QuestionData:
    return QuestionData(PlantedQuestions(EmbeddedText(), facts=1), samples=samples, max_tokens=300)


@pytest.fixture
def run(tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path) -> Run:
    """Measure and return the module."""

    def measure(
        data: QuestionData | None = None, backbone: dict[str, Any] | None = None, **settings: Any
    ) -> OracleBlocks:
        given: dict[str, Any] = {"output": str(tmp_path), "block_size": BLOCK, "top_k": 3}
        module = OracleBlocks(tiny_backbone(**(backbone or {})), **(given | settings))
        tiny_trainer().predict(module, datamodule=data or questions())
        return module

    return measure


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@torch.no_grad()
def eager_scores(module: OracleBlocks, data: QuestionData) -> list[torch.Tensor]:
    """(layers, heads, N) of each question from transformers' own attention matrices."""
    found = []
    for batch in data.predict_dataloader():
        ids = torch.cat([batch["context_ids"], batch["continuation_ids"]], 1)
        with attention_implementation(module.causal_lm, "eager"):
            attentions = module.causal_lm(input_ids=ids, output_attentions=True).attentions
        context = batch["context_ids"].shape[1]
        rows = torch.stack([attention[0, :, -1, :context] for attention in attentions])
        found.append(torch.stack([block.sum(-1) for block in rows.split(BLOCK, dim=-1)], -1))
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_seeds_file_holds_what_eager_attention_gives(run: Run, tmp_path: Path, attention: str) -> None:
    data = questions()
    module = run(data, {"attention": attention}, top_k=5)
    written = read(tmp_path, "oracle_data.json")
    assert list(written) == ["metadata", "samples"]
    assert written["metadata"] == {
        "model": module.base["pretrained"],
        "quantization": "none (float32)",
        "block_size": BLOCK,
        "num_samples": 4,
    }
    for sample, expected, batch in zip(
        written["samples"], eager_scores(module, data), data.predict_dataloader(), strict=True
    ):
        (case,) = batch["cases"]
        names = "question answer top_5_block_ids all_block_scores num_blocks context_tokens"
        assert list(sample) == names.split()
        mean = expected.mean((0, 1))
        assert list(sample["all_block_scores"]) == [str(i) for i in range(len(mean))]
        assert list(sample["all_block_scores"].values()) == pytest.approx(mean.tolist(), abs=1e-4)
        assert sample["top_5_block_ids"] == mean.topk(5).indices.tolist()
        assert sample["num_blocks"] == len(mean) == -(-sample["context_tokens"] // BLOCK)
        assert sample["context_tokens"] == batch["context_ids"].shape[1]
        assert (sample["question"], sample["answer"]) == (case.question.strip(), case.answers[0])


def test_layers_and_heads_are_chosen_without_measuring_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = questions()
    run(data)
    before = read(tmp_path, "oracle_data.json")["samples"]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(OracleBlocks, "measure", never)
        module = run(data, layers=[1], heads=[0, 3], top_k=2)
        with pytest.raises(AssertionError, match="measured again"):
            run(data, block_size=BLOCK // 2)
    after = read(tmp_path, "oracle_data.json")["samples"]
    assert before != after
    for sample, expected in zip(after, eager_scores(module, data), strict=True):
        mean = expected[1, [0, 3]].mean(0)
        assert list(sample["all_block_scores"].values()) == pytest.approx(mean.tolist(), abs=1e-4)
        assert sample["top_2_block_ids"] == mean.topk(2).indices.tolist()
    assert "heads [0, 3] of layers [1]" in (tmp_path / "report.md").read_text()


def test_the_report_and_its_pictures(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = questions()
    run(data)
    report = read(tmp_path, "report.json")
    found = report["findings"]["base"]
    assert found["questions"] == found["answers_with_a_place"] == 4
    for sample, batch in zip(report["samples"], data.predict_dataloader(), strict=True):
        start, end = batch["cases"][0].answer_span  # type: ignore[misc]
        assert sample["answer_blocks"] == sorted({start // BLOCK, (end - 1) // BLOCK})
        assert sum(sample["block_scores"]) + sample["beyond"] == pytest.approx(1)
        best = max(range(len(sample["bm25"])), key=sample["bm25"].__getitem__)
        assert sample["answer_blocks"][0] - best in (0, 1), "the statement begins a line before its value may"
    text = (tmp_path / "report.md").read_text()
    for name in ("mass", "recall", "layers", "samples", "heads"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    assert "share of the attention on the document in the" in text
    assert "share of the attention on the document in the" in capsys.readouterr().out


def test_a_trained_adapter_stands_beside_its_base(run: Run, tiny_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = {"adapter": tiny_adapter(1.0)}
    run()
    alone = read(tmp_path, "oracle_data.json")
    run(backbone=adapter)
    base, trained = (read(tmp_path, f"oracle_data{ending}.json") for ending in ("", "_trained"))
    assert base == alone
    assert trained["metadata"]["model"].endswith(f" + {adapter['adapter']}")
    assert [s["question"] for s in trained["samples"]] == [s["question"] for s in base["samples"]]
    assert all(
        a["all_block_scores"] != b["all_block_scores"] for a, b in zip(base["samples"], trained["samples"], strict=True)
    )
    report = read(tmp_path, "report.json")
    changes = report["findings"]["trained minus base"]
    assert changes["share of the hottest, without sink"]["cases"] == 4
    assert (tmp_path / "heads_trained.png").exists()


def test_answers_without_a_place_count_in_mass_alone(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"document": f"{i} word " * 60, "question": "Which word?", "answer": "none"} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run(QuestionData(LocalQuestions([str(path)]), samples=3, max_tokens=300))
    found = read(tmp_path, "report.json")["findings"]["base"]
    assert (found["questions"], found["answers_with_a_place"], found["recall"]) == (3, 0, {})
    assert found["concentration"]["with sink"]["top_share"]["cases"] == 3
    assert not (tmp_path / "recall.png").exists()


def test_one_pass_over_each_prompt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    forward = prefill.continue_from

    def counted(model: Any, ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(tuple(ids.shape))
        return forward(model, ids, *rest, **more)

    monkeypatch.setattr("sparsekv_pl.analysis.oracle_blocks.continue_from", counted)
    data = questions()
    run(data)
    assert seen == [
        (1, batch["context_ids"].shape[1] + batch["continuation_ids"].shape[1]) for batch in data.predict_dataloader()
    ]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"layers": [2]}, r"layers is \[2\]: give some of 0 to 1"),
        ({"heads": [0, 0]}, "none twice"),
        ({"layers": []}, "or null for all"),
        ({"block_size": 0}, "block_size is 0"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_settings_without_sense_are_refused(
    tiny_backbone: MakeBackbone, tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OracleBlocks(tiny_backbone(), str(tmp_path), **setting)


def test_prompts_beyond_the_models_positions_are_refused(run: Run) -> None:
    data = QuestionData(PlantedQuestions(EmbeddedText()), samples=1, max_tokens=1200)
    with pytest.raises(ValueError, match="trained on 1024"):
        run(data)


def test_bm25_finds_the_block_with_the_questions_words() -> None:
    texts = ["the weather is fine", "the password of Project Ember is sesame", "a project of no name", ""]
    scores = bm25_scores("What is the password of Project Ember?", texts)
    assert scores.index(max(scores)) == 1
    assert scores[2] > scores[0] == scores[3] == 0
    assert bm25_scores("Where was Napoleon?", texts) == [0, 0, 0, 0]
    assert bm25_scores("What is the?", texts) == [0, 0, 0, 0]
    assert bm25_scores("Password?", ["password"]) != [0]
