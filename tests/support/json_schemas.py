"""Random JSON schemas of what structured output supports, and what it does not, each with the keyword to be named.

Made of a `random.Random`, so that a seed says which one failed. Every schema has an instance: properties, items and
alternatives are made independently of each other, and bounds leave room.
"""

import datetime
import json
import random
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

Schema = dict[str, Any]

UNSUPPORTED: dict[str, Any] = {
    "uniqueItems": True,
    "contains": {"type": "integer"},
    "minContains": 1,
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "not": {"type": "null"},
    "if": {"type": "string"},
    "then": {},
    "else": {},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "propertyNames": {"pattern": "^a"},
    "$dynamicRef": "#a",
}
_NAMES = ["id", "name", "größe", "x y", 'say "so"', "日付", "a/b~c", "", "tags", "child"]
_PATTERNS = ["^[A-Z]{2}-[0-9]{1,3}$", "^(yes|no)$", "^[a-z]+(_[a-z]+)?$", "[0-9]", "^\\d{2}:\\d{2}$"]
_FORMATS = ["date", "ipv4", "uuid", "email"]
_CONSTANTS: list[Any] = [None, True, 0, -1, 17, 0.5, "", "ok", "süß 😀", 'a"b\\c\n', [], [1, [2]], {}, {"k": "v"}]


_FORMAT_CHECKER = FormatChecker()


@_FORMAT_CHECKER.checks("date", raises=ValueError)  # type: ignore[untyped-decorator]
def _is_date(text: object) -> bool:
    """As RFC 3339's grammar has it: in any year, the year 0 included, a February may have 29 days."""
    return not isinstance(text, str) or bool(datetime.date.fromisoformat("2000" + text[4:]))


def validate(schema: Schema, text: str) -> None:
    """Raises: jsonschema's ValidationError; ValueError where it is no JSON."""
    Draft202012Validator(schema, format_checker=_FORMAT_CHECKER).validate(json.loads(text))


def random_schema(rng: random.Random) -> Schema:
    """An object's schema, as clients send them; with definitions that refer to each other now and then."""
    schema = _object(rng, 3)
    if rng.random() < 0.2:
        schema["$defs"] = {"node": {"type": "object", "properties": {"value": _string(rng), "next": _REF}}}
        schema["properties"]["tree"] = _REF
    return schema


_REF: Schema = {"$ref": "#/$defs/node"}


def with_unsupported(rng: random.Random, keyword: str) -> Schema:
    """A random schema that has the keyword somewhere."""
    place: Schema = {"type": "object" if "ropert" in keyword or "depend" in keyword else "array", "items": {}}
    place[keyword] = UNSUPPORTED[keyword]
    for _ in range(rng.randrange(3)):
        outer = _object(rng, 1)
        outer["properties"][rng.choice(_NAMES)] = place
        place = rng.choice([outer, {"anyOf": [outer, {"type": "null"}]}, {"type": "array", "items": outer}])
    return place


def _any(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _number, _integer, _constant, _enumeration]
    if depth > 0:
        nested = [_object, _array, _tuple, _alternatives, _union]
        if rng.random() < 0.5:
            return rng.choice(nested)(rng, depth - 1)
    if rng.random() < 0.1:
        return {"type": rng.choice(["boolean", "null"])}
    schema = rng.choice(kinds)(rng)
    if rng.random() < 0.2:
        schema |= {"title": "A title", "description": "What it is.", "default": None, "examples": []}
    return schema


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    extra = rng.choice([None, False, False, True, {"type": "integer"}])
    if extra is not None:
        schema["additionalProperties"] = extra
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": _any(rng, depth)}
    if rng.random() < 0.7:
        schema["minItems"] = rng.randint(0, 2)
        schema["maxItems"] = schema["minItems"] + rng.randint(0, 2)
    return schema


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _alternatives(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _union(rng: random.Random, depth: int) -> Schema:
    """What must fulfil both of two schemas about different things."""
    first, second = _object(rng, depth), _object(rng, depth)
    for half, prefix in ((first, "l_"), (second, "r_")):
        half["properties"] = {prefix + name: schema for name, schema in half["properties"].items()}
        half["required"] = [prefix + name for name in half["required"]]
        half.pop("additionalProperties", None)
    return {"allOf": [first, second]}


def _string(rng: random.Random) -> Schema:
    choice = rng.random()
    if choice < 0.2:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if choice < 0.35:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    shortest = rng.randint(0, 3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 12)}


def _number(rng: random.Random) -> Schema:
    low = rng.choice([-1000.5, -1, 0, 0.25, 3])
    return {"type": "number", rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + rng.choice([1, 250])}


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    schema: Schema = {"type": "integer", "minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + 40}
    if rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([2, 5])
    return schema


def _constant(rng: random.Random) -> Schema:
    return {"const": rng.choice(_CONSTANTS)}


def _enumeration(rng: random.Random) -> Schema:
    return {"enum": rng.sample(_CONSTANTS, rng.randint(1, 4))}
