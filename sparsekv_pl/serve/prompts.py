"""Where a request's document ends and its question begins: the document is evicted and kept, the question is not.

The document is everything before the question, and the question is the last paragraph of the first user's message, or
its last part if the message has several. Later turns follow the question, so a conversation goes on over one document.
A request that has nothing before its question has no document, and nothing of it is evicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from sparsekv_pl.models.chat_frame import QUESTION_OPENING
from sparsekv_pl.models.chat_template import render
from sparsekv_pl.serve.refusals import Refusal
from sparsekv_pl.serve.request_fields import ChatMessage
from sparsekv_pl.usage.loaded_model import LoadedModel


@dataclass(frozen=True)
class SplitPrompt:
    """Token ids of a request."""

    document: list[int]
    """Empty if there is none."""
    question: list[int]
    """What follows the document, up to the beginning of the answer."""

    @property
    def tokens(self) -> int:
        """Tokens of both."""
        return len(self.document) + len(self.question)


def split_text(text: str) -> tuple[str, str]:
    """Return a text's document and its last paragraph; the document is empty if there is but one."""
    document, opening, question = text.rstrip().rpartition(QUESTION_OPENING)
    if not opening or not document.strip():
        return "", text
    return document, question + text[len(text.rstrip()) :]


def chat_prompt(model: LoadedModel, messages: Sequence[ChatMessage]) -> SplitPrompt:
    """Encode a conversation in the model's chat template. A last message of the assistant begins the answer.

    One message of a user gives the tokens of ``ContextCache.prefill`` and ``ask``.

    Raises
    ------
    Refusal
        For a conversation without a user's message, and one that the template refuses.
    """
    *turns, last = messages
    begun = QUESTION_OPENING.join(last.parts) if last.role == "assistant" else ""
    turns = turns if begun else list(messages)
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise Refusal("messages has none of the role 'user': put the question into one", param="messages")
    parts = turns[first].parts
    document, question = (QUESTION_OPENING.join(parts[:-1]), parts[-1]) if len(parts) > 1 else split_text(parts[0])
    if not question.strip():
        raise Refusal(f"messages[{first}] has no question: give some text", param="messages")
    start, end = uuid4().hex, uuid4().hex
    marked = f"{start}{document}{end}{QUESTION_OPENING if document else ''}{question}"
    contents = [marked if place == first else QUESTION_OPENING.join(turn.parts) for place, turn in enumerate(turns)]
    rendered = _rendered(model, turns, contents)
    if rendered.count(start) != 1 or rendered.count(end) != 1:
        raise Refusal("the model's chat template repeats or drops the user's first message", param="messages")
    before, rest = rendered.split(start)
    inside, after = rest.split(end)
    beginning = model.encoder.start(before)
    following = model.encoder.encode(after + begun)
    if document or first > 0:
        return SplitPrompt([*beginning, *model.encoder.encode(inside)], following)
    return SplitPrompt([], [*beginning, *following])


def _rendered(model: LoadedModel, turns: Sequence[ChatMessage], contents: Sequence[str]) -> str:
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        return "\n".join([(tokenizer.bos_token or "") + contents[0], *contents[1:], ""])
    said = [
        {"role": turn.role.replace("developer", "system"), "content": content}
        for turn, content in zip(turns, contents, strict=True)
    ]
    try:
        return render(tokenizer, said, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # templates are programs; errors of any kind, Jinja's sandbox included
        why = " ".join(str(error).split())[:200]
        raise Refusal(f"the model's chat template refuses these messages: {why}", param="messages") from error


def completion_prompt(model: LoadedModel, prompt: str | list[int]) -> SplitPrompt:
    """Encode a text without a chat frame, or take token ids as they are.

    Raises
    ------
    Refusal
        For an empty prompt, and ids that the model does not have.
    """
    if not prompt:
        raise Refusal("prompt is empty: give some text", param="prompt")
    if not isinstance(prompt, str):
        return _split_ids(model, prompt)
    document, _ = split_text(prompt)
    encoder = model.encoder
    if not document:
        return SplitPrompt([], [*encoder.opening, *encoder.start(prompt)])
    return SplitPrompt([*encoder.opening, *encoder.start(document)], encoder.encode(prompt.removeprefix(document)))


def _split_ids(model: LoadedModel, ids: list[int]) -> SplitPrompt:
    try:
        ids = model.known(ids)
    except ValueError as error:
        raise Refusal(f"prompt: {error}", param="prompt") from error
    first, said = "", False  # of what follows: its first character, and whether it is more than white space
    for place in range(len(ids) - 1, 0, -1):
        token = model.encoder.decode([ids[place]])
        near = token + first
        if QUESTION_OPENING in (near if said else near.rstrip()):
            cut = place if token.startswith("\n") else place + 1
            if cut < len(ids) and model.encoder.decode(ids[:cut]).strip():
                return SplitPrompt(ids[:cut], ids[cut:])
            break
        first, said = near[:1], said or bool(token.strip())
    return SplitPrompt([], ids)
