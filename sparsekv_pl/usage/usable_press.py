"""Which presses can make a cache that is kept: those whose eviction is over, and real, before a question is known."""

from kvpress import BasePress

from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.usage.cache_origin import CacheOrigin

INSTEAD = "take a press that removes pairs from the context alone (KeyDiffPress, SnapKVPress)"


def check_usable(press: BasePress | None) -> None:
    """Raise ``ValueError``, with the press's name and the reason, if it cannot make a cache to keep."""
    if press is None:
        return
    traits = traits_of(press)
    refused = {
        "hides pairs per head and leaves them in memory, so nothing would be saved": traits.head_wise,
        "selects by the question, which a cache that is asked many questions does not know": traits.needs_question,
        "selects by the continuation, which is not known before a question": traits.foresees,
        "evicts while tokens are generated, and a kept cache stays as it is": traits.while_generating,
        "evicts only in training, so the full cache would be kept": traits.deciding.only_trains,
        "draws another press at every training step": traits.decides == "drawn",
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"{traits.name} {reason}: {INSTEAD}")


def check_appendable(press: BasePress | None, origin: CacheOrigin) -> None:
    """Raise ``ValueError`` if ``press``, which evicted as ``origin`` says, cannot evict again after more text."""
    if origin.fixed:
        raise ValueError(origin.fixed)
    if press is None:
        if origin.press is not None:
            raise ValueError(
                f"{origin.press} cannot be made from its file, so it cannot evict again: load with press=..."
            )
        return
    traits = traits_of(press)
    if not traits.works_in_chunks:
        raise ValueError(
            f"{traits.name} looks at a whole context at once, so nothing can be appended to its cache: prefill both "
            "texts together, or take a press that works in chunks (KeyDiffPress, SnapKVPress)"
        )
    if not traits.takes_a_ratio:
        raise ValueError(
            f"{traits.name} has no compression_ratio that could hold for the whole text, so nothing can be appended to "
            "its cache: prefill both texts together, or take a press with a ratio (KeyDiffPress, SnapKVPress)"
        )
