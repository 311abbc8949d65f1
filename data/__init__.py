"""Text streams, retrieval tasks and the LightningDataModule that mixes them."""

from data.mixture import EvictionData
from data.text import EmbeddedText, HubText, LocalText

__all__ = ["EmbeddedText", "EvictionData", "HubText", "LocalText"]
