"""Evaluations of a hosted model for tests, and their results."""

import json
from pathlib import Path
from typing import Any

from data.evaluation import EvaluationData
from sparsekv_pl.evaluation.hosted_client import HostedModel
from sparsekv_pl.evaluation.hosted_module import HostedModule
from tests.evaluation.scripted_server import Reply, said


class MakeHosted:
    """HostedModule(base_url, the module's settings or the model's)."""

    def __init__(self, tokenizer: str, folder: Path) -> None:
        self.tokenizer, self.folder = tokenizer, folder

    def __call__(self, url: str, dry: bool = False, extra_tokens: int = 4, **settings: Any) -> HostedModule:
        hosted = HostedModel(**({"model": "m", "base_url": url, "key_variable": None, "retries": 0} | settings))
        return HostedModule(hosted, self.tokenizer, str(self.folder / "out"), extra_tokens=extra_tokens, dry=dry)


def cases(windows: int = 0, **settings: Any) -> EvaluationData:
    """Four facts in contexts of 160 tokens."""
    defaults: dict[str, Any] = {"lengths": (160,), "depths": (0.0, 1.0), "cases_per_cell": 2, "continuation_tokens": 8}
    return EvaluationData(windows=windows, batch_size=3, **(defaults | settings))


def right(body: dict[str, Any]) -> Reply:
    """A reply that repeats the prompt, so that it contains every answer."""
    return said(body["messages"][0]["content"])


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "report.json").read_text())


def kept(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in (folder / "out" / "results").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [record for line in lines for record in json.loads(line)["records"]]
