"""The deployment files name commands, paths and variables that exist."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.images.spark_s3 import SDK, connector, install
from tests.dags.airflow_process import call

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "images" / "Dockerfile"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return loaded


def test_published_ports_are_bound_to_the_machine_itself(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_every_image_that_others_make_is_of_a_version(compose: dict[str, Any]) -> None:
    """Without one, a pull changes what holds the data; Freshet itself is made or chosen by the operator."""
    images = {service["image"] for service in compose["services"].values()} - {compose["x-freshet"]["image"]}
    assert len(images) == 3 and all(re.search(r":\D*\d", image) for image in images)


def test_every_secret_comes_from_the_environment_and_is_documented() -> None:
    text = (INFRA / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "AIRFLOW_JWT_SECRET"} <= required
    assert all(name in (INFRA / "README.md").read_text() for name in required)
    assert ".env" in (ROOT / ".gitignore").read_text().split(), "the file that may hold them"


def test_no_service_has_a_secret_on_its_command_line(compose: dict[str, Any]) -> None:
    """Every user of the machine can list these."""
    for name, service in compose["services"].items():
        hides = name == "redis"  # sets its own title
        shown = [] if hides else service.get("command", [])
        checked = service.get("healthcheck", {}).get("test", [])
        assert not re.findall(r"[^$]\$\{?\w*(?:PASSWORD|KEY|SECRET)", " ".join(["", *shown, *checked])), name


def test_a_schedule_given_to_compose_reaches_airflow(compose: dict[str, Any]) -> None:
    for name in ("FRESHET_CONTINUAL_CRON", "FRESHET_CONTINUAL_START"):
        assert name in (ROOT / "dags" / "windows.py").read_text() and name in (INFRA / "README.md").read_text()
        assert compose["x-freshet"]["environment"][name] == f"${{{name}:-}}", "empty: no schedule"


@pytest.mark.integration
def test_the_containers_of_airflow_agree_on_its_secrets(compose: dict[str, Any], tmp_path: Path) -> None:
    """A secret that is not set is random in each container: the API server could not show a worker's logs."""
    keys = [("api", "secret_key"), ("api_auth", "jwt_secret"), ("core", "fernet_key")]
    given = compose["x-freshet"]["environment"].items()
    settings = {name: value for name, value in given if name.startswith(("AIRFLOW__API", "AIRFLOW__CORE__FERNET"))}
    source = f"from airflow.configuration import conf\nanswer([conf.get(*key) for key in {keys}])"
    homes = [tmp_path / name for name in ("airflow", "worker")]
    for home in homes:
        home.mkdir()
    here, there = (call(home, source, settings) for home in homes)
    assert here == there


def test_tasks_start_when_airflows_api_server_answers(compose: dict[str, Any]) -> None:
    for name in ("airflow-scheduler", "airflow-worker"):
        assert compose["services"][name]["depends_on"]["airflow"] == {"condition": "service_healthy"}
    assert "healthcheck" in compose["services"]["airflow"]


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
    copied = re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert copied and all((ROOT / path).exists() for path in copied)


def test_the_image_runs_as_a_number_because_pods_must_not_run_as_root() -> None:
    dockerfile = DOCKERFILE.read_text()
    (user,) = re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE)
    assert user.isdigit() and user != "0" and f"--uid {user}" in dockerfile


def test_the_image_knows_the_commit_that_versions_are_tagged_with() -> None:
    final = DOCKERFILE.read_text().split("\nFROM ")[2]
    assert "ARG FRESHET_COMMIT\nENV FRESHET_COMMIT=$FRESHET_COMMIT\n" in final


def test_what_a_container_expands_by_itself_is_in_its_environment(compose: dict[str, Any]) -> None:
    """$$NAME is left to the container, which sees nothing of the host's environment."""
    for name, service in compose["services"].items():
        wanted = re.findall(r"\$\$\{?(\w+)", str(service.get("command", "")))
        assert set(wanted) <= set(service.get("environment", {})), name


def test_the_image_has_the_folders_of_its_volumes_and_their_owner_is_its_user(compose: dict[str, Any]) -> None:
    """A new named volume takes content and owner from the image; where the image has no such folder, it is root's."""
    mounted = [v.split(":")[1] for s in compose["services"].values() for v in s.get("volumes", []) if "/freshet" in v]
    (made,) = re.findall(r"^RUN install -d -o freshet -g freshet (.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert mounted and set(mounted) <= set(made.split())
    assert "/home/freshet/airflow" in made.split(), "else root's, as a folder that is made on the way"


def test_the_logs_of_tasks_are_kept_where_airflow_shows_them_from(compose: dict[str, Any]) -> None:
    """In a container they would go with it, at each new image; Airflow asks a worker of that name in vain."""
    for name in ("airflow", "airflow-worker", "airflow-triggerer"):
        (volume,) = compose["services"][name]["volumes"]
        assert volume == "logs:/home/freshet/airflow/logs" and "logs" in compose["volumes"]


def test_the_image_gets_sparks_s3_connector_because_both_deployments_keep_all_on_s3(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((INFRA / "kubernetes" / "environment.yaml").read_text())
    assert config["data"]["FRESHET_ROOT"].startswith("s3://")
    assert compose["x-freshet"]["environment"]["FRESHET_ROOT"].startswith("s3://")
    build = DOCKERFILE.read_text().split("\nFROM ")[1]
    assert "COPY infra/images/spark_s3.py" in build and "RUN /opt/venv/bin/python infra/images/spark_s3.py" in build


def test_the_connector_is_of_the_version_of_sparks_hadoop() -> None:
    import pyspark

    jars = Path(pyspark.__path__[0]) / "jars"
    version = connector(jars).removeprefix("org.apache.hadoop:hadoop-aws:")
    assert (jars / f"hadoop-client-runtime-{version}.jar").is_file()


@pytest.mark.integration
@pytest.mark.parametrize("complete", [True, False])
def test_packages_come_with_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool) -> None:
    import pyspark

    _publish(tmp_path / "maven", "connector", "connector.class", needs="sdk")
    _publish(tmp_path / "maven", "sdk", SDK if complete else "other.class")
    monkeypatch.setenv("DEFAULT_ARTIFACT_REPOSITORY", f"file://{tmp_path}/maven")
    target = tmp_path / "jars"
    target.mkdir()
    spark = Path(pyspark.__path__[0])
    if complete:
        install("example.freshet:connector:1", spark, target)
        names = {f"example.freshet_{name}-1.jar" for name in ("connector", "sdk")}
        assert {path.name for path in target.iterdir()} == names
    else:
        with pytest.raises(SystemExit, match="brings no AWS SDK; name it"):
            install("example.freshet:connector:1", spark, target)


def _publish(repository: Path, name: str, content: str, needs: str = "") -> None:
    """A Maven package with one file in its jar."""
    folder = repository / "example" / "freshet" / name / "1"
    folder.mkdir(parents=True)
    own = "<groupId>example.freshet</groupId><artifactId>{}</artifactId><version>1</version>"
    other = f"<dependencies><dependency>{own.format(needs)}</dependency></dependencies>" if needs else ""
    pom = f"<project><modelVersion>4.0.0</modelVersion>{own.format(name)}{other}</project>"
    (folder / f"{name}-1.pom").write_text(pom)
    with zipfile.ZipFile(folder / f"{name}-1.jar", "w") as jar:
        jar.writestr(content, b"")


def test_the_kustomization_names_its_files() -> None:
    kustomization = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())
    files = {path.name for path in (INFRA / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files


def test_a_server_that_ships_a_long_journal_is_not_killed_for_not_answering_yet() -> None:
    """A million events take about half a minute, as long as the liveness probe waits."""
    server, _ = yaml.safe_load_all((INFRA / "kubernetes" / "serve.yaml").read_text())
    (container,) = server["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["httpGet"] == container["livenessProbe"]["httpGet"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600


def test_what_the_pod_launcher_reads_is_what_kubernetes_gets() -> None:
    names = {
        (m["kind"], m["metadata"]["name"])
        for f in (INFRA / "kubernetes").glob("*.yaml")
        for m in yaml.safe_load_all(f.read_text())
        if "kind" in m
    }
    assert {("ServiceAccount", "freshet"), ("ConfigMap", "freshet"), ("Namespace", "freshet")} <= names
