"""Checks of compression ratios and of other numeric settings of presses and schedules."""

from numbers import Real


def check_compression_ratio(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value``, the setting ``name``, is a fraction of KV pairs to remove."""
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(
            f"{name} is {value!r}: a compression ratio is the fraction of KV pairs removed, at least 0 and "
            f"below 1 (to keep 30 %, write 0.7)"
        )


def check_at_least(name: str, value: float, minimum: float, whole: bool = False) -> None:
    """Raise ``ValueError`` if ``value``, the setting ``name``, is below ``minimum``, or no ``whole`` number."""
    if not value >= minimum or (whole and value % 1):
        raise ValueError(f"{name} is {value}: give {'a whole number of ' * whole}{minimum} or more")
