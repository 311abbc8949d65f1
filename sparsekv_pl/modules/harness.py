"""The LightningModule that runs lm-evaluation-harness's tasks under each press and ratio, base and trained."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from kvpress import BasePress
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from sparsekv_pl.adapter import seen_in_training, training_summary, variants_of
from sparsekv_pl.backbone import Backbone, adapter_off, causal_lm
from sparsekv_pl.eviction.press_fit import check_press
from sparsekv_pl.eviction.setting import Point, Setting, points_of
from sparsekv_pl.fingerprint import folder_digest
from sparsekv_pl.keys import computed_by, key_of
from sparsekv_pl.modules.harness_records import case_records, score_records, table
from sparsekv_pl.modules.harness_tasks import named_files, task_manager
from sparsekv_pl.native_precision import warn_of_emulation
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.reporting.console import show, show_report
from sparsekv_pl.reporting.loggers import log_scores
from sparsekv_pl.results import Record, Results
from sparsekv_pl.run_output import WritesOutput
from sparsekv_pl.user_errors import log_failure

set_parsing_settings(subclasses_enabled=[BasePress])

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """One piece of work: a task under one press at one ratio, base or trained."""

    variant: str
    point: Point
    task: str

    @property
    def setting(self) -> str:
        """Fit for a folder's name."""
        return f"{self.variant}_{self.point.name}"


class HarnessModule(WritesOutput):
    """Scores of lm-evaluation-harness's tasks after an eviction (https://github.com/EleutherAI/lm-evaluation-harness).

    Every task is run by ``lm_eval.simple_evaluate`` on ``sparsekv_pl.pressed_lm.PressedLM``, which says how contexts
    are evicted. A finished piece of work (variant x press x ratio x task) is not done again by the next run; one that
    fails is named in the report, and tried again by the next run.

    A task is code: a YAML file may name Python functions that lm_eval imports and runs (``!function``,
    ``custom_dataset``), and its templates may call Python too. Give ``include_path`` only folders that you have read.
    Tasks that run what the model wrote (humaneval, mbpp) are refused. Data of hub tasks is downloaded.

    Parameters
    ----------
    backbone
        The model; with ``backbone.adapter`` every task is run twice, with the adapter off (base) and on (trained).
    settings
        Presses and ratios. The full cache is always measured.
    tasks
        Names of tasks or groups of lm_eval's, or of the YAML files in ``include_path``.
    include_path
        Folder with task files of your own. Paths in them are relative to where the run is started.
    limit
        Documents per task, the first ones; null takes all.
    num_fewshot
        Solved examples in front of each question; null leaves it to the task.
    apply_chat_template
        Frame questions as the tokenizer's chat template says.
    held_back
        Tokens at the end of a context that presses neither see nor evict. lm_eval's contexts end with the question:
        with 1 presses see it (query-aware), with the question's length they do not.
    output
        Folder for the report, lm_eval's own results (``lm_eval/``), and the finished work (``results/``).
        Null: where the run's name says, else output/lm_eval.
    title
        Of the report.
    """

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
    ) -> None:
        super().__init__()
        self.points, self.tasks = points_of(settings), tasks
        self.include_path = None if include_path is None else Path(include_path).expanduser()
        self.limit, self.num_fewshot, self.held_back = limit, num_fewshot, held_back
        self.apply_chat_template = apply_chat_template
        self.output, self.title = Path(output or "output/lm_eval").expanduser(), title
        self._check()
        self.training_summary = training_summary(backbone.adapter)
        self.model, self.tokenizer = backbone.load(trainable=False)
        for setting in settings:
            check_press(causal_lm(self.model), setting.press)
        if apply_chat_template and not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {backbone.pretrained} has no chat template: set apply_chat_template to false"
            )
        self.base, self.identity = backbone.described(), backbone.identity()
        self.variants = variants_of(backbone.adapter)
        self.named: dict[str, list[str]] = {}
        """By task: digests of the local files that it names as its data."""
        self.pieces = [Piece(v, point, task) for v in self.variants for point in self.points for task in tasks]

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Find the tasks, and read what is finished already."""
        if self.trainer.world_size > 1:
            raise ValueError(
                f"lm_eval tasks run on one device, not on {self.trainer.world_size}: set trainer.devices to 1, and run "
                "other tasks in a run of their own"
            )
        warn_of_emulation(self.trainer)
        self.manager = task_manager(self.tasks, self.include_path)
        self.named = {task: named_files(self.manager, task) for task in self.tasks}
        self.results = Results(self.output / "results")
        self.records: list[Record] = []
        self.started = time.time()

    def test_dataloader(self) -> DataLoader[int]:
        """One item per piece of work: its place in ``pieces``."""
        return DataLoader(range(len(self.pieces)), batch_size=None)  # type: ignore[arg-type]

    def test_step(self, index: int) -> None:
        """Do one piece of work, or read it if it is done."""
        piece = self.pieces[index]
        unfit = piece.point.unfit()
        found = [{"error": unfit}] if unfit else self.results.get(self._key(piece))
        if found is None:
            found = self._measured(piece)
            if "error" not in found[0]:
                self.results.put(self._key(piece), found, piece.setting)
        self.records += [self._where(piece) | record for record in found]

    def on_test_end(self) -> None:
        """Write the report and print the table."""
        from sparsekv_pl.reporting import run_environment, write_run

        scores = [record for record in self.records if "metric" in record]
        known = {_name(score): score["value"] for score in scores if score["value"] is not None}
        log_scores(self.loggers, known)
        show(table(self.records))
        # Reports pair cases that are right or wrong; a task without such (perplexity, F1) stands in the table alone.
        paired = [record for record in self.records if "exact" in record or "error" in record]
        if paired:
            more = {"dtype": self.identity["dtype"], "lm_eval": metadata.version("lm_eval"), "scores": scores}
            measured = run_environment(self, self.started, **more)
            paths = write_run(self.output, paired, self.training_summary, measured, self.title)
            show_report(paths, self.loggers)

    def _measured(self, piece: Piece) -> list[Record]:
        """A failure is reported and does not stop the others."""
        try:
            return self._run(piece)
        except Exception as error:
            log_failure(log, f"{piece.task} of {piece.setting}", error)
            return [{"error": f"{type(error).__name__}: {error}"}]

    def _run(self, piece: Piece) -> list[Record]:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        from sparsekv_pl.pressed_lm import PressedLM

        point = piece.point
        if point.press is not None:
            set_compression_ratio(point.press, point.compression_ratio)
        tracker = EvaluationTracker(output_path=str(self.output / "lm_eval" / piece.setting))
        # lm_eval seeds Python, NumPy and torch for the tasks that shuffle with them.
        with isolate_rng(), self._variant(piece.variant):
            lm = PressedLM(
                self.model, self.tokenizer, point.press, chunk_tokens=point.chunk_tokens, held_back=self.held_back
            )
            results = simple_evaluate(
                lm,
                model_args=self.base | {"adapter": self.variants[piece.variant]} | point.described(),
                tasks=[piece.task],
                task_manager=self.manager,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                apply_chat_template=self.apply_chat_template,
                evaluation_tracker=tracker,
            )
        assert results is not None, "lm_eval gives its results to the first process, and there is one"
        samples = results.pop("samples")
        records = [*score_records(results, lm.evictions), *case_records(samples, lm.evictions)]
        tracker.save_results_aggregated(results, samples)
        for task, found in samples.items():
            tracker.save_results_samples(task, found)
        return records

    def _variant(self, variant: str) -> AbstractContextManager[Any]:
        return adapter_off(self.model) if variant == "base" else nullcontext()

    def _where(self, piece: Piece) -> Record:
        return {
            "task": piece.task,
            "variant": piece.variant,
            "press": piece.point.press_name,
            "compression_ratio": piece.point.compression_ratio,
            "prefill": piece.point.prefill,
            "seen_in_training": seen_in_training(piece.point.press, self.training_summary),
        }

    def _key(self, piece: Piece) -> str:
        return key_of(
            model=self.identity,
            adapter=self.variants[piece.variant],
            computed_by=computed_by(self),
            point=piece.point.described(),
            held_back=self.held_back,
            task=piece.task,
            # A task's data may lie beside it: whatever changes there, the work is done again.
            files=None if self.include_path is None else folder_digest(self.include_path),
            named_files=self.named.get(piece.task),
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            apply_chat_template=self.apply_chat_template,
            lm_eval=metadata.version("lm_eval"),
        )

    def _check(self) -> None:
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
            if point.decoding_interval is not None:
                raise ValueError(
                    f"{point.press_name} has decoding_interval={point.decoding_interval}, but lm_eval tasks are "
                    "evicted from before the answer: leave it out"
                )


def _name(record: Record) -> str:
    """Of a score in TensorBoard."""
    where = (record["press"], f"{record['compression_ratio']:g}", record["prefill"])
    return "/".join(map(str, (record["variant"], record["task"], record["metric"], *where))).replace(" ", "_")
