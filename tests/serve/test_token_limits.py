"""How many tokens a request may have, by the model's windows and the press."""

from typing import Any

import pytest
from kvpress import KeyRerotationPress, KnormPress

from sparsekv_pl.serve.token_limits import TokenLimits
from tests.windowed_models import WINDOW, windowed_model

POSITIONS = 256
KNORM, TURNED = KnormPress(0.5), KeyRerotationPress(KnormPress(0.5))


@pytest.mark.parametrize(
    ("kind", "press", "prompt", "positions"),
    [
        ("gemma3", KNORM, POSITIONS, POSITIONS),  # windows in some layers limit nothing
        ("llama4", KNORM, POSITIONS, POSITIONS),
        ("qwen2", None, POSITIONS, POSITIONS),
        ("gemma3", TURNED, POSITIONS, POSITIONS),
        ("mistral", None, POSITIONS, POSITIONS),  # read as the model reads them
        ("mistral", KNORM, WINDOW, WINDOW),
        ("phi3", KNORM, WINDOW, WINDOW),
    ],
)
def test_a_window_limits_only_a_press_on_a_model_with_windows_alone(
    kind: str, press: Any, prompt: int, positions: int | None
) -> None:
    model = windowed_model(kind)
    frees = press is TURNED
    assert TokenLimits.of(model, press, None, 8) == TokenLimits(prompt, 8, positions, frees)
    assert TokenLimits.of(model, press, 5, 8) == TokenLimits(5, 8, positions, frees)
    if frees:
        assert TokenLimits.of(model, press, 999, 8).prompt == 999
    else:
        with pytest.raises(ValueError, match=rf"--max_prompt_tokens 999 is more than this model reads \({prompt}\)"):
            TokenLimits.of(model, press, 999, 8)
