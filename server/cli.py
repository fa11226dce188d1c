"""The `headrace` command: `serve` and `bench`."""

import signal
import sys
from collections.abc import Sequence

USAGE = """usage: headrace serve [MODEL] [--config FILE] [--port PORT ...]   serve a model; see headrace serve --help
       headrace bench [--url URL ...]                              measure a server; see headrace bench --help"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the process's exit code."""
    try:
        return _run(args)
    except KeyboardInterrupt:  # before a server or a measurement has taken the signal over
        return 128 + signal.SIGINT


def _run(args: Sequence[str] | None) -> int:
    command, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if command == "serve":
        from headrace.server.serve import serve
        from headrace.server.settings import SettingsError, load_settings

        try:
            settings = load_settings(rest)
        except SettingsError as error:
            print("\n".join(f"headrace: setting {line}" for line in str(error).splitlines()), file=sys.stderr)
            return 2
        return serve(settings)
    if command == "bench":
        from headrace.benchmarks.bench import main as bench

        return bench(rest)
    is_help = command in ("-h", "--help")
    print(
        USAGE if is_help else f"headrace: no command {command!r}\n{USAGE}", file=sys.stdout if is_help else sys.stderr
    )
    return 0 if is_help else 2
