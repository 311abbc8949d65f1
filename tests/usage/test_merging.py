"""A document behind another has the keys that it would have, read by itself at the later positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress, KeyRerotationPress, KnormPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsekv_pl.eviction.prefill import ChunkedPrefill, continue_from
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel
from sparsekv_pl.usage.merging import check_merge
from tests.usage.cache_cases import DOCUMENT, MORE, NEW, QUESTIONS, bits, document_ids

WINDOWED = ["sliding_attention"] * 2


def test_the_second_is_as_if_read_at_the_later_positions(model: LoadedModel) -> None:
    first, second = (ContextCache.prefill(model, text, KnormPress(0.5)) for text in (DOCUMENT, MORE))
    both = first.merge(second)
    reference = DynamicCache()
    with torch.no_grad():
        continue_from(model.model, document_ids(model, MORE), reference, first.tokens)
    for layer, (keys, values, positions) in enumerate(
        zip(*map(both.kept.each, ("keys", "values", "positions")), strict=True)
    ):
        held = first.kept.each("keys")[layer].shape[2]
        assert torch.equal(keys[:, :, :held], first.kept.each("keys")[layer])
        places = (positions[:, :, held:] - first.tokens)[..., None].expand_as(keys[:, :, held:])
        whole = reference.layers[layer]
        assert whole.keys is not None and whole.values is not None
        torch.testing.assert_close(keys[:, :, held:], whole.keys.gather(2, places), rtol=0, atol=2e-5)
        torch.testing.assert_close(values[:, :, held:], whole.values.gather(2, places), rtol=0, atol=2e-5)
    assert both.tokens == both.kept.next_position == first.tokens + second.tokens
    assert both.kv_bytes == first.kv_bytes + second.kv_bytes


def test_re_rotated_documents_stand_side_by_side_and_evict_again(model: LoadedModel) -> None:
    press = KeyRerotationPress(KeyDiffPress(0.5))
    first, second = (ContextCache.prefill(model, text, press) for text in (DOCUMENT, MORE))
    both = first.merge(second)
    held = int(first.kept_pairs)
    assert both.kept.next_position == both.kept_pairs == held + second.kept_pairs
    moved = both.kept.each("keys")[0][:, :, held:]
    values = both.kept.each("values")[0][:, :, held:]
    assert torch.equal(values, second.kept.each("values")[0])
    reference = DynamicCache()  # in the first layer keys depend on tokens and positions alone
    kept = second.kept.each("positions")[0]
    for head in range(kept.shape[1]):
        ids = document_ids(model, MORE)[:, kept[0, head]]
        with torch.no_grad():
            continue_from(model.model, ids, reference := DynamicCache(), held)
        assert reference.layers[0].keys is not None
        torch.testing.assert_close(moved[:, head], reference.layers[0].keys[:, head], rtol=0, atol=2e-5)
    again = both.append(MORE)
    assert again.tokens == both.tokens + len(model.encoder.encode(MORE))
    assert again.kept_pairs == again.tokens // 2
    assert len(again.ask(QUESTIONS, max_new_tokens=NEW)) == 3


def test_a_merge_changes_neither_and_appends_as_one_document(model: LoadedModel) -> None:
    first, second = (ContextCache.prefill(model, text, KnormPress(0.5)) for text in (DOCUMENT, MORE))
    before = bits(first), bits(second)
    again = first.merge(second).append(DOCUMENT)
    assert (bits(first), bits(second)) == before
    assert again.kept_pairs == again.tokens // 2
    positions = again.kept.each("positions")[0]
    assert int(positions.max()) < again.tokens and bool((positions.diff(dim=-1) > 0).all())


def test_evicted_in_different_ways_they_can_be_asked_but_not_grown(model: LoadedModel) -> None:
    first = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    both = first.merge(ContextCache.prefill(model, MORE, KeyDiffPress(0.75)))
    assert len(both.ask(QUESTIONS, max_new_tokens=NEW)) == 3
    with pytest.raises(ValueError, match=r"merged from Knorm 0\.5 and KeyDiff 0\.75.*append before merging"):
        both.append(MORE)


def test_the_plan_and_name_of_a_merged_cache_are_those_of_both(model: LoadedModel) -> None:
    presses = [None, KnormPress(0.5), KeyDiffPress(0.75)]
    caches = [
        ContextCache.prefill(model, text, press) for text, press in zip((DOCUMENT, MORE, "Sand."), presses, strict=True)
    ]
    first, second, third = caches
    for merged in (first.merge(second).merge(third), first.merge(second.merge(third))):
        assert str(merged.origin) == "full cache and Knorm 0.5 and KeyDiff 0.75"
        assert merged.plan().kv_bytes_kept == merged.kv_bytes == sum(one.kv_bytes for one in caches)
    small = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5), budget=9)
    assert small.merge(second).plan().kv_bytes_kept == small.kv_bytes + second.kv_bytes


def test_the_order_of_merging_changes_nothing(model: LoadedModel) -> None:
    """Also where only some documents have re-rotated keys."""
    turned, plain = KeyRerotationPress(KnormPress(0.5)), KnormPress(0.5)
    for presses in ([turned, plain, turned], [plain, turned, turned], [turned, turned, plain]):
        first, second, third = (ContextCache.prefill(model, DOCUMENT, press) for press in presses)
        left, right = first.merge(second).merge(third), first.merge(second.merge(third))
        assert left.kept.next_position == right.kept.next_position
        for one, other in zip(left.kept.each("keys"), right.kept.each("keys"), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_another_model_or_adapter_is_refused_by_name(
    model: LoadedModel, tiny_backbone: Callable[..., Backbone]
) -> None:
    other = LoadedModel(tiny_backbone("llama", lora=None))
    first, second = (ContextCache.prefill(one, DOCUMENT) for one in (model, other))
    with pytest.raises(ValueError, match=r"^merge: the other cache was made by the model 'llama0' .*this is 'qwen30'"):
        first.merge(second)


def test_no_positions_for_both_are_refused(model: LoadedModel) -> None:
    long = ContextCache.prefill(model, DOCUMENT * 8, KnormPress(0.5))
    with pytest.raises(ValueError, match=r"^merge: the documents take (\d+) and \1 positions.*trained on 1024"):
        long.merge(long)


def _kept(network: PreTrainedModel) -> KeptContext:
    ids = torch.arange(20)[None] % 64
    filling = ChunkedPrefill(network, None, 20, request=Request(contexts=True))
    with torch.no_grad():
        filling.run(ids)
    return KeptContext.of(filling, ids)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "RoPE of type 'dynamic'"),
        (
            {"sliding_window": 30, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
            "window of 30",
        ),
    ],
    ids=["dynamic RoPE", "sliding window"],
)
def test_a_model_whose_keys_cannot_be_moved_is_refused_with_the_reason(
    random_model: Callable[..., Any], settings: dict[str, Any], reason: str
) -> None:
    network = random_model(**settings)
    kept = _kept(network)
    with pytest.raises(ValueError, match=f"^merge: [^\n]*{reason}[^\n]*Prefill both documents together"):
        check_merge(network, kept, kept)


class Shifted(LlamaForCausalLM):
    """A Llama whose angles belong to other pairs of numbers than ``rotate_half`` turns."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb.register_forward_hook(lambda *given: tuple(part.roll(1, -1) for part in given[2]))


def test_a_model_that_rotates_in_another_way_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    network = Shifted(config).eval()
    kept = _kept(network)
    with pytest.raises(ValueError, match=r"^merge: the keys of Shifted do not follow .* in layers 0, 1"):
        check_merge(network, kept, kept)
