"""Four presses at three ratios on the same needles, compared with kvpress's pipeline run setting by setting.

Run from the checkout: ``python benchmarks/press_matrix.py``. Takes about six minutes on two cores.

Both answer the same questions from the same evicted caches in float32, and must give the same answers. Ours prefills a
context once for all settings and answers a batch of questions at a time; the pipeline takes one context, one press and
one question, as in its own evaluation.
"""

from collections.abc import Iterator

import kvpress
import torch
from measure import paired_times, report
from transformers import PreTrainedTokenizerBase, pipeline

from data.evaluation import EvaluationData
from data.fact_task import Facts
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch

PRESSES = (kvpress.ExpectedAttentionPress, kvpress.SnapKVPress, kvpress.TOVAPress, kvpress.KeyDiffPress)
RATIOS = [0.25, 0.5, 0.75]
CASES, CONTEXT_TOKENS = 4, 512
GOAL = 1 / 3


def same_in_text(tokenizer: PreTrainedTokenizerBase, data: EvaluationData) -> Iterator[int]:
    """Rows whose context has the same tokens after decoding and encoding; a needle may merge with the text."""
    for number, batch in enumerate(data.test_dataloader()):
        (case,) = batch["cases"]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": case.context + "<<<"}], tokenize=False, add_generation_prompt=True
        )
        if tokenizer.encode(text.split("<<<")[0], add_special_tokens=False) == batch["context_ids"][0].tolist():
            yield number


def needles(tokenizer: PreTrainedTokenizerBase) -> CaseBatch:
    """A batch of CASES needles."""

    def data(batch_size: int, cases: int) -> EvaluationData:
        made = EvaluationData(
            tasks=[Facts()], lengths=[CONTEXT_TOKENS], cases_per_cell=cases, windows=0, batch_size=batch_size
        )
        made.tokenizer = tokenizer
        made.setup()
        return made

    rows = list(same_in_text(tokenizer, data(1, 4)))[:CASES]
    assert len(rows) == CASES, f"only {len(rows)} contexts survive a round through text"
    everything = next(iter(data(1_000, 4).test_dataloader()))
    index = torch.tensor(rows)
    return CaseBatch(
        context_ids=everything["context_ids"][index],
        continuation_ids=everything["continuation_ids"][index],
        continuation_lengths=everything["continuation_lengths"][index],
        cases=[everything["cases"][row] for row in rows],
    )


def main() -> None:
    """Print the ratio of times, and how many answers agree."""
    model, tokenizer = Backbone(dtype="float32", lora=None).load(trainable=False)
    batch = needles(tokenizer)
    points = [point for press in PRESSES for point in Setting(press(), RATIOS).points()]
    asking = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    answers: dict[str, list[str]] = {}

    def ours() -> None:
        measurement = Measurement(model, tokenizer, batch)
        answers["ours"] = [str(record["answer"]) for point in points for record in measurement.at(point)]

    def theirs() -> None:
        answers["theirs"] = [
            asking(
                case.context,
                question=case.question,
                answer_prefix=case.answer_prefix,
                press=type(point.press)(point.compression_ratio),
                max_new_tokens=case.max_new_tokens,
            )["answer"].strip()
            for point in points
            for case in batch["cases"]
        ]

    time = paired_times(ours, theirs, rounds=2)
    agree = sum(a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True))
    row = {
        "settings": len(points),
        "cases": CASES,
        "context tokens": CONTEXT_TOKENS,
        "time over kvpress": f"{time.median:.3f} ({time.low:.3f}-{time.high:.3f})",
        "same answers": f"{agree} of {len(answers['ours'])}",
    }
    report(
        "press_matrix",
        [row],
        {"time": time.median, "different answers": len(answers["ours"]) - agree},
        {},
        {"time": GOAL},
    )


if __name__ == "__main__":
    main()
