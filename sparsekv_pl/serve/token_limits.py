"""The most tokens of a request, from the model's positions and the command line."""

from dataclasses import dataclass

from kvpress import BasePress

from sparsekv_pl.eviction.limits import position_limit
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.usage.loaded_model import LoadedModel


@dataclass(frozen=True)
class TokenLimits:
    """The most tokens of a request: of document and question together, and of an answer."""

    prompt: int
    answer: int

    @classmethod
    def of(cls, model: LoadedModel, press: BasePress | None, prompt: int | None, answer: int) -> "TokenLimits":
        """Limit prompts to the model's positions, or to ``prompt`` tokens, which only a re-rotating press may exceed.

        Raises ``ValueError`` for numbers that cannot be met.
        """
        config = model.model.config.get_text_config()
        positions = position_limit(model.model)
        window = getattr(config, "sliding_window", None)
        known = [each for each in (positions, window) if each is not None]
        if prompt is None:
            if not known:
                raise ValueError("the model's config names no number of positions: give --max_prompt_tokens")
            prompt = min(known)
        rotates = press is not None and traits_of(press).re_rotates
        if known and prompt > min(known) and not rotates:
            raise ValueError(
                f"--max_prompt_tokens {prompt} is more than this model reads ({min(known)}): lower it, or serve under "
                "a press that re-rotates keys, such as KeyRerotation(KeyDiff)"
            )
        for name, value in {"--max_prompt_tokens": prompt, "--max_new_tokens": answer}.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        return cls(prompt, answer)
