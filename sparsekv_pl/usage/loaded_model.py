"""A model in use: weights, tokenizer, chat frame, and the identity by which its caches are recognised."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.chat_frame import QUESTION_OPENING, chat_frame
from sparsekv_pl.models.encoding import Encoder
from sparsekv_pl.models.gguf_checkpoint import EMBEDDED
from sparsekv_pl.models.layer_kinds import attentions
from sparsekv_pl.models.native_precision import AUTO, decide
from sparsekv_pl.models.stop_tokens import stop_ids
from sparsekv_pl.storage.fingerprint import folder_digest, model_digest
from sparsekv_pl.storage.given_paths import existing

SHOWN = 12
"""Characters of a digest that messages show."""


@dataclass(frozen=True)
class ModelIdentity:
    """What decides the numbers in a cache, besides the tokens and the press. Digests count, names are for messages."""

    model: str
    weights: str
    """Digest of the base model's files."""
    dtype: str
    load_in_4bit: bool
    adapter: str | None
    adapter_weights: str | None
    """Digest of the adapter's weights and settings; None without an adapter."""

    @classmethod
    def of(cls, backbone: Backbone) -> "ModelIdentity":
        """Identify a backbone of known dtype; paths are reduced to their last folders, as a file may be passed on."""
        folder = None if backbone.adapter is None else Path(backbone.adapter).expanduser()
        return cls(
            model=Path(backbone.pretrained).name if _is_local(backbone) else backbone.pretrained,
            weights=model_digest(backbone.files()),
            dtype=backbone.dtype,
            load_in_4bit=backbone.load_in_4bit,
            adapter=None if folder is None else "/".join(folder.absolute().parts[-2:]),
            adapter_weights=None if folder is None else folder_digest(folder, ["adapter_*"]),
        )

    def check(self, made_by: "ModelIdentity", what: str) -> None:
        """Raise ``ValueError`` if ``what``, made by ``made_by``, does not belong to this model and adapter."""
        if made_by.weights != self.weights:
            raise ValueError(
                f"{what} was made by the model {made_by.model!r} ({made_by.weights[:SHOWN]}), and this is "
                f"{self.model!r} ({self.weights[:SHOWN]}): give that model, or prefill the document again"
            )
        if made_by.adapter_weights != self.adapter_weights:
            raise ValueError(
                f"{what} was made {made_by._with_adapter()}, and this model runs {self._with_adapter()}: give the same "
                "adapter, or prefill the document again"
            )
        for name in ("dtype", "load_in_4bit"):
            theirs, ours = getattr(made_by, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(
                    f"{what} was made with {name}={theirs}, and this model has {name}={ours}: load the model with "
                    f"{name}={theirs}, or prefill the document again"
                )

    def _with_adapter(self) -> str:
        if self.adapter_weights is None:
            return "without an adapter"
        return f"with the adapter {self.adapter!r} ({self.adapter_weights[:SHOWN]})"


def check_before_loading(backbone: Backbone, made_by: ModelIdentity, what: str) -> None:
    """Raise ``ValueError``, as ``ModelIdentity.check`` does, for what is known without loading: files on this disk."""
    adapter = backbone.adapter
    if (_is_local(backbone) or backbone.pretrained == EMBEDDED) and (
        adapter is None or Path(adapter).expanduser().is_dir()
    ):
        given = ModelIdentity.of(backbone)
        (replace(given, dtype=made_by.dtype) if given.dtype == AUTO else given).check(made_by, what)


def _is_local(backbone: Backbone) -> bool:
    return existing(backbone.pretrained) is not None


class LoadedModel:
    """A model, its tokenizer and its chat frame, loaded once for any number of caches.

    Parameters
    ----------
    backbone
        The model and its adapter. It runs on the machine's accelerator, unless ``backbone.placement`` says otherwise.

    Raises
    ------
    ValueError
        If it cannot be loaded, see ``Backbone.load``.
    """

    def __init__(self, backbone: Backbone) -> None:
        model, self.tokenizer = backbone.load(trainable=False)
        self.model = causal_lm(model)
        """The causal LM; the adapter is active in it."""
        if backbone.placement is None:
            self.model.to(decide(dtype=backbone.dtype).device)  # type: ignore[arg-type]
        self.model.eval()
        self.backbone = backbone
        self.encoder = Encoder(self.tokenizer)
        prefix, self.question_suffix = chat_frame(self.tokenizer)
        self.prefix_ids = self.encoder.start(prefix)
        """The chat frame before a document."""
        self.stop_ids = stop_ids(self.model, self.tokenizer)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The identity of model and adapter; a hub model's files carry their digests, others are read once."""
        return ModelIdentity.of(self.backbone)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    def question_ids(self, question: str, answer_prefix: str = "") -> list[int]:
        """Encode a question in its frame, up to the beginning of the answer."""
        if not question.strip():
            raise ValueError("a question is empty: give some text")
        return self.encoder.encode(f"{QUESTION_OPENING}{question}{self.question_suffix}{answer_prefix}")

    def known(self, ids: Sequence[int]) -> list[int]:
        """Return token ``ids`` as a list; raise ``ValueError`` for one that the model does not have."""
        most = len(self.model.get_input_embeddings().weight) - 1  # type: ignore[arg-type]
        wrong = [token for token in ids if not 0 <= token <= most]
        if wrong:
            raise ValueError(f"there is no token {wrong[0]}: this model has 0 to {most}")
        return list(ids)

    def text_of(self, ids: list[int]) -> str:
        """Decode an answer, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run forwards in the block: without gradients, in the precision of the weights, without an earlier masking."""
        dtype = getattr(torch, str(self.backbone.dtype))
        for attention in attentions(self.model).values():
            attention.masked_key_indices = None  # type: ignore[assignment]  # of a head-wise press that ran before
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            yield
