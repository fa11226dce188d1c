"""Who writes and who reads the files in a folder of journals."""

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.server.journal import Journal, JournalError
from headrace.server.journal_folder import JournalFolder, mark_followed, read_rows
from recorded_streams import Recorder, token
from waiting import until

# Claims a file, says so, and waits to be killed.
CLAIMING = (
    "import sys; from pathlib import Path; from headrace.server.journal_folder import JournalFolder; "
    "claim = JournalFolder(Path(sys.argv[1]), 'alpha').claim_own(); print(claim.path.name, flush=True); "
    "sys.stdin.read()"
)


@pytest.fixture
def folder(tmp_path: Path) -> JournalFolder:
    return JournalFolder(tmp_path, "alpha")


def test_each_process_has_a_file_of_its_own_until_it_dies(tmp_path: Path) -> None:
    alpha, beta = JournalFolder(tmp_path, "alpha"), JournalFolder(tmp_path, "beta")
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1.db\n"
        first = tmp_path / "alpha" / "1.db"
        assert beta.claim(first) is None
        assert beta.holder_of(first) == "alpha"
        own = alpha.claim_own()
        assert own.path.name == "2.db"
        process.kill()
    taken = beta.claim(first)
    assert taken is not None
    assert beta.holder_of(first) == "beta"
    assert alpha.claim(first) is None
    taken.release()
    own.release()


def test_a_file_that_was_let_go_of_is_the_next_ones(folder: JournalFolder) -> None:
    first, second = folder.claim_own(), folder.claim_own()
    first.release()
    third = folder.claim_own()
    assert third.path == first.path
    for claim in (second, third):
        claim.release()


def test_a_file_that_is_discarded_leaves_nothing_and_may_be_made_again(folder: JournalFolder, tmp_path: Path) -> None:
    own = folder.claim_own()
    own.path.touch()
    own.discard()
    assert list(tmp_path.iterdir()) == []
    assert folder.claim(own.path) is None
    assert list(tmp_path.iterdir()) == []
    again = folder.claim_own()
    assert again.path == own.path
    again.release()


def test_a_lock_that_is_deleted_while_it_is_waited_for_is_no_claim(
    folder: JournalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, opened = folder.claim_own(), os.open

    def open_late(path: Path, *args: int) -> int:
        descriptor = opened(path, *args)
        monkeypatch.undo()
        first.discard()
        return descriptor

    monkeypatch.setattr("headrace.server.journal_folder.os.open", open_late)
    own = folder.claim_own()
    assert JournalFolder(folder.root, "beta").claim(own.path) is None, "it is seen to be held"
    own.release()


def test_the_writer_sees_who_follows_a_stream_and_no_longer_than_that(folder: JournalFolder) -> None:
    claim = folder.claim_own()
    assert not claim.is_followed("one")
    marks = [mark_followed(claim.path, ["one"])["one"] for _ in range(2)]
    for mark in marks:
        assert claim.is_followed("one")
        assert not claim.is_followed("two")
        os.close(mark)
    assert not claim.is_followed("one")
    claim.forget("one")
    claim.forget("two")
    assert [path.name for path in claim.path.parent.rglob("*") if path.is_file()] == ["1.lock"]
    claim.release()


def test_what_is_committed_is_read_while_more_is_written(tmp_path: Path, folder: JournalFolder) -> None:
    reader = JournalFolder(tmp_path, "beta")
    claim = folder.claim_own()
    recorder = Recorder(claim.path, claim=claim)
    assert reader.find("alpha", "one") is None
    recorder.accept(0, "one")
    found = reader.find("alpha", "one")
    assert found is not None
    path, head = found
    for i in range(3):
        recorder.publish(token(0, i))
        rows = read_rows(path, {"one": len(head) + i, "two": 0})
        assert {id: [position for position, _, _ in new] for id, new in rows.items()} == {"one": [len(head) + i]}
    assert reader.find("beta", "one") is None
    assert folder.find("alpha", "one") is None, "a process knows its own streams"
    recorder.journal.close()
    assert reader.find("alpha", "one") is not None
    again = reader.claim(path)
    assert again is not None, "let go of with the thread"
    again.release()


def test_erased_rows_leave_the_file_as_soon_as_nobody_reads(
    folder: JournalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.journal._ERASED_WITHIN_S", 0.02)
    monkeypatch.setattr("headrace.server.journal._LOCK_TIMEOUT_S", 0.02)
    claim = folder.claim_own()
    recorder = Recorder(claim.path, claim=claim)
    log = Path(f"{claim.path}-wal")
    recorder.accept(0, "one")
    db = sqlite3.connect(f"file:{claim.path}?mode=ro", uri=True, isolation_level=None)
    db.execute("BEGIN")
    db.execute('SELECT * FROM "one"').fetchall()
    recorder.journal.erase("one")
    recorder.accept(1, "two")
    until(lambda: recorder.journal._truncate_s is not None, "it waits")
    assert log.stat().st_size > 0
    db.close()
    until(lambda: log.stat().st_size == 0, "it is emptied")
    recorder.journal.close()


def test_a_journal_that_cannot_be_opened_lets_go_of_its_file(folder: JournalFolder) -> None:
    claim = folder.claim_own()
    claim.path.mkdir()
    with pytest.raises(JournalError, match="journal_dir: cannot open"):
        Journal(claim.path, "never", "model", claim)
    again = folder.claim(claim.path)
    assert again is not None
    again.release()


def test_who_cannot_write_its_name_holds_no_file(folder: JournalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patches:
        patches.setattr("os.pwrite", fail)
        with pytest.raises(OSError, match="no space"):
            folder.claim_own()
    claim = folder.claim_own()
    assert claim.path.name == "1.db"
    claim.release()
