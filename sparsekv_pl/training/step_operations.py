"""Floating-point operations of a training step's row, by pass."""

from kvpress import ExpectedAttentionPress

from sparsekv_pl.training.step_shape import ModelShape, StepShape

BACKWARD = 2.5
"""Attention's backward over its forward: five products for two."""


def row_operations(model: ModelShape, step: StepShape, context_tokens: float | None = None) -> dict[str, float]:
    """Return the operations of one row by pass, with ``context_tokens`` tokens of context.

    A product of n tokens with P weights takes 2 n P, forward or for the gradient of its input; frozen weights take no
    gradient. Causal attention over n tokens takes 2 Q n^2, each of t later tokens 4 Q times its keys.
    """
    context = step.context_tokens if context_tokens is None else context_tokens
    kept = min(step.kept, context * (1 - step.compression_ratio))
    later = step.continuation_tokens
    rank = model.trained
    linear = 2 * (model.layers * model.layer_weights)
    skipped = 2 * model.mlp_weights  # of the last layer, over the context
    pairs = sum(tokens * (keys - tokens / 2) for tokens, keys, _ in step.chunks) * (context / step.context_tokens) ** 2
    attended = 4 * model.layers * model.queries * pairs
    after = 4 * model.layers * model.queries * later * (kept + later / 2)
    forward = (linear + 2 * rank) * context - skipped * context + attended
    back = 0.0 if step.local else (linear + 4 * rank) * context - skipped * context + BACKWARD * attended
    head = 2 * model.hidden * model.vocabulary * step.supervised
    found = {
        "teacher": 0.0,
        "context forward": forward,
        "context backward": back,
        "context again, checkpointed": forward if step.checkpoint else 0.0,
        "continuation": (2 * linear + 6 * rank) * later + (1 + BACKWARD) * after,
        "selection": _selection(model, step, context) if step.scores else 0.0,
        "head": head * (3 if step.teacher else 2),
    }
    if step.teacher:
        full = context + later
        found["teacher"] = linear * full - skipped * context + 2 * model.layers * model.queries * full**2
    return found


def _selection(model: ModelShape, step: StepShape, context: float) -> float:
    """Return the operations of the teacher's attention rows and of scores, forward and backward."""
    rows = 2 * model.layers * model.queries * step.supervised * (context + step.continuation_tokens)
    scores = 0.0
    for press in step.scorers:
        if isinstance(press, ExpectedAttentionPress):
            scores += 3 * 4 * model.layers * model.queries * model.head_dim * context
        elif window := getattr(press, "window_size", 0):
            scores += 3 * 2 * model.layers * model.queries * window * context
    return rows + scores
