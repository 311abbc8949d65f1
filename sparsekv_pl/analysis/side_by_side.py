"""One case in the terminal: its question, and the answers of base and trained under every press and ratio."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsekv_pl.evaluation.view_pages import is_right
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.storage.records import Record

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def side_by_side(records: Sequence[Record]) -> "tuple[str, Table]":
    """Return the question as a line, and a table for rich's console, from the records of one case.

    A row has the press, the share removed, the pairs and bytes kept, the answers, and the seconds of eviction and
    answer.
    """
    from rich import box
    from rich.table import Table

    variants = [variant for variant in VARIANTS if any(record["variant"] == variant for record in records)]
    asked = next((record for record in records if record.get("question")), {})
    expected = f" (expected: {', '.join(asked['answers'])})" if asked.get("answers") else ""
    head = f"{asked.get('question', '').strip()} ... {asked.get('answer_prefix', '')}".rstrip(" .") + f"{expected}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("press", "removed", "pairs", "MB", *variants, "seconds"):
        table.add_column(name, justify="right" if name in ("removed", "pairs", "MB", "seconds") else "left")
    for condition in dict.fromkeys(Condition.of(record) for record in records):
        own = {record["variant"]: record for record in records if Condition.of(record) == condition}
        left = next((record for record in own.values() if "kept_pairs" in record), {})
        seconds = [f"{one['eviction_seconds'] + one['decode_seconds']:.1f}" for one in own.values() if "answer" in one]
        table.add_row(
            condition.press + (f", {condition.when}" if condition.when else ""),
            f"{condition.compression_ratio:.0%}",
            f"{left['kept_pairs']:.0f}" if left else "-",
            f"{left['kv_bytes'] / 1e6:.1f}" if left else "-",
            *(_answer(own.get(variant, {})) for variant in variants),
            " / ".join(seconds),
        )
    full = [record for record in records if not Condition.of(record).evicts and "prefill_seconds" in record]
    prefills = " / ".join(f"{record['prefill_seconds']:.1f}" for record in full)
    table.caption = f"pairs: per layer and KV head; seconds: eviction and answer, after a prefill of {prefills}"
    return head, table


def _answer(record: Record) -> "Text":
    from rich.text import Text

    if "answer" not in record:
        return Text(str(record.get("error", "-")), "red" if "error" in record else "")
    text = " ".join(record["answer"].split()) or "(empty)"
    right = is_right(record)
    return Text(text) if right is None else Text.assemble(("✓ ", "green") if right else ("✗ ", "red"), text)
