"""What becomes of each flag of Lightning's Trainer and of each of its callbacks when an EITModule trains with it."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning
from lightning.pytorch.callbacks.progress.tqdm_progress import TQDMProgressBar
from lightning.pytorch.profilers import PyTorchProfiler


class Row(NamedTuple):
    """Settings of the trainer, and what they lead to; ``says`` empty: it trains."""

    settings: dict[str, Any]
    says: str = ""
    steps: int = 2
    validations: int = 0
    """Batches."""


def validated(settings: dict[str, Any], says: str = "", validations: int = 0, steps: int = 2) -> Row:
    """Of a run whose validation is one batch."""
    return Row({"limit_val_batches": 1} | settings, says, steps, validations)


NO_EPOCHS = "the training stream has no epochs"
FLAGS: dict[str, list[Row]] = {
    "accelerator": [Row({"accelerator": "cpu"}), Row({"accelerator": "tpu"}, "torch_xla")],
    "strategy": [Row({"strategy": "auto"}), Row({"strategy": "deepspeed"}, "must have DeepSpeed installed")],
    "devices": [Row({"devices": 1}), Row({"devices": 0}, "devices|processes")],
    "num_nodes": [Row({"num_nodes": 1})],
    "precision": [Row({"precision": "bf16-mixed"}), Row({"precision": "16-true"}, "would train in float16")],
    "logger": [Row({"logger": False}), Row({"logger": True, "log_every_n_steps": 1})],
    "callbacks": [Row({})],
    "fast_dev_run": [
        Row({"fast_dev_run": True}, steps=1, validations=1),
        Row({"fast_dev_run": 2, "accumulate_grad_batches": 2}, steps=1, validations=2),
    ],
    "max_epochs": [Row({"max_epochs": 1}), Row({"max_epochs": 0}, "max_epochs is 0, which trains nothing")],
    "min_epochs": [
        Row({"min_epochs": 0}),
        Row({"min_epochs": 1}, f"min_epochs is 1: set trainer.min_steps, {NO_EPOCHS}"),
    ],
    "max_steps": [Row({"max_steps": 1}, steps=1), Row({"max_steps": -1}, "max_steps is -1: set it")],
    "min_steps": [Row({"min_steps": 1})],
    "max_time": [Row({"max_time": "00:01:00:00"}), Row({"max_time": {"seconds": 0}, "max_steps": 99}, steps=0)],
    "limit_train_batches": [
        Row({"limit_train_batches": 1.0}),
        Row({"limit_train_batches": 1}, "limit_train_batches is 1: set trainer.max_steps alone"),
        Row({"limit_train_batches": 0.5}, "limit_train_batches is 0.5: set trainer.max_steps alone"),
        Row({"limit_train_batches": 0}, "limit_train_batches is 0, which trains nothing"),
    ],
    "limit_val_batches": [Row({"limit_val_batches": 0}), Row({"limit_val_batches": 1.0}, validations=2)],
    "limit_test_batches": [Row({"limit_test_batches": 1})],
    "limit_predict_batches": [Row({"limit_predict_batches": 1})],
    "overfit_batches": [
        Row({"overfit_batches": 1, "max_epochs": -1}, validations=2),
        Row({"overfit_batches": 0.5}, "overfit_batches is 0.5: give a whole number"),
    ],
    "val_check_interval": [
        validated({"val_check_interval": None}, validations=1),
        validated({"val_check_interval": 1.0}, validations=1),
        validated({"val_check_interval": 0.5}, validations=2),
        validated({"val_check_interval": 1}, validations=2),
        validated({"val_check_interval": timedelta(0)}, validations=2),
        validated({"val_check_interval": 3}, r"val_check_interval is 3 batches, .* ends after 2"),
        validated({"val_check_interval": 0}, "val_check_interval is 0 batches"),
    ],
    "check_val_every_n_epoch": [
        validated({"check_val_every_n_epoch": None, "val_check_interval": 1}, validations=2),
        validated({"check_val_every_n_epoch": 2}, "check_val_every_n_epoch is 2: set trainer.val_check_interval"),
    ],
    "num_sanity_val_steps": [validated({"num_sanity_val_steps": 1}, validations=1)],
    "log_every_n_steps": [Row({"log_every_n_steps": 1, "logger": True})],
    "enable_checkpointing": [Row({"enable_checkpointing": True})],
    "enable_progress_bar": [Row({"enable_progress_bar": True})],
    "enable_model_summary": [Row({"enable_model_summary": True})],
    "accumulate_grad_batches": [Row({"accumulate_grad_batches": 2})],
    "gradient_clip_val": [Row({"gradient_clip_val": 1.0})],
    "gradient_clip_algorithm": [Row({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"})],
    "deterministic": [Row({"deterministic": True})],
    "benchmark": [Row({"benchmark": True})],
    "inference_mode": [validated({"inference_mode": False}, validations=1)],
    "use_distributed_sampler": [Row({"use_distributed_sampler": False})],
    "profiler": [
        Row({"profiler": "simple"}),
        Row({"profiler": "advanced"}),
        Row({"profiler": PyTorchProfiler(export_to_chrome=False)}),
        Row({"profiler": "xla"}, "torch_xla|XLA"),
    ],
    "detect_anomaly": [Row({"detect_anomaly": True})],
    "barebones": [
        Row(
            {"barebones": True}
            | dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")),
            validations=0,
        )
    ],
    "plugins": [Row({"plugins": []})],
    "sync_batchnorm": [Row({"sync_batchnorm": True})],
    "reload_dataloaders_every_n_epochs": [Row({"reload_dataloaders_every_n_epochs": 1})],
    "default_root_dir": [Row({})],
    "enable_autolog_hparams": [Row({"enable_autolog_hparams": False, "logger": True})],
    "model_registry": [Row({"model_registry": "name"})],
}


class Freezes(lightning.BaseFinetuning):
    """A user's own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        pass


EVERY_STEP = {"limit_val_batches": 1, "val_check_interval": 1}
MONITOR = "val/perplexity_evicted"
Made = Callable[[], Callback]


def kept(**settings: Any) -> Made:
    return lambda: lightning.ModelCheckpoint(**settings)


CALLBACKS: dict[str, list[tuple[Made, Row]]] = {
    "BackboneFinetuning": [(lightning.BackboneFinetuning, Row({}, "BackboneFinetuning .*: leave it out"))],
    "BaseFinetuning": [(Freezes, Row({}))],
    "BasePredictionWriter": [(lambda: lightning.BasePredictionWriter("batch"), Row({}))],
    "BatchSizeFinder": [(lambda: lightning.BatchSizeFinder(steps_per_trial=1, max_trials=1), Row({}))],
    "Callback": [(lightning.Callback, Row({}))],
    "Checkpoint": [(lightning.Checkpoint, Row({"enable_checkpointing": True}))],
    "DeviceStatsMonitor": [(lightning.DeviceStatsMonitor, Row({"logger": True}))],
    "EarlyStopping": [
        (lambda: lightning.EarlyStopping(MONITOR, stopping_threshold=1e9), Row(EVERY_STEP, "", 1, 1)),
        (
            lambda: lightning.EarlyStopping(MONITOR, stopping_threshold=1e9),
            Row(EVERY_STEP | {"min_steps": 2}, "", 2, 2),
        ),
        (lambda: lightning.EarlyStopping(MONITOR), Row({}, f"EarlyStopping waits for {MONITOR}")),
        (
            lambda: lightning.EarlyStopping(MONITOR, check_on_train_epoch_end=True),
            Row(EVERY_STEP, f"check_on_train_epoch_end is true: .*{NO_EPOCHS}"),
        ),
    ],
    "EMAWeightAveraging": [(lightning.EMAWeightAveraging, Row({}))],
    "GradientAccumulationScheduler": [
        (
            lambda: lightning.GradientAccumulationScheduler({0: 2}),
            Row({}, f"set trainer.accumulate_grad_batches, {NO_EPOCHS}"),
        )
    ],
    "LambdaCallback": [(lambda: lightning.LambdaCallback(on_train_start=print), Row({}))],
    "LearningRateFinder": [(lambda: lightning.LearningRateFinder(num_training_steps=2), Row({}))],
    "LearningRateMonitor": [
        (lightning.LearningRateMonitor, Row({"logger": True})),
        (lightning.LearningRateMonitor, Row({}, "has no logger")),
    ],
    "ModelCheckpoint": [
        (kept(every_n_train_steps=1), Row({"enable_checkpointing": True})),
        (kept(monitor=MONITOR), Row({"enable_checkpointing": True, **EVERY_STEP}, validations=2)),
        (kept(monitor=MONITOR), Row({"enable_checkpointing": True}, f"ModelCheckpoint waits for {MONITOR}")),
    ],
    "ModelPruning": [(lambda: lightning.ModelPruning("l1_unstructured"), Row({}, "ModelPruning .*: leave it out"))],
    "ModelSummary": [(lightning.ModelSummary, Row({"enable_model_summary": True}))],
    "OnExceptionCheckpoint": [(lambda: lightning.OnExceptionCheckpoint("."), Row({"enable_checkpointing": True}))],
    "ProgressBar": [(lightning.ProgressBar, Row({"enable_progress_bar": True}))],
    "RichModelSummary": [(lightning.RichModelSummary, Row({"enable_model_summary": True}))],
    "RichProgressBar": [(lightning.RichProgressBar, Row({"enable_progress_bar": True}))],
    "SpikeDetection": [(lambda: lightning.SpikeDetection(warmup=1), Row({}))],
    "StochasticWeightAveraging": [
        (lambda: lightning.StochasticWeightAveraging(1e-2), Row({}, f"leave it out, {NO_EPOCHS}"))
    ],
    "ThroughputMonitor": [(lambda: lightning.ThroughputMonitor(len, window_size=2), Row({"logger": True}))],
    "Timer": [
        (lambda: lightning.Timer("00:01:00:00"), Row({})),
        (lambda: lightning.Timer("00:01:00:00", interval="epoch"), Row({}, f"give step, {NO_EPOCHS}")),
    ],
    "TQDMProgressBar": [(TQDMProgressBar, Row({"enable_progress_bar": True}))],
    "WeightAveraging": [(lightning.WeightAveraging, Row(EVERY_STEP, validations=2))],
}
