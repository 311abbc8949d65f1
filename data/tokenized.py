"""What every LightningDataModule here needs first: the tokenizer of the model that reads its batches."""

from typing import Any

from lightning.pytorch import LightningDataModule


class TokenizedData(LightningDataModule):
    """Has a ``tokenizer``: the trainer's ``lightning_module.tokenizer``, or what is set before ``setup``."""

    has_text = False
    """Whether some of its cases are windows of text, which are read and not answered."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: Any = None

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Take the tokenizer from the trainer's module unless one was set."""
        if self.tokenizer is None and self.trainer is not None:
            self.tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if self.tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: attach it to a trainer whose module has one, or set its "
                "attribute tokenizer before setup()"
            )
