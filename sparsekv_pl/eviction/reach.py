"""How far into a model's positions the passes beside an eviction reach: the full cache, and what follows a context."""

from transformers import PreTrainedModel

from sparsekv_pl.eviction.limits import check_rope, position_limit


def check_full_cache(model: PreTrainedModel, tokens: int, teacher: bool, validation: bool) -> None:
    """Raise ``ValueError`` if a ``teacher``, or ``validation``, would read ``tokens`` tokens (context and
    continuation) and ``model`` has fewer positions: eviction with re-rotated keys takes the student beyond them, but
    nothing takes a pass with the full cache there.
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
    """Raise ``ValueError`` if a continuation of ``tokens`` tokens from ``position`` on ends beyond ``model``'s last."""
    check_rope(model, position, position + tokens)
    limit = position_limit(model)
    if limit is not None and position + tokens > limit:
        raise ValueError(
            f"a continuation of {tokens} tokens from position {position} on takes {position + tokens} positions, but "
            f"this model was trained on {limit} (max_position_embeddings): use shorter contexts or continuations; "
            "or wrap the press in kvpress.KeyRerotationPress, with a budget that leaves room for the continuation"
        )
