"""One real server on the real model for all end-to-end tests that do not need their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, sync_playwright

from fake_engine import VOCAB_SIZE, byte_wrapper
from headrace.scheduler.model_source import fetch_packaged_model
from requirements import need_program
from server_process import ServerProcess, serving
from tiny_models import tiny_llama

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread_beside_another_worker() -> None:
    """Threads that wait for each other by spinning, and for a core besides, take several times as long."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = need_program("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's file, fetched if need be."""
    return fetch_packaged_model()


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose steps take some ten milliseconds, so that there is time to leave or end in the middle."""
    path = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 256, "num_hidden_layers": 24, "intermediate_size": 768, "max_position_embeddings": 8192}
    tiny_llama(vocab_size=VOCAB_SIZE, **shape).save_pretrained(path)
    byte_wrapper().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def server(demo_model: Path) -> Iterator[ServerProcess]:
    """A server whose texts are the same whatever is computed beside them."""
    with serving("--batch-invariant", "--kv-cache-bytes", "2GiB", "--stream-grace-s", "3") as process:
        yield process
