"""Check on a few tokens that a press which recomputes queries or rotates keys gets the model's own results.

kvpress assumes that a query is the output of ``q_proj`` (normalised in Qwen3 and Gemma 3) rotated by RoPE, and that
keys are rotated by ``rotary_emb``. Models that differ would be scored wrongly without an error, or fail only after the
first context.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from kvpress import BasePress
from kvpress.utils import get_prerope_key_states, get_prerope_query_states
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from sparsekv_pl.attention.evicted_attention import CACHED, EveryLayer, attention_implementation, passing
from sparsekv_pl.eviction.rotation import turned
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.evaluation_mode import evaluating
from sparsekv_pl.models.layer_kinds import attentions, evicted_layers, layers_left_alone, linear_layers
from sparsekv_pl.models.rotary import inv_freq_of, rotary_of
from sparsekv_pl.models.seeding import generator_for
from sparsekv_pl.presses.scores_by_rule import check_rule
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.traits import Need, PressTraits, traits_of

TOKENS, SHIFT = 8, 5
NEAR = 0.1
"""Relative error above which two computations differ: rounding stays below it (1 % after 30 layers of bfloat16),
another computation is above 28 %."""


class _SeenTensors:
    """Each layer's inputs, queries and keys in one forward."""

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.hidden: dict[int, Tensor] = {}
        self.rotary: dict[int, tuple[Tensor, ...]] = {}
        self.query: dict[int, Tensor] = {}
        self.key: dict[int, Tensor] = {}

    def given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.modules[layer] = module
        self.hidden[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.rotary[layer] = kwargs.get("position_embeddings", ())

    def computed(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        self.query[layer], self.key[layer] = query, key


def check_press_alone(press: BasePress | None, foresight: bool = False) -> None:
    """Raise ``ValueError`` if ``press``, or a press in it, can evict in no model; called before one is loaded.

    ``foresight`` is True where the continuation is known before the eviction.
    """
    if press is None:
        return
    traits = traits_of(press)
    if traits.foresees and not foresight:
        raise ValueError(
            f"{traits.name} keeps what the continuation will attend to, which is unknown here: it is a ceiling to "
            "measure with EvaluationModule (configs/evaluate/retention.yaml). Take another press"
        )
    for part in traits.parts:
        if "attention" in part.needs:
            raise ValueError(
                f"{part.name} reads attention weights, an L x L matrix that nothing here computes: take a press that "
                "computes the rows it needs (SnapKVPress, TOVAPress)"
            )
        if part.needs_question:
            raise ValueError(
                f"{part.name} selects by the question, which is read after the eviction here: take a press that "
                "selects by the context alone (SnapKVPress, KeyDiffPress)"
            )


@torch.no_grad()
def check_press(model: PreTrainedModel, press: BasePress | None, foresight: bool = False) -> None:
    """Raise ``ValueError`` if ``press``, or a press in it, would not reproduce ``model``'s queries or keys.

    So does one with settings for layers from which nothing is evicted.

    ``foresight`` is that of ``check_press_alone``, which is asked too. Models with weights on the meta device (sharded
    ones) are not checked.
    """
    check_press_alone(press, foresight)
    if press is None:
        return
    traits = traits_of(press)
    others, stateful = layers_left_alone(model.config), linear_layers(model)
    for part in traits.parts if stateful else ():
        if not part.replayable and part.every_layer:
            raise ValueError(
                f"{part.name} runs the model by itself, and {type(model).__name__} has states that follow its text, in "
                f"layers {_few(sorted(stateful))}: take a press that only reads (KeyDiffPress, SnapKVPress)"
            )
    for part in traits.parts if others else ():
        if part.every_layer:
            raise ValueError(
                f"{part.name} needs every layer of a model, and {type(model).__name__} has others than full attention, "
                f"in layers {_few(others)}: take a press that evicts layer by layer (KeyDiffPress, SnapKVPress)"
            )
    for part in traits.parts:
        if isinstance(part.press, SparseRegPress):
            part.press.check_layers(model.config)
    check_rule(model, traits)
    if any(parameter.is_meta for parameter in decoder_of(model).parameters()):
        return
    seen: list[_SeenTensors] = []
    for part in traits.parts:
        for needed, wrong in _checks(part):
            if not seen:
                seen += [_forward(model, 0), _forward(model, SHIFT)]
            layers_wrong = _wrong_in(wrong, model, seen)
            if layers_wrong:
                raise ValueError(
                    f"{part.name} does not fit {type(model).__name__}: it {needed}, which this model does not "
                    f"do as Llama does, in layers {layers_wrong}. Take a press that does not (KeyDiffPress, "
                    "KnormPress), or another model"
                )


@torch.no_grad()
def layers_not_turned(model: PreTrainedModel) -> str:
    """Name the layers whose keys ``rotation.turned`` does not move as the model would; empty if there are none."""
    return _wrong_in(_turn_error, model, [_forward(model, 0), _forward(model, SHIFT)])


Check = Callable[[PreTrainedModel, int, list[_SeenTensors]], float]


def _checks(traits: PressTraits) -> Iterator[tuple[str, Check]]:
    """Yield what a press assumes of the model: its description for messages, and its check."""
    yield from (check for need, check in CHECKS.items() if need in traits.needs)
    if traits.re_rotates:
        yield "turns keys to other positions by the model's RoPE (rotary_emb)", _turn_error


def _wrong_in(check: Check, model: PreTrainedModel, seen: list[_SeenTensors]) -> str:
    """Name the layers that fail ``check``; a rotation moves the keys of all, other checks are of the evicted ones."""
    layers = sorted(seen[0].key) if check is _turn_error else evicted_layers(model.config)
    return _few([layer for layer in layers if _fails(check, model, layer, seen)])


def _fails(check: Check, model: PreTrainedModel, layer: int, seen: list[_SeenTensors]) -> bool:
    try:
        return not check(model, layer, seen) < NEAR
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError):  # shapes, names, signatures
        return True


def _query_error(_: PreTrainedModel, layer: int, seen: list[_SeenTensors]) -> float:
    first = seen[0]
    query = get_prerope_query_states(first.modules[layer], first.hidden[layer])
    return _error(_by_rope(query, *first.rotary[layer]), first.query[layer])


def _whole_query_error(model: PreTrainedModel, layer: int, seen: list[_SeenTensors]) -> float:
    return _query_error(model, layer, seen) if _turned_whole(seen[0], layer) else math.inf


def _key_error(_: PreTrainedModel, layer: int, seen: list[_SeenTensors]) -> float:
    first = seen[0]
    key = get_prerope_key_states(first.modules[layer], first.hidden[layer])
    return _error(_by_rope(key, *first.rotary[layer]), first.key[layer])


def _rotary_error(model: PreTrainedModel, layer: int, seen: list[_SeenTensors]) -> float:
    asked = rotary_of(model)(seen[0].hidden[layer], torch.arange(TOKENS, device=model.device)[None])
    error = max(_error(mine, used) for mine, used in zip(asked, seen[0].rotary[layer], strict=True))
    return error if _turned_whole(seen[0], layer) else math.inf


def _turn_error(model: PreTrainedModel, layer: int, seen: list[_SeenTensors]) -> float:
    first, later = (each.key[layer] for each in seen)
    by = torch.full(first.shape[:3], SHIFT, device=first.device)
    return _error(turned(first, by, inv_freq_of(model, layer)), later)


CHECKS: Mapping[Need, tuple[str, Check]] = {
    "rotary": ("asks the model's RoPE (rotary_emb) for later positions", _rotary_error),
    "queries": ("computes queries from q_proj and RoPE", _query_error),
    "whole queries": ("computes queries from q_proj and a RoPE that turns all of them", _whole_query_error),
    "keys": ("computes keys from k_proj and RoPE", _key_error),
}


def _turned_whole(seen: _SeenTensors, layer: int) -> bool:
    return seen.rotary[layer][0].shape[-1] == seen.query[layer].shape[-1]


def _by_rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    rotary = cos.shape[-1]
    part, rest = states[..., :rotary], states[..., rotary:]
    return torch.cat([part * cos + rotate_half(part) * sin, rest], dim=-1)


def _error(mine: Tensor, used: Tensor) -> float:
    """Return the relative error after the best common factor, since attention's scale may be in the queries."""
    mine, used = mine.double(), used.double().to(mine.device)
    factor = (mine * used).sum() / (mine * mine).sum()
    return float((factor * mine - used).norm() / used.norm())


@torch.no_grad()
def _forward(model: PreTrainedModel, start: int) -> _SeenTensors:
    """Run a few random tokens whose positions begin at ``start``; return each layer's tensors."""
    seen, decoder = _SeenTensors(), decoder_of(model)
    rows: Any = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    ids = torch.randint(int(rows), (1, TOKENS), generator=generator_for("press fit")).to(model.device)
    positions = start + torch.arange(TOKENS, device=ids.device)[None]
    with (
        evaluating(model),
        _watched(model, seen),
        attention_implementation(model, CACHED),
        passing(model, observer=EveryLayer(seen.computed)),
    ):
        decoder(input_ids=ids, position_ids=positions, use_cache=False)
    return seen


@contextmanager
def _watched(model: PreTrainedModel, seen: _SeenTensors) -> Iterator[None]:
    hooks = [
        attention.register_forward_pre_hook(seen.given, with_kwargs=True) for attention in attentions(model).values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _few(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
