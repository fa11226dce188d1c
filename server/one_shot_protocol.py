"""The request bodies of the one-shot routes: embeddings, rerank, score, classify.

Null means absent, unknown fields are ignored, and a known one that cannot be honoured is refused by name unless its
value asks for nothing, as on the generation routes.
Sources: OpenAI's API reference (embeddings), Jina's and Cohere's (rerank), vLLM's (score, truncate_prompt_tokens).
"""

import base64
import binascii
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict  # typing's own is not for pydantic before Python 3.12

from headrace.server.errors import BadRequestError
from headrace.server.protocol import Count, Flag, Name, Number, TokenIds, refuse_unsupported

# As OpenAI has it.
MAX_INPUTS = 2048


def _kind(value: Any) -> str:
    """Which of several types is meant, so that only that one's error is told."""
    if not isinstance(value, list):
        return "str"
    if value and isinstance(value[0], str):
        return "list[str]"
    return "list[list]" if value and isinstance(value[0], list) else "list[int]"


class Document(TypedDict):
    text: str


def _text_of(document: Any) -> Any:
    return document.get("text") if isinstance(document, dict) else document


Text = Annotated[str, Field(strict=True)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
_TokenIds = Annotated[TokenIds, Field(min_length=1)]
OneOrMoreTexts = Annotated[
    Annotated[Text, Tag("str")] | Annotated[Texts, Tag("list[str]")],
    Discriminator(lambda value: "list[str]" if isinstance(value, list) else "str"),
]


class OneShotParams(BaseModel):
    """What all one-shot routes share."""

    model_config = ConfigDict(extra="ignore")

    model: Name | None = None
    timeout: Number | None = Field(None, gt=0, le=1e6)
    user: Name | None = None

    # With the values that ask for what is done anyway.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, fields: dict[str, Any]) -> dict[str, Any]:
        refuse_unsupported(fields, cls.unsupported)
        return fields


class TextParams(OneShotParams):
    """`truncate_prompt_tokens` cuts what is longer, -1 to what the model takes; without it that is refused."""

    truncate_prompt_tokens: Count | None = Field(None, ge=-1, lt=2**31, json_schema_extra={"not": {"const": 0}})

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"add_special_tokens": (True,)}

    @model_validator(mode="after")
    def _check_truncation(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: must be -1 or at least 1")
        return self

    @property
    def max_tokens(self) -> int | None:
        """What longer texts are cut to, None where they are refused."""
        cut = self.truncate_prompt_tokens
        return 2**31 if cut == -1 else cut


class EmbeddingRequest(TextParams):
    """`input` is a text or a list of token ids, or a list of either."""

    input: Annotated[
        Annotated[Text, Tag("str")]
        | Annotated[_TokenIds, Tag("list[int]")]
        | Annotated[Texts, Tag("list[str]")]
        | Annotated[list[_TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("list[list]")],
        Discriminator(_kind),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = Field(None, ge=1)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **TextParams.unsupported,
        "messages": (),
        "normalize": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        if isinstance(self.input, list) and not isinstance(self.input[0], int):
            return self.input
        return [self.input]  # type: ignore[return-value]


class _PairParams(TextParams):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **TextParams.unsupported,
        "activation": (True,),
        "use_activation": (True,),
    }


class RerankRequest(_PairParams):
    """`documents` are texts, bare or as `{"text": ...}`."""

    query: Text
    documents: Annotated[
        list[Annotated[Text, BeforeValidator(_text_of, json_schema_input_type=Text | Document)]],
        Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS),
    ]
    top_n: Count | None = Field(None, ge=1)
    return_documents: Flag | None = None


class ScoreRequest(_PairParams):
    """`text_1` with each of `text_2`, or pair by pair where both are lists of one length."""

    text_1: OneOrMoreTexts
    text_2: OneOrMoreTexts

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if isinstance(self.text_1, list) and len(self.text_1) not in (1, len(self._seconds)):
            raise ValueError("text_1: must be one text, or as many as text_2")
        return self

    @property
    def _seconds(self) -> list[str]:
        return self.text_2 if isinstance(self.text_2, list) else [self.text_2]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        firsts = self.text_1 if isinstance(self.text_1, list) else [self.text_1]
        seconds = self._seconds
        return list(zip(firsts * (len(seconds) if len(firsts) == 1 else 1), seconds, strict=True))


class ClassifyRequest(OneShotParams):
    """`image` is base64, bare or as a data URL."""

    image: Text
    top_k: Count | None = Field(None, ge=1)

    def image_bytes(self) -> bytes:
        """Raises: BadRequestError."""
        head, comma, rest = self.image.partition(",")
        if head.lower().startswith(("http:", "https:", "file:", "ftp:")):
            raise BadRequestError("image: URLs are not fetched; send the image itself, as base64", param="image")
        if comma and not (head.lower().startswith("data:") and head.lower().endswith(";base64")):
            raise BadRequestError("image: must be base64, or a data URL of base64", param="image")
        try:
            # In lines, as many tools write it.
            return base64.b64decode("".join((rest if comma else head).split()), validate=True)
        except (binascii.Error, ValueError):
            raise BadRequestError("image: is not valid base64", param="image") from None


class ClassifyForm(OneShotParams):
    """The fields beside the file of a multipart body, which are strings."""

    timeout: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value != ""}
