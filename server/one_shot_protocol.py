"""The request bodies of the one-shot routes: embeddings, rerank, score, classify.

Null means absent, unknown fields are ignored, as on the generation routes.
Sources: OpenAI's API reference (embeddings), Jina's and Cohere's (rerank), vLLM's (score, truncate_prompt_tokens).
"""

import base64
import binascii
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.server.errors import BadRequestError
from headrace.server.protocol import Count, Flag, Name, Number, TokenIds

# As OpenAI has it.
MAX_INPUTS = 2048

Text = Annotated[str, Field(strict=True)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]


class OneShotParams(BaseModel):
    """What all one-shot routes share."""

    model_config = ConfigDict(extra="ignore")

    model: Name | None = None
    timeout: Number | None = Field(None, gt=0, le=1e6)
    user: Name | None = None


class TextParams(OneShotParams):
    """`truncate_prompt_tokens` cuts what is longer, -1 to what the model takes; without it that is refused."""

    truncate_prompt_tokens: Count | None = Field(None, ge=-1)

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

    input: (
        Text
        | Annotated[TokenIds, Field(min_length=1)]
        | Texts
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = Field(None, ge=1)

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        if isinstance(self.input, list) and not isinstance(self.input[0], int):
            return self.input
        return [self.input]  # type: ignore[return-value]


class RerankDocument(BaseModel):
    text: Text


class RerankRequest(TextParams):
    query: Text
    documents: Annotated[list[Text | RerankDocument], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    top_n: Count | None = Field(None, ge=1)
    return_documents: Flag | None = None

    @property
    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]


class ScoreRequest(TextParams):
    """`text_1` with each of `text_2`, or pair by pair where both are lists of one length."""

    text_1: Text | Texts
    text_2: Text | Texts

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
        if comma and not (head.startswith("data:") and head.endswith(";base64")):
            raise BadRequestError("image: must be base64, or a data URL of base64", param="image")
        try:
            return base64.b64decode(rest if comma else head, validate=True)
        except (binascii.Error, ValueError):
            raise BadRequestError("image: is not valid base64", param="image") from None


class ClassifyForm(OneShotParams):
    """The fields beside the file of a multipart body, which are strings."""

    top_k: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value != ""}
