"""What a gateway in front says of the requests that it sends on, and what it is told of the load beside their answers.

Lives on the event loop. A gateway is believed by the address of its own connection alone, where `trusted_proxies` has
it: X-Forwarded-For is written by anybody. What others say in these headers is as good as unsaid. The load is told to
whoever may read /metrics and asks in its own header; where those are the operator's alone, only to a gateway.
Sources: Gateway API Inference Extension and llm-d's router for the names, of which the older one counts where the newer
is absent; for the load, ORCA as Envoy reads it (xds.data.orca.v3.OrcaLoadReport), with vLLM's names.
"""

import base64
import ipaddress
import re
import struct
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from headrace.scheduler.messages import Tier
from headrace.server.errors import BadRequestError
from headrace.server.settings import Settings
from headrace.server.sse import to_json
from headrace.server.standing import NO_HINTS, Hints

OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
FAIRNESS_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
FORMAT_HEADER = "endpoint-load-metrics-format"
LOAD_HEADER = "endpoint-load-metrics"

_OBJECTIVE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_FAIRNESS_ID = re.compile(r"[!-~]{1,255}")
_MILLISECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

# Fields of the report and of an entry of its map, with their wire types.
_NAMED_METRICS = 8 << 3 | 2
_KEY, _VALUE = 1 << 3 | 2, 2 << 3 | 1


class Gateway:
    """Reads the headers of gateways, and writes what they ask for. `load` are the numbers of now, by name."""

    def __init__(self, settings: Settings, load: Callable[[], Mapping[str, float]]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in settings.trusted_proxies]
        self._tiers = {**{tier.value: tier for tier in Tier}, **settings.objectives}
        self._is_load_open = settings.admin_port is None
        self._needs_key = settings.api_keys_file is not None and not settings.open_metrics
        self._load = load

    def hints(self, connection: HTTPConnection) -> Hints:
        """What is said of a request. Raises: BadRequestError, naming the header, for what no gateway says."""
        if not self._is_trusted(connection):
            return NO_HINTS
        headers = connection.headers
        objective = _said(headers, OBJECTIVE_HEADERS, _OBJECTIVE, "the name of an objective")
        fairness_id = _said(headers, FAIRNESS_HEADERS, _FAIRNESS_ID, "1 to 255 visible characters of ASCII")
        expected = "a number of milliseconds above 0"
        ttft_ms = _said(headers, TTFT_HEADERS, _MILLISECONDS, expected)
        if ttft_ms is not None and float(ttft_ms) == 0:
            raise _refused(_name(headers, TTFT_HEADERS), expected)
        # An objective that nobody has defined here is none, as it is in a gateway.
        tier = None if objective is None else self._tiers.get(objective)
        return Hints(tier, fairness_id, None if ttft_ms is None else float(ttft_ms) / 1000)

    def load_header(self, connection: HTTPConnection) -> dict[str, str]:
        """The load, in the form that is asked for; nothing where none is, or one that does not exist."""
        form = connection.headers.get(FORMAT_HEADER, "").upper()
        if form not in _FORMS or not (self._may_read_metrics(connection) or self._is_trusted(connection)):
            return {}
        return {LOAD_HEADER: f"{form} {_FORMS[form](self._load())}"}

    def _may_read_metrics(self, connection: HTTPConnection) -> bool:
        # The admin port's own callers have no tenant.
        return self._is_load_open and (not self._needs_key or bool(connection.state.tenant))

    def _is_trusted(self, connection: HTTPConnection) -> bool:
        if not self._networks or connection.client is None:
            return False
        try:
            address = ipaddress.ip_address(connection.client.host)
        except ValueError:  # a socket of this machine's, which has no address
            return False
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any((mapped or address) in network for network in self._networks)


def _name(headers: Headers, names: tuple[str, ...]) -> str:
    """Which of a header's names is used."""
    return next((name for name in names if any(headers.getlist(name))), names[0])


def _said(headers: Headers, names: tuple[str, ...], pattern: re.Pattern[str], expected: str) -> str | None:
    """A header's value, None where it is absent or empty. Raises: BadRequestError for one that is not as `expected`."""
    name = _name(headers, names)
    value = ", ".join(headers.getlist(name)).strip()  # of two the first may be a client's own
    if value and pattern.fullmatch(value) is None:
        raise _refused(name, expected)
    return value or None


def _refused(name: str, expected: str) -> BadRequestError:
    return BadRequestError(f"{name}: must be {expected}", param=name)


def _as_text(load: Mapping[str, float]) -> str:
    return ", ".join(f"named_metrics.{name}={value!r}" for name, value in load.items())


def _as_json(load: Mapping[str, float]) -> str:
    return to_json({"named_metrics": load})


def _as_protobuf(load: Mapping[str, float]) -> str:
    report = b""
    for name, value in load.items():
        entry = bytes((_KEY, len(name))) + name.encode("ascii") + bytes((_VALUE,)) + struct.pack("<d", value)
        report += bytes((_NAMED_METRICS, len(entry))) + entry
    return base64.b64encode(report).decode("ascii")


_FORMS: dict[str, Callable[[Mapping[str, float]], str]] = {"TEXT": _as_text, "JSON": _as_json, "BIN": _as_protobuf}
