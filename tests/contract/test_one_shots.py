"""The routes of models that answer in one pass: what they answer, what they refuse, and what others notice of it.

`live_app` asserts at its end that no block is held, and that no generation, item or batch is left.
"""

import base64
import io
import json
import math
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import numpy as np
import pytest
from PIL import Image

from asgi_client import Exchange, call, exchange
from fake_engine import FakeRunner, expected_text, make_scheduler
from fake_one_shots import (
    LABELS,
    MAX_TOKENS,
    NUM_DIMENSIONS,
    FakeOneShot,
    FakeOneShotModel,
    fake_vector,
    token_ids,
    write_image_model,
    write_text_model,
)
from headrace.scheduler.config import OneShotTask
from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.messages import Tier
from headrace.server.api_keys import create_key
from headrace.server.app import App
from headrace.server.drain import drain
from headrace.server.settings import load_settings
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

EMBEDDER, RANKER, PAINTER = "embedder", "ranker", "painter"
TASKS = {EMBEDDER: OneShotTask.EMBED, RANKER: OneShotTask.SCORE, PAINTER: OneShotTask.CLASSIFY}
DOCUMENTS = ["stone", "the mill turns", "the river turns the mill wheel", "a river"]
QUERY = "river mill wheel"
MULTIPART = "multipart/form-data; boundary=b"

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    texts = write_text_model(tmp_path_factory.mktemp("texts"))
    return {EMBEDDER: texts, RANKER: texts, PAINTER: write_image_model(tmp_path_factory.mktemp("images"))}


@asynccontextmanager
async def serving(
    folders: Folders, *names: str, batching: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[LiveApp]:
    """An App with these models, which are all of them where none is named. `batching` is their own settings."""
    fakes = [FakeOneShot(name, TASKS[name], folders[name], **(batching or {})) for name in names or TASKS]
    async with live_app(one_shots=fakes, **settings) as app:
        yield app


def picture(colour: str, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(file, format)
    return file.getvalue()


def form(*parts: tuple[str, str | bytes]) -> bytes:
    """A multipart body: bytes are files, strings fields."""
    body = b""
    for name, value in parts:
        file = '; filename="x.png"\r\ncontent-type: image/png' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode()
        body += f'--b\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--b--\r\n"


async def embed(app: App, input: Any, headers: dict[str, str] | None = None, **fields: Any) -> Exchange:
    return await call(app.asgi, "POST", "/v1/embeddings", {"input": input, **fields}, headers=headers)


def begin(
    app: App, tasks: anyio.abc.TaskGroup, path: str, body: Any, headers: dict[str, str] | None = None
) -> Exchange:
    """Send a whole request and begin to answer it."""
    request = exchange(app.asgi, "POST", path, headers=headers)
    request.send_body(json.dumps(body).encode())
    tasks.start_soon(request.run)
    return request


def begin_embedding(app: App, tasks: anyio.abc.TaskGroup, input: Any, **headers: str) -> Exchange:
    return begin(app, tasks, "/v1/embeddings", {"input": input}, headers)


@asynccontextmanager
async def held(app: LiveApp, **headers: str) -> AsyncIterator[tuple[Exchange, FakeOneShotModel]]:
    """A request whose batch stays between its layers for as long as the block runs, and its model."""
    fake = app.fakes[EMBEDDER]
    num_before = len(fake.batches)
    async with anyio.create_task_group() as tasks:
        with fake.held():
            request = begin_embedding(app, tasks, "the", **headers)
            await app.until(lambda: len(fake.batches) > num_before)
            yield request, fake
        await request.done.wait()


def hold_reading(app: LiveApp) -> tuple[threading.Event, threading.Event]:
    """Have the one model's inputs read no further than the second event allows; the first says that one is read."""
    [model] = app.one_shots.models
    is_reading, may_finish, read = threading.Event(), threading.Event(), model.reader.read

    def slow_read(*args: Any, **kwargs: Any) -> Any:
        is_reading.set()
        may_finish.wait(10)
        return read(*args, **kwargs)

    model.reader.read = slow_read
    return is_reading, may_finish


def num_waiting(app: LiveApp, name: str = EMBEDDER) -> int:
    [model] = [model for model in app.one_shots.models if model.name == name]
    return len(model.lane._batcher)


def vectors(answer: Exchange) -> list[list[float]]:
    assert answer.status == 200, answer.body
    return [item["embedding"] for item in answer.json()["data"]]


def expected(*texts: str) -> list[list[float]]:
    return [fake_vector(token_ids(text)).tolist() for text in texts]


def assert_refused(
    answer: Exchange, status: int, *, param: str | None = None, code: str | None = None, message: str = ""
) -> None:
    assert answer.status == status, answer.body
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} | ({"tier"} if error["code"] == "queue_full" else set())
    assert message in error["message"] != ""
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert len(answer.headers["x-request-id"]) == 32


def samples(app: LiveApp) -> dict[str, float]:
    """Every sample of /metrics, without our prefix."""
    lines = app.client.metrics.expose().decode().splitlines()
    pairs = (line.removeprefix("headrace_").rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def changes(app: LiveApp, before: dict[str, float], *names: str) -> list[float]:
    after = samples(app)
    return [after[name] - before.get(name, 0) for name in names]


def outcome(name: str, model: str = EMBEDDER) -> str:
    return f'batch_items_total{{model="{model}",outcome="{name}"}}'


# What is answered.


async def test_an_embedding_is_the_models_vector_and_the_answer_has_openais_shape(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app:
        answer = await embed(app, "the river", model=EMBEDDER)
        assert answer.json() == {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": expected("the river")[0]}],
            "model": EMBEDDER,
            "usage": {"prompt_tokens": 4, "total_tokens": 4},
        }
        assert answer.headers["content-type"] == "application/json"


async def test_base64_is_the_same_numbers_as_little_endian_float32(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app:
        encoded = vectors(await embed(app, ["river", "mill"], encoding_format="base64"))
        assert [list(struct.unpack(f"<{NUM_DIMENSIONS}f", base64.b64decode(text))) for text in encoded] == expected(  # type: ignore[arg-type]
            "river", "mill"
        )


async def test_texts_and_token_ids_alone_or_in_lists_are_answered_alike_and_in_order(folders: Folders) -> None:
    texts = ["river", "the mill turns", "stone", "", "river", "water over the wheel"]
    async with serving(folders, EMBEDDER) as app:
        answer = await embed(app, texts)
        assert vectors(answer) == expected(*texts)
        assert [item["index"] for item in answer.json()["data"]] == [0, 1, 2, 3, 4, 5]
        total = sum(map(len, map(token_ids, texts)))
        assert answer.json()["usage"] == {"prompt_tokens": total, "total_tokens": total}
        as_ids = await embed(app, [token_ids(text) for text in texts])
        assert as_ids.json() == answer.json()
        assert vectors(await embed(app, token_ids("stone"))) == vectors(await embed(app, "stone")) == expected("stone")


async def test_more_inputs_than_a_batch_takes_come_back_in_order(folders: Folders) -> None:
    texts = [" ".join(["river", "mill", "the", "stone"][: i % 5]) for i in range(40)]
    async with serving(folders, EMBEDDER, batching={"max_batch_size": 8}) as app:
        assert vectors(await embed(app, texts)) == expected(*texts)
        assert len(app.fakes[EMBEDDER].batches) >= 5
        assert max(app.fakes[EMBEDDER].sizes) <= 8


async def test_fewer_dimensions_are_the_first_ones_at_the_length_of_all(folders: Folders) -> None:
    whole = fake_vector(token_ids("river"))
    async with serving(folders, EMBEDDER) as app:
        for encoding in ("float", "base64"):
            [vector] = vectors(await embed(app, "river", dimensions=3, encoding_format=encoding))
            if encoding == "base64":
                vector = list(struct.unpack("<3f", base64.b64decode(vector)))  # type: ignore[arg-type]
            np.testing.assert_allclose(vector, whole[:3] / np.linalg.norm(whole[:3]), rtol=1e-6)
        assert vectors(await embed(app, "river", dimensions=NUM_DIMENSIONS)) == expected("river")
        assert_refused(await embed(app, "river", dimensions=NUM_DIMENSIONS + 1), 400, param="dimensions")


async def test_a_text_that_is_too_long_is_cut_only_where_that_is_asked_for(folders: Folders) -> None:
    text = " ".join(["river"] * 60)
    async with serving(folders, EMBEDDER) as app:
        assert_refused(await embed(app, text), 400, param="input", code="context_length_exceeded")
        for cut, num_tokens in ((-1, MAX_TOKENS), (1000, MAX_TOKENS), (5, 5)):
            answer = await embed(app, text, truncate_prompt_tokens=cut)
            assert vectors(answer) == expected(" ".join(["river"] * (num_tokens - 2)))
            assert answer.json()["usage"]["prompt_tokens"] == num_tokens


def sigmoid(num_common: int) -> float:
    return 1 / (1 + math.exp(1 - 2 * num_common))


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
async def test_rerank_puts_the_best_document_first(folders: Folders, path: str) -> None:
    async with serving(folders, RANKER) as app:
        answer = await call(app.asgi, "POST", path, {"model": RANKER, "query": QUERY, "documents": DOCUMENTS})
        body = answer.json()
        assert body.keys() == {"id", "model", "results", "usage"}
        assert body["id"] == f"rerank-{answer.headers['x-request-id']}"
        # Of two that are equal the first stays first.
        assert [result["index"] for result in body["results"]] == [2, 1, 3, 0]
        scores = [sigmoid(3), sigmoid(1), sigmoid(1), sigmoid(0)]
        assert [result["relevance_score"] for result in body["results"]] == pytest.approx(scores)
        assert [result["document"]["text"] for result in body["results"]] == [DOCUMENTS[i] for i in (2, 1, 3, 0)]
        num_tokens = sum(len(token_ids(QUERY)) + len(text.split()) + 1 for text in DOCUMENTS)
        assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_rerank_answers_with_as_many_as_are_wanted_and_documents_where_wanted(folders: Folders) -> None:
    request = {"query": QUERY, "documents": [{"text": text, "id": 7} for text in DOCUMENTS]}
    async with serving(folders, RANKER) as app:

        async def results(**fields: Any) -> list[dict[str, Any]]:
            answer = await call(app.asgi, "POST", "/v1/rerank", request | fields)
            found: list[dict[str, Any]] = answer.json()["results"]
            return found

        assert [result["index"] for result in await results(top_n=2)] == [2, 1]
        assert [result["index"] for result in await results(top_n=100)] == [2, 1, 3, 0]
        assert all(result.keys() == {"index", "relevance_score"} for result in await results(return_documents=False))
        assert (await results(return_documents=True))[0]["document"] == {"text": DOCUMENTS[2]}


async def test_documents_whose_scores_are_all_1_are_still_in_order(folders: Folders) -> None:
    logits = iter([50.0, 90.0, -800.0, 70.0])
    async with serving(folders, RANKER) as app:
        app.fakes[RANKER]._answer = lambda row: np.array([next(logits)], np.float32)
        body = {"query": "the", "documents": ["a", "a", "a", "a"]}
        results = (await call(app.asgi, "POST", "/v1/rerank", body)).json()["results"]
        assert [result["index"] for result in results] == [1, 3, 0, 2]
        assert [result["relevance_score"] for result in results] == [1, 1, 1, 0]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_scores_are_those_of_each_pair_in_order(folders: Folders, path: str) -> None:
    async with serving(folders, RANKER) as app:

        async def scores(first: Any, second: Any) -> list[float]:
            answer = await call(app.asgi, "POST", path, {"text_1": first, "text_2": second})
            body = answer.json()
            assert body.keys() == {"id", "object", "created", "model", "data", "usage"}
            assert (body["object"], body["model"]) == ("list", RANKER)
            assert body["id"] == f"score-{answer.headers['x-request-id']}"
            assert [(item["index"], item["object"]) for item in body["data"]] == [
                (i, "score") for i in range(len(body["data"]))
            ]
            return [item["score"] for item in body["data"]]

        one_with_each = [sigmoid(0), sigmoid(1), sigmoid(3), sigmoid(1)]
        assert await scores(QUERY, DOCUMENTS) == pytest.approx(one_with_each)
        assert await scores([QUERY], DOCUMENTS) == pytest.approx(one_with_each)
        assert await scores(["river", "mill"], ["the mill", "the mill"]) == pytest.approx([sigmoid(0), sigmoid(1)])
        assert await scores("river", "river") == pytest.approx([sigmoid(1)])


async def test_a_query_that_is_too_long_is_refused_and_a_document_cut_where_that_is_asked_for(folders: Folders) -> None:
    long = " ".join(["river"] * 60)
    async with serving(folders, RANKER) as app:
        body: dict[str, Any] = {"query": "river", "documents": ["mill", long]}
        refused = await call(app.asgi, "POST", "/v1/rerank", body)
        assert_refused(refused, 400, param="documents", code="context_length_exceeded", message="documents[1]")
        cut = await call(app.asgi, "POST", "/v1/rerank", body | {"truncate_prompt_tokens": -1})
        assert cut.json()["usage"]["prompt_tokens"] == 5 + MAX_TOKENS
        body = {"text_1": long, "text_2": "mill", "truncate_prompt_tokens": -1}
        assert_refused(await call(app.asgi, "POST", "/v1/score", body), 400, param="text_2")


IMAGE = base64.b64encode(picture("red")).decode()
SENT: dict[str, tuple[str, Any]] = {
    "base64": ("application/json", {"image": IMAGE}),
    "data URL": ("application/json", {"image": f"data:image/png;base64,{IMAGE}"}),
    "a file": (MULTIPART, form(("image", picture("red")))),
    "a file called file": (MULTIPART, form(("model", PAINTER), ("file", picture("red")), ("top_k", ""))),
    "a jpeg": (MULTIPART, form(("image", picture("red", "JPEG")))),
}


@pytest.mark.parametrize("kind", SENT)
async def test_an_images_labels_come_likeliest_first_however_it_is_sent(folders: Folders, kind: str) -> None:
    media_type, body = SENT[kind]
    async with serving(folders, PAINTER) as app:
        answer = await call(app.asgi, "POST", "/v1/classify", body, headers={"content-type": media_type})
        content = answer.json()
        assert content.keys() == {"id", "object", "created", "model", "predictions"}
        assert (content["object"], content["model"]) == ("classification", PAINTER)
        assert content["id"] == f"classify-{answer.headers['x-request-id']}"
        best, *others = content["predictions"]
        assert (best["label"], best["index"]) == ("red", 0)
        assert best["score"] == pytest.approx(math.exp(4) / (math.exp(4) + 2), abs=0.01)
        assert {other["label"] for other in others} == {"green", "blue"}
        assert sum(prediction["score"] for prediction in content["predictions"]) == pytest.approx(1)


async def test_as_many_labels_come_as_are_wanted(folders: Folders) -> None:
    async with serving(folders, PAINTER) as app:
        for top_k, num_labels in ((1, 1), (2, 2), (1000, len(LABELS))):
            answer = await call(app.asgi, "POST", "/v1/classify", {"image": IMAGE, "top_k": top_k})
            assert len(answer.json()["predictions"]) == num_labels
            fields = form(("top_k", str(top_k)), ("image", picture("blue")), ("timeout", "30"))
            answer = await call(app.asgi, "POST", "/v1/classify", fields, headers={"content-type": MULTIPART})
            assert answer.json()["predictions"][0]["label"] == "blue"
            assert len(answer.json()["predictions"]) == num_labels


async def test_all_models_are_listed_with_their_tasks(folders: Folders) -> None:
    async with serving(folders) as app:
        models = (await call(app.asgi, "GET", "/v1/models")).json()["data"]
        assert [(model["id"], model["task"], model["max_model_len"]) for model in models] == [
            ("fake", "generate", 512),
            (EMBEDDER, "embed", MAX_TOKENS),
            (RANKER, "score", MAX_TOKENS),
            (PAINTER, "classify", None),
        ]


async def test_the_page_may_show_pictures_and_load_nothing_from_elsewhere(folders: Folders) -> None:
    async with serving(folders, PAINTER) as app:
        page = await call(app.asgi, "GET", "/classify")
        assert page.status == 200
        assert page.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob:")
        for file in ("classify.js", "classify.css"):
            assert f"/static/{file}" in page.body.decode()
            assert (await call(app.asgi, "GET", f"/static/{file}")).status == 200


# What is refused.

BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "river"},
    "/v1/rerank": {"query": "river", "documents": ["mill"]},
    "/rerank": {"query": "river", "documents": ["mill"]},
    "/v1/score": {"text_1": "river", "text_2": "mill"},
    "/score": {"text_1": "river", "text_2": "mill"},
    "/v1/classify": {"image": IMAGE},
}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input[1]"),
        ("/v1/embeddings", {"input": [10_000]}, "input"),
        ("/v1/embeddings", {"encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"truncate_prompt_tokens": 1}, "input"),
        ("/v1/embeddings", {"add_special_tokens": False}, "add_special_tokens"),
        ("/v1/rerank", {"query": None}, "query"),
        ("/rerank", {"documents": [{"title": "x"}]}, "documents[0]"),
        ("/v1/rerank", {"top_n": -1}, "top_n"),
        ("/v1/score", {"text_1": ["a", "b"]}, "text_1"),
        ("/score", {"text_2": None}, "text_2"),
        ("/v1/classify", {"image": ""}, "image"),
        ("/v1/classify", {"image": "*"}, "image"),
        ("/v1/classify", {"image": base64.b64encode(b"<svg/>").decode()}, "image"),
        ("/v1/classify", {"image": IMAGE[: len(IMAGE) // 8 * 4]}, "image"),
        ("/v1/classify", {"top_k": 0}, "top_k"),
        ("/v1/classify", {"timeout": 0}, "timeout"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_wrong_value_is_refused_by_name_and_nothing_is_computed(
    folders: Folders, path: str, fields: dict[str, Any], param: str
) -> None:
    async with serving(folders) as app:
        assert_refused(await call(app.asgi, "POST", path, BODIES[path] | fields), 400, param=param)
        assert not any(fake.batches for fake in app.fakes.values())


@pytest.mark.parametrize("path", BODIES)
async def test_what_is_no_json_object_or_of_another_type_or_method_is_refused(folders: Folders, path: str) -> None:
    async with serving(folders) as app:
        for body in (b"", b"{", b"[]", b"null", b'{"input": "\\ud800"}'):
            assert_refused(await call(app.asgi, "POST", path, body), 400)
        types = ["text/plain", "", "image/png", *([] if path == "/v1/classify" else [MULTIPART])]
        for media_type in types:
            headers = {"content-type": media_type}
            assert_refused(await call(app.asgi, "POST", path, BODIES[path], headers=headers), 415)
        headers = {"content-encoding": "gzip"}
        assert_refused(await call(app.asgi, "POST", path, BODIES[path], headers=headers), 415)
        assert_refused(await call(app.asgi, "GET", path), 405)
        assert (await call(app.asgi, "POST", path, BODIES[path])).status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (form(), "image"),
        (form(("top_k", "1")), "image"),
        (form(("image", "text, not a file")), "image"),
        (form(("picture", picture("red"))), "image"),
        (form(("image", b"")), "image"),
        (form(("image", b"<svg/>")), "image"),
        (form(("image", picture("red")))[:-60], None),
        (form(("image", picture("red")), ("file", picture("red"))), None),
        (form(("image", picture("red")), *[("x", "y")] * 20), None),
        (form(("image", picture("red")), ("x", "y" * 100_000)), None),
        (form(("image", picture("red")), ("top_k", "many")), "top_k"),
        (b"--c\r\n\r\n", None),
        (b"--b\r\nno header\r\n\r\n--b--", None),
        (b'--b\r\ncontent-disposition: form-data; filename="x"\r\n\r\nx\r\n--b--', None),
    ],
    ids=lambda value: repr(value)[:60],
)
async def test_a_form_that_is_none_or_has_no_image_is_refused(folders: Folders, body: bytes, param: str | None) -> None:
    async with serving(folders, PAINTER) as app:
        refused = await call(app.asgi, "POST", "/v1/classify", body, headers={"content-type": MULTIPART})
        assert_refused(refused, 400, param=param)
        without_boundary = {"content-type": "multipart/form-data"}
        assert_refused(await call(app.asgi, "POST", "/v1/classify", body, headers=without_boundary), 400)


async def test_a_forms_charset_and_a_bodys_number_of_fields_are_bounded(folders: Folders) -> None:
    async with serving(folders, PAINTER) as app:
        odd = {"content-type": f"{MULTIPART}; charset=undefined"}
        body = form(("image", picture("red")), ("top_k", "1"))
        assert_refused(await call(app.asgi, "POST", "/v1/classify", body, headers=odd), 400, message="charset")
        many = {"image": base64.b64encode(picture("red")).decode(), "x": [1] * 2000}
        assert_refused(await call(app.asgi, "POST", "/v1/classify", many), 400, message="fields")


async def test_no_damage_to_a_form_is_an_internal_error(folders: Folders) -> None:
    rng = np.random.default_rng(0)
    whole = form(("top_k", "1"), ("image", picture("red")), ("model", PAINTER))
    async with serving(folders, PAINTER) as app:
        statuses = set()
        for _ in range(300):
            body = bytearray(whole)
            for at in rng.integers(0, len(body), rng.integers(1, 8)):
                body[at] = rng.integers(0, 256)
            cut = bytes(body[: rng.integers(0, len(body))] if rng.random() < 0.3 else body)
            headers = {"content-type": MULTIPART}
            statuses.add((await call(app.asgi, "POST", "/v1/classify", cut, headers=headers)).status)
        assert statuses <= {200, 400, 404}
        assert statuses >= {200, 400}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.png", "https://example.org/a,b.png", "file:///etc/passwd"])
async def test_no_url_is_ever_fetched(folders: Folders, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"went to the network: {args}")

    async with serving(folders, PAINTER) as app:
        for name in ("getaddrinfo", "create_connection"):
            monkeypatch.setattr(socket, name, connect)
        monkeypatch.setattr(socket.socket, "connect", connect)
        refused = await call(app.asgi, "POST", "/v1/classify", {"image": url})
        assert_refused(refused, 400, param="image", message="URLs are not fetched")


async def test_a_body_over_its_limit_is_413_and_images_have_one_of_their_own(folders: Folders) -> None:
    async with serving(folders, max_body_bytes=1000, max_image_bytes=3000) as app:
        for path in ("/v1/embeddings", "/v1/rerank", "/v1/score"):
            assert_refused(await call(app.asgi, "POST", path, BODIES[path] | {"user": "x" * 1000}), 413)
        padded = BODIES["/v1/classify"] | {"user": "x" * 400}
        assert_refused(await call(app.asgi, "POST", "/v1/classify", padded | {"more": "x" * 3000}), 413)
        assert (await call(app.asgi, "POST", "/v1/classify", padded | {"more": "x" * 1000})).status == 200
        too_large = form(("image", picture("red") + bytes(3000)))
        headers = {"content-type": MULTIPART}
        assert_refused(await call(app.asgi, "POST", "/v1/classify", too_large, headers=headers), 413)


async def test_an_image_of_too_many_pixels_is_refused(folders: Folders) -> None:
    async with serving(folders, PAINTER, max_image_pixels=599) as app:
        refused = await call(app.asgi, "POST", "/v1/classify", BODIES["/v1/classify"])
        assert_refused(refused, 400, param="image", message="20 x 30 pixels")


async def test_a_model_is_found_by_its_name_and_task(folders: Folders) -> None:
    twins = [FakeOneShot(name, OneShotTask.EMBED, folders[EMBEDDER]) for name in ("one", "two")]
    async with live_app(one_shots=[*twins, FakeOneShot(RANKER, OneShotTask.SCORE, folders[RANKER])]) as app:
        several = await embed(app, "river")
        assert_refused(several, 404, param="model", code="model_not_found", message="`one`, `two`")
        for name in ("one", "two"):
            assert (await embed(app, "river", model=name)).json()["model"] == name
            assert app.fakes[name].sizes == [1]
        for name in ("three", "fake", RANKER, ""):
            assert_refused(await embed(app, "river", model=name), 404, param="model", code="model_not_found")
        none = await call(app.asgi, "POST", "/v1/classify", BODIES["/v1/classify"])
        assert_refused(none, 404, param="model", code="model_not_found", message="classify")


async def test_without_such_models_their_routes_say_so() -> None:
    async with live_app() as app:
        for path, body in BODIES.items():
            assert_refused(await call(app.asgi, "POST", path, body), 404, param="model", code="model_not_found")


async def test_while_a_model_is_loading_it_is_503(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app:
        [model] = app.one_shots.models
        reader, model.reader = model.reader, None
        refused = await embed(app, "river")
        assert_refused(refused, 503, code="loading")
        assert "retry-after" in refused.headers
        assert (await call(app.asgi, "GET", "/ready")).status == 503
        model.reader = reader
        assert vectors(await embed(app, "river")) == expected("river")


async def test_a_model_that_computes_nothing_is_told_to_the_operator(folders: Folders) -> None:
    fake = FakeOneShot(EMBEDDER, OneShotTask.EMBED, folders[EMBEDDER])
    fake.model.fail_next = True
    app = LiveApp(load_settings([], {}), FakeRunner(), make_scheduler(), one_shots=[fake])
    told: list[Exception | None] = []
    app._on_engine_change = told.append
    async with app.asgi.router.lifespan_context(app.asgi):
        await app.settled.wait()
        await app.until(lambda: told != [])
    [error] = told
    assert isinstance(error, ModelSourceError)


# What fails, and whose it is.


async def test_an_answer_that_is_no_number_fails_alone(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        before = samples(app)
        async with held(app) as (_, fake):
            requests = [begin_embedding(app, tasks, text) for text in ("river", "nothing", "mill")]
            await app.until(lambda: num_waiting(app) == 3)
        for request in requests:
            await request.done.wait()
        assert fake.sizes == [1, 3]
        assert_refused(requests[1], 500, code="engine_error")
        assert vectors(requests[0]) + vectors(requests[2]) == expected("river", "mill")
        assert changes(app, before, outcome("ok"), outcome("error")) == [3, 1]
        # Of a request all is answered or nothing.
        assert_refused(await embed(app, ["river", "nothing"]), 500, code="engine_error")


async def test_a_batch_that_fails_is_divided_until_the_item_that_fails_it_is_alone(
    folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        async with held(app) as (_, fake):
            texts = ["river", "mill", "poison", "stone"]
            requests = [begin_embedding(app, tasks, text) for text in texts]
            await app.until(lambda: num_waiting(app) == 4)
        for request in requests:
            await request.done.wait()
        assert fake.sizes == [1, 4, 2, 2, 1, 1]
        refused = requests.pop(2)
        assert_refused(refused, 500, code="engine_error")
        assert "as told" not in refused.body.decode(), "a client is not told what went wrong inside"
        assert [vectors(request) for request in requests] == [expected(text) for text in ("river", "mill", "stone")]
    assert "the fake one-shot model fails as told" in caplog.text


async def test_a_batch_that_fails_once_costs_nobody_of_several_an_answer(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app:
        app.fakes[EMBEDDER].fail_next = True
        assert vectors(await embed(app, ["river", "mill"])) == expected("river", "mill")


async def test_an_answer_that_cannot_be_made_is_an_internal_error(
    folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(folders, EMBEDDER) as app:
        app.fakes[EMBEDDER]._answer = lambda row: np.zeros((), np.float32)  # no vector
        assert_refused(await embed(app, "river", dimensions=2), 500, code="internal_error")
    assert "/v1/embeddings failed" in caplog.text


# Who leaves, and who waits too long.


async def test_who_leaves_the_queue_is_not_computed(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        before = samples(app)
        async with held(app) as (first, fake):
            leaving, staying = (begin_embedding(app, tasks, text) for text in (["river", "mill"], "stone"))
            await app.until(lambda: num_waiting(app) == 3)
            leaving.disconnect()
            await leaving.done.wait()
            assert leaving.messages == []
            assert num_waiting(app) == 1
        await staying.done.wait()
        assert (vectors(first), vectors(staying)) == (expected("the"), expected("stone"))
        assert fake.sizes == [1, 1]
        names = [outcome("cancelled"), 'requests_cancelled_total{phase="queued"}']
        assert changes(app, before, *names) == [2, 1]


async def test_a_batch_that_nobody_waits_for_is_given_up_and_the_next_computed(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        async with held(app) as (first, fake):
            staying = begin_embedding(app, tasks, "river")
            await app.until(lambda: num_waiting(app) == 1)
            first.disconnect()
            await first.done.wait()
            await app.until(lambda: len(fake.batches) == 2)
            assert fake.num_abandoned == 1
        await staying.done.wait()
        assert vectors(staying) == expected("river")


async def test_who_leaves_a_shared_batch_takes_nobody_along(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        fake = app.fakes[EMBEDDER]
        with fake.held():
            # Those that come while one is held share the batch behind it.
            first = begin_embedding(app, tasks, "the")
            await app.until(lambda: fake.sizes == [1])
            leaving, staying = (begin_embedding(app, tasks, text) for text in ("river", "mill"))
            await app.until(lambda: num_waiting(app) == 2)
            first.disconnect()
            await app.until(lambda: fake.sizes == [1, 2])
            leaving.disconnect()
            await leaving.done.wait()
            assert app.one_shots.num_unfinished == 1
        await staying.done.wait()
        assert vectors(staying) == expected("mill")
        assert fake.num_abandoned == 1


async def test_who_leaves_while_the_input_is_read_reaches_no_queue(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        is_reading, may_finish = hold_reading(app)
        before = samples(app)
        leaving = begin_embedding(app, tasks, "river")
        await app.until(is_reading.is_set)
        leaving.disconnect()
        await anyio.wait_all_tasks_blocked()
        may_finish.set()  # a thread cannot be stopped, and counts as busy until it is done
        await leaving.done.wait()
        assert leaving.messages == []
        assert changes(app, before, 'requests_cancelled_total{phase="tokenizing"}', outcome("cancelled")) == [1, 0]
        assert app.fakes[EMBEDDER].batches == []


@pytest.mark.parametrize("where", ["waiting", "computed"])
async def test_a_deadline_that_passes_is_504_and_frees_what_it_held(folders: Folders, where: str) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        before = samples(app)
        if where == "waiting":
            async with held(app):
                late = await embed(app, ["river", "mill"], timeout=0.02)
                assert num_waiting(app) == 0
        else:
            with app.fakes[EMBEDDER].held():
                late = await embed(app, ["river", "mill"], timeout=0.02)
                await app.until(lambda: app.fakes[EMBEDDER].num_abandoned == 1)
        assert_refused(late, 504, code="deadline_exceeded", message="not answered within ")
        assert late.headers["x-should-retry"] == "false"
        assert changes(app, before, outcome("deadline"), outcome("cancelled")) == [2, 0]
        after = begin_embedding(app, tasks, "stone")
        await after.done.wait()
        assert vectors(after) == expected("stone")


async def test_the_servers_own_deadline_holds_whatever_a_request_asks_for(folders: Folders) -> None:
    async with serving(folders, EMBEDDER, request_timeout_s=0.3) as app:
        with app.fakes[EMBEDDER].held():
            assert_refused(await embed(app, "river", timeout=1000), 504, code="deadline_exceeded")
            await app.until(lambda: app.fakes[EMBEDDER].num_abandoned == 1)


# Tenants.


class Tenants:
    """The keys of some tenants, in a file, and calls made with them."""

    def __init__(self, folder: Path, **keys: dict[str, Any]) -> None:
        self.file = folder / "keys.toml"
        self._secrets = {}
        for name, fields in keys.items():
            self._secrets[name], key = create_key(name)
            with self.file.open("a") as file:
                file.write(key.model_copy(update=fields).as_toml())

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self._secrets[name]}"}


async def test_without_a_key_nothing_is_computed(folders: Folders, tmp_path: Path) -> None:
    tenants = Tenants(tmp_path, alice={})
    async with serving(folders, api_keys_file=tenants.file) as app:
        for path, body in BODIES.items():
            assert_refused(await call(app.asgi, "POST", path, body), 401, code="invalid_api_key")
            assert (await call(app.asgi, "POST", path, body, headers=tenants.headers("alice"))).status == 200
        assert (await call(app.asgi, "GET", "/classify")).status == 200, "a page carries no key until it calls"


async def test_who_fills_the_queue_shuts_himself_out_and_nobody_else(folders: Folders, tmp_path: Path) -> None:
    tenants = Tenants(tmp_path, alice={}, bob={})
    keys = {"api_keys_file": tenants.file}
    async with serving(folders, EMBEDDER, batching={"max_queue_size": 4}, **keys) as app:
        fake, alice, bob = app.fakes[EMBEDDER], tenants.headers("alice"), tenants.headers("bob")
        async with anyio.create_task_group() as tasks:
            with fake.held():
                requests = [begin_embedding(app, tasks, "the", **alice)]
                await app.until(lambda: fake.sizes == [1])
                requests.append(begin_embedding(app, tasks, ["river"] * 4, **alice))
                await app.until(lambda: num_waiting(app) == 4)
                before = samples(app)
                full = await embed(app, "mill", alice)
                assert_refused(full, 429, code="queue_full")
                assert full.json()["error"]["tier"] == "standard"
                assert 1 <= int(full.headers["retry-after"]) <= 120
                assert int(full.headers["retry-after-ms"]) > 0
                names = [outcome("refused"), 'requests_shed_total{reason="queue_full",tier="standard"}']
                assert changes(app, before, *names) == [1, 1]
                never = await embed(app, ["mill"] * 5, bob)
                assert_refused(never, 400, message="more than this server can queue")
                requests.append(begin_embedding(app, tasks, ["mill"] * 2, **bob))
                await app.until(lambda: num_waiting(app) == 6)
                assert_refused(await embed(app, "mill", bob), 429, code="queue_full")
            for request in requests:
                await request.done.wait()
        assert [vectors(request) for request in requests] == [
            expected("the"),
            expected(*["river"] * 4),
            expected("mill", "mill"),
        ]


async def test_too_many_bytes_being_read_at_once_are_429(folders: Folders) -> None:
    async with serving(folders, EMBEDDER, max_queue_bytes=1000) as app, anyio.create_task_group() as tasks:
        is_reading, may_finish = hold_reading(app)
        first = begin_embedding(app, tasks, ["river"] * 150)  # who comes alone is read, whatever it is
        await app.until(is_reading.is_set)
        refused = await embed(app, "mill")
        assert_refused(refused, 429, code="queue_full", message="bytes of requests")
        assert "retry-after" in refused.headers
        may_finish.set()
        await first.done.wait()
        assert vectors(first) == expected(*["river"] * 150)
        assert vectors(await embed(app, "mill")) == expected("mill")


async def test_requests_per_minute_are_counted_one_by_one_whatever_they_hold(folders: Folders, tmp_path: Path) -> None:
    tenants = Tenants(tmp_path, alice={"requests_per_minute": 2}, bob={})
    async with serving(folders, api_keys_file=tenants.file) as app:
        alice = tenants.headers("alice")
        before = samples(app)
        assert (await embed(app, ["river"] * 20, alice)).status == 200
        assert (await call(app.asgi, "POST", "/v1/classify", BODIES["/v1/classify"], headers=alice)).status == 200
        refused = await embed(app, "river", alice)
        assert_refused(refused, 429, code="rate_limit_exceeded", message="2 requests per minute")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert changes(app, before, 'requests_shed_total{reason="rate_limit",tier="standard"}') == [1]
        assert (await embed(app, "river", tenants.headers("bob"))).status == 200


async def test_tokens_of_texts_are_charged_and_images_have_none(folders: Folders, tmp_path: Path) -> None:
    tenants = Tenants(tmp_path, alice={"tokens_per_minute": 20})
    async with serving(folders, api_keys_file=tenants.file) as app:
        alice = tenants.headers("alice")
        for _ in range(3):
            answer = await call(app.asgi, "POST", "/v1/classify", BODIES["/v1/classify"], headers=alice)
            assert answer.status == 200
        assert (await embed(app, ["the river"] * 3, alice)).json()["usage"]["total_tokens"] == 12
        assert (await call(app.asgi, "POST", "/v1/score", BODIES["/v1/score"], headers=alice)).status == 200  # 5
        assert (await embed(app, ["river"] * 10, alice)).status == 200, "the last one let in may exceed the limit"
        refused = await embed(app, "river", alice)
        assert_refused(refused, 429, code="rate_limit_exceeded", message="20 tokens per minute")


async def test_tokens_of_what_the_queue_does_not_take_are_not_charged(folders: Folders, tmp_path: Path) -> None:
    tenants = Tenants(tmp_path, alice={"tokens_per_minute": 20})
    keys = {"api_keys_file": tenants.file}
    async with serving(folders, EMBEDDER, batching={"max_queue_size": 1}, **keys) as app:
        alice = tenants.headers("alice")
        async with anyio.create_task_group() as tasks, held(app, **alice) as (first, _):
            waiting = begin_embedding(app, tasks, "the", **alice)
            await app.until(lambda: num_waiting(app) == 1)
            for _ in range(10):
                assert_refused(await embed(app, "river mill", alice), 429, code="queue_full")
                assert_refused(await embed(app, ["river", "mill"], alice), 400)
        assert vectors(first) == vectors(waiting) == expected("the")
        assert (await embed(app, "river mill", alice)).status == 200


async def test_a_key_of_one_answer_at_once_holds_its_place_until_it_is_answered(
    folders: Folders, tmp_path: Path
) -> None:
    tenants = Tenants(tmp_path, alice={"max_concurrent": 1}, bob={})
    async with serving(folders, EMBEDDER, api_keys_file=tenants.file) as app, anyio.create_task_group() as tasks:
        fake, alice = app.fakes[EMBEDDER], tenants.headers("alice")
        with fake.held():
            first = begin_embedding(app, tasks, "river", **alice)
            await app.until(lambda: fake.sizes == [1])
            assert_refused(
                await embed(app, "mill", alice), 429, code="rate_limit_exceeded", message="1 answers at once"
            )
            first.disconnect()
            await first.done.wait()
            second = begin_embedding(app, tasks, "stone", **alice)
            await app.until(lambda: len(fake.batches) == 2)
        await second.done.wait()
        assert vectors(second) == expected("stone")
        assert app.limits.num_running("alice") == 0


async def test_tiers_share_the_batches_by_their_weights(folders: Folders, tmp_path: Path) -> None:
    tenants = Tenants(tmp_path, first={"tier": Tier.PREMIUM}, last={"tier": Tier.BATCH})
    keys = {"api_keys_file": tenants.file}
    async with serving(folders, EMBEDDER, batching={"max_batch_size": 1}, **keys) as app:
        async with anyio.create_task_group() as tasks, held(app, **tenants.headers("first")) as (_, fake):
            for text, name in (("stone", "last"), ("river", "first")):
                begin_embedding(app, tasks, [text] * 32, **tenants.headers(name))
            await app.until(lambda: num_waiting(app) == 64)
        words = [row[1] for [row] in fake.batches[1:]]
        premium, batch = token_ids("river")[1], token_ids("stone")[1]
        assert words[:27].count(premium) == 24, "8 to 1"
        assert words.count(premium) == words.count(batch) == 32


# What is told.


async def test_batches_and_items_are_measured(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        before = samples(app)
        assert before['batch_queue_depth{model="embedder"}'] == 0
        async with held(app):
            # Together, padded to 10 tokens each: 30, of which 2 are padding.
            for words in (8, 8, 6):
                begin_embedding(app, tasks, " ".join(["river"] * words))
            await app.until(lambda: num_waiting(app) == 3)
            assert samples(app)['batch_queue_depth{model="embedder"}'] == 3
        await app.until(lambda: app.one_shots.num_unfinished == 0)
        assert changes(
            app,
            before,
            'batch_size_count{model="embedder"}',
            'batch_size_sum{model="embedder"}',
            'batch_wait_seconds_count{model="embedder"}',
            'batch_compute_seconds_count{model="embedder"}',
            'batch_cost_total{model="embedder"}',
            outcome("ok"),
        ) == [2, 4, 4, 2, 3 + 30, 4]
        [padding] = changes(app, before, 'batch_padding_total{model="embedder"}')
        assert padding == pytest.approx(2)
        after = samples(app)
        assert after['model_bytes{model="embedder"}'] == 1000
        assert after['batch_queue_depth{model="embedder"}'] == 0
        assert changes(app, before, 'batch_wait_seconds_sum{model="embedder"}')[0] > 0


async def test_every_request_has_one_line_in_the_log_without_its_content(
    folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    async with serving(folders) as app, anyio.create_task_group() as tasks:
        answers = [
            await embed(app, ["river", "stone mill"]),
            await call(app.asgi, "POST", "/v1/classify", BODIES["/v1/classify"]),
            await embed(app, ["river"], dimensions=-1),
        ]
        async with held(app) as (first, _):
            leaving = begin_embedding(app, tasks, "river")
            await app.until(lambda: num_waiting(app) == 1)
            leaving.disconnect()
            await leaving.done.wait()
            late = await embed(app, "river", timeout=0.01)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "headrace.requests"]
    assert [line["finish_reason"] for line in lines] == [
        "answered",
        "answered",
        "refused: 400",
        "cancelled: queued",
        "refused: 504",
        "answered",
    ]
    ids = [answer.headers["x-request-id"] for answer in (*answers, late, first)]
    assert [line["id"] for line in lines[:3] + lines[4:]] == ids
    assert lines[0].items() >= {"route": "/v1/embeddings", "prompt_tokens": 7, "items": 2}.items()
    assert lines[1].items() >= {"route": "/v1/classify", "prompt_tokens": 0, "items": 1}.items()
    stages = list(lines[0]["stages_ms"].items())
    assert [name for name, _ in stages] == ["tokenized", "computed", "end"]
    assert all(0 <= before <= after for (_, before), (_, after) in pairwise(stages))
    assert not any("river" in json.dumps(line) or IMAGE[:20] in json.dumps(line) for line in lines)


# The end, and the streams beside it.


async def test_a_drain_lets_those_accepted_finish_and_refuses_others(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        drained = anyio.Event()

        async def end() -> None:
            await drain(app, 20, anyio.Event())
            drained.set()

        async with held(app) as (first, _):
            waiting = begin_embedding(app, tasks, "river")
            await app.until(lambda: num_waiting(app) == 1)
            tasks.start_soon(end)
            await anyio.wait_all_tasks_blocked()
            refused = await embed(app, "mill")
            assert_refused(refused, 503, code="draining")
            assert "retry-after" in refused.headers
            assert not drained.is_set()
        await waiting.done.wait()
        assert vectors(first) + vectors(waiting) == expected("the", "river")
        await drained.wait()


async def test_a_server_that_ends_in_the_middle_tells_those_it_has(folders: Folders) -> None:
    async with anyio.create_task_group() as tasks:
        async with serving(folders, EMBEDDER) as app:
            with app.fakes[EMBEDDER].held():
                requests = [begin_embedding(app, tasks, "the")]
                await app.until(lambda: app.fakes[EMBEDDER].sizes == [1])
                requests.append(begin_embedding(app, tasks, ["river", "mill"]))
                await app.until(lambda: num_waiting(app) == 2)
                app.client._engine.stop()
                for request in requests:
                    await request.done.wait()
        for request in requests:
            assert request.status in (500, 503)
            assert request.json()["error"]["type"] in ("server_error", "unavailable_error")
    assert app.fakes[EMBEDDER].num_abandoned == 1


async def test_an_engine_that_dies_ends_them_with_an_error(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_books(*ids: int) -> None:
        raise ValueError("the scheduler's books are wrong")

    async with anyio.create_task_group() as tasks, serving(folders, EMBEDDER) as app:
        with app.fakes[EMBEDDER].held():
            first = begin_embedding(app, tasks, ["the", "a"])
            await app.until(lambda: len(app.fakes[EMBEDDER].batches) == 1)
            waiting = begin_embedding(app, tasks, "river")
            await app.until(lambda: num_waiting(app) == 1)
            monkeypatch.setattr(app.scheduler, "cancel", break_books)
            app.client._engine.cancel(10**9)
            for request in (first, waiting):
                await request.done.wait()
                assert request.status in (500, 503)
                assert request.json()["error"]["code"] in ("engine_error", "engine_dead")
        after = await embed(app, "river")
        assert_refused(after, 503, code="engine_dead")
        assert after.headers["x-should-retry"] == "false"
        assert (await call(app.asgi, "GET", "/health")).status == 503


async def test_streams_go_on_while_a_batch_is_between_its_layers(folders: Folders) -> None:
    async with serving(folders, EMBEDDER) as app, anyio.create_task_group() as tasks:
        async with held(app) as (first, fake):
            streams = []
            for prompt in ("river", "mill"):
                body = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
                streams.append(begin(app, tasks, "/v1/completions", body))
            for stream, prompt in zip(streams, ("river", "mill"), strict=True):
                await stream.done.wait()
                assert stream.json()["choices"][0]["text"] == expected_text(prompt, 40)
            assert not first.done.is_set()
            assert fake.sizes == [1]
        assert vectors(first) == expected("the")


async def test_batches_are_computed_while_streams_run_and_both_are_what_they_are_alone(folders: Folders) -> None:
    async with serving(folders) as app, anyio.create_task_group() as tasks:
        bodies = [{"prompt": f"stream {i}", "max_tokens": 60, "temperature": 0} for i in range(6)]
        streams = [begin(app, tasks, "/v1/completions", body) for body in bodies]
        embeddings = [begin_embedding(app, tasks, text) for text in DOCUMENTS * 4]
        images = [begin(app, tasks, "/v1/classify", BODIES["/v1/classify"]) for _ in range(4)]
        for request in (*streams, *embeddings, *images):
            await request.done.wait()
        texts = [stream.json()["choices"][0]["text"] for stream in streams]
        assert texts == [expected_text(f"stream {i}", 60) for i in range(6)]
        assert [vectors(request)[0] for request in embeddings] == expected(*DOCUMENTS * 4)
        assert {image.json()["predictions"][0]["label"] for image in images} == {"red"}


async def test_one_models_batches_do_not_wait_in_anothers_queue(folders: Folders) -> None:
    async with serving(folders) as app, anyio.create_task_group() as tasks:
        async with held(app) as (first, _):
            # Accepted and handed over while the other is computed, and computed in its turn.
            score = begin(app, tasks, "/v1/score", BODIES["/v1/score"])
            await app.until(lambda: app.num_unfinished == 2 and num_waiting(app, RANKER) == 0)
        await score.done.wait()
        assert (first.status, score.status) == (200, 200)
