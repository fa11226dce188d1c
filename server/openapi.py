"""The OpenAPI 3.1 document of `headrace serve`, and the route that answers it.

What a request may hold is read off the models that validate it; a field that exists elsewhere and is not supported
appears with the values that ask for nothing. Made on a worker thread when it is first asked for. It knows which
statuses a route can answer, and deliberately not how it comes to them: a test holds document and routes together.
An event stream's schema is that of one event, whose data is JSON.
Source: OpenAPI Specification 3.1.1; WHATWG HTML, "Server-sent events".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from headrace.server import answers
from headrace.server.admin_api import ProfileRequest
from headrace.server.error_forms import is_anthropic, is_ollama
from headrace.server.gateway import FORMAT_HEADER, LOAD_HEADER
from headrace.server.guard import METRICS_PATHS, is_open
from headrace.server.idempotency import HEADER
from headrace.server.messages_protocol import CountTokensRequest, MessagesRequest
from headrace.server.native_api import QUERY_TEXTS, StreamChatRequest, StreamCompletionRequest
from headrace.server.ollama_protocol import OllamaChatRequest, OllamaGenerateRequest, Options, ShowRequest
from headrace.server.one_shot_protocol import (
    ClassifyForm,
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from headrace.server.protocol import (
    STREAM_OPTIONS_RULE,
    UNSUPPORTED,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
)
from headrace.server.responses_api import ItemsQuery, RetrieveQuery
from headrace.server.responses_protocol import ResponsesRequest
from headrace.server.settings import Settings
from headrace.server.sse import to_json
from headrace.server.tokens_api import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from headrace.server.version import VERSION

_RESPONSE_EVENTS: tuple[type[Any], ...] = (
    answers.ResponseStateEvent,
    answers.ResponseItemEvent,
    answers.ResponsePartEvent,
    answers.ResponseTextDelta,
    answers.ResponseTextDone,
    answers.ResponseReasoningDelta,
    answers.ResponseReasoningDone,
    answers.ResponseArgumentsDelta,
    answers.ResponseArgumentsDone,
    answers.ResponseStreamError,
)
_REQUESTS: tuple[type[BaseModel], ...] = (
    ChatCompletionRequest,
    CompletionRequest,
    StreamChatRequest,
    StreamCompletionRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    OllamaChatRequest,
    OllamaGenerateRequest,
    Options,
    ShowRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    ClassifyRequest,
    ClassifyForm,
    ProfileRequest,
    RetrieveQuery,
    ItemsQuery,
)
_ANSWERS: tuple[type[Any], ...] = (
    answers.ErrorEnvelope,
    answers.AnthropicErrorEnvelope,
    answers.OllamaError,
    answers.Status,
    answers.Health,
    answers.RequestStates,
    answers.RankLoad,
    answers.RankLoads,
    answers.ServerInfo,
    answers.ChatCompletion,
    answers.ChatCompletionChunk,
    answers.Completion,
    answers.CompletionChunk,
    answers.ModelResponse,
    answers.DeletedResponse,
    answers.ResponseItems,
    *_RESPONSE_EVENTS,
    answers.Version,
    answers.Model,
    answers.ModelList,
    answers.Tokens,
    answers.Text,
    answers.AnthropicMessage,
    answers.MessageStart,
    answers.ContentBlockStart,
    answers.ContentBlockDelta,
    answers.ContentBlockStop,
    answers.MessageDelta,
    answers.MessageStop,
    answers.Ping,
    answers.TokenCount,
    answers.OllamaChatAnswer,
    answers.OllamaGenerateAnswer,
    answers.OllamaModels,
    answers.OllamaRunningModels,
    answers.OllamaShownModel,
    answers.OllamaVersion,
    answers.Ticket,
    answers.StreamCreated,
    answers.StreamSnapshot,
    answers.Queued,
    answers.Token,
    answers.Done,
    answers.Interrupted,
    answers.EmbeddingList,
    answers.Ranking,
    answers.ScoreList,
    answers.Classification,
)

_REFUSALS = {
    307: "Another of several servers has it, where `location` leads.",
    400: "The request is not valid; `param` names the field at fault.",
    401: "No key was presented, or none that is known.",
    403: "Without keys: the request comes from a page of another origin, or names a foreign host.",
    404: "There is no such model, stream or response.",
    406: "`accept` does not include text/event-stream.",
    408: "The request took too long to arrive.",
    409: "Steps are being traced already.",
    410: "The stream has ended and is no longer kept.",
    413: "The body is too large.",
    415: "The body's content type or encoding is not accepted.",
    421: "Another of several servers has it, which `replica` names.",
    422: "The Idempotency-Key belongs to another request.",
    429: "Too much waits already, or a limit of the key's is used up.",
    431: "There are too many headers, or they are too large.",
    500: "The server failed.",
    503: "The server is loading or draining, has too many connections, or its engine has ended.",
    504: "The request's time was over before its answer.",
}
# The forms of errors, each with what the names of its refusals begin with.
_ERROR_FORMS: dict[type[Any], str] = {
    answers.ErrorEnvelope: "",
    answers.AnthropicErrorEnvelope: "anthropic_",
    answers.OllamaError: "ollama_",
}
# Where a server is one of several: what is another's to answer, and to read elsewhere.
_ELSEWHERE = (307, 421)
# On any route: what is refused before the route is known, and what may always go wrong.
_ALWAYS = (400, 408, 431, 500, 503)

# Headers of what generates.
_GENERATING = [
    {"name": HEADER, "in": "header", "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"}},
    {
        "name": FORMAT_HEADER,
        "in": "header",
        "description": f"TEXT, JSON or BIN: in which of them {LOAD_HEADER} tells the load beside the answer.",
        "schema": {"type": "string"},
    },
]
# What clients do not have where there is an address of the operator's own.
_OPERATORS_PATHS = (*METRICS_PATHS, "/get_load", "/v1/loads")
_STREAM_ID = "([a-z0-9-]{1,32}-)?[0-9a-f]{32}"
# What follows it in an event's id: the place, and the restarts of the server behind it.
_PLACE = "[0-9]{1,11}(-[0-9]{1,9})?"
# A picture of one pixel.
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mNgYPgPAAEDAQA2dBFAAAAAAElFTkSuQmCC"


@dataclass(frozen=True, slots=True)
class _Operation:
    """`answers` are Response Objects where all goes well, `body` is a Media Type Object for each content type."""

    method: str
    path: str
    id: str
    summary: str
    answers: dict[int, dict[str, Any]]
    refusals: tuple[int, ...] = ()
    body: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: list[dict[str, Any]] = field(default_factory=list)


class OpenApi:
    """GET /openapi.json, with what these settings leave of the routes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._has_keys = settings.api_keys_file is not None
        self._encoded: bytes | None = None

    async def get(self, request: Request) -> Response:
        if self._encoded is None:
            self._encoded = await anyio.to_thread.run_sync(lambda: to_json(self.document()).encode())
        return Response(self._encoded, media_type="application/json")

    def document(self) -> dict[str, Any]:
        schemas = _schemas()
        paths: dict[str, dict[str, Any]] = {}
        for operation in _operations(schemas):
            if self._is_served(operation.path):
                paths.setdefault(operation.path, {})[operation.method] = self._described(operation)
        refusals = {f"{name}{s}": _refusal(s, form) for form, name in _ERROR_FORMS.items() for s in _REFUSALS}
        components: dict[str, Any] = {"schemas": schemas, "responses": refusals}
        if self._has_keys:
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "ticket": {"type": "apiKey", "in": "query", "name": "ticket"},
            }
        return {
            "openapi": "3.1.1",
            "info": {
                "title": "Headrace",
                "version": VERSION,
                "description": (
                    "Unknown fields of a request are ignored, and null is a field that is absent. "
                    "A request's X-Request-ID comes back in its answer, and is in the server's log."
                ),
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": components,
        }

    def _is_served(self, path: str) -> bool:
        """Whether clients have it: what is the operator's they may not."""
        if path.startswith("/admin/"):
            return self._settings.admin_port is None and self._settings.is_private
        return path not in _OPERATORS_PATHS or self._settings.admin_port is None

    def _described(self, operation: _Operation) -> dict[str, Any]:
        refusals = {*_ALWAYS, *operation.refusals, 401 if self._has_keys else 403} - operation.answers.keys()
        if not self._settings.replica_name:
            refusals -= {*_ELSEWHERE}
        form = _ERROR_FORMS[_error_form(operation.path)]
        described: dict[str, Any] = {
            "operationId": operation.id,
            "summary": operation.summary,
            "parameters": operation.parameters,
            "responses": {
                **{str(status): answer for status, answer in operation.answers.items()},
                **{str(status): {"$ref": f"#/components/responses/{form}{status}"} for status in sorted(refusals)},
            },
        }
        if operation.body:
            described["requestBody"] = {"required": True, "content": operation.body}
        if self._has_keys:
            described["security"] = self._security(operation.path)
        return described

    def _security(self, path: str) -> list[dict[str, list[str]]]:
        keys: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]
        if path == "/v1/stream":
            return [*keys, {"ticket": []}]
        return [] if is_open(path, has_open_metrics=self._settings.open_metrics) else keys


class _Schemas(GenerateJsonSchema):
    """Without a title for each field, which says its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schemas() -> dict[str, Any]:
    """Every component's schema by its name: what pydantic says, and what it cannot know."""
    _, definitions = TypeAdapter.json_schemas(
        ((each.__name__, "validation", TypeAdapter(each)) for each in (*_REQUESTS, *_ANSWERS)),
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    schemas: dict[str, Any] = definitions["$defs"]
    for model in _REQUESTS:
        unsupported: Mapping[str, tuple[Any, ...]] = getattr(model, "unsupported", {})
        if issubclass(model, GenerationParams):
            unsupported = {**UNSUPPORTED, **unsupported}
        for name, neutral in unsupported.items():
            schemas[model.__name__]["properties"][name] = {"enum": [*neutral, None]}
    # What a response's body does not write otherwise is a chat completion's.
    chat, own = (schemas[model.__name__]["properties"] for model in (ChatCompletionRequest, ResponsesRequest))
    own |= {name: schema for name, schema in chat.items() if name not in own}
    for model in (StreamChatRequest, StreamCompletionRequest, TokenizeChatRequest, TokenizeCompletionRequest):
        properties = schemas[model.__name__]["properties"]
        # Every native stream streams, and what is tokenized never does, whatever these say.
        del properties["stream"], properties["stream_options"]
        schemas[model.__name__]["allOf"].remove(STREAM_OPTIONS_RULE)
    for model in (StreamChatRequest, StreamCompletionRequest):
        schemas[model.__name__]["properties"]["n"] = {"enum": [1, None]}
    for kind in schemas[StreamCompletionRequest.__name__]["properties"]["prompt"]["anyOf"]:
        if kind["type"] == "array" and kind["items"]["type"] != "integer":
            kind["maxItems"] = 1
    return schemas


def _ref(type: type[Any]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{type.__name__}"}


def _answer(description: str, content: Mapping[str, Any], *, has_id: bool = True) -> dict[str, Any]:
    """A Response Object with these schemas by content type; `has_id` where an endpoint makes it."""
    answer: dict[str, Any] = {"description": description}
    if has_id:
        answer["headers"] = {"x-request-id": _header("string", is_required=True)}
    if content:
        answer["content"] = {media_type: {"schema": schema} for media_type, schema in content.items()}
    return answer


def _json(description: str, type: type[Any], *, has_id: bool = True) -> dict[str, Any]:
    return _answer(description, {"application/json": _ref(type)}, has_id=has_id)


def _header(type: str, *, is_required: bool) -> dict[str, Any]:
    return {"required": is_required, "schema": {"type": type}}


def _error_form(path: str) -> type[Any]:
    if is_anthropic(path):
        return answers.AnthropicErrorEnvelope
    return answers.OllamaError if is_ollama(path) else answers.ErrorEnvelope


def _refusal(status: int, form: type[Any]) -> dict[str, Any]:
    # Whose head is too large has not been asked where it wants to go.
    refusal = _json(_REFUSALS[status], answers.ErrorEnvelope if status == 431 else form, has_id=status != 500)
    if status in (429, 503):  # an engine that has ended does not come back
        refusal["headers"]["retry-after"] = _header("integer", is_required=status == 429)
    if status == 307:
        refusal["headers"]["location"] = _header("string", is_required=True)
    return refusal


def _probe(type: type[Any]) -> dict[int, dict[str, Any]]:
    return {200: _json("It is.", type, has_id=False), 503: _json("It is not.", type, has_id=False)}


def _json_text(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}


def _event(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields)}


def _completion(whole: type[Any], chunk: type[Any]) -> dict[str, Any]:
    """What a generation route answers: all at once, or where `stream` is true chunks and `[DONE]`."""
    data = {"anyOf": [{"const": "[DONE]"}, _json_text({"anyOf": [_ref(chunk), _ref(answers.ErrorEnvelope)]})]}
    return _answer("The answer.", {"application/json": _ref(whole), "text/event-stream": _event(data=data)})


def _message_events() -> dict[str, Any]:
    types = (
        answers.MessageStart,
        answers.ContentBlockStart,
        answers.ContentBlockDelta,
        answers.ContentBlockStop,
        answers.MessageDelta,
        answers.MessageStop,
        answers.Ping,
        answers.AnthropicErrorEnvelope,
    )
    return _event(event={"type": "string"}, data=_json_text({"anyOf": [_ref(type) for type in types]}))


def _response_events() -> dict[str, Any]:
    return _event(event={"type": "string"}, data=_json_text({"anyOf": [_ref(type) for type in _RESPONSE_EVENTS]}))


def _lines(type: type[Any]) -> dict[str, Any]:
    """What Ollama's generation routes answer: a line of JSON for each part, or all at once."""
    line = {"anyOf": [_ref(type), _ref(answers.OllamaError)]}
    return _answer("The answer.", {"application/json": _ref(type), "application/x-ndjson": line})


def _native_events() -> dict[str, Any]:
    types = {
        "queued": answers.Queued,
        "token": answers.Token,
        "done": answers.Done,
        "error": answers.ErrorEnvelope,
        "interrupted": answers.Interrupted,
    }
    id = {"type": "string", "pattern": f"^{_STREAM_ID}:{_PLACE}$"}
    events = [_event(event={"const": name}, id=id, data=_json_text(_ref(type))) for name, type in types.items()]
    return {"oneOf": events}


def _body(model: type[BaseModel], example: Any) -> dict[str, dict[str, Any]]:
    return {"application/json": {"schema": _ref(model), "example": example}}


def _body_of_either(chat: type[BaseModel], completion: type[BaseModel], example: Any) -> dict[str, dict[str, Any]]:
    """A conversation or a prompt, and not both."""
    one_of = [
        {**_ref(chat), "properties": {"prompt": {"type": "null"}}},
        {**_ref(completion), "properties": {"messages": {"type": "null"}}},
    ]
    return {"application/json": {"schema": {"oneOf": one_of}, "example": example}}


def _form(properties: Mapping[str, Any]) -> dict[str, Any]:
    """A form's file and its fields, which cannot be null."""
    fields = {name: schema["anyOf"][0] for name, schema in properties.items()}
    file = {"type": "string", "format": "binary"}
    return {"type": "object", "properties": {**fields, "image": file}, "required": ["image"]}


def _query(properties: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A native stream's fields as parameters: texts as they stand, the others as JSON."""
    for name, schema in properties.items():
        if name in UNSUPPORTED or name in StreamCompletionRequest.unsupported:
            continue
        parameter: dict[str, Any] = {"name": name, "in": "query"}
        if name in QUERY_TEXTS or name == "stop":
            type = "string" if name in QUERY_TEXTS else "array"
            [parameter["schema"]] = [kind for kind in schema["anyOf"] if kind.get("type") == type][:1]
        else:
            parameter["content"] = {"application/json": {"schema": schema}}
        yield parameter


def _plain_query(model: type[BaseModel], schemas: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A model's fields as parameters that cannot be null."""
    for name, schema in schemas[model.__name__]["properties"].items():
        [kind] = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
        yield {"name": name, "in": "query", "schema": kind}


def _response_operations(schemas: Mapping[str, Any]) -> Iterator[_Operation]:
    path = "/v1/responses/{id}"
    names = ("retrieve_response", "delete_response", "cancel_response", "response_input_items")
    links = {name: {"operationId": name, "parameters": {"id": "$response.body#/id"}} for name in names}
    media_types = {"application/json": _ref(answers.ModelResponse), "text/event-stream": _response_events()}
    id = {"type": "string", "pattern": f"^resp_{_STREAM_ID}$"}
    named: list[dict[str, Any]] = [{"name": "id", "in": "path", "required": True, "schema": id}]
    yield _Operation(
        "post",
        "/v1/responses",
        "create_response",
        "Answer a conversation, which can be continued later and read again",
        {200: {**_answer("The response, or its events.", media_types), "links": links}},
        (404, 413, 415, 421, 422, 429, 504),
        _body(ResponsesRequest, {"input": "Hello", "max_output_tokens": 8}),
        _GENERATING,
    )
    yield _Operation(
        "get",
        path,
        names[0],
        "A response as it stands, or all its events behind one of them",
        {200: _answer("The response, or its events.", media_types)},
        (404, *_ELSEWHERE),
        parameters=[*named, *_plain_query(RetrieveQuery, schemas)],
    )
    deleted = {200: _json("It is deleted.", answers.DeletedResponse)}
    yield _Operation("delete", path, names[1], "End a response and forget it", deleted, (404, 421), parameters=named)
    yield _Operation(
        "post",
        f"{path}/cancel",
        names[2],
        "End a response that runs in the background",
        {200: _json("The response.", answers.ModelResponse)},
        (404, 413, 415, 421),
        parameters=named,
    )
    yield _Operation(
        "get",
        f"{path}/input_items",
        names[3],
        "The conversation that a response answers",
        {200: _json("A page of its items.", answers.ResponseItems)},
        (404, *_ELSEWHERE),
        parameters=[*named, *_plain_query(ItemsQuery, schemas)],
    )


def _operations(schemas: Mapping[str, Any]) -> Iterator[_Operation]:
    yield _Operation("get", "/health", "health", "Whether the server is alive", _probe(answers.Health))
    yield _Operation("get", "/ready", "ready", "Whether the server is ready", _probe(answers.Status))
    yield _Operation("get", "/health_generate", "health_generate", "The same by SGLang's name", _probe(answers.Status))
    metrics = _answer("The metrics.", {"text/plain": {"type": "string"}}, has_id=False)
    yield _Operation("get", "/metrics", "metrics", "Metrics in Prometheus' format", {200: metrics})
    yield _Operation("get", "/metrics/load", "load_metrics", "Those of them that routers read", {200: metrics})
    load = _answer("The load.", {"application/json": {"type": "array", "items": _ref(answers.RankLoad)}}, has_id=False)
    yield _Operation("get", "/get_load", "get_load", "How much there is to do, in SGLang's form", {200: load})
    loads = _json("The load.", answers.RankLoads, has_id=False)
    yield _Operation("get", "/v1/loads", "loads", "The same in its newer form", {200: loads})
    for path in ("/server_info", "/get_server_info"):
        server = _json("The server.", answers.ServerInfo, has_id=False)
        yield _Operation("get", path, path[1:], "What this server is, in SGLang's form", {200: server})
    trace = _answer("The trace.", {"application/gzip": {"type": "string", "format": "binary"}})
    yield _Operation(
        "post",
        "/admin/profile",
        "profile",
        "A trace of the engine's next steps, for Perfetto",
        {200: trace},
        (409, 413, 415, 504),
        _body(ProfileRequest, {"steps": 20, "timeout": 0.1}),
    )
    stacks = _answer("The stacks.", {"text/plain": {"type": "string"}})
    yield _Operation("get", "/admin/stacks", "stacks", "What all threads and tasks are at", {200: stacks})
    states = {200: _json("The requests.", answers.RequestStates)}
    yield _Operation("get", "/admin/requests", "requests", "How every request stands", states)
    document = _answer("The document.", {"application/json": {"type": "object"}}, has_id=False)
    yield _Operation("get", "/openapi.json", "openapi", "This document", {200: document})
    models = _json("The models.", answers.ModelList, has_id=False)
    yield _Operation("get", "/v1/models", "models", "What is served here", {200: models})
    yield _Operation(
        "get",
        "/v1/models/{id}",
        "model",
        "One of the models",
        {200: _json("The model.", answers.Model)},
        (404,),
        parameters=[{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}],
    )
    version = _json("The version.", answers.Version, has_id=False)
    yield _Operation("get", "/version", "version", "The version of this server", {200: version})

    refusals = (404, 413, 415, 429, 504)
    yield _Operation(
        "post",
        "/v1/chat/completions",
        "chat_completions",
        "Answer a conversation",
        {200: _completion(answers.ChatCompletion, answers.ChatCompletionChunk)},
        (*refusals, 422),
        _body(ChatCompletionRequest, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}),
        _GENERATING,
    )
    yield _Operation(
        "post",
        "/v1/completions",
        "completions",
        "Complete texts",
        {200: _completion(answers.Completion, answers.CompletionChunk)},
        (*refusals, 422),
        _body(CompletionRequest, {"prompt": "Once upon a time", "max_tokens": 8}),
        _GENERATING,
    )
    yield from _response_operations(schemas)
    yield _Operation(
        "post",
        "/tokenize",
        "tokenize",
        "The tokens of a text or of a conversation",
        {200: _json("The tokens.", answers.Tokens)},
        (404, 413, 415, 429),
        _body_of_either(TokenizeChatRequest, TokenizeCompletionRequest, {"prompt": "Once upon a time"}),
    )
    yield _Operation(
        "post",
        "/detokenize",
        "detokenize",
        "The text of tokens",
        {200: _json("The text.", answers.Text)},
        (404, 413, 415, 429),
        _body(DetokenizeRequest, {"tokens": [1, 2, 3]}),
    )
    yield _Operation(
        "post",
        "/v1/messages",
        "messages",
        "Answer a conversation, in Anthropic's form",
        {
            200: _answer(
                "The answer.",
                {"application/json": _ref(answers.AnthropicMessage), "text/event-stream": _message_events()},
            )
        },
        (*refusals, 422),
        _body(MessagesRequest, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}),
        _GENERATING,
    )
    yield _Operation(
        "post",
        "/v1/messages/count_tokens",
        "count_message_tokens",
        "How many tokens a conversation has, in Anthropic's form",
        {200: _json("The number.", answers.TokenCount)},
        (404, 413, 415, 429),
        _body(CountTokensRequest, {"messages": [{"role": "user", "content": "Hello"}]}),
    )
    ollama_example = {"options": {"num_predict": 8}}
    yield _Operation(
        "post",
        "/api/chat",
        "ollama_chat",
        "Answer a conversation, in Ollama's form",
        {200: _lines(answers.OllamaChatAnswer)},
        (*refusals, 422),
        _body(OllamaChatRequest, {**ollama_example, "messages": [{"role": "user", "content": "Hello"}]}),
        _GENERATING,
    )
    yield _Operation(
        "post",
        "/api/generate",
        "ollama_generate",
        "Answer a prompt, in Ollama's form",
        {200: _lines(answers.OllamaGenerateAnswer)},
        (*refusals, 422),
        _body(OllamaGenerateRequest, {**ollama_example, "prompt": "Hello"}),
        _GENERATING,
    )
    yield _Operation(
        "post",
        "/api/show",
        "ollama_show",
        "What a model is and can, in Ollama's form",
        {200: _json("The model.", answers.OllamaShownModel)},
        (404, 413, 415),
        _body(ShowRequest, {}),
    )
    for path, type, summary in (
        ("/api/tags", answers.OllamaModels, "What is served here, in Ollama's form"),
        ("/api/ps", answers.OllamaRunningModels, "What is loaded, in Ollama's form"),
        ("/api/version", answers.OllamaVersion, "The version of Ollama's API that is spoken here"),
    ):
        answer = _json(f"{summary}.", type, has_id=False)
        yield _Operation("get", path, path[1:].replace("/", "_"), summary, {200: answer})
    yield _Operation(
        "post",
        "/v1/embeddings",
        "embeddings",
        "Embed texts",
        {200: _json("A vector for each input.", answers.EmbeddingList)},
        refusals,
        _body(EmbeddingRequest, {"input": ["a river", "a mill"]}),
    )
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        yield _Operation(
            "post",
            path,
            path[1:].replace("/", "_"),
            "Rank documents by how well they answer a query",
            {200: _json("The documents, best first.", answers.Ranking)},
            refusals,
            _body(RerankRequest, {"query": "river", "documents": ["a river", "a mill"]}),
        )
    for path in ("/v1/score", "/score"):
        yield _Operation(
            "post",
            path,
            path[1:].replace("/", "_"),
            "Score pairs of texts",
            {200: _json("A score for each pair.", answers.ScoreList)},
            refusals,
            _body(ScoreRequest, {"text_1": "river", "text_2": ["a river", "a mill"]}),
        )
    form = _form(schemas[ClassifyForm.__name__]["properties"])
    yield _Operation(
        "post",
        "/v1/classify",
        "classify",
        "Classify an image",
        {200: _json("The labels, likeliest first.", answers.Classification)},
        refusals,
        _body(ClassifyRequest, {"image": _PNG}) | {"multipart/form-data": {"schema": form}},
    )

    stream_id = {"type": "string", "pattern": f"^{_STREAM_ID}$"}
    named = [{"name": "id", "in": "path", "required": True, "schema": stream_id}]
    cursor = {"type": "string", "pattern": f"^(({_STREAM_ID}:)?{_PLACE})?$"}
    resumed: list[dict[str, Any]] = [
        {"name": "Last-Event-ID", "in": "header", "schema": cursor},
        {"name": "last_event_id", "in": "query", "schema": cursor},
    ]
    read = {
        200: _answer("The events after that one.", {"text/event-stream": _native_events()}),
        204: _answer("There are no more, and an EventSource stops.", {}),
    }
    yield _Operation(
        "get",
        "/v1/stream",
        "stream",
        "Start a native stream and read it, or read on behind the last event that was seen",
        read,
        (404, 406, 410, *_ELSEWHERE),
        parameters=[*resumed, *_query(schemas[StreamCompletionRequest.__name__]["properties"])],
    )
    yield _Operation(
        "post",
        "/v1/stream/tickets",
        "create_ticket",
        "A ticket, which stands for the key on GET /v1/stream",
        {201: _json("The ticket.", answers.Ticket, has_id=False)},
    )
    names = ("stream_snapshot", "cancel_stream", "stream_events")
    links = {name: {"operationId": name, "parameters": {"id": "$response.body#/id"}} for name in names}
    yield _Operation(
        "post",
        "/v1/streams",
        "create_stream",
        "Start a native stream that answers a conversation or completes a text",
        {201: {**_json("Where it is read.", answers.StreamCreated), "links": links}},
        (404, 413, 415, 422, 429),
        _body_of_either(StreamChatRequest, StreamCompletionRequest, {"prompt": "Once upon a time", "max_tokens": 8}),
        _GENERATING,
    )
    snapshot = {200: _json("The stream.", answers.StreamSnapshot)}
    path = "/v1/streams/{id}"
    yield _Operation(
        "get", path, names[0], "What a stream has produced", snapshot, (404, 410, *_ELSEWHERE), parameters=named
    )
    yield _Operation("delete", path, names[1], "End a stream", snapshot, (404, 410, 421), parameters=named)
    yield _Operation(
        "get",
        f"{path}/events",
        names[2],
        "Read a stream from its beginning, or on behind the last event that was seen",
        read,
        (404, 410, *_ELSEWHERE),
        parameters=[*named, *resumed],
    )
