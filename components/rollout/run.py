"""Roll a release (a ranker and a retriever) out in stages, or stop doing so. One call makes at most one decision.

  python -m components.rollout --action=start --ranker=3 --retriever=3     begin; 0 = the newest published versions
  python -m components.rollout                                             judge the evidence, go on if it allows
  python -m components.rollout --action=status                             where it stands
  python -m components.rollout --action=abort --by=me --reason="bad feed"  back to the champion, from any stage

A release goes through these stages; each decision is one more file in serving/rollout/ under the root:

  gate      offline metrics: absolute limits, and change against the champion
  approval  optional: waits for --action=approve
  shadow    scores real requests, shows nothing
  canary    serves a rising share of the users, the same users always (--shares)
  promoted  serves everybody; the alias `champion` in MLflow points to it

On the way it is `paused` when there is no verdict in time or the numbers are void (--action=resume continues),
`rolled_back` when a guardrail breaks or on abort, `rejected` by the gate. Missing data is never a success. The first
release has no champion to compare with: it needs its gate only. The numbers below are fixed when a rollout starts.
An abort after the promotion returns to the champion before.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, Field

from components.errors import AlreadyExists, BadInput, FreshetError
from components.parameters.log import manifest_path
from components.rollout import record
from components.rollout.assess import assess
from components.rollout.config import RolloutConfig
from components.rollout.evidence import Observation
from components.rollout.machine import Order, aliases, step
from components.rollout.observe import newest_version, observe
from components.rollout.state import Alias, Release, RolloutState, Stage
from components.storage import Storage

NO_REGISTRY = "none"
JUDGED = ("advance", "promote")
"""Orders that look at the evidence. All others, an abort above all, must not wait for it, nor fail because of it."""
_ATTEMPTS = 20


class RolloutResult(BaseModel):
    """Where the rollout stands after the step."""

    seq: int = Field(description="newest entry of the record; -1 = none")
    stage: Stage
    changed: bool = Field(description="whether this call decided anything")
    champion: Release | None
    challenger: Release | None
    subject: Release | None = Field(description="the release that was asked about, or the latest one rolled out")
    share: int = Field(description="of 10,000 buckets of users, those of the challenger")
    reason: str = Field(description="why it stands there")
    waiting_for: str = Field(description="what is missing before it can go on")


def run(config: RolloutConfig) -> RolloutResult:
    """Decide once, or again and again until a stage is passed. BadInput: an order or release that does not fit."""
    storage = Storage(config.root)
    if config.action == "status":
        state = record.current(storage)
        return _result(state, observe(storage, state, datetime.now(UTC), config.server()), False, state.subject)
    decided, actions = decide(storage, config)
    if config.until == "decision":
        apply(storage, actions, config.tracking_uri)
        return decided
    from components.rollout.follow import follow

    return follow(storage, config, decided, actions)


def decide(storage: Storage, config: RolloutConfig) -> tuple[RolloutResult, tuple[Alias, ...]]:
    """One decision, recorded; and the aliases that the registry must have after it."""
    for _ in range(_ATTEMPTS):
        before = record.current(storage)
        order = _order(storage, config)
        subject = order.release or _subject(before, config)
        now = datetime.now(UTC)
        judged = order.command in JUDGED
        observation = observe(storage, before, now, config.server()) if judged else Observation()
        after, actions = step(before, observation, now, config, order)
        if after is not before:
            try:
                record.append(storage, after)
            except AlreadyExists:
                continue  # somebody else decided first: decide again on their state
        return _result(after, observation, after is not before, subject), actions
    raise FreshetError(f"others decided first {_ATTEMPTS} times in a row; see --action=status and try again")


def apply(storage: Storage, actions: tuple[Alias, ...], tracking_uri: str) -> None:
    """Set the aliases. They follow the record and every step sets them again, so a crash before this repairs itself.

    Whoever decided in the meantime may have set theirs before these: they are set until the record stands still.
    """
    if tracking_uri == NO_REGISTRY:
        return
    from components.registry import Registry

    registry = Registry(tracking_uri)
    done: tuple[Alias, ...] = ()
    while actions != done:
        for action in actions:
            if action.version is None:
                registry.delete_alias(action.model, action.alias)
            else:
                registry.set_alias(action.model, action.alias, action.version)
        done, actions = actions, aliases(record.current(storage))


def _subject(state: RolloutState, config: RolloutConfig) -> Release | None:
    """The release that a call is about; refuses to decide about another one than was named."""
    named = {model: version for model in ("ranker", "retriever") if (version := getattr(config, model))}
    if not named:
        return state.subject
    for release in (state.subject, state.champion):
        if release is not None and named.items() <= dict(release).items():
            return release
    wanted = " + ".join(f"{model} {version}" for model, version in named.items())
    raise BadInput(
        f"the latest rollout is of {state.subject}, not of {wanted}; "
        "start that release, or leave --ranker and --retriever out"
    )


def _order(storage: Storage, config: RolloutConfig) -> Order:
    release = _release(storage, config) if config.action == "start" else None
    return Order.model_validate(
        {"command": config.action, "release": release, "by": config.by, "reason": config.reason}
    )


def _release(storage: Storage, config: RolloutConfig) -> Release:
    """The release to start, all of it published."""
    versions = {}
    for model, wanted in (("ranker", config.ranker), ("retriever", config.retriever)):
        version = wanted or newest_version(storage, model)
        if version is None or not storage.exists(manifest_path(model, version, "snapshot", 0)):
            name = f"{model} version {wanted}" if wanted else model
            raise BadInput(f"no {name} is published under {storage.url('parameters')}; run pretrain and publish first")
        versions[model] = version
    return Release(**versions)


def _result(state: RolloutState, observation: Observation, changed: bool, subject: Release | None) -> RolloutResult:
    waiting_for = _waiting_for(state, observation)
    return RolloutResult.model_validate(
        dict(state) | {"changed": changed, "subject": subject, "waiting_for": waiting_for}
    )


def _waiting_for(state: RolloutState, observation: Observation) -> str:
    if state.stage == "approval":
        return "a person's approval: --action=approve"
    if state.stage == "paused":
        return "a person's decision: --action=resume or --action=abort"
    if state.stage not in ("shadow", "canary"):
        return ""
    finding = assess(state, observation, datetime.now(UTC))
    reasons = [*observation.notes, finding.verdict.reason] if finding else observation.notes
    return "; ".join(dict.fromkeys(reasons))
