from __future__ import annotations

from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from components.errors import BadInput, FreshetError
from components.parameters.checkpoint import Checkpoint
from components.registry import Registry
from components.tracking import Tracker
from tests.components.sequence_world import HISTORY


def checkpoint(run_id: str, model: str = "ranker") -> Checkpoint:
    return Checkpoint(
        model=model,
        digest="0123456789ab",
        dataset="history",
        windows=[HISTORY.key],
        event_time_min_us=1,
        event_time_max_us=2,
        run_id=run_id,
        metrics={},
        config={},
        rows={},
        files={},
    )


def start_run(uri: str, **tags: object) -> str:
    with Tracker(uri).run("tests", "key", "a run", {}, **tags) as run:
        return run.run_id


@pytest.fixture
def registry(tracking_uri: str) -> Registry:
    return Registry(tracking_uri)


def registered(registry: Registry, number: int, model: str = "ranker") -> int:
    run_id = start_run(registry.tracking_uri)
    path = f"checkpoints/{model}/{number}"
    return registry.register(checkpoint(run_id, model), f"file:///store/{path}", path, parent_version=None).version


def test_a_version_refers_to_its_checkpoint_and_is_found_by_its_run(registry: Registry) -> None:
    run_id = start_run(registry.tracking_uri)
    made = registry.register(checkpoint(run_id), "s3://bucket/checkpoints/x", "checkpoints/x", parent_version=3)
    entry = registry.client.get_model_version("ranker", "1")
    assert (entry.source, entry.tags["freshet.windows"]) == ("s3://bucket/checkpoints/x", f'["{HISTORY.key}"]')
    assert registry.find("ranker", run_id, "checkpoints/x") == made == registry.version("ranker", 1)
    assert made.parent_version == 3
    assert registry.find("ranker", "another run", "checkpoints/x") is None
    assert registry.find("retriever", run_id, "checkpoints/x") is None


def test_registering_twice_makes_one_version(registry: Registry) -> None:
    entry = checkpoint(start_run(registry.tracking_uri))
    first = registry.register(entry, "file:///store/c", "c")
    assert registry.register(entry, "file:///store/c", "c") == first
    assert len(registry.versions("ranker")) == 1


def test_a_lost_answer_to_the_registration_does_not_make_the_checkpoint_another_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, create = checkpoint(start_run(registry.tracking_uri)), registry.client.create_model_version

    def sent_twice(**arguments: Any) -> Any:
        create(**arguments)
        return create(**arguments)

    monkeypatch.setattr(registry.client, "create_model_version", sent_twice)
    made = registry.register(entry, "file:///store/c", "c")
    assert registry.register(entry, "file:///store/c", "c") == made


def test_models_are_numbered_apart(registry: Registry) -> None:
    assert [registered(registry, n, model) for n, model in enumerate(["ranker", "ranker", "retriever"])] == [1, 2, 1]


def test_aliases_point_move_and_go(registry: Registry) -> None:
    assert registry.alias("ranker", "champion") is None
    registry.delete_alias("ranker", "champion")  # before the model exists
    registered(registry, 1), registered(registry, 2)
    registry.set_alias("ranker", "champion", 1)
    registry.set_alias("ranker", "champion", 1)
    registry.set_alias("ranker", "challenger", 2)
    assert (registry.alias("ranker", "champion"), registry.alias("ranker", "challenger")) == (1, 2)
    registry.set_alias("ranker", "champion", 2)
    assert registry.resolve("ranker", None) == 2 and registry.resolve("ranker", 1) == 1
    registry.delete_alias("ranker", "challenger")
    registry.delete_alias("ranker", "challenger")
    assert registry.alias("ranker", "challenger") is None


def test_an_unknown_version_is_refused_with_the_known_ones(registry: Registry) -> None:
    registered(registry, 1)
    with pytest.raises(BadInput, match="no version 7 of ranker; it has: 1"):
        registry.set_alias("ranker", "champion", 7)
    with pytest.raises(BadInput, match="retriever has no champion yet"):
        registry.resolve("retriever", None)


def test_without_an_mlflow_server_the_error_says_what_to_do() -> None:
    with pytest.raises(FreshetError, match=r"no MLflow server answers at http://127\.0\.0\.1:9 .*--tracking-uri"):
        Registry("http://127.0.0.1:9")


def test_a_login_in_the_address_is_sent_to_the_server_and_told_to_nobody() -> None:
    sent: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers["Authorization"])
            self.send_response(200 if len(sent) == 1 else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing: a test's output is its own."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        Registry(f"http://ana:s%40cret@{address}/")
        with pytest.raises(FreshetError, match=f"no MLflow server answers at http://{address} ") as refused:
            Registry(f"http://ana:s%40cret@{address}/")
        server.shutdown()
    assert sent == [f"Basic {b64encode(b'ana:s@cret').decode()}"] * 2
    assert "cret" not in str(refused.value)


def test_a_failed_block_ends_its_run_as_failed(registry: Registry) -> None:
    tracker = Tracker(registry.tracking_uri)
    with pytest.raises(ValueError, match="boom"), tracker.run("tests", "k", "n", {"a": 1}) as run:
        run.step(1, {"loss": 2.0, "undefined": float("nan")})
        raise ValueError("boom")
    found = registry.client.get_run(run.run_id)
    assert found.info.status == "FAILED" and found.data.metrics == {"loss": 2.0}


@pytest.mark.parametrize("stopped", [SystemExit(143), KeyboardInterrupt()])
def test_a_block_that_is_stopped_ends_its_run_as_killed(registry: Registry, stopped: BaseException) -> None:
    with pytest.raises(type(stopped)), Tracker(registry.tracking_uri).run("tests", "k", "n", {"a": 1}) as run:
        raise stopped
    assert registry.client.get_run(run.run_id).info.status == "KILLED"
