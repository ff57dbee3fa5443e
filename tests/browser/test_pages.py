"""What a person sees after `make demo`, in headless Chromium; the pictures go to docs/images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.local.airflow import Airflow
from infra.local.stack import Stack

pytestmark = pytest.mark.browser
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def stack() -> Stack:
    """The demo's installation, which must be up."""
    stack = Stack.demo()
    try:
        httpx.get(f"{stack.url('serve')}/livez", timeout=5).raise_for_status()
    except httpx.HTTPError:
        pytest.skip("needs the demo running: make demo && make browser")
    return stack


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make browser installs it")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium: sudo apt-get install -y chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser.new_page(viewport={"width": 1400, "height": 900})
        browser.close()


def picture(page: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1500)  # let animations end
    page.screenshot(path=str(IMAGES / f"{name}.png"))


def latest(stack: Stack, dag_id: str) -> str:
    airflow = Airflow(stack.url("airflow"))
    airflow.login()
    runs = airflow.get(f"/dags/{dag_id}/dagRuns", order_by="-run_after", limit=1)["dag_runs"]
    run_id: str = runs[0]["dag_run_id"]
    return run_id


def test_the_trigger_form_of_pretrain_shows_typed_and_described_fields(page: Any, stack: Stack) -> None:
    page.goto(f"{stack.url('airflow')}/dags/pretrain")
    page.get_by_role("button", name="Trigger").first.click()
    page.get_by_role("button", name="Learning").click()
    page.get_by_text("Passes over the data").first.wait_for(timeout=30_000)
    picture(page, "airflow-pretrain-form")
    content = page.content()
    for text in ("id of the sequence dataset", "Embedding", "start the rollout"):
        assert text.lower() in content.lower(), text
    assert page.get_by_role("button", name="Trigger").last.is_enabled(), "the defaults are enough to start a run"


def test_the_grid_of_a_finished_run_is_green(page: Any, stack: Stack) -> None:
    page.goto(f"{stack.url('airflow')}/dags/continual_training/runs/{latest(stack, 'continual_training')}")
    page.get_by_text("finetune_ranker").first.wait_for(timeout=30_000)
    picture(page, "airflow-continual-grid")
    assert "success" in page.content().lower()


def test_the_run_of_pretraining_in_mlflow_has_metrics_and_parameters(page: Any, stack: Stack) -> None:
    api = f"{stack.url('mlflow')}/api/2.0/mlflow"
    experiment = httpx.get(f"{api}/experiments/get-by-name", params={"experiment_name": "pretrain"}).json()
    number = experiment["experiment"]["experiment_id"]
    search = {"experiment_ids": [number], "filter": "params.model = 'ranker'", "max_results": 1}
    run = httpx.post(f"{api}/runs/search", json=search).json()["runs"][0]["info"]["run_id"]
    page.goto(f"{stack.url('mlflow')}/#/experiments/{number}/runs/{run}")
    page.get_by_text("auc_click").first.wait_for(timeout=30_000)
    picture(page, "mlflow-run")
    assert "batch_tokens" in page.content()


def test_the_docs_page_of_the_server_describes_its_calls(page: Any, stack: Stack) -> None:
    page.goto(f"{stack.url('serve')}/docs")
    page.get_by_text("/v1/recommend").first.wait_for(timeout=30_000)
    picture(page, "server-docs")
    for path in ("/v1/rank", "/v1/events", "/readyz", "/v1/status"):
        assert path in page.content()
