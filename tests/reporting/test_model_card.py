"""Model cards: the Hub's header, no markup from names, and results that an evaluation replaces."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from sparsekv_pl.models.gguf_checkpoint import EMBEDDED
from sparsekv_pl.reporting.model_card import BEGIN, END, measured_results, model_card, refresh_cards, with_results
from sparsekv_pl.reporting.page import Section
from sparsekv_pl.reporting.public_settings import public_command, public_settings, public_text
from sparsekv_pl.reporting.summary import summarised
from tests.reporting.test_hostile_text import MARKUP

ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "base_model_name_or_path": EMBEDDED}
TRAINING = {"base": EMBEDDED, "base_hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "base_licence": "apache-2.0"}


def test_the_header_is_the_hub_s() -> None:
    header = yaml.safe_load(model_card(TRAINING, ADAPTER).split("---")[1])
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (header["license"], header["library_name"]) == ("apache-2.0", "peft")
    assert yaml.safe_load(model_card({}, None).split("---")[1])["license"] == "unknown"


def test_the_data_are_named_in_words() -> None:
    data = {"text": {"class": "data.text.EmbeddedText"}, "context_tokens": 1024, "retrieval_share": 0.65}
    card = model_card({"data": data | {"shortest_context": 256, "questions": [["cloze", 1], ["facts", 3]]}}, None)
    for line in (
        *("| text | EmbeddedText |", "| contexts (tokens) | 256 to 1,024 |"),
        *(
            "| questions | in 65% of the batches: cloze (weight 1), facts (weight 3) |",
            "Contexts of 256 to 1,024 tokens",
        ),
    ):
        assert line in card, line
    assert "in 65% of the batches: facts (weight 1)" in model_card({"data": data}, None)
    assert "| questions | none, plain text alone |" in model_card({"data": {"retrieval_share": 0}}, None)


def test_a_continued_training_shows_what_it_continues() -> None:
    first = {"steps": 300, "command": "python train.py fit --config first.yaml", "data": {"context_tokens": 768}}
    second = {"steps": 80, "command": "python train.py fit --config second.yaml", "data": {"context_tokens": 1024}}
    card = model_card(TRAINING | second | {"continued_from": first}, ADAPTER)
    newest, earlier = card.partition("## The training that it continues")[::2]
    assert "second.yaml" in newest and "| optimizer steps | 80 |" in newest and "first.yaml" not in newest
    assert "first.yaml" in earlier and "| optimizer steps | 300 |" in earlier
    assert "| LoRA |" in newest and "| LoRA |" not in earlier
    assert "Contexts of 1,024, and of 768 tokens were trained" in card
    assert "continues" not in model_card(TRAINING | second, ADAPTER)


def test_a_peft_user_is_told_which_weights_to_pass() -> None:
    embedded, hub, local = (
        model_card({"base": base, "base_hub_id": hub}, ADAPTER)
        for base, hub in ((EMBEDDED, "a/b"), ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("mine", None))
    )
    assert (
        f'import resolve\n\nbase = resolve("{EMBEDDED}")' in embedded
        and 'not "a/b", which has other weights' in embedded
    )
    assert 'base = "Qwen/Qwen3-8B"\n' in hub
    assert 'base = "PATH/TO/mine"  # the folder with the weights whose SHA-256 is above' in local


@pytest.mark.parametrize("text", [*MARKUP, "```\n# heading", f"{BEGIN}\n{END}\n", 'a: b\n---\n- "x'])
def test_a_card_shows_names_as_they_are(text: str) -> None:
    facts = dict.fromkeys(("base", "base_hub_id", "base_licence", "command", "eviction", "precision"), text)
    card = model_card(
        facts | {"presses": [text], "data": {"class": text, text: text}}, {"base_model_name_or_path": text}
    )
    _, header, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(header)["base_model"] == yaml.safe_load(header)["license"] == text
    plain = model_card({"base": "x", "command": "y"}, {"base_model_name_or_path": "z"})
    kinds, expected = (
        [token.type for token in MarkdownIt().enable("table").parse(page) if token.level == 0]
        for page in (body, re.split(r"^---\n", plain, maxsplit=2, flags=re.MULTILINE)[2])
    )
    assert kinds == expected, "no block more than with harmless names"
    inside = [
        child
        for token in MarkdownIt().enable("table").parse(body)
        for child in token.children or ()
        if child.type not in ("text", "text_special", "strong_open", "strong_close", "softbreak")
    ]
    assert not inside
    assert not re.search(r"https?://|(?<!\\)@|www\.", re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE))


def test_results_replace_results_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = "mine\r\n" + model_card(TRAINING, ADAPTER) + "and this\n"
    once = with_results(card, Section("Results", paragraphs=["first"]))
    assert once is not None
    twice = with_results(once, Section("Results", paragraphs=["second"]))
    assert twice is not None and "second" in twice and "first" not in twice and "Not measured" not in twice
    before, after = card.partition(BEGIN)[0], card.partition(END)[2]
    assert twice.startswith(before) and twice.endswith(after)
    for kept in ("# No place\n", card + BEGIN, f"{END}\n{BEGIN}\n"):
        (tmp_path / "README.md").write_bytes(kept.encode())
        refresh_cards(tmp_path, Section("Results", paragraphs=["third"]))
        assert (tmp_path / "README.md").read_bytes() == kept.encode()
    (tmp_path / "README.md").unlink()
    refresh_cards(tmp_path, Section("Results", paragraphs=["third"]))
    assert caplog.text.count("has no place for results") == 3 and "stays without these results" in caplog.text
    assert not list(tmp_path.iterdir())


def test_results_reach_the_merged_model_of_the_same_training_alone(tmp_path: Path) -> None:
    for name, training in {"final": "{}", "merged": "{}", "other/final": "{}", "other/merged": '{"a": 1}'}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "training.json").write_text(training)
        (tmp_path / name / "README.md").write_text(model_card({}, None))
    for folder in (tmp_path / "final", tmp_path / "other/final"):
        refresh_cards(folder, Section("Results", paragraphs=["measured"]))
    cards = {name: "measured\n" in (tmp_path / name / "README.md").read_text() for name in ("merged", "other/merged")}
    assert cards == {"merged": True, "other/merged": False}


def test_results_have_intervals_and_say_how_they_were_measured(
    make_records: Callable[..., list[dict[str, Any]]],
) -> None:
    failure = {"press": "Odd", "compression_ratio": 0.5, "variant": "base", "error": "no /home/me/file", "task": "text"}
    section = measured_results(summarised([*make_records(), failure]), "python evaluate.py test", 7)
    assert "Contexts of 512 tokens; seed 7. Measured by python evaluate.py test." in section.paragraphs
    (snapkv,) = [line for line in section.tables[0].lines if line[:2] == ["SnapKV", "0.50"]]
    assert snapkv[2] == "seen" and all(re.fullmatch(r"[+-]?\d\.\d\d \[.*, .*\]", cell) for cell in snapkv[3:9])
    assert "failed" in str(section) and "/home/me" not in str(section)


def test_what_is_published_has_no_folders_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {
        "/home/me/my texts/a.txt": "a.txt",
        "~/texts/a.txt": "a.txt",
        "C:\\Users\\me\\a.txt": "a.txt",
        "--config=/home/me/x.yaml": "--config=x.yaml",
        "--paths=['/home/me/a.txt', \"~me/b.txt\"]": "--paths=['a.txt', \"b.txt\"]",
        "configs/quickstart.yaml": "configs/quickstart.yaml",
        "../x/a.txt": "../x/a.txt",
        "Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
        "https://host/4711": "https://host/[hidden]",
        "--url=https://host/4711/v1": "--url=https://host/[hidden]/v1",
    }
    assert {text: public_text(text) for text in shown} == shown
    secret = "hf_" + "a1B2c3D4" * 4
    monkeypatch.setattr("sys.argv", ["/home/me/train.py", "fit", "--config", "/home/me/x y.yaml", f"--token={secret}"])
    command = public_command("train.py")
    assert command is not None and command.startswith("python train.py fit --config 'x y.yaml'")
    assert secret not in command
    assert public_command("evaluate.py") is None
    assert public_settings(object()) == {"class": "builtins.object"}
