"""What every thread and every task on the event loop is at: files, lines and functions, and no value of any variable.

The event loop gathers frames, which is quick; a worker thread makes text of them, which reads source files. A task's
stack is the chain of what it awaits, down to what is no coroutine of Python's.
"""

import asyncio
import sys
import threading
import traceback
from collections import Counter
from types import FrameType
from typing import Any, NamedTuple

import anyio.lowlevel

# Tasks between two turns of the loop's others.
_TASKS_AT_ONCE = 50


class Frame(NamedTuple):
    file: str
    line: int
    function: str


Stack = tuple[Frame, ...]  # the innermost last


def thread_stacks() -> dict[str, Stack]:
    """By the thread's name and the system's number of it."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    stacks = {}
    for ident, frame in sys._current_frames().items():
        thread = threads.get(ident)
        name = f"thread {ident}" if thread is None else f"{thread.name} ({thread.native_id})"
        stacks[name] = tuple(_frame(each, line) for each, line in traceback.walk_stack(frame))[::-1]
    return stacks


async def task_stacks() -> Counter[Stack]:
    """How many of the running loop's tasks are at each place."""
    stacks: Counter[Stack] = Counter()
    for i, task in enumerate(asyncio.all_tasks()):
        if not task.done():
            stacks[_chain(task.get_coro())] += 1
        if i % _TASKS_AT_ONCE == 0:
            await anyio.lowlevel.checkpoint()
    return stacks


def as_text(threads: dict[str, Stack], tasks: Counter[Stack]) -> str:
    """Both as tracebacks, the innermost call last. Runs on a worker thread."""
    parts = [f"Thread {name}\n{_traceback(stack)}" for name, stack in threads.items()]
    parts += [f"{count} task{'s' if count > 1 else ''}\n{_traceback(stack)}" for stack, count in tasks.most_common()]
    return "\n".join(parts)


def _chain(awaited: Any) -> Stack:
    frames = []
    while awaited is not None:
        # Coroutines, generators and asynchronous generators have these under names of their own.
        frame = next((found for kind in ("cr", "gi", "ag") if (found := getattr(awaited, f"{kind}_frame", None))), None)
        if frame is None:
            break
        frames.append(_frame(frame, frame.f_lineno))
        names = ("cr_await", "gi_yieldfrom", "ag_await")
        awaited = next((found for name in names if (found := getattr(awaited, name, None)) is not None), None)
    return tuple(frames)


def _frame(frame: FrameType, line: int) -> Frame:
    return Frame(frame.f_code.co_filename, line, frame.f_code.co_qualname)


def _traceback(stack: Stack) -> str:
    return "".join(traceback.format_list([traceback.FrameSummary(*frame) for frame in stack]))
