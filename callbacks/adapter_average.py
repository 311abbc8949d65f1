"""Average exported adapters of one base, as model soups do (https://arxiv.org/abs/2203.05482).

python -m callbacks.adapter_average '[output/robust/final, output/full_cache/final]' '[0.75, 0.25]' output/averaged
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from callbacks.run_record import CHECKOUT, commit
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.lora import SETTINGS, WEIGHTS
from sparsekv_pl.models.training_summary import AVERAGED, TRAINING_SUMMARY, WEIGHT, training_summary, trainings
from sparsekv_pl.reporting.model_card import write_card
from sparsekv_pl.storage.json_file import read_mapping, write_mapping
from sparsekv_pl.storage.whole_files import written_whole

ALIKE = ("base", "base_hub_id", "base_licence", "base_weights", "dtype", "load_in_4bit", "splits")
"""Keys of training.json that an average shares with all of its parts."""


def average_adapters(
    sources: Sequence[Path], weights: Sequence[float], target: Path, pretrained: str | None = None
) -> Path:
    """Write to ``target`` the weighted sum of what the adapters in ``sources`` add to the base, and return ``target``.

    peft sums the weight changes and brings them to the highest of the adapters' ranks by a singular value
    decomposition. One source with a weight below 1 is scaled down. training.json holds those of all sources.

    Parameters
    ----------
    sources
        Folders that training runs exported, with the same base and the same split of the documents.
    weights
        One weight for each, above 0.
    target
        The folder to write; one that exists is replaced.
    pretrained
        The base; null takes the name in training.json, which is not enough for a base in a local folder.

    Raises
    ------
    ValueError
        For weights that do not belong to the sources, and for sources of different bases or splits.
    """
    if len(sources) != len(weights) or not sources or min(weights) <= 0:
        raise ValueError(f"weights is {list(weights)} for {len(sources)} sources: give one above 0 for each")
    summaries = [training_summary(source) for source in sources]
    alike = _alike(sources, summaries)
    summary = alike | {
        "presses": _union(summaries, "presses"),
        "aligned_presses": _union(summaries, "aligned_presses"),
        "command": _command(sources, weights, target),
        "commit": commit(CHECKOUT),
        AVERAGED: [{WEIGHT: weight} | one for weight, one in zip(weights, summaries, strict=True)],
    }
    folders = [source.expanduser() for source in sources]
    settings = {"base_model_name_or_path": read_mapping(folders[0] / SETTINGS)["base_model_name_or_path"]}
    with written_whole(target.expanduser()) as partial:
        _save_average(pretrained or str(alike["base"]), folders, weights, partial)
        for name, content in {SETTINGS: read_mapping(partial / SETTINGS) | settings, TRAINING_SUMMARY: summary}.items():
            write_mapping(partial, name, content)
        write_card(partial)
    return target


def _save_average(base: str, folders: Sequence[Path], weights: Sequence[float], partial: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors of the average to ``partial``."""
    model: Any = Backbone(pretrained=base, adapter=str(folders[0])).load(trainable=False)[0]
    others = {f"part_{place}": folder for place, folder in enumerate(folders[1:])}  # peft takes a number for a layer's
    for name, folder in others.items():
        model.load_adapter(str(folder), adapter_name=name)
    made = "average"
    model.add_weighted_adapter(["default", *others], list(weights), made, "svd", svd_full_matrices=False)
    model.save_pretrained(str(partial), selected_adapters=[made])
    for name in (SETTINGS, WEIGHTS):
        (partial / made / name).rename(partial / name)
    shutil.rmtree(partial / made)


def _alike(sources: Sequence[Path], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the sources share; raise ``ValueError`` where they differ."""
    first = {key: summaries[0].get(key) for key in ALIKE}
    for source, summary in zip(sources, summaries, strict=True):
        if not summary:
            raise ValueError(f"sources: {source} has no {TRAINING_SUMMARY}: give folders that training runs exported")
        for key, value in first.items():
            if summary.get(key) != value:
                raise ValueError(
                    f"sources: {source} has {key}={summary.get(key)!r} and {sources[0]} {value!r}: only adapters of "
                    "one base, trained on one split of the documents, can be averaged"
                )
    return first


def _union(summaries: Iterable[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(name for one in summaries for part in trainings(one) for name in part.get(key, [])))


def _command(sources: Sequence[Path], weights: Sequence[float], target: Path) -> str:
    def listed(values: Iterable[object]) -> str:
        return f"'[{', '.join(map(str, values))}]'"

    return f"python -m callbacks.adapter_average {listed(sources)} {listed(weights)} {target}"


if __name__ == "__main__":
    from jsonargparse import auto_cli

    from sparsekv_pl.cli.command_line import run

    run(lambda: print(auto_cli(average_adapters)))
