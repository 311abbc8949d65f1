"""The most tokens of a request, from the model's positions and the command line."""

from dataclasses import dataclass

from kvpress import BasePress
from transformers import PreTrainedModel

from sparsekv_pl.eviction.limits import position_limit
from sparsekv_pl.models.layer_kinds import windowed_alone
from sparsekv_pl.presses.traits import traits_of


@dataclass(frozen=True)
class TokenLimits:
    """The most tokens of a request: of document and question together, and of an answer."""

    prompt: int
    answer: int
    positions: int | None = None
    """Most positions in use at once; None where the config names none."""
    frees: bool = False
    """Whether the press frees positions, so that a document may have more tokens."""

    @classmethod
    def of(cls, model: PreTrainedModel, press: BasePress | None, prompt: int | None, answer: int) -> "TokenLimits":
        """Limit prompts to the model's positions, or to ``prompt`` tokens, which only a re-rotating press may exceed.

        Under a press, a model all of whose layers have a window has no positions beyond it.

        Raises ``ValueError`` for numbers that cannot be met.
        """
        window = None if press is None else windowed_alone(model.config)
        most = min((each for each in (position_limit(model), window) if each is not None), default=None)
        rotates = press is not None and traits_of(press).re_rotates
        if prompt is None:
            if most is None:
                raise ValueError("the model's config names no number of positions: give --max_prompt_tokens")
            prompt = most
        if most is not None and prompt > most and not rotates:
            raise ValueError(
                f"--max_prompt_tokens {prompt} is more than this model reads ({most}): lower it, or serve under a "
                "press that re-rotates keys, such as KeyRerotation(KeyDiff)"
            )
        for name, value in {"--max_prompt_tokens": prompt, "--max_new_tokens": answer}.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        return cls(prompt, answer, most, rotates)
