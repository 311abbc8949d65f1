"""lm-evaluation-harness's model interface on a cache from which a press has evicted.

https://github.com/EleutherAI/lm-evaluation-harness. Importing this module imports lm_eval, which takes seconds.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from kvpress import BasePress
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.evaluation.pace import ticking
from sparsekv_pl.eviction.chunking import exceed_window
from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.chat_template import DAY
from sparsekv_pl.models.head import Head, head_of
from sparsekv_pl.models.seeding import globally_seeded
from sparsekv_pl.models.stop_tokens import stop_ids
from sparsekv_pl.models.supported_architectures import check_computed
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.step_draws import row_numbers
from sparsekv_pl.presses.traits import traits_of

log = logging.getLogger(__name__)

BLOCK = 16
"""Tokens generated between two checks for a stop string."""

GREEDY = {"do_sample": (False,), "temperature": (0.0,), "num_beams": (1,), "top_p": None, "top_k": None}
"""Generation setting -> its values that greedy decoding honours; None: any, because only sampling uses it."""

Scored = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would produce it."""


@dataclass(frozen=True)
class ContextEviction:
    """The outcome of evicting from one context."""

    tokens: int
    """Tokens of the context, those held back included."""
    evicted: bool
    """False without a press, and if the context is too short for it."""
    kept_pairs: float
    """KV pairs left of those the press saw, mean over layers and KV heads."""
    freed: bool
    """False if a head-wise press masks pairs that stay in memory."""


class PressedLM(HFLM):
    """A causal LM for ``lm_eval.simple_evaluate(model=...)`` that answers from an evicted cache.

    The context is prefilled, ``press`` evicts, and the continuation is scored or generated from the remaining cache.
    Tokens, truncation from the left, chat templates and windows are those of lm_eval's HFLM. Without a press the
    results are HFLM's too, except that logits are computed in float32 and only greedy decoding is supported.

    Eviction:

    - lm_eval's context ends with the question, so the press may use it (query-aware). The last ``held_back`` tokens of
      a context run after the eviction and are never evicted. At least one is held back: the last context token predicts
      the first scored token, and must do so from the evicted cache. kvpress's own pipeline and EvaluationModule evict
      from the whole context, because a question follows it.
    - A context shorter than the press's observation window is not evicted; see ``evictions``.
    - ``loglikelihood_rolling`` reads each of HFLM's windows in pieces of ``rolling_tokens``. A piece is scored from the
      evicted cache of the window's tokens before it, the first one from a single token. Without a press the sum is
      HFLM's.
    - The batch size is 1. Equal contexts (the options of a multiple choice) share one prefill.

    Raises ``ValueError`` if ``held_back`` or ``rolling_tokens`` is below 1, or the press does not fit the model.

    Parameters
    ----------
    model
        A causal LM, or a peft model around one: its adapter is active unless it is switched off around the call.
    tokenizer
        Its tokenizer.
    press
        A press with its compression_ratio set; None keeps everything.
    chunk_tokens
        Prefill in true chunks of at most this many tokens, evicting after each; None evicts once.
    held_back
        Tokens at the end of every context that the press neither sees nor evicts.
    rolling_tokens
        Tokens scored per eviction in ``loglikelihood_rolling``.
    max_length
        Tokens of context and continuation together; None takes the model's.
    quantisation
        Bits in which a context's kept pairs are stored; None keeps them whole.

    Attributes
    ----------
    evictions
        First argument of a request (the context or document as text) -> the outcomes of its evictions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        press: BasePress | None = None,
        *,
        chunk_tokens: int | None = None,
        held_back: int = 1,
        rolling_tokens: int = 256,
        max_length: int | None = None,
        quantisation: PairQuantisation | None = None,
    ) -> None:
        for name, value in {"held_back": held_back, "rolling_tokens": rolling_tokens}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token")
        check_computed(causal_lm(model))
        check_press(causal_lm(model), press)
        with _without_advice():
            super().__init__(
                pretrained=causal_lm(model), tokenizer=tokenizer, backend="causal", batch_size=1, max_length=max_length
            )
        self.chat_template_args: dict[str, Any] = {**self.chat_template_args, "strftime_now": DAY.strftime}
        self.press, self.chunk_tokens, self.quantisation = press, chunk_tokens, quantisation
        self.window = 0 if press is None else traits_of(press).window
        self.held_back, self.rolling_tokens = held_back, rolling_tokens
        self.evictions: dict[str, list[ContextEviction]] = {}

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,  # noqa: ARG002  HFLM's signature
    ) -> list[Scored]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            groups.setdefault(tuple(self._fitting(context, len(continuation) - 1)), []).append(number)
        _report_cut(sum(len(kept) != len(requests[n][1]) for kept, numbers in groups.items() for n in numbers))
        answers: dict[int, Scored] = {}
        done = ticking("Running loglikelihood requests", "requests", len(requests), disable_tqdm)
        for shared, numbers in sorted(groups.items(), key=lambda group: -len(group[0])):
            prefilled, held, eviction = self.prefilled(shared)
            for number in numbers:
                text, _, continuation = requests[number]
                answers[number] = self._score(prefilled.copy(), held, continuation)
                self.evictions[text[0]] = [eviction]
                self.cache_hook.add_partial("loglikelihood", text, answers[number])
                done()
        return [answers[number] for number in range(len(requests))]

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each document, read in pieces (see the class)."""
        totals = []
        done = ticking("Running loglikelihood_rolling requests", "requests", len(requests), disable_tqdm)
        for (text,) in [request.args for request in requests]:
            total, self.evictions[text] = 0.0, []
            for context, piece in self._pieces(text):
                prefilled, held, eviction = self.prefilled(context)
                total += self._score(prefilled, held, piece)[0]
                self.evictions[text].append(eviction)
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            done()
        return totals

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The most likely answer to each context, cut before the first stop string.

        Raises ``ValueError`` for a task that asks for anything but greedy decoding, before the first answer.
        """
        settings = [_greedy_settings(request.args[1], self.max_gen_toks, self.max_length) for request in requests]
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        cut = [self._fitting(ids, tokens) for ids, (_, tokens) in zip(contexts, settings, strict=True)]
        _report_cut(sum(len(short) != len(ids) for short, ids in zip(cut, contexts, strict=True)))
        answers = []
        done = ticking("Running generate_until requests", "requests", len(requests), disable_tqdm)
        for request, context, (until, tokens) in zip(requests, cut, settings, strict=True):
            answers.append(self._generate(request.args[0], context, until, tokens))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
            done()
        return answers

    def _fitting(self, context: list[int], following: int) -> list[int]:
        """The end of ``context`` that leaves room for ``following`` more tokens."""
        if following >= self.max_length:
            raise ValueError(
                f"{following} tokens after the context leave no room for it: the model reads {self.max_length} "
                "(max_length); use a model with a longer context, or a task with shorter answers"
            )
        return context[following - self.max_length :]

    def _pieces(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """HFLM's windows of a document, cut into pairs (tokens of the window before a piece, piece)."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for context, tokens in map(make_disjoint_window, windows):
            for start in range(0, len(tokens), self.rolling_tokens):
                yield context + tokens[:start], tokens[start : start + self.rolling_tokens]

    def prefilled(self, context: Sequence[int]) -> tuple[Prefilled, list[int], ContextEviction]:
        """Prefill and evict a context; return the cache, the held-back tokens (not in it) and the outcome."""
        split = max(0, len(context) - self.held_back)
        seen, held = self._batch(context[:split]), list(context[split:])
        if not split:
            return Prefilled(DynamicCache(), 0, []), held, ContextEviction(len(context), False, 0.0, True)
        press = self.press if exceed_window(split, self.chunk_tokens, self.window) else None
        with globally_seeded("measured press", *row_numbers(seen), press_name(press)):  # for one without a seed
            settings = (self.model, press, split, self.chunk_tokens)
            prefilled = QuantisedPrefill(*settings, quantisation=self.quantisation).run(seen)
        left = kept_memory(self.model, prefilled.cache)
        eviction = ContextEviction(len(context), press is not None, left.kept_pairs, left.freed)
        return prefilled, held, eviction

    def _score(self, prefilled: Prefilled, held: list[int], continuation: list[int]) -> Scored:
        ids = self._batch(held + continuation[:-1])
        hidden = continue_from(self.model, ids, prefilled.cache, prefilled.next_position)[0, len(held) - 1 :]
        labels = self._batch(continuation)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            log_probs = self._head.logits(hidden.float()).log_softmax(-1)
        log_likelihood = log_probs.gather(1, labels[:, None]).sum()
        return float(log_likelihood), bool((log_probs.argmax(-1) == labels).all())

    def _generate(self, text: str, context: list[int], until: list[str], max_tokens: int) -> str:
        prefilled, newest, eviction = self.prefilled(context)
        self.evictions[text] = [eviction]
        lengths = torch.tensor([len(newest)], device=self.device)

        def enough(answer: list[int]) -> bool:
            return len(answer) % BLOCK == 0 and any(stop in self.tok_decode(answer) for stop in until)

        stops = stop_ids(self.model, self.tokenizer)
        answer = greedy(self.model, prefilled, self._batch(newest), lengths, [max_tokens], stops, enough)[0]
        return postprocess_generated_text(self.tok_decode(answer), until, None)

    @cached_property
    def _head(self) -> Head:
        """The LM head in float32: in bfloat16, logits of different options may be equal."""
        return head_of(self.model).to(torch.float32)

    def _batch(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.long, device=self.device)


def _greedy_settings(asked: Mapping[str, Any], default_tokens: int, max_length: int) -> tuple[list[str], int]:
    """(stop strings, most tokens to generate) of a task's generation_kwargs."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), default_tokens))
    until, tokens = settings.pop("until"), settings.pop("max_gen_toks")
    for name, value in settings.items():
        agreed = GREEDY.get(name, ())
        if agreed is not None and value not in agreed:
            raise ValueError(
                f"generation_kwargs {name}={value!r}: answers from an evicted cache are decoded greedily; "
                "use a task with greedy decoding, or override its generation_kwargs"
            )
    if not 0 < tokens < max_length:
        raise ValueError(f"max_gen_toks={tokens} must be at least 1 and below the model's {max_length} tokens")
    return [stop for stop in until if stop], tokens


def _report_cut(contexts: int) -> None:
    if contexts:
        log.warning("%d contexts were too long for the model and lost their beginning", contexts)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence HFLM's warning that settings for loading a model are ignored when a model is passed."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
