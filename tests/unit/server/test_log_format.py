"""What a client sent is in no line of the server's own log, whatever failed; what the engine says of numbers is."""

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from headrace.server.log_format import LogFormatter, log_loop_error

SECRET = "my diary"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(LogFormatter())
    logging.getLogger().addHandler(handler)
    yield text
    logging.getLogger().removeHandler(handler)


def fail() -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise ExceptionGroup(SECRET, [ValueError(SECRET)]) from error


def test_a_fault_on_the_loop_is_logged_with_types_and_places(log: io.StringIO) -> None:
    try:
        fail()
    except ExceptionGroup:
        logging.getLogger("uvicorn.error").exception("a request failed")
    written = log.getvalue()
    assert SECRET not in written
    assert "a request failed" in written
    assert [name for name in ("KeyError", "ExceptionGroup", "ValueError") if name in written.split()] == [
        "KeyError",
        "ExceptionGroup",
        "ValueError",
    ]
    assert f'File "{__file__}"' in written
    assert "in fail" in written


def test_errors_that_cause_each_other_are_each_told_once(log: io.StringIO) -> None:
    first, second = KeyError(SECRET), ValueError(SECRET)
    first.__cause__, second.__cause__ = second, first
    logging.getLogger("headrace.server").error("failed", exc_info=first)
    assert SECRET not in log.getvalue()
    assert log.getvalue().split().count("KeyError") == log.getvalue().split().count("ValueError") == 1


def test_a_cause_that_was_hidden_stays_so(log: io.StringIO) -> None:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError:
            raise ValueError(SECRET) from None
    except ValueError:
        logging.getLogger("headrace.server").exception("failed")
    assert "KeyError" not in log.getvalue()
    assert "ValueError" in log.getvalue()


@pytest.mark.parametrize("name", ["headrace.scheduler.engine_core", "headrace.kernels.gpu_backend"])
def test_what_the_engine_says_is_kept(name: str, log: io.StringIO) -> None:
    try:
        raise MemoryError("tried to allocate 2.00 GiB")
    except MemoryError:
        logging.getLogger(name).exception("a step failed")
    assert "MemoryError: tried to allocate 2.00 GiB" in log.getvalue()


def test_a_task_that_nobody_waited_for_is_logged_likewise(log: io.StringIO) -> None:
    async def forget() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_error)

        async def read() -> None:
            raise ValueError(SECRET)

        task = loop.create_task(read())
        await asyncio.wait([task])
        del task

    asyncio.run(forget())
    assert SECRET not in log.getvalue()
    assert "a callback or a task of the event loop failed" in log.getvalue()
    assert "ValueError" in log.getvalue()
