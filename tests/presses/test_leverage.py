"""Presses that factorise matrices also run in bfloat16, which has no factorisation."""

import pytest
import torch
from kvpress import BasePress, CompactorPress, LeverageScorePress

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.replay import RecordedPrefill
from tests.presses.press_bench import model_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [LeverageScorePress, CompactorPress])
def test_they_evict_in_bfloat16(make: type[BasePress], dtype: torch.dtype) -> None:
    """Under autocast and with bfloat16 weights, directly and replayed, on a batch."""
    model = model_of("llama", dtype).eval()
    ids = torch.randint(2, 1024, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        for evicted in (prefill(model, ids, make(0.5)), RecordedPrefill(model, ids).evicted(make(0.5))):
            assert [layer.keys.shape[2] for layer in evicted.cache.layers] == [48, 48]
