"""Bytes of a training step on one device, counted by hand: one term per thing that is held, with its formula's numbers.

A step has three places where memory can peak: at the end of the context's pass, while losses exist, and in backward.
Each is a list of terms; what is always there comes beside them. ``benchmarks/training_plan.py`` compares the sums with
the bytes of tensors that live in a real step.
"""

from dataclasses import dataclass
from typing import NamedTuple

from kvpress import BasePress

from sparsekv_pl.objectives.losses import CHUNK_TOKENS
from sparsekv_pl.training.score_memory import READS_QUERIES, Scored, score_bytes
from sparsekv_pl.training.step_shape import SAME_INPUT, ModelShape, StepShape

TRAINED_BYTES = 16
"""Per number of an adapter, all in float32: itself, its gradient and Adam's two moments."""
GATHERED_LAYERS = 2
"""Whole layers on a device under FSDP2: the one that computes and the next."""
LOGITS = 4
"""Buffers of logits that exist at once (objectives/losses.py)."""
LIBRARIES = 768 * 2**20
"""Allowance for CUDA's context, kernels and workspaces."""
FRAGMENTS = 0.05
"""Allowance for the allocator's gaps, as a share of what a step allocates."""


class Term(NamedTuple):
    """A part of the memory."""

    name: str
    bytes: int
    formula: str


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
class StepMemory:
    """The bytes of one step: ``model`` on a device that runs ``step``."""

    model: ModelShape
    step: StepShape

    @property
    def product(self) -> int:
        """Bytes per number in matrix products."""
        return self.step.dtype.itemsize

    @property
    def stream(self) -> int:
        """Bytes per number of hidden states, keys and values: float32 over 4-bit weights, whose embeddings are."""
        return 4 if self.model.four_bit else self.product

    @property
    def normed(self) -> int:
        """Bytes per number that a norm keeps of its input: a float32 copy, except on a CPU."""
        return self.stream if self.step.on_cpu else 4

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
        context, kept = self.context(), self.kept_pairs()
        once = [] if self.step.checkpoint else context
        chunk = self.step.chunks[0][0]
        read = [*self.states(), *once, kept, self.teacher_hidden(), self.forward_transient(chunk)]
        losses = [*self.states(), *once, *self.continuation(), self.attention_mass(), self.logits(), *self.head_copy()]
        backward = [*self.states(), *context, self.attention_mass(), kept, self.backward_transient(chunk)]
        return [Phase("end of the context's pass", read), Phase("losses", losses), Phase("backward", backward)]

    def context(self) -> list[Term]:
        """Return what the context's layers keep for backward; of one chunk if it is checkpointed."""
        model, rows, chunks = self.model, self.step.rows, self.step.chunks
        running = chunks[-1:] if self.step.checkpoint else chunks
        tokens, keys = sum(chunk[0] for chunk in running), sum(chunk[1] for chunk in running)
        whole = 0 if self.step.local else model.layers - 1
        of = f"{rows} x {tokens:,} tokens x"
        terms = [
            Term(f"context: {name}", whole * rows * tokens * size, f"{whole} layers x {of} {size:,} B ({formula})")
            for name, (size, formula) in self.parts().items()
        ]
        edge, left = self.edge(), model.layers - whole
        terms.append(
            Term(
                "context: keys alone", left * rows * tokens * edge, f"{left} layers x {of} {edge:,} B (no output used)"
            )
        )
        if len(chunks) > 1 and whole:
            terms.append(self.looking_back(rows, [chunk for chunk in running if chunk[1] > chunk[0]], "context"))
        scored = sum(self.scored(press, *chunk[:2]) for press in self.step.scorers for chunk in running) * rows
        if scored:
            names = f"{len(self.step.scorers)} presses, {keys:,} keys"
            terms.append(
                Term("context: scores", model.layers * scored, f"{model.layers} layers x {scored:,} B ({names})")
            )
        return [term for term in terms if term.bytes]

    def parts(self) -> dict[str, tuple[int, str]]:
        """Return, by part of a layer, the bytes per token that it keeps for backward, with their formula."""
        model, a, s, normed = self.model, self.product, self.stream, self.normed
        hidden, queries, keys, width = model.hidden, model.queries, model.keys, model.width
        inputs = self.adapter_inputs()
        found = {
            "norms": (2 * normed * hidden, f"2 inputs of {hidden:,} x {normed} B"),
            "adapter inputs": (inputs, f"{len(model.adapted)} of rank {model.rank}, {a} B"),
            "attention": (
                a * (2 * queries + 2 * keys) + 4 * model.heads,
                f"queries, output of {queries:,} and keys, values of {keys:,} x {a} B",
            ),
            "feed-forward": (3 * s * width, f"3 tensors of {width:,} x {s} B"),
        }
        if model.normed_heads:
            found["head norms"] = normed * (queries + keys), f"{queries:,} and {keys:,} x {normed} B"
        return found

    def adapter_inputs(self, only: frozenset[str] | None = None) -> int:
        """Return the bytes per token of inputs kept for adapters (of the layers ``only``), and of their inner ranks.

        peft casts each adapter's input to float32, and autocast back: a copy per adapter. Without the casts,
        projections of one tensor share it, and the output projection's is attention's own.
        """
        adapted = [one for one in self.model.adapted if only is None or one.name in only]
        inner = self.product * self.model.rank * len(adapted)
        if not self.shares_inputs:
            return inner + self.product * sum(one.inputs for one in adapted)
        groups = {next((i for i, same in enumerate(SAME_INPUT) if one.name in same), one.name): one for one in adapted}
        return inner + self.product * sum(one.inputs for key, one in groups.items() if key != "o_proj")

    @property
    def shares_inputs(self) -> bool:
        """Whether adapters that read one tensor keep it once."""
        return self.product == self.stream and (self.step.on_cpu or self.product == 4)

    def edge(self) -> int:
        """Return the bytes per token that a layer keeps whose output nothing uses: what leads to keys, and scores."""
        model, queried = self.model, any(isinstance(press, READS_QUERIES) for press in self.step.scorers)
        names = {"k_proj", "v_proj", *(["q_proj"] if queried else [])}
        heads = model.keys + (model.queries if queried else 0)
        inputs = self.adapter_inputs(frozenset(names))
        return (
            self.normed * (model.hidden + (heads if model.normed_heads else 0)) + inputs + self.stream * 2 * model.keys
        )

    def scored(self, press: BasePress, tokens: int, keys: int) -> int:
        """Return the bytes of a press's scores in one layer of one row."""
        return score_bytes(Scored(self.model, tokens, keys, self.product, self.stream, self.normed), press)

    def looking_back(self, rows: int, chunks: list[tuple[int, int, int]], name: str) -> Term:
        """Count the pairs and the masks of ``chunks`` (tokens, keys, kept) that attend to an evicted cache.

        With a mask a GPU's kernels take keys and values repeated for every query head.
        """
        model, a = self.model, self.product
        width = model.keys if self.step.on_cpu else model.queries
        held = sum(keys * 2 * width * a + tokens * keys * a for tokens, keys, _ in chunks) * rows
        keys = sum(chunk[1] for chunk in chunks)
        formula = f"{model.layers} layers x {rows} x {keys:,} keys x 2 x {width:,} x {a} B, and masks"
        return Term(f"{name}: pairs and masks", model.layers * held, formula)

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
        """Return what the continuation's layers keep for backward."""
        model, step = self.model, self.step
        token = sum(size for size, _ in self.parts().values())
        size = model.layers * step.rows * step.continuation_tokens * token
        of = f"{model.layers} layers x {step.rows} x {step.continuation_tokens:,} tokens x {token:,} B"
        terms = []
        for name, kept in [("continuation", step.kept), *([("again", step.context_tokens)] if step.full_cache else [])]:
            chunk = step.continuation_tokens, kept + step.continuation_tokens, 0
            terms += [Term(name, size, of), self.looking_back(step.rows, [chunk], name)]
        return terms

    def attention_mass(self) -> Term:
        """Count the teacher's attention to the context, kept as the target of the selection loss."""
        keys = self.model.kv_heads * self.step.context_tokens if self.step.scores else 0
        size = self.model.layers * self.step.rows * keys * 4
        return Term("teacher's attention", size, f"{self.model.layers} layers x {self.step.rows} x {keys:,} x 4 B")

    def teacher_hidden(self) -> Term:
        """Count the teacher's hidden states, of which the continuation's are used."""
        tokens = self.step.rows * (self.step.context_tokens + self.step.continuation_tokens)
        size = tokens * self.model.hidden * self.stream if self.step.teacher else 0
        return Term("teacher's hidden states", size, f"{tokens:,} tokens x {self.model.hidden:,} x {self.stream} B")

    def logits(self) -> Term:
        """Count the logits that exist together."""
        tokens = min(CHUNK_TOKENS, self.step.rows * self.step.supervised)
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
