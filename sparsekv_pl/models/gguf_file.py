"""The fields of a GGUF file, read once: strings and numbers by name, and the tensor that scales RoPE."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that Llama 3.1 and later have."""


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says beside its weights.

    ``fields`` are its key-value pairs; ``rope_factors`` (D / 2,) divide RoPE's frequencies, None if it has none.
    """

    path: Path
    fields: dict[str, Any]
    rope_factors: np.ndarray | None = None

    def refused(self, what: str) -> ValueError:
        """Make the error for a file whose content is not carried over."""
        return ValueError(
            f"{self.path.name} {what}; convert the model to a Hugging Face folder and give that folder as `pretrained`"
        )

    def of_architecture(self, key: str) -> Any:
        """Return the architecture's own field, for example "context_length"; None if there is none."""
        return self.fields.get(f"{self.fields.get('general.architecture')}.{key}")


def read_gguf(path: Path) -> GgufFile:
    """Read the fields of ``path``; about 10 s for a vocabulary of 262,144 pieces.

    Raises ``ValueError`` if it is no whole GGUF file.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        factors = [np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
    except Exception as error:
        raise damaged(path, error) from error
    return GgufFile(path, fields, factors[0] if factors else None)


def damaged(path: Path, error: Exception) -> ValueError:
    """Make the error for a damaged file; readers raise errors of any kind."""
    return ValueError(f"{path} is no whole GGUF file ({type(error).__name__}: {error}): fetch it again")


def licence_card(file: GgufFile) -> str:
    """Return a model card with the file's licence in its header; adapters' cards carry it on."""
    given = {
        key: value
        for key, field in (("license", "general.license"), ("license_name", "general.license.name"))
        if (value := file.fields.get(field))
    }
    return f"---\n{yaml.safe_dump(given) if given else ''}---\nConverted from {file.path.name}.\n"
