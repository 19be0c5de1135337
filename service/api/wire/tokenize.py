"""`POST /tokenize` and `POST /detokenize`: vLLM's fields, and llama.cpp's where they do not contradict."""

from typing import ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from service.api.wire.answers import Answer
from service.api.wire.base import Neutral, WireModel, at_fault
from service.api.wire.chat import Messages, TemplatedChat
from service.api.wire.fields import TokenIds
from service.api.wire.request import ModelName


class TokenizeBody(TemplatedChat):
    """What to encode: `prompt` or `messages` (vLLM), or `content` (llama.cpp)."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a river", "return_token_strs": True}]}
    )

    unsupported: ClassVar[Neutral] = {
        "chat_template": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "parse_special": (True,),
    }

    model: ModelName | None = Field(default=None, description="any served name: all share one tokenizer")
    prompt: str | None = None
    messages: Messages | None = None
    content: str | None = Field(default=None, description="llama.cpp's name of the text")
    add_special_tokens: bool | None = Field(
        default=None,
        description="with what the tokenizer puts around a text; true for `prompt`, else false: a chat's template "
        "writes its own",
    )
    add_special: bool | None = Field(default=None, description="llama.cpp's name of it")
    return_token_strs: bool = Field(default=False, description="tell each token as the vocabulary writes it")
    with_pieces: bool = Field(default=False, description="llama.cpp's: tokens become objects of id and piece")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.messages, self.content)) != 1:
            raise ValueError("give one of 'prompt', 'messages' and 'content'")
        if self.add_special_tokens is not None and self.add_special is not None:
            raise at_fault("add_special", "another name of add_special_tokens; send one of them")
        for name in TemplatedChat.model_fields:
            if self.messages is None and name in self.model_fields_set:
                raise at_fault(name, "is for messages alone")
        return self

    @property
    def special(self) -> bool:
        """Whether the tokenizer adds its own tokens."""
        given = self.add_special if self.add_special_tokens is None else self.add_special_tokens
        return self.prompt is not None if given is None else given


class TokenPiece(Answer):
    """A token in llama.cpp's longer form."""

    id: int
    piece: str


class TokenizeAnswer(Answer):
    """What was encoded."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"count": 2, "max_model_len": 4096, "tokens": [81, 8192], "token_strs": ["a", "Ġriver"]}
            ]
        }
    )

    count: int
    max_model_len: int
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None = None


class DetokenizeBody(WireModel):
    """Token ids to decode."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [81, 8192]}]})

    model: ModelName | None = Field(default=None, description="any served name: all share one tokenizer")
    tokens: TokenIds


class DetokenizeAnswer(Answer):
    """Their text, special tokens included: `prompt` is vLLM's name of it, `content` llama.cpp's."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a river", "content": "a river"}]})

    prompt: str
    content: str
