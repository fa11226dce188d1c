"""The `headrace` command: `serve`, `deploy`, `proxy`, `bench` and `create-key`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: headrace serve [MODEL] [--config FILE] [--port PORT ...]   serve a model; see headrace serve --help
       headrace deploy [MODEL] [--replicas N ...]                  serve replicas on Ray; see headrace deploy --help
       headrace proxy --upstream URL [--port PORT ...]             merge requests to a server; see headrace proxy --help
       headrace bench [--url URL ...]                              measure a server; see headrace bench --help
       headrace create-key NAME [--tier TIER] [--file FILE]        make an API key; see headrace create-key --help"""


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
            return _refuse_settings(error)
        return serve(settings)
    if command == "deploy":
        return _deploy(rest)
    if command == "proxy":
        from headrace.server.proxy import serve_proxy
        from headrace.server.proxy_settings import load_proxy_settings
        from headrace.server.settings import SettingsError

        try:
            proxy_settings = load_proxy_settings(rest)
        except SettingsError as error:
            return _refuse_settings(error)
        return serve_proxy(proxy_settings)
    if command == "bench":
        from headrace.benchmarks.bench import main as bench

        return bench(rest)
    if command == "create-key":
        return _create_key(rest)
    is_help = command in ("-h", "--help")
    print(
        USAGE if is_help else f"headrace: no command {command!r}\n{USAGE}", file=sys.stdout if is_help else sys.stderr
    )
    return 0 if is_help else 2


def _deploy(args: Sequence[str]) -> int:
    from headrace.server.deployment_settings import load_deployment_settings
    from headrace.server.settings import SettingsError

    try:
        settings = load_deployment_settings(args)
    except SettingsError as error:
        return _refuse_settings(error)
    try:
        from headrace.server.ray_serve import deploy
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        print("headrace: deploy needs Ray: pip install 'headrace[ray]'", file=sys.stderr)
        return 1
    return deploy(settings)


def _refuse_settings(error: Exception) -> int:
    print("\n".join(f"headrace: setting {line}" for line in str(error).splitlines()), file=sys.stderr)
    return 2


def _create_key(args: Sequence[str]) -> int:
    from headrace.server.api_keys import TIERS, ApiKeysError, append_key, create_key

    parser = argparse.ArgumentParser("headrace create-key", description="Make an API key and show it once.")
    parser.add_argument("name", help="whose it is: the tenant that owns what is done with it")
    parser.add_argument(
        "--tier", choices=TIERS, default="standard", help="whose share under load is how large; standard by default"
    )
    parser.add_argument("--file", type=Path, help="add its entry to this key file; shown where there is none")
    options = parser.parse_args(args)
    try:
        secret, key = create_key(options.name, options.tier)
        if options.file is not None:
            append_key(options.file, key)
    except ApiKeysError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    print(secret)
    if options.file is None:
        print(f"\n{key.as_toml()}", end="")
    else:
        print(f"headrace: added to {options.file}; SIGHUP has a running server read it", file=sys.stderr)
    return 0
