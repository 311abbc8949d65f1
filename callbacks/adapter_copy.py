"""Copy an exported adapter for publication: small, without tokenizer, with a card of its own.

python -m callbacks.adapter_copy output/robust/final adapters/smollm2-135m-instruct
"""

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from sparsekv_pl.models.lora import SETTINGS, WEIGHTS
from sparsekv_pl.models.training_summary import TRAINING_SUMMARY
from sparsekv_pl.reporting.model_card import write_card
from sparsekv_pl.storage.json_file import read_mapping, write_mapping
from sparsekv_pl.storage.whole_files import written_whole

MOST_BYTES = 8_000_000


def copy_adapter(
    source: Path, target: Path, dtype: Literal["bfloat16", "float16"] = "bfloat16", most_bytes: int = MOST_BYTES
) -> Path:
    """Write the adapter in ``source`` to ``target``, its weights in ``dtype``, and return ``target``.

    The copy holds adapter_config.json, adapter_model.safetensors, training.json and README.md. The tokenizer is the
    base's. Its card has no results, because rounded weights have to be measured again: an evaluation of ``target`` with
    model.card=true adds them.

    Parameters
    ----------
    source
        A folder that a training run exported.
    target
        The folder to write; one that exists is replaced.
    dtype
        Dtype of the weights on disk. They are loaded into float32.
    most_bytes
        Largest size of all files together.

    Raises
    ------
    ValueError
        If ``source`` is no such folder, is from a version that named the base by a folder, does not fit ``dtype``, or
        takes more than ``most_bytes``.
    """
    source, target = source.expanduser(), target.expanduser()
    for name in (SETTINGS, WEIGHTS, TRAINING_SUMMARY):
        if not (source / name).is_file():
            raise ValueError(f"source={str(source)!r} has no {name}: give a folder that a training run exported")
    config, training = read_mapping(source / SETTINGS), read_mapping(source / TRAINING_SUMMARY)
    if Path(str(config.get("base_model_name_or_path"))).is_absolute():
        raise ValueError(
            f"{source / SETTINGS} names its base by a folder of the machine that trained: it is from an earlier "
            "version. Remove that export and resume its run with --ckpt_path last, which exports again"
        )
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(source / WEIGHTS).items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source / WEIGHTS}: {name} has numbers too large for dtype={dtype}: use bfloat16")
    with written_whole(target) as partial:
        partial.mkdir()
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        for name, content in {SETTINGS: config, TRAINING_SUMMARY: training | {"adapter_dtype": dtype}}.items():
            write_mapping(partial, name, content)
        write_card(partial)
        size = sum(file.stat().st_size for file in partial.iterdir())
        if size > most_bytes:
            raise ValueError(
                f"the copy of {source} takes {size:,} bytes, more than most_bytes={most_bytes:,}: train with a smaller "
                "lora.r or fewer lora.targets, or allow more"
            )
    return target


if __name__ == "__main__":
    from jsonargparse import auto_cli

    from sparsekv_pl.cli.command_line import run

    run(lambda: print(auto_cli(copy_adapter)))
