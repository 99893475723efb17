"""The command ``pra demo``."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pra.commands.options import Average, Device, Folder, Model
from pra.demo.exhibit import load_exhibits
from pra.demo.page import build_page, gradio, launch_options
from pra.errors import PraError, reason_of
from pra.models.weights import EMA
from pra.utils.device import pick_device
from pra.utils.signals import ENDS, handled


def demo_command(
    run: Model = None,
    other: Annotated[Positional[Path | None], arg(metavar="[RUN2]", help_behavior_hint="")] = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    weights: Folder = None,
    average: Average = EMA,
    device: Device = None,
) -> None:
    """Show a model in the browser: generate, complete your own pictures, see how it was trained.

    Two runs are shown side by side, with the same captions, classes and seeds. Nothing leaves this machine, and other
    machines cannot reach the page without --host. Ctrl-C ends it.

    Args:
        other: A second model to compare with: of the same classes, or one that reads captions and has one class.
        host: Address to listen at; 0.0.0.0 opens the page to the whole network.
        port: Port to listen at.
        weights: The folder of the models' frozen text encoder, if it has moved.
    """
    check_address(host, port)
    gradio()
    exhibits = load_exhibits([run] if other is None else [run, other], pick_device(device), average, weights)
    # Services and containers are stopped by SIGTERM: it cleans up as Ctrl-C does.
    with (
        handled(ENDS, signal.default_int_handler),
        tempfile.TemporaryDirectory(prefix="pra-demo-") as folder,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and pictures are deleted when the demo ends
        serve(build_page(exhibits), host, port)


def serve(page: Any, host: str, port: int) -> None:
    """Serve the page until the process is interrupted."""
    spelled = f"[{host}]" if ":" in host else host
    for name in ("no_proxy", "NO_PROXY"):  # Gradio calls its own page at the start, which no proxy can reach
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.1", "::1", host)))
    try:
        page.launch(server_name=spelled, server_port=port, **launch_options())
    except (OSError, ValueError) as error:  # Gradio's, for a port that was taken just now and for much else
        raise _closed(host, port, error) from None
    try:
        shown = "localhost" if host in ("0.0.0.0", "::") else spelled
        print(f"demo: open http://{shown}:{port} in a browser; Ctrl-C ends it", flush=True)
        if host not in ("127.0.0.1", "::1", "localhost"):
            print("demo: anybody who reaches this machine can use the page", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Refuse an address where a server cannot listen, before the models are loaded."""
    if not 1 <= port <= 65535:
        raise PraError(f"--port {port} must lie in [1, 65535]", host=host, port=port)
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise _closed(host, port, error) from None


def _closed(host: str, port: int, error: Exception) -> PraError:
    reason = (getattr(error, "strerror", None) or reason_of(error)).partition(" (while")[0]
    problem = f"the page cannot be served at {host}:{port} ({reason})"
    return PraError(f"{problem}. Use another --host (127.0.0.1 is this machine) or --port", host=host, port=port)
