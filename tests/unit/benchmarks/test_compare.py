"""`compare` whole, over workers that need no peer: who is measured when, with which prompts, and what stays behind."""

import json
import signal
import sys
from pathlib import Path

import pytest

from comparisons import comparison, measurement
from headrace.benchmarks import compare
from headrace.benchmarks.compare import main, parse, prompts_seed, rotated
from headrace.benchmarks.peers import Installation, Recipe
from headrace.benchmarks.process_session import ProcessSession
from headrace.benchmarks.settings import UsageError

# Answers as peer_worker does, and writes down who was asked what.
WORKER = """
import json, sys, time
name, log = sys.argv[1:]
for line in sys.stdin:
    job = json.loads(line)
    with open(log, "a") as file:
        print(json.dumps([name, job["width"], job["prompts"]]), file=file)
    now_s = time.monotonic()
    tokens = [now_s + 0.001 * i for i in range(1, job["max_tokens"] + 1)]
    request = {"wave": 0, "launched_s": now_s, "token_s": tokens, "prompt_tokens": 9, "error": ""}
    print(json.dumps({"requests": [request] * len(job["prompts"])}), flush=True)
"""
BROKEN = "import sys; sys.exit('no such model')"
DYING = "import sys; sys.stdin.readline(); sys.exit('out of memory')"
QUICK = ("--rounds", "2", "--requests-per-stream", "1", "--max-tokens", "4", "--starts", "1")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a worker of every target, of openvino one that ends at once, of transformers one that dies when asked."""
    log = tmp_path / "asked"

    def recipe(_: Installation, name: str, num_slots: int, context_tokens: int) -> Recipe:
        script = {"openvino": BROKEN, "transformers": DYING}.get(name, WORKER)
        return Recipe(name=name, command=(sys.executable, "-c", script, name, str(log)))

    gguf = tmp_path / "tiny.gguf"
    gguf.touch()
    monkeypatch.setattr(Installation, "of", lambda *_: Installation(tmp_path, gguf))
    monkeypatch.setattr(Installation, "recipe", recipe)
    monkeypatch.setattr(compare, "_LOOK_S", 0.01)
    monkeypatch.setattr(compare, "_RESTING_SHARE", 1e9)
    return log


def test_each_round_begins_with_the_next_target() -> None:
    assert [rotated("ABC", i) for i in range(4)] == [list("ABC"), list("BCA"), list("CAB"), list("ABC")]
    assert rotated([], 1) == []


def test_slow_targets_are_measured_at_the_widths_that_are_asked_for() -> None:
    settings = parse(["--widths", "1,8,32", "--slow-widths", "8,64"])
    assert settings.widths_of("vllm") == [1, 8, 32]
    assert settings.widths_of("llama.cpp") == settings.widths_of("transformers") == [8]


def test_no_round_or_width_has_the_prompts_of_another() -> None:
    assert len({prompts_seed(seed, i, width) for seed in (1, 2) for i in range(3) for width in (1, 8, 64)}) == 18


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--targets", "vllm,tgi"], "--targets tgi"),
        (["--widths", "0"], "--widths"),
        (["--plot", "chart.pdf"], "--plot chart.pdf"),
        (["--report", "no-such-file"], "--report"),
        (["--out", "no/such/folder/file"], "--out"),
    ],
)
@pytest.mark.usefixtures("log")
def test_wrong_use_is_one_line(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert complaint in capsys.readouterr().err


def test_a_bad_target_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected some of headrace"):
        parse(["--targets", ""])


def test_targets_take_turns_with_the_same_new_prompts(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["--targets", "headrace,vllm", "--widths", "1,2", *QUICK, "--out", str(out)]) == 0
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    # A first request each; then before every measurement one that is not counted.
    counted = asked[3::2]
    assert [(name, width) for name, width, _ in counted] == [
        ("headrace", 1),
        ("vllm", 1),
        ("headrace", 2),
        ("vllm", 2),
        ("vllm", 1),
        ("headrace", 1),
        ("vllm", 2),
        ("headrace", 2),
    ]
    prompts = [prompts for _, _, prompts in counted]
    assert all(first == second for first, second in zip(prompts[::2], prompts[1::2], strict=True))
    assert len({prompt for prompts in prompts for prompt in prompts}) == 6
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {median["num_rounds"] for median in findings["medians"]} == {2}
    kept = json.loads(out.read_text())
    assert [found["round_number"] for found in kept["measurements"]] == [0] * 4 + [1] * 4


@pytest.mark.usefixtures("log")
def test_a_peer_that_fails_is_left_out_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--targets", "openvino,transformers,headrace", "--widths", "1", *QUICK]) == 0
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {median["target"] for median in findings["medians"]} == {"headrace"}
    assert "exit code 1" in findings["left_out"]["openvino"]
    assert "no such model" in findings["left_out"]["openvino"]
    assert "out of memory" in findings["left_out"]["transformers"]


@pytest.mark.usefixtures("log")
def test_nothing_measured_is_exit_code_1() -> None:
    assert main(["--targets", "openvino", "--widths", "1", *QUICK]) == 1


@pytest.mark.usefixtures("log")
def test_the_time_limit_ends_it_and_what_it_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-c", "import signal; signal.pause()", "of this test")
    monkeypatch.setattr(Installation, "recipe", lambda *_: Recipe(name="vllm", command=command))
    assert main(["--targets", "vllm", *QUICK, "--time-limit-s", "0.5"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["is_time_limited"]
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if command[-1].encode() in _bytes(path)]
    assert left == []


@pytest.mark.usefixtures("log")
def test_who_does_not_rest_is_stopped_while_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "_RESTING_SHARE", -1.0)
    sent: list[signal.Signals] = []
    send = ProcessSession.signal

    def note_and_send(session: ProcessSession, number: signal.Signals) -> None:
        sent.append(number)
        send(session, number)

    monkeypatch.setattr(ProcessSession, "signal", note_and_send)
    assert main(["--targets", "headrace,vllm", "--widths", "1", *QUICK, "--rounds", "1"]) == 0
    assert sent[:4] == [signal.SIGSTOP, signal.SIGCONT] * 2
    assert "vllm did not rest" in capsys.readouterr().out


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_report_is_printed_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, speed in zip(paths, (300, 100), strict=True):
        path.write_text(comparison(measurement("headrace", speed)).encode())
    assert main(["--report", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "| 8 | headrace | 2 | 200 (100 to 300) |" in printed
    assert json.loads(printed.splitlines()[-1])["medians"][0]["median"] == 200
