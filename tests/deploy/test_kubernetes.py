"""The Kubernetes manifests: rendered, valid against the API's schemas, and run as processes by the entry point."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import DEADLINE_S, Process, Processes

from loscar_deploy import options
from loscar_deploy.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFESTS = ROOT / "deploy" / "kubernetes"
DOCKER = ROOT / "deploy" / "docker"
SUPPORT = ROOT / "tests" / "support"
OVERLAYS = ("cpu", "gpu")
# The first release whose API has everything that is used, and later ones.
RELEASES = ("1.29", "1.31", "1.33", "1.35")
USER = 10001

Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found is not None]


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge of what is used here: maps by key, lists of named things by name, all else replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merged(base.get(key), value) for key, value in patch.items()}
    if isinstance(base, list) and all(isinstance(item, dict) and "name" in item for item in [*base, *patch]):
        patches = {item["name"]: item for item in patch}
        kept = [merged(item, patches.pop(item["name"], {})) for item in base]
        return kept + list(patches.values())
    return copy.deepcopy(patch)


def identity(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def rendered(folder: Path) -> dict[tuple[str, str], Document]:
    """What `kubectl kustomize` makes of a folder, of the fields of a kustomization that are used here."""
    [kustomization] = documents(folder / "kustomization.yaml")
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches"}
    found: dict[tuple[str, str], Document] = {}
    for resource in kustomization["resources"]:
        path = folder / resource
        more = rendered(path) if path.is_dir() else {identity(each): each for each in documents(path)}
        assert not found.keys() & more.keys()
        found |= more
    for patch in kustomization.get("patches", []):
        assert set(patch) == {"path"}
        for change in documents(folder / patch["path"]):
            found[identity(change)] = merged(found[identity(change)], change)
    return found


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> dict[tuple[str, str], Document]:
    return rendered(MANIFESTS / "overlays" / request.param)


def pod_of(document: Document) -> Document | None:
    found: Document | None = document["spec"]["template"] if document["kind"] in ("StatefulSet", "Job") else None
    return found


def pods(manifests: dict[tuple[str, str], Document]) -> Iterator[Document]:
    for document in manifests.values():
        pod = pod_of(document)
        if pod is not None:
            yield pod


# --- rendering and schemas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_the_same(overlay: str) -> None:
    """What the other tests look at is what a cluster would get."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.skip("neither kustomize nor kubectl on this machine")
    folder = MANIFESTS / "overlays" / overlay
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert {identity(found): found for found in yaml.safe_load_all(done.stdout)} == rendered(folder)


@pytest.mark.parametrize("release", RELEASES)
def test_documents_are_valid(manifests: dict[tuple[str, str], Document], release: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for document in manifests.values():
        validate(document, release, strict=True)


def test_validation_notices_a_wrong_field() -> None:
    module = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    job = rendered(MANIFESTS / "overlays" / "cpu")["Job", "loscar-worker"]
    for change in ({"backoffLimitPerIndx": 5}, {"completions": "many"}):
        with pytest.raises(module.ValidationError):
            module.validate(merged(job, {"spec": change}), RELEASES[0], strict=True)


def test_overlays_differ_where_they_should() -> None:
    cpu, gpu = (rendered(MANIFESTS / "overlays" / name) for name in OVERLAYS)
    assert {key for key in cpu if cpu[key] != gpu[key]} == {("ConfigMap", "loscar-options"), ("Job", "loscar-worker")}
    for found, limits, device in ((cpu, {"cpu"}, "cpu"), (gpu, {"cpu", "nvidia.com/gpu"}, "cuda")):
        [worker] = found["Job", "loscar-worker"]["spec"]["template"]["spec"]["containers"]
        assert set(worker["resources"]["limits"]) - {"memory", "ephemeral-storage"} == limits
        assert found["ConfigMap", "loscar-options"]["data"]["LOSCAR_DEVICE"] == device
        spec = found["Job", "loscar-worker"]["spec"]
        assert spec["completions"] == spec["parallelism"], "all of them at a time"


# --- what the documents say to each other -------------------------------------------------------------------


def selects(selector: Document, pod: Document) -> bool:
    return bool(selector.items() <= pod["metadata"]["labels"].items())


def test_selectors_find_their_pods(manifests: dict[tuple[str, str], Document]) -> None:
    server = manifests["StatefulSet", "loscar-server"]["spec"]
    worker = manifests["Job", "loscar-worker"]["spec"]["template"]
    wanted = {
        ("Service", "loscar-server"): server["template"],
        ("StatefulSet", "loscar-server"): server["template"],
        ("PodDisruptionBudget", "loscar-server"): server["template"],
        ("NetworkPolicy", "loscar-server"): server["template"],
        ("NetworkPolicy", "loscar-worker"): worker,
    }
    for key, pod in wanted.items():
        spec = manifests[key]["spec"]
        selector = spec.get("selector", spec.get("podSelector"))
        selector = selector.get("matchLabels", selector)
        assert [selects(selector, each) for each in pods(manifests)].count(True) == 1
        assert selects(selector, pod), key
    [rule] = manifests["NetworkPolicy", "loscar-server"]["spec"]["ingress"]
    assert selects(rule["from"][0]["podSelector"]["matchLabels"], worker)
    out = manifests["NetworkPolicy", "loscar-worker"]["spec"]["egress"][0]
    assert selects(out["to"][0]["podSelector"]["matchLabels"], server["template"])
    assert server["serviceName"] == manifests["Service", "loscar-server"]["metadata"]["name"]
    host, _, port = manifests["ConfigMap", "loscar-options"]["data"]["LOSCAR_SERVERS"].partition(":")
    assert host == f"loscar-server-0.{server['serviceName']}"
    [container] = server["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert {int(port)} == set(ports.values()) == {rule["ports"][0]["port"]} == {out["ports"][0]["port"]}
    assert ports[manifests["Service", "loscar-server"]["spec"]["ports"][0]["targetPort"]] == int(port)


def test_pods_have_no_rights(manifests: dict[tuple[str, str], Document]) -> None:
    found = list(pods(manifests))
    assert len(found) == 2
    for pod in found:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == USER
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts
            volumes = [volume["name"] for volume in spec["volumes"]]
            volumes += ["checkpoints"] if container["name"] == "server" else []
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for file in ("server", "worker"):
        dockerfile = (DOCKER / f"{file}.Dockerfile").read_text(encoding="utf-8")
        assert f"USER {USER}:{USER}\n" in dockerfile


def test_a_server_may_be_moved_and_updated(manifests: dict[tuple[str, str], Document]) -> None:
    """It pauses its run, so that the cluster needs no special care; but for a checkpoint it must have its time."""
    spec = manifests["StatefulSet", "loscar-server"]["spec"]
    assert spec["updateStrategy"]["type"] == "RollingUpdate"
    assert manifests["PodDisruptionBudget", "loscar-server"]["spec"]["maxUnavailable"] == spec["replicas"] == 1
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    [container] = pod["containers"]
    probes = [probe for name, probe in container.items() if name.endswith("Probe")]
    assert len(probes) == 3
    assert all(probe.get("terminationGracePeriodSeconds", 60) > 10 for probe in probes), "goodbyes take up to 5 s"


def test_the_token_is_a_secret_that_is_not_here(manifests: dict[tuple[str, str], Document]) -> None:
    assert not [kind for kind, _ in manifests if kind == "Secret"]
    for pod in pods(manifests):
        secrets = [volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume]
        assert [secret["secretName"] for secret in secrets] == ["loscar-token"]
        assert secrets[0]["defaultMode"] == 0o440
    assert "LOSCAR_TOKEN" not in json.dumps(list(manifests.values()))


def test_hopeless_exit_codes_are_those_of_the_systemd_unit(manifests: dict[tuple[str, str], Document]) -> None:
    unit = (ROOT / "deploy" / "systemd" / "loscar-worker@.service").read_text(encoding="utf-8")
    [codes] = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    spec = manifests["Job", "loscar-worker"]["spec"]
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    assert rules["FailIndex"]["onExitCodes"]["values"] == [int(code) for code in codes.split()]
    [container] = spec["template"]["spec"]["containers"]
    assert rules["FailIndex"]["onExitCodes"]["containerName"] == container["name"]


# --- command lines ------------------------------------------------------------------------------------------


def environment_of(container: Document, manifests: dict[tuple[str, str], Document]) -> dict[str, str]:
    """A container's variables, as kubelet sets them."""
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        found |= manifests["ConfigMap", source["configMapRef"]["name"]]["data"]
    for variable in container["env"]:
        if "value" in variable:
            found[variable["name"]] = variable["value"]
        else:
            key = variable["valueFrom"]["configMapKeyRef"]
            found[variable["name"]] = manifests["ConfigMap", key["name"]]["data"][key["key"]]
    return found


def command_of(container: Document, environment: dict[str, str]) -> list[str]:
    """A container's words: `command` or the image's entry point, then `args`, with $(X) put in; every X must be set."""
    image = container["image"].partition(":")[0].removeprefix("loscar-")
    dockerfile = (DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8")
    [entry] = re.findall(r"^ENTRYPOINT (\[.*\])$", dockerfile, re.MULTILINE)
    command = container.get("command", json.loads(entry))
    assert command[-1:] == json.loads(entry), "whatever is before it, the image's entry point is what is run"
    return [re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], word) for word in (*command, *container["args"])]


def programs(folder: Path, line: str) -> str:
    """A PATH on which the entry point is that of the images, and `loscar` is the given line of a shell script."""
    folder.mkdir()
    shutil.copy(DOCKER / "entry.sh", folder / "loscar-entry")
    (folder / "loscar").write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    for program in folder.iterdir():
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_command_lines_are_accepted(manifests: dict[tuple[str, str], Document], tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", 'for word; do printf "%s\\0" "$word"; done')
    for pod in pods(manifests):
        [container] = pod["spec"]["containers"]
        environment = environment_of(container, manifests)
        done = subprocess.run(
            command_of(container, environment),
            env={**environment, "PATH": path},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        words = done.stdout.split("\0")[:-1]
        args = build_parser().parse_args(words)
        assert words[0] == container["name"]
        assert args.token_file == Path("/etc/loscar/token")
        if words[0] == "server":
            options.run_config(args)
            options.server_limits(args, None)
            options.seconds("--linger", args.linger)
            assert (args.resume, args.pause_on) == (True, "term"), "or a pod that is replaced ends the run"
        else:
            assert args.server == environment["LOSCAR_SERVERS"]
        mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
        for file in (getattr(args, name, None) for name in ("checkpoints", "state", "save_model", "token_file")):
            assert file is None or any(file.is_relative_to(mount) for mount in mounts), file


class Node:
    """Starts containers of the manifests as plain processes, with their folders under one of the test's."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        folder.mkdir()
        self._folder = folder
        self._processes = processes
        self._manifests = rendered(MANIFESTS / "overlays" / "cpu")
        self._path = programs(folder / "bin", f'exec {sys.executable} -m loscar_deploy "$@"')
        for name in ("states", "models", "checkpoints", "data", "etc"):
            (folder / name).mkdir()
        (folder / "etc" / "token").write_text("a long random text\n", encoding="utf-8")

    def container(self, kind: str, name: str) -> Document:
        [found] = self._manifests[kind, name]["spec"]["template"]["spec"]["containers"]
        return found

    def start(self, kind: str, name: str, **changes: str) -> Process:
        container = self.container(kind, name)
        environment = environment_of(container, self._manifests) | changes
        places = {"/var/lib/loscar": str(self._folder), "/etc/loscar": str(self._folder / "etc")}

        def here(text: str) -> str:
            for place, instead in places.items():
                text = text.replace(place, instead)
            return text

        words = [here(word) for word in command_of(container, environment)]
        own = {name: here(value) for name, value in environment.items()} | {"PATH": self._path}
        words[0] = shutil.which(words[0], path=self._path) or words[0]
        return self._processes._start(Process, words, SUPPORT, own)


@pytest.mark.timeout(300)
def test_containers_train_answer_their_probes_and_drain(tmp_path: Path, processes: Processes) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    node = Node(tmp_path / "node", processes)
    listening = {"LOSCAR_ARGS": f"--listen {address} --start-grace 0s --linger 0s --rounds 1000000"}
    server = node.start("StatefulSet", "loscar-server", **listening)
    server.says("listening on")

    # Without the token, as kubelet asks.
    container = node.container("StatefulSet", "loscar-server")
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[kind]["grpc"]
        assert asked["port"] == 50051
        with grpc.insecure_channel(address) as channel:
            check = health_pb2.HealthCheckRequest(service=asked["service"])
            reply = health_pb2_grpc.HealthStub(channel).Check(check, timeout=DEADLINE_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING

    changes = {
        "LOSCAR_SERVERS": address,
        "LOSCAR_TASK": "tiny_task:Tiny",
        "LOSCAR_NAME": "loscar-worker-0",
        "LOSCAR_ARGS": "--step-time 5ms",
    }
    worker = node.start("Job", "loscar-worker", **changes)
    worker.says("joined run")
    # Evicted: it leaves in order, and its index is not done.
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 128 + signal.SIGTERM, worker.err
    server.says("loscar-worker-0 left: left")
    worker = node.start("Job", "loscar-worker", **changes)
    worker.says("goes on from")
    # The server's pod is replaced: the next one goes on, at the same address.
    server.signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM, server.err
    server = node.start("StatefulSet", "loscar-server", **listening)
    worker.says("connected again")
    assert "resuming run" in server.err
    # kubectl exec loscar-server-0 -- sh -c 'kill -INT 1'
    server.signal(signal.SIGINT)
    assert worker.wait() == 0, worker.err
    assert server.wait() == 0, server.err
    assert (tmp_path / "node" / "models" / "loscar-worker-0.safetensors").is_file()

    # A wrong option's code comes through.
    worker = node.start("Job", "loscar-worker", **changes, LOSCAR_SEED="x")
    assert worker.wait() == 3, worker.err
