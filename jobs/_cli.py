"""What the entry points share: logging, the closing JSON line, and errors as sentences with exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import ray
import typer
from rich.console import Console
from rich.logging import RichHandler

from fwm_audit import logs, webhook
from fwm_audit.errors import FwmError, UsageError
from fwm_audit.key import MASTER_COMMAND_VARIABLE, MASTER_KEY_VARIABLE, MasterSecret

EXIT_TAMPERED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INCOMPLETE: Final = 3

#: Standard error, shared by log lines and progress bars, so that they do not overwrite each other.
CONSOLE: Final = Console(stderr=True)
MasterKey = Annotated[
    Path | None,
    typer.Option(help="File with the master secret, as the workers see it. [default: $FWM_MASTER_KEY_FILE]"),
]
AllowFactory = Annotated[
    list[str] | None,
    typer.Option(metavar="PACKAGE", help="Package that `factory:` architectures may name; repeatable."),
]
AllowLocal = Annotated[
    bool, typer.Option("--allow-local", help="Let a catalog in an object store name local files of the workers.")
]
Webhook = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with a URL to which the closing line is posted when the job ends."),
]
log = logging.getLogger("jobs")


def hexadecimal(option: str, text: str) -> str:
    """64 hex digits in lower case.

    Raises:
        UsageError: They are something else.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise UsageError(f"{option} {text[:80]!a} is not 64 hex digits")
    return text.lower()


def master_secret(path: Path | None) -> MasterSecret | None:
    """The master secret, if one is configured.

    Raises:
        UsageError: One is, but cannot be had.
    """
    if path is None and not os.environ.get(MASTER_KEY_VARIABLE) and not os.environ.get(MASTER_COMMAND_VARIABLE):
        return None
    return MasterSecret.from_file(path)


def run(app: typer.Typer) -> None:
    """Run an entry point to its exit code, with usage errors as one sentence and no traceback.

    Python's own exit code for an uncaught exception is 1, which here would mean "tampered".
    """
    if CONSOLE.is_terminal and not logs.as_json():
        handler: logging.Handler = RichHandler(console=CONSOLE, show_path=False, omit_repeated_times=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", datefmt="[%X]", handlers=[handler])
    else:
        logs.configure()
    try:
        app()
    except UsageError as error:
        _say(str(error))
        sys.exit(EXIT_USAGE)
    except FwmError as error:
        _say(error.message)
        sys.exit(EXIT_INCOMPLETE)
    except Exception:  # the last resort before the interpreter's exit code 1
        log.exception("this is a bug")
        sys.exit(EXIT_INCOMPLETE)


def _say(error: str) -> None:
    if logs.as_json():
        log.error("%s", error)
    else:
        print(f"error: {error}", file=sys.stderr)


def emit(hook: str | None = None, **values: Any) -> None:
    """Print the closing line of standard output: one JSON object for whoever called.

    Args:
        hook: URL to which it is posted then; a receiver that is down changes nothing but the log.
        values: The object.
    """
    _print(values)
    if hook is not None:
        webhook.send(hook, values)


def _print(values: dict[str, Any]) -> None:
    try:
        print(json.dumps(values), flush=True)
    except BrokenPipeError:
        # Nobody reads. The exit code still has to tell, and typer's for this error would mean "tampered".
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def cluster(*, log_to_driver: bool = False, dashboard: bool = False) -> Iterator[None]:
    """A connection to the cluster that RAY_ADDRESS names, or a cluster of this machine's own.

    Print the closing line after its end: until then, Ray prints to standard output, too.

    Args:
        log_to_driver: Show what workers log.
        dashboard: Whether a cluster of our own gets one.

    Raises:
        UsageError: There is no cluster where RAY_ADDRESS says.
    """
    # A submitted job has the variable set. Without an address, Ray would join whatever cluster was
    # last started on this host.
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local" and (secret := os.environ.get(MASTER_KEY_VARIABLE)):
        os.environ[MASTER_KEY_VARIABLE] = str(Path(secret).absolute())  # workers run in another folder
    try:
        ray.init(
            address,
            log_to_driver=log_to_driver,
            logging_level=logging.WARNING,
            include_dashboard=dashboard if address == "local" else None,  # to be said of a new cluster only
        )
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None
    # Ray's own handler, set by init, would exit without a word; a pod that is evicted gets SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()
