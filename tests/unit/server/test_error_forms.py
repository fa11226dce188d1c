"""Errors in the words of each API, told by the path alone."""

import pytest
from anthropic.types import ErrorResponse
from pydantic import ValidationError

from headrace.server.error_forms import error_form
from headrace.server.errors import (
    ApiError,
    BadRequestError,
    BodyTooLargeError,
    DeadlineError,
    EngineFailedError,
    ForbiddenError,
    InternalError,
    MethodNotAllowedError,
    ModelNotFoundError,
    OverloadedError,
    RateLimitError,
    RoutingError,
    ShutdownError,
    UnauthorizedError,
    UnavailableError,
    UnsupportedMediaTypeError,
)

TYPES: list[tuple[ApiError, str]] = [
    (BadRequestError("x"), "invalid_request_error"),
    (UnauthorizedError("x"), "authentication_error"),
    (ForbiddenError("x"), "permission_error"),
    (ModelNotFoundError("x"), "not_found_error"),
    (MethodNotAllowedError("x"), "invalid_request_error"),
    (UnsupportedMediaTypeError("x"), "invalid_request_error"),
    (OverloadedError("x", 1, code="queue_full", tier="standard"), "rate_limit_error"),
    (RateLimitError("x", 1), "rate_limit_error"),
    (InternalError(), "api_error"),
    (EngineFailedError("x"), "api_error"),
    (UnavailableError("x", "loading"), "overloaded_error"),
    (ShutdownError(is_resumable=False), "overloaded_error"),
    (DeadlineError("x"), "timeout_error"),
]


@pytest.mark.parametrize(("error", "type"), TYPES, ids=lambda value: type(value).__name__)
def test_anthropics_form_has_a_type_that_its_client_knows(error: ApiError, type: str) -> None:
    form = error_form(error, "/v1/messages", "some-id")
    assert form == {"type": "error", "error": {"type": type, "message": error.message}, "request_id": "some-id"}
    ErrorResponse.model_validate(form, strict=True)


def test_a_body_that_is_too_large_has_the_type_that_is_documented_though_the_client_does_not_know_it() -> None:
    form = error_form(BodyTooLargeError("x"), "/v1/messages", "")
    assert form["error"]["type"] == "request_too_large"
    with pytest.raises(ValidationError):
        ErrorResponse.model_validate(form, strict=True)


def test_where_the_field_at_fault_has_no_place_the_message_names_it() -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/api/chat"):
        for message in ("seed: is wrong", "`seed` is wrong"):
            assert message in str(error_form(BadRequestError(message, param="seed"), path, ""))
        assert "seed: it is wrong" in str(error_form(BadRequestError("it is wrong", param="seed"), path, ""))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages_of_another_kind", "/apis/x", "/", ""])
def test_all_other_paths_have_openais_envelope(path: str) -> None:
    error = RoutingError("x", 404, {})
    assert error_form(error, path, "") == error.envelope()
    assert (error.status, error.code) == (404, "not_found")


def test_ollamas_form_is_a_text() -> None:
    assert error_form(BadRequestError("x"), "/api/chat", "") == {"error": "x"}
