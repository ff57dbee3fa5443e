"""Serve recommendations over HTTP, and follow every parameter log while doing so.

Reads   serving/rollout (which versions), parameters/ (their logs), items/, events/ (histories at start)
Writes  events/ (what clients report), quarantine/serve/, serving/shadow/, and a journal on the local disk

The server loads the champion (and during a rollout the challenger), applies every new delta within seconds without
failing a request, and knows what users did the moment they did it. Events are acknowledged once they are on disk; a
server that is killed loses none of them. Ctrl-C or SIGTERM ends it after the last events are written out.

Pages   /docs (the API), /v1/status (what is served), /readyz, /metrics

example:
  python -m components.serve --port=8000 --score-weights=click=1,like=2
"""

from __future__ import annotations

import errno
import logging
import signal
import socket
import sys

from pydantic import BaseModel, Field

from components.errors import BadInput, FreshetError
from components.serve.config import ServeConfig

GRACE_S = 5
"""Seconds that requests under way have at the end: Docker kills after 10, and the journal must be shipped before."""
log = logging.getLogger("freshet.serve")


class ServeResult(BaseModel):
    """What the server did until it was stopped."""

    address: str = Field(description="where it listened")
    requests: int = Field(description="requests answered")
    events: int = Field(description="events recorded")


def run(config: ServeConfig) -> ServeResult:
    """Serve until SIGINT or SIGTERM. BadInput: the address or the journal cannot be had.

    FreshetError: at the end there are events that could not be written to the event log; a next start does it.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    import torch
    import uvicorn

    from components.serve.app import create_app
    from components.serve.server import Server

    torch.set_num_threads(1)  # requests run side by side; within one, threads would only get in each other's way
    with _listen(config) as listener:
        address = f"http://{config.host}:{listener.getsockname()[1]}"
        server = Server(config)
        server.open_journal()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn raises it again after a graceful end
        settings = uvicorn.Config(
            create_app(server), log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S
        )
        log.info("listening on %s (API page: %s/docs)", address, address)
        uvicorn.Server(settings).run(sockets=[listener])
    if waiting := server.journal.size():
        raise FreshetError(
            f"{waiting} bytes of events are not in the event log: it could not be written. They are safe in "
            f"{server.journal.folder}; start the server again when {config.root} can be written"
        )
    return ServeResult(address=address, requests=server.metrics.answered(), events=server.metrics.recorded())


def _listen(config: ServeConfig) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        other = (
            "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host, an IPv4 address of this machine"
        )
        raise BadInput(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another {other}"
        ) from error
    return listener
