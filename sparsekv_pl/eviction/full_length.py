"""What reads a whole context with nothing evicted, however the student is trained."""

from transformers import PreTrainedModel

from sparsekv_pl.eviction.limits import position_limit


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
