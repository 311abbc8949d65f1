"""Chats with OpenAI's own client: answers are ContextCache's, whole and streamed, and a document is read once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from kvpress import BasePress, KeyRerotationPress, KnormPress, SnapKVPress

from sparsekv_pl.serve.kept_documents import KeptDocuments
from sparsekv_pl.serve.prompts import chat_prompt
from sparsekv_pl.serve.request_fields import ChatMessage
from sparsekv_pl.serve.server_metrics import ServerMetrics
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.serve.conftest import RunningServer
from tests.usage.cache_cases import DOCUMENT, QUESTIONS, bits

Serve = Callable[..., RunningServer]
EVICTED = ("--press", "Knorm", "--compression_ratio", "0.5")
NEW = 6


def asked(document: str, question: str) -> str:
    return f"{document}\n\n{question}"


@pytest.mark.parametrize(
    ("press", "given"),
    [(None, ()), (KnormPress(0.5), EVICTED), (SnapKVPress(0.5, window_size=4), ("--press", "SnapKV(0.5, 4)"))],
    ids=["full", "Knorm", "SnapKV"],
)
def test_answers_are_those_of_a_context_cache(
    serve: Serve, model: LoadedModel, press: BasePress | None, given: tuple[str, ...]
) -> None:
    server, cache = serve(*given), ContextCache.prefill(model, DOCUMENT, press)
    for place, question in enumerate(QUESTIONS):
        reply = server.ask(asked(DOCUMENT, question))
        assert reply.choices[0].message.content == cache.ask(question, max_new_tokens=NEW)
        assert reply.usage.kept_pairs == cache.kept_pairs
        assert reply.usage.kv_bytes == cache.kv_bytes
        assert reply.usage.document_tokens == cache.tokens
        assert reply.usage.prompt_tokens == cache.tokens + len(model.question_ids(question))
        assert reply.usage.prompt_tokens_details.cached_tokens == (cache.tokens if place else 0)
    assert server.figure("sparsekv_documents") == 1
    assert server.figure("sparsekv_kept_pairs") == cache.kept_pairs
    assert server.figure("sparsekv_reused_tokens_total") == 2 * cache.tokens


def test_a_streamed_answer_is_the_whole_one_in_pieces(serve: Serve) -> None:
    server, message = serve(*EVICTED), asked(DOCUMENT, QUESTIONS[0])
    whole = server.ask(message)
    parts = list(server.ask(message, stream=True, stream_options={"include_usage": True}))
    pieces = [part.choices[0].delta.content for part in parts if part.choices and part.choices[0].delta.content]
    assert len(pieces) > 2 and "".join(pieces) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason
    assert parts[-1].usage.kept_pairs == whole.usage.kept_pairs
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert not any(part.usage for part in server.ask(message, stream=True))


def test_a_conversation_goes_on_over_one_document(serve: Serve, model: LoadedModel) -> None:
    """Only what stands before the first question is evicted, with the system's message."""
    server = serve(*EVICTED)
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [{"type": "text", "text": text} for text in (DOCUMENT, "Who carries it?\n\nWho?")]},
    ]
    for place in range(3):
        prompt = chat_prompt(model, [ChatMessage(**turn) for turn in turns])
        cache = ContextCache.prefill(model, prompt.document, KnormPress(0.5))
        reply = server.ask(turns)
        assert reply.choices[0].message.content == cache.ask(prompt.question, max_new_tokens=NEW)
        assert reply.usage.prompt_tokens_details.cached_tokens == (cache.tokens if place else 0)
        turns += [{"role": "assistant", "content": "The sea."}, {"role": "user", "content": f"{place}\n\nAnd then?"}]
    frame = [{"role": "user", "content": asked("D", "Who carries it?\n\nWho?")}, *turns[2:5]]
    rendered = model.tokenizer.apply_chat_template(frame, tokenize=False, add_generation_prompt=True)
    assert prompt.question[:10] == model.encoder.encode("\n\nWho carries it?\n\nWho?")[:10]
    assert model.tokenizer.decode(prompt.question[-10:]) in rendered


def test_a_message_without_a_document_is_answered_with_its_full_cache(serve: Serve, model: LoadedModel) -> None:
    reply = serve(*EVICTED).ask(QUESTIONS[0])
    ids = [*model.prefix_ids, *model.encoder.encode(QUESTIONS[0] + model.question_suffix)]
    out = model.model.generate(
        model.tokenizer(model.tokenizer.decode(ids), return_tensors="pt", add_special_tokens=False).input_ids,
        max_new_tokens=NEW,
        do_sample=False,
    )  # type: ignore[operator]
    assert reply.choices[0].message.content == model.text_of(out[0, len(ids) :].tolist()).strip()
    assert (reply.usage.document_tokens, reply.usage.kept_pairs, reply.usage.prompt_tokens) == (0, 0, len(ids))


def test_a_last_message_of_the_assistant_begins_the_answer(serve: Serve, model: LoadedModel) -> None:
    turns = [{"role": "user", "content": asked(DOCUMENT, "Who?")}, {"role": "assistant", "content": "It is"}]
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    wanted = cache.ask("Who?", answer_prefix="It is", max_new_tokens=NEW)
    assert serve(*EVICTED).ask(turns).choices[0].message.content == wanted


def test_a_document_shorter_than_the_presses_window_is_not_evicted(serve: Serve) -> None:
    reply = serve("--press", "SnapKV(0.5, 64)").ask("Rivers carry sand.\n\nWhat?")
    assert reply.usage.kept_pairs == reply.usage.document_tokens < 64


def test_sampling_follows_the_seed(serve: Serve) -> None:
    server, message = serve(*EVICTED), asked(DOCUMENT, QUESTIONS[1])

    def drawn(**settings: Any) -> str:
        return str(server.ask(message, **settings).choices[0].message.content)

    assert drawn(temperature=2, seed=1) == drawn(temperature=2, seed=1) != drawn(temperature=2, seed=2)
    assert drawn(temperature=2) != drawn(temperature=2)
    assert drawn(temperature=0, top_p=0.5) == drawn() != drawn(top_p=1, seed=1)
    parts = server.ask(message, temperature=2, seed=1, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == drawn(temperature=2, seed=1)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 2, "seed": 1}], ids=["greedy", "drawn"])
def test_stop_strings_and_lengths_end_answers(serve: Serve, drawn: dict[str, Any]) -> None:
    server, message = serve(*EVICTED), asked(DOCUMENT, QUESTIONS[1])
    whole = server.ask(message, max_completion_tokens=9, **drawn)
    text = whole.choices[0].message.content
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 9)
    stop = text[len(text) // 2 :][:2]
    for stops in (stop, ["never", stop]):
        cut = server.ask(message, max_completion_tokens=9, stop=stops, **drawn)
        assert cut.choices[0].message.content == text[: text.index(stop)].strip()
        assert cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens < 9


def test_the_documents_kept_are_bounded_and_the_oldest_leaves(serve: Serve, model: LoadedModel) -> None:
    size = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5)).kv_bytes
    server = serve(*EVICTED, "--kept_mib", str(2.5 * size / 2**20))
    first, second, third = (DOCUMENT.replace("sand", word) for word in ("sand", "gold", "silt"))

    def reused(document: str) -> int:
        return int(server.ask(asked(document, "Who?")).usage.prompt_tokens_details.cached_tokens)

    assert [bool(reused(one)) for one in (first, second, first, third, first, second)] == [0, 0, 1, 0, 1, 0]
    assert server.figure("sparsekv_documents") == 2
    assert 2 * size * 0.9 < server.figure("sparsekv_document_bytes") < 2.5 * size


def test_everything_that_a_document_holds_counts(model: LoadedModel) -> None:
    """Positions, and the keys as first kept of a press that re-rotates in chunks, which are no keys and values."""
    press = KeyRerotationPress(KnormPress(0.5))
    size = ContextCache.prefill(model, DOCUMENT, press, chunk_tokens=32).kv_bytes
    documents = KeptDocuments(model, press, 32, None, int(2.5 * size), ServerMetrics())
    for number in range(3):
        documents.context(model.encoder.start(f"{DOCUMENT}{number}"))
        held = [sum(map(len, bits(cache).values())) for cache in documents.kept.values()]
        assert 0 < sum(held) <= 2.5 * size
        assert all(cache.kept.held_bytes > cache.kv_bytes for cache in documents.kept.values())


def test_saved_caches_that_do_not_fit_together_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    for number in range(2):
        cache = ContextCache.prefill(model, DOCUMENT + str(number), KnormPress(0.5))
        cache.save(tmp_path / f"{number}.safetensors")
    documents = KeptDocuments(model, KnormPress(0.5), None, None, int(1.5 * cache.kept.held_bytes), ServerMetrics())
    documents.load(str(tmp_path / "0.safetensors"))
    with pytest.raises(ValueError, match=r"--document .*1\.safetensors takes [\d,]+ bytes beside [\d,]+ .*: raise it$"):
        documents.load(str(tmp_path / "1.safetensors"))


def test_a_saved_cache_is_served_without_reading(serve: Serve, model: LoadedModel, tmp_path_factory: Any) -> None:
    saved = tmp_path_factory.mktemp("saved") / "river.safetensors"
    ContextCache.prefill(model, DOCUMENT, KnormPress(0.5)).save(saved)
    reply = serve(*EVICTED, "--document", str(saved)).ask(asked(DOCUMENT, "Who?"))
    assert reply.usage.prompt_tokens_details.cached_tokens == reply.usage.document_tokens > 0


def test_models_health_and_metrics(serve: Serve) -> None:
    server = serve(*EVICTED)
    (described,) = server.client.models.list().data
    assert (described.id, described.press) == ("tiny", "Knorm 0.5")  # type: ignore[attr-defined]
    assert server.client.models.retrieve("tiny") == described
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here: take 'tiny'"):
        server.client.models.retrieve("other")
    base = server.url.removesuffix("/v1")
    get = server.client._client.get
    assert get(f"{base}/health").json() == {"status": "ok", "requests_under_way": 0}
    server.ask("What?")
    shown = get(f"{base}/metrics")
    assert shown.headers["content-type"].startswith("text/plain")
    assert 'sparsekv_replies_total{endpoint="/v1/chat/completions",status="200"}' in shown.text
    assert 'press="Knorm 0.5"' in shown.text
    assert server.figure("sparsekv_turn_seconds_count") > 0
