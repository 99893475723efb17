"""The command ``pra demo``: thin."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pra.commands.options import Average, Text
from pra.demo.exhibit import load_exhibits
from pra.demo.page import build_page, gradio, launch_options
from pra.errors import PraError, reason_of
from pra.models.weights import EMA
from pra.utils.device import pick_device
from pra.utils.signals import handled


def demo_command(
    run: Annotated[Positional[Path | None], arg(metavar="[RUN]", help_behavior_hint="")] = None,
    other: Annotated[Positional[Path | None], arg(metavar="[RUN2]", help_behavior_hint="")] = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    average: Average = EMA,
    device: Text = None,
) -> None:
    """Show a model in the browser: generate, complete your own pictures, see how it was trained.

    Two runs are shown side by side, with the same classes and seeds. Nothing leaves this machine, and no other one
    reaches the page unless --host says so. Ctrl-C ends it.

    Args:
        run: A run's folder, a checkpoint, a saved model or hub:user/model; by default the model that comes with pra.
        other: Another of the same classes, to compare with.
        host: Address to listen at; 0.0.0.0 opens the page to the whole network.
        port: Port to listen at.
        average: Which weights: ema, raw, or another average of the runs, such as power-0.05.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
    """
    check_address(host, port)
    gradio()
    target = pick_device(device)
    exhibits = load_exhibits([run] if other is None else [run, other], target, average)
    # SIGTERM, by which services and containers are stopped, ends it as Ctrl-C does: cleaned up.
    with (
        handled((signal.SIGTERM,), signal.default_int_handler),
        tempfile.TemporaryDirectory(prefix="pra-demo-") as folder,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder  # what visitors upload and make goes when the demo ends
        serve(build_page(exhibits), host, port)


def serve(page: Any, host: str, port: int) -> None:
    """Serves the page until the process is interrupted.

    Raises:
        PraError: the server does not start.
    """
    try:
        page.launch(server_name=_bracketed(host), server_port=port, **launch_options())
    except (OSError, ValueError) as error:  # Gradio's, for a port that was taken just now and for much else
        raise PraError(
            f"the page cannot be served at {host}:{port} ({reason_of(error)}); try another --host or --port"
        ) from None
    try:
        print(f"demo: open http://{_spelled(host)}:{port} in a browser; Ctrl-C ends it", flush=True)
        if not _is_loopback(host):
            print("demo: everybody who reaches this machine can use it", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Whether a server can listen there; before the models are loaded.

    Raises:
        PraError: the port is taken or closed to us, or no such address is this machine's.
    """
    if not 1 <= port <= 65535:
        raise PraError(f"--port {port} is out of range: take one from 1024 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(family, kind, protocol)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror as error:
        raise PraError(f"--host {host!r} is no address ({error.strerror}); 127.0.0.1 is this machine alone") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PraError(f"port {port} of {host} is in use already; choose another with --port") from None
        if error.errno == errno.EACCES:
            raise PraError(f"port {port} is closed to you; choose one from 1024 on with --port") from None
        raise PraError(
            f"--host {host} cannot be listened at ({error.strerror}); 127.0.0.1 is this machine alone"
        ) from None


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _spelled(host: str) -> str:
    """As it stands in an address that a browser on this machine can open."""
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return _bracketed(host)


def _bracketed(host: str) -> str:
    """As an address has it: an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host else host
