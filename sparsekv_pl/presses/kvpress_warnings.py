"""Shorten kvpress's warning of an unlisted model class, which it repeats four times in a training step."""

import logging
import re

LOGGERS = tuple(f"kvpress.presses.{name}_press" for name in ("base", "kvzip", "fastkvzip", "kvcompose"))
WARNING = re.compile(r"Model <class '(?:.*\.)?(\w+)'> not tested")


class OnceShortened(logging.Filter):
    """Logging filter that passes the warning once per model class, as one short line."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """See ``logging.Filter``."""
        found = WARNING.match(record.getMessage())
        if found is None:
            return True
        record.msg, record.args = f"kvpress does not list {found[1]} among the models it was tested with", ()
        new = found[1] not in self.passed
        self.passed.add(found[1])
        return new


def shorten_warnings() -> None:
    """Add the filter to kvpress's loggers; a second call changes nothing."""
    if not any(isinstance(one, OnceShortened) for one in logging.getLogger(LOGGERS[0]).filters):
        once = OnceShortened()
        for name in LOGGERS:
            logging.getLogger(name).addFilter(once)
