"""Bytes that one layer of a training step keeps for backward, by part, per token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparsekv_pl.training.score_memory import READS_QUERIES, Scored, score_bytes
from sparsekv_pl.training.step_shape import SAME_INPUT, ModelShape, StepShape


class Term(NamedTuple):
    """A part of the memory."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class LayerMemory:
    """The bytes of a layer of ``model`` on a device that runs ``step``."""

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

    def all_scored(self, chunks: Sequence[tuple[int, int, int]]) -> int:
        """Return the bytes of all presses' scores of ``chunks`` (tokens, keys, kept) in one layer of one row."""
        return sum(score_bytes(self.scoring(*chunk[:2]), press) for press in self.step.scorers for chunk in chunks)

    def scoring(self, tokens: int, keys: int) -> Scored:
        """Return what scores of so many keys, read after so many tokens, depend on."""
        return Scored(self.model, tokens, keys, self.product, self.stream, self.normed)

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
