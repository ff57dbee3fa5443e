"""The demo on the synthetic world: live users, a second release on its way, and a shift of their preferences."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich.console import Console

from components.windows import Window
from infra.local.airflow import Airflow, DagRun
from infra.local.stack import Stack
from infra.local.story import ONE_THREAD, Story, mean, whole_second

ATTRIBUTION_S = 8
"""Feedback of the live users comes within 5 s; a window is closed 8 s after its end."""

LEARNING: dict[str, Any] = {
    # This world changes within minutes: learn faster than by the defaults, which are measured on a log of days.
    "continual_dense_lr": 0.002,
    "continual_table_lr": 0.2,
    "continual_bias_lr": 0.3,
    "continual_batch_tokens": 1024,
}

ROLLOUT_RULES: dict[str, Any] = {
    # Minutes instead of days: few samples suffice. A laptop that trains beside the server may answer slowly and see a
    # change of share late; a rollout that stays paused ends the demo with the reason.
    "shadow_samples": 20,
    "shares": "2000,5000",
    "min_samples": 300,
    "min_bake_s": 4,
    "max_bake_s": 600,
    "settle_s": 10,
    "max_p99_ms": 5000,
    "max_quality_drop": 0.3,
    "gate_changes": "ranker.auc_click>=-0.05, ranker.ne_click<=0.1",
    "require_proof": False,
    "poll_s": 1,
    "wait_s": 600,
}


@dataclass(frozen=True)
class Scale:
    """How large the story is; `world` and `pretrain` are settings of ingest and of the DAG pretrain."""

    windows_before: int = 2
    windows_after: int = 3
    requests: int = 400
    rate: float = 25.0
    world: dict[str, Any] = field(default_factory=lambda: {"world_shift_correlation": -0.3, "world_day_s": 600})
    pretrain: dict[str, Any] = field(default_factory=dict)


class SyntheticStory(Story):
    """Pretrain on the past, learn from live windows, retrain and roll out, and go on while tastes change."""

    shift_at = ""

    def __init__(self, stack: Stack, airflow: Airflow, console: Console, scale: Scale | None = None) -> None:
        super().__init__(stack, airflow, console)
        self.scale = scale or Scale()

    def tell(self) -> None:
        self.ingest_history()
        self.first_release()
        self.live_windows(self.scale.windows_before)
        self.second_release()
        self.shift()
        self.live_windows(self.scale.windows_after)
        self.check_all_runs_succeeded()

    def ingest_history(self) -> None:
        self.history_end = whole_second().replace(second=0)
        result = self.run_component(
            "ingest", source="synthetic", world_end=self.history_end.isoformat(), **self.scale.world
        )
        bad = sum(result["quarantined"].values())
        self.say(f"ingested {result['impressions']:,} impressions of the past; {bad} bad rows are in quarantine")

    def first_release(self) -> None:
        self.begin = whole_second()
        join = {"join_from": (self.begin - timedelta(days=30)).isoformat(), "join_until": self.begin.isoformat()}
        split = {"split": (self.history_end - timedelta(hours=12)).isoformat()}
        # The past's last hour waits for no more actions: the live windows begin now.
        self.run_dag("build_sequences", {**join, **split, "early": True}, "build_sequences (the whole past)")
        self.wait(self.roll_out({}, "pretrain (ranker and retriever)"), "rollout (first release)")
        self.wait_until_ready()

    def live_windows(self, count: int) -> None:
        """Windows of live traffic; users of the next window come while the last one is learned from."""
        pending: Window | None = None
        for _ in range(count):
            traffic = self.start_traffic(self.scale.requests)
            if pending:
                self.learn(pending)
            self.finish("traffic", traffic)
            pending = self.close_window()
        if pending:
            self.learn(pending)

    def close_window(self) -> Window:
        """The window from the end of the last one until now; the next one begins at its end."""
        end = whole_second() + timedelta(seconds=1)
        window, self.begin = Window(self.begin, end), end
        return window

    def shift(self) -> None:
        self.shift_at = whole_second().isoformat()
        self.say("[bold]the users' preferences shift[/bold]")

    def start_traffic(self, requests: int) -> subprocess.Popen[str]:
        return self.component(
            "traffic",
            server=self.stack.url("serve"),
            requests=requests,
            duration_s=0,
            rate=self.scale.rate,
            shift_at=self.shift_at,
            seed=int(time.monotonic() * 1000) % 2**31,
        )

    def learn(self, window: Window) -> None:
        time.sleep(max(0.0, window.end.timestamp() + ATTRIBUTION_S - time.time()))
        # The planted shift changes the rates of feedback more than a join would accept elsewhere.
        conf = {**ONE_THREAD, **LEARNING, "attribution_window_s": ATTRIBUTION_S, "max_label_ratio": 100}
        first = bool(self.shift_at) and not any(told.note for told in self.windows)
        note = "shift" if first else ""
        self.train_window(window, conf, f"continual_training {window.key}", note)
        self.newest = window

    def second_release(self) -> None:
        """Retrain on everything so far; the new release passes shadow and canary while users go on."""
        split = {"split": self.newest.start.isoformat()}
        self.run_dag("build_sequences", split, "build_sequences (with the live windows)")
        rollout = self.roll_out({"seed": 2}, "pretrain (second release)")
        users = self.start_traffic(0)
        try:
            self.wait(rollout, "rollout (second release: shadow, canary, promoted)")
        finally:
            users.terminate()
            self.finish("traffic", users)
        self.learn(self.close_window())

    def roll_out(self, settings: dict[str, Any], doing: str) -> DagRun:
        """Pretrain a release and start its rollout, by rules that fit a demo of minutes."""
        conf = {**ONE_THREAD, **self.scale.pretrain, **settings, "roll_out": False}
        pretrain = self.run_dag("pretrain", conf, doing)
        return self.airflow.trigger("rollout", {**self.airflow.result(pretrain, "release"), **ROLLOUT_RULES})

    def recovery(self) -> dict[str, float]:
        """Mean AUC after the window of the shift, from which the continually trained model could first learn of it."""
        shifted = next(number for number, told in enumerate(self.windows) if told.note)
        after = self.windows[shifted + 1 :]
        continual, frozen = mean([w.auc for w in after]), mean([w.frozen_auc for w in after])
        return {"continual": continual, "frozen": frozen, "difference": continual - frozen}
