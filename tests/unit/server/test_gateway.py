"""Whose headers are believed, which are refused, and how the load is written, read by a real protobuf."""

import base64
import json
from typing import Any

import pytest
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)
from starlette.requests import HTTPConnection

from headrace.scheduler.messages import Tier
from headrace.server.errors import BadRequestError
from headrace.server.gateway import FAIRNESS_HEADERS, OBJECTIVE_HEADERS, TTFT_HEADERS, Gateway
from headrace.server.settings import load_settings
from headrace.server.standing import NO_HINTS, Hints

LOAD = {"kv_cache_usage_perc": 0.25, "num_requests_waiting": 3.0}


def gateway(*flags: str) -> Gateway:
    return Gateway(load_settings(list(flags), {}), lambda: LOAD)


def connection(headers: dict[str, str], host: str | None = "10.1.2.3") -> HTTPConnection:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "headers": raw, "client": None if host is None else (host, 1)})


SAID = {OBJECTIVE_HEADERS[0]: "batch", FAIRNESS_HEADERS[0]: "tenant-a", TTFT_HEADERS[0]: "250"}


@pytest.mark.parametrize(
    ("host", "is_trusted"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("fd00::7", True),
        ("192.168.0.9", True),
        ("11.1.2.3", False),
        ("::ffff:11.1.2.3", False),
        ("fe80::7", False),
        ("192.168.0.10", False),
        ("testclient", False),
        ("", False),
        (None, False),
    ],
)
def test_a_gateway_is_believed_by_its_own_address(host: str | None, is_trusted: bool) -> None:
    trusting = gateway("--trusted-proxies=10.0.0.0/8,fd00::/16,192.168.0.9")
    # What it says of the address that it had the request from says nothing of its own.
    headers = SAID | {"x-forwarded-for": "10.0.0.1", "forwarded": "for=10.0.0.1"}
    hints = trusting.hints(connection(headers, host))
    assert hints == (Hints(Tier.BATCH, "tenant-a", 0.25) if is_trusted else NO_HINTS)


def test_nobody_is_believed_where_no_network_is_named() -> None:
    assert gateway().hints(connection(SAID)) == NO_HINTS


def test_the_older_name_of_a_header_counts_where_the_newer_is_absent() -> None:
    trusting = gateway("--trusted-proxies=10.0.0.0/8")
    older = {OBJECTIVE_HEADERS[1]: "premium", FAIRNESS_HEADERS[1]: "tenant-b", TTFT_HEADERS[1]: "1000"}
    assert trusting.hints(connection(older)) == Hints(Tier.PREMIUM, "tenant-b", 1.0)
    assert trusting.hints(connection(older | SAID)) == Hints(Tier.BATCH, "tenant-a", 0.25)
    assert trusting.hints(connection(dict.fromkeys(SAID, "") | older)) == Hints(Tier.PREMIUM, "tenant-b", 1.0)


def test_objectives_are_tiers_by_the_settings_and_unknown_ones_say_nothing() -> None:
    trusting = gateway("--trusted-proxies=10.0.0.0/8", "--objectives=best-effort=batch", "--objectives=batch=premium")
    for objective, tier in (("best-effort", Tier.BATCH), ("batch", Tier.PREMIUM), ("standard", Tier.STANDARD)):
        assert trusting.hints(connection({OBJECTIVE_HEADERS[0]: objective})) == Hints(tier)
    assert trusting.hints(connection({OBJECTIVE_HEADERS[0]: "gold"})) == NO_HINTS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in OBJECTIVE_HEADERS for value in ("a b", "-a", "a/b", "ü", "a" * 254)),
        *((name, value) for name in FAIRNESS_HEADERS for value in ("a b", "ü", "a" * 256, "a\tb")),
        *(
            (name, value)
            for name in TTFT_HEADERS
            for value in ("0", "0.0", "-1", "1e3", "soon", "nan", "1,5", "1" * 10)
        ),
    ],
)
def test_what_no_gateway_says_is_refused_by_the_headers_name_and_from_others_ignored(name: str, value: str) -> None:
    trusting = gateway("--trusted-proxies=10.0.0.0/8")
    with pytest.raises(BadRequestError) as refused:
        trusting.hints(connection({name: value}))
    assert refused.value.param == name
    assert refused.value.message.startswith(f"{name}: must be ")
    assert trusting.hints(connection({name: value}, "11.0.0.1")) == NO_HINTS


def orca_report(data: bytes) -> Any:
    """An xds.data.orca.v3.OrcaLoadReport: its named metrics are a map, which is field 8."""
    file = descriptor_pb2.FileDescriptorProto(name="orca.proto", package="orca", syntax="proto3")
    report = file.message_type.add(name="OrcaLoadReport")
    entry = report.nested_type.add(name="NamedMetricsEntry")
    entry.options.map_entry = True
    kinds = descriptor_pb2.FieldDescriptorProto
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=kinds.TYPE_DOUBLE, label=kinds.LABEL_OPTIONAL)
    report.field.add(
        name="named_metrics",
        number=8,
        type=kinds.TYPE_MESSAGE,
        type_name=".orca.OrcaLoadReport.NamedMetricsEntry",
        label=kinds.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("orca.OrcaLoadReport"))
    return kind.FromString(data)


@pytest.mark.parametrize("write", [str.upper, str.lower])
def test_the_load_is_written_in_each_of_orcas_forms(write: Any) -> None:
    def told(form: str) -> str:
        asked = connection({"endpoint-load-metrics-format": write(form)})
        [(name, value)] = gateway().load_header(asked).items()
        assert name == "endpoint-load-metrics"
        written, _, report = value.partition(" ")
        assert written == form
        return report

    assert told("TEXT") == "named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0"
    assert json.loads(told("JSON")) == {"named_metrics": LOAD}
    assert dict(orca_report(base64.b64decode(told("BIN"))).named_metrics) == LOAD


@pytest.mark.parametrize("headers", [{}, {"endpoint-load-metrics-format": ""}, {"endpoint-load-metrics-format": "XML"}])
def test_nothing_is_told_where_nothing_that_exists_is_asked_for(headers: dict[str, str]) -> None:
    assert gateway().load_header(connection(headers)) == {}


def test_where_metrics_are_the_operators_alone_a_trusted_gateway_is_told_and_nobody_else() -> None:
    asked = {"endpoint-load-metrics-format": "TEXT"}
    private = gateway("--admin-port=9000", "--trusted-proxies=10.0.0.0/8")
    assert private.load_header(connection(asked, "11.0.0.1")) == {}
    assert private.load_header(connection(asked)) != {}
