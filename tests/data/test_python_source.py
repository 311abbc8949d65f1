"""The standard library as text: much of it, the same every time, without tests and installed packages."""

import sysconfig

import pytest

from data.python_source import PythonSource
from data.text import Splits


@pytest.fixture(scope="module")
def documents():
    """All of them."""
    return list(PythonSource().documents())


def test_it_is_much_text_in_every_split(documents):
    assert sum(len(document.text) for document in documents) > 5_000_000
    shares = {split: 0 for split in ("train", "validation", "held_out")}
    for document in documents:
        shares[Splits().of(document.text)] += len(document.text)
    assert min(shares.values()) > 500_000


def test_documents_are_named_after_modules(documents):
    names = [document.id for document in documents]
    assert len(set(names)) == len(names)
    assert names == sorted(names)
    assert {"python/json/decoder.py", "python/argparse.py"} <= set(names)
    assert "class JSONDecoder" in next(text for name, text in documents if name == "python/json/decoder.py")
    assert all(document.text.strip() for document in documents)


def test_tests_packages_and_this_machine_are_left_out(documents):
    for name, _ in documents:
        assert not {"test", "tests", "idle_test", "site-packages", "pydoc_data"} & set(name.split("/"))
        assert "_sysconfigdata" not in name
        assert not name.startswith("python/config-")


def _installed(monkeypatch, folder):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder) if name == "stdlib" else None)
    return PythonSource().documents()


def test_files_are_read_in_their_own_encoding(monkeypatch, tmp_path):
    (tmp_path / "b.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").write_text("\n")
    (tmp_path / "a" / "z.py").write_text("one = 1\n")
    found = list(_installed(monkeypatch, tmp_path))
    assert [document.id for document in found] == ["python/a/z.py", "python/b.py"]
    assert "é" in found[1].text


def test_an_installation_without_sources_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="holds no Python sources"):
        list(_installed(monkeypatch, tmp_path))
