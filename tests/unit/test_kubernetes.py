"""The Kubernetes files, as kubectl renders them: Kubernetes' own schemas, the shapes of others' resources, and what
they promise about the server's settings, routes, times and metrics.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from os.path import relpath
from pathlib import Path
from typing import Any

import anyio
import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from starlette.routing import Mount, Route

from headrace.scheduler.messages import Tier
from headrace.server.app import App
from headrace.server.settings import Settings, load_settings
from requirements import need_program

CONFIGS = Path(__file__).parents[2] / "configs"
KUBERNETES = CONFIGS / "kubernetes"
ADAPTER = KUBERNETES / "components" / "hpa" / "prometheus-adapter.yaml"
OVERLAYS = ("cpu", "gpu-behind-gateway", "gpu with hpa")
VERSIONS = ("1.30", kubernetes_validate.latest_version())
# After the drain: connections, the engine and traces, five seconds each.
CLOSING_S = 15

Resource = dict[str, Any]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Resource]]:
    """Every overlay's resources. That of the autoscaler is written here, as who uses the files would write one."""
    own = tmp_path_factory.mktemp("overlay")
    kustomization = {
        "resources": [relpath(KUBERNETES / "gpu", own)],
        "components": [relpath(KUBERNETES / "components" / "hpa", own)],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    folders = {name: KUBERNETES / name for name in OVERLAYS} | {"gpu with hpa": own}
    # In the environment that the tests run in, else where programs are.
    kubectl = need_program(str(Path(sys.executable).with_name("kubectl")), "kubectl")
    found = {}
    for name, folder in folders.items():
        result = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, ""), f"{name}: {result.stderr}"
        found[name] = list(yaml.safe_load_all(result.stdout))
    return found


@pytest.fixture(params=OVERLAYS)
def resources(request: pytest.FixtureRequest, rendered: Mapping[str, list[Resource]]) -> list[Resource]:
    return rendered[request.param]


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    return [resource for resource in resources if resource["kind"] == kind]


def pod_of(resources: list[Resource]) -> Resource:
    [replicas] = of_kind(resources, "StatefulSet")
    pod: Resource = replicas["spec"]["template"]
    return pod


def container_of(resources: list[Resource]) -> Resource:
    [container] = pod_of(resources)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def environ_of(resources: list[Resource]) -> dict[str, str]:
    """The first replica's variables, of those that are settings."""
    [replicas] = of_kind(resources, "StatefulSet")
    fields = {"metadata.name": f"{replicas['metadata']['name']}-0"}
    return {
        variable["name"]: variable["value"]
        if "value" in variable
        else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in container_of(resources)["env"]
        if variable["name"].startswith("HEADRACE_")
    }


def settings_of(resources: list[Resource], folder: Path) -> Settings:
    """What a replica's server reads from its file and its environment. Raises: SettingsError."""
    [config_map] = of_kind(resources, "ConfigMap")
    container = container_of(resources)
    flag, path = container["args"]
    assert flag == "--config"
    [mount] = [mount for mount in container["volumeMounts"] if path.startswith(mount["mountPath"] + "/")]
    [volume] = [volume for volume in pod_of(resources)["spec"]["volumes"] if volume["name"] == mount["name"]]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    read = folder / "headrace.toml"
    read.write_text(config_map["data"][path.removeprefix(mount["mountPath"] + "/")])
    return load_settings([flag, str(read)], environ_of(resources))


# The files


def listed(kustomization: Path) -> Iterator[Path]:
    content = yaml.safe_load(kustomization.read_text())
    names = [*content.get("resources", ()), *content.get("components", ())]
    names += [patch["path"] for patch in content.get("patches", ()) if "path" in patch]
    names += [name for generated in content.get("configMapGenerator", ()) for name in generated["files"]]
    for name in names:
        path = (kustomization.parent / name).resolve()
        yield path / "kustomization.yaml" if path.is_dir() else path


def test_every_file_is_listed_and_every_file_that_is_listed_exists() -> None:
    files = {path for path in KUBERNETES.rglob("*") if path.is_file()}
    named = {path for each in files if each.name == "kustomization.yaml" for path in listed(each)}
    assert named <= files
    # What is applied by itself, or composed by who uses it; and the values of somebody else's chart.
    roots = {KUBERNETES / name / "kustomization.yaml" for name in ("cpu", "gpu-behind-gateway", "components/hpa")}
    assert files - named == roots | {ADAPTER}


# Schemas


def some(**fields: Any) -> dict[str, Any]:
    """The schema of an object with these fields alone, of which those that end in an underscore here must be there."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name.rstrip("_") for name in fields if name.endswith("_")],
        "properties": {name.rstrip("_"): schema for name, schema in fields.items()},
    }


def each(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": schema}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
NUMBER = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
COUNT = {"type": "integer", "minimum": 0}
PORT = some(number_={"type": "integer", "minimum": 1, "maximum": 65535})
SELECTOR = some(matchLabels_={"type": "object", "additionalProperties": TEXT, "minProperties": 1})
ANY: dict[str, Any] = {"type": "object"}
FALLBACKS = ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]
REFERENCE = some(group_=TEXT, kind_=TEXT, name_=TEXT)

# Of the releases that the files name, as far as the files go.
SHAPES = {
    "inference.networking.k8s.io/v1 InferencePool": some(
        selector_=SELECTOR,
        targetPorts_=each(PORT),
        # Of a Service, which it is by default, the port must be told.
        endpointPickerRef_=some(name_=TEXT, port_=PORT, failureMode={"enum": ["FailOpen", "FailClose"]}),
    ),
    "llm-d.ai/v1alpha2 InferenceObjective": some(priority={"type": "integer"}, poolRef_=REFERENCE),
    "gateway.networking.k8s.io/v1 HTTPRoute": some(
        parentRefs=each(some(name_=TEXT)),
        rules=each(
            some(
                matches=each(some(path=some(type={"enum": ["Exact", "PathPrefix"]}, value={"pattern": "^/"}))),
                backendRefs=each({"anyOf": [REFERENCE, some(name_=TEXT, port_=PORT["properties"]["number"])]}),
                timeouts=some(request={"pattern": r"^(\d{1,5}(h|m|s|ms)){1,4}$"}),
            )
        ),
    ),
    "keda.sh/v1alpha1 ScaledObject": some(
        scaleTargetRef_=some(apiVersion=TEXT, kind=TEXT, name_=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        fallback=some(failureThreshold_=COUNT, replicas_=COUNT, behavior={"enum": FALLBACKS}),
        advanced=some(horizontalPodAutoscalerConfig=some(behavior=ANY)),
        triggers_=each(
            some(
                type_={"const": "prometheus"},
                metadata_=some(
                    serverAddress_=TEXT, query_=TEXT, threshold_=NUMBER, ignoreNullValues={"enum": ["true", "false"]}
                ),
            )
        ),
    ),
    "monitoring.coreos.com/v1 PodMonitor": some(
        jobLabel=TEXT,
        selector_=SELECTOR,
        podMetricsEndpoints=each(some(port=TEXT, path={"pattern": "^/"}, interval={"pattern": r"^\d+s$"})),
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_follows_its_schema(resources: list[Resource], version: str) -> None:
    for resource in resources:
        name = f"{resource['apiVersion']} {resource['kind']}"
        if name in SHAPES:
            schema = some(apiVersion_=TEXT, kind_=TEXT, metadata_=ANY, spec_=SHAPES[name])
            jsonschema.validate(resource, schema)
        else:
            kubernetes_validate.validate(resource, version, strict=True)


def test_keda_scales_down_as_kubernetes_lets_it(rendered: Mapping[str, list[Resource]]) -> None:
    """What KEDA hands to Kubernetes' autoscaler as it is follows that one's schema, and is the same without KEDA."""
    [scaled] = of_kind(rendered["gpu-behind-gateway"], "ScaledObject")
    [scaler] = of_kind(rendered["gpu with hpa"], "HorizontalPodAutoscaler")
    assert scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == scaler["spec"]["behavior"]
    assert scaled["spec"]["scaleTargetRef"] == scaler["spec"]["scaleTargetRef"]
    bounds = scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == bounds


# What they refer to


def test_selectors_find_the_pods(resources: list[Resource]) -> None:
    labels = pod_of(resources)["metadata"]["labels"].items()
    num_selectors = 0
    for resource in resources:
        selector = resource.get("spec", {}).get("selector")
        if selector is not None:
            num_selectors += 1
            chosen = selector.get("matchLabels", selector)
            assert chosen, resource["kind"]
            assert chosen.items() <= labels, resource["kind"]
    assert num_selectors >= 4, "the set, two services and the budget"
    for constraint in pod_of(resources)["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= labels


def test_ports_are_the_containers_and_the_servers(resources: list[Resource], tmp_path: Path) -> None:
    [port] = container_of(resources)["ports"]
    settings = settings_of(resources, tmp_path)
    assert port["containerPort"] == settings.port
    for service in of_kind(resources, "Service"):
        assert [each["targetPort"] for each in service["spec"]["ports"]] == [port["name"]]
    for monitor in of_kind(resources, "PodMonitor"):
        assert {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]} == {port["name"]}
    for pool in of_kind(resources, "InferencePool"):
        assert pool["spec"]["targetPorts"] == [{"number": port["containerPort"]}]


def test_the_set_has_its_service_by_which_replicas_are_found_until_they_end(resources: list[Resource]) -> None:
    [replicas] = of_kind(resources, "StatefulSet")
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(resources, "Service")}
    governing = services[replicas["spec"]["serviceName"]]
    assert (governing["clusterIP"], governing["publishNotReadyAddresses"]) == ("None", True)


def test_mounts_are_of_volumes_that_exist(resources: list[Resource]) -> None:
    [replicas] = of_kind(resources, "StatefulSet")
    claims = {claim["metadata"]["name"] for claim in replicas["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in pod_of(resources)["spec"]["volumes"]}
    assert {mount["name"] for mount in container_of(resources)["volumeMounts"]} == volumes | claims


def test_the_pod_is_the_images_user_with_its_home_writable_and_nothing_else_but_tmp(resources: list[Resource]) -> None:
    image = (CONFIGS / "Dockerfile").read_text()
    pod, container = pod_of(resources)["spec"], container_of(resources)
    user, home = pod["securityContext"]["runAsUser"], re.findall(r"HOME=(\S+)", image)[0]
    assert f"USER {user}:" in image
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {home, "/tmp"}
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == confined
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False


# What they promise about the server


def test_the_variables_and_the_file_are_settings_of_the_server(resources: list[Resource], tmp_path: Path) -> None:
    settings = settings_of(resources, tmp_path)
    assert settings.host == "0.0.0.0", "else only the pod itself reaches it"
    assert settings.open_metrics, "Prometheus and endpoint pickers have no key"
    # Else the service's own variables, HEADRACE_PORT among them, would be settings.
    assert pod_of(resources)["spec"]["enableServiceLinks"] is False
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of(resources)["volumeMounts"]}
    assert Path(settings.api_keys_file or "").parent == Path(mounts["keys"])
    assert Path(settings.journal_file or "").parent == Path(mounts["home"])


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_settings_are_those_of_the_profile_for_the_device(device: str) -> None:
    profile = load_settings(["--config", str(CONFIGS / f"{device}.toml")], {})
    ours = load_settings(["--config", str(KUBERNETES / device / "headrace.toml")], {})
    assert {name: getattr(ours, name) for name in profile.model_fields_set} == {
        name: getattr(profile, name) for name in profile.model_fields_set
    }


@cache
def app() -> App:
    return App(load_settings([], {}), "none", lambda: pytest.fail("loads"), lambda: pytest.fail("loads"))


def test_probes_and_scrapes_ask_routes_that_exist(resources: list[Resource]) -> None:
    container = container_of(resources)
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    asked = {name: probe["path"] for name, probe in probes.items()}
    assert asked == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert {probe["port"] for probe in probes.values()} == {container["ports"][0]["name"]}
    monitors = of_kind(resources, "PodMonitor")
    scraped = {each["path"] for monitor in monitors for each in monitor["spec"]["podMetricsEndpoints"]}
    assert set(asked.values()) | scraped <= {getattr(route, "path", "") for route in app().asgi.routes}


def test_there_is_time_to_drain(resources: list[Resource], tmp_path: Path) -> None:
    pause_s = container_of(resources)["lifecycle"]["preStop"]["sleep"]["seconds"]
    settings = settings_of(resources, tmp_path)
    grace_s = settings.drain_delay_s + settings.drain_grace_s
    assert pod_of(resources)["spec"]["terminationGracePeriodSeconds"] > pause_s + grace_s + CLOSING_S
    assert settings.drain_delay_s, "else who keeps a connection is refused on it before any answer tells it to go"


def test_every_replica_that_there_may_be_is_a_peer_by_its_pods_name(resources: list[Resource], tmp_path: Path) -> None:
    [replicas] = of_kind(resources, "StatefulSet")
    most = [replicas["spec"].get("replicas", 0)]
    most += [scaler["spec"]["maxReplicas"] for scaler in of_kind(resources, "HorizontalPodAutoscaler")]
    most += [scaler["spec"]["maxReplicaCount"] for scaler in of_kind(resources, "ScaledObject")]
    settings = settings_of(resources, tmp_path)
    assert settings.replica_name in settings.peers
    assert {f"{replicas['metadata']['name']}-{number}" for number in range(max(most))} <= settings.peers.keys()


def test_there_are_as_many_threads_as_cores_are_asked_for(resources: list[Resource]) -> None:
    container = container_of(resources)
    [variable] = [variable for variable in container["env"] if variable["name"] == "OMP_NUM_THREADS"]
    assert variable["valueFrom"] == {"resourceFieldRef": {"resource": "requests.cpu"}}
    assert int(container["resources"]["requests"]["cpu"]) > 1


def test_a_replica_on_a_cpu_asks_for_memory_that_it_will_need(
    rendered: Mapping[str, list[Resource]], tmp_path: Path
) -> None:
    """Its cache fills up in time; the program, weights and what is kept of requests took up to 1.6 GiB (demo model)."""
    resources = rendered["cpu"]
    asked = container_of(resources)["resources"]["requests"]["memory"]
    cache_bytes = settings_of(resources, tmp_path).kv_cache_bytes
    assert isinstance(cache_bytes, int)
    assert int(asked.removesuffix("Gi")) * 2**30 >= cache_bytes + 2 * 2**30


# Scaling


def test_what_is_scaled_has_no_number_of_its_own_that_would_be_set_back(resources: list[Resource]) -> None:
    [replicas] = of_kind(resources, "StatefulSet")
    targets = [
        scaler["spec"]["scaleTargetRef"]
        for kind in ("HorizontalPodAutoscaler", "ScaledObject")
        for scaler in of_kind(resources, kind)
    ]
    assert ("replicas" in replicas["spec"]) is (not targets)
    for target in targets:
        assert target == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": replicas["metadata"]["name"]}


def test_the_adapter_makes_what_the_autoscaler_asks_for_of_metrics_that_a_server_exposes(
    rendered: Mapping[str, list[Resource]],
) -> None:
    made = {}
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]:
        series = rule["seriesQuery"].partition("{")[0]
        made[rule.get("name", {"as": series})["as"]] = rule["metricsQuery"].replace("<<.Series>>", series)
    [scaler] = of_kind(rendered["gpu with hpa"], "HorizontalPodAutoscaler")
    assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} == set(made)
    assert_exposed(made.values())


def test_keda_asks_for_metrics_that_a_server_exposes(rendered: Mapping[str, list[Resource]]) -> None:
    [scaled] = of_kind(rendered["gpu-behind-gateway"], "ScaledObject")
    assert_exposed([trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]])


def test_a_prometheus_that_knows_nothing_takes_no_replica_away(rendered: Mapping[str, list[Resource]]) -> None:
    [scaled] = of_kind(rendered["gpu-behind-gateway"], "ScaledObject")
    assert scaled["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"
    # By default an answer without a series is a load of nothing.
    assert {trigger["metadata"]["ignoreNullValues"] for trigger in scaled["spec"]["triggers"]} == {"false"}


def assert_exposed(expressions: Iterable[str]) -> None:
    async def expose() -> str:  # some gauges are of the event loop
        return app().metrics.expose().decode()

    exposed = set(re.findall(r"^# TYPE (\S+)", anyio.run(expose), re.MULTILINE))
    names = [re.findall(r"headrace_\w+", expression) for expression in expressions]
    assert all(names)
    assert {name for found in names for name in found} <= exposed


# The gateway


def test_the_gateways_resources_name_the_pool_and_the_tiers(
    rendered: Mapping[str, list[Resource]], tmp_path: Path
) -> None:
    resources = rendered["gpu-behind-gateway"]
    [pool] = of_kind(resources, "InferencePool")
    reference = {
        "group": pool["apiVersion"].partition("/")[0],
        "kind": pool["kind"],
        "name": pool["metadata"]["name"],
    }
    objectives = {each["metadata"]["name"]: each["spec"] for each in of_kind(resources, "InferenceObjective")}
    assert all(objective["poolRef"] == reference for objective in objectives.values())
    by_priority = sorted(objectives, key=lambda name: -objectives[name]["priority"])
    assert by_priority == [tier.value for tier in Tier], "highest first"
    assert settings_of(resources, tmp_path).trusted_proxies, "else the server does not believe what the gateway says"
    [route] = of_kind(resources, "HTTPRoute")
    assert [rule["backendRefs"] for rule in route["spec"]["rules"]] == [[reference], [{"name": "headrace", "port": 80}]]
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(resources, "Service")}
    assert [port["port"] for port in services["headrace"]["ports"]] == [80]


def test_the_gateway_leads_clients_to_every_route_but_the_operators(rendered: Mapping[str, list[Resource]]) -> None:
    [route] = of_kind(rendered["gpu-behind-gateway"], "HTTPRoute")
    to_pool, to_any = ([match["path"] for match in rule["matches"]] for rule in route["spec"]["rules"])
    # What pickers read themselves; they refuse what is no prompt, messages or input.
    read = {f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "responses")}
    assert {(path["type"], path["value"]) for path in to_pool} == {("Exact", path) for path in read}

    def is_led(path: str) -> bool:
        exact = {each["value"] for each in [*to_pool, *to_any] if each["type"] == "Exact"}
        prefixes = [each["value"] for each in to_any if each["type"] == "PathPrefix"]
        return path in exact or any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)

    paths = {route.path for route in app().asgi.routes if isinstance(route, Route | Mount)}
    operators = {"/health", "/health_generate", "/ready", "/metrics", "/metrics/load", "/get_load", "/dashboard"}
    operators |= {"/server_info", "/get_server_info", "/admin/profile", "/admin/stacks", "/admin/requests"}
    assert {path for path in paths if not is_led(path)} == operators
