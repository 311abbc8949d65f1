"""The viewer in a run of measurements: which cases are viewed, and their pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.reporting.condition import FULL_CACHE, Condition
from sparsekv_pl.reporting.redaction import redacted
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.storage.records import Record
from sparsekv_pl.viewer.compact_arrays import joined
from sparsekv_pl.viewer.viewer_page import viewer_page

VIEWED_TOKENS = 10_000
"""Longest context, in tokens, that a report links a viewer of."""


def check_views(count: int) -> None:
    """Raise ``ValueError`` for fewer than 0 views."""
    if count < 0:
        raise ValueError(f"views is {count}: give a number of cases, 0 for none")


class ViewedCases:
    """Chooses the first cases of a run, spread over the depths of their batch.

    Parameters
    ----------
    count
        Most cases; 0 for none.
    most_tokens
        Contexts of more tokens are not viewed, because their pages would be large; None sets no limit.
    """

    def __init__(self, count: int, most_tokens: int | None) -> None:
        check_views(count)
        self.count, self.most_tokens = count, most_tokens
        self._chosen: dict[tuple[str, ...], list[int]] = {}

    def rows(self, batch: CaseBatch) -> list[int]:
        """The rows of ``batch`` that are viewed: the same for base and trained."""
        ids = tuple(case.id for case in batch["cases"])
        if ids not in self._chosen:
            left = self.count - sum(map(len, self._chosen.values()))
            fits = self.most_tokens is None or batch["context_ids"].shape[1] <= self.most_tokens
            rows = self._spread(batch, min(left, len(ids))) if fits else []
            if not rows:
                return []
            self._chosen[ids] = rows
        return self._chosen[ids]

    def _spread(self, batch: CaseBatch, count: int) -> list[int]:
        depths = [place / len(batch["cases"]) if c.depth is None else c.depth for place, c in enumerate(batch["cases"])]
        rows: list[int] = []
        for number in range(1, count + 1):
            free = [row for row in range(len(depths)) if row not in rows]
            rows.append(min(free, key=lambda row: abs(depths[row] - number / (count + 1))))
        return rows


def view_pages(
    records: Sequence[Record], count: int, title: str, about: Mapping[str, object]
) -> dict[str, tuple[str, bytes]]:
    """Render a page per viewed case: file name -> (label, page).

    Parameters
    ----------
    records
        All records of a run: those of ``case_views`` with their variant, and those of cases, which have the answers.
    count
        Most pages; several ranks may have viewed more cases.
    title, about
        Heading, and facts about the run below it.
    """
    views: dict[str, dict[str, Record]] = {}
    for record in records:
        if "viewed" in record:
            sides = views.setdefault(record["viewed"], {})
            sides[record["variant"]] = _together(sides.get(record["variant"]), record)
    shown = {case: views[case] for case in sorted(views)[:count] if any(view["kept"] for view in views[case].values())}
    pages = {}
    for number, (case, view) in enumerate(shown.items(), 1):
        answers = [record for record in records if record.get("case") == case]
        name = f"viewer-{number}.html" if len(shown) > 1 else "viewer.html"
        content = page_content(view, answers, title, {**about, "case": case})
        pages[name] = (case, viewer_page(content))
    return pages


def _together(view: Record | None, more: Record) -> Record:
    """Join the records of one case and variant, which may have been measured point by point."""
    if view is None:
        return more
    both = {name: {**view.get(name, {}), **more.get(name, {})} for name in ("kept", "pairs", "unknown")}
    return {**view, **more, **both, "mass": view["mass"] or more["mass"]}


def page_content(
    view: Mapping[str, Record], answers: Sequence[Record], title: str, about: Mapping[str, object]
) -> dict[str, Any]:
    """What viewer.js reads, of one case: ``view`` has its record by variant, ``answers`` its records by condition."""
    sides = [variant for variant in VARIANTS if variant in view]
    any_view, *_ = (view[side] for side in sides if view[side]["kept"])
    parts: list[str] = []
    points, full = [], {side: None for side in sides}
    missing = [
        f"{condition}, {side}, is not shown: {redacted(why)}"
        for side in sides
        for condition, why in view[side]["unknown"].items()
    ]
    for condition in dict.fromkeys(Condition.of(record) for record in answers):
        own = {record["variant"]: record for record in answers if Condition.of(record) == condition}
        if condition.press == FULL_CACHE:
            full = full | _answers(own) if condition.prefill == "dense" else full
            continue
        kept = {side: view[side]["kept"][condition.name] for side in sides if condition.name in view[side]["kept"]}
        if kept:
            name = f"{condition.press}, {condition.when}" if condition.when else condition.press
            point = {"press": name, "ratio": condition.compression_ratio, "answers": _answers(own)}
            places = {side: len(parts) + place for place, side in enumerate(kept)}
            left = [view[side].get("pairs", {}).get(condition.name) for side in kept]
            left += [record["kept_pairs"] for record in own.values() if "kept_pairs" in record]
            pairs = next((number for number in left if number is not None), None)
            points.append(point | {"kept": places, "pairs": pairs})
            parts += kept.values()
    mass = view.get("base", {}).get("mass")
    shared = {name: any_view[name] for name in ("tokens", "marked", "layers", "heads", "question", "expected")}
    return shared | {
        "numbers": any_view.get("numbers") or list(range(any_view["layers"])),
        "title": title,
        "about": [[name, str(value)] for name, value in about.items()],
        "sides": sides,
        "points": points,
        "missing": missing,
        "full": {"ratio": 0, "answers": full, "pairs": len(any_view["tokens"])},
        "sets": len(parts),
        "mass": mass is not None,
        "data": joined([*parts, *([mass] if mass else [])]),
    }


def is_right(record: Record) -> bool | None:
    """Whether a case was answered; None if no answer is expected.

    An answer whose beginning the model was given must go on with the expected one, another must contain it, if that
    was scored.
    """
    if "exact" not in record:
        return None
    return bool(record["exact" if record.get("answer_prefix") or "substring" not in record else "substring"] == 1)


def _answers(own: Mapping[str, Record]) -> dict[str, Any]:
    """Variant -> its answer and whether it is right; None where nothing was asked or the press failed."""
    return {
        variant: {"text": record["answer"], "right": is_right(record)} if "answer" in record else None
        for variant, record in own.items()
    }
