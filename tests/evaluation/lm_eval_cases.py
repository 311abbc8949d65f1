"""A text and a tiny model for tests of lm_eval's model interface, with lm_eval's own HFLM."""

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
