"""The LightningDataModule of collected files of queries, keys and values."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

NAME = re.compile(r"tensors_seq(?P<length>\d+)_layer(?P<layer>\d+)_sample(?P<sample>\d+)_(?P<timestamp>.+)\.pt")
FIX = "collect some first: python evaluate.py predict --config configs/analyze/collect.yaml"


class TensorFiles(LightningDataModule):
    """Batches of file paths: the files of one sample and collection, in ascending order of layers.

    Files are found by their names and not opened. A tensors_*.pt file whose name has no length, layer and sample is its
    own batch, which the module refuses; other files are ignored.

    Parameters
    ----------
    folder
        The folder of the files.
    lengths
        Context lengths to read, in tokens; null for all.
    layers
        Layers to read; null for all.
    """

    def __init__(
        self, folder: str = "output/collect", lengths: list[int] | None = None, layers: list[int] | None = None
    ) -> None:
        super().__init__()
        self.folder, self.lengths, self.layers = Path(folder).expanduser(), lengths, layers

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Find the files. Raises ``ValueError`` if there are none, or none of these lengths and layers."""
        files = sorted(self.folder.glob("tensors_*.pt"))
        if not files:
            raise ValueError(f"{self.folder} holds no tensors_*.pt files: {FIX}")
        self.groups = self._grouped(files)
        if not self.groups:
            raise ValueError(
                f"none of the {len(files)} tensor files in {self.folder} has lengths={self.lengths} and "
                f"layers={self.layers}: give null for all, or {FIX}"
            )

    def predict_dataloader(self) -> DataLoader[list[str]]:
        """Return the batches by length, then sample, then time of collection."""
        return DataLoader(self.groups, batch_size=None, shuffle=False)  # type: ignore[arg-type]

    def _grouped(self, files: Sequence[Path]) -> list[list[str]]:
        groups: dict[tuple[int, int, str], dict[int, str]] = defaultdict(dict)
        unknown = []
        for path in files:
            name = NAME.fullmatch(path.name)
            if name is None:
                unknown.append([str(path)])
                continue
            length, layer, sample = (int(name[part]) for part in ("length", "layer", "sample"))
            if length in (self.lengths or [length]) and layer in (self.layers or [layer]):
                groups[length, sample, name["timestamp"]][layer] = str(path)
        known = [[path for _, path in sorted(layers.items())] for _, layers in sorted(groups.items())]
        return known + unknown
