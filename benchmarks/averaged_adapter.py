"""Average adapters of one base, as model soups do (https://arxiv.org/abs/2203.05482), or scale one down.

Run from the checkout: ``python benchmarks/averaged_adapter.py '[output/robust/final, output/full_cache/final]'
'[0.75, 0.25]' output/averaged``. One adapter with one weight below 1 is scaled down.

The sum of the weight changes is computed by peft and brought to the first adapter's rank by a singular value
decomposition. The training.json is the first adapter's, so the average is for measuring, not for publishing.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli

from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.training_summary import TRAINING_SUMMARY, training_summary


def average(sources: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Write to ``target`` the weighted sum of the adapters in the folders ``sources``.

    Parameters
    ----------
    sources
        Folders of exported adapters of the same base.
    weights
        One weight for each.
    target
        The folder to write; it must not exist.
    """
    if len(sources) != len(weights):
        raise ValueError(f"weights has {len(weights)} numbers for {len(sources)} sources: give one for each")
    first, *rest = sources
    model, _ = Backbone(pretrained=str(training_summary(first)["base"]), adapter=str(first)).load(trainable=False)
    others = {f"part_{place}": folder for place, folder in enumerate(rest)}  # peft takes a bare number for a layer
    for name, folder in others.items():
        model.load_adapter(str(folder), adapter_name=name)
    model.add_weighted_adapter(
        ["default", *others], list(weights), "averaged", combination_type="svd", svd_full_matrices=False
    )
    target.mkdir(parents=True)
    model.save_pretrained(str(target), selected_adapters=["averaged"])
    for file in (target / "averaged").iterdir():
        file.rename(target / file.name)
    (target / "averaged").rmdir()
    shutil.copy(first / TRAINING_SUMMARY, target)
    print(f"averaged adapter: {target}")


if __name__ == "__main__":
    auto_cli(average)
