"""What a query sees: the keys up to its own, and through a layer's window the newest of them alone."""

import torch
from torch import Tensor

from sparsekv_pl.models.layer_kinds import Window


def lower_right_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return (queries, keys) bool, True where visible: the last query sees all keys, the one before all but one."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def window_mask(
    window: Window, queries: int, keys: int, device: torch.device, newest_visible: Tensor | None = None
) -> Tensor | None:
    """Return (T, S) or (B, 1, T, S) bool, False where a query is too far behind a key; None if nothing is hidden.

    The S keys follow each other and end with those of the T queries; for a chunked window the first one starts a chunk.
    ``newest_visible`` (B, R) is False on padding among the newest R keys, which takes no position.
    """
    if keys <= window.tokens:
        return None
    at = torch.arange(keys, device=device)
    if newest_visible is not None:
        older = keys - newest_visible.shape[1]
        newest = older - 1 + newest_visible.to(device).cumsum(1)
        at = torch.cat([at[:older].expand(len(newest), -1), newest], dim=1)[:, None]
    here, there = at[..., -queries:, None], at[..., None, :]
    if window.chunked:
        return here // window.tokens == there // window.tokens
    return here - there < window.tokens
