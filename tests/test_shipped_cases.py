"""The shipped evaluations find something to ask in their own text, with the real tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerBase

from data.evaluation import EvaluationData
from sparsekv_pl.models.backbone import Backbone

CLASS = f"{EvaluationData.__module__}.{EvaluationData.__qualname__}"


def of_own_text() -> dict[str, dict[str, Any]]:
    """The data of configs/evaluate that ask about the default text, by name."""
    found = {}
    for path in sorted((Path(__file__).parent.parent / "configs/evaluate").glob("*.yaml")):
        data = yaml.safe_load(path.read_text()).get("data", {})
        if data.get("class_path") == CLASS and "text" not in data["init_args"]:
            found[path.stem] = data
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's."""
    return Backbone("smollm2-135m-instruct").load_tokenizer()


@pytest.mark.parametrize("name", of_own_text())
def test_every_case_can_be_drawn(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(EvaluationData, "data")
    data: EvaluationData = parser.instantiate(parser.parse_object({"data": of_own_text()[name]})).data
    data.tokenizer = tokenizer
    data.setup()
    drawn = [info for batch in data.test_dataloader() for info in batch["cases"]]
    assert len(drawn) == len({info.id for info in drawn}) > 0
    assert all(info.answers for info in drawn if info.task != "text")
