"""One run that shows what a GPU does: `python -m headrace.benchmarks.gpu_report`; it needs no weights and no network.

A model in the shape of Llama-3.1-8B, of random weights, since speed does not depend on them. Ceilings of the card;
decode steps and prompt chunks beside their floors, and with flashinfer's attention where it is installed; the whole
server over HTTP beside transformers' continuous batching, in turn. Prints Markdown, and as the last line of stdout one
JSON object. What fails is told in its place, the rest goes on.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from headrace.benchmarks.compared_target import ComparedTarget, HttpTarget, TargetError
from headrace.benchmarks.measurement import Targets, summarize
from headrace.benchmarks.peers import Recipe
from headrace.benchmarks.prompts import PromptMaker, TokenFit
from headrace.benchmarks.settings import ClosedLoop

_SHAPES: Final = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    # For trying the report itself.
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 2048,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
    },
}
_DECODE: Final = [(n, context) for context in (512, 4096) for n in (1, 8, 32, 64, 128, 256)]
_DECODE_FP8: Final = [(1, 512), (32, 4096), (64, 4096), (128, 4096), (256, 4096)]
_PREFILL: Final = [(256, 256), (512, 512), (2048, 2048), (2048, 8192)]
_HTTP_KV_GIB: Final = 12  # each: the server and its peer are on the card together
_MIN_ROUND_S: Final = 12.0  # a round of HTTP is not begun with less left
_SERVER_START_LIMIT_S: Final = 150.0
_FLASHINFER_LIMIT_S: Final = 150.0  # it compiles, once


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__)
    parser.add_argument("--model", choices=list(_SHAPES), default="llama-3.1-8b")
    parser.add_argument(
        "--sections", default="parity,ceilings,steps,fp8,flashinfer,http", help="which of them, by comma"
    )
    parser.add_argument("--widths", default="1,32,128,256", help="streams over HTTP")
    parser.add_argument("--peers", default="transformers", help="measured beside the server, by comma; or none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop")
    parser.add_argument("--out", type=Path, help="folder for the servers' logs")
    parser.add_argument("--device", default="cuda", help="of the server: cpu tries the report itself")
    options = parser.parse_args()
    deadline_s = time.monotonic() + 60 * options.minutes
    sections = options.sections.split(",")
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "model": options.model,
        "versions": _versions(),
        "driver": _driver(),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / options.model
        write_model(model, _SHAPES[options.model])
        print(f"{options.model}, random weights; {report['date']}; {report['versions']}; driver {report['driver']}\n")
        if "parity" in sections:
            report["parity"] = _measured("parity", {}, deadline_s)
            _print_parity(report["parity"])
        if "ceilings" in sections or "steps" in sections or "fp8" in sections:
            report["ceilings"] = _measured("ceilings", {}, deadline_s)
            _print_pairs("Ceilings", report["ceilings"])
        found = report.get("ceilings", {})
        ceilings = {name: found[name] for name in ("copy_gb_per_s", "matrix_tflop_per_s") if name in found}
        for section, title, given in (
            ("steps", "bfloat16", {"decode": _DECODE, "prefill": _PREFILL}),
            ("fp8", "weights and KV cache in fp8", _fp8_settings(_SHAPES[options.model])),
        ):
            if section in sections and not ceilings:
                print(f"{title}: left out, as no ceilings are known")
            elif section in sections:
                given |= {"model": str(model), "tensor_parallel_size": options.tensor_parallel_size}
                report[section] = _measured("steps", {**ceilings, **given}, deadline_s)
                _print_steps(title, report[section])
        if "flashinfer" in sections:
            given = {"model": str(model), "decode": _DECODE, "prefill": _PREFILL}
            limit_s = min(deadline_s, time.monotonic() + _FLASHINFER_LIMIT_S)
            report["flashinfer"] = _measured("flashinfer", given, limit_s)
            _print_flashinfer(report["flashinfer"])
        if "http" in sections:
            logs = options.out or Path(folder)
            report["http"] = asyncio.run(_over_http(options, model, logs, deadline_s))
    print(json.dumps(report))
    return 0


def _fp8_settings(shape: dict[str, Any]) -> dict[str, Any]:
    bytes_per_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return {
        "decode": _DECODE_FP8,
        # All but what a step itself needs of a card of 80 GB, where the server would leave more free.
        "kv_cache_bytes": max(width * context for width, context in _DECODE_FP8) * bytes_per_token,
        "prefill": [(2048, 2048)],
        "kv_cache_dtype": "fp8",
        "quantization": "fp8",
    }


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A model's directory without weights: its config, and a tokenizer that has a text for each of its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
    words = (f"\u0120w{i}" for i in range(len(vocabulary), config["vocab_size"] - 1))
    vocabulary |= {word: i for i, word in enumerate(words, len(vocabulary))}
    vocabulary["<|end|>"] = config["vocab_size"] - 1
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|end|>", "pad_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    ids = {"eos_token_id": config["vocab_size"] - 1, "pad_token_id": config["vocab_size"] - 1, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps({**config, **ids, "hidden_act": "silu", "dtype": "bfloat16"}))


def _measured(section: str, options: dict[str, Any], deadline_s: float) -> dict[str, Any]:
    """Run a section of `gpu_measurements` in a process of its own, which leaves the card's memory empty."""
    command = [sys.executable, "-m", "headrace.benchmarks.gpu_measurements", section, json.dumps(options)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, deadline_s - time.monotonic()), check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": "it took too long"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": done.stderr[-3000:]}
    results: dict[str, Any] = json.loads(lines[-1])
    return results


async def _over_http(options: argparse.Namespace, model: Path, logs: Path, deadline_s: float) -> list[dict[str, Any]]:
    widths = [int(width) for width in options.widths.split(",")]
    gib = _HTTP_KV_GIB if options.device == "cuda" else 1
    server = (
        *(sys.executable, "-m", "headrace.server", str(model), "--port", "{port}", "--load-format", "dummy"),
        *("--device", options.device, "--max-num-seqs", "256", "--max-num-batched-tokens", "1024"),
        *("--max-model-len", "4096", "--kv-cache-bytes", f"{gib}GiB", "--enable-prefix-caching"),
        *("--tensor-parallel-size", str(options.tensor_parallel_size)),
    )
    worker = (sys.executable, str(Path(__file__).with_name("peer_worker.py")), "transformers", str(model))
    recipes = [Recipe(name="headrace", command=server)]
    if "transformers" in options.peers:
        recipes.append(Recipe(name="transformers", command=(*worker, str(gib * 2**30), "8")))
    up: dict[str, ComparedTarget] = {}
    results: list[dict[str, Any]] = []
    prompts, fit = PromptMaker(7), TokenFit()
    try:
        for recipe in recipes:
            target = ComparedTarget.of(recipe, logs / f"{recipe.name}.log")
            up[recipe.name] = target
            try:
                async with asyncio.timeout(min(_SERVER_START_LIMIT_S, max(1.0, deadline_s - time.monotonic()))):
                    started_s = await target.start(prompts.prompt(154))
                print(f"{recipe.name}: first token {started_s:.1f} s after its start", flush=True)
                if isinstance(target, HttpTarget):
                    fit = await target.calibrate(154, prompts) or fit
            except (TargetError, TimeoutError) as error:
                print(f"{recipe.name} is left out: {error!r}")
                await up.pop(recipe.name).end()
        print("\n| streams | target | tok/s | TTFT p50 / p99 ms | ITL p50 / p99 ms | GPU busy | gap ms | gauge |")
        print("|---|---|---|---|---|---|---|---|")
        for round_number in range(options.rounds):
            for width in widths:
                for name, target in up.items():
                    if time.monotonic() > deadline_s - _MIN_ROUND_S:
                        return results
                    prompts = PromptMaker((round_number << 20) | width)
                    prompts.fit = fit
                    limit_s = deadline_s - time.monotonic()
                    results.append(await _measure_http(name, target, width, prompts, limit_s))
                    _print_http(results[-1])
    finally:
        for target in up.values():
            await target.end()
    return results


async def _measure_http(
    name: str, target: ComparedTarget, width: int, prompts: PromptMaker, limit_s: float
) -> dict[str, Any]:
    load = ClosedLoop(concurrency=(width,), requests_per_stream=2)
    before: dict[str, float] = {}
    gauges: list[float] = []
    watched = asyncio.create_task(_watch_gauge(target, gauges))
    try:
        async with asyncio.timeout(limit_s):
            run, cores = await target.measure(load, width, prompts, lambda: before.update(_scrape(target)))
    except (TargetError, TimeoutError) as error:
        return {"target": name, "width": width, "error": repr(error)}
    finally:
        watched.cancel()
    after = _scrape(target)
    summary = asdict(summarize(run, Targets()))
    result = {"target": name, "width": width, "cores": cores, "summary": summary}
    busy_s = after.get("headrace_engine_busy_seconds_total", 0.0) - before.get(
        "headrace_engine_busy_seconds_total", 0.0
    )
    for wait in ("engine_step_gap", "engine_lock_wait", "event_loop_lag"):
        names = [f"headrace_{wait}_seconds_{part}" for part in ("sum", "count")]
        total, count = (after.get(each, 0.0) - before.get(each, 0.0) for each in names)
        result[wait] = {"sum_s": total, "count": count}
    result |= {"busy_s": busy_s, "wall_s": run.ended_s - run.started_s}
    result["gauge"] = statistics.median(gauges) if gauges else None
    return result


async def _watch_gauge(target: ComparedTarget, gauges: list[float]) -> None:
    while True:
        await asyncio.sleep(0.5)
        found = await asyncio.to_thread(_scrape, target)
        if (value := found.get("headrace_gpu_utilization_ratio")) is not None:
            gauges.append(value)


def _scrape(target: ComparedTarget) -> dict[str, float]:
    """The server's metrics that have no labels."""
    if not isinstance(target, HttpTarget):
        return {}
    with urllib.request.urlopen(f"{target.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value in pairs}


def _print_http(result: dict[str, Any]) -> None:
    if "error" in result:
        print(f"| {result['width']} | {result['target']} | {result['error']} |")
        return
    summary = result["summary"]
    latencies = [
        f"{(summary[kind] or {}).get('p50', 0):.1f} / {(summary[kind] or {}).get('p99', 0):.1f}"
        for kind in ("ttft_ms", "itl_ms")
    ]
    busy = f"{result['busy_s'] / result['wall_s']:.1%}" if result["busy_s"] else "-"
    gap = result["engine_step_gap"]
    gap_ms = f"{gap['sum_s'] / gap['count'] * 1e3:.3f}" if gap["count"] else "-"
    speed = summary["output_tokens_per_s"] or 0.0
    print(
        f"| {result['width']} | {result['target']} | {speed:.0f} | {latencies[0]} | {latencies[1]} | {busy} | "
        f"{gap_ms} | {result['gauge']} |",
        flush=True,
    )


def _print_steps(title: str, results: dict[str, Any]) -> None:
    if "error" in results:
        print(f"{title}: {results['error']}", flush=True)
        return
    print(f"\n{results['description']}\n\n| sequences | context | step ms | gap ms | floor ms | of the floor's speed |")
    print("|---|---|---|---|---|---|")
    for row in results["decode"]:
        if "error" in row:
            print(f"| {row['sequences']} | {row['context']} | {row['error']} |")
        else:
            figures = f"{row['step_ms']:.3f} | {row['gap_ms']:.3f} | {row['floor_ms']:.3f} | {row['of_floor']:.1%}"
            print(f"| {row['sequences']} | {row['context']} | {figures} |")
    print("\n| tokens | context | step ms | tok/s | TFLOP/s | of the ceiling |\n|---|---|---|---|---|---|")
    for row in results["prefill"]:
        figures = (
            f"{row['step_ms']:.2f} | {row['tokens_per_s']:.0f} | {row['tflop_per_s']:.0f} | {row['of_ceiling']:.1%}"
        )
        print(f"| {row['tokens']} | {row['context']} | {figures} |", flush=True)


def _print_flashinfer(results: dict[str, Any]) -> None:
    if "steps" not in results:
        print(f"flashinfer: {results.get('missing') or results['error']}", flush=True)
        return
    print("\n| sequences | tokens | context | step ms, Triton's attention | flashinfer's |\n|---|---|---|---|---|")
    for row in results["steps"]:
        figures = f"{row['triton_ms']:.3f} | {row['flashinfer_ms']:.3f}"
        print(f"| {row['sequences']} | {row['tokens']} | {row['context']} | {figures} |", flush=True)


def _print_parity(errors: dict[str, Any]) -> None:
    if "error" in errors:
        print(f"parity: {errors['error']}", flush=True)
        return
    print("| kernel | relative error |\n|---|---|")
    for name, error in errors.items():
        print(f"| {name} | {error:.1e} |", flush=True)


def _print_pairs(title: str, values: dict[str, Any]) -> None:
    text = ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{title}: {text}", flush=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "transformers", "flashinfer-python", "headrace"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "-"


if __name__ == "__main__":
    sys.exit(main())
