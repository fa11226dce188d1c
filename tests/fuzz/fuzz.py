"""Coverage-guided fuzzing of one target: `python tests/fuzz/fuzz.py TARGET [flags of libFuzzer]`, or `make fuzz`.

What finds new coverage is written to tests/fuzz/found/TARGET, which git ignores; what is worth keeping is moved to the
corpus beside it, which the unit tests replay.
Where this Python has no wheel of atheris nothing is fuzzed, and that is said.
"""

import sys
from pathlib import Path

try:
    import atheris
except ImportError:
    print("headrace: atheris is not installed (no wheel for this Python?): nothing is fuzzed", file=sys.stderr)
    sys.exit(0)

_INSTRUMENTED = ["headrace", "gguf"]


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    name, *flags = sys.argv[1:]
    with atheris.instrument_imports(include=_INSTRUMENTED):
        import fuzz_targets
    target = fuzz_targets.TARGETS[name]
    found = Path(__file__).parent / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    # libFuzzer writes to the first and reads all.
    atheris.Setup([sys.argv[0], *flags, str(found), str(fuzz_targets.CORPUS / name)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
