"""The summary of a job, sent to whoever is to know: one POST of its closing JSON line.

The URL comes from a file, as it is often a secret by itself (a chat's incoming hook), and appears in no log, argument
or error. It is the operator's, never a catalog's, and what answers is not followed: a redirection would let it send
the summary, or this process, elsewhere.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import stamina

from fwm_audit.errors import UsageError

_ATTEMPTS: Final = 3
_TIMEOUT_S: Final = 8.0
#: In all.
_PATIENCE_S: Final = 30.0
_TAKEN: Final = "taken"

log = logging.getLogger(__name__)


class _RefusedError(Exception):
    """The receiver does not want this: no reason to ask again."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the answer is an error like any other that is not 2xx."""


def read_url(file: Path) -> str:
    """The URL in a file.

    Raises:
        UsageError: There is none that can be used.
    """
    try:
        url = file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"--webhook: cannot read {file}") from None
    parts = urlsplit(url)
    if parts.scheme not in {"https", "http"} or not parts.hostname or len(url.split()) != 1:
        raise UsageError(f"--webhook: {file} has to hold one URL, https://... or http://...")
    return url


def send(url: str, summary: Mapping[str, Any]) -> bool:
    """Whether the receiver took the summary; never raises, as what was found must not depend on it."""
    said: list[str] = []
    # A thread, as a receiver that answers one byte now and then would be waited for however short the timeout.
    thread = threading.Thread(target=_try, args=(url, json.dumps(summary).encode(), said), daemon=True)
    try:
        thread.start()
        thread.join(_PATIENCE_S)
        reason = said[0] if said else f"no answer within {_PATIENCE_S:g} s"
    except KeyboardInterrupt:
        reason = "interrupted"
    if reason != _TAKEN:
        log.error("the webhook was not told: %s", reason)
    return reason == _TAKEN


def _try(url: str, body: bytes, said: list[str]) -> None:
    try:
        for attempt in stamina.retry_context(on=OSError, attempts=_ATTEMPTS, timeout=_PATIENCE_S):
            with attempt:
                _post(url, body)
    except _RefusedError as error:
        said.append(str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the audit stands; its text could quote the URL
        said.append(type(error).__name__)
    else:
        said.append(_TAKEN)


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(  # noqa: S310 - `read_url` allows http and https only
        url, body, {"Content-Type": "application/json", "User-Agent": "fwm-audit"}, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        opener.open(request, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 500 and error.code != 429:
            raise _RefusedError(f"it answered {error.code}") from None
        raise
