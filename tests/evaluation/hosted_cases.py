"""A hosted model on loopback, and requests to it."""

from typing import Any

from sparsekv_pl.evaluation.hosted_client import HostedModel, HostedRequest
from sparsekv_pl.evaluation.hosted_reply import Answer
from sparsekv_pl.evaluation.hosted_requests import ask

KEY = "sk-test-5f3a9c1d7e2b"
AT_ONCE = {"retry_after_ms": "1"}
GEMINI_TOO_LONG = [
    {"error": {"code": 400, "message": "The input token count (1200293) exceeds the maximum number of tokens allowed"}}
]
VLLM_TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."


def hosted(base_url: str, **settings: Any) -> HostedModel:
    return HostedModel(**({"model": "m", "base_url": base_url, "key_variable": None, "retries": 2} | settings))


def requests(count: int, prompt_tokens: int = 7, max_new_tokens: int = 3) -> list[HostedRequest]:
    return [HostedRequest(f"question {index}", prompt_tokens, max_new_tokens) for index in range(count)]


def words(text: str) -> int:
    return len(text.split())


def ask_one(model: HostedModel, request: HostedRequest | None = None) -> Answer:
    (answer,) = ask(model, [request or requests(1)[0]], words)
    return answer
