from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.errors import BadInput, FreshetError
from components.storage import Storage
from infra.local.services import free_port
from spark_jobs import session
from tests.spark_jobs.log import HOURS, action, impression, write

REPO = Path(__file__).parents[2]


def fake_jdk(folder: Path, version: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "java").touch(mode=0o755)
    (folder / "release").write_text(f'JAVA_VERSION="{version}"\n')
    return folder


def test_a_java_that_is_too_old_is_passed_over_for_the_oldest_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_jdk(tmp_path / "old", "11.0.2")))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(session, "JVM_PLACES", (str(tmp_path / "jvm"),))
    fake_jdk(tmp_path / "jvm" / "b", "17.0.15")
    fake_jdk(tmp_path / "jvm" / "a", "21")
    assert session.java_home() == tmp_path / "jvm" / "b"


def test_without_a_new_enough_java_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_jdk(tmp_path / "old", "1.8.0_402")))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(session, "JVM_PLACES", ())
    with pytest.raises(BadInput, match=r"needs a JDK 17 or newer, found only .*old \(1\); install one \(apt-get"):
        session.java_home()


def test_a_user_without_a_name_is_told_that_java_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster may run a container as any number; Spark would end with an error of its package manager."""
    monkeypatch.setattr(session.os, "getuid", lambda: 4_000_000_000)
    with pytest.raises(BadInput, match=r"/etc/passwd has none for 4000000000; run as a user that it has"):
        session.session("local[1]")


def test_a_connect_server_that_does_not_answer_is_named_with_the_command_that_starts_one() -> None:
    with pytest.raises(FreshetError, match=r"sc://127\.0\.0\.1:9 .*start one with python -m spark_jobs\.server") as e:
        session.session("sc://127.0.0.1:9")
    assert e.value.exit_code == 1, "it may be starting: Airflow tries again"


def test_an_empty_setting_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESHET_SPARK", "")
    assert session.default() == session.DEFAULT


def test_an_s3_root_takes_its_settings_from_the_environment_that_boto3_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    chosen = session.settings("local[2]", "s3://bucket/prefix")
    assert chosen["spark.hadoop.fs.s3a.endpoint"] == "http://127.0.0.1:9000"
    assert chosen["spark.hadoop.fs.s3a.path.style.access"] == "true"
    assert not any("s3a" in key for key in session.settings("local[2]", "file:///tmp"))


@pytest.mark.integration
def test_the_steps_run_on_a_connect_server_that_ends_at_one_sigterm(tmp_path: Path) -> None:
    """In the locale C, too, in which Java cannot name a folder that has an umlaut."""
    storage = Storage(f"file://{tmp_path}/Über uns")
    write(storage, "impressions", [impression(1, 5, 10), impression(1, 6, 10)])
    write(storage, "actions", [action(1, 5, 11), action(1, 5, 12, "watch", value=3.0)])
    port = free_port()
    environment = os.environ | {
        "FRESHET_ROOT": storage.root,
        "FRESHET_SPARK": f"sc://127.0.0.1:{port}",
        "PYTHONPATH": str(REPO),
        "LC_ALL": "C",
    }
    command = [sys.executable, "-m", "spark_jobs.server", f"--port={port}", "--memory=512m"]
    server = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port, server)
        for step in (["join", f"--window={HOURS[0].key}"], ["sequences", "--mode=window", f"--window={HOURS[0].key}"]):
            line = [sys.executable, "-m", f"components.{step[0]}", *step[1:]]
            subprocess.run(line, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=240)
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    finally:
        if server.poll() is None:
            server.kill()
    assert len(storage.list("sequences")) == 2, "one file of rows and the manifest"
    assert {path.name for path in tmp_path.iterdir()} <= {"Über uns"}, "nothing is left in the working folder"


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert server.poll() is None, "the server ended before it listened"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not listen after two minutes")
