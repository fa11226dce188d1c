"""The journal's file: what is written is read, whatever happens to it in between."""

import logging
import os
import random
import resource
import sqlite3
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from headrace.scheduler.messages import (
    FinishReason,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)
from headrace.server.journal import Fsync, Journal, JournalError
from recorded_streams import PROMPT, RECIPE, crash, finished, record_of, recorder, token
from waiting import until

LOGPROBS = (TokenLogprobs(7, -0.1234567890123, ((7, -0.5), (8, -1.5))),)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("_ERASED_WITHIN_S", "_LOCK_TIMEOUT_S"):
        monkeypatch.setattr(f"headrace.server.journal.{name}", 0.05)
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal" / "streams.db"


def outputs_of(journal_path: Path, id: str) -> list[SequenceOutput | None]:
    with recorder(journal_path) as later:
        return [output for s in later.read().streams if s.record.id == id for _, output in s.outputs]


@pytest.mark.parametrize("fsync", ["never", "checkpoint", "step"])
def test_what_is_recorded_is_what_a_later_process_reads(path: Path, fsync: Fsync) -> None:
    sampling = SamplingParams(
        seed=2**64 - 1, stop_token_ids=frozenset({3, 1}), logit_bias=((5, 0.25),), num_prompt_logprobs=2
    )
    recipe = replace(
        RECIPE,
        sampling=sampling,
        stop_strings=("a\ud800", "é"),
        echo="\ud83d pröm\0pt",
        kept_token_ids=(9, 8),
        tells_token_ids=True,
    )
    outputs = (
        SequenceOutput(4, scheduled_s=1.5, num_cached_tokens=16, prompt_logprobs=(TokenLogprobs(1), *LOGPROBS)),
        token(4, 7, logprobs=LOGPROBS),
        token(4, 8, finish_reason=FinishReason.ERROR, error="it broke"),
    )
    with recorder(path, fsync) as first:
        first.accept(4, "one", tenant="alice", recipe=recipe)
        for output in outputs:
            first.publish(token(99, 1), output)
    with recorder(path, fsync) as later:
        [stream] = later.read().streams
    assert replace(stream.record, received_s=1.0, submitted_s=2.0) == record_of("one", tenant="alice", recipe=recipe)
    assert stream.record.received_s == pytest.approx(1.0, abs=0.5)
    read = [output for _, output in stream.outputs if output is not None]
    assert read[0].scheduled_s == pytest.approx(1.5, abs=0.5)
    read[0] = read[0]._replace(scheduled_s=1.5)
    assert [output._replace(request_id=4) for output in read] == list(outputs)


def test_everything_goes_on_in_order_whether_it_is_recorded_or_not(path: Path) -> None:
    with recorder(path) as recording:
        recording.accept(1, "one")
        passed: list[int] = []
        for i in range(50):
            recording.journal.record([token(i % 2, i)], partial(passed.append, i))
        recording.read()
        assert passed == list(range(50))


def test_nothing_goes_on_that_a_crash_would_lose(path: Path, tmp_path: Path) -> None:
    with recorder(path) as recording:
        recording.accept(0, "one")
        for i in range(3):
            recording.publish(token(0, i))
            copy = crash(path, tmp_path / f"crash{i}")
            assert outputs_of(copy, "one") == [token(-1, j) for j in range(i + 1)]


def test_what_follows_an_end_is_not_recorded(path: Path) -> None:
    with recorder(path) as recording:
        for request_id, id in enumerate(("by the engine", "by a client")):
            recording.accept(request_id, id)
            recording.publish(token(request_id, 1))
        recording.publish(finished(0))
        recording.publish(SequenceOutput(1, finish_reason=FinishReason.CANCELLED))
        recording.publish(token(0, 2), token(1, 2))
    assert outputs_of(path, "by the engine") == [token(-1, 1), finished(-1)]
    assert outputs_of(path, "by a client") == [
        token(-1, 1),
        SequenceOutput(-1, finish_reason=FinishReason.CANCELLED),
    ]


def test_nothing_is_recorded_or_erased_once_it_is_suspended(path: Path) -> None:
    with recorder(path) as recording:
        recording.accept(0, "interrupted")
        recording.publish(token(0, 1))
        recording.journal.suspend()
        recording.publish(token(0, 2), finished(0))
        recording.accept(1, "late")
        recording.journal.erase("interrupted")
    with recorder(path) as later:
        assert [stream.record.id for stream in later.read().streams] == ["interrupted"]
    assert outputs_of(path, "interrupted") == [token(-1, 1)]


def test_a_resumed_stream_goes_on_behind_what_there_was(path: Path) -> None:
    with recorder(path) as first:
        first.accept(5, "one")
        first.publish(token(5, 1))
    with recorder(path) as second:
        second.do(second.journal.resume, {0: "one"})
        second.publish(token(0, 2))
        second.accept(1, "two")
    assert outputs_of(path, "one") == [token(-1, 1), None, token(-1, 2)]
    assert outputs_of(path, "two") == []


def test_a_second_server_is_refused_the_file(path: Path) -> None:
    with recorder(path), pytest.raises(JournalError, match="another server uses it"):
        Journal(path, "never", "model")
    with recorder(path):
        pass


def test_a_file_that_cannot_be_opened_is_an_error_that_names_it(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "no" / "such" / "folder"):
        with pytest.raises(JournalError, match="journal_file: cannot open"):
            Journal(wrong, "never", "model")


def test_nobody_else_can_read_its_files(path: Path) -> None:
    path.touch(0o644)
    with recorder(path) as recording:
        recording.accept(0, "one")
        files = list(path.parent.iterdir())
        assert len(files) > 1
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_nor_can_they_read_what_a_process_with_looser_files_left(path: Path, tmp_path: Path) -> None:
    with recorder(path) as recording:
        recording.accept(0, "one")
        copy = crash(path, tmp_path / "copy")
    for file in copy.parent.iterdir():
        file.chmod(0o644)
    with recorder(copy):
        files = list(copy.parent.iterdir())
        assert len(files) > 1
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_behind_a_link_its_files_are_where_the_link_leads_and_all_of_them_are_deleted(
    path: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "r.db"
    path.symlink_to(real)
    with recorder(path) as recording:
        recording.accept(0, "one")
        assert {file.name for file in real.parent.iterdir()} == {"r.db", "r.db-wal"}
        with no_file_beyond(1):
            recording.publish(token(0, 1))
        assert not recording.journal.is_active
        assert list(real.parent.iterdir()) == []
        assert list(path.parent.iterdir()) == [path]


def test_it_tells_since_when_it_has_been_at_what_it_writes_and_is_not_waited_for_beyond_a_bound(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.journal._CLOSE_TIMEOUT_S", 0.01)
    journal, disk_answers = Journal(path, "never", "model"), threading.Event()
    assert journal.busy_since_s is None
    journal._put(lambda db: disk_answers.wait())  # type: ignore[arg-type]
    until(lambda: journal.busy_since_s is not None, "it writes")
    since_s = journal.busy_since_s
    journal.close()
    assert journal.has_thread
    assert journal.busy_since_s == since_s
    disk_answers.set()
    until(lambda: not journal.has_thread, "it has ended")
    assert journal.busy_since_s is None


def test_what_was_taken_up_in_vain_is_counted_from_its_last_token_on(path: Path) -> None:
    with recorder(path) as recording:
        recording.accept(0, "one")
        for num_tokens in (1, 0, 0):
            recording.do(recording.journal.resume, {0: "one"})
            recording.publish(SequenceOutput(0, (7,) * num_tokens, scheduled_s=1.0))  # of a chunk of its prompt
    with recorder(path) as later:
        [stream] = later.read().streams
        assert stream.num_vain_restarts == 2


def test_streams_of_another_model_are_gone(path: Path) -> None:
    with recorder(path) as first:
        first.accept(0, "one", tenant="alice")
    with recorder(path, model="other") as later:
        recording = later.read()
        assert (recording.streams, [each.record.tenant for each in recording.others]) == ((), ["alice"])


def test_what_is_erased_is_in_no_file_soon(path: Path) -> None:
    marks = [f"mark-{i}-".encode() * 2 for i in range(60)]
    order = random.Random(1)

    def found() -> list[bytes]:
        content = b"".join(file.read_bytes() for file in path.parent.iterdir())
        return [mark for mark in marks if mark in content]

    with recorder(path) as recording:
        for i, mark in enumerate(marks):
            prompt = (i, *PROMPT * order.randrange(1, 12))
            marks[i] = array("q", prompt).tobytes()[:48]
            recipe = replace(RECIPE, prompt_token_ids=prompt, echo=mark.decode(), stop_strings=(mark.decode() * 3,))
            recording.accept(i, str(i), recipe=recipe)
        marks += [f"mark-{i}-".encode() * 2 for i in range(60)]
        for _ in range(20):
            ends = {i: str(order.randrange(10**9)) for i in range(60)}
            recording.publish(*(token(i, int(end), error=f"mark-{i}-" * 2) for i, end in ends.items()))
        assert len(found()) == len(marks) == 120
        alive = set(range(60))
        while alive:
            erased = order.sample(sorted(alive), min(20, len(alive)))
            alive -= set(erased)
            for i in erased:
                recording.journal.erase(str(i))
            left = {marks[i] for i in alive} | {marks[60 + i] for i in alive}
            until(lambda left=left: set(found()) == left, "all of it is gone", 5)  # type: ignore[misc]


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    """As on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_it_cannot_write_it_leaves_no_file_and_passes_everything_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passed: list[int] = []
    with recorder(path) as recording:
        recording.accept(0, "one")
        with no_file_beyond(100_000):
            for i in range(200):
                recording.journal.record([token(0, 1, error="x" * 1000)], partial(passed.append, i))
            recording.accept(1, "two")
        recording.publish(token(1, 2))
        recording.journal.erase("one")
        recording.do(recording.journal.resume, {7: "one"})
        assert not recording.journal.is_active
        assert passed == list(range(200))
        assert list(path.parent.iterdir()) == []
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert outputs_of(path, "one") == []


def test_a_disk_that_is_full_at_the_start_is_an_error_that_costs_no_stream(path: Path, tmp_path: Path) -> None:
    with recorder(path) as recording:
        for i in range(3):
            recording.accept(i, f"s{i}")
        recording.publish(*(token(i, i) for i in range(3)))
        copy = crash(path, tmp_path / "copy")
    with no_file_beyond(copy.stat().st_size), pytest.raises(JournalError, match="cannot open"):
        Journal(copy, "never", "model")
    with recorder(copy) as later:
        recording_found = later.read()
    assert [(stream.record.id, len(stream.outputs)) for stream in recording_found.streams] == [
        ("s0", 1),
        ("s1", 1),
        ("s2", 1),
    ]
    assert [file.name for file in copy.parent.iterdir()] == [copy.name]


def make_sample(path: Path, num_streams: int = 4, num_tokens: int = 12) -> None:
    with recorder(path) as recording:
        for i in range(num_streams):
            recording.accept(i, f"s{i}")
        for n in range(num_tokens):
            recording.publish(*(token(i, 100 * i + n) for i in range(num_streams)))


def check_prefixes(path: Path, num_tokens: int = 12) -> int:
    """Read a damaged journal, and record something in it; returns how many streams it has kept."""
    with recorder(path) as later:
        recording = later.read()
        for stream in recording.streams:
            i = int(stream.record.id[1:])
            outputs = [output for _, output in stream.outputs]
            assert outputs == [token(-1, 100 * i + n) for n in range(num_tokens)][: len(outputs)]
            assert stream.record.recipe == RECIPE
            assert stream.record.id not in recording.unreadable
        later.accept(50, "new")
        later.publish(token(50, 1))
        assert later.journal.is_active
    assert outputs_of(path, "new") == [token(-1, 1)]
    return len(recording.streams)


@pytest.mark.parametrize("name", ["streams.db", "streams.db-wal"])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_damaged_file_costs_streams_or_their_last_tokens_and_never_the_start(
    tmp_path: Path, path: Path, name: str, has_checkpoint: bool
) -> None:
    with recorder(path) as recording:
        for i in range(4):
            recording.accept(i, f"s{i}")
        for n in range(12):
            recording.publish(*(token(i, 100 * i + n) for i in range(4)))
            if n == 8 and has_checkpoint:  # which an erasure asks for
                recording.journal.erase("nothing")
                recording.accept(9, "s9")
                recording.journal.erase("s9")
                until(lambda: path.with_name("streams.db-wal").stat().st_size == 0, "a checkpoint")
        copy = crash(path, tmp_path / "copy")
    content = (copy.parent / name).read_bytes()
    rng = random.Random(f"{name} {has_checkpoint}")
    num_kept = []
    for case in range(24):
        at = rng.randrange(len(content))
        broken = content[:at] if case % 3 == 0 else content[:at] + rng.randbytes(rng.choice([1, 64, 2000]))
        if case % 3:
            broken += content[len(broken) :]
        folder = tmp_path / str(case)
        folder.mkdir()
        for file in copy.parent.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_bytes(broken)
        num_kept.append(check_prefixes(folder / copy.name))
    assert max(num_kept) == 4


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM s1 WHERE position = 5",
        "UPDATE s1 SET body = replace(body, '103', '104') WHERE position = 5",
        "UPDATE s1 SET body = NULL WHERE position = 2",
        "UPDATE s1 SET body = replace(body, '600', '900') WHERE position = 0",
        "UPDATE s1 SET body = zeroblob(320) WHERE position = 1",
        "UPDATE s1 SET crc = NULL",
        "UPDATE s1 SET position = position + 1 WHERE position = 13",
        "DELETE FROM s1",
        "DROP TABLE s1; ALTER TABLE s2 RENAME TO s1",
    ],
)
def test_a_stream_with_a_missing_or_a_changed_row_is_gone_and_the_others_are_not(path: Path, change: str) -> None:
    make_sample(path)
    db = sqlite3.connect(path)
    db.executescript(change)
    db.close()
    with recorder(path) as later:
        recording = later.read()
        assert {"s0", "s3"} <= {stream.record.id for stream in recording.streams}
        assert recording.unreadable == ("s1",)


def test_a_file_of_something_else_is_put_aside_and_kept_however_often_that_is(path: Path) -> None:
    for number in (1, 2):
        path.write_bytes(b"not a database %d\n" % number * 100)
        path.with_name("streams.db-wal").write_bytes(b"nor a log of one %d\n" % number)
        with recorder(path) as recording:
            recording.accept(0, "one")
        assert outputs_of(path, "one") == []
    for number in (1, 2):
        assert path.with_name(f"streams.db.damaged-{number}").read_bytes() == b"not a database %d\n" % number * 100
        assert path.with_name(f"streams.db.damaged-{number}-wal").read_bytes() == b"nor a log of one %d\n" % number
    assert len(os.listdir(path.parent)) == 5
