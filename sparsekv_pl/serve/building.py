"""Put a server together from its command line."""

from argparse import Namespace
from pathlib import Path

from fastapi import FastAPI

from sparsekv_pl.cli.chosen_model import chosen_backbone, chosen_press
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.serve.api_key import ApiKey
from sparsekv_pl.serve.application import application
from sparsekv_pl.serve.kept_documents import KeptDocuments
from sparsekv_pl.serve.served_model import ServedModel
from sparsekv_pl.serve.server_metrics import ServerMetrics
from sparsekv_pl.serve.token_limits import TokenLimits
from sparsekv_pl.serve.turns import ModelTurns
from sparsekv_pl.usage.cache_file import made_by
from sparsekv_pl.usage.cache_origin import CacheOrigin
from sparsekv_pl.usage.loaded_model import LoadedModel, check_before_loading

MIB = 2**20


def built(asked: Namespace) -> tuple[ServedModel, ModelTurns, FastAPI]:
    """Load the model and make the application.

    Raises
    ------
    ValueError
        For an unknown or unfit press, limits that the model cannot meet, and a document's cache of another model.
    """
    press, backbone = chosen_press(asked), chosen_backbone(asked)
    origin = CacheOrigin.of(press, asked.chunk_tokens, asked.budget)
    for name in asked.document:
        identity, made = made_by(Path(name).expanduser())
        check_before_loading(backbone, identity, name)
        if made != origin:
            raise ValueError(f"--document {name} was evicted by {made}, and this server evicts by {origin}")
    model = LoadedModel(backbone)
    check_press(model.model, press)
    limits = TokenLimits.of(model.model, press, asked.max_prompt_tokens, asked.max_new_tokens)
    metrics = ServerMetrics()
    most_bytes = int(asked.kept_mib * MIB)
    documents = KeptDocuments(model, press, asked.chunk_tokens, asked.budget, most_bytes, metrics)
    for name in asked.document:
        documents.load(name)
    local = Path(asked.pretrained).expanduser()
    served = ServedModel(asked.name or (local.name if local.exists() else asked.pretrained), documents, limits, metrics)
    metrics.served.info({"model": served.name, "adapter": asked.adapter or "", "press": str(documents.origin)})
    turns = ModelTurns(asked.max_requests, metrics)
    return served, turns, application(served, turns, None if asked.api_key is None else ApiKey(asked.api_key))
