"""Checks of what a model or a press can do: positions, sliding windows, weights on disk, chunks."""

from collections.abc import Collection

from transformers import PreTrainedConfig, PreTrainedModel

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import attentions, evicted_layers, windowed_alone
from sparsekv_pl.models.rotary import rope_settings, rotary_of
from sparsekv_pl.presses.traits import PressTraits

CHANGING_ROPE = ("dynamic", "longrope")
"""Types of RoPE whose frequencies depend on the length of the text."""


def check_reached(model: PreTrainedModel, reached: Collection[int]) -> None:
    """Raise ``ValueError`` if no attention layer was ``reached`` by the keywords of a forward."""
    if not reached:
        raise ValueError(
            f"{type(decoder_of(model)).__name__} hands no keywords on to its attention layers, by which they find "
            "evicted caches: choose another model"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """Number of positions that ``model`` was trained on or scaled to by RoPE settings; None if its config has none."""
    config = model.config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None)
    rope = rope_settings(config)
    scaled = (rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 1)
    return None if trained is None else max(trained, int(scaled))


def unscaled_positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model has before it scales queries by their positions; None if it never does.

    Llama 4 does so where it has no RoPE, and Ministral 3. In transformers 5.2 they take a token's place in the forward
    for its position.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "attn_temperature_tuning", False) and not all(getattr(text, "no_rope_layers", None) or [1]):
        return int(text.floor_scale) - 1
    rope = getattr(text, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("llama_4_scaling_beta") else None


def check_query_scales(model: PreTrainedModel, positions: int) -> None:
    """Raise ``ValueError`` if some of the first ``positions`` positions have scaled queries: ``unscaled_positions``."""
    limit = unscaled_positions(model.config)
    if limit is not None and positions > limit:
        raise ValueError(
            f"{type(model).__name__} scales queries by their positions from {limit} on, which is not computed here: "
            f"keep context and continuation, {positions} tokens, within {limit}"
        )


def check_positions(model: PreTrainedModel, positions: int, tokens: int, rotates: bool) -> None:
    """Raise ``ValueError`` if a context of ``tokens`` tokens takes more ``positions`` than ``model`` has.

    ``rotates`` is True if kept keys are re-rotated, which frees positions.
    """
    check_query_scales(model, positions)
    limit = position_limit(model)
    if limit is None or positions <= limit:
        return
    fix = "lower budget or chunk_tokens" if rotates else "wrap the press in kvpress.KeyRerotationPress"
    raise ValueError(
        f"a context of {tokens} tokens takes {positions} positions, but this model was trained on {limit} "
        f"(max_position_embeddings): {fix}, so that budget + chunk_tokens is at most {limit}; or use a shorter context"
    )


def rope_changes(model: PreTrainedModel) -> bool:
    """Return whether RoPE's frequencies for all rows of a forward follow from its largest position."""
    return rope_settings(model.config).get("rope_type") in CHANGING_ROPE


def check_rope(model: PreTrainedModel, first: int, total: int, rotates: bool = False) -> None:
    """Raise ``ValueError`` if RoPE's frequencies change between the ``first`` tokens and all ``total`` tokens.

    RoPE of the types "dynamic" and "longrope" changes its frequencies once a text is longer than the original context;
    keys that are in the cache by then were rotated by the old ones. With ``rotates``, keys are rotated again, which the
    model's RoPE must allow.
    """
    config = model.config.get_text_config()
    rope = rope_settings(config)
    kind = rope.get("rope_type", "default")
    if rotates:
        dims = 2 * len(rotary_of(model).inv_freq)  # type: ignore[arg-type]
        head = getattr(attentions(model)[evicted_layers(config)[0]], "head_dim", dims)
        if kind in CHANGING_ROPE or dims != head:
            why = f"RoPE of type {kind!r}" if dims == head else f"{dims} of {head} dimensions of a head turned by RoPE"
            raise ValueError(f"keys cannot be re-rotated in a model with {why}: use a press without KeyRerotationPress")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    crosses = first <= original if kind == "longrope" else kind in CHANGING_ROPE
    if crosses and total > original:
        raise ValueError(
            f"this model's RoPE is of type {kind!r}: beyond {original} tokens it turns keys by other frequencies than "
            f"those of the first {first} of {total} tokens were turned by, so a cache cannot be continued across: keep "
            f"context and continuation within {original} tokens"
        )


def check_rows(traits: PressTraits, rows: int) -> None:
    """Raise ``ValueError`` if a press that evicts from one row alone would get a batch of ``rows`` rows."""
    if rows > 1 and traits.first_row_decides:
        raise ValueError(
            f"{traits.name} evicts from one row alone, and a batch has {rows}, of which it would keep what the first "
            "one's scores select, mix the rows or fail: set batch_size=1"
        )


def check_window(model: PreTrainedModel, tokens: int) -> None:
    """Raise ``ValueError`` if ``tokens`` tokens, under a press, exceed the window of a model without full attention.

    Within the window, such a model's layers attend to everything, and presses evict in them.
    """
    window = windowed_alone(model.config)
    if window is not None and tokens > window:
        raise ValueError(
            f"{tokens} tokens are more than the window of {window} through which every layer of this model looks, so "
            "there is no layer to evict from: keep context and continuation within the window, take no press, or a "
            "model with full attention in some layers (Gemma 3)"
        )


def check_weights(model: PreTrainedModel, traits: PressTraits) -> None:
    """Raise ``ValueError`` if a press reads weights that are offloaded to disk: its scores would be garbage."""
    reads = any("weights" in part.needs for part in traits.parts)
    if reads and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{traits.name} reads weights of the model, some of which lie on disk: use another press, or a "
            "placement with enough memory"
        )


def check_evicts_again(traits: PressTraits, request: Request, decoding: bool, again: str, fix: str) -> None:
    """Raise ``ValueError`` if a press cannot evict from what it evicted from before, or ``request`` not be met there.

    ``decoding`` admits presses that can while tokens are decoded, though not in a prefill. ``again`` says for the
    message how it evicts, and ``fix`` how it would not.
    """
    if not (traits.works_in_chunks or (decoding and traits.evicts_while_decoding)):
        raise ValueError(
            f"{traits.name} cannot evict {again}: it masks KV pairs instead of removing them, or looks at the whole "
            f"context at once. {fix}, or take another press"
        )
    # The scores of a press that moves groups of pairs (ChunkKVPress) do not determine which pairs it kept.
    silent = [candidate for candidate in traits.candidates if not (candidate.by_scores or candidate.only_trains)]
    if request.scores and silent:
        raise ValueError(
            f"{silent[0].name} evicts {again} and does not keep the highest scores, so a selection loss cannot follow "
            f"what it keeps. {fix}, take another press, or leave the selection objective out"
        )


def check_chunks(traits: PressTraits, bounds: list[tuple[int, int]], request: Request, decoding: bool = False) -> None:
    """Raise ``ValueError`` if a press cannot run in chunks of these ``bounds``, or not with ``request``.

    ``decoding`` is that of ``check_evicts_again``.
    """
    shortest = min(stop - start for start, stop in bounds)
    if shortest <= traits.window:
        raise ValueError(
            f"{traits.name} looks at a window of {traits.window} tokens but the context is run in chunks of {shortest}"
            ": use a longer context, longer chunks (chunk_tokens) or a smaller window_size (n_sink)"
        )
    if len(bounds) > 1:
        once = "Use one chunk (chunk_tokens: null)"
        check_evicts_again(traits, request, decoding, f"from {len(bounds)} chunks", once)
    longest = max(stop - start for start, stop in bounds)
    if request.scores and 0 < traits.part_tokens < longest:
        raise ValueError(
            f"{traits.name} scores a context of {longest} tokens by parts of {traits.part_tokens}, which a selection "
            "loss cannot follow: raise its chunk_length (block_size), take another press, or leave the selection "
            "objective out"
        )


def check_full_cache(model: PreTrainedModel, tokens: int, teacher: bool, validation: bool) -> None:
    """Raise ``ValueError`` if ``teacher`` or ``validation`` would read more tokens than ``model`` has positions.

    ``tokens`` counts context and continuation. Re-rotated keys let the student go beyond the model's positions; a pass
    with the full cache cannot.
    """
    limit = position_limit(model)
    if limit is None or tokens <= limit:
        return
    shorter = f"or shorten context_tokens + continuation_tokens to at most {limit}"
    if teacher:
        raise ValueError(
            f"this objective's teacher reads context and continuation, {tokens} tokens, with the full cache, but this "
            f"model was trained on {limit} positions: use an objective without a teacher (LM), {shorter}"
        )
    if validation:
        raise ValueError(
            f"validation measures the full cache beside the evicted one, so it reads {tokens} tokens, but this model "
            f"was trained on {limit} positions: set trainer.limit_val_batches=0, {shorter}"
        )


def check_continuation(model: PreTrainedModel, position: int, tokens: int) -> None:
    """Raise ``ValueError`` if ``tokens`` tokens from ``position`` on end beyond ``model``'s last position."""
    check_rope(model, position, position + tokens)
    check_query_scales(model, position + tokens)
    limit = position_limit(model)
    if limit is not None and position + tokens > limit:
        raise ValueError(
            f"a continuation of {tokens} tokens from position {position} on takes {position + tokens} positions, but "
            f"this model was trained on {limit} (max_position_embeddings): use shorter contexts or continuations; "
            "or wrap the press in kvpress.KeyRerotationPress, with a budget that leaves room for the continuation"
        )
