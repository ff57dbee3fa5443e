"""What a benchmark's last run leaves in the documentation: its table, between two markers, and its plot.

    <!-- bench-streaming: begin -->
    whatever stands here is replaced
    <!-- bench-streaming: end -->

What people wrote around the markers (figures of several machines and seeds) stays. A command with its default settings
writes by default; one with others, a quick run say, writes only what --docs and --plot name.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from components.errors import BadInput
from components.storage import LocalFiles

DOCS = Path(__file__).resolve().parents[2] / "docs" / "experiments.md"


@dataclass(frozen=True)
class Benchmark:
    """A command that leaves its last run in the documentation.

    target: in the Makefile, and the markers' name. module: what `python -m` runs. picture: file in docs/images.
    settings: the options (as attributes) that its figures depend on; with other values a run is not the documented one.
    """

    target: str
    module: str
    picture: str
    settings: tuple[str, ...]

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """--plot and --docs; absent they are None."""
        only = "with the default settings; '' for none"
        parser.add_argument("--plot", help=f"picture to write (default: docs/images/{self.picture}, {only})")
        parser.add_argument(
            "--docs", help=f"document whose block gets the table (default: docs/experiments.md, {only})"
        )

    def record(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        argv: Sequence[str] | None = None,
        docs: Path | None = None,
    ) -> Record:
        """Where this run is to be written, known before it begins.

        docs: the default document (DOCS). Raises BadInput if there is to be a table in a document without the block.
        """
        usual = docs or DOCS
        other = [f"--{name}" for name in self.settings if getattr(options, name) != parser.get_default(name)]
        ordinary = usual.is_file() and not other
        reason = f"not the default {', '.join(other)}" if other else f"there is no {usual}"
        silent = [f"--{name}" for name in ("docs", "plot") if getattr(options, name) is None]
        words = sys.argv[1:] if argv is None else argv
        record = Record(
            target=self.target,
            command=shlex.join(["python", "-m", self.module, *words]),
            docs=_path(options.docs, usual if ordinary else None),
            plot=_path(options.plot, usual.parent / "images" / self.picture if ordinary else None),
            notice=f"Nothing written for {' and '.join(silent)}: {reason}." if silent and not ordinary else "",
        )
        if record.docs:
            replace_block(_read(record.docs), record.target, "", record.docs)
        return record


@dataclass(frozen=True)
class Record:
    """Where one run is to be written. docs, plot: None for nowhere; notice: what is not written and why, or empty."""

    target: str
    command: str
    docs: Path | None
    plot: Path | None
    notice: str

    def write(self, tables: str, conditions: str) -> None:
        """Put the Markdown into the document's block, with date, command line and conditions such as '2,999 users'.

        The document is replaced at once or not at all. The block shows the picture unless the rest of the document
        does. BadInput if the block is gone by now.
        """
        if not self.docs:
            return
        path = self.docs.resolve()
        block = f"**Last run.** {datetime.now(UTC):%Y-%m-%d} (UTC), {conditions}.\n\n    {self.command}\n\n{tables}"
        text = replace_block(_read(path), self.target, block, path)
        if self.plot:
            link = f"]({Path(os.path.relpath(self.plot.resolve(), path.parent)).as_posix()})"
            if link not in text:
                text = replace_block(text, self.target, f"{block}\n\n![{self.target}{link}", path)
        LocalFiles(path.parent).write(path.name, text.encode())


def replace_block(text: str, target: str, content: str, path: Path) -> str:
    """The text with this content between the target's markers. path is for the error: BadInput unless it has both."""
    begin, end = markers(target)
    lines = text.split("\n")
    places = [[number for number, line in enumerate(lines) if line.strip() == marker] for marker in (begin, end)]
    if [len(found) for found in places] != [1, 1] or places[0] > places[1]:
        raise BadInput(
            f"{path} needs the lines {begin} and {end}, once each and in this order, to say where the table goes; "
            "add them, name another document with --docs, or write none with --docs ''"
        )
    first, last = places[0][0], places[1][0]
    return "\n".join([*lines[: first + 1], *content.strip("\n").splitlines(), *lines[last:]])


def markers(target: str) -> tuple[str, str]:
    """The lines before and after the block of a Makefile target."""
    return f"<!-- {target}: begin -->", f"<!-- {target}: end -->"


def _path(asked: str | None, default: Path | None) -> Path | None:
    """What an option says: absent the default, empty none."""
    return default if asked is None else Path(asked) if asked else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadInput(f"no document {path}; name one with --docs, or write none with --docs ''") from error
