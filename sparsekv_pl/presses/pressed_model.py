"""A press on a model, which it sees with its layers of full attention alone and their rotary embedding."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kvpress import BasePress
from torch import nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.models.rotary import rotary_of
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.scores_by_rule import scores_by_rule
from sparsekv_pl.presses.shared_work import shared_work
from sparsekv_pl.presses.sync_free import no_waiting
from sparsekv_pl.presses.traits import PressTraits


@contextmanager
def applied(model: PreTrainedModel, traits: PressTraits, watching: AbstractContextManager[Any]) -> Iterator[None]:
    """Put the press of ``traits`` on ``model`` inside the block; ``watching`` sees the scores by which it selects."""
    shared, ruled = shared_work(model, traits), scores_by_rule(model, traits)
    with shared, ruled, watching, no_waiting(traits), traits.press(pressed(model)):
        yield


def start(model: PreTrainedModel, press: BasePress | None) -> None:
    """Let ``press`` read ``model`` and fetch what it was trained with, as it would before its first eviction.

    A run calls it once the model is on its device. Raises ``ValueError`` if nothing exists for this model.
    """
    if press is None:
        return
    try:
        press.post_init_from_model(pressed(model))
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(f"{press_name(press)} cannot evict from {type(model).__name__}: {why}") from error


def pressed(model: PreTrainedModel) -> Any:
    """Return what a press's ``__call__`` gets in place of ``model``, so that it evicts in ``evicted_layers`` alone.

    kvpress walks through ``model.model.layers`` and gives each attention ``model.model.rotary_emb``. That would evict
    in every layer, and hand out a rotary embedding without frequencies where they differ by layer type (Gemma 3).
    """
    decoder, evicted = decoder_of(model), evicted_layers(model.config)
    rotary = rotary_of(model)
    if (
        len(evicted) == len(decoder.layers)
        and rotary is getattr(decoder, "rotary_emb", None)
        and model.model is decoder
    ):
        return model
    return _Shown(model, model=_Shown(decoder, layers=[decoder.layers[layer] for layer in evicted], rotary_emb=rotary))


class _Shown:
    """A module with some attributes replaced; ``isinstance`` and calls see the module itself, and so does its name."""

    def __new__(cls, module: nn.Module, **_: Any) -> "_Shown":
        return object.__new__(type(type(module).__name__, (cls,), {}))

    def __init__(self, module: nn.Module, **instead: Any) -> None:
        vars(self).update(instead, _module=module)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(vars(self)["_module"])

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_module"](*args, **kwargs)
