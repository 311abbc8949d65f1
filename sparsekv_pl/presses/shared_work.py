"""Share work between a model's layers and the presses on them within one prefill.

Scorers that read queries (SnapKV, TOVA, ExpectedAttention) project hidden states that their layer has just projected;
ExpectedAttention averages the rotations of hundreds of future positions, which are the same in every layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.models.layer_kinds import attentions
from sparsekv_pl.presses.shadowed_method import shadowed
from sparsekv_pl.presses.traits import PressTraits


@contextmanager
def shared_work(model: PreTrainedModel, traits: PressTraits) -> Iterator[None]:
    """Let the presses of ``traits`` reuse, inside the block, the results of ``model``'s layers and of other presses.

    LeverageScorePress computes in float32, also under autocast. Methods of instances are replaced inside the block;
    classes do not change. With dropout in an adapter, a press scores exactly the queries that attended.
    """
    queries, rotations = _Queries(), _Rotations()
    with ExitStack() as stack:
        for attention in attentions(model).values():
            projection = getattr(attention, "q_proj", None)
            if projection is not None:
                stack.enter_context(shadowed(projection, "forward", queries.project))
        for part in traits.parts:
            if part.shared_work == "mean rotation":
                stack.enter_context(shadowed(part.press, "apply_avg_rope", rotations.apply))
            if part.shared_work == "factorisation":  # also of the LeverageScorePress in CompactorPress
                stack.enter_context(shadowed(part.press, "compute_leverage_scores", _in_float32))
        yield


def _in_float32(leverage_scores: Callable[[Tensor, int], Tensor], keys: Tensor, sketch_dimension: int) -> Tensor:
    """Compute in float32: autocast would make the matrices bfloat16, which has no Cholesky factorisation."""
    with torch.autocast(keys.device.type, enabled=False):
        return leverage_scores(keys.float(), sketch_dimension)


class _Queries:
    """Cache of the newest projection of queries: rows of its input are not projected again."""

    def __init__(self) -> None:
        self.newest: tuple[Callable[..., Tensor], Tensor, int, Tensor] | None = None

    def project(self, projection: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """Project hidden states (B, L, E), or take their rows from the newest projection."""
        if self.newest is not None and self.newest[0] == projection:
            _, whole, version, queries = self.newest
            rows = _rows(whole, hidden) if _version(whole) == version else None
            if rows is not None:
                return queries[:, rows]
        queries = projection(hidden)
        self.newest = projection, hidden, _version(hidden), queries
        return queries


class _Rotations:
    """Cache of ExpectedAttention's mean rotation (D, D), by number of tokens."""

    def __init__(self) -> None:
        self.means: dict[tuple[Any, ...], Tensor] = {}

    def apply(
        self,
        original: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        mean: Tensor,
        covariance: Tensor | None,
        tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply ``apply_avg_rope`` to the queries' ``mean`` (B, H, D) and ``covariance`` (B, H, D, D)."""
        key = (original, tokens, module.rotary_emb, mean.shape[-1], mean.dtype, mean.device)
        if key not in self.means:
            unit = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
            self.means[key] = original(module, unit, None, tokens)[0]
        turned = self.means[key]  # unit vectors after the rotation: its transpose
        if covariance is not None:
            covariance = turned.T @ (covariance @ turned)
        return mean @ turned, covariance


def _rows(whole: Tensor, part: Tensor) -> slice | None:
    """Find the rows of ``whole`` (B, L, E) that ``part`` (B, n, E) is a view of; None if it is no view."""
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or part.dtype != whole.dtype:
        return None
    if part.dim() != 3 or part.stride() != whole.stride() or part.shape[::2] != whole.shape[::2]:
        return None
    start, rest = divmod(int(part.storage_offset() - whole.storage_offset()), int(whole.stride(1)))
    inside = rest == 0 and start >= 0 and start + part.shape[1] <= whole.shape[1]
    return slice(start, start + part.shape[1]) if inside else None


def _version(tensor: Tensor) -> int:
    """Return the version counter of ``tensor``; 0 in inference mode, which has none and where no press writes."""
    return 0 if tensor.is_inference() else tensor._version
