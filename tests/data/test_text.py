"""Text sources: the embedded sentence and Python's modules, files and hub datasets; splits and bad files."""

import json
import sysconfig

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data.documents import SourceFailed
from data.python_source import PythonSource
from data.question_sources import LocalQuestions
from data.repeated_text import RepeatedText
from data.text import EmbeddedText, HubText, LocalText, Splits


def test_every_split_of_the_embedded_text_has_enough():
    sizes = {"train": 0, "validation": 0, "held_out": 0}
    for document in EmbeddedText().documents():
        sizes[Splits().of(document.text)] += len(document.text)
    assert sizes["train"] >= 300_000
    assert sizes["validation"] >= 30_000
    assert sizes["held_out"] >= 35_000


def test_split_is_stable_and_follows_the_shares():
    splits = [Splits(0.5, 0.2, 0.3).of(f"text {i}") for i in range(4000)]
    assert abs(splits.count("train") / 4000 - 0.5) < 0.03
    assert abs(splits.count("validation") / 4000 - 0.2) < 0.03
    # Pinned: another hash would move documents between splits of runs already made.
    assert [Splits().of(f"text {i}") for i in (0, 9, 4)] == ["train", "validation", "held_out"]


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.2), (1.2, -0.1, -0.1)])
def test_shares_must_add_up(shares):
    with pytest.raises(ValueError, match="add up to 1"):
        Splits(*shares)


def test_reads_text_json_lines_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n')
    parquet.write_table(pa.table({"body": ["three", None, "four"]}), tmp_path / "c.parquet")
    source = LocalText([str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")], text_field="body")
    found = list(source.documents())
    assert [d.text for d in found] == ["plain", "one", "two", "three", "four"]
    assert [d.id.rsplit("/")[-1] for d in found] == [
        "a.txt",
        "b.jsonl:1",
        "b.jsonl:3",
        "c.parquet:1",
        "c.parquet:3",
    ]


@pytest.mark.parametrize("broken", ['{"text": "x"', '["text"]', "caf\u00e9"])
def test_broken_line_is_named_or_counted(tmp_path, broken, caplog):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n' + broken + "\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: broken.*skip_broken"):
        list(LocalText([str(path)]).documents())
    source = LocalText([str(path)], skip_broken=True)
    assert [d.text for d in source.documents()] == ["good"]
    assert source.skipped == 1
    assert "skipped 1 unusable" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: holds no text: its text is empty; 1 .* Repair it or remove it from paths$"),
        ("empty.jsonl", b"", "holds no text: it has no documents; 1 unusable in all.*text_field"),
        ("none.jsonl", b'{"a": 1}\n{"a": 2}\n', r"none\.jsonl:1: it has no text; 2 unusable in all.*text_field"),
        ("bytes.txt", b"\xff\xfe\xfa", "not readable"),
        ("bad.parquet", b"not parquet at all", "not a Parquet file"),
        ("x.csv", b"a,b", "unknown kind of file"),
        ("missing.txt", None, "not readable"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(LocalText([str(tmp_path / name)]).documents())
    assert name in str(error.value)


def test_a_folder_stands_for_the_texts_in_it(tmp_path):
    for name in ("b.txt", "a/2.txt", "a/1.jsonl", "notes.md", "table.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert [d.text for d in LocalText([str(tmp_path)]).documents()] == ["a/1.jsonl", "a/2.txt", "b.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no \.jsonl, \.parquet, \.txt file in this folder"):
        list(LocalText([str(tmp_path / "empty")]).documents())


def test_an_empty_file_in_a_folder_is_skipped_and_counted(tmp_path, caplog):
    contents = {"a.txt": "", "b.txt": "text", "c.txt": " \n", "d.jsonl": "", "e.jsonl": '{"text": "row"}\n{}\n'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    source = LocalText([str(tmp_path), str(tmp_path / "b.txt")])
    for _ in range(2):
        assert [d.text for d in source.documents()] == ["text", "row", "text"]
        assert source.skipped == 4
    assert "skipped 4 unusable documents in 6 files" in caplog.text
    assert "a.txt: its text is empty" in caplog.text


def test_a_folder_without_text_stops_and_says_why(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(" ")
    with pytest.raises(ValueError, match=r"holds no text: .*a\.txt: its text is empty; 2 unusable in all") as error:
        list(LocalText([str(tmp_path)]).documents())
    assert str(error.value).startswith(f"{tmp_path}: ")
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(SourceFailed, match=r"2 documents in a row cannot be used, the last is .*b\.txt"):
        list(LocalText([str(tmp_path)], skip_limit=1).documents())


def test_a_text_that_is_too_long_is_refused_with_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr("data.documents.LONGEST", 10)
    (tmp_path / "long.txt").write_text("a" * 11)
    with pytest.raises(ValueError, match=r"long\.txt: holds no text: its text has 11 characters, more than 10"):
        list(LocalText([str(tmp_path / "long.txt")]).documents())


def test_a_path_that_cannot_be_one_is_not_there():
    with pytest.raises(ValueError, match=r"LocalText\.paths has a{300}: not readable \(there is no such file\)"):
        LocalText(["a" * 300])


def test_unreachable_dataset_says_what_to_do():
    with pytest.raises(ValueError, match=r"nobody/nothing.*EmbeddedText"):
        list(HubText("nobody/nothing").documents())


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, monkeypatch):
    bom = b"\xef\xbb\xbf"
    rows = ['{"text": "first"}', '{"text": "\\ufeffsecond"}']
    (tmp_path / "a.txt").write_bytes(bom + b"plain")
    (tmp_path / "b.jsonl").write_bytes(bom + "\n".join(rows).encode())
    (tmp_path / "c.csv").write_bytes(bom + b"text,more\nfirst,x\nsecond,y\n")
    parquet.write_table(pa.table({"text": ["first", "\ufeffsecond"]}), tmp_path / "d.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    local = LocalText([str(tmp_path / "a.txt"), "~/b.jsonl", "~/d.parquet"], skip_broken=True)
    assert [d.text for d in local.documents()] == ["plain", "first", "second", "first", "second"]
    assert local.skipped == 0
    for kind, name in (("csv", "c.csv"), ("json", "b.jsonl"), ("parquet", "d.parquet"), ("text", "a.txt")):
        for streaming in (True, False):
            hub = HubText(kind, data_files=[str(tmp_path / name)], streaming=streaming)
            texts = [d.text for d in hub.documents()]
            assert texts == (["plain"] if kind == "text" else ["first", "second"]), (kind, streaming)
    assert Splits().of("\ufefffirst") == Splits().of("first")


def test_a_byte_order_mark_before_questions_drops_none(tmp_path):
    row = {"document": "Some text.", "question": "What?", "answer": "text"}
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n" + json.dumps(row).encode())
    assert len(list(LocalQuestions([str(tmp_path / "q.jsonl")]).samples(None, 100))) == 2


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


def test_it_repeats_whole_sentences():
    documents = list(RepeatedText(100_000, "Again and again.").documents())
    assert 100_000 <= sum(len(document.text) for document in documents) <= 111_000
    assert len({document.text for document in documents}) == len(documents) == 10
    assert all(set(document.text.split(". ")) == {"Again and again", "Again and again."} for document in documents)


def test_every_split_has_its_share():
    splits = [Splits().of(document.text) for document in RepeatedText().documents()]
    assert len(splits) > 50
    assert min(splits.count(split) for split in ("train", "validation", "held_out")) >= 5


@pytest.mark.parametrize(("options", "name"), [({"sentence": " "}, "sentence"), ({"characters": 0}, "characters")])
def test_nothing_to_repeat_is_refused(options, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        RepeatedText(**options)
