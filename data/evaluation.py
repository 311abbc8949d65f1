"""The LightningDataModule of evaluation: retrieval cases by length, depth and seed, and windows of plain text."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch.utils.data import DataLoader

from data.cases import Case, CaseTask, Frame
from data.collate import MadeOnAccess, case_batch, pad_id
from data.fact_task import Facts
from data.facts import Split
from data.packing import Tokens, enough_for, split_tokens, window_at, window_starts
from data.sweep import check_distinct, check_sweep, depth_text
from data.text import EmbeddedText, Splits, TextSource
from data.tokenized import TokenizedData
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo
from sparsekv_pl.models.seeding import random_for

MakeCase = Callable[[], Case]


class EvaluationData(TokenizedData):
    """Evaluation cases from the documents of one split, in batches of one task and one context length.

    Needs a tokenizer: the trainer's ``lightning_module.tokenizer``, or set ``tokenizer`` before ``setup``. Batches are
    made when they are read.

    A case is a function of the text, the tokenizer, its task, length, depth, seed and number, and of ``query_aware``:
    it is the same in every run, whatever other cases there are. A window of text is a function of the text, the
    tokenizer, its length, ``continuation_tokens`` and its first token. All but text, tokenizer and ``query_aware`` are
    in the case's id. Raises ``ValueError`` for a setting out of range, a value given twice, or nothing to evaluate.

    Parameters
    ----------
    text
        Source of the text; the default needs no download and has about 15,000 held-out tokens.
        data.python_source.PythonSource has 250,000, or 2.5 million if splits hold out all of it.
    splits
        Shares of the documents: use those of the model's training.
    split
        Whose documents, wordings and names are asked for: "held_out", which is for measuring once, or "validation", for
        comparing settings.
    tasks
        Retrieval tasks; null for this project's facts, [] for none.
    lengths
        Context lengths in tokens, including everything that the model reads before the eviction.
    depths
        Positions of the asked needle, as fractions of the text before it.
    seeds
        Seeds; every cell of the sweep is made with each.
    cases_per_cell
        Cases of each task, length, depth and seed.
    cases_without_depth
        Cases of each length and seed of tasks without a depth; null: as many as ``cases_per_cell``.
    windows
        Text windows of each length, spread evenly over the text; 0 for none.
    continuation_tokens
        Tokens that are read after a text window's context.
    batch_size
        Rows per batch and rank.
    query_aware
        Put the question at the end of the context, where the press sees it.
    """

    def __init__(
        self,
        text: TextSource | None = None,
        splits: Splits | None = None,
        tasks: list[CaseTask] | None = None,
        lengths: Sequence[int] = (384,),
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        seeds: Sequence[int] = (0,),
        cases_per_cell: int = 12,
        windows: int = 32,
        continuation_tokens: int = 64,
        batch_size: int = 8,
        query_aware: bool = False,
        cases_without_depth: int | None = None,
        split: Split = "held_out",
    ) -> None:
        super().__init__()
        cases_without_depth = cases_per_cell if cases_without_depth is None else cases_without_depth
        least = {"cases_per_cell": 0, "cases_without_depth": 0, "windows": 0, "continuation_tokens": 2, "batch_size": 1}
        for name, bound in least.items():
            if locals()[name] < bound:
                raise ValueError(f"{name} is {locals()[name]}: give at least {bound}")
        self.text = text or EmbeddedText()
        self.splits, self.split = splits or Splits(), split
        self.tasks: list[CaseTask] = [Facts()] if tasks is None else tasks
        self.lengths, self.depths, self.seeds = list(lengths), list(depths), list(seeds)
        self.cases_per_cell, self.windows, self.continuation_tokens = cases_per_cell, windows, continuation_tokens
        self.batch_size, self.query_aware = batch_size, query_aware
        self.cases_without_depth = cases_without_depth
        self.has_turns = any(task.has_turns for task in self.tasks)
        self._check()

    def _check(self) -> None:
        check_sweep(self.lengths, self.depths, self.seeds)
        check_distinct("tasks", [task.name for task in self.tasks] + [TEXT] * (self.windows > 0))
        if not self.windows and not (self.tasks and self.cases_per_cell):
            raise ValueError("there is nothing to evaluate: ask for windows, or for tasks and cases_per_cell")

    def setup(self, stage: str | None = None) -> None:
        """Take the tokenizer, read the text, and make one case of each task at the shortest length, as a check.

        Raises ``ValueError`` if the split has too little text for the longest context or for the windows, or the
        shortest context is too short for a task.
        """
        super().setup(stage)
        self._frame = Frame(self.tokenizer, self.split)
        self._asked_of = "" if self.split == "held_out" else f"{self.split}/"
        spans = self._spans()
        longest = max(spans.values())
        text = split_tokens(self.text, self.splits, self.split, self.tokenizer, longest) if longest else Tokens()
        for (name, length), span in spans.items():
            if span > len(text.ids):
                raise ValueError(
                    f"the {self.split} split of {type(self.text).__name__} has {len(text.ids)} tokens, task {name} "
                    f"needs {span} of them at length {length} (text is never repeated): use another text with more "
                    f"(data.python_source.PythonSource), shorter lengths, or raise {self.split} in splits "
                    f"({self.splits})"
                )
        texts = {span: text.first(enough_for(span)) for span in set(spans.values())}
        self._texts = {cell: texts[span] for cell, span in spans.items()}
        for task in self.tasks:
            for make in itertools.islice(self._retrieval_cases(task, min(self.lengths)), 1):
                make()
        self._batches = MadeOnAccess([partial(self._batch, group) for group in self._groups()])

    def test_dataloader(self) -> DataLoader[CaseBatch]:
        """Return text windows by length, then the tasks, each by length."""
        return DataLoader(self._batches, batch_size=None, shuffle=False)

    def predict_dataloader(self) -> DataLoader[CaseBatch]:
        """Return the cases of ``test_dataloader``."""
        return self.test_dataloader()

    def _spans(self) -> dict[tuple[str, int], int]:
        """Return the number of text tokens that cases need, by (task, length)."""
        spans = {(task.name, n): task.tokens_needed(self._frame, n) for task in self.tasks for n in self.lengths}
        if self.windows:
            spans |= {(TEXT, length): length + self.continuation_tokens for length in self.lengths}
        return spans

    def _groups(self) -> Iterator[list[MakeCase]]:
        """Yield for each batch the functions that make its rows."""
        cells = [self._windows(length) for length in self.lengths]
        cells += [list(self._retrieval_cases(task, length)) for task in self.tasks for length in self.lengths]
        for cell in cells:
            yield from (cell[i : i + self.batch_size] for i in range(0, len(cell), self.batch_size))

    def _batch(self, makers: Sequence[MakeCase]) -> CaseBatch:
        return case_batch([make() for make in makers], pad_id(self.tokenizer))

    def _windows(self, length: int) -> list[MakeCase]:
        if not self.windows:
            return []
        fresh = self.continuation_tokens
        starts = window_starts(self._texts[TEXT, length], self.windows, length + fresh, fresh, self._frame)
        return [partial(self._text_case, length, start) for start in starts]

    def _retrieval_cases(self, task: CaseTask, length: int) -> Iterator[MakeCase]:
        """Yield the makers of cases; depths vary fastest, so that an interrupted run has covered all of them."""
        for number in range(self.cases_per_cell if task.uses_depth else self.cases_without_depth):
            for seed in self.seeds:
                for depth in self.depths if task.uses_depth else [None]:
                    yield partial(self._retrieval_case, task, length, depth, seed, number)

    def _retrieval_case(self, task: CaseTask, length: int, depth: float | None, seed: int, number: int) -> Case:
        """Make the case with the id "facts/L384/d0.50/s0/3", after "validation/" if of that split; it seeds the draws.

        The facts do not depend on whether the press sees the question.
        """
        at = "" if depth is None else f"/d{depth_text(depth)}"
        name = f"{self._asked_of}{task.name}/L{length}{at}/s{seed}/{number}"
        text = self._texts[task.name, length]
        case = task.case(self._frame, text, length, depth, random_for(name), self.query_aware)
        if len(case.context_ids) != length:
            raise ValueError(f"task {task.name} made a context of {len(case.context_ids)} tokens instead of {length}")
        return replace(case, info=replace(case.info, id=name, seed=seed))

    def _text_case(self, length: int, start: int) -> Case:
        fresh = self.continuation_tokens
        window = window_at(self._texts[TEXT, length], start, length + fresh, fresh, self._frame)
        context, continuation = window.ids[:length], window.ids[length:]
        info = CaseInfo(
            id=f"{self._asked_of}{TEXT}/L{length}+{fresh}/t{start}",
            task=TEXT,
            context=self._frame.decode(context[len(self._frame.opening) :]),
            document_ids=tuple(window.document_ids),
        )
        return Case(context, continuation, info)
