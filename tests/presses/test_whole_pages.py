"""PagePress against a loop over pages: in one chunk, over many, in kvpress's own forward, with gradients."""

from itertools import product

import pytest
import torch
from kvpress import KeyDiffPress, KeyRerotationPress, KnormPress, ScorerPress, SnapKVPress
from torch import Tensor, nn

from sparsekv_pl.eviction.prefill import ChunkedPrefill, prefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses import AnchorPress, PagePress
from sparsekv_pl.presses.press_context import PRESS_CONTEXT, PressContext
from sparsekv_pl.presses.whole_pages import TIES
from tests.random_models import Build

PAGE, SINKS = 4, 2
settings = pytest.mark.parametrize("shared", [True, False])


class Layer(nn.Module):
    layer_idx = 0


class Given(ScorerPress):
    """Scores that are given."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def score(self, *_: object) -> Tensor:
        return self.scores


def reference(scores: Tensor, positions: Tensor, shared: bool) -> Tensor:
    """Written out for (B, K, S): each head's scores standardised, then a mean over every page."""
    result = torch.empty_like(scores)
    standard = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True, unbiased=False)
    batch, heads, keys = scores.shape
    for row, head, key in product(range(batch), range(heads), range(keys)):
        of = range(heads) if shared else [head]
        page = positions[row, head, key] // PAGE
        same = [
            standard[row, other, at] for other in of for at in range(keys) if positions[row, other, at] // PAGE == page
        ]
        result[row, head, key] = torch.stack(same).mean() - TIES * (positions[row, head, key] % PAGE)
    return result.masked_fill(positions < SINKS, torch.inf)


def scored(press: PagePress, positions: Tensor, before: int) -> Tensor:
    """Scores of keys at ``positions``, of which the last were just read and ``before`` were held."""
    keys = torch.zeros(*positions.shape, 8)
    new = positions.shape[-1] - before
    context = PressContext(start=int(positions.max()) + 1 - new)
    if before:
        context.positions = {0: positions[..., :before]}
    return press.score(Layer(), torch.zeros(2, new, 8), keys, keys, None, {PRESS_CONTEXT: context})


@settings
def test_scores_and_gradients_equal_a_loop_over_pages(shared: bool) -> None:
    """Ten keys of thirty are left, others in each row and head, and seven were just read."""
    generator = torch.Generator().manual_seed(0)
    held = torch.stack([torch.randperm(30, generator=generator)[:10].sort().values for _ in range(6)]).view(2, 3, 10)
    positions = torch.cat([held, torch.arange(30, 37).expand(2, 3, -1)], dim=-1)
    scores = torch.randn(2, 3, 17, generator=generator, requires_grad=True)
    found = scored(PagePress(0.5, Given(scores), PAGE, shared, SINKS), positions, before=10)
    wanted = reference(scores, positions, shared)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(2, 3, 17, generator=generator)
    sums = [torch.where(each.isfinite(), each * weights, 0).sum() for each in (found, wanted)]
    own, expected = (torch.autograd.grad(each, scores)[0] for each in sums)
    torch.testing.assert_close(own, expected)
    assert own.abs().sum() > 0


def test_pages_of_one_token_select_as_the_press_inside(random_model: Build) -> None:
    model, ids = random_model(), torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(1))
    request = Request(contexts=True)
    single = prefill(model, ids, PagePress(0.5, page_tokens=1, shared=False, sinks=0), request=request)
    inside = prefill(model, ids, KeyDiffPress(0.5), request=request)
    for layer in range(2):
        assert torch.equal(single.positions[layer], inside.positions[layer].sort(-1).values)


@settings
@pytest.mark.parametrize("rotates", [True, False])
def test_whole_pages_stay_over_many_chunks(random_model: Build, shared: bool, rotates: bool) -> None:
    model, ids = random_model(), torch.randint(64, (2, 96), generator=torch.Generator().manual_seed(2))
    pages = PagePress(page_tokens=PAGE, shared=shared, sinks=0)
    filling = ChunkedPrefill(model, KeyRerotationPress(pages) if rotates else pages, 96, 24, budget=6 * PAGE)
    kept = filling.run(ids).positions
    for layer in range(2):
        assert kept[layer].shape == (2, 2, 6 * PAGE)
        counts = (kept[layer] // PAGE).unsqueeze(-1).eq(torch.arange(24)).sum(-2)  # (B, K, pages)
        assert set(counts.unique().tolist()) == {0, PAGE}
        assert not shared or torch.equal(kept[layer][:, 0], kept[layer][:, 1])


def test_outside_a_prefill_positions_count_from_zero(random_model: Build) -> None:
    model, ids = random_model(), torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(3))
    press = PagePress(0.5, page_tokens=PAGE)
    with press(model):
        cache = model.model(ids, use_cache=True).past_key_values
    ours = prefill(model, ids, press).cache
    for theirs, own in zip(cache.layers, ours.layers, strict=True):
        torch.testing.assert_close(theirs.keys, own.keys)


@pytest.mark.parametrize(
    "inside", [SnapKVPress(window_size=3), AnchorPress(anchors=Anchors(1, 3, False, False))], ids=["window", "anchors"]
)
def test_scores_stay_finite_around_presses_that_keep_by_a_rule(random_model: Build, inside: ScorerPress) -> None:
    model, ids = random_model(), torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(4))
    found = prefill(model, ids, PagePress(0.5, inside, PAGE, sinks=0), request=Request(scores=True)).selections
    assert all(one.scores.isfinite().all() for one in found)


def test_what_is_kept_by_infinite_scores_stays() -> None:
    scores = torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(5))
    scores[:, :, 7] = torch.inf
    found = scored(PagePress(0.5, Given(scores), PAGE, sinks=0), torch.arange(12).expand(2, 2, -1), before=0)
    assert found[:, :, 7].isinf().all()
    assert found[:, :, :7].isfinite().all() and found[:, :, 8:].isfinite().all()


def test_the_press_inside_is_prepared_and_keeps_no_ratio() -> None:
    with pytest.raises(ValueError, match=r"PagePress\.press has a compression_ratio of 0\.5: leave it out"):
        PagePress(press=KnormPress(0.5))


def test_the_press_inside_scores_at_the_ratio_of_the_pages() -> None:
    """CriticalKVPress's scores depend on it."""
    seen: list[float] = []

    class Recording(Given):
        def score(self, *_: object) -> Tensor:
            seen.append(self.compression_ratio)
            return self.scores

    inside = Recording(torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(6)))
    scored(PagePress(0.75, inside, PAGE), torch.arange(12).expand(2, 2, -1), before=0)
    assert seen == [0.75]
    assert inside.compression_ratio == 0
