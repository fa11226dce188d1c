"""What goes wrong before the first byte, each with its HTTP status and OpenAI's error envelope.

`raise` one of these anywhere under an endpoint; `endpoint.py` turns it into the response. After the first byte the same
envelope travels as an event of the stream. How other APIs say it is in `error_forms.py`.
"""

from typing import Any


class ApiError(Exception):
    """A refused request: `status`, and the fields of the envelope. `param` names the offending field."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None
    is_resumable = False  # the answer it interrupts another process goes on with

    def __init__(self, message: str, *, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = headers or {}

    def envelope(self) -> dict[str, Any]:
        return envelope(self.message, type=self.type, param=self.param, code=self.code)


class BadRequestError(ApiError):
    pass


class UnsupportedParameterError(ApiError):
    code = "unsupported_parameter"


class ContextLengthError(ApiError):
    code = "context_length_exceeded"


class UnauthorizedError(ApiError):
    """No key, or none that is known. Clients of OpenAI's look for this code."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class InvalidTicketError(UnauthorizedError):
    code = "invalid_ticket"


class ForbiddenError(ApiError):
    status = 403
    type = "permission_error"


class NotFoundError(ApiError):
    status = 404
    code = "not_found"


class PreviousResponseNotFoundError(NotFoundError):
    code = "previous_response_not_found"


class ModelNotFoundError(ApiError):
    status = 404
    code = "model_not_found"


class MethodNotAllowedError(ApiError):
    status = 405


class RoutingError(ApiError):
    """What the router refuses, with its own `status`: no such route, or not by this method."""

    def __init__(self, message: str, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.code = "not_found" if status == 404 else None
        super().__init__(message, headers=headers)


class NotAcceptableError(ApiError):
    status = 406


class ReceiveTimeoutError(ApiError):
    """The request took too long to arrive."""

    status = 408
    code = "receive_timeout"


class ConflictError(ApiError):
    """Something else is under way that this cannot be beside."""

    status = 409

    def __init__(self, message: str, code: str) -> None:
        self.code = code
        super().__init__(message)


class GoneError(ApiError):
    status = 410
    code = "gone"


class LostEventsError(ApiError):
    """A reader has seen what is no longer known."""

    status = 410
    code = "events_lost"


class OtherReplicaError(ApiError):
    """What is asked for another replica has, at the address `url` where clients may know it. With a `location` they
    are sent there, and ask the same again."""

    status = 421
    code = "other_replica"

    def __init__(self, replica: str, url: str | None, *, location: str | None = None, param: str | None = None) -> None:
        if location is not None:
            self.status = 307
        self.replica = replica
        self.url = url
        headers = {"cache-control": "no-store"} | ({} if location is None else {"location": location})
        super().__init__(f"this is the replica {replica}'s to answer", param=param, headers=headers)

    def envelope(self) -> dict[str, Any]:
        content = super().envelope()
        content["error"] |= {"replica": self.replica, "url": self.url}
        return content


class BodyTooLargeError(ApiError):
    status = 413
    code = "body_too_large"


class UnsupportedMediaTypeError(ApiError):
    status = 415


class IdempotencyKeyReusedError(ApiError):
    status = 422
    code = "idempotency_key_reused"


class OverloadedError(ApiError):
    """Too much waits already. `retry_after_s` becomes Retry-After, in both spellings clients read; `details` are
    further fields of the envelope: the tier, and the seconds that were predicted and allowed."""

    status = 429
    type = "overloaded_error"

    def __init__(self, message: str, retry_after_s: float, *, code: str, tier: str, **details: float) -> None:
        self.code = code
        self.retry_after_s = retry_after_s
        self.details = {"tier": tier, **{name: round(value, 3) for name, value in details.items()}}
        super().__init__(message, headers=retry_headers(retry_after_s))

    def envelope(self) -> dict[str, Any]:
        content = super().envelope()
        content["error"] |= self.details
        return content


class RateLimitError(ApiError):
    """The tenant has used up a limit of its key's. `retry_after_s` is when it has room again."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, headers=retry_headers(retry_after_s))


class UnavailableError(ApiError):
    """The server is loading, draining, or its engine has ended, where `retry_after_s` is None: a retry cannot help."""

    status = 503
    type = "unavailable_error"

    def __init__(self, message: str, code: str, retry_after_s: float | None = 1.0) -> None:
        self.code = code
        self.retry_after_s = retry_after_s
        headers = {"x-should-retry": "false"} if retry_after_s is None else retry_headers(retry_after_s)
        super().__init__(message, headers=headers)


class ShutdownError(UnavailableError):
    """The server ends before an answer does. Where it `is_resumable`, the next process goes on with it."""

    def __init__(self, *, is_resumable: bool) -> None:
        self.is_resumable = is_resumable
        super().__init__("the server is shutting down", "draining")

    def envelope(self) -> dict[str, Any]:
        content = super().envelope()
        content["error"]["resumable"] = self.is_resumable
        return content


class JournalBusyError(UnavailableError):
    """What another process has made can neither be read nor gone on with for now."""

    is_resumable = True

    def __init__(self) -> None:
        super().__init__("the replica's journal cannot be had for now", "journal_busy")

    def envelope(self) -> dict[str, Any]:
        content = super().envelope()
        content["error"]["resumable"] = self.is_resumable
        return content


class EngineFailedError(ApiError):
    """The engine could not compute the request."""

    status = 500
    type = "server_error"
    code = "engine_error"


class InternalError(ApiError):
    """A fault of this server's own. No detail: its text may hold a prompt or a path."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("internal server error")


class GrammarTooComplexError(ApiError):
    """What an answer's grammar allows at some point could not be found out within the limits."""

    code = "grammar_too_complex"


class DeadlineError(ApiError):
    """The request's time is over, so a retry would only ask for the same again."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})


def envelope(message: str, *, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; clients want all four fields present."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def retry_headers(retry_after_s: float) -> dict[str, str]:
    return {"retry-after": str(max(1, round(retry_after_s))), "retry-after-ms": str(round(retry_after_s * 1000))}


class BadGatewayError(ApiError):
    """The server behind this one cannot be reached, or its answer cannot be used."""

    status = 502
    type = "server_error"

    def __init__(self, message: str, code: str) -> None:
        self.code = code
        super().__init__(message)


class UpstreamError(ApiError):
    """What the server behind this one refused with: its own `status`, `body` and those headers that clients need."""

    def __init__(self, status: int, body: Any, headers: dict[str, str]) -> None:
        super().__init__(f"the upstream answered {status}", headers=headers)
        self.status = status
        self.body = body

    def envelope(self) -> Any:
        return self.body
