"""The LightningModule that asks a hosted model the same questions, for comparison with evicted caches."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sparsekv_pl.evaluation.hosted_address import host_of
from sparsekv_pl.evaluation.hosted_client import HostedModel, HostedRequest
from sparsekv_pl.evaluation.hosted_reply import FINAL, Answer, Usage
from sparsekv_pl.evaluation.hosted_requests import ask
from sparsekv_pl.evaluation.measuring_module import MeasuringModule, Piece
from sparsekv_pl.evaluation.pace import ticking
from sparsekv_pl.metrics.retrieval import retrieval_scores
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo
from sparsekv_pl.models.gguf_checkpoint import EMBEDDED
from sparsekv_pl.reporting.condition import HOSTED, Condition
from sparsekv_pl.storage.records import Record
from sparsekv_pl.storage.result_keys import key_of

log = logging.getLogger(__name__)

TOKENS = ("prompt_tokens", "completion_tokens")
"""Columns of a record: the usage of a request, all attempts of all runs together."""
ANSWERED = "answered"


class HostedQuestion(NamedTuple):
    """A case, its request, and the key of its finished answer."""

    key: str
    described: Record
    """Columns of the record that do not depend on the answer."""
    info: CaseInfo
    request: HostedRequest


class HostedModule(MeasuringModule):
    """Asks a model behind an OpenAI-compatible endpoint the retrieval cases.

    One user message holds the context, the question and the beginning of the answer, as RULER asks API models. A local
    run continues a begun answer instead; OpenAI's and transformers' endpoints do not continue an assistant message. If
    an answer repeats its beginning, it is scored without it. If it rewords the beginning, it still contains the value:
    compare ``substring``, not ``exact``, with local models. Text windows are skipped, because these endpoints return no
    likelihood of a text.

    All cases are collected before anything is sent, so that the limits are checked against their sum. Each answer, and
    each refusal of a context that is too long, is stored in ``output/results`` when it arrives and never paid for
    twice. Requests that failed for another reason are sent again by the next run.

    Parameters
    ----------
    hosted
        The model, its endpoint, prices and limits.
    tokenizer
        ``pretrained`` of a Backbone; only its tokenizer is loaded. It cuts contexts to their lengths and estimates the
        tokens of a request; the endpoint counts with its own tokenizer.
    output
        Folder for the report and the finished work; null: where the run's name says, else output/hosted.
    title
        Title of the report.
    extra_tokens
        Tokens added to a case's ``max_new_tokens``: other tokenizers split a value into more tokens, and chat models
        write a few words before it.
    dry
        Print the plan and its cost, and send nothing.
    """

    one_process = (
        "trainer.devices={}: every process would have the limits to itself; use trainer.devices=1 and raise "
        "hosted.concurrency"
    )

    def __init__(
        self,
        hosted: HostedModel,
        tokenizer: str = EMBEDDED,
        output: str | None = None,
        title: str = "Hosted model",
        extra_tokens: int = 32,
        dry: bool = False,
    ) -> None:
        super().__init__(output or "output/hosted")
        if extra_tokens < 0:
            raise ValueError(f"extra_tokens={extra_tokens} must be at least 0")
        self.hosted, self.title = hosted, title
        self.extra_tokens, self.dry = extra_tokens, dry
        self.tokenizer = Backbone(pretrained=tokenizer).load_tokenizer()

    def setup(self, stage: str) -> None:
        """Read the finished work."""
        super().setup(stage)
        self.questions: list[HostedQuestion] = []
        self.skipped = 0

    def pieces(self, batch: CaseBatch, variant: str) -> Sequence[Piece]:  # noqa: ARG002
        """Collect the questions of a batch; ``on_test_end`` sends them all. Nothing is measured yet."""
        for info in batch["cases"]:
            if info.task == TEXT:
                self.skipped += 1
                continue
            question = self._question(info, batch["context_ids"].shape[1])
            if not self.dry and not self._finished(question.key):
                self.hosted.key()  # fail on a missing key now, not after all cases are made
            self.questions.append(question)
        return ()

    def on_test_end(self) -> None:
        """Send the questions that are not finished, write the report and print the table.

        Raises ``ValueError`` after the report is written, if the endpoint refused in a way that every further request
        would meet.
        """
        if self.skipped:
            log.warning("%d text windows skipped: hosted models only answer questions", self.skipped)
        missing = [question for question in self.questions if not self._finished(question.key)]
        print(self._plan(missing))
        if self.dry or not self.questions:
            return
        answers, unfinished = self._ask(missing)
        self.records = [
            question.described | (unfinished.get(question.key) or self.results.get(question.key) or [{}])[0]
            for question in self.questions
        ]
        super().on_test_end()
        for answer in answers:
            if answer.stops:
                raise ValueError(
                    f"{self.hosted.model}: no further requests are sent: {answer.message}. Answers are kept in "
                    f"{self.output}: fix this and run again to send the rest"
                )

    def write(self, records: list[Record], environment: dict[str, Any]) -> list[Path]:
        """Write the report and print the table."""
        usage = self._summary(records)
        print(usage)
        endpoint = host_of(self.hosted.base_url)
        return self.report_cases(records, environment | {"endpoint": endpoint, "device": "hosted", "usage": usage})

    def _finished(self, key: str) -> bool:
        records = self.results.get(key)
        return records is not None and _kind(records[0]) in (ANSWERED, *FINAL)

    def _question(self, info: CaseInfo, length: int) -> HostedQuestion:
        prompt = prompt_of(info)
        described = {
            "case": info.id,
            "task": info.task,
            "length": length,
            "depth": info.depth,
            "seed": info.seed,
            **self.columns("base", Condition(f"{HOSTED}{self.hosted.model}", 0.0, "hosted")),
        }
        request = HostedRequest(prompt, self._count(prompt), info.max_new_tokens + self.extra_tokens)
        key = key_of(
            model=self.hosted.model,
            base_url=self.hosted.base_url.rstrip("/"),
            options=self.hosted.options,
            length_parameter=self.hosted.length_parameter,
            most_tokens=self.hosted.most(request).completion_tokens,
            prompt=prompt,
            scored=[info.answers, info.answer_prefix, info.question],
        )
        return HostedQuestion(key, described, info, request)

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _plan(self, missing: Sequence[HostedQuestion]) -> str:
        """One line about the requests that will be sent."""
        most = self.hosted.estimate([question.request for question in missing])
        limit = self.hosted.passed(most)
        return (
            f"{self.hosted.model}: {len(missing)} requests of at most {_cost(self.hosted, most)}; "
            f"{len(self.questions) - len(missing)} finished before"
            + (f". Over a limit: {limit}" if limit else "")
            + (". Dry: nothing sent" if self.dry else "")
        )

    def _ask(self, questions: Sequence[HostedQuestion]) -> tuple[list[Answer], dict[str, list[Record]]]:
        """Store final and billed answers in ``results``; return all answers, and the other records by key."""
        name = "hosted_" + re.sub(r"[^\w.-]+", "_", self.hosted.model)
        unfinished: dict[str, list[Record]] = {}
        silent = self.trainer.progress_bar_callback is None
        tick = ticking(f"asking {self.hosted.model}", "requests", len(questions), silent)

        def arrived(index: int, answer: Answer) -> None:
            question = questions[index]
            before = (self.results.get(question.key) or [{}])[0]
            spent = Usage(*(before.get(column, 0) for column in TOKENS)) + answer.usage
            if spent != answer.usage:
                answer = replace(answer, usage=spent, counted_by="estimate")
            record = _record(question.info, answer, self.hosted)
            if answer.error in (None, *FINAL) or answer.usage.total:
                self.results.put(question.key, [record], name)
            else:
                unfinished[question.key] = [record]
            tick()

        requests = [question.request for question in questions]
        return (ask(self.hosted, requests, self._count, arrived) if questions else []), unfinished

    def _summary(self, records: Sequence[Record]) -> str:
        """One line: numbers of answers and errors, their tokens and price, and who counted."""
        kinds = Counter(_kind(record) for record in records)
        used = Usage(*(sum(record.get(column, 0) for record in records) for column in TOKENS))
        counters = sorted({record["counted_by"] for record in records if "counted_by" in record})
        counted = f", counted by the {' and the '.join(counters)}" if counters else ""
        empty = [record for record in records if "answer" in record and not record["answer"].strip()]
        cut = sum(record["finish_reason"] == "length" for record in empty)
        hint = f"; {cut} empty answers were cut off: a thinking model needs hosted.thinking_tokens" if cut else ""
        outcomes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"{self.hosted.model}: {outcomes}; {_cost(self.hosted, used)}{counted}{hint}"


def prompt_of(info: CaseInfo) -> str:
    """Join context, question (unless the context ends with it) and the beginning of the answer to one message."""
    asked = info.context
    if not asked.rstrip().endswith(info.question.strip()):
        asked += info.question
    return f"{asked.rstrip()}\n{info.answer_prefix.strip()}".rstrip()


def _kind(record: Record) -> str:
    """The kind of a record's error, or ``ANSWERED``."""
    return str(record["error"]).partition(":")[0] if "error" in record else ANSWERED


def _record(info: CaseInfo, answer: Answer, hosted: HostedModel) -> Record:
    """Columns that depend on the answer."""
    record: dict[str, Any] = {
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "counted_by": answer.counted_by,
        "request_seconds": answer.seconds,
        "finish_reason": answer.finish_reason,
        "dollars": hosted.dollars(answer.usage),
    }
    if answer.error is not None:
        return record | {"error": f"{answer.error}: {answer.message}"}
    scores = retrieval_scores(_without_beginning(answer.text, info.answer_prefix), info.answers)
    return record | scores | {"answer": answer.text, "answers": list(info.answers), "question": info.question}


def _without_beginning(text: str, answer_prefix: str) -> str:
    beginning, stripped = answer_prefix.strip(), text.strip()
    if beginning and stripped.lower().startswith(beginning.lower()):
        return stripped[len(beginning) :]
    return text


def _cost(hosted: HostedModel, usage: Usage) -> str:
    dollars = hosted.dollars(usage)
    price = "" if dollars is None else f", ${dollars:,.4f}"
    return f"{usage.prompt_tokens:,} tokens read and {usage.completion_tokens:,} written{price}"
