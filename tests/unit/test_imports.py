"""The direction of dependencies: server -> scheduler -> kernels -> torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["server", "scheduler", "kernels", "benchmarks"]

FORBIDDEN = {
    "server": {"torch", "headrace.kernels"},
    "scheduler": {"asyncio", "anyio", "starlette", "prometheus_client", "headrace.server"},
    "kernels": {"asyncio", "anyio", "starlette", "prometheus_client", "headrace.server", "headrace.scheduler"},
    "benchmarks": {"torch", "headrace.server", "headrace.scheduler", "headrace.kernels"},
}
MAY_IMPORT_TORCH = {
    "gguf_config.py",
    "keras_resnet.py",
    "lockstep.py",
    "lora_adapter.py",
    "model_files.py",
    "model_loader.py",
    "model_plan.py",
    "model_runner.py",
    "one_shot_model.py",
    "rank.py",
    "ranks.py",
    "step_tracer.py",
}
# Plain values, for whoever must not wait for torch.
TORCH_FREE = "headrace.kernels.step_times"

# Some measure from inside what the others reach over HTTP, or play it on a virtual clock; peers are given the model
# that is served by default, and one file is run by their Python.
FREE = {
    "ablation.py",
    "fleet.py",
    "fleet_costs.py",
    "gpu_measurements.py",
    "http_bench.py",
    "kernel_bench.py",
    "lanes.py",
    "overload.py",
    "peer_worker.py",
    "peers.py",
    "ray_overhead.py",
    "ray_replica.py",
    "routing.py",
    "scheduler_bench.py",
    "simulate.py",
    "simulated_fleet.py",
    "simulated_server.py",
    "speculation.py",
    "unbatched_server.py",
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_imports_only_what_lies_below_it(folder: str) -> None:
    paths = sorted((ROOT / folder).glob("*.py"))
    assert paths
    for path in paths:
        for name in () if path.name in FREE else imports(path):
            for forbidden in FORBIDDEN[folder]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{path} imports {name}"
            if folder == "scheduler" and name.split(".")[0] in ("torch", "transformers", "safetensors"):
                assert path.name in MAY_IMPORT_TORCH, f"{path} imports {name}"
            if name.startswith("headrace.kernels") and name != TORCH_FREE and folder == "scheduler":
                assert path.name in MAY_IMPORT_TORCH, f"{path} imports {name}"


def test_what_is_free_of_torch_imports_nothing_of_ours() -> None:
    assert list(imports(ROOT / "kernels" / "step_times.py")) == ["typing"]


def test_the_servers_start_does_not_wait_for_torch() -> None:
    code = "import sys, headrace.server.serve; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_folder_is_a_regular_package() -> None:
    # A bare folder never shadows Hugging Face's own package called `kernels`.
    found = [path for folder in [*FOLDERS, "tests", "configs"] for path in (ROOT / folder).rglob("__init__.py")]
    assert [path for path in found if not {"node_modules", ".venvs"} & set(path.parts)] == []


@pytest.mark.parametrize("folder", ["server", "scheduler", "kernels"])
def test_nothing_that_is_served_is_evaluated_or_unpickled(folder: str) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        names = set(imports(path))
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in ("eval", "exec", "compile", "__import__", "torch.load"), f"{path}: {called}"
                assert keywords.get("trust_remote_code", "False") == "False", f"{path}: {called}"
                assert keywords.get("allow_pickle", "False") == "False", f"{path}: {called}"
                if called.startswith("Auto") and called.endswith((".from_pretrained", ".from_config")):
                    assert "trust_remote_code" in keywords, f"{path}: {called} leaves it to a default"
