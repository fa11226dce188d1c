"""What the proxy merges, in each protocol: a request into items, items into one upstream body, its answer into parts.

Pure: no clock, socket or queue. A protocol reads a request's fields and says which of its parts are items that may
share an upstream request with those of others; what it cannot tell apart again it leaves alone, and the request is
passed through. Merging and splitting are inverse: an item's part is what the upstream would have answered to it alone,
but for counts of tokens, which are shared out.
Sources: OpenAI's API reference (embeddings, completions), the Open Inference Protocol v2 (KServe), TensorFlow Serving's
RESTful API; the generic form is this proxy's own.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, NamedTuple

from headrace.server.errors import ApiError, BadGatewayError

# An answer that has not a result for each item; asking for fewer at once may mend it.
WRONG_COUNT = "upstream_wrong_count"


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for. `items` may share a batch with those of requests whose `shared` fields and `shape` are
    equal; `own` is what goes from the request into its answer."""

    shared: Mapping[str, Any]
    items: Sequence[Any]
    costs: Sequence[float]
    shape: Hashable = None
    is_streamed: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> Hashable:
        # As text: in Python 1, 1.0 and True are equal, and an upstream may tell them apart.
        return json.dumps(self.shared, sort_keys=True), self.shape, self.is_streamed


class MergedProtocol(ABC):
    """One protocol's requests. `name` tells its lanes apart."""

    name: ClassVar[str]

    @abstractmethod
    def read(self, fields: dict[str, Any]) -> Ask | None:
        """A request's items; None where it must be passed through as it is."""

    @abstractmethod
    def merge(self, shared: Mapping[str, Any], items: Sequence[Any]) -> dict[str, Any]:
        """The upstream's body for items of equal groups."""

    @abstractmethod
    def split(self, items: Sequence[Any], answer: Any) -> list[Any]:
        """Each item's part of the answer. Raises: BadGatewayError."""

    @abstractmethod
    def join(self, ask: Ask, parts: Sequence[Any], id: str) -> dict[str, Any]:
        """A request's answer, made of its items' parts."""


class _Part(NamedTuple):
    """One item's result, its share of the usage, and the fields that stand around the results."""

    result: dict[str, Any]
    usage: dict[str, Any] | None
    around: dict[str, Any]


class _OpenAI(MergedProtocol):
    input_field: ClassVar[str]
    output_field: ClassVar[str]

    def merge(self, shared: Mapping[str, Any], items: Sequence[Any]) -> dict[str, Any]:
        return {**shared, self.input_field: list(items)}

    def split(self, items: Sequence[Any], answer: Any) -> list[_Part]:
        results = list_of(answer, self.output_field, len(items))
        by_index = {str(result.get("index", i)): result for i, result in enumerate(results) if isinstance(result, dict)}
        if set(by_index) != {str(i) for i in range(len(items))}:
            raise BadGatewayError("the upstream's results are not numbered from 0 on", WRONG_COUNT)
        around = {name: value for name, value in answer.items() if name not in (self.output_field, "usage")}
        ordered = [by_index[str(i)] for i in range(len(items))]
        usages = split_usage(answer.get("usage"), items, [len(str(result.get("text", ""))) for result in ordered])
        return [_Part(result, usage, around) for result, usage in zip(ordered, usages, strict=True)]

    def join(self, ask: Ask, parts: Sequence[_Part], id: str) -> dict[str, Any]:
        results = [{**part.result, "index": i} for i, part in enumerate(parts)]
        usages = [part.usage for part in parts if part.usage is not None]
        usage = {"usage": sum_usage(usages)} if usages else {}
        return {**parts[0].around, self.output_field: results, **usage}

    def _read_inputs(self, fields: dict[str, Any], **options: Any) -> Ask | None:
        shared = {name: value for name, value in fields.items() if name != self.input_field}
        found = _texts_or_token_ids(fields.get(self.input_field))
        if found is None:
            return None
        inputs, is_text = found
        costs = [max(1.0, len(text) / (4 if is_text else 1)) for text in inputs]
        return Ask(shared, inputs, costs, is_text, **options)


class Embeddings(_OpenAI):
    """POST /v1/embeddings."""

    name, input_field, output_field = "embeddings", "input", "data"

    def read(self, fields: dict[str, Any]) -> Ask | None:
        return self._read_inputs(fields)


class Completions(_OpenAI):
    """POST /v1/completions, one choice per prompt, streamed or not."""

    name, input_field, output_field = "completions", "prompt", "choices"

    def read(self, fields: dict[str, Any]) -> Ask | None:
        if any(fields.get(name) not in (None, 1) for name in ("n", "best_of")):
            return None
        is_streamed, options = fields.get("stream"), fields.get("stream_options")
        has_usages = isinstance(options, dict) and options.get("continuous_usage_stats")
        if not (is_streamed is None or isinstance(is_streamed, bool)) or has_usages:
            return None
        return self._read_inputs(fields, is_streamed=bool(is_streamed))

    def join(self, ask: Ask, parts: Sequence[_Part], id: str) -> dict[str, Any]:
        return {**super().join(ask, parts, id), "id": f"cmpl-{id}"}


class CompletionSplitter:
    """A stream of many prompts' chunks, chunk by chunk. A chunk's parts have one choice each, whose `index` the caller
    sets; the usage at the end has none."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        self._num_chars = [0] * len(items)

    def split(self, chunk: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """(Item, its part) of what a chunk holds. Raises: BadGatewayError."""
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list):
            raise BadGatewayError("the upstream streams something else than completions", "upstream_bad_answer")
        for choice in choices:
            index = choice.get("index", 0) if isinstance(choice, dict) else None
            if not isinstance(index, int) or not 0 <= index < len(self._items):
                raise BadGatewayError("the upstream streams a choice that nobody asked for", WRONG_COUNT)
            self._num_chars[index] += len(str(choice.get("text") or ""))
            yield index, {**chunk, "choices": [choice]}
        if not choices:
            usages = split_usage(chunk.get("usage"), self._items, self._num_chars)
            for index, usage in enumerate(usages):
                if usage is not None:
                    yield index, {**chunk, "usage": usage}


class Tensors(MergedProtocol):
    """POST /v2/models/{model}/infer, in JSON: a request is an item, whose rows are concatenated to those of others."""

    name = "infer"

    def read(self, fields: dict[str, Any]) -> Ask | None:
        shared = {name: value for name, value in fields.items() if name not in ("id", "inputs")}
        if _wants_binary(fields):
            return None
        inputs = fields.get("inputs")
        if not isinstance(inputs, list) or not inputs:
            return None
        num_rows = _num_rows(inputs)
        if num_rows is None:
            return None
        shape = json.dumps([_without_rows(tensor) for tensor in inputs], sort_keys=True)
        is_flat = tuple(_is_flat(tensor) for tensor in inputs)
        own = {"id": fields["id"]} if "id" in fields else {}
        return Ask(shared, [inputs], [float(num_rows)], (shape, is_flat), own=own)

    def merge(self, shared: Mapping[str, Any], items: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
        merged = []
        for tensors in zip(*items, strict=True):
            num_rows = sum(tensor["shape"][0] for tensor in tensors)
            data = [row for tensor in tensors for row in tensor["data"]]
            merged.append({**tensors[0], "shape": [num_rows, *tensors[0]["shape"][1:]], "data": data})
        return {**shared, "inputs": merged}

    def split(self, items: Sequence[list[dict[str, Any]]], answer: Any) -> list[dict[str, Any]]:
        if len(items) == 1 and isinstance(answer, dict):
            return [answer]
        outputs = list_of(answer, "outputs", None)
        counts = [inputs[0]["shape"][0] for inputs in items]
        if outputs and _num_rows(outputs) != sum(counts):
            raise BadGatewayError("the upstream's outputs have not a row for each of the inputs'", WRONG_COUNT)
        parts = []
        start = 0
        for count in counts:
            rows = [_rows(output, start, count) for output in outputs]
            parts.append({**answer, "outputs": rows})
            start += count
        return parts

    def join(self, ask: Ask, parts: Sequence[dict[str, Any]], id: str) -> dict[str, Any]:
        [part] = parts
        return {**{name: value for name, value in part.items() if name != "id" or not ask.own}, **ask.own}


class Instances(MergedProtocol):
    """POST /v1/models/{model}:predict in TensorFlow Serving's row form."""

    name = "predict"

    def read(self, fields: dict[str, Any]) -> Ask | None:
        instances = fields.get("instances")
        if not isinstance(instances, list) or not instances or "inputs" in fields:
            return None
        shapes = {_shape_of(instance) for instance in instances}
        if len(shapes) > 1:
            return None
        shared = {name: value for name, value in fields.items() if name != "instances"}
        return Ask(shared, instances, [1.0] * len(instances), shapes.pop())

    def merge(self, shared: Mapping[str, Any], items: Sequence[Any]) -> dict[str, Any]:
        return {**shared, "instances": list(items)}

    def split(self, items: Sequence[Any], answer: Any) -> list[Any]:
        return list_of(answer, "predictions", len(items))

    def join(self, ask: Ask, parts: Sequence[Any], id: str) -> dict[str, Any]:
        return {"predictions": list(parts)}


class Items(MergedProtocol):
    """POST /batch: {"items": [...]} -> {"results": [...]}, and one at a time {"item": x} -> {"result": y}.

    A result that is an object with `error` alone is that item's failure.
    """

    name = "batch"

    def read(self, fields: dict[str, Any]) -> Ask | None:
        is_single = "item" in fields
        items = [fields["item"]] if is_single else fields.get("items")
        if not isinstance(items, list) or not items or (is_single and "items" in fields):
            return None
        shared = {name: value for name, value in fields.items() if name not in ("item", "items")}
        return Ask(shared, items, [1.0] * len(items), own={"is_single": is_single})

    def merge(self, shared: Mapping[str, Any], items: Sequence[Any]) -> dict[str, Any]:
        return {**shared, "items": list(items)}

    def split(self, items: Sequence[Any], answer: Any) -> list[Any]:
        return list_of(answer, "results", len(items))

    def join(self, ask: Ask, parts: Sequence[Any], id: str) -> dict[str, Any]:
        if ask.own["is_single"]:
            [part] = parts
            return part if is_failed(part) else {"result": part}
        return {"results": [_failure(part) if isinstance(part, ApiError) else part for part in parts]}


def is_failed(result: Any) -> bool:
    """Whether a result of the generic form is an item's failure."""
    return isinstance(result, dict) and set(result) == {"error"}


def _failure(error: ApiError) -> dict[str, Any]:
    body = error.envelope()
    return body if is_failed(body) else {"error": body}


def list_of(answer: Any, name: str, num_expected: int | None) -> list[Any]:
    """An answer's list. Raises: BadGatewayError where there is none, or one of another length."""
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise BadGatewayError(f"the upstream's answer has no list of {name}", "upstream_bad_answer")
    if num_expected is not None and len(found) != num_expected:
        raise BadGatewayError(f"the upstream answered {len(found)} {name} to {num_expected} inputs", WRONG_COUNT)
    return found


def share_out(total: int, weights: Sequence[int]) -> list[int]:
    """Split a count in proportion to weights, all of it."""
    weights = weights if sum(weights) else [1] * len(weights)
    shares, done, given = [], 0, 0
    for weight in weights:
        done += weight
        shares.append(total * done // sum(weights) - given)
        given += shares[-1]
    return shares


def split_usage(usage: Any, items: Sequence[Any], num_output_chars: Sequence[int]) -> list[dict[str, Any] | None]:
    """A batch's counts of tokens for each of its texts or lists of tokens, in proportion to their lengths; what is not
    a count belongs to nobody."""
    if len(items) == 1 or not isinstance(usage, dict):
        return [usage if isinstance(usage, dict) else None] * len(items)
    num_input = [len(item) for item in items]
    counts = {name: count for name, count in usage.items() if isinstance(count, int)}
    shares = {
        name: share_out(count, num_output_chars if name == "completion_tokens" else num_input)
        for name, count in counts.items()
    }
    if counts.get("total_tokens") == counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0):
        parts = [shares[name] for name in ("prompt_tokens", "completion_tokens") if name in shares]
        shares["total_tokens"] = [sum(part) for part in zip(*parts, strict=True)]
    return [{name: share[i] for name, share in shares.items()} for i in range(len(items))]


def sum_usage(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of a request's items together."""
    if len(usages) == 1:
        return dict(usages[0])
    counts: dict[str, Any] = {}
    for usage in usages:
        for name, count in usage.items():
            if isinstance(count, int):
                counts[name] = counts.get(name, 0) + count
    return counts


def _texts_or_token_ids(value: Any) -> tuple[list[Any], bool] | None:
    """The inputs, and whether they are texts; None where they are neither texts nor lists of tokens."""
    if isinstance(value, str):
        return [value], True
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return value, True
    if _is_token_ids(value):
        return [value], False
    return (value, False) if all(_is_token_ids(item) for item in value) else None


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _wants_binary(fields: dict[str, Any]) -> bool:
    """Whether tensors shall travel behind the JSON, in either direction."""
    asked = [fields, *_objects(fields.get("inputs")), *_objects(fields.get("outputs"))]
    parameters = [part["parameters"] for part in asked if isinstance(part.get("parameters"), dict)]
    return any(
        found.get(name) for found in parameters for name in ("binary_data", "binary_data_size", "binary_data_output")
    )


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _num_rows(tensors: Sequence[Any]) -> int | None:
    """The first dimension that all tensors have in common; None where they have not, or are no tensors."""
    if not all(_is_tensor(tensor) for tensor in tensors):
        return None
    counts = {tensor["shape"][0] for tensor in tensors}
    return counts.pop() if len(counts) == 1 else None


def _is_tensor(tensor: Any) -> bool:
    """Whether its data is as long as its shape says, flat or nested."""
    if not isinstance(tensor, dict):
        return False
    shape, data = tensor.get("shape"), tensor.get("data")
    if not (isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)):
        return False
    return isinstance(data, list) and len(data) == (prod(shape) if _is_flat(tensor) else shape[0])


def _is_flat(tensor: Mapping[str, Any]) -> bool:
    return len(tensor["shape"]) == 1 or not (tensor["data"] and isinstance(tensor["data"][0], list))


def _without_rows(tensor: Mapping[str, Any]) -> dict[str, Any]:
    """What tensors must have in common to be concatenated."""
    return {**{name: value for name, value in tensor.items() if name != "data"}, "shape": tensor["shape"][1:]}


def _rows(tensor: Mapping[str, Any], start: int, count: int) -> dict[str, Any]:
    per_row = prod(tensor["shape"][1:]) if _is_flat(tensor) else 1
    data = tensor["data"][start * per_row : (start + count) * per_row]
    return {**tensor, "shape": [count, *tensor["shape"][1:]], "data": data}


def _shape_of(instance: Any) -> Hashable:
    """An instance's names, sizes and types, as far as its first elements tell."""
    if isinstance(instance, dict):
        return tuple((name, _shape_of(value)) for name, value in sorted(instance.items()))
    if isinstance(instance, list):
        return len(instance), _shape_of(instance[0]) if instance else None
    return "number" if type(instance) in (int, float) else type(instance).__name__
