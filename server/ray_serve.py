"""`headrace deploy`: replicas of the server as an application of Ray Serve, which places, restarts and drains them.

An ingress reads each request and calls a replica, which Serve's request router picks by what the request says, and the
replica is an App with its lifespan on Serve's event loop. What a proxy of Serve's shows its router is a request's head
alone; prompts are in bodies, and therefore the ingress. Choosing, scaling and calling are in modules that know nothing
of Ray.
Source: Ray Serve's API reference, 2.60 (request router, autoscaling policy, `serve.ingress`).
"""

import asyncio
import math
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, ClassVar

import anyio
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingContext
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from headrace.scheduler.messages import Tier
from headrace.server.deployment_settings import DeploymentSettings
from headrace.server.drain import drain
from headrace.server.replica_calls import Head, ReplicaRequest, Results, answer, ingress_app, replica_lost
from headrace.server.replica_routing import ReplicaLoad, ReplicaRouting
from headrace.server.replica_scaling import ReplicaPressure, desired_replicas
from headrace.server.serve import SWITCH_INTERVAL_S, LoadEngine, make_app, say, settle_memory, start_logging
from headrace.server.settings import Settings
from headrace.server.tracing import open_tracing

_APPLICATION = "headrace"
_REPLICA = "Replica"
# How often a replica tells of its load, and is asked whether it is alive.
_STATS_PERIOD_S = 1.0
_HEALTH_PERIOD_S = 5.0
# Of how many a router takes what they tell before others have their turn on its event loop.
_NUM_HEARD_AT_ONCE = 50
# How often a replica looks for journals without a writer.
_TAKE_OVER_PERIOD_S = 5.0
# What a piece of a stream takes of the process that all of them pass through: where there are many streams, each has
# fewer and larger ones.
_PIECE_S = 0.001
# How long a replica's pressure is averaged, and has to last before others are added, or taken.
_LOOK_BACK_S = 10.0
_DOWNSCALE_DELAY_S = 300.0
# How often a replica that is to end looks whether its requests are over, and what it needs beyond their grace time.
_DRAIN_PERIOD_S = 0.25
_CLOSING_S = 15.0
# For what replicas have said to reach clients, before Serve's proxies end.
_FAREWELL_S = 1.0


class Replica:
    """A server in a replica's process, on its event loop. `load_engine` is for one without a model, to measure with."""

    load_engine: ClassVar[LoadEngine | None] = None

    async def __init__(self, settings: dict[str, Any], num_replicas: int) -> None:  # type: ignore[misc]  # Serve awaits it
        """Returns once requests can be served. Raises: HeadraceError."""
        self._has_begun = False
        self._pause_s = _PIECE_S * num_replicas
        self._num_open = 0
        context = serve.get_replica_context()
        # Ids begin with it, by which the router brings who asks for one back to its maker.
        self._name = context.replica_id.unique_id
        self._settings = Settings(**settings | {"replica_name": self._name})
        start_logging(self._settings)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        endpoint = self._settings.otlp_traces_endpoint
        self._tracing = None if endpoint is None else open_tracing(endpoint)
        self._error: Exception | None = None
        self._num_reports = 0
        self._app = make_app(self._settings, self._note_engine, self._tracing, type(self).load_engine)
        self._lifespan = LifespanOn(Config(self._app.asgi, lifespan="on", log_config=None))
        await self._lifespan.startup()
        await self._app.settled.wait()
        if self._error is not None:
            await self._lifespan.shutdown()
            raise self._error
        self._taking_over = asyncio.create_task(self._take_over())
        settle_memory()
        self._has_begun = True
        say(f"replica {self._name} is ready: {self._app.generator.model_name}")

    async def _take_over(self) -> None:
        """Go on with streams whose replica has died or ended, those that nobody asks for too: a replica that comes
        in its place has another name."""
        while True:
            await self._app.take_over_left()
            await asyncio.sleep(_TAKE_OVER_PERIOD_S)

    def _note_engine(self, error: Exception | None) -> None:
        self._error = error

    async def answer(self, request: ReplicaRequest) -> AsyncGenerator[Head | bytes, None]:
        """What the ingress calls."""
        self._num_open += 1
        try:
            async for result in answer(self._app.asgi, self._name, request, lambda: self._num_open * self._pause_s):
                yield result
        finally:
            self._num_open -= 1

    def check_health(self) -> None:
        """Serve's hook; one that fails it is replaced. Raises: RuntimeError."""
        if (fault := self._app.engine_fault) is not None:
            raise RuntimeError(fault)

    def record_routing_stats(self) -> dict[str, Any]:
        """Serve's hook: what the router hears of this replica."""
        client = self._app.client
        load, wait_s = client.load, client.predicted_ttft_s(Tier.STANDARD)
        if self._app.engine_fault is not None:
            wait_s = math.inf  # it is asked last, until it is replaced
        self._num_reports += 1
        num_tokens = load.num_total_blocks * self._settings.block_size
        return asdict(ReplicaLoad(self._num_reports, wait_s, load.prefill_tokens_per_s, num_tokens))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what the autoscaling policy hears of this replica."""
        client = self._app.client
        assert client.ready is not None
        batch_share = (client.load.num_running + client.num_waiting) / client.ready.max_num_seqs
        ttft_share = client.predicted_ttft_s(Tier.STANDARD) / client.admission.targets_s[Tier.STANDARD]
        return asdict(ReplicaPressure(batch_share, ttft_share))

    async def drain(self, grace_s: float) -> None:
        """Refuse what comes, wait for what was accepted, and end the rest: what a signal does with a server."""
        await drain(self._app, grace_s, anyio.Event())

    async def __del__(self) -> None:
        """Serve's hook, when it has sent the replica's last request and waited for it: what runs without a reader is
        waited for here."""
        if not self._has_begun:  # Serve ends what it could not make, too
            return
        self._taking_over.cancel()
        await self.drain(self._settings.drain_grace_s)
        await self._lifespan.shutdown()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


class PrefixAwareRouter(RequestRouter):
    """Serve's interface to `ReplicaRouting`; lives on the event loop of an ingress's router."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routing = ReplicaRouting()
        self._candidates: list[RunningReplica] = []
        self._replicas_by_name: dict[str, RunningReplica] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Iterable[list[RunningReplica]]:
        """The replicas in the order in which they are to be asked; Serve goes on until one takes the request."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # where all of them are full
        if candidate_replicas is not self._candidates:  # there is a new list whenever Serve has heard of something
            await self._hear(candidate_replicas)
        request: ReplicaRequest = pending_request.args[0]
        request_id = pending_request.metadata.internal_request_id
        return ([self._replicas_by_name[name]] for name in self._routing.route(request_id, request.destination))

    async def _hear(self, replicas: list[RunningReplica]) -> None:
        self._candidates = replicas
        self._replicas_by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        self._routing.keep_only(self._replicas_by_name)
        for number, (name, replica) in enumerate(self._replicas_by_name.items()):
            if number and number % _NUM_HEARD_AT_ONCE == 0:  # a thousand take some milliseconds
                await asyncio.sleep(0)
                if replicas is not self._candidates:
                    return
            self._routing.hear(name, ReplicaLoad(**replica.routing_stats))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        request: ReplicaRequest = pending_request.args[0]
        request_id = pending_request.metadata.internal_request_id
        self._routing.send(request_id, request.destination.prompt, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._routing.end(internal_request_id, replica_id.unique_id)


def scale_by_pressure(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Serve's interface to `desired_replicas`; runs in its controller, which applies bounds and delays."""
    metrics = context.aggregated_metrics or {}
    ttft_shares = metrics.get("ttft_share", {})
    pressures = [
        ReplicaPressure(share, ttft_shares.get(replica_id, 0.0))
        for replica_id, share in metrics.get("batch_share", {}).items()
    ]
    return desired_replicas(context.current_num_replicas, pressures), {}


@serve.ingress()
class Ingress:
    """Takes requests from Serve's proxies, and calls the replicas."""

    def __init__(self, settings: dict[str, Any], replicas: DeploymentHandle) -> None:
        self._settings = Settings(**settings)
        self._answer = replicas.options(method_name="answer", stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        start_logging(self._settings)
        app = ingress_app(self._settings, self._call)

        async def ingress(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_without_id(message: Message) -> None:
                if message["type"] == "http.response.start":  # Serve's proxy adds the request's id to every head
                    headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                    message = {**message, "headers": headers}
                await send(message)

            await app(scope, receive, send_without_id)

        return ingress

    async def _call(self, request: ReplicaRequest) -> Results:
        results = self._answer.remote(request)
        try:
            async for result in results:
                yield result
        except (RayError, RayServeException) as error:
            raise replica_lost() from error
        except BaseException:  # the client has left
            results.cancel()
            raise


def build(args: dict[str, Any]) -> serve.Application:
    """The application; `args` are settings of a deployment, as a Serve config has them. Raises: ValueError."""
    return _application(DeploymentSettings(**args), Replica)


def _application(settings: DeploymentSettings, replica_class: type[Replica]) -> serve.Application:
    values = settings.model_dump(mode="json", include=set(Settings.model_fields))
    count: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        count = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "metrics_interval_s": _STATS_PERIOD_S,
                "look_back_period_s": _LOOK_BACK_S,
                "upscale_delay_s": _LOOK_BACK_S,
                "downscale_delay_s": _DOWNSCALE_DELAY_S,
                "policy": {"policy_function": "headrace.server.ray_serve:scale_by_pressure"},
            }
        }
    both = {
        "logging_config": {"enable_access_log": False},  # replicas write a line for each request
        "graceful_shutdown_wait_loop_s": _DRAIN_PERIOD_S,
    }
    most_s = settings.drain_grace_s + _CLOSING_S
    # One bundle: the processes of a tensor-parallel group are children of the replica's, and see the GPUs that it sees.
    bundle = {"CPU": settings.replica_cpus} | ({"GPU": settings.replica_gpus} if settings.replica_gpus else {})
    replica = serve.deployment(replica_class).options(
        name=_REPLICA,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
        max_ongoing_requests=settings.max_connections,  # the server itself says whom it has no room for
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=most_s,
        request_router_config={
            "request_router_class": "headrace.server.ray_serve:PrefixAwareRouter",
            "request_routing_stats_period_s": _STATS_PERIOD_S,
        },
        **count,
        **both,
    )
    ingress = serve.deployment(Ingress).options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=most_s + _CLOSING_S,  # streams whose replica was killed have their end to hear
        **both,
    )
    return ingress.bind(
        values | {"replica_name": _APPLICATION}, replica.bind(values, settings.max_replicas or settings.replicas)
    )


def deploy(settings: DeploymentSettings, replica_class: type[Replica] = Replica) -> int:
    """Run the application until a signal ends it, and a second one its drain; returns the process's exit code."""
    is_ours = settings.ray_address is None
    try:
        # Without an address Ray would join any cluster that it finds on this machine.
        ray.init(address=settings.ray_address or "local", include_dashboard=False, log_to_driver=True)
    except (RayError, ConnectionError, ValueError) as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    replicas: DeploymentHandle | None = None
    try:
        with suppress(KeyboardInterrupt):
            is_new = is_ours or not serve.status().proxies
            try:
                port = settings.port or _free_port(settings.host)
                http = {"host": settings.host, "port": port, "keep_alive_timeout_s": settings.keep_alive_s}
                serve.start(http_options=http)
                serve.run(_application(settings, replica_class), name=_APPLICATION)
                replicas = serve.get_deployment_handle(_REPLICA, _APPLICATION)
            except (RayError, RayServeException, RuntimeError, OSError) as error:
                print(f"headrace: {_fault_of_replicas() or error}", file=sys.stderr)
                _end(is_ours)
                return 1
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            where = f"chat page: http://{host}:{port}/" if is_new else "at the address of the Serve that ran already"
            say(f"{settings.replicas} replicas are ready; {where}")
            threading.Event().wait()
        say("draining; a second signal cuts this short")
        for grace_s in (settings.drain_grace_s, 0.0):
            with suppress(KeyboardInterrupt):
                if replicas is not None:
                    _drain(replicas, grace_s)
                _end(is_ours)
                break
        return 0
    finally:
        ray.shutdown()


def _drain(replicas: DeploymentHandle, grace_s: float) -> None:
    """Have the replicas themselves refuse what comes, and end what does not, while Serve still brings both to them."""
    with suppress(RayError, RayServeException, TimeoutError):  # of those that are about to end anyway
        replicas.broadcast("drain", grace_s).results(timeout_s=grace_s + _CLOSING_S, return_exceptions=True)
    time.sleep(_FAREWELL_S)


def _end(is_ours: bool) -> None:
    """End Serve; on a cluster that somebody else has started, nothing but the application."""
    if is_ours:
        serve.shutdown()
        return
    while _APPLICATION in serve.status().applications:
        with suppress(TimeoutError):  # it waits for a minute, and drains may take longer
            serve.delete(_APPLICATION)


def _fault_of_replicas() -> str | None:
    """Why one of them did not start: the error of ours that ends the traceback which Serve has of it."""
    application = serve.status().applications.get(_APPLICATION)
    deployments = application.deployments.values() if application else ()
    found = re.findall(r"^headrace\.\S+: (.+)$", "\n".join(each.message for each in deployments), re.MULTILINE)
    return found[-1] if found else None


def _free_port(host: str) -> int:
    """Serve's proxies open their own listeners, and need to be told where."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        return int(listener.getsockname()[1])
