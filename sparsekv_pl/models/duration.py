"""A duration for a reader, in plans, progress and logs."""


def duration(seconds: float) -> str:
    """Format seconds as hours and minutes, or as seconds below a minute.

    >>> duration(3723), duration(12.34), duration(600), duration(0)
    ('1 h 02 min', '12.3 s', '10 min', '0 s')
    """
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min"
