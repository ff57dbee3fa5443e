"""Joined windows that a version has not learned from, although they come before the one that it shall learn from.

They are joined while a release is pretrained, or while a version that comes back by a rollback was not the champion.
Once a later window is learned from, they cannot be, so the step learns from them first.
"""

from __future__ import annotations

from components.errors import BadInput
from components.join.run import published
from components.manifests import NAME, Manifest, find
from components.parameters.reader import LogReader
from components.storage import Storage
from components.windows import Window


def datasets_before(storage: Storage, reader: LogReader, head: int, dataset: Manifest) -> list[Manifest]:
    """Datasets of the joined windows between what the version has learned and `dataset`, oldest first.

    BadInput when there is no sequence dataset of one of them.
    """
    windows = _left_out(storage, reader, head, dataset)
    found = _datasets_of(storage, {window.key for window in windows}, dataset) if windows else {}
    if missing := [window.key for window in windows if window.key not in found]:
        others = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BadInput(
            f"{reader.model} {reader.version} has not learned from {', '.join(missing[:5])}{others}, joined before "
            f"{dataset.windows[0]}, and no sequences of them are built; run python -m components.sequences "
            f"--mode=window --window={missing[0]} and so on, then this again, or leave them out with --skip-gap"
        )
    return [found[window.key] for window in windows]


def _left_out(storage: Storage, reader: LogReader, head: int, dataset: Manifest) -> list[Window]:
    until, start = reader.manifest(head).consumed_until_us, min(Window.parse(key) for key in dataset.windows).start_us
    if until is None:
        return []
    pretrained = set(reader.manifest(0).windows)  # an eval part that was kept apart on purpose stays so
    return [w for w in published(storage) if until <= w.start_us < start and w.key not in pretrained]


def _datasets_of(storage: Storage, windows: set[str], like: Manifest) -> dict[str, Manifest]:
    """Window key -> its sequence dataset; of several, the newest with the settings of `like`, else the newest."""
    folders = [path.removesuffix(f"/{NAME}") for path in storage.list("sequences") if path.endswith(f"/{NAME}")]
    named = [folder for folder in folders if any(folder.startswith(f"sequences/window-{key}-") for key in windows)]
    manifests = [manifest for folder in named if (manifest := find(storage, folder)) is not None]
    manifests.sort(key=lambda manifest: (_settings(manifest) == _settings(like), manifest.created_at))
    return {manifest.windows[0]: manifest for manifest in manifests}


def _settings(dataset: Manifest) -> dict[str, object]:
    return {name: value for name, value in dataset.config.items() if name != "window"}
