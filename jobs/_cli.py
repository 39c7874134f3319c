"""What the entry points share: logging, the closing JSON line, and errors as sentences with exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import ray
from rich.console import Console
from rich.logging import RichHandler

from fwm_audit.errors import FwmError, UsageError

if TYPE_CHECKING:
    import typer

EXIT_TAMPERED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INCOMPLETE: Final = 3

#: Standard error, shared by log lines and progress bars, so that they do not overwrite each other.
CONSOLE: Final = Console(stderr=True)
log = logging.getLogger("jobs")


def run(app: typer.Typer) -> None:
    """Run an entry point to its exit code, with usage errors as one sentence and no traceback.

    Python's own exit code for an uncaught exception is 1, which here would mean "tampered".
    """
    if CONSOLE.is_terminal:
        handler: logging.Handler = RichHandler(console=CONSOLE, show_path=False, omit_repeated_times=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", datefmt="[%X]", handlers=[handler])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        app()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except FwmError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(EXIT_INCOMPLETE)
    except Exception:  # the last resort before the interpreter's exit code 1
        log.exception("this is a bug")
        sys.exit(EXIT_INCOMPLETE)


def emit(**values: Any) -> None:
    """Print the closing line of standard output: one JSON object for whoever called."""
    print(json.dumps(values), flush=True)


def connect(*, log_to_driver: bool = False, dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it set), else start one here.

    Ray by itself also joins any cluster that was started on this host: only one that was asked for
    is joined here.
    """
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=log_to_driver, logging_level=logging.WARNING)
    else:
        ray.init("local", log_to_driver=log_to_driver, logging_level=logging.WARNING, include_dashboard=dashboard)
