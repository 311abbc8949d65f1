"""Answers from an evicted cache through lm_eval's model interface: HFLM's without a press, the reference's with one."""

import logging
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, BasePress, KeyRerotationPress, KnormPress, RandomPress, SnapKVPress, StreamingLLMPress
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from sparsekv_pl.evaluation.lm_eval_model import PressedLM
from tests.evaluation.lm_eval_cases import TEXT, adapted, hflm
from tests.tiny_training import MakeBackbone

CONTEXT = TEXT * 2 + "Question: what is a class definition? Answer:"


@pytest.fixture(scope="module")
def tiny(tiny_backbone: MakeBackbone) -> tuple[Any, Any]:
    return adapted(tiny_backbone())


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]  # type: ignore[arg-type]


OPTIONS = asked(
    "loglikelihood",
    (CONTEXT, " an executable statement"),
    (CONTEXT, " a tuple"),
    (TEXT, " It is"),
    ("", "A tuple"),
    ("A space ", "follows"),
)


def loglikelihoods(lm: HFLM, requests: list[Instance]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests, disable_tqdm=True)


def most_likely_words(tiny: tuple[Any, Any], context: str, tokens: int = 3) -> str:
    ids = torch.tensor([tiny[1].encode(context)])
    said = tiny[0].generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    return tiny[1].decode(said[0, ids.shape[1] :])


@pytest.mark.parametrize("max_length", [None, 48])
def test_without_a_press_loglikelihoods_are_hflms(tiny: tuple[Any, Any], max_length: int | None) -> None:
    likely = (TEXT.rstrip(), most_likely_words(tiny, TEXT.rstrip()))
    requests = OPTIONS if max_length else [*OPTIONS, *asked("loglikelihood", likely)]
    expected = loglikelihoods(hflm(tiny, max_length=max_length), requests)
    found = loglikelihoods(PressedLM(*tiny, max_length=max_length), requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [said for _, said in found] == [said for _, said in expected]
    assert max_length or found[-1][1]


def test_scaled_logits_score_as_in_hflm(tiny: tuple[Any, Any]) -> None:
    words = tiny[0].config.vocab_size
    config = GraniteConfig(
        vocab_size=words, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, logits_scaling=8.0
    )
    model = GraniteForCausalLM(config).eval()
    expected = loglikelihoods(HFLM(pretrained=model, tokenizer=tiny[1]), OPTIONS)
    found = loglikelihoods(PressedLM(model, tiny[1]), OPTIONS)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_a_context_that_is_cut_is_reported(tiny: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loglikelihoods(PressedLM(*tiny, max_length=48), OPTIONS)
    assert "3 contexts were too long" in caplog.text


@pytest.mark.parametrize("rolling_tokens", [7, 256])
def test_without_a_press_documents_score_as_in_hflm(tiny: tuple[Any, Any], rolling_tokens: int) -> None:
    requests = asked("loglikelihood_rolling", (TEXT,), ("A tuple.",))
    expected = hflm(tiny, max_length=40).loglikelihood_rolling(requests, disable_tqdm=True)
    pressed = PressedLM(*tiny, rolling_tokens=rolling_tokens, max_length=40)
    assert pressed.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("until", [["\n\n"], ["e"], "t"])
def test_without_a_press_answers_are_hflms(tiny: tuple[Any, Any], until: list[str] | str) -> None:
    requests = asked("generate_until", (CONTEXT, {"until": until, "max_gen_toks": 20}), (TEXT, {"until": until}))
    expected = hflm(tiny).generate_until(requests, disable_tqdm=True)
    assert PressedLM(*tiny).generate_until(requests, disable_tqdm=True) == expected
    assert any(expected)


def evicted_reference(tiny: tuple[Any, Any], press: BasePress, context: Tensor, following: Tensor) -> Tensor:
    """(T, V) logits after each of the tokens that follow, from kvpress's own prefill and the stock attention."""
    from transformers import DynamicCache

    model, cache = tiny[0].get_base_model(), DynamicCache()
    with torch.no_grad():
        with press(model):
            model(input_ids=context[None], past_key_values=cache)
        logits = []
        for step, token in enumerate(following):  # one at a time: the stock causal mask needs no alignment then
            position = torch.tensor([[len(context) + step]])
            output = model(input_ids=token.view(1, 1), past_key_values=cache, position_ids=position)
            logits.append(output.logits[0, -1])
    return torch.stack(logits)


PRESSES = [KnormPress(0.5), SnapKVPress(0.6, window_size=16), StreamingLLMPress(0.7), AdaKVPress(KnormPress(0.5))]


@pytest.mark.parametrize("held_back", [1, 12])
@pytest.mark.parametrize("press", PRESSES, ids=lambda press: type(press).__name__)
def test_options_are_scored_from_the_evicted_cache(tiny: tuple[Any, Any], press: BasePress, held_back: int) -> None:
    lm = PressedLM(*tiny, press, held_back=held_back)
    found = loglikelihoods(lm, OPTIONS[:2])
    for (value, _), request in zip(found, OPTIONS[:2], strict=True):
        context, option = (torch.tensor(tiny[1].encode(text)) for text in request.args)
        seen, held = context[:-held_back], context[-held_back:]
        logits = evicted_reference(tiny, press, seen, torch.cat([held, option[:-1]]))[held_back - 1 :]
        expected = logits.log_softmax(-1).gather(1, option[:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-3)
    [eviction] = lm.evictions[CONTEXT]
    assert eviction.evicted and eviction.tokens == len(context)
    assert eviction.kept_pairs == pytest.approx(int(len(seen) * (1 - press.compression_ratio)), abs=1)
    assert eviction.freed == (not isinstance(press, AdaKVPress))
    assert [v for v, _ in found] != pytest.approx(
        [v for v, _ in loglikelihoods(PressedLM(*tiny), OPTIONS[:2])], abs=0.1
    )


def test_an_answer_is_generated_from_the_evicted_cache(tiny: tuple[Any, Any]) -> None:
    press, tokens = KnormPress(0.5), 20
    requests = asked("generate_until", (CONTEXT, {"until": ["\n\n\n"], "max_gen_toks": tokens}))
    [said] = PressedLM(*tiny, press).generate_until(requests, disable_tqdm=True)
    ids, answer = torch.tensor(tiny[1].encode(CONTEXT)), []
    newest = ids[-1:]
    for _ in range(tokens):
        newest = evicted_reference(tiny, press, ids[:-1], torch.cat([ids[-1:], *answer]))[-1].argmax().view(1)
        answer.append(newest)
    assert said == tiny[1].decode(torch.cat(answer), skip_special_tokens=True)
    assert [said] != PressedLM(*tiny).generate_until(requests, disable_tqdm=True)


def test_a_document_is_read_in_pieces_from_evicted_caches(tiny: tuple[Any, Any]) -> None:
    press, lm_of = KnormPress(0.5), lambda press: PressedLM(*tiny, press, rolling_tokens=16)
    lm = lm_of(press)
    [value] = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)), disable_tqdm=True)
    ids, expected = torch.tensor([tiny[1].bos_token_id, *tiny[1].encode(TEXT)]), 0.0
    for start in range(1, len(ids), 16):
        piece = ids[start : start + 16]
        following = torch.cat([ids[start - 1 : start], piece[:-1]])
        if start == 1:  # nothing before the one held back
            logits = tiny[0](input_ids=following[None]).logits[0].detach()
        else:
            logits = evicted_reference(tiny, press, ids[: start - 1], following)
        expected += float(logits.log_softmax(-1).gather(1, piece[:, None]).sum())
    assert value == pytest.approx(expected, abs=1e-3)
    assert [e.evicted for e in lm.evictions[TEXT]] == [False] + [True] * (len(lm.evictions[TEXT]) - 1)


def test_rerotated_keys_are_continued_from_where_they_end(tiny: tuple[Any, Any]) -> None:
    """With StreamingLLM, the kept text at new positions is the kept text read alone, but for what deeper layers saw."""
    turned = PressedLM(*tiny, KeyRerotationPress(StreamingLLMPress(0.5)))
    plain = PressedLM(*tiny, StreamingLLMPress(0.5))
    assert loglikelihoods(turned, OPTIONS[:1]) != loglikelihoods(plain, OPTIONS[:1])
    assert turned.prefilled(list(range(2, 43)))[0].next_position == 20
    assert plain.prefilled(list(range(2, 43)))[0].next_position == 40


def test_a_press_without_a_seed_draws_the_same_for_the_same_context(tiny: tuple[Any, Any]) -> None:
    first, again, other = (
        PressedLM(*tiny, press=RandomPress(0.5)).prefilled(list(range(start, start + 40)))[0].cache.layers[0].keys
        for start in (2, 2, 3)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_context_too_short_for_the_press_is_not_evicted_and_says_so(tiny: tuple[Any, Any]) -> None:
    lm = PressedLM(*tiny, SnapKVPress(0.5, window_size=30))
    found = loglikelihoods(lm, [*OPTIONS[:2], *OPTIONS[3:]])
    assert {text: [e.evicted for e in evictions] for text, evictions in lm.evictions.items()} == {
        CONTEXT: [True],
        "": [False],
        "A space ": [False],
    }
    assert found[2:] == loglikelihoods(PressedLM(*tiny), OPTIONS[3:])


def test_options_of_one_context_share_one_prefill(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lm, lengths = PressedLM(*tiny, KnormPress(0.5)), []
    forward = lm.model.get_decoder().forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model.get_decoder(), "forward", counted)
    loglikelihoods(lm, OPTIONS[:2])
    assert sum(length > 50 for length in lengths) == 1 and len(lengths) == 3


def test_a_chat_is_framed_as_the_tokenizer_says(tiny: tuple[Any, Any]) -> None:
    lm, reference = PressedLM(*tiny), hflm(tiny)
    history = [{"role": "user", "content": "What is a tuple?"}]
    assert lm.apply_chat_template(history) == reference.apply_chat_template(history)
    assert lm.tokenizer_name == reference.tokenizer_name
    assert lm.chat_template(True) == tiny[1].chat_template


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample=True"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"max_gen_toks": 5000}, "max_gen_toks=5000"),
    ],
)
def test_what_greedy_decoding_cannot_do_is_refused(tiny: tuple[Any, Any], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PressedLM(*tiny).generate_until(asked("generate_until", (TEXT, settings)), disable_tqdm=True)


@pytest.mark.parametrize("name", ["held_back", "rolling_tokens"])
def test_a_setting_below_one_token_is_refused(tiny: tuple[Any, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        PressedLM(*tiny, **{name: 0})
