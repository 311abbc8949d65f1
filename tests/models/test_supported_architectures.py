"""Models whose head or attention does more than is computed here, and presses that do not fit a model, are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from kvpress import (
    AdaKVPress,
    BasePress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KVComposePress,
    LeverageScorePress,
    ObservedAttentionPress,
    SnapKVPress,
    TOVAPress,
)

from sparsekv_pl.eviction.prefill import full_cache
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.models.backbone import Backbone, check_vocabulary
from sparsekv_pl.models.head import CAPS, FACTORS, head_of
from sparsekv_pl.models.supported_architectures import check_computed
from sparsekv_pl.presses.adaptive_block_dropout import AdaptiveBlockDropoutPress
from tests.architectures import LLAMA3, YARN

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
NARROW = {"head_dim": 8}
SLIDING = {"sliding_window": 64, "sliding_window_pattern": 2}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
MADE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "yarn": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES | NARROW, rope_parameters=YARN)),
    "llama3": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES | NARROW)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=8.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES | NARROW)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES | NARROW, num_local_experts=2)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES | NARROW | SLIDING)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SIZES)),
    "phi3": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **SIZES,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            eos_token_id=1,
        )
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv", "full_attention"])
    ),
    "qwen3-next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(**SIZES | NARROW | EXPERTS, num_experts=2, shared_expert_intermediate_size=16)
    ),
}


def made(name: str) -> hf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MADE[name]().eval()
        with torch.no_grad():  # norms of 1 normalise, and hide that they are left out
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bloom", "an attention of its own"),
    ],
)
def test_what_is_not_computed_is_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        check_computed(made(name))
    assert "\n" not in str(refused.value)
    assert type(made(name)).__name__ in str(refused.value)


@pytest.mark.parametrize("name", ["qwen3", "granite", "cohere", "phi", "gemma3", "smollm3", "olmo2"])
@torch.no_grad()
def test_what_is_let_through_is_computed_as_transformers_does(name: str) -> None:
    model, ids = made(name), torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(1))
    check_computed(model)
    hidden = full_cache(model, ids[:, :16], ids[:, 16:])
    torch.testing.assert_close(head_of(model).logits(hidden), model(input_ids=ids).logits[:, 16:])


def test_every_scale_and_cap_of_transformers_is_in_the_table() -> None:
    """Its sources: whatever a causal LM does to logits, and to attention, after the products."""
    found = set()
    for source in (Path(hf.__file__).parent / "models").glob("*/modeling_*.py"):
        text = source.read_text(encoding="utf-8")
        if "ForCausalLM(" not in text:
            continue
        for line in re.findall(r"\n +logits = ([^\n]*[*/][^\n]*)", text):
            found |= {line}
        found |= set(re.findall(r"\n +(cap = self.config.\w+)", text))
        found |= set(re.findall(r"softcap=(self\.\w+)", text))
    elsewhere = ("tanh(logits / cap)", "softcap_val", "logits_mask", "temperature")  # RecurrentGemma's cap; encoders
    names = (*FACTORS, *CAPS, "attn_logit_softcapping", *elsewhere)
    unknown = [line for line in found if not any(name in line for name in names)]
    assert found
    assert not unknown


@pytest.mark.parametrize("trainable", [True, False])
def test_every_load_refuses_what_is_not_computed(
    trainable: bool, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, evaluation, analyses and lm-eval load by ``Backbone.load``."""
    monkeypatch.setattr(Backbone, "_model", lambda *_: made("bloom"))
    monkeypatch.setattr("sparsekv_pl.models.backbone.check_vocabulary", lambda *_: None)
    with pytest.raises(ValueError, match="an attention of its own"):
        Backbone(tiny_models["llama"]).load(trainable=trainable)


FITS: dict[str, list[BasePress]] = {
    "llama": [
        ExpectedAttentionPress(),
        KeyRerotationPress(SnapKVPress()),
        AdaKVPress(TOVAPress()),
        LeverageScorePress(),
    ],
    "qwen3": [ExpectedAttentionPress(), KeyRerotationPress(SnapKVPress()), TOVAPress()],
    "gemma3": [
        KeyDiffPress(),
        SnapKVPress(),
        TOVAPress(),
        ExpectedAttentionPress(),
        KeyRerotationPress(KeyDiffPress()),
    ],
    "smollm3": [KeyDiffPress()],
    "olmo2": [KeyRerotationPress(KeyDiffPress())],
    "phi3": [KeyDiffPress(), AdaptiveBlockDropoutPress()],
    "lfm2": [KeyDiffPress(), KeyRerotationPress(KeyDiffPress())],
    "qwen3-next": [KeyDiffPress()],
    "yarn": [ExpectedAttentionPress(), KeyRerotationPress(SnapKVPress()), TOVAPress()],
    "llama3": [ExpectedAttentionPress(), KeyRerotationPress(SnapKVPress()), TOVAPress()],
}
UNFIT: dict[str, list[BasePress]] = {
    "smollm3": [KeyRerotationPress(KeyDiffPress()), ExpectedAttentionPress(), AdaKVPress(SnapKVPress())],
    "olmo2": [SnapKVPress(), ExpectedAttentionPress()],
    "phi3": [SnapKVPress(), ExpectedAttentionPress(), KeyRerotationPress(KeyDiffPress())],
    "lfm2": [ExpectedAttentionPress(), SnapKVPress()],  # kvpress does not know its norm of queries
    "qwen3-next": [ExpectedAttentionPress(), KeyRerotationPress(KeyDiffPress()), SnapKVPress()],
}


@pytest.mark.parametrize("name", FITS)
def test_presses_that_see_what_the_model_computes_are_let_through(name: str) -> None:
    model = made(name)
    for press in FITS[name]:
        check_press(model, press)
        check_press(model.bfloat16(), press)


@pytest.mark.parametrize("name", UNFIT)
def test_presses_that_would_see_something_else_are_refused_by_name_at_load(name: str) -> None:
    model = made(name)
    for press in UNFIT[name]:
        with pytest.raises(ValueError, match=type(model).__name__) as refused:
            check_press(model, press)
        assert "\n" not in str(refused.value)


def test_a_press_that_reads_attention_weights_is_refused_at_load() -> None:
    model = made("llama")
    for press in (ObservedAttentionPress(), AdaKVPress(ObservedAttentionPress()), KVComposePress()):
        with pytest.raises(ValueError, match=r"(ObservedAttention|KVCompose) reads attention weights"):
            check_press(model, press)


def test_only_ids_that_text_can_produce_must_fit_the_embedding(tiny_models: dict[str, str]) -> None:
    model = hf.LlamaForCausalLM.from_pretrained(tiny_models["llama"])
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_models["llama"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})  # as text-only Gemma 3 has it
    check_vocabulary(model, tokenizer, "tiny")
    tokenizer.add_tokens(["word"])
    with pytest.raises(ValueError, match="1025"):
        check_vocabulary(model, tokenizer, "tiny")
