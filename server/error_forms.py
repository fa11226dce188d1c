"""An error as the clients of each API read it: OpenAI's envelope, Anthropic's, or Ollama's bare text.

Which of them is told by the path alone, so that who refuses a request before its route is known, as a guard does, says
it in the form of its API too. Errors know nothing of this beyond OpenAI's.
Sources: Anthropic's API reference (errors); Ollama's.
"""

from typing import Any

from headrace.server.errors import ApiError

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_form(error: ApiError, path: str, id: str) -> Any:
    """The body that tells of `error` to who asked for `path`, in the request `id`."""
    if is_anthropic(path):
        return anthropic_form(error, id)
    return ollama_form(error) if is_ollama(path) else error.envelope()


def is_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def is_ollama(path: str) -> bool:
    return path.startswith("/api/")


def anthropic_form(error: ApiError, id: str) -> dict[str, Any]:
    other = "invalid_request_error" if error.status < 500 else "api_error"
    content = {"type": _ANTHROPIC_TYPES.get(error.status, other), "message": _full_message(error)}
    return {"type": "error", "error": content, "request_id": id}


def ollama_form(error: ApiError) -> dict[str, Any]:
    return {"error": _full_message(error)}


def _full_message(error: ApiError) -> str:
    """The message with the name of the field at fault, which has no place of its own in these forms."""
    if error.param is None or error.param in error.message:
        return error.message
    return f"{error.param}: {error.message}"
