"""A text and a tiny model for tests of lm_eval's model interface, with lm_eval's own HFLM."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from sparsekv_pl.models.backbone import Backbone

TEXT = (
    "The lookup of a name goes through the namespaces that the statement can see. A class definition is an executable "
    "statement, and so is an import. The value of an expression list with at least one comma is a tuple. "
)


def adapted(backbone: Backbone) -> tuple[Any, Any]:
    """The model with an adapter that has an effect, and its tokenizer."""
    model, tokenizer = backbone.load()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval(), tokenizer


def hflm(tiny: tuple[Any, Any], **settings: Any) -> HFLM:
    return HFLM(pretrained=tiny[0].get_base_model(), tokenizer=tiny[1], **settings)


def check_viewers(output: Path, cases: list[str]) -> None:
    """The report links a page of each case, in which Knorm at 0.5 kept half the pairs under base and trained."""
    report = (output / "report.html").read_text()
    for number, case in enumerate(cases, 1):
        assert f'<a href="viewer-{number}.html">{case}</a>' in report
        page = (output / f"viewer-{number}.html").read_text()
        content = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
        tokens = len(content["tokens"])
        assert content["sides"] == ["base", "trained"] and not content["missing"] and content["mass"]
        (point,) = content["points"]
        assert (point["press"], point["ratio"], point["pairs"]) == ("Knorm", 0.5, tokens // 2)
        assert content["full"]["pairs"] == tokens
        answers = [side[name] for side in (point["answers"], content["full"]["answers"]) for name in content["sides"]]
        assert all(answer["text"] is not None and answer["right"] in (True, False) for answer in answers)
