"""The server's figures in Prometheus' form."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the histograms."""


class ServerMetrics:
    """Counters, gauges and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "sparsekv"}
        self.served = Info("served", "Model, adapter, press and ratio", **own)
        self.replies = Counter("replies", "Replies by endpoint and status code", ["endpoint", "status"], **own)
        self.refused = Counter("refused_requests", "Requests refused because too many were under way", **own)
        self.cancelled = Counter("cancelled_requests", "Requests whose client left before the answer", **own)
        self.under_way = Gauge("requests_under_way", "Requests that run or wait", **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of documents and questions", **own)
        self.reused_tokens = Counter("reused_tokens", "Tokens of documents that were kept already", **own)
        self.completion_tokens = Counter("completion_tokens", "Tokens of answers", **own)
        self.documents = Gauge("documents", "Documents that are kept", **own)
        self.document_tokens = Gauge("document_tokens", "Tokens of the documents that are kept", **own)
        self.kept_pairs = Gauge("kept_pairs", "KV pairs a head of the documents that are kept", **own)
        self.document_bytes = Gauge("document_bytes", "Bytes of keys and values that are kept", **own)
        self.first_token = Histogram(
            "first_token_seconds", "From the turn's beginning to the first token", buckets=SECONDS, **own
        )
        self.turn = Histogram("turn_seconds", "From a turn's beginning to its end", buckets=SECONDS, **own)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
