"""Set and read the compression ratio of any press."""

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
        For a ratio outside [0, 1), and for a press without a settable ratio (ComposedPress, presses with a fixed rule).
    """
    check_takes_a_ratio(press)
    check_compression_ratio("compression_ratio", ratio)
    try:
        press.compression_ratio = ratio
    except AttributeError:  # kvpress raises it if the ratio follows from other settings
        raise _without_a_ratio(press) from None


def check_takes_a_ratio(press: BasePress) -> None:
    """Raise ``ValueError`` for a press without a settable ratio, as far as that is known before it is set."""
    if not traits_of(press).takes_a_ratio:
        raise _without_a_ratio(press)


def _without_a_ratio(press: BasePress) -> ValueError:
    traits = traits_of(press)
    lacking = next((candidate for candidate in traits.candidates if not candidate.takes_a_ratio), traits)
    return ValueError(
        f"{lacking.name} has no compression_ratio to set: set it on the presses inside, or wrap one press alone"
    )


@contextmanager
def at_ratios(ratios: Sequence[tuple[BasePress, float]]) -> Iterator[None]:
    """Set presses to these compression ratios inside the block, and restore theirs afterwards."""
    before = [press.compression_ratio for press, _ in ratios]
    try:
        for press, ratio in ratios:
            press.compression_ratio = ratio
        yield
    finally:
        for (press, _), ratio in zip(ratios, before, strict=True):
            press.compression_ratio = ratio


def compression_ratio_of(press: BasePress) -> float:
    """Return the fraction of KV pairs that ``press`` is set to remove; ``ValueError`` if it has no ratio."""
    with suppress(AttributeError, AssertionError):  # presses differ in which one they raise
        if (ratio := press.compression_ratio) is not None:
            return float(ratio)
    raise ValueError(f"{press_name(press)} has no compression_ratio of its own: name a press that has one")


def written_ratio(press: BasePress | None) -> str | None:
    """Return the ratio set on ``press`` or a press in it, as ``SnapKV.compression_ratio=0.5``; None if none is set."""
    for inner in () if press is None else presses_in(press):
        ratio = vars(inner).get("compression_ratio")
        if ratio and ratio != getattr(type(inner), "compression_ratio", None):
            return f"{press_name(inner)}.compression_ratio={ratio}"
    return None
