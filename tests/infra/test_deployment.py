"""The deployment files name commands, paths and variables that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return loaded


def test_published_ports_are_bound_to_the_machine_itself(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_every_secret_comes_from_the_environment_and_is_documented() -> None:
    text = (INFRA / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "AIRFLOW_JWT_SECRET"} <= required
    assert all(name in (INFRA / "README.md").read_text() for name in required)


def test_services_wait_for_services_that_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= compose["services"].keys()


def test_components_that_are_started_exist(compose: dict[str, Any]) -> None:
    manifests = [d for f in (INFRA / "kubernetes").glob("*.yaml") for d in yaml.safe_load_all(f.read_text())]
    pods = [m["spec"]["template"]["spec"] for m in manifests if m.get("kind") == "StatefulSet"]
    commands = [service.get("command", []) for service in compose["services"].values()]
    commands += [container["command"] for pod in pods for container in pod["containers"]]
    modules = {c[2] for c in commands if c[:2] == ["python", "-m"]}
    assert modules == {"components.serve"}
    assert all((ROOT / module.replace(".", "/") / "__main__.py").is_file() for module in modules)


def test_the_image_copies_folders_that_exist() -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+)", (INFRA / "images" / "Dockerfile").read_text(), re.MULTILINE)
    assert copied and all((ROOT / path).exists() for path in copied)


def test_the_kustomization_names_its_files() -> None:
    kustomization = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())
    files = {path.name for path in (INFRA / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files


def test_what_the_pod_launcher_reads_is_what_kubernetes_gets() -> None:
    names = {
        (m["kind"], m["metadata"]["name"])
        for f in (INFRA / "kubernetes").glob("*.yaml")
        for m in yaml.safe_load_all(f.read_text())
        if "kind" in m
    }
    assert {("ServiceAccount", "freshet"), ("ConfigMap", "freshet"), ("Namespace", "freshet")} <= names
