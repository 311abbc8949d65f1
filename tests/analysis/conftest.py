"""Pictures of reports are not drawn here."""

from tests.blank_pictures import pictures_are_blank  # noqa: F401
