"""Floating-point operations of a training step's row, by pass."""

from collections.abc import Sequence
from dataclasses import replace

from kvpress import ExpectedAttentionPress

from sparsekv_pl.training.step_shape import ModelShape, StepShape

BACKWARD = 2.5
"""Attention's backward over its forward: five products for two."""


def row_operations(model: ModelShape, step: StepShape, context_tokens: float | None = None) -> dict[str, float]:
    """Return the operations of one row by pass, with ``context_tokens`` tokens of context.

    A product of n tokens with P weights takes 2 n P, forward or for the gradient of its input; frozen weights take no
    gradient. Causal attention over n tokens takes 2 Q n^2, each of t later tokens 4 Q times its keys.
    """
    if context_tokens is not None:
        step = replace(step, context_tokens=round(context_tokens))
    context, later = step.context_tokens, step.continuation_tokens
    linear = 2 * (model.layers * model.layer_weights)
    predicted = step.supervised + max(0, step.held_tokens - 1)
    head = 2 * model.hidden * model.vocabulary * predicted * (3 if step.teacher else 2)
    found = {"teacher": _teacher(model, step) if step.teacher else 0.0}
    if step.dropout:
        tokens = context + later
        attended = _attended(model, [(context, context, 0)]) * (1 - step.compression_ratio)
        attended += _attended(model, [(later, step.kept + later, 0)])
        forward = (linear + 2 * model.trained) * tokens + attended
        back = (linear + 4 * model.trained) * tokens + BACKWARD * attended
        again = forward if step.checkpoint else 0.0
        return found | {"forward": forward, "backward": back, "again, checkpointed": again, "head": head}
    skipped = 2 * model.mlp_weights * (context - step.held_tokens)  # of the last layer, over the context
    attended = _attended(model, step.chunks)
    forward = (linear + 2 * model.trained) * context - skipped + attended
    back = 0.0 if step.local else (linear + 4 * model.trained) * context - skipped + BACKWARD * attended
    again, whole = step.read_again, [(later, context + later, 0)]
    return found | {
        "context forward": forward,
        "context backward": back,
        "context again, checkpointed": forward if step.checkpoint else 0.0,
        "continuation": _read(model, step.pieces),
        "continuation, full cache": _read(model, whole) if step.full_cache else 0.0,
        "evicted text": _read(model, [(again, step.kept + again, 0)]) if again else 0.0,
        "selection": _selection(model, step) if step.scores else 0.0,
        "press losses": sum(3 * 2 * model.layers * model.queries * one.window_size * context for one in step.losing),
        "head": head,
    }


def _attended(model: ModelShape, chunks: Sequence[tuple[int, int, int]]) -> float:
    """Return the forward operations of attention of ``chunks`` (tokens, keys, kept)."""
    return 4 * model.layers * model.queries * sum(tokens * (keys - tokens / 2) for tokens, keys, _ in chunks)


def _read(model: ModelShape, pieces: Sequence[tuple[int, int, int]]) -> float:
    """Return the operations, forward and backward, of tokens that go through all layers."""
    linear = 2 * (model.layers * model.layer_weights)
    tokens = sum(piece[0] for piece in pieces)
    return (2 * linear + 6 * model.trained) * tokens + (1 + BACKWARD) * _attended(model, pieces)


def _teacher(model: ModelShape, step: StepShape) -> float:
    tokens, linear = step.context_tokens + step.continuation_tokens, 2 * (model.layers * model.layer_weights)
    skipped = 0 if step.held_tokens else 2 * model.mlp_weights * step.context_tokens
    return linear * tokens - skipped + _attended(model, [(tokens, tokens, 0)])


def _selection(model: ModelShape, step: StepShape) -> float:
    """Return the operations of the teacher's attention rows and of scores, forward and backward."""
    rows = 2 * model.layers * model.queries * step.supervised * (step.context_tokens + step.continuation_tokens)
    keys = sum(chunk[1] for chunk in (*step.chunks, *step.pieces[:-1]))
    scores = 0.0
    for press in step.scorers:
        if isinstance(press, ExpectedAttentionPress):
            scores += 3 * 4 * model.layers * model.queries * model.head_dim * keys
        elif window := getattr(press, "window_size", 0):
            scores += 3 * 2 * model.layers * model.queries * window * keys
    return rows + scores
