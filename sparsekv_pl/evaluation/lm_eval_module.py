"""The LightningModule that runs lm-evaluation-harness's tasks under each press and ratio, base and trained."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from itertools import product, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import set_parsing_settings
from kvpress import BasePress
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from sparsekv_pl.evaluation.lm_eval_records import case_name, case_records, score_records, table
from sparsekv_pl.evaluation.lm_eval_tasks import named_files, task_manager
from sparsekv_pl.evaluation.lm_eval_views import Sample, document_view, viewed_documents
from sparsekv_pl.evaluation.measuring_module import MeasuringModule, Piece
from sparsekv_pl.evaluation.points import Point, Setting, points_of
from sparsekv_pl.evaluation.view_pages import VIEWED_TOKENS, check_views
from sparsekv_pl.eviction.press_model_check import check_press, check_press_alone
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.reporting import summarised, write_run
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.loggers import log_scores
from sparsekv_pl.storage.fingerprint import folder_digest
from sparsekv_pl.storage.records import Record

if TYPE_CHECKING:
    from sparsekv_pl.evaluation.lm_eval_model import PressedLM

set_parsing_settings(subclasses_enabled=[BasePress])


class LMEvalModule(MeasuringModule):
    """Runs tasks of lm-evaluation-harness under eviction (https://github.com/EleutherAI/lm-evaluation-harness).

    ``lm_eval.simple_evaluate`` runs every task on ``sparsekv_pl.evaluation.lm_eval_model.PressedLM``, whose docstring
    describes the eviction. The next run skips finished pieces of work (variant x press x ratio x task). A piece that
    fails is named in the report and tried again by the next run.

    A task is code: its YAML file may name Python functions that lm_eval imports and runs (``!function``,
    ``custom_dataset``), and its templates may call Python. Set ``include_path`` only to folders that you have read.
    Tasks that run code written by the model (humaneval, mbpp) are refused. Data of hub tasks is downloaded. Raises
    ``ValueError`` for a setting out of range, an unknown task, a missing folder or chat template, or a press that does
    not fit the model.

    Parameters
    ----------
    backbone
        The model; with ``backbone.adapter`` every task is run twice, with the adapter off (base) and on (trained).
    settings
        Presses and ratios. The full cache is always measured.
    tasks
        Names of lm_eval's tasks or groups, or of tasks in ``include_path``.
    include_path
        Folder with your own task files. Paths in them are relative to the working directory.
    limit
        Number of documents per task, from the first; null: all.
    num_fewshot
        Solved examples before each question; null: the task's own number.
    apply_chat_template
        Format questions with the tokenizer's chat template.
    held_back
        Tokens at the end of a context that presses neither see nor evict. lm_eval's contexts end with the question:
        with 1 presses see it (query-aware), with the question's length they do not.
    output
        Folder for the report, lm_eval's own results (``lm_eval/``), and the finished work (``results/``).
        Null: where the run's name says, else output/lm_eval.
    title
        Title of the report.
    views
        Number of documents that the report links an eviction viewer of, shared out over the tasks: which tokens each
        press kept. Contexts of more than 10,000 tokens, and texts without a context (perplexity), have none. Finished
        work keeps the documents with which it was measured.
    """

    one_process = "lm_eval tasks run on one device, not on {}: set trainer.devices to 1; use another run for the rest"

    def __init__(
        self,
        backbone: Backbone,
        settings: list[Setting],
        tasks: list[str],
        include_path: str | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        apply_chat_template: bool = False,
        held_back: int = 1,
        output: str | None = None,
        title: str = "lm-evaluation-harness under eviction",
        views: int = 2,
    ) -> None:
        self.points, self.tasks = points_of(settings), tasks
        self.include_path = None if include_path is None else Path(include_path).expanduser()
        self.limit, self.num_fewshot, self.held_back = limit, num_fewshot, held_back
        self.apply_chat_template = apply_chat_template
        check_views(views)
        self._check(settings)
        self.manager = task_manager(self.tasks, self.include_path)
        if apply_chat_template and not backbone.load_tokenizer().chat_template:
            raise ValueError(
                f"the tokenizer of {backbone.pretrained} has no chat template: set apply_chat_template to false"
            )
        super().__init__(output or "output/lm_eval", backbone)
        self.backbone: Backbone = backbone
        self.title, self.views = title, views
        for setting in settings:
            check_press(self.causal_lm, setting.press)
        self.named: dict[str, list[str]] = {}
        """Task -> digests of the local files that its settings name."""
        self.work = list(product(self.points, tasks))

    def setup(self, stage: str) -> None:
        """Read the tasks' files and the finished work."""
        super().setup(stage)
        self.named = {task: named_files(self.manager, task) for task in self.tasks}

    def test_dataloader(self) -> DataLoader[int]:
        """One item per point and task: its index in ``work``."""
        return DataLoader(range(len(self.work)), batch_size=None)  # type: ignore[arg-type]

    def pieces(self, batch: int, variant: str) -> Iterator[Piece]:
        """One piece: a task under one press at one ratio."""
        point, task = self.work[batch]
        unfit = point.unfit()
        yield Piece(
            key="" if unfit else self._key(variant, point, task),
            file=f"{variant}_{point.name}",
            measure=lambda: self._run(variant, point, task),
            columns=repeat({"task": task, **self.columns(variant, point.condition, point.press)}),
            label=f"{task} under {point.condition}, {variant}",
            unfit=unfit,
        )

    def write(self, records: list[Record], environment: dict[str, Any]) -> list[Path]:
        """Write the report and print the table."""
        scores = [record for record in records if "metric" in record]
        log_scores(self.loggers, {_name(score): score["value"] for score in scores if score["value"] is not None})
        show(table([record for record in records if "viewed" not in record]))
        # Reports pair cases that are right or wrong; tasks with other metrics (perplexity, F1) are only in the table.
        paired = [record for record in records if "exact" in record or "error" in record]
        if not paired:
            return []
        environment |= {"lm_eval": metadata.version("lm_eval"), "scores": scores}
        pages = self.pages(records, self.views)
        return write_run(self.output, summarised(paired), self.training_summary, environment, self.title, None, pages)

    def _run(self, variant: str, point: Point, task: str) -> list[Record]:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        from sparsekv_pl.evaluation.lm_eval_model import PressedLM

        if point.press is not None:
            set_compression_ratio(point.press, point.compression_ratio)
        tracker = EvaluationTracker(output_path=str(self.output / "lm_eval" / f"{variant}_{point.name}"))
        # lm_eval seeds Python, NumPy and torch for the tasks that shuffle with them.
        with isolate_rng():
            lm = PressedLM(
                self.model,
                self.tokenizer,
                point.press,
                chunk_tokens=point.chunk_tokens,
                held_back=self.held_back,
                quantisation=point.quantisation,
            )
            results = simple_evaluate(
                lm,
                model_args=self.base | {"adapter": self.variants[variant]} | point.described(),
                tasks=[task],
                task_manager=self.manager,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                apply_chat_template=self.apply_chat_template,
                evaluation_tracker=tracker,
            )
        assert results is not None, "lm_eval returns results in the first process, and there is only one"
        samples = results.pop("samples")
        most = -(-(self.views - self.tasks.index(task)) // len(self.tasks))
        viewed = viewed_documents(lm, samples, most, VIEWED_TOKENS)
        records = [*score_records(results, lm.evictions), *case_records(samples, lm.evictions, viewed)]
        if point.quantisation is None:  # else it keeps the pairs of the point without
            records += _views(lm, samples, viewed, point, variant == "base")
        tracker.save_results_aggregated(results, samples)
        for name, found in samples.items():
            tracker.save_results_samples(name, found)
        return records

    def _key(self, variant: str, point: Point, task: str) -> str:
        return self.key(
            variant,
            point=point.described(),
            held_back=self.held_back,
            task=task,
            # A task's data may lie beside it: any change there means measuring again.
            files=None if self.include_path is None else folder_digest(self.include_path),
            named_files=self.named.get(task),
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            apply_chat_template=self.apply_chat_template,
            lm_eval=metadata.version("lm_eval"),
        )

    def _check(self, settings: list[Setting]) -> None:
        for setting in settings:
            check_press_alone(setting.press)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks} must name at least one task, and none twice")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1 document, or null for all")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot} must be at least 0, or null for the task's own")
        if self.held_back < 1:
            raise ValueError(
                f"held_back={self.held_back} must be at least 1: the last context token predicts the answer"
            )
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"include_path={str(self.include_path)!r} is no folder: give one that holds task files")
        for point in self.points:
            if point.decoding is not None:
                raise ValueError(
                    f"{point.condition.press} has decoding={point.decoding}, but lm_eval tasks evict before the "
                    "answer: leave it out"
                )


def _views(
    lm: "PressedLM",
    samples: Mapping[str, Sequence[Sample]],
    viewed: Mapping[tuple[str, int], list[int]],
    point: Point,
    teacher: bool,
) -> Iterator[Record]:
    """Yield the view of each chosen document, under the names that its filters have in reports."""
    for (task, number), ids in viewed.items():
        first, *others = (sample for sample in samples[task] if sample["doc_id"] == number)
        view = document_view(lm, case_name(task, first), first, ids, point, teacher)
        yield from (view, *(view | {"viewed": case_name(task, other)} for other in others))


def _name(record: Record) -> str:
    """A score's name in TensorBoard."""
    condition = Condition.of(record)
    where = (condition.press, f"{condition.compression_ratio:g}", condition.way)
    return "/".join(map(str, (record["variant"], record["task"], record["metric"], *where))).replace(" ", "_")
