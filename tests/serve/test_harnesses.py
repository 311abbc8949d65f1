"""The server under lm-evaluation-harness's API model and under our own hosted evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import KnormPress
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from sparsekv_pl.evaluation.hosted_module import prompt_of
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.evaluation.hosted_runs import MakeHosted, cases, kept
from tests.serve.conftest import RunningServer
from tests.tiny_training import MakeTrainer
from tests.usage.cache_cases import DOCUMENT, QUESTIONS

Serve = Callable[..., RunningServer]
EVICTED = ("--press", "Knorm", "--compression_ratio", "0.5")
CONTEXTS = [f"{DOCUMENT}\n\n{question}" for question in QUESTIONS]
CONTINUATIONS = [" The river", " In winter.", " It"]


def harness(server: RunningServer, kind: type, path: str, tokenizer: str | None, **settings: Any) -> Any:
    return kind(base_url=f"{server.url}{path}", model="tiny", tokenizer=tokenizer, max_length=1024, **settings)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, place) for place, given in enumerate(arguments)]


@pytest.mark.parametrize("tokens", [True, False], ids=["token ids", "text"])
def test_loglikelihoods_without_a_press_are_those_of_the_harness_itself(
    serve: Serve, tiny_models: dict[str, str], tokens: bool
) -> None:
    folder = tiny_models["qwen3"]
    api = harness(
        serve(), LocalCompletionsAPI, "/completions", folder, tokenizer_backend="huggingface", tokenized_requests=tokens
    )
    asked = requests("loglikelihood", *zip(CONTEXTS, CONTINUATIONS, strict=True))
    wanted = HFLM(pretrained=folder, dtype="float32", batch_size=1, device="cpu").loglikelihood(asked)
    found = api.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-3)


def test_loglikelihoods_are_those_after_the_eviction(
    serve: Serve, model: LoadedModel, tiny_models: dict[str, str]
) -> None:
    """And of two prompts in one request; the slow way is one token at a time, by transformers' own generate."""
    server = serve(*EVICTED)
    api = harness(
        server, LocalCompletionsAPI, "/completions", tiny_models["qwen3"], tokenizer_backend="huggingface", batch_size=2
    )
    found = api.loglikelihood(requests("loglikelihood", *((CONTEXTS[0], text) for text in CONTINUATIONS)))
    cache = ContextCache.prefill(model, model.encoder.start(DOCUMENT), KnormPress(0.5))
    full = ContextCache.prefill(model, model.encoder.start(DOCUMENT))
    for (value, greedy), text in zip(found, CONTINUATIONS, strict=True):
        question, said = model.encoder.encode(f"\n\n{QUESTIONS[0]}"), model.encoder.encode(text)
        totals, best = [], True
        for kept_cache in (cache, full):
            total = 0.0
            for place, token in enumerate(said):
                out = kept_cache.generate(
                    [*question, *said[:place]], max_new_tokens=1, output_logits=True, return_dict_in_generate=True
                )
                log_probs = out.logits[0][0].float().log_softmax(-1)
                total += float(log_probs[token])
                best = best and (kept_cache is full or int(log_probs.argmax()) == token)
            totals.append(total)
        assert value == pytest.approx(totals[0], abs=1e-3)
        assert abs(value - totals[1]) > 1e-2
        assert greedy == best


def test_generations_of_the_harness_are_those_of_a_context_cache(
    serve: Serve, model: LoadedModel, tiny_models: dict[str, str]
) -> None:
    server = serve(*EVICTED)
    until = {"until": ["never"], "max_gen_toks": 6, "do_sample": False}
    asked = requests("generate_until", *((context, until) for context in CONTEXTS))
    api = harness(server, LocalCompletionsAPI, "/completions", tiny_models["qwen3"], tokenizer_backend="huggingface")
    bare = ContextCache.prefill(model, model.encoder.start(DOCUMENT), KnormPress(0.5))
    wanted = [bare.ask(model.encoder.encode(f"\n\n{question}"), max_new_tokens=6) for question in QUESTIONS]
    assert api.generate_until(asked) == wanted
    chat = harness(server, LocalChatCompletion, "/chat/completions", None, eos_string="</s>")
    framed = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    turns = [chat.apply_chat_template([{"role": "user", "content": context}]) for context in CONTEXTS]
    asked = requests("generate_until", *((turn, until) for turn in turns))
    assert chat.generate_until(asked) == framed.ask(QUESTIONS, max_new_tokens=6)


def test_a_text_is_scored_from_its_second_token(serve: Serve, model: LoadedModel) -> None:
    reply = serve().client.completions.create(model="tiny", prompt="Rivers carry", echo=True, logprobs=2, max_tokens=0)
    scored: Any = reply.choices[0].logprobs
    ids = torch.tensor([model.encoder.start("Rivers carry")])
    with torch.no_grad():
        logits = model.model(ids).logits[0].log_softmax(-1)
    wanted = [float(logits[place, token]) for place, token in enumerate(ids[0, 1:].tolist())]
    assert scored.token_logprobs[0] is None
    assert scored.token_logprobs[1:] == pytest.approx(wanted, abs=1e-3)
    assert "".join(scored.tokens) == "Rivers carry"
    assert reply.choices[0].text == "Rivers carry"


def test_our_own_evaluation_of_hosted_models_gets_the_answers_of_a_context_cache(
    serve: Serve, model: LoadedModel, tiny_models: dict[str, str], tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    server = serve(*EVICTED)
    data = cases()
    module = MakeHosted(tiny_models["qwen3"], tmp_path)(server.url, model="tiny", concurrency=3)
    tiny_trainer().test(module, data, verbose=False)
    records = {record["question"]: record for record in kept(tmp_path)}
    assert len(records) == 4
    for batch in data.test_dataloader():
        for info in batch["cases"]:
            document, _, question = prompt_of(info).rpartition("\n\n")
            cache = ContextCache.prefill(model, document, KnormPress(0.5))
            assert records[info.question]["answer"] == cache.ask(question, max_new_tokens=info.max_new_tokens + 4)
            assert records[info.question]["prompt_tokens"] == cache.tokens + len(model.question_ids(question))
