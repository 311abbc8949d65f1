"""Bytes of a training step on one device, counted by hand: one term per thing that is held, with its formula's numbers.

A step has three places where memory can peak: at the end of the context's pass, while losses exist, and in backward.
Each is a list of terms; what is always there comes beside them. ``benchmarks/training_plan.py`` compares the sums with
the bytes of tensors that live in a real step.
"""

from dataclasses import dataclass

from kvpress import ExpectedAttentionPress

from sparsekv_pl.objectives.losses import CHUNK_TOKENS
from sparsekv_pl.presses.nesting import presses_in
from sparsekv_pl.training.layer_memory import LayerMemory, Term
from sparsekv_pl.training.score_memory import loss_bytes
from sparsekv_pl.training.step_shape import StepShape

TRAINED_BYTES = 16
"""Per number of an adapter, all in float32: itself, its gradient and Adam's two moments."""
GATHERED_LAYERS = 2
"""Whole layers on a device under FSDP2: the one that computes and the next."""
PHASES = ("end of the context's pass", "losses", "backward")
LOGITS = 4
"""Buffers of logits that exist at once (objectives/losses.py)."""
LIBRARIES = 768 * 2**20
"""Allowance for CUDA's context, kernels and workspaces."""
FRAGMENTS = 0.05
"""Allowance for the allocator's gaps, as a share of what a step allocates."""


@dataclass(frozen=True)
class Phase:
    """A moment at which memory can peak, without what is always there."""

    name: str
    terms: list[Term]

    @property
    def bytes(self) -> int:
        """Sum of the terms."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class StepMemory(LayerMemory):
    """The bytes of one step: ``model`` on a device that runs ``step``."""

    @property
    def total(self) -> int:
        """The peak, with all that is always there."""
        return sum(term.bytes for term in self.always()) + self.peak.bytes

    @property
    def peak(self) -> Phase:
        """The phase that holds most."""
        return max(self.phases(), key=lambda phase: phase.bytes)

    def always(self) -> list[Term]:
        """Return what is held during the whole step."""
        model, step = self.model, self.step
        ranks = step.devices if step.sharded else 1
        shared = f" / {ranks} devices" if ranks > 1 else ""
        kind = "4 bits with scales; the rest float32" if model.four_bit else str(step.dtype).removeprefix("torch.")
        terms = [
            Term("weights", model.weight_bytes // ranks, f"{model.parameters:,} numbers, {kind}{shared}"),
            Term(
                "adapter, gradients, optimizer",
                model.trained * TRAINED_BYTES // ranks,
                f"{model.trained:,} numbers of rank {model.rank} x {TRAINED_BYTES} B (float32, AdamW){shared}",
            ),
        ]
        if self.product < 4:
            terms.append(Term("adapter for products", model.trained * self.product, f"its numbers x {self.product} B"))
        if ranks > 1:
            ends = model.weight_bytes - model.layers * model.layer_bytes
            gathered = GATHERED_LAYERS * model.layer_bytes + ends
            formula = f"{GATHERED_LAYERS} layers x {model.layer_bytes:,} B, embeddings and head {ends:,} B"
            terms.append(Term("gathered weights", gathered, formula))
        if model.four_bit:
            whole = model.largest_weight * self.product
            terms.append(Term("one unpacked weight", whole, f"{model.largest_weight:,} numbers x {self.product} B"))
        return terms

    def phases(self) -> list[Phase]:
        """Return the three moments."""
        if self.step.dropout:
            return self._dropped()
        context, kept = self.context(), self.kept_pairs()
        once = [] if self.step.checkpoint else context
        chunk = self.step.chunks[0][0]
        after = [*self.continuation(), *self.layer_outputs(), self.attention_mass()]
        evicted = self.continuation() if self.step.evicted_after else []
        always, layers = [*self.states(), *evicted, self.teacher_hidden()], self.model.layers
        first = [Term(term.name, term.bytes // layers, f"first layer, of {term.formula}") for term in (*once, kept)]
        read = max(
            [*always, *once, kept, self.forward_transient(chunk)],
            [*always, *first, *self.rotations()],
            key=lambda terms: sum(term.bytes for term in terms),
        )
        losses = [*self.states(), *once, *after, *self.first_chunk(), self.logits(), *self.head_copy()]
        backward = [*self.states(), *context, self.attention_mass(), kept, self.backward_transient(chunk)]
        return [Phase(name, terms) for name, terms in zip(PHASES, (read, losses, backward), strict=True)]

    def _dropped(self) -> list[Phase]:
        """Return the moments of a step without a press, in which context and continuation are one pass."""
        model, rows, step = self.model, self.step.rows, self.step
        tokens, parts = step.context_tokens + step.continuation_tokens, self.parts()
        token = sum(size for size, _ in parts.values())
        whole = 1 if step.checkpoint else model.layers
        of = f"{rows} x {tokens:,} tokens x"
        held = Term("pass", whole * rows * tokens * token, f"{whole} layers x {of} {token:,} B")
        inputs = self.stream * model.hidden if step.checkpoint else 0
        between = Term("layers' inputs", model.layers * rows * tokens * inputs, f"{model.layers} x {of} {inputs:,} B")
        always, hidden = [between, *([] if step.checkpoint else [held])], self.teacher_hidden()
        read = [*always, hidden, self.forward_transient(tokens)]
        losses = [*always, *self.layer_outputs(), self.logits(), *self.head_copy()]
        freed = Term("feed-forward, freed", -rows * tokens * parts["feed-forward"][0], "of the layer in backward")
        backward = [between, held, freed, self.backward_transient(tokens)]
        return [Phase(name, terms) for name, terms in zip(PHASES, (read, losses, backward), strict=True)]

    def context(self) -> list[Term]:
        """Return what the context's layers keep for backward; of one chunk if it is checkpointed."""
        model, rows, chunks = self.model, self.step.rows, self.step.chunks
        running = chunks[-1:] if self.step.checkpoint else chunks
        tokens, keys = sum(chunk[0] for chunk in running), sum(chunk[1] for chunk in running)
        whole = 0 if self.step.local else model.layers - 1
        held = self.step.held_tokens if running[0] == chunks[0] else 0  # in the last layer too
        used, of = whole * tokens + held, f"{rows} x"
        terms = [
            Term(f"context: {name}", rows * used * size, f"{of} {used:,} tokens of all layers x {size:,} B ({formula})")
            for name, (size, formula) in self.parts().items()
        ]
        edge, left = self.edge(), model.layers * tokens - used
        of = f"{of} {left:,} tokens of all layers x {edge:,} B (no output used)"
        terms.append(Term("context: keys alone", rows * left * edge, of))
        if len(chunks) > 1 and whole:
            terms.append(self.looking_back(rows, [chunk for chunk in running if chunk[1] > chunk[0]], "context"))
        scored = self.all_scored(running) * rows
        if scored:
            names = f"{len(self.step.scorers)} presses, {keys:,} keys"
            terms.append(
                Term("context: scores", model.layers * scored, f"{model.layers} layers x {scored:,} B ({names})")
            )
        lost = (
            sum(loss_bytes(self.scoring(*chunk[:2]), press) for press in self.step.losing for chunk in running) * rows
        )
        terms.append(Term("context: press losses", model.layers * lost, f"{model.layers} layers x {lost:,} B"))
        return [term for term in terms if term.bytes]

    def states(self) -> list[Term]:
        """Return the caches that checkpoints keep, the input of every chunk after the first."""
        if not self.step.checkpoint:
            return []
        pairs = sum(chunk[2] for chunk in self.step.chunks)
        pair = self.model.layers * (self.stream * 2 * self.model.keys + 8 * self.model.kv_heads)
        formula = f"{len(self.step.chunks)} chunks, {pairs:,} pairs x {pair:,} B of all layers, with positions"
        return [Term("caches between chunks", self.step.rows * pairs * pair, formula)]

    def kept_pairs(self) -> Term:
        """Count the evicted cache, and in backward its gradient."""
        pair = self.model.layers * self.stream * 2 * self.model.keys
        size = self.step.rows * self.step.kept * pair
        return Term("kept pairs", size, f"{self.step.rows} x {self.step.kept:,} pairs x {pair:,} B of all layers")

    def continuation(self) -> list[Term]:
        """Return what the continuation's layers keep for backward, and those of what is read beside it."""
        model, step = self.model, self.step
        token = sum(size for size, _ in self.parts().values())
        readings = {"continuation": step.pieces}
        if step.full_cache:
            tokens = step.continuation_tokens
            readings["again, full cache"] = [(tokens, step.context_tokens + tokens, 0)]
        if step.read_again:
            readings["evicted text"] = [(step.read_again, step.kept + step.read_again, 0)]
        terms = []
        for name, pieces in readings.items():
            tokens = step.rows * sum(piece[0] for piece in pieces)
            of = f"{model.layers} layers x {tokens:,} tokens x {token:,} B"
            terms += [Term(name, model.layers * tokens * token, of), self.looking_back(step.rows, pieces, name)]
        scored = self.all_scored(step.pieces[:-1])
        size, of = model.layers * step.rows * scored, f"{model.layers} layers x {step.rows} x {scored:,} B"
        return [*terms, Term("continuation: scores", size, of)] if scored else terms

    def layer_outputs(self) -> list[Term]:
        """Return what comparing layers with the teacher's keeps: both outputs, their supervised rows, a difference."""
        model, step = self.model, self.step
        size = 4 * self.stream * step.continuation_tokens + 4 * step.supervised
        formula = f"{model.layers} layers x {step.rows} x {size:,} x {model.hidden:,} B"
        whole = step.compared_layers * model.layers * step.rows * size * model.hidden
        return [Term("layer outputs", whole, formula)] if whole else []

    def attention_mass(self) -> Term:
        """Count the teacher's attention to the context, kept as the target of the selection loss."""
        ends = self.step.evicted_after
        last = ends[-1] if ends else self.step.context_tokens
        keys = self.model.kv_heads * last * (1 + len(ends)) if self.step.scores else 0
        size = self.model.layers * self.step.rows * keys * 4
        return Term("teacher's attention", size, f"{self.model.layers} layers x {self.step.rows} x {keys:,} x 4 B")

    def teacher_hidden(self) -> Term:
        """Count the teacher's hidden states, of which the continuation's are used."""
        tokens = self.step.rows * (self.step.context_tokens + self.step.continuation_tokens)
        size = tokens * self.model.hidden * self.stream if self.step.teacher else 0
        return Term("teacher's hidden states", size, f"{tokens:,} tokens x {self.model.hidden:,} x {self.stream} B")

    def first_chunk(self) -> list[Term]:
        """Return what the loss over the first chunk keeps: the student's and the teacher's rows, and a gradient."""
        tokens, each = self.step.rows * self.step.held_tokens, self.model.hidden * (4 * self.stream + 4)
        formula = f"{tokens:,} tokens x {self.model.hidden:,} x (4 x {self.stream} + 4) B"
        return [Term("first chunk's hidden states", tokens * each, formula)] if tokens else []

    def logits(self) -> Term:
        """Count the logits that exist together."""
        tokens = min(CHUNK_TOKENS, self.step.rows * max(self.step.supervised, self.step.held_tokens))
        count = LOGITS + self.model.capped
        formula = f"{count} x {tokens:,} tokens x {self.model.vocabulary:,} x 4 B"
        return Term("logits", count * tokens * self.model.vocabulary * 4, formula)

    def head_copy(self) -> list[Term]:
        """Return the head's copy for products, where it is float32."""
        if self.stream == self.product:
            return []
        size = self.model.vocabulary * self.model.hidden * self.product
        return [
            Term("head for products", size, f"{self.model.vocabulary:,} x {self.model.hidden:,} x {self.product} B")
        ]

    def rotations(self) -> list[Term]:
        """Return what ExpectedAttention makes in the first layer: a matrix for each position that it looks ahead."""
        presses = [] if self.step.press is None else presses_in(self.step.press)
        ahead = max((one.n_future_positions for one in presses if isinstance(one, ExpectedAttentionPress)), default=0)
        dim = self.model.head_dim
        return [Term("rotations ahead", 4 * ahead * dim**2, f"{ahead} positions x {dim}^2 x 4 B")] if ahead else []

    def forward_transient(self, chunk: int) -> Term:
        """Count what one layer's forward holds for a moment: attention, norms, residuals.

        The last layer has no feed-forward part over the context; where layers keep nothing, an earlier one holds most,
        and with local gradients the one before it, whose output is its input, too.
        """
        model, rows, parts = self.model, self.step.rows, self.parts()
        if not (self.step.local or self.step.checkpoint):
            del parts["feed-forward"]
        layer = max(0, sum(size for size, _ in parts.values()) - self.edge()) * (1 + self.step.local)
        token = model.hidden * (8 + 3 * self.stream) + layer
        return Term("one layer's forward", rows * chunk * token, f"{rows} x {chunk:,} tokens x {token:,} B")

    def backward_transient(self, chunk: int) -> Term:
        """Count one layer's gradients: four tensors of the feed-forward width, and float32 norms."""
        model, rows = self.model, self.step.rows
        token = 0 if self.step.local else 4 * self.stream * model.width + 16 * model.hidden
        return Term("one layer's backward", rows * chunk * token, f"{rows} x {chunk:,} tokens x {token:,} B")


def allowances(step: StepShape, allocated: int) -> list[Term]:
    """Return allowances beside tensors, for a step that allocates so many bytes."""
    if step.on_cpu:
        return []
    gaps = Term("gaps of the allocator", int(FRAGMENTS * allocated), f"{FRAGMENTS:.0%} of a step's own tensors")
    return [Term("CUDA's context and kernels", LIBRARIES, "allowance"), gaps]
