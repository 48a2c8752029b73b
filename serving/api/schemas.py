"""What clients may send: OpenAI's requests as far as they are honoured, and the adapters' own. All else is refused."""

from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Name = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=512)]
Weight = Annotated[float, Field(ge=-100, le=100)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# Of a long list that is wrong everywhere, one place is told: telling all would take longer than answering.
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
_MOST_KEYS = 64


def _checked_keys(value: Any, *, most: int) -> Any:
    """Count keys before each of them is looked at."""
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"at most {most} keys are allowed, got {len(value)}")
    return value


def _few(most: int) -> BeforeValidator:
    return BeforeValidator(partial(_checked_keys, most=most))


class Body(BaseModel):
    """A request: types are taken as they are, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, value: Any) -> Any:
        return _checked_keys(value, most=_MOST_KEYS)


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    name: Name = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`text`, any JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("give json_schema with type json_schema, and only then")
        return self


class Generation(Body):
    """What completions and chat completions share.

    `model` is the base, an adapter, a hosted mixture, or `auto`. With `auto` or the base, `adapter` names the adapter
    instead, and `adapters` mixes several by weight.
    """

    model: Name
    adapter: Name | None = None
    adapters: Annotated[dict[Name, Weight], Field(min_length=1, max_length=16), _few(16)] | None = None
    task: Name | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias], Field(max_length=1024), _few(1024)] | None
    ) = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: Text | Texts | TokenIds | ManyTokenIds
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class ContentPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True)]
    name: Name | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings: the mean of the base's last hidden states."""

    model: Name
    input: Text | Annotated[Texts, Field(max_length=256)] | TokenIds | Annotated[ManyTokenIds, Field(max_length=256)]
    encoding_format: Literal["float", "base64"] = "float"
    user: Annotated[str, Field(max_length=512)] | None = None


class AdapterSource(Body):
    """Where an adapter comes from: a folder below an allowed root, or a Hub id at a revision.

    `prompts` are examples of what it is for: the automatic choice knows it by them.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    revision: Name | None = None
    prompts: Annotated[list[Text], Field(max_length=256)] = []


class NewAdapter(AdapterSource):
    """POST /v1/lora_adapters."""

    name: Name
    pin: bool = False


class OtherAdapter(AdapterSource):
    """PUT /v1/lora_adapters/NAME: takes the place of the generation that is expected there."""

    expected_generation: Name | None = None


class Pin(Body):
    """POST /v1/lora_adapters/NAME/pin."""

    pinned: bool = True


class LoadLora(Body):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadLora(Body):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: Name
