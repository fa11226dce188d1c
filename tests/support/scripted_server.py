"""A real server on the fake model whose steps do what a prompt begins with: run it as a script, with flags of a server.

- hold: waits until the file that FAKE_RELEASE names is there.
- hang: never ends.
- die: ends the engine thread.
- slow: takes ten milliseconds.

FAKE_DESCRIPTORS is how many descriptors the process may have.
"""

import os
import resource
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

from fake_engine import FakeRunner, byte_tokenizer, make_scheduler
from headrace.scheduler.engine_core import LaunchedStep
from headrace.scheduler.model_source import ModelSource
from headrace.scheduler.scheduler import SchedulerOutput
from headrace.server import serve as serving
from headrace.server.model_details import ModelDetails
from headrace.server.settings import load_settings


class ScriptedRunner(FakeRunner):
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        for row in output.rows:
            match bytes(row.sequence.request.prompt_token_ids).split()[0]:
                case b"hold":
                    while not Path(os.environ["FAKE_RELEASE"]).exists():
                        time.sleep(0.01)
                case b"hang":
                    threading.Event().wait()
                case b"die":
                    raise SystemExit("as told")
                case b"slow":
                    time.sleep(0.01)
        return super().launch(output)


if __name__ == "__main__":
    if max_descriptors := os.environ.get("FAKE_DESCRIPTORS"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(max_descriptors) // 2, int(max_descriptors)))
    settings = load_settings([*sys.argv[1:], "--ttft-targets-s", "[1e6,1e6,1e6]"], {})
    source = ModelSource(Path(__file__).parent, "fake")  # files that a journal can know it by
    with patch.multiple(
        serving,
        resolve_model=lambda *_: source,
        _load_tokenizer=lambda *_: byte_tokenizer(),
        read_model_details=lambda _: ModelDetails(),
    ):
        sys.exit(serving.serve(settings, lambda: (make_scheduler(num_blocks=2048), ScriptedRunner())))
