"""Retrieval records in the layout of kvpress's evaluation/evaluate.py, as its leaderboard reads it.

One folder per press, ratio, variant and context length, named dataset__data_dir__model__press__ratio, with
predictions.csv, metrics.json and config.yaml (https://github.com/NVIDIA/kvpress/tree/main/evaluation, and data.py of
https://huggingface.co/spaces/nvidia/kvpress-leaderboard).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsekv_pl.models.batch import TEXT
from sparsekv_pl.reporting.condition import FULL_CACHE, HOSTED, Condition, foresees
from sparsekv_pl.reporting.file_formats import csv_bytes, json_bytes, replace_all
from sparsekv_pl.storage.records import Record

RULER = ("niah", "vt", "cwe", "fwe", "qa")
"""Beginnings of RULER's task names; other tasks belong to the dataset "sparsekv_pl"."""

REGISTERED = {
    FULL_CACHE: "no_press",
    "AdaKV(ExpectedAttention)": "expected_attention",
    "Block(KeyDiff)": "block_keydiff",
    "ChunkKV(SnapKV)": "chunkkv",
    "CriticalKV(ExpectedAttention)": "critical_expected_attention",
    "CriticalKV(SnapKV)": "critical_snapkv",
    # kvpress's expected_attention is AdaKV around it, so without AdaKV it needs another name.
    "ExpectedAttention": "expected_attention_alone",
    "KeyDiff": "keydiff",
    "LUKV(ExpectedAttention)": "lukv",
    "ThinK": "think",
}
"""Our names of presses -> kvpress's (evaluate_registry.py), if those are not our names in snake case."""


def write_kvpress_layout(
    folder: Path, records: Sequence[Record], model_name: str, trained_name: str | None = None, query_aware: bool = False
) -> list[Path]:
    """Write a folder per press, ratio, variant and length below `folder`, and return their paths.

    Text, failed records and ceilings (OraclePress), which no leaderboard may list, are left out; "answer_prefix" and
    "max_new_tokens" are used if a record has them. The name of the base with the adapter is `trained_name`, by default
    `model_name` with "+trained". `query_aware` says whether the press saw the question.
    """
    names = {"base": model_name, "trained": trained_name or f"{model_name}+trained"}
    found: dict[tuple[tuple[str, Any], ...], list[Record]] = {}
    for record in records:
        if "error" not in record and record["task"] != TEXT and not foresees(record["press"]):
            found.setdefault(tuple(_config(record, names, query_aware).items()), []).append(record)
    folders: dict[Path, int] = {}
    for items, some in found.items():
        config = dict(items)
        path = folder / _folder_name(config)
        folders[path] = folders.get(path, 0) + 1
        if folders[path] > 1:  # ratios that are equal when rounded: numbered subfolders, as in kvpress
            path /= str(folders[path] - 1)
        _write(path, config, some)
    return list(folders)


def string_match(predictions: Sequence[str], answers: Sequence[Sequence[str]], task: str) -> float:
    """RULER's score in percent: the share of the answers found in the text; for qa, whether any is found.

    Upper and lower case are equal. C.-P. Hsieh et al., RULER, https://arxiv.org/abs/2404.06654.
    """
    join = max if task.split("_")[0] == "qa" else lambda hits: sum(hits) / len(hits)
    scores = [
        join([float(answer.lower() in prediction.lower()) for answer in expected])
        for prediction, expected in zip(predictions, answers, strict=True)
    ]
    return round(100 * sum(scores) / len(scores), 2)


def is_ruler(task: str) -> bool:
    """Return whether a task is one of RULER's settings."""
    return str(task).split("_")[0] in RULER


def _config(record: Record, names: dict[str, str], query_aware: bool) -> dict[str, Any]:
    """The keys of kvpress's config.yaml that decide a record's folder."""
    condition, model = Condition.of(record), names[record["variant"]]
    press = condition.press
    if press.startswith(HOSTED):
        press, model = FULL_CACHE, press.removeprefix(HOSTED)
    return {
        "dataset": "ruler" if is_ruler(record["task"]) else "sparsekv_pl",
        "data_dir": str(record["length"]),
        "model": model,
        "press_name": _press_name(press, condition.prefill, condition.stored),
        "compression_ratio": float(condition.compression_ratio),
        "query_aware": query_aware,
        "press_init_command": press,
    }


def _press_name(press: str, prefill: str, stored: str = "") -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "_", press).strip("_")
    name = REGISTERED.get(press) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])(?!KV)", "_", words).lower()
    name += f"_{re.sub(r'[^a-z0-9]+', '_', stored)}" * bool(stored)
    if prefill == "dense" or press == FULL_CACHE:
        return name
    when, *how = prefill.split(", ")
    parts = [when, name, *how] if when.endswith("decoding") else [name, prefill]
    return "_".join(parts).replace(" ", "_")


def _folder_name(config: dict[str, Any]) -> str:
    parts = [config["dataset"], config["data_dir"], config["model"].replace("/", "--"), config["press_name"]]
    return "__".join([*parts, f"{config['compression_ratio']:.2f}", *["query_aware"] * config["query_aware"]])


def _cleaned(answer: str) -> str:
    """``answer`` without control characters, as RULER scores it; a CSV file cannot hold all of them."""
    return re.sub(r"[\x00-\x1f]", "", answer.strip()).strip()


def _write(folder: Path, config: dict[str, Any], records: Sequence[Record]) -> None:
    predictions = [
        {
            "question": record.get("question", ""),
            "answer_prefix": record.get("answer_prefix", ""),
            "answer": str(list(record["answers"])),
            "task": record["task"],
            "max_new_tokens": record.get("max_new_tokens"),
            "predicted_answer": _cleaned(record["answer"]),
            "compression_ratio": record["compression_ratio"],
        }
        for record in records
    ]
    metrics = {}
    for task in sorted({record["task"] for record in records}):
        some = [record for record in records if record["task"] == task]
        answers = [_cleaned(record["answer"]) for record in some]
        metrics[task] = {"string_match": string_match(answers, [record["answers"] for record in some], task)}
    seeds = {record.get("seed") for record in records}
    whole = {
        **{key: config[key] for key in ("dataset", "data_dir", "model")},
        "device": None,
        **{key: config[key] for key in ("press_name", "compression_ratio")},
        **dict.fromkeys(["key_channel_compression_ratio"]),
        "fraction": 1.0,
        **dict.fromkeys(["max_new_tokens", "max_context_length"]),
        "query_aware": config["query_aware"],
        **dict.fromkeys(["needle_depth", "compression_interval", "target_size", "hidden_states_buffer_size"]),
        "output_dir": folder.parent.name,
        "log_level": "INFO",
        "model_kwargs": {},
        "press_init_command": config["press_init_command"],
        "seed": seeds.pop() if len(seeds) == 1 else None,
        "fp8": False,
    }
    files = {
        "predictions.csv": csv_bytes(predictions),
        "metrics.json": json_bytes(metrics),
        "config.yaml": yaml.safe_dump(whole, sort_keys=False).encode(),
    }
    replace_all(folder, files)
