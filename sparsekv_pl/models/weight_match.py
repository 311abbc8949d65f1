"""Check that weights on disk belong to the model that they are loaded into."""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsekv_pl.models.training_summary import training_summary
from sparsekv_pl.storage.fingerprint import weights_digest
from sparsekv_pl.storage.given_paths import existing
from sparsekv_pl.storage.json_file import read_mapping

log = logging.getLogger(__name__)

FINGERPRINT = re.compile(r"@([0-9a-f]{12})$")
"""In the base's name in an adapter's config: the beginning of the digest of a local folder's weights."""
SHOWN = 4
"""Number of names that a message lists."""


def load_whole(source: str | Path, **settings: Any) -> PreTrainedModel:
    """Load with ``AutoModelForCausalLM.from_pretrained``; ``ValueError`` if weights are missing or unused."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **settings)
    model, found = loaded
    check_loaded(found, model)
    return model


def check_loaded(found: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if ``found``, ``from_pretrained``'s loading info, has missing or unused tensors.

    Missing tensors would be random. A text model may leave tensors of a multimodal checkpoint unused.
    """
    missing, unused = found["missing_keys"], found["unexpected_keys"]
    multimodal = model.config.get_text_config() is not model.config
    if not missing and (multimodal or not unused):
        if unused:
            log.warning("%s of the checkpoint are not part of %s", _listed(unused), type(model).__name__)
        return
    raise ValueError(
        f"its weights are not those of {type(model).__name__} with this config.json: {_listed(missing)} missing, "
        f"{_listed(unused)} unused. Fetch the files again, or give the config.json that they were saved with"
    )


def check_adapter_keys(adapter: str, missing: Collection[str], unused: Collection[str]) -> None:
    """Raise ``ValueError`` if an adapter's tensors do not match the model's."""
    if missing or unused:
        raise ValueError(
            f"adapter={adapter!r} does not fit the model: {_listed(missing)} missing in it, {_listed(unused)} without "
            "a place. It was trained on another model, or saved under other names"
        )


def check_head(model: PreTrainedModel, what: str) -> None:
    """Raise ``ValueError`` if there is a low-rank adapter on the head, as logits use the head's own weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"{what} adapts the head (lm_head), which is never computed through: logits are hidden states times the "
            "head's own weight. Adapt layers of the decoder alone"
        )


def check_base(adapter: str, pretrained: str, source: Path, files: Callable[[], Path]) -> None:
    """Raise ``ValueError`` if the adapter in this folder was trained on another base than ``pretrained``.

    Bases are compared by content if the training run recorded its base's weights, by their fingerprint in the base's
    name, or as folders; else by name.
    If one is a folder and the other a hub name, it only warns: a copy of a hub model may have any name. ``files``
    returns the base's files, ``source`` is where they were loaded from (a GGUF file is converted first).
    """
    home = Path(adapter).expanduser()
    trained_on = read_mapping(home / "adapter_config.json").get("base_model_name_or_path") or ""
    known = training_summary(home)
    name, digest = known.get("base", trained_on), known.get("base_weights")
    if digest is None and (fingerprint := FINGERPRINT.search(trained_on)):
        digest = fingerprint[1]
    folder = Path(trained_on).expanduser()
    if digest is None and trained_on and (folder / "config.json").exists():
        digest = weights_digest(folder)
    if digest is not None:
        same = any(weights_digest(place).startswith(digest) for place in {files(), source} if place.exists())
    elif not trained_on or existing(pretrained) is not None:
        if trained_on and Path(trained_on).name != Path(pretrained).name:
            log.warning("adapter %s was trained on %s: whether that is %s is unknown", adapter, name, pretrained)
        return
    else:
        same = trained_on == pretrained
    if not same:
        raise ValueError(
            f"adapter={adapter!r} was trained on {name!r}, and pretrained={pretrained!r} has other weights: give "
            "the base that it was trained on"
        )


def check_gates(gates: Path, pretrained: str, files: Callable[[], Path]) -> None:
    """Raise ``ValueError`` if the gates in this folder were trained on another model, as far as they record it."""
    known = training_summary(gates)
    if "base_weights" in known and known["base_weights"] != weights_digest(files()):
        raise ValueError(
            f"gates={str(gates)!r} were trained on {known.get('base')!r}, and pretrained={pretrained!r} has other "
            "weights: give the model that they were trained on"
        )


def check_adapts(model: nn.Module, adapter: str) -> None:
    """Raise ``ValueError`` if the adapter changes no layer that the model computes with."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError(f"adapter={adapter!r} changes no layer of the model: nothing would differ from the base")


def _listed(names: Collection[str]) -> str:
    if not names:
        return "none"
    shown, more = sorted(names)[:SHOWN], len(names) - SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
