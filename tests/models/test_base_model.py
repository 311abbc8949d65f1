"""The base's name, licence and origin, as other machines find them."""

from pathlib import Path

import pytest

from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.base_model import Origin, base_name, base_reference, origin_of
from sparsekv_pl.models.gguf_checkpoint import EMBEDDED


def test_a_name_holds_no_folder_of_this_machine(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    (tmp_path / "small.gguf").touch()
    assert [base_name(name) for name in (EMBEDDED, "Qwen/Qwen3-8B")] == [EMBEDDED, "Qwen/Qwen3-8B"]
    assert base_name(f"{tmp_path}/../{tmp_path.name}/small.gguf") == "small.gguf"
    llama, qwen = (Backbone(pretrained=tiny_models[kind]) for kind in ("llama", "qwen3"))
    name, _, fingerprint = base_reference(llama).partition("@")
    assert name == Path(tiny_models["llama"]).name and len(fingerprint) == 12
    assert not base_reference(qwen).endswith(fingerprint)
    assert base_reference(Backbone()) == EMBEDDED


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: [a, b]\n---\n", "unknown"),
        ("---\nlicense: {\n---\n", "unknown"),
        ("# license: mit\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_is_the_base_s_own_or_unknown(card: str | None, licence: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert origin_of(str(tmp_path), tmp_path) == Origin(None, licence)
    assert origin_of("an/id", tmp_path) == Origin("an/id", licence)
    assert origin_of(EMBEDDED, tmp_path / "x.gguf") == Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
