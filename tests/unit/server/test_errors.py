"""Refusals as clients read them: OpenAI's envelope, and headers that say whether to come back."""

import inspect
from typing import Any

import pytest

from headrace.server import errors
from headrace.server.errors import (
    ApiError,
    BadRequestError,
    DeadlineError,
    JournalBusyError,
    OtherReplicaError,
    OverloadedError,
    RateLimitError,
    ShutdownError,
    UnavailableError,
    UpstreamError,
    retry_headers,
)

# An upstream's refusal has the upstream's own body.
CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, ApiError)]
ERRORS = [cls for cls in CLASSES if cls is not UpstreamError]


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_has_a_status_of_its_own_kind_and_all_four_fields(cls: type[ApiError]) -> None:
    assert 400 <= cls.status < 600
    made = (OverloadedError("", 1, code="queue_full", tier="batch"), OtherReplicaError("beta", None))
    error = next((error for error in made if type(error) is cls), None) or cls.__new__(cls)
    ApiError.__init__(error, "what is wrong", param="field")
    fields = {"message": "what is wrong", "type": cls.type, "param": "field", "code": error.code}
    further: dict[type[ApiError], dict[str, Any]] = {
        OverloadedError: {"tier": "batch"},
        ShutdownError: {"resumable": False},
        JournalBusyError: {"resumable": True},
        OtherReplicaError: {"replica": "beta", "url": None},
    }
    assert error.envelope() == {"error": fields | further.get(cls, {})}


def test_an_overload_tells_what_was_predicted_and_allowed_for_whom() -> None:
    error = OverloadedError(
        "too late", 2.5, code="predicted_too_late", tier="premium", predicted_ttft_s=3.00049, target_ttft_s=0.5
    )
    assert error.envelope()["error"] == {
        "message": "too late",
        "type": "overloaded_error",
        "param": None,
        "code": "predicted_too_late",
        "tier": "premium",
        "predicted_ttft_s": 3.0,
        "target_ttft_s": 0.5,
    }


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.001, ("1", "1")), (0.75, ("1", "750")), (1.6, ("2", "1600")), (120.0, ("120", "120000"))],
)
def test_when_to_come_back_is_told_in_both_spellings(seconds: float, expected: tuple[str, str]) -> None:
    assert retry_headers(seconds) == {"retry-after": expected[0], "retry-after-ms": expected[1]}
    overloaded = OverloadedError("full", seconds, code="queue_full", tier="standard")
    for error in (overloaded, RateLimitError("used up", seconds)):
        assert error.headers == retry_headers(seconds)
        assert error.retry_after_s == seconds
    assert UnavailableError("loading", "loading", seconds).headers == retry_headers(seconds)


def test_where_a_retry_cannot_help_clients_are_told_not_to() -> None:
    for error in (UnavailableError("dead", "engine_dead", None), DeadlineError("over")):
        assert error.headers == {"x-should-retry": "false"}
    assert BadRequestError("wrong").headers == {}
