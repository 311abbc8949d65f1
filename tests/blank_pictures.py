"""Reports whose pictures are made but not drawn, for tests of their content: to draw them takes most of the time."""

import io

import numpy as np
import pytest
from matplotlib.image import imsave

_file = io.BytesIO()
imsave(_file, np.zeros((1, 1, 3)), format="png")
BLANK = _file.getvalue()


@pytest.fixture(autouse=True)
def pictures_are_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture of a report's page is one black pixel; tests/reporting has the drawn ones."""
    monkeypatch.setattr("sparsekv_pl.reporting.analysis_page.png", lambda _: BLANK)
