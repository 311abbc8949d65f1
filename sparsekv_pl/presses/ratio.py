"""The compression ratio of any press: set, read, and as it was written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from kvpress import BasePress

from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.presses.nesting import press_name, presses_in
from sparsekv_pl.presses.traits import traits_of


def set_compression_ratio(press: BasePress, ratio: float) -> None:
    """Set the fraction of KV pairs that ``press`` removes.

    Raises
    ------
    ValueError
        For a ratio outside [0, 1), and for a press that has none to set (ComposedPress, and those with a fixed rule).
    """
    traits = traits_of(press)
    if traits.takes_a_ratio:
        check_compression_ratio("compression_ratio", ratio)
        with suppress(AttributeError):  # kvpress's way to say that the ratio follows from other settings
            press.compression_ratio = ratio
            return
    lacking = next((candidate for candidate in traits.candidates if not candidate.takes_a_ratio), traits)
    raise ValueError(
        f"{lacking.name} has no compression_ratio to set: set it on the presses inside, or wrap one press alone"
    )


@contextmanager
def at_ratios(ratios: Sequence[tuple[BasePress, float]]) -> Iterator[None]:
    """Presses at these ratios inside the block."""
    before = [press.compression_ratio for press, _ in ratios]
    try:
        for press, ratio in ratios:
            press.compression_ratio = ratio
        yield
    finally:
        for (press, _), ratio in zip(ratios, before, strict=True):
            press.compression_ratio = ratio


def compression_ratio_of(press: BasePress) -> float:
    """The fraction of KV pairs that ``press`` is set to remove. ``ValueError`` where it does not say."""
    with suppress(AttributeError, AssertionError):  # which of them is up to the press
        if (ratio := press.compression_ratio) is not None:
            return float(ratio)
    raise ValueError(f"{press_name(press)} has no compression_ratio of its own: name a press that has one")


def written_ratio(press: BasePress | None) -> str | None:
    """The ratio that was written in ``press`` or in one inside it (``SnapKV.compression_ratio=0.5``), if one was."""
    for inner in () if press is None else presses_in(press):
        ratio = vars(inner).get("compression_ratio")
        if ratio and ratio != getattr(type(inner), "compression_ratio", None):
            return f"{press_name(inner)}.compression_ratio={ratio}"
    return None
