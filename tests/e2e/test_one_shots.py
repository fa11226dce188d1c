"""Embeddings, images and a chat from one real server: each as it is alone, though they share one engine.

One server for all of them; the last test ends it.
"""

import base64
import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from playwright.sync_api import Browser, Page, expect
from transformers import AutoModel, AutoTokenizer

from requirements import long, need, need_packaged_model
from server_process import ServerProcess, serving
from waiting import until

EMBEDDER, CLASSIFIER = "all-minilm-l6-v2", "resnet-50"
CONFIG = f"""
dtype = "float32"
kv_cache_bytes = "256MiB"
max_model_len = 512

[[one_shot_models]]
model = "{EMBEDDER}"
task = "embed"

[[one_shot_models]]
model = "{CLASSIFIER}"
task = "classify"
"""
TEXTS = [
    "A headrace feeds the mill wheel.",
    "Water!",
    "The wheel turns for as long as water runs in the channel above it, and it never stops for one sack of grain.",
    "Das Mühlrad dreht sich 🌊",
]
PHOTOGRAPHS = {"chelsea": "Egyptian cat", "coffee": "espresso", "camera": "tripod"}


@pytest.fixture(scope="module")
def photographs() -> Path:
    package = find_spec("skimage")
    need(package is not None, "scikit-image")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "data"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    for name in (EMBEDDER, CLASSIFIER):
        need_packaged_model(name)
    config = tmp_path_factory.mktemp("config") / "headrace.toml"
    config.write_text(CONFIG)
    with serving("--config", str(config)) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url()}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """What transformers computes, text by text."""
    path = need_packaged_model(EMBEDDER)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    rows = []
    for text in TEXTS:
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def embed(client: OpenAI) -> np.ndarray:
    """As openai-python asks by default, which is in base64."""
    answer = client.embeddings.create(model=EMBEDDER, input=TEXTS)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    return np.array([item.embedding for item in answer.data], np.float32)


def label(url: str, photograph: Path) -> str:
    files = {"image": (photograph.name, photograph.read_bytes(), "image/png")}
    answer = httpx.post(f"{url}/v1/classify", files=files, data={"top_k": "3"}, timeout=60)
    assert answer.status_code == 200, answer.text
    predictions = answer.json()["predictions"]
    assert len(predictions) == 3
    assert predictions[0]["score"] > 0.6
    best: str = predictions[0]["label"]
    return best


def chat(client: OpenAI) -> str:
    stream = client.chat.completions.create(
        model="SmolLM2-135M-Instruct",
        messages=[{"role": "user", "content": "Write a story about a mill."}],
        temperature=0,
        max_tokens=100,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_all_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["SmolLM2-135M-Instruct", EMBEDDER, CLASSIFIER]


def test_vectors_and_labels_are_right_beside_a_chat_whose_text_is_that_of_the_chat_alone(
    server: ServerProcess, client: OpenAI, vectors: np.ndarray, photographs: Path
) -> None:
    alone = chat(client)
    num_rounds = 0
    with ThreadPoolExecutor(3) as pool:
        beside = pool.submit(chat, client)
        while not beside.done() or num_rounds == 0:
            embeddings = [pool.submit(embed, client) for _ in range(2)]
            for name, expected in PHOTOGRAPHS.items():
                assert label(server.url(), photographs / f"{name}.png") == expected
            for embedding in embeddings:
                np.testing.assert_allclose(embedding.result(), vectors, atol=1e-4)
            num_rounds += 1
        assert beside.result() == alone
    assert len(alone) > 100
    metrics = server.metrics()
    answered = metrics[f'headrace_batch_items_total{{model="{EMBEDDER}",outcome="ok"}}']
    assert answered >= 2 * num_rounds * len(TEXTS)
    assert metrics[f'headrace_batch_items_total{{model="{EMBEDDER}",outcome="error"}}'] == 0


def test_floats_are_the_numbers_of_base64(client: OpenAI) -> None:
    [encoded] = client.embeddings.create(model=EMBEDDER, input="Water!", encoding_format="base64").data
    [plain] = client.embeddings.create(model=EMBEDDER, input="Water!", encoding_format="float").data
    assert isinstance(encoded.embedding, str)
    numbers = np.frombuffer(base64.b64decode(encoded.embedding), "<f4")
    np.testing.assert_array_equal(numbers, np.array(plain.embedding, np.float32))


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text)
            if message.type == "error" and not message.text.startswith("Failed to load resource")
            else None
        ),
    )
    # From the start on, since the browser is told in passing that somebody wants to hear of it.
    page.on("filechooser", lambda _: None)
    page.goto(f"{server.url()}/classify")
    yield page
    context.close()
    assert problems == []


def test_the_page_says_what_is_in_pictures_and_why_not(page: Page, photographs: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    page.set_input_files("#files", [photographs / "chelsea.png", text])
    entries = page.locator("#pictures > li")
    expect(entries).to_have_count(2)
    shown = entries.filter(has=page.get_by_alt_text("chelsea.png"))
    expect(shown.locator("ol > li").first).to_contain_text("Egyptian cat", timeout=30_000)
    expect(shown.locator("ol > li")).to_have_count(5)
    assert shown.locator("img").evaluate("image => image.naturalWidth") > 0
    refused = entries.filter(has=page.get_by_alt_text("notes.txt"))
    expect(refused.locator(".failed")).to_have_text("the image is no JPEG, PNG, WebP, GIF or BMP file")


def test_a_picture_can_be_dropped_or_pasted_anywhere(page: Page, photographs: Path) -> None:
    for kind, property in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([kind, property, encoded]) => {
                const bytes = Uint8Array.from(atob(encoded), (char) => char.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], `${kind}.png`, { type: 'image/png' }));
                const type = kind === 'drop' ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(new type(kind, { [property]: transfer, bubbles: true, cancelable: true }));
            }""",
            [kind, property, base64.b64encode((photographs / "coffee.png").read_bytes()).decode()],
        )
        entry = page.locator("#pictures > li").filter(has=page.get_by_alt_text(f"{kind}.png"))
        expect(entry.locator("ol > li").first).to_contain_text("espresso", timeout=30_000)


def test_pictures_can_be_chosen_by_keyboard(page: Page, photographs: Path) -> None:
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "files":
            break
    assert page.evaluate("document.activeElement.id") == "files"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photographs / "coffee.png")
    expect(page.locator("#pictures ol > li").first).to_contain_text("espresso", timeout=30_000)


@long
def test_locusts_users_load_every_lane_that_the_server_has(server: ServerProcess) -> None:
    locust = Path(__file__).parent / "clients" / ".venvs" / "locust" / "bin" / "locust"
    need(locust.exists(), "what `make setup-clients` installs")
    file = Path(__file__).parents[2] / "benchmarks" / "locustfile.py"
    command = [str(locust), "-f", str(file), "--host", server.url(), "--headless", "--json", "-u", "12", "-r", "12"]
    done = subprocess.run([*command, "-t", "8s"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)}
    asked = {"/v1/chat/completions", "/v1/embeddings", "/v1/classify"}
    assert set(entries) == asked | {"first token", "between tokens"}
    assert all(entry["num_requests"] > 0 and entry["num_failures"] == 0 for entry in entries.values())
    assert entries["between tokens"]["num_requests"] > 10 * entries["first token"]["num_requests"]


def test_sigterm_lets_those_accepted_finish_and_ends_cleanly(server: ServerProcess, client: OpenAI) -> None:
    def ask() -> int:
        return len(client.embeddings.create(model=EMBEDDER, input=TEXTS * 100).data)

    depth = f'headrace_batch_queue_depth{{model="{EMBEDDER}"}}'
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask)
        until(lambda: server.metrics()[depth] > 0, "inputs that wait")
        assert server.stop(signal.SIGTERM) == 0
        assert answer.result() == 100 * len(TEXTS)
    assert "draining" in server.output
    assert "Traceback" not in server.output
