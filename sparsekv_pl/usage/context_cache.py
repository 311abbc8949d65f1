"""``ContextCache``: a document read once, evicted, and then asked, grown, merged, saved and loaded."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kvpress import BasePress

from sparsekv_pl.eviction.limits import check_positions
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.press_model_check import check_press, check_press_alone
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.devices import layer_device
from sparsekv_pl.models.memory_planner import Plan, plan
from sparsekv_pl.models.seeding import globally_seeded
from sparsekv_pl.usage.answers import greedy_answers
from sparsekv_pl.usage.cache_file import read_cache, write_cache
from sparsekv_pl.usage.cache_origin import CacheOrigin
from sparsekv_pl.usage.generation import NEW_TOKENS, generate, padded_left
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel, check_before_loading
from sparsekv_pl.usage.merging import merged
from sparsekv_pl.usage.reading_progress import Report, reported
from sparsekv_pl.usage.usable_press import check_appendable, check_usable

Question = str | Sequence[int]
"""Text, which is put into the chat frame, or token ids that directly follow the document."""
Asked = Question | Sequence[Question]
"""One question, or several that are answered as a batch."""
POSITIONS = Request(contexts=True)


class ContextCache:
    """A document's KV cache after its eviction. Every question meets it untouched, in any number and order.

    Make one by ``prefill`` or ``load``. It never changes: ``append`` and ``merge`` return new ones. A model runs one
    forward at a time, so several threads that ask must take turns.

    Parameters
    ----------
    model, press
        See ``prefill``. A press of None for a cache that some press evicted: nothing can be appended.
    origin
        The press's settings, chunks and budget.
    kept
        The evicted context.
    """

    def __init__(self, model: LoadedModel, press: BasePress | None, origin: CacheOrigin, kept: KeptContext) -> None:
        self.model, self.press, self.origin, self.kept = model, press, origin, kept

    @classmethod
    def prefill(
        cls,
        model: LoadedModel | Backbone,
        document: str | Sequence[int],
        press: BasePress | None = None,
        *,
        chunk_tokens: int | None = None,
        budget: int | None = None,
        quantisation: PairQuantisation | None = None,
        report: Report | None = None,
    ) -> "ContextCache":
        """Read ``document`` once and evict.

        Parameters
        ----------
        model
            The model with its adapter; a ``Backbone`` is loaded, and is then the cache's ``model`` for further ones.
        document
            Text, which is put into the model's chat frame; or token ids, taken as they are.
        press
            Selects the KV pairs that stay, with its compression_ratio set; None keeps everything.
        chunk_tokens
            Most tokens of a chunk, after each of which the press evicts; None reads the document in one chunk.
        budget
            Most KV pairs per head that stay, in tokens; None: the press's ratio alone decides.
        quantisation
            Bits in which the kept pairs are stored, here and in a file; None keeps them whole.
        report
            Called with the tokens read so far and all tokens, after every layer of a chunk.

        Raises
        ------
        ValueError
            For an empty document, one that is too long, and a press that cannot make a cache to keep.
        """
        if len(document) == 0:
            raise ValueError("the document is empty: give some text")
        check_usable(press)
        check_press_alone(press)
        origin = CacheOrigin.of(press, chunk_tokens, budget, quantisation)
        model = LoadedModel(model) if isinstance(model, Backbone) else model
        check_press(model.model, press)
        if isinstance(document, str):
            ids = [*model.prefix_ids, *model.encoder.encode(document)]
        else:
            ids = model.known(document)
        read = torch.tensor([ids])
        settings = (chunk_tokens, budget, POSITIONS)
        filling = QuantisedPrefill(model.model, press, len(ids), *settings, quantisation=quantisation)
        return cls(model, press, origin, _run(model, filling, read, report))

    @classmethod
    def load(cls, path: str | Path, model: LoadedModel | Backbone, press: BasePress | None = None) -> "ContextCache":
        """Load what ``save`` wrote, for the model and adapter that made it.

        ``press`` is needed only to append, and only for a press of your own: others are made from the file.

        Raises
        ------
        ValueError
            For a file that is damaged or of another model, adapter or dtype, which is named; for another press.
        """
        path = Path(path).expanduser()
        identity, origin, kept = read_cache(path)
        press = origin.press_again(press)
        if isinstance(model, Backbone):
            check_before_loading(model, identity, str(path))
            model = LoadedModel(model)
        model.identity.check(identity, str(path))
        layers = decoder_of(model.model).layers
        tensors = {
            name: tensor.to(layer_device(layers[int(name.partition(".")[2])])) for name, tensor in kept.tensors.items()
        }
        return cls(model, press, origin, replace(kept, tensors=tensors))

    def save(self, path: str | Path) -> None:
        """Write the cache to a ``.safetensors`` file, whole or not at all, with what made it."""
        write_cache(Path(path).expanduser(), self.model.identity, self.origin, self.kept)

    def ask(
        self,
        questions: Asked,
        *,
        max_new_tokens: int = NEW_TOKENS,
        stop: str | Sequence[str] = (),
        answer_prefix: str = "",
        on_text: Callable[[str], object] | None = None,
    ) -> Any:
        """Answer one question (a string), or several as a batch (a list of strings), greedily.

        Decoding is the evaluation's: logits in float32, and each row of a batch has the answer that it gets alone.

        Parameters
        ----------
        questions
            One question, or several, as text or as token ids. Each is put behind the document, with an untouched cache.
        max_new_tokens
            Most tokens of an answer.
        stop
            One string or several that end an answer and are no part of it.
        answer_prefix
            The beginning of every answer, given to the model.
        on_text
            Called with each piece of the answer while it arrives; for one question.

        Raises
        ------
        ValueError
            For an empty question or stop string, and if an answer would end beyond the model's positions.
        """
        rows, one = self._rows(questions, answer_prefix), _is_one(questions)
        if on_text is not None and len(rows) > 1:
            raise ValueError(f"on_text shows one answer while it arrives, and {len(rows)} are asked together: ask one")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        found = greedy_answers(self.model, self.kept, rows, max_new_tokens, stop=stop, on_text=on_text)
        answers = [answer.text for answer in found]
        return answers[0] if one else answers

    def generate(self, questions: Asked, **settings: Any) -> Any:
        """Answer by transformers' own ``generate``; return its result, which begins with ``inputs(questions)``.

        ``settings`` are its settings: sampling, ``num_return_sequences``, ``num_beams``, ``streamer``,
        ``stop_strings``, ``logits_processor``, ``return_dict_in_generate`` ... Lengths and penalties count the
        questions and answers alone, not the document. Without ``eos_token_id`` and ``generation_config`` answers end
        where those of ``ask`` do.

        Raises
        ------
        ValueError
            For a setting that does not go with a kept cache (assisted decoding), and as ``ask`` does.
        """
        return generate(self.model, self.kept, self._rows(questions), settings)

    def inputs(self, questions: Asked) -> dict[str, torch.Tensor]:
        """Return the ``input_ids`` and ``attention_mask`` (B, T) of ``generate``, padded on the left."""
        ids, mask = padded_left(self._rows(questions), self.model.tokenizer.pad_token_id, self.model.device)
        return {"input_ids": ids, "attention_mask": mask}

    def append(self, text: str | Sequence[int], report: Report | None = None) -> "ContextCache":
        """Return a cache that has also read ``text``, directly behind, and evicted again from everything.

        It equals a prefill in chunks of which the last ones are ``text``: the press's ratio holds for all tokens.

        Raises
        ------
        ValueError
            For an empty text, and a press that cannot evict again.
        """
        new = self.model.encoder.encode(text) if isinstance(text, str) else self.model.known(text)
        if not new:
            raise ValueError("the text to append is empty: give some text")
        check_appendable(self.press, self.origin)
        kept, model = self.kept, self.model.model
        read = torch.cat([kept.ids, torch.tensor([new])], dim=1)
        settings = (self.origin.chunk_tokens, self.origin.budget, POSITIONS)
        given, packed = kept.bounds, kept.quantisation
        filling = QuantisedPrefill(model, self.press, read.shape[1], *settings, given=given, quantisation=packed)
        if filling.rotates:  # a merged cache may hold more than its chunks would
            start, stop = filling.bounds[len(kept.bounds)]
            check_positions(model, kept.next_position + stop - start, read.shape[1], rotates=True)
        kept.resume(filling)
        return ContextCache(self.model, self.press, self.origin, _run(self.model, filling, read, report))

    def merge(self, other: "ContextCache") -> "ContextCache":
        """Return a cache of this document followed by ``other``'s, whose keys are turned to the positions that follow.

        Neither document has read the other. ``other`` keeps its chat frame's beginning. If both were evicted by the
        same press and ratio, text can be appended.

        Raises
        ------
        ValueError
            With the reason: another model or adapter, a model whose keys cannot be turned, no positions for both.
        """
        self.model.identity.check(other.model.identity, "merge: the other cache")
        both = self.origin.re_rotated and other.origin.re_rotated
        kept = merged(self.model.model, self.kept, other.kept, both)
        return ContextCache(self.model, self.press, self.origin.merged(self.tokens, other.origin, other.tokens), kept)

    @property
    def tokens(self) -> int:
        """Tokens that were read, the chat frame's beginning included."""
        return self.kept.tokens

    @property
    def kept_pairs(self) -> float:
        """KV pairs per head that stayed, a mean over the layers in which presses evict."""
        return self.kept.kept_pairs

    @property
    def kv_bytes(self) -> int:
        """Bytes of what stayed in all layers."""
        return self.kept.kv_bytes

    def plan(self) -> Plan:
        """Return the planner's estimate for this document, from the config alone: bytes of whole pairs."""
        return plan(
            self.model.model.config,
            self.tokens,
            dtype=self.model.backbone.dtype,
            compression_ratio=self.origin.compression_ratio,
            budget=self.origin.budget,
            chunk_tokens=self.origin.chunk_tokens,
            rerotates=self.origin.re_rotated,
        )

    def _rows(self, questions: Asked, answer_prefix: str = "") -> list[list[int]]:
        asked: Any = [questions] if _is_one(questions) else questions
        if not asked:
            raise ValueError("there is no question: give at least one")
        rows = [
            self.model.question_ids(one, answer_prefix) if isinstance(one, str) else self.model.known(one)
            for one in asked
        ]
        if not all(rows):
            raise ValueError("a question is empty: give at least one token")
        return rows


def _is_one(questions: Asked) -> bool:
    return isinstance(questions, str) or (len(questions) > 0 and isinstance(questions[0], int))


def _run(model: LoadedModel, filling: ChunkedPrefill, ids: torch.Tensor, report: Report | None) -> KeptContext:
    """Run the chunks that are left of ``ids`` (1, L); a press without a seed of its own draws by their number."""
    with model.computing():
        while filling.chunks_left:
            start, stop = filling.bounds[filling.chunks_done]
            with (
                globally_seeded("context cache", start, stop),
                reported(model.model, report, start, stop, ids.shape[1]),
            ):
                filling.advance(ids[:, start:stop].to(model.device))
        return KeptContext.of(filling, ids)
