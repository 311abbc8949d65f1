"""sparsekv_pl: train causal language models to survive the eviction of their KV cache.

Import the public classes from here: ``from sparsekv_pl import EITModule, RealEviction``. Each is loaded at its first
use, because importing kvpress and transformers takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
    from sparsekv_pl.evaluation.points import Setting
    from sparsekv_pl.eviction.dropout import KVDropout
    from sparsekv_pl.eviction.local_gradients import LocalGradients
    from sparsekv_pl.eviction.real import RealEviction
    from sparsekv_pl.models.anchors import Anchors
    from sparsekv_pl.models.backbone import Backbone
    from sparsekv_pl.models.lora import Lora
    from sparsekv_pl.objectives import (
        EIT,
        LM,
        Chunks,
        FirstChunk,
        FullCache,
        Layerwise,
        Mixed,
        Reconstruction,
        SelectionObjective,
        SparseLM,
    )
    from sparsekv_pl.presses import (
        AdaptiveBlockDropoutPress,
        AnchorPress,
        BlockDropoutPress,
        EvictionAugPress,
        OraclePress,
        PagePress,
        SentenceDropoutPress,
        SoftThresholdPress,
        SparseRegPress,
        VariableBlockPress,
    )
    from sparsekv_pl.schedules import Adaptive, Cosine, Fixed, Linear, Spread, Step
    from sparsekv_pl.training.eit_module import EITModule
    from sparsekv_pl.usage.context_cache import ContextCache
    from sparsekv_pl.usage.loaded_model import LoadedModel

__version__ = "0.2.0"

__all__ = [
    "EIT",
    "LM",
    "Adaptive",
    "AdaptiveBlockDropoutPress",
    "AnchorPress",
    "Anchors",
    "Backbone",
    "BlockDropoutPress",
    "Chunks",
    "ContextCache",
    "Cosine",
    "EITModule",
    "EvaluationModule",
    "EvictionAugPress",
    "FirstChunk",
    "Fixed",
    "FullCache",
    "KVDropout",
    "Layerwise",
    "Linear",
    "LoadedModel",
    "LocalGradients",
    "Lora",
    "Mixed",
    "OraclePress",
    "PagePress",
    "RealEviction",
    "Reconstruction",
    "SelectionObjective",
    "SentenceDropoutPress",
    "Setting",
    "SoftThresholdPress",
    "SparseLM",
    "SparseRegPress",
    "Spread",
    "Step",
    "VariableBlockPress",
]

_SOURCES = {
    "Anchors": "models.anchors",
    "Backbone": "models.backbone",
    "ContextCache": "usage.context_cache",
    "EITModule": "training.eit_module",
    "EvaluationModule": "evaluation.evaluation_module",
    "KVDropout": "eviction.dropout",
    "LoadedModel": "usage.loaded_model",
    "LocalGradients": "eviction.local_gradients",
    "Lora": "models.lora",
    "RealEviction": "eviction.real",
    "Setting": "evaluation.points",
    **dict.fromkeys(["Adaptive", "Cosine", "Fixed", "Linear", "Spread", "Step"], "schedules"),
    **dict.fromkeys(
        [
            "EIT",
            "LM",
            "Chunks",
            "FirstChunk",
            "FullCache",
            "Layerwise",
            "Mixed",
            "Reconstruction",
            "SelectionObjective",
            "SparseLM",
        ],
        "objectives",
    ),
}
"""The module of each exported name; names that are not listed are in ``presses``."""

if not TYPE_CHECKING:  # a type checker that saw it would accept every name

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"sparsekv_pl has no {name!r}; it exports {', '.join(__all__)}")
        source = _SOURCES.get(name, "presses")
        return getattr(import_module(f"sparsekv_pl.{source}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
