"""A half-filled cache on disk, from which an interrupted prefill continues."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekv_pl.storage.whole_files import written_whole

log = logging.getLogger(__name__)


class SavedState:
    """One safetensors file that holds a prefill's state, the key of the work it belongs to and a checksum.

    The file is replaced atomically: a killed process leaves the previous one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Replace the saved state by ``state``, tensors by name, for the work ``key``."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        with written_whole(self.path) as partial:
            save_file(tensors, partial, metadata={"key": key, "checksum": checksum_of(tensors)})

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the state saved for ``key``; None, with a logged reason, if it is damaged or of other work."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s): the prefill starts over", self.path, error)
            return None
        if about.get("key") != key:
            log.warning("%s belongs to another model, press, text or setting: the prefill starts over", self.path)
            return None
        if about.get("checksum") != checksum_of(tensors):
            log.warning("%s is damaged (its checksum is another): the prefill starts over", self.path)
            return None
        return tensors

    def discard(self) -> None:
        """Delete the file, once the work is finished."""
        self.path.unlink(missing_ok=True)


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """Digest the names, dtypes, shapes and bytes of tensors on the host."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
