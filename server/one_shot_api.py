"""The routes of models that answer in one pass: /v1/embeddings, /v1/rerank, /v1/score, /v1/classify.

Lives on the event loop. A request's inputs are read on a worker, each goes into its model's lane as an item of its
own, and when all have come back the answer is made on a worker, vector by vector: a JSON encoder holds the
interpreter's lock for as long as one call takes.
Sources: OpenAI's API reference (embeddings), Jina's and Cohere's (rerank), vLLM's (score).
"""

import base64
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from headrace.scheduler.config import OneShotTask
from headrace.server.batch_lane import Asker
from headrace.server.errors import BadRequestError, DeadlineError, OverloadedError
from headrace.server.metrics import Metrics
from headrace.server.one_shot_models import OneShot, OneShots
from headrace.server.one_shot_protocol import (
    ClassifyForm,
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    TextParams,
)
from headrace.server.protocol import parse_json_object, validate
from headrace.server.request_log import log_answered
from headrace.server.sse import to_json
from headrace.server.tenant_limits import TenantLimits

_DEFAULT_TOP_K = 5
# Of a JSON body with an image.
_MOST_COMMAS = 1000
# Fields of a multipart body beside its file.
_MAX_FIELDS = 8


class OneShotApi:
    """The routes of all one-shot models."""

    def __init__(self, models: OneShots, limits: TenantLimits, metrics: Metrics, request_timeout_s: float) -> None:
        self._models = models
        self._limits = limits
        self._metrics = metrics
        self._request_timeout_s = request_timeout_s

    async def embeddings(self, request: Request, body: bytes) -> Response:
        params = validate(EmbeddingRequest, parse_json_object(body))
        model = self._models.find(OneShotTask.EMBED, params.model)

        def read() -> list[np.ndarray]:
            return model.reader.read(params.inputs, "input", max_tokens=params.max_tokens)  # type: ignore[no-any-return]

        def write(vectors: Sequence[np.ndarray], num_tokens: int) -> bytes:
            is_base64 = params.encoding_format == "base64"
            items = []
            for index, vector in enumerate(vectors):
                vector = _shortened(vector, params.dimensions)
                encoded = f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"' if is_base64 else ""
                encoded = encoded or to_json(vector.tolist())
                items.append(f'{{"object":"embedding","index":{index},"embedding":{encoded}}}')
            usage = to_json({"prompt_tokens": num_tokens, "total_tokens": num_tokens})
            name = to_json(model.name)
            return f'{{"object":"list","data":[{",".join(items)}],"model":{name},"usage":{usage}}}'.encode()

        return await self._answer(request, body, params.timeout, model, read, write)

    async def rerank(self, request: Request, body: bytes) -> Response:
        params = validate(RerankRequest, parse_json_object(body))
        model = self._models.find(OneShotTask.SCORE, params.model)
        texts = params.documents

        def write(logits: Sequence[np.ndarray], num_tokens: int) -> bytes:
            scores = [_score(row) for row in logits]
            # By the logits: large ones' scores are all 1.
            best = sorted(range(len(scores)), key=lambda i: -float(logits[i][0]))[: params.top_n]
            results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in best]
            if params.return_documents is not False:
                for result in results:
                    result["document"] = {"text": texts[result["index"]]}
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            answer = {"id": f"rerank-{request.state.id}", "model": model.name, "results": results, "usage": usage}
            return to_json(answer).encode()

        pairs = [(params.query, text) for text in texts]
        return await self._answer_pairs(request, body, params, model, pairs, "documents", write)

    async def score(self, request: Request, body: bytes) -> Response:
        params = validate(ScoreRequest, parse_json_object(body))
        model = self._models.find(OneShotTask.SCORE, params.model)

        def write(logits: Sequence[np.ndarray], num_tokens: int) -> bytes:
            scores = [{"index": i, "object": "score", "score": _score(row)} for i, row in enumerate(logits)]
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            head = {"id": f"score-{request.state.id}", "object": "list", "created": int(time.time())}
            return to_json({**head, "model": model.name, "data": scores, "usage": usage}).encode()

        return await self._answer_pairs(request, body, params, model, params.pairs, "text_2", write)

    async def classify(self, request: Request, body: bytes) -> Response:
        params, image = await _read_classify_body(request, body)
        model = self._models.find(OneShotTask.CLASSIFY, params.model)

        def read() -> list[np.ndarray]:
            data = params.image_bytes() if isinstance(params, ClassifyRequest) else image
            return [model.reader.read(data)]

        def write(answers: Sequence[np.ndarray], num_tokens: int) -> bytes:
            [probabilities] = answers
            best = np.argsort(-probabilities, kind="stable")[: params.top_k or _DEFAULT_TOP_K].tolist()
            predictions = [{"label": model.labels[i], "index": i, "score": float(probabilities[i])} for i in best]
            head = {"id": f"classify-{request.state.id}", "object": "classification", "created": int(time.time())}
            return to_json({**head, "model": model.name, "predictions": predictions}).encode()

        return await self._answer(request, body, params.timeout, model, read, write)

    async def _answer_pairs(
        self,
        request: Request,
        body: bytes,
        params: TextParams,
        model: OneShot,
        pairs: list[tuple[str, str]],
        field: str,
        write: Any,
    ) -> Response:
        def read() -> list[np.ndarray]:
            return model.reader.read_pairs(pairs, field, max_tokens=params.max_tokens)  # type: ignore[no-any-return]

        return await self._answer(request, body, params.timeout, model, read, write)

    async def _answer(
        self, request: Request, body: bytes, timeout_s: float | None, model: OneShot, read: Any, write: Any
    ) -> Response:
        """Read the inputs, have the model compute them, write the answer. Raises: ApiError."""
        state = request.state
        asker = self._models.asker(state.tenant, state.hints)
        deadline_s = state.received_s + min(timeout_s or self._request_timeout_s, self._request_timeout_s)
        stages = {"received_s": state.received_s}
        with self._metrics.counting_shed(asker.tier), self._limits.within(state.tenant, 1):
            try:
                arrays = await self._models.read(read, len(body), asker)
                stages["tokenized_s"] = time.monotonic()
                is_text = model.task is not OneShotTask.CLASSIFY
                num_tokens = sum(array.shape[-1] for array in arrays) if is_text else 0
                timeout_left_s = max(0.0, deadline_s - time.monotonic())
                outputs = await self._compute(request, model, arrays, num_tokens, asker, timeout_left_s)
            except DeadlineError:
                allowed_s = deadline_s - state.received_s
                raise DeadlineError(f"the request was not answered within {allowed_s:g} s") from None
            except OverloadedError:
                self._metrics.count_shed(asker.tier, "queue_full")
                raise
            stages["computed_s"] = time.monotonic()
            content = await self._models.write(lambda: write(outputs, num_tokens))
        state.is_accepted = True
        stages["end_s"] = time.monotonic()
        log_answered(state.id, request.scope["path"], len(arrays), num_tokens, stages)
        return Response(content, media_type="application/json")

    async def _compute(
        self,
        request: Request,
        model: OneShot,
        arrays: list[np.ndarray],
        num_tokens: int,
        asker: Asker,
        timeout_s: float,
    ) -> list[Any]:
        """Have the model compute them, and charge for it whatever comes of it, unless they are not let in."""
        request.state.stage = "queued"
        is_let_in = True
        try:
            return await model.lane.submit([model.as_input(array) for array in arrays], asker, timeout_s)
        except (OverloadedError, BadRequestError):
            is_let_in = False
            raise
        except anyio.get_cancelled_exc_class():
            self._metrics.count_cancelled("queued")
            raise
        finally:
            if is_let_in:
                self._limits.charge(request.state.tenant, num_tokens)


class _FormParser(MultiPartParser):
    """Keeps files in memory, where the body is anyway, and knows whether it has seen the form's end."""

    spool_max_size = sys.maxsize
    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


async def _read_classify_body(request: Request, body: bytes) -> tuple[ClassifyRequest | ClassifyForm, bytes]:
    """The fields, and the image where it came as a file. Raises: BadRequestError."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        # Its image makes it large, and nothing else may: a parser holds the interpreter's lock.
        if body.count(b",") > _MOST_COMMAS:
            raise BadRequestError("the body has more fields than any request of this kind")
        return await anyio.to_thread.run_sync(lambda: validate(ClassifyRequest, parse_json_object(body))), b""

    async def whole() -> Any:
        yield body
        if not parser.has_ended:  # from inside, so that the parser closes the file that it has begun
            raise MultiPartException("it is cut short")

    try:
        parser = _FormParser(
            Headers(scope=request.scope), whole(), max_files=1, max_fields=_MAX_FIELDS, max_part_size=2**16
        )
        form: FormData = await parser.parse()
    except MultiPartException as error:
        raise BadRequestError(f"the body is not valid multipart/form-data: {error.message}") from None
    except (LookupError, UnicodeError):  # of the charset in its content type
        raise BadRequestError("the body is not valid multipart/form-data: its charset") from None
    try:
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        if [name for name, _ in files] not in (["image"], ["file"]):
            raise BadRequestError("image: must be one file, in the part `image`", param="image")
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        image = await files[0][1].read()
    finally:
        await form.close()
    return validate(ClassifyForm, fields), image


def _shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` of a vector, of the same length as before in space."""
    if dimensions is None or dimensions == len(vector):
        return vector
    if dimensions > len(vector):
        raise BadRequestError(f"dimensions: the model has {len(vector)}", param="dimensions")
    cut = vector[:dimensions]
    norm = np.linalg.norm(cut)
    return cut * (np.linalg.norm(vector) / norm) if norm > 0 else cut


def _score(logits: np.ndarray) -> float:
    """A cross-encoder's one logit as a number from 0 to 1."""
    return 1 / (1 + math.exp(-float(logits[0]))) if logits[0] > -700 else 0.0
