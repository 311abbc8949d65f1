"""A text that may name a file never stops a run because it cannot be a path."""

from pathlib import Path

import pytest

from sparsekv_pl.storage.given_paths import existing, named_by
from sparsekv_pl.storage.result_keys import settings_of

NO_PATHS = ["a" * 300, f"./{'a' * 300}", "a" * 5000, "two\nlines", "a\0b", "~nobody-of-this-name/a", "missing"]


@pytest.mark.parametrize("text", NO_PATHS)
@pytest.mark.parametrize("home", [True, False])
def test_a_text_that_cannot_be_a_path_names_nothing(text: str, home: bool) -> None:
    assert existing(text, home=home) is named_by(text, home=home) is None
    assert settings_of(text) == text


def test_what_is_there_is_found_and_home_only_expanded_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("x")
    assert existing("here.txt") == named_by("here.txt") == Path("here.txt")
    assert existing("~/here.txt") == tmp_path / "here.txt"
    assert existing("~/here.txt", home=False) is None
    assert existing(".") == Path()


@pytest.mark.parametrize("text", ["", ".", "..", "/", "./"])
def test_a_delimiter_in_a_setting_is_not_the_folder_that_it_would_be(text: str) -> None:
    assert named_by(text) is None
    assert settings_of(text) == text
