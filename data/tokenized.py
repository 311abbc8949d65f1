"""The base class of LightningDataModules that need the model's tokenizer."""

from typing import Any

from lightning.pytorch import LightningDataModule


class TokenizedData(LightningDataModule):
    """A LightningDataModule with a ``tokenizer``: the trainer's ``lightning_module.tokenizer``, or one set before
    ``setup``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: Any = None

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Take the tokenizer from the trainer's module unless one was set; ``ValueError`` if there is none."""
        if self.tokenizer is None and self.trainer is not None:
            self.tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if self.tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: attach it to a trainer whose module has one, or set its "
                "attribute tokenizer before setup()"
            )
