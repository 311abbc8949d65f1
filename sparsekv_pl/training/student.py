"""The student's and the teacher's passes over one batch, for an objective."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction import Evicted, Eviction
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import Batch, rows_of_equal_length, supervised_in, turn_ends
from sparsekv_pl.models.head import Head, head_of
from sparsekv_pl.models.layer_outputs import LayerOutput, layer_outputs
from sparsekv_pl.objectives import Objective, StudentView
from sparsekv_pl.objectives.attention_mass import AttentionMass, with_mass
from sparsekv_pl.objectives.objective import LayerRows, joined
from sparsekv_pl.presses.nesting import scorer_names
from sparsekv_pl.training.teacher import Teacher


@dataclass
class Student:
    """Run batches under eviction, and with the teacher if ``objective`` requests it."""

    model: Any
    eviction: Eviction
    teacher: Teacher
    objective: Objective

    def view(self, batch: Batch, compression_ratio: float, step: int) -> tuple[StudentView, float]:
        """Return the objective's view of ``batch``, and the share of KV pairs that was kept, a mean over rows.

        ``step`` seeds every draw. Contexts of different lengths run one after the other: see ``rows_of_equal_length``.
        """
        parts = list(rows_of_equal_length(batch))
        rows = [len(part["labels"]) for part in parts]
        views, shares = zip(*(self._view(part, compression_ratio, step) for part in parts), strict=True)
        kept = sum(share * count for share, count in zip(shares, rows, strict=True)) / sum(rows)
        return joined(views, rows), kept

    def evict(self, batch: Batch, compression_ratio: float, step: int, request: Request = NOTHING) -> Evicted:
        """Run a batch of equally long contexts with an eviction between context and continuation."""
        context, continuation = batch["context_ids"], batch["continuation_ids"]
        return self.eviction(
            self._network,
            context,
            continuation,
            compression_ratio=compression_ratio,
            step=step,
            request=request,
            turn_ends=turn_ends(batch),
        )

    def attention_mass(self, batch: Batch) -> AttentionMass:
        """Return an observer of the teacher's attention to what the student's evictions select from."""
        tokens, more = batch["context_ids"].shape[1], batch["continuation_ids"].shape[1]
        later = self.eviction.later_evictions(tokens, more, turn_ends(batch))
        return AttentionMass(supervised_in(batch), tokens, later)

    @property
    def head(self) -> Head:
        """The student's LM head."""
        return head_of(self._network)

    @property
    def _network(self) -> PreTrainedModel:
        return causal_lm(self.model)

    def _view(self, batch: Batch, compression_ratio: float, step: int) -> tuple[StudentView, float]:
        request, labels = self.objective.request, batch["labels"]
        kinds = sorted(request.layers)
        supervised = supervised_in(batch)
        rows, columns = places = supervised.places()
        mass = self.attention_mass(batch) if request.scores else None
        reads_context = request.chunks or request.first_chunk
        teacher, teacher_layers, before = None, {}, batch["context_ids"].shape[1] if reads_context else 0
        if request.teacher:
            with _layers(self.teacher.network, kinds, labels) as teacher_layers:
                teacher = self.teacher(batch["context_ids"], batch["continuation_ids"], mass, before)
        with _layers(self._network, kinds, labels) as student_layers:
            evicted = self.evict(batch, compression_ratio, step, request)
        context_teacher, teacher = (None, None) if teacher is None else (teacher[:, :before], teacher[:, before:])
        tokens = StudentView(
            hidden_NE=evicted.hidden[places],
            labels_N=labels[rows, columns + 1],
            head=self.head,
            teacher_NE=None if teacher is None else teacher[places],
            teacher_head=self.teacher.head,
        )
        view = replace(
            tokens,
            selections=[] if mass is None else with_mass(evicted.selections, mass.mass, mass.later),
            scorers=[] if mass is None else scorer_names(self.eviction.press),
            layers={kind: (_rows(student_layers[kind], places), _rows(teacher_layers[kind], places)) for kind in kinds},
            press_losses=evicted.losses,
            contexts=[] if evicted.context is None else [evicted.context],
            chunks=self._of_context(batch, evicted.chunks, context_teacher, last=True),
            first_chunk=self._of_context(batch, evicted.first_chunk, context_teacher, last=False),
            full_cache=None if evicted.full_cache is None else replace(tokens, hidden_NE=evicted.full_cache[places]),
        )
        return view, evicted.kept_share

    def _of_context(
        self, batch: Batch, hidden: Tensor | None, teacher: Tensor | None, *, last: bool
    ) -> StudentView | None:
        """View the context's last or first tokens, with hidden states (B, C, E), the teacher's being (B, L, E).

        The last of them is left out: the continuation, which may be a question, does not follow from it.
        """
        if hidden is None:
            return None
        ids, count = batch["context_ids"], hidden.shape[1]
        start = ids.shape[1] - count if last else 0
        return StudentView(
            hidden_NE=hidden[:, :-1].flatten(0, 1),
            labels_N=ids[:, start + 1 : start + count].flatten(),
            head=self.head,
            teacher_NE=None if teacher is None else teacher[:, start : start + count - 1].flatten(0, 1),
            teacher_head=self.teacher.head,
        )


@contextmanager
def _layers(
    model: PreTrainedModel, kinds: list[LayerOutput], labels_BT: Tensor
) -> Iterator[dict[LayerOutput, dict[int, Tensor]]]:
    """Collect each layer's output for the last T tokens, (B, T, E), of the forward inside the block."""
    with ExitStack() as stack:
        yield {kind: stack.enter_context(layer_outputs(model, kind, labels_BT.shape[1])) for kind in kinds}


def _rows(layers: dict[int, Tensor], places: tuple[Tensor, Tensor]) -> LayerRows:
    """Select the supervised rows (N, E) of each layer's output (B, T, E)."""
    return {layer: output[places] for layer, output in layers.items()}
