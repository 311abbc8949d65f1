"""kvpress warns of a model class that it does not list whenever a press is applied, four times in a training step."""

import logging
import re

LOGGERS = tuple(f"kvpress.presses.{name}_press" for name in ("base", "kvzip", "fastkvzip", "kvcompose"))
WARNING = re.compile(r"Model <class '(?:.*\.)?(\w+)'> not tested")


class OnceShortened(logging.Filter):
    """Lets the warning pass once for each class of models, in one short line."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """See ``logging.Filter``."""
        found = WARNING.match(record.getMessage())
        if found is None:
            return True
        record.msg, record.args = f"kvpress does not list {found[1]} among the models it was tested with", ()
        new = found[1] not in self.said
        self.said.add(found[1])
        return new


def shorten_warnings() -> None:
    """From now on; a second call changes nothing."""
    if not any(isinstance(one, OnceShortened) for one in logging.getLogger(LOGGERS[0]).filters):
        once = OnceShortened()
        for name in LOGGERS:
            logging.getLogger(name).addFilter(once)
