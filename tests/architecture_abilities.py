"""What can be done with an architecture, each shown on its tiny model against the model's own computation.

An ability raises ``ValueError`` where the architecture is refused, and returns the largest differences otherwise.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kvpress import KeyDiffPress
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.received_attention import ReceivedAttention
from sparsekv_pl.evaluation.perplexity_and_kl import FullCacheReading
from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.prefill import ChunkedPrefill, continue_from
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.backbone import adapter_off, causal_lm
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.head import head_of
from sparsekv_pl.models.layer_kinds import attentions, evicted_layers
from sparsekv_pl.models.lora import Lora, inject_lora
from sparsekv_pl.models.quantisation import four_bit, keep_unpacked
from sparsekv_pl.models.supported_architectures import check_computed
from sparsekv_pl.objectives import EIT
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher
from tests.architectures import WINDOW

CONTEXT, CONTINUATION, ANSWER = WINDOW - 16, 8, 4
LONG, CHUNK, BUDGET = 2 * WINDOW, 16, 20
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "out_proj", "dense")


class Differences(NamedTuple):
    """The largest relative differences from the model's own numbers, 0 where an ability has none."""

    loss: float = 0.0
    gradients: float = 0.0


NEAR = Differences(1e-5, 1e-3)
"""Largest differences between two computations of the same numbers in float32."""


def train(model: PreTrainedModel) -> Differences:
    """Train a step: with everything kept, loss and gradients are the model's own; with half evicted they are finite."""
    check_computed(model)
    check_press(model, KeyDiffPress())
    adapted = with_adapter(model)
    student = Student(adapted, RealEviction(KeyDiffPress()), Teacher(adapted), EIT(temperature=2.0, kl_weight=0.5))
    batch = texts()
    with own_attention(model):
        expected = own_loss(adapted, batch)
        expected.backward()
    references = taken_gradients(adapted)
    loss = student.objective(student.view(batch, 0.0, 0)[0])["loss"]
    loss.backward()
    found = taken_gradients(adapted)
    assert set(found) == set(references)
    differences = Differences(relative(loss, expected), relative(joined(found), joined(references)))
    terms = student.objective(student.view(batch, 0.5, 0)[0])
    terms["loss"].backward()
    evicted = taken_gradients(adapted)
    assert set(evicted) == set(references)
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in evicted.values())
    assert relative(terms["loss"], loss) > NEAR.loss  # something was evicted
    return differences


@torch.no_grad()
def evaluate(model: PreTrainedModel) -> Differences:
    """Answer and read: with the full cache as the model itself, after an eviction with finite scores."""
    check_computed(model)
    check_press(model, KeyDiffPress())
    batch = texts()
    context, continuation = batch["context_ids"], batch["continuation_ids"]
    recorded = RecordedPrefill(model, context)
    full = recorded.evicted(None)
    hidden = continue_from(model, continuation, full.copy().cache, full.next_position)
    lengths = [CONTINUATION] * len(context)
    reading = FullCacheReading(hidden, head_of(model), continuation, lengths)
    whole = torch.cat([context, continuation], dim=1)
    with own_attention(model):
        logits = model(input_ids=whole).logits[:, CONTEXT:]
        answers = own_answers(model, whole)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), continuation[:, 1:].flatten(), reduction="sum")
    differences = Differences(relative(torch.tensor(sum(row["nll"] for row in reading.scores(hidden))), expected))
    press = KeyDiffPress(compression_ratio=0.5)
    evicted = recorded.evicted(press)
    assert kept_memory(model, evicted.cache).kept_pairs == CONTEXT // 2
    most = [ANSWER] * len(context)
    assert greedy(model, full.copy(), continuation, torch.tensor(lengths), most) == answers
    assert all(len(answer) == ANSWER for answer in greedy(model, evicted, continuation, torch.tensor(lengths), most))
    return differences


@torch.no_grad()
def long_context(model: PreTrainedModel) -> Differences:
    """Read twice a window in chunks: as the model reads it at once, and within a budget under a press."""
    check_computed(model)
    check_press(model, KeyDiffPress())
    ids = numbers(1, LONG + CONTINUATION)
    context, continuation = ids[:, :LONG], ids[:, LONG:]
    filled = ChunkedPrefill(model, None, LONG, CHUNK).run(context)
    hidden = continue_from(model, continuation, filled.cache, filled.next_position)
    with own_attention(model):
        expected = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[:, LONG:]
    filling = ChunkedPrefill(model, KeyDiffPress(compression_ratio=0.5), LONG, CHUNK, BUDGET)
    pressed = filling.run(context)
    assert kept_memory(model, pressed.cache).kept_pairs == BUDGET
    assert continue_from(model, continuation, pressed.cache, pressed.next_position).isfinite().all()
    return Differences(relative(hidden, expected))


@torch.no_grad()
def analyses(model: PreTrainedModel) -> Differences:
    """Measure the attention that keys receive, as the model's own weights have it."""
    check_computed(model)
    ids = numbers(2, CONTEXT)
    observer = ReceivedAttention(torch.zeros_like(ids), 1)
    continue_from(model, ids, DynamicCache(), 0, observer=observer)
    with own_attention(model), attention_weights(model) as weights:
        decoder_of(model)(input_ids=ids, use_cache=False)
    assert weights
    assert set(observer.layers) == set(weights) & set(evicted_layers(model.config))
    layers = observer.layers.items()
    return Differences(max(relative(measured.by_key, weights[layer].sum(2)) for layer, measured in layers))


def quantised(model: PreTrainedModel, folder: Path) -> Differences:
    """Train a step on 4-bit weights; loss and gradients are those of the quantised model itself."""
    model.save_pretrained(folder)
    settings = four_bit(model.config, torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    keep_unpacked(packed)
    assert any(type(module).__name__ == "Linear4bit" for module in packed.modules())
    return train(packed)


ABILITIES: Mapping[str, Callable[..., Differences]] = {
    "train": train,
    "evaluate": evaluate,
    "long context": long_context,
    "analyses": analyses,
    "4-bit": quantised,
}
"""Column of the page's table -> the ability."""


def with_adapter(model: PreTrainedModel) -> Any:
    """Adapt the linear layers of the attention, with factors that change what it computes."""
    modules = [name.split(".") for name, module in decoder_of(model).named_modules() if isinstance(module, nn.Linear)]
    targets = {path[-1] for path in modules if path[-1] in ATTENTION and path[-2] == "self_attn"}
    adapted = inject_lora(model, Lora(r=2, targets=tuple(sorted(targets))))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return adapted


def own_loss(adapted: Any, batch: Batch) -> Tensor:
    """Compute EIT's loss (temperature 2, weight 0.5) from the model's own logits, dense."""
    ids = torch.cat([batch["context_ids"], batch["continuation_ids"]], dim=1)
    with torch.no_grad(), adapter_off(adapted):
        teacher = causal_lm(adapted)(input_ids=ids).logits[:, CONTEXT:-1].flatten(0, 1)
    student = causal_lm(adapted)(input_ids=ids).logits[:, CONTEXT:-1].flatten(0, 1)
    labels = batch["continuation_ids"][:, 1:].flatten()
    kl = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="batchmean", log_target=True)
    return F.cross_entropy(student, labels) + 0.5 * 4 * kl


def own_answers(model: PreTrainedModel, ids: Tensor) -> list[list[int]]:
    """Decode greedily without any cache."""
    for _ in range(ANSWER):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, -ANSWER:].tolist()


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute attention as the model's authors wrote it."""
    with attention_implementation(model, "eager"):
        yield


@contextmanager
def attention_weights(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Collect each layer's attention weights (B, H, T, S) in the forward inside the block."""
    found: dict[int, Tensor] = {}

    def keep(module: Any, _: Any, output: Any) -> None:
        found[module.layer_idx] = output[1]

    hooks = [attention.register_forward_hook(keep) for attention in attentions(model).values()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def texts() -> Batch:
    """Two rows of random tokens."""
    ids = numbers(0, CONTEXT + CONTINUATION, rows=2)
    labels = ids[:, CONTEXT:]
    return Batch(
        context_ids=ids[:, :CONTEXT],
        continuation_ids=labels,
        labels=labels,
        document_ids=["a", "b"],
        tasks=["text", "text"],
    )


def numbers(seed: int, tokens: int, rows: int = 1) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by parameter, and clear them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def joined(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected number."""
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())
