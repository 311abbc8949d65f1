"""Report of an anchor profile: numbers for JSON, and the sections of a page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.analysis.anchor_profile import AnchorProfile, recommended
from sparsekv_pl.analysis.token_types import TYPES
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.reporting.intervals import paired_bootstrap
from sparsekv_pl.reporting.page import Section, Table

Summary = dict[str, Any]

HOW_TO_READ = (
    "Attention is the share of all attention, averaged over queries, heads, layers and windows. Tokens is the share of "
    "the tokens that a query sees, averaged over queries: the share that evenly spread attention would give. Times "
    "chance is the first divided by the second; it is 1 for evenly spread attention, although early tokens are seen by "
    "more queries, and by queries with fewer keys. Per token is the share of a query's attention on one such token "
    "that it sees.",
    "Sinks are defined by position only, and all other lines leave them out: a single sink holds so much attention "
    "that its type would look important. Times chance then compares a type with all tokens that are not sinks. The "
    "columns 'with sinks' include them. Brackets hold 95 % intervals, with windows drawn with replacement.",
    "Stop words are English; symbols such as + and $ are content.",
)


def type_rows(profile: AnchorProfile, sinks: int) -> list[Summary]:
    """Rows for the first ``sinks`` positions, then for each type without them ("with_sinks": with them)."""
    first = profile.sinks(sinks)
    rows: list[Summary] = [{"type": "sinks", **asdict(profile.portion(first)), "interval": None, "with_sinks": None}]
    for name in TYPES:
        chosen = profile.types(name)
        rows.append(
            {
                "type": name,
                **asdict(profile.portion(chosen & ~first, ~first)),
                "interval": paired_bootstrap(profile.sums(chosen & ~first, ~first), _times_chance)[0],
                "with_sinks": asdict(profile.portion(chosen)),
            }
        )
    return rows


def layer_table(profile: AnchorProfile, sinks: int, layers: Sequence[int]) -> Summary:
    """Layer x (sinks, types without sinks): share of a layer's attention, and times chance (None: no such token).

    ``layers`` are the model's layers that the profile is of.
    """
    first = profile.sinks(sinks)
    columns = [first, *(profile.types(name) & ~first for name in TYPES)]
    attention = np.stack([profile.by_layer(cells) for cells in columns], axis=1)
    tokens = np.array([profile.portion(cells).tokens for cells in columns])
    with np.errstate(divide="ignore", invalid="ignore"):
        times = attention[:, 1:] / attention[:, 1:].sum(1, keepdims=True) / (tokens[1:] / tokens[1:].sum())
    return {
        "layers": list(layers),
        "columns": ["sinks", *TYPES],
        "attention": attention.tolist(),
        "times_chance": [[value if np.isfinite(value) else None for value in line] for line in times.tolist()],
    }


def anchor_summary(
    profile: AnchorProfile, sinks: int, threshold: float, recent_mass: float, layers: Sequence[int]
) -> Summary:
    """The figures of a profile for the report, JSON-able."""
    return {
        "windows": len(profile.mass),
        "types": type_rows(profile, sinks),
        "layers": layer_table(profile, sinks, layers),
        "distances": _distances(profile, sinks),
        "positions": _positions(profile),
        "heads": {
            "carrying": profile.carrying.tolist(),
            "mean": float(profile.carrying.mean()),
            "by_chance": profile.carrying_by_chance,
        },
        "rule": _rule(profile, threshold, recent_mass),
    }


def anchor_yaml(anchors: Mapping[str, Any]) -> str:
    """One line of YAML for settings of type ``sparsekv_pl.models.anchors.Anchors``, such as KVDropout's.

    >>> anchor_yaml({"sinks": 4, "recent": 64, "special": True, "punctuation": False})
    'anchors: {sinks: 4, recent: 64, special: true, punctuation: false}'
    """
    return "anchors: {" + ", ".join(f"{name}: {str(value).lower()}" for name, value in anchors.items()) + "}"


def anchor_sections(summaries: Mapping[str, Summary], sinks: int, carrying: float) -> list[Section]:
    """Sections of the report, base and trained side by side."""
    return [
        Section("Recommended anchors", paragraphs=_rule_words(summaries), tables=[_rule_table(summaries)]),
        Section("By token type", ["types.png", "layers.png"], HOW_TO_READ, [_type_table(summaries, sinks)]),
        Section("By distance from the query", ["distances.png"], tables=[_distance_table(summaries)]),
        Section(
            "By position in the text",
            ["positions.png"],
            ["Late positions are only seen by near queries: their rise at the end is an effect of recency."],
        ),
        Section("By head", ["heads.png"], [_head_words(summaries, carrying)]),
    ]


def _times_chance(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Times chance (..., 1) from ``AnchorProfile.sums`` (..., 5)."""
    mass, chance, _, mass_among, chance_among = np.moveaxis(sums, -1, 0)
    return (mass / mass_among / (chance / chance_among))[..., None]


def _distances(profile: AnchorProfile, sinks: int) -> list[Summary]:
    rest, rows = ~profile.sinks(sinks), []
    held = dict(profile.held(rest))
    for start, stop in pairwise(profile.edges):
        here = profile.recent(stop) & ~profile.recent(start) if start else profile.recent(stop)
        portions = {"all": asdict(profile.portion(here)), "without_sinks": asdict(profile.portion(here & rest, rest))}
        rows.append({"from": start, "to": stop, **portions, "held": held[stop]})
    return rows


def _positions(profile: AnchorProfile) -> list[Summary]:
    mass = profile.position_mass.mean(1).sum(0)
    chance, pairs, queries = profile.position_chance.sum(0), profile.position_pairs.sum(0), profile.chance.sum()
    return [
        {
            "from": start,
            "to": stop,
            "attention": mass[n] / queries,
            "tokens": chance[n] / queries,
            "per_token": mass[n] / pairs[n],
            "times_chance": mass[n] / chance[n],
        }
        for n, (start, stop) in enumerate(pairwise(profile.positions))
    ]


def _rule(profile: AnchorProfile, threshold: float, recent_mass: float) -> Summary:
    """Compare the recommended anchors with the default, and with sinks and recent tokens at the default's cost.

    The number of kept tokens grows differently with the query's position, so averages over queries are compared.
    """
    rule, default = recommended(profile, threshold, recent_mass), Anchors()
    cost = profile.portion(profile.kept(default)).tokens
    nearest = Anchors(rule.anchors.sinks, 0, special=False, punctuation=False)
    for edge in profile.edges[1:]:
        wider = replace(nearest, recent=edge)
        if profile.portion(profile.kept(wider)).tokens <= cost:
            nearest = wider
    sets = {"recommended": rule.anchors, "default": default, "sinks and recent at the default's cost": nearest}
    return {
        "threshold": threshold,
        "recent_mass": recent_mass,
        "anchors": asdict(rule.anchors),
        "reasons": dict(rule.reasons),
        "kept": [
            {
                "name": name,
                "anchors": asdict(anchors),
                **asdict(profile.portion(profile.kept(anchors))),
                "tokens_at_the_end": profile.tokens_kept(anchors),
            }
            for name, anchors in sets.items()
        ],
    }


def _rule_words(summaries: Mapping[str, Summary]) -> list[str]:
    words = []
    for variant, summary in summaries.items():
        rule = summary["rule"]
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rule["reasons"].items())
        words.append(f"{variant}: {anchor_yaml(rule['anchors'])}. Why: {reasons}.")
    rule = next(iter(summaries.values()))["rule"]
    words.append(
        f"The rule: sinks are the run of positions from the first on with at least {rule['threshold']:g} times chance; "
        "recent is the smallest power of two of nearest tokens, without sinks, that hold "
        f"{rule['recent_mass']:.0%} of the attention that is not on sinks; a type is an anchor if its tokens that are "
        f"neither get at least {rule['threshold']:g} times chance among all that are neither. The rule is based on "
        "attention only; scores such as perplexity, which measure what answers lose, are better evidence."
    )
    return words


def _rule_table(summaries: Mapping[str, Summary]) -> Table:
    lines = [
        [
            variant,
            f"{kept['name']}: {anchor_yaml(kept['anchors']).removeprefix('anchors: ')}",
            f"{kept['attention']:.1%}",
            f"{kept['tokens']:.1%}",
            f"{kept['tokens_at_the_end']:.0f}",
        ]
        for variant, summary in summaries.items()
        for kept in summary["rule"]["kept"]
    ]
    header = ["model", "anchors", "attention kept", "tokens kept (average over queries)", "tokens kept at a text's end"]
    return Table(header, lines, "Kept, if all else were evicted before each query")


def _type_table(summaries: Mapping[str, Summary], sinks: int) -> Table:
    lines = []
    for n, first in enumerate(next(iter(summaries.values()))["types"]):
        rows = [summary["types"][n] for summary in summaries.values()]
        with_sinks = [row["with_sinks"] or {} for row in rows]
        lines.append(
            [
                f"first {sinks} (sinks)" if first["type"] == "sinks" else first["type"],
                f"{first['tokens']:.1%}",
                _arrow(rows, "attention", ".1%"),
                _arrow(rows, "per_token", ".2e"),
                " -> ".join(_with_interval(row) for row in rows),
                _arrow(with_sinks, "attention", ".1%"),
                _arrow(with_sinks, "times_chance", ".2f"),
            ]
        )
    header = ["type", "tokens", "attention", "per token", "times chance"]
    header += ["attention, with sinks", "times chance, with sinks"]
    return Table(header, lines, " -> ".join(summaries))


def _distance_table(summaries: Mapping[str, Summary]) -> Table:
    lines = []
    for n, first in enumerate(next(iter(summaries.values()))["distances"]):
        rows = [summary["distances"][n] for summary in summaries.values()]
        without = [row["without_sinks"] for row in rows]
        lines.append(
            [
                str(first["from"]) if first["to"] - first["from"] == 1 else f"{first['from']}-{first['to'] - 1}",
                _arrow(without, "attention", ".1%"),
                _arrow(without, "per_token", ".2e"),
                _arrow(without, "times_chance", ".2f"),
                _arrow(rows, "held", ".1%"),
            ]
        )
    header = ["distance (tokens)", "attention", "per token", "times chance", "held up to here"]
    return Table(header, lines, f"{' -> '.join(summaries)}, without sinks")


def _head_words(summaries: Mapping[str, Summary], carrying: float) -> str:
    means = " -> ".join(f"{summary['heads']['mean']:.1%}" for summary in summaries.values())
    even = next(iter(summaries.values()))["heads"]["by_chance"]
    return (
        f"The share of a window's tokens that together receive {carrying:.0%} of a head's attention, averaged over "
        f"heads and layers: {means} ({' -> '.join(summaries)}). Attention spread evenly would need {even:.1%}, because "
        "early tokens are seen by more queries."
    )


def _arrow(rows: Sequence[Mapping[str, Any]], name: str, shape: str) -> str:
    """Base -> trained."""
    return " -> ".join("-" if row.get(name) is None else format(row[name], shape) for row in rows)


def _with_interval(row: Mapping[str, Any]) -> str:
    if row["times_chance"] is None:
        return "-"
    span = "" if row["interval"] is None else " ({:.2f} to {:.2f})".format(*row["interval"])
    return f"{row['times_chance']:.2f}{span}"
