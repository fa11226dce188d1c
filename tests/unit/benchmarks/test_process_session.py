"""ProcessSession: what of /proc is read, and that a session's processes are all reached."""

import os
import signal
import subprocess
import sys
import time

from headrace.benchmarks.process_session import ProcessSession, ProcessStat

STAT = "41 (a (b) c) S 40 39 38 0 -1 4194560 1 2 3 4 150 50 25 75 20 0 3 0 100 1000 10"
# The system counts in ticks of 10 ms, of which a start can take none.
CHILD = """
import signal, time
while time.process_time() < 0.1:
    pass
print("up", flush=True)
signal.pause()
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
child.wait()
"""


def test_a_stat_is_read_whatever_the_command_is_called() -> None:
    stat = ProcessStat.parse(STAT)
    assert (stat.pid, stat.state, stat.session) == (41, "S", 38)


def test_cpu_time_is_that_of_the_process_and_of_the_children_it_waited_for() -> None:
    assert ProcessStat.parse(STAT).cpu_s == 300 / os.sysconf("SC_CLK_TCK")


def test_a_signal_reaches_the_children_too() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        assert process.stdout is not None
        session = ProcessSession(process.pid)
        try:
            assert process.stdout.readline() == "up\n"
            assert len(session.members()) == 2
            assert session.cpu_s() > 0
        finally:
            session.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert process.stdout.read() == ""  # the child has let go of it
    # A process that ends lets go of its files some moments before it counts as ended.
    until = time.monotonic() + 10
    while session.members() and time.monotonic() < until:
        time.sleep(0.01)
    assert session.members() == []
    session.signal(signal.SIGKILL)  # of nobody
