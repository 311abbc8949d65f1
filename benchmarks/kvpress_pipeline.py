"""The trained model in kvpress's own pipeline against this project's evaluation, on the same cases.

Run from the checkout: ``python benchmarks/kvpress_pipeline.py --cases 100``. A hundred take an hour on one core.

The adapter is merged into its base and saved, transformers loads the plain model, and kvpress's
KVPressTextGenerationPipeline gets every case as text: context, question and answer prefix, as kvpress's evaluate.py
does. Both runs are written in kvpress's layout below ``output/kvpress_pipeline``. A ratio is the share of cases that
one of them finds and the other does not. A run that was stopped continues with the cases that are missing.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KeyDiffPress, KnormPress, KVPressTextGenerationPipeline, SnapKVPress
from measure import report
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.cases import CaseTask
from data.evaluation import EvaluationData
from data.fact_task import Facts
from sparsekv_pl.evaluation.batch_keys import batch_of
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.metrics.retrieval import retrieval_scores
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.kvpress_layout import write_kvpress_layout
from sparsekv_pl.storage.fingerprint import model_digest
from sparsekv_pl.storage.records import Record, Results
from sparsekv_pl.storage.result_keys import key_of
from sparsekv_pl.storage.source_digests import measuring_digest

Answering = Callable[[CaseBatch], Iterator[Record]]
"""Answers a case at every point."""

POINTS = (
    Point(),
    Point(KeyDiffPress(), 0.75),
    Point(KeyDiffPress(), 0.9),
    Point(KnormPress(), 0.75),
    Point(SnapKVPress(window_size=32), 0.75),
    Point(ExpectedAttentionPress(), 0.75),
)
DEPTHS = [0.05 + i / 10 for i in range(10)]
GOAL = 0.01
"""Most of the cases in which the two may differ."""


def batches_of(tokenizer: Any, cases: int, tokens: int, task: CaseTask) -> list[CaseBatch]:
    """The held-out cases of configs/evaluate/robust.yaml, one per batch."""
    data = EvaluationData(
        tasks=[task], lengths=[tokens], depths=DEPTHS, cases_per_cell=-(-cases // len(DEPTHS)), windows=0, batch_size=1
    )
    data.tokenizer = tokenizer
    data.setup()
    return [batch for batch, _ in zip(data.test_dataloader(), range(cases), strict=False)]


def ours(model: Any, tokenizer: Any) -> Answering:
    """What this project's evaluation records of the trained model."""

    def answered(batch: CaseBatch) -> Iterator[Record]:
        measurement = Measurement(causal_lm(model), tokenizer, batch)
        for point in POINTS:
            [found] = measurement.at(point)
            yield _columns(batch, point) | found

    return answered


def theirs(folder: str, dtype: torch.dtype) -> Answering:
    """What kvpress's pipeline answers with the merged model in ``folder``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))

    def answered(batch: CaseBatch) -> Iterator[Record]:
        [case] = batch["cases"]
        for point in POINTS:
            if point.press is not None:
                set_compression_ratio(point.press, point.compression_ratio)
            answer = pipeline(
                case.context,
                question=case.question,
                answer_prefix=case.answer_prefix,
                press=point.press,
                max_new_tokens=case.max_new_tokens,
            )["answer"]
            yield _columns(batch, point) | {"answer": answer} | retrieval_scores(answer, case.answers)

    return answered


def all_of(
    side: str, answered: Answering, batches: Sequence[CaseBatch], results: Results, **model: Any
) -> list[Record]:
    """The records of every case; those in ``results`` are taken from there, new ones are put there at once."""
    records: list[Record] = []
    for batch in tqdm(batches, desc=side):
        points = [point.described() for point in POINTS]
        key = key_of(
            side=side, points=points, batch=batch_of(batch, named=True), code=measuring_digest(Measurement), **model
        )
        if (found := results.get(key)) is None:
            results.put(key, found := list(answered(batch)), side)
        records += found
    return records


def _columns(batch: CaseBatch, point: Point) -> Record:
    [case] = batch["cases"]
    about = {"case": case.id, "task": case.task, "depth": case.depth, "seed": case.seed, "variant": "trained"}
    asked = {"question": case.question, "answers": list(case.answers), "answer_prefix": case.answer_prefix}
    where = {"length": batch["context_ids"].shape[1], "max_new_tokens": case.max_new_tokens}
    return about | asked | where | point.condition.columns()


def rows_of(sides: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """A row per press: what each side finds, and in how many cases they differ."""
    rows = []
    for point in POINTS:
        own, other = ([r for r in found if Condition.of(r) == point.condition] for found in sides.values())
        pairs = list(zip(own, other, strict=True))
        rows.append(
            {
                "press": point.condition.label,
                "evaluation": f"{sum(one['exact'] for one, _ in pairs):g} of {len(pairs)}",
                "pipeline": f"{sum(two['exact'] for _, two in pairs):g} of {len(pairs)}",
                "verdicts differ": sum(one["exact"] != two["exact"] for one, two in pairs),
                "answers equal": sum(one["answer"].strip() == two["answer"].strip() for one, two in pairs),
            }
        )
    return rows


def main() -> None:
    """Answer every case on both sides, write both layouts, and print where they differ."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1_024)
    parser.add_argument("--adapter", default="adapters/smollm2-135m-instruct")
    parser.add_argument("--pretrained", default=Backbone.pretrained)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("output/kvpress_pipeline"))
    given = parser.parse_args()
    model, tokenizer = Backbone(given.pretrained, given.dtype, adapter=given.adapter).load(trainable=False)
    batches = batches_of(tokenizer, given.cases, given.tokens, Facts())
    results = Results(given.output / "results")
    of = {"base": given.pretrained, "dtype": given.dtype, "adapter": model_digest(Path(given.adapter))}
    sides = {"evaluation": all_of("evaluation", ours(model.eval(), tokenizer), batches, results, **of)}
    with TemporaryDirectory() as folder:
        model.merge_and_unload().save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        other = theirs(folder, getattr(torch, given.dtype))
        sides["pipeline"] = all_of("pipeline", other, batches, results, **of)
    figures = {}
    for name, records in sides.items():
        folders = write_kvpress_layout(given.output / name, records, given.pretrained)
        figures[name] = {path.name: json.loads((path / "metrics.json").read_text()) for path in folders}
    apart = sum(figures["evaluation"][name] != metrics for name, metrics in figures["pipeline"].items())
    print(f"string_match differs in {apart} of {len(figures['pipeline'])} folders of {given.output}")
    rows = rows_of(sides)
    ratios = {row["press"]: row["verdicts differ"] / len(batches) for row in rows}
    report("kvpress_pipeline", rows, ratios, {}, dict.fromkeys(ratios, GOAL))


if __name__ == "__main__":
    main()
