"""The fields of requests. What this server cannot do is refused by name, unless a field asks for nothing."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sparsekv_pl.serve.refusals import Refusal

WITHOUT_EFFECT = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that change no answer anywhere."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "suffix": ("",),
}
"""Fields that this server does not have -> the values that ask for nothing; null does everywhere."""

MOST_STOPS, MOST_STOP_CHARACTERS = 16, 256
"""Of strings that end an answer, looked for after every token. OpenAI takes 4, and HumanEval in lm_eval sends 6."""
MOST_PROMPTS = 128
"""Prompts of a request, which are answered in one turn."""


def _encodable(text: str) -> str:
    """Raise ``ValueError`` for half a character (``"\\ud800"`` in JSON), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half a surrogate pair at character {error.start}: leave it out") from error
    return text


def _listed_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _listed_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
FAIL_FAST = Field(fail_fast=True)
"""One wrong item is reported, not all: an error takes hundreds of times the bytes of its item."""
Tokens = Annotated[list[int], FAIL_FAST]


class AskedFields(BaseModel):
    """The fields of both endpoints."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    stream_options: Annotated[dict[str, bool], FAIL_FAST] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS), FAIL_FAST, BeforeValidator(_listed_stops)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def refuse_what_is_not_there(self) -> "AskedFields":
        """Raise ``Refusal`` for a field that asks for more than this server does."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in WITHOUT_EFFECT or value in NEUTRAL.get(name, ()):
                continue
            what = f"{name}={value!r}"[:80] if name in NEUTRAL else f"the field {name!r}"
            raise Refusal(f"{what} is not supported by this server: leave it out", param=name, code="unsupported_value")
        if self.stream_options is not None and set(self.stream_options) - {"include_usage", "include_obfuscation"}:
            raise Refusal("stream_options takes include_usage alone", param="stream_options", code="unsupported_value")
        return self

    @property
    def streams_usage(self) -> bool:
        """Whether the last part of a streamed reply holds the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Field(min_length=1), FAIL_FAST, BeforeValidator(_listed_parts)]

    @property
    def parts(self) -> list[str]:
        """The texts of its content."""
        return [part.text for part in self.content]


class ChatFields(AskedFields):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1), FAIL_FAST]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionFields(AskedFields):
    """A request to /v1/completions: texts, or token ids."""

    prompt: Text | Annotated[list[Text], FAIL_FAST] | Tokens | Annotated[list[Tokens], FAIL_FAST]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        numbers = [token for token in self.prompt if isinstance(token, int)]
        return [numbers] if numbers else self.prompt  # type: ignore[return-value]
