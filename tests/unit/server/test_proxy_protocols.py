"""Merging and splitting are inverse: each item gets from a batch what it would have got alone."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from headrace.server.errors import BadGatewayError
from headrace.server.proxy_protocols import (
    Ask,
    Completions,
    CompletionSplitter,
    Embeddings,
    Instances,
    Items,
    MergedProtocol,
    Tensors,
    is_failed,
    share_out,
)

bounded = settings(max_examples=60, derandomize=True, deadline=None)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
token_ids = st.lists(st.integers(0, 999), min_size=1, max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


def answer_openai(field: str, body: dict[str, Any]) -> dict[str, Any]:
    """An upstream that repeats its inputs, last one first."""
    inputs = body["input" if field == "data" else "prompt"]
    results = [{"index": i, "text": str(item)} for i, item in enumerate(inputs)]
    num_input, num_output = sum(map(len, inputs)), sum(len(str(item)) for item in inputs)
    usage = {"prompt_tokens": num_input, "completion_tokens": num_output, "total_tokens": num_input + num_output}
    return {"object": "list", "model": "m", field: results[::-1], "usage": usage}


def read(protocol: MergedProtocol, fields: dict[str, Any]) -> Ask:
    ask = protocol.read(fields)
    assert ask is not None
    return ask


def exchange(protocol: MergedProtocol, requests: Sequence[dict[str, Any]], answer: Any) -> list[dict[str, Any]]:
    """What each request is answered when they all share a batch."""
    asks = [read(protocol, request) for request in requests]
    assert len({ask.group for ask in asks}) == 1
    items = [item for ask in asks for item in ask.items]
    parts = protocol.split(items, answer(protocol.merge(asks[0].shared, items)))
    joined = []
    for ask in asks:
        joined.append(protocol.join(ask, parts[: len(ask.items)], "id"))
        parts = parts[len(ask.items) :]
    return joined


@bounded
@given(st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=4), st.sampled_from(["data", "choices"]))
def test_texts_get_their_own_results_and_the_usage_adds_up(inputs: list[list[str]], field: str) -> None:
    protocol: MergedProtocol = Embeddings() if field == "data" else Completions()
    name = "input" if field == "data" else "prompt"
    requests = [{"model": "m", name: item[0] if len(item) == 1 else item} for item in inputs]
    answers = exchange(protocol, requests, lambda body: answer_openai(field, body))
    for item, answer in zip(inputs, answers, strict=True):
        assert [result["text"] for result in answer[field]] == item
        assert [result["index"] for result in answer[field]] == list(range(len(item)))
    whole = answer_openai(field, {name: [text for item in inputs for text in item]})["usage"]
    for count in whole:
        assert sum(answer["usage"][count] for answer in answers) == whole[count]


@bounded
@given(st.lists(token_ids, min_size=1, max_size=4))
def test_lists_of_tokens_are_inputs_and_a_list_of_numbers_is_one(inputs: list[list[int]]) -> None:
    requests: list[dict[str, Any]] = [{"input": inputs[0]}, {"input": inputs}]
    first, second = exchange(Embeddings(), requests, lambda body: answer_openai("data", body))
    assert [result["text"] for result in first["data"]] == [str(inputs[0])]
    assert [result["text"] for result in second["data"]] == [str(item) for item in inputs]
    assert first["usage"]["prompt_tokens"] == len(inputs[0]), "tokens are counted exactly"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "n": 2},
        {"prompt": "a", "best_of": 3},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a", [1]]},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"prompt": None},
        {},
        {"prompt": "a", "stream": 1},
        {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
    ],
    ids=str,
)
def test_completions_that_cannot_be_told_apart_are_passed_through(fields: dict[str, Any]) -> None:
    assert Completions().read(fields) is None


@pytest.mark.parametrize(
    "other",
    [
        {"model": "other", "prompt": "b"},
        {"model": "m", "prompt": "b", "seed": 7},
        {"model": "m", "prompt": "b", "logprobs": 0},
        {"model": "m", "prompt": "b", "logprobs": False},
        {"model": "m", "prompt": "b", "stream": True},
        {"model": "m", "prompt": [1, 2]},
    ],
    ids=str,
)
def test_only_equal_parameters_share_a_group(other: dict[str, Any]) -> None:
    groups = {read(Completions(), fields).group for fields in ({"model": "m", "prompt": "a"}, other)}
    assert len(groups) == 2


@bounded
@given(
    st.lists(st.lists(texts.filter(bool), min_size=1, max_size=3), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_a_streams_chunks_are_split_whatever_their_order(pieces: list[list[str]], random: Any) -> None:
    prompts = ["x" * (i + 1) for i in range(len(pieces))]
    order = [i for i, item in enumerate(pieces) for _ in item]
    random.shuffle(order)
    left = [list(item) for item in pieces]
    num_chars = sum(len(text) for item in pieces for text in item)
    usage = {
        "prompt_tokens": sum(map(len, prompts)),
        "completion_tokens": num_chars,
        "total_tokens": sum(map(len, prompts)) + num_chars,
    }
    chunks: list[dict[str, Any]] = [{"choices": [{"index": i, "text": left[i].pop(0)}]} for i in order]
    splitter = CompletionSplitter(prompts)
    seen: list[list[str]] = [[] for _ in pieces]
    usages = {}
    for chunk in [*chunks, {"choices": [], "usage": usage}]:
        for i, part in splitter.split(chunk):
            if part["choices"]:
                seen[i].append(part["choices"][0]["text"])
            else:
                usages[i] = part["usage"]
    assert seen == pieces
    assert {i: part["completion_tokens"] for i, part in usages.items()} == {
        i: sum(map(len, item)) for i, item in enumerate(pieces)
    }
    assert sum(part["total_tokens"] for part in usages.values()) == usage["total_tokens"]


def test_a_chunk_of_a_choice_that_nobody_asked_for_is_refused() -> None:
    for index in (1, -1, "0", None):
        with pytest.raises(BadGatewayError):
            list(CompletionSplitter(["a"]).split({"choices": [{"index": index, "text": "x"}]}))


def nested(data: list[float], shape: list[int]) -> Any:
    """Flat data as lists of lists."""
    if len(shape) == 1:
        return data
    size = len(data) // shape[0]
    return [nested(data[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


@bounded
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_tensors_rows_come_back_flat_or_nested(
    counts: list[int], tail: list[int], is_nested_in: bool, is_nested_out: bool
) -> None:
    size = 1
    for length in tail:
        size *= length
    requests = []
    for number, count in enumerate(counts):
        data = [float(100 * number + i) for i in range(count * size)]
        shape = [count, *tail]
        tensor = {
            "name": "x",
            "datatype": "FP32",
            "shape": shape,
            "data": nested(data, shape) if is_nested_in else data,
        }
        requests.append({"id": str(number), "inputs": [tensor], "parameters": {"p": 1}})

    def double(body: dict[str, Any]) -> dict[str, Any]:
        [tensor] = body["inputs"]
        assert body["parameters"] == {"p": 1}
        flat = [2 * value for value in flatten(tensor["data"])]
        data = nested(flat, tensor["shape"]) if is_nested_out else flat
        rows = {"name": "rows", "datatype": "INT64", "shape": [tensor["shape"][0]], "data": list(range(sum(counts)))}
        return {"model_name": "m", "id": "upstream's", "outputs": [{**tensor, "name": "y", "data": data}, rows]}

    answers = exchange(Tensors(), requests, double)
    start = 0
    for number, (count, answer) in enumerate(zip(counts, answers, strict=True)):
        y, rows = answer["outputs"]
        assert answer["id"] == str(number)
        assert y["shape"] == [count, *tail]
        assert flatten(y["data"]) == [2.0 * (100 * number + i) for i in range(count * size)]
        assert rows["data"] == list(range(start, start + count))
        start += count


def flatten(data: list[Any]) -> list[Any]:
    return [value for row in data for value in (flatten(row) if isinstance(row, list) else [row])]


TENSOR = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"inputs": []},
        {"inputs": [7]},
        {"inputs": [TENSOR | {"data": [1, 2, 3]}]},
        {"inputs": [TENSOR | {"shape": [0, 2], "data": []}]},
        {"inputs": [TENSOR | {"shape": []}]},
        {"inputs": [TENSOR, TENSOR | {"name": "y", "shape": [4]}]},
        {"inputs": [TENSOR | {"parameters": {"binary_data_size": 16}}]},
        {"inputs": [TENSOR], "parameters": {"binary_data_output": True}},
        {"inputs": [TENSOR], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]},
    ],
    ids=str,
)
def test_tensors_that_cannot_be_concatenated_are_passed_through(fields: dict[str, Any]) -> None:
    assert Tensors().read(fields) is None


def test_tensors_of_other_kinds_do_not_share_a_group() -> None:
    others: list[dict[str, Any]] = [
        {},
        {"name": "y"},
        {"datatype": "INT32"},
        {"shape": [1, 4]},
        {"shape": [4]},
        {"data": [[1, 2], [3, 4]]},
        {"parameters": {"content_type": "np"}},
    ]
    groups = {read(Tensors(), {"inputs": [TENSOR | other]}).group for other in others}
    assert len(groups) == len(others)


@bounded
@given(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=3), min_size=1, max_size=4))
def test_instances_get_their_predictions(requests: list[list[int]]) -> None:
    answers = exchange(
        Instances(),
        [{"instances": instances, "signature_name": "s"} for instances in requests],
        lambda body: {"predictions": [{"y": -x} for x in body["instances"]]},
    )
    assert answers == [{"predictions": [{"y": -x} for x in instances]} for instances in requests]


def test_instances_of_other_shapes_do_not_share_a_group_and_columns_are_passed_through() -> None:
    shapes: list[Any] = [1, "a", True, [1], [1, 2], [[1]], {"a": 1}, {"b": 1}, {"a": "b"}]
    assert len({read(Instances(), {"instances": [x]}).group for x in shapes}) == len(shapes)
    assert read(Instances(), {"instances": [1]}).group == read(Instances(), {"instances": [2.5]}).group
    others: list[dict[str, Any]] = [{"inputs": [1]}, {"instances": []}, {"instances": 1}, {"instances": [1, [1]]}]
    for fields in others:
        assert Instances().read(fields) is None


@bounded
@given(st.lists(st.lists(values, min_size=1, max_size=3), min_size=1, max_size=4))
def test_items_get_their_results_one_at_a_time_or_many(requests: list[list[Any]]) -> None:
    bodies = [{"item": items[0]} if len(items) == 1 else {"items": items} for items in requests]
    answers = exchange(Items(), bodies, lambda body: {"results": [[item] for item in body["items"]]})
    assert answers == [
        {"result": [items[0]]} if len(items) == 1 else {"results": [[item] for item in items]} for items in requests
    ]


def test_an_items_error_is_its_own() -> None:
    bodies: list[dict[str, Any]] = [{"items": [1, 2]}, {"item": 3}]
    answers = exchange(Items(), bodies, lambda body: {"results": [{"error": "no"}, 2, {"error": "no"}]})
    assert answers == [{"results": [{"error": "no"}, 2]}, {"error": "no"}]
    assert is_failed(answers[1])


@pytest.mark.parametrize(
    ("protocol", "fields", "answers"),
    [
        (Embeddings(), {"input": ["a", "b"]}, [{"data": [{"index": 0}]}, {"data": [{"index": 0}] * 2}, {"data": 1}]),
        (Completions(), {"prompt": ["a", "b"]}, [{"choices": [1, 2]}, {}, []]),
        (Instances(), {"instances": [1, 2]}, [{"predictions": [1, 2, 3]}, "no", None]),
        (Items(), {"items": [1, 2]}, [{"results": []}, {"results": {}}]),
    ],
)
def test_an_answer_without_a_result_for_each_item_is_refused(
    protocol: MergedProtocol, fields: dict[str, Any], answers: list[Any]
) -> None:
    items = read(protocol, fields).items
    for answer in answers:
        with pytest.raises(BadGatewayError):
            protocol.split(items, answer)


def test_outputs_without_the_inputs_rows_are_refused_unless_they_are_one_requests() -> None:
    answer = {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [1]}]}
    assert Tensors().split([[TENSOR]], answer) == [answer]
    with pytest.raises(BadGatewayError):
        Tensors().split([[TENSOR], [TENSOR]], answer)


@bounded
@given(st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_a_count_is_shared_out_whole_and_in_proportion(total: int, weights: list[int]) -> None:
    shares = share_out(total, weights)
    assert sum(shares) == total
    if sum(weights):
        assert all(abs(share - total * w / sum(weights)) <= 1 for share, w in zip(shares, weights, strict=True))
