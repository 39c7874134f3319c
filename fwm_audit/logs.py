"""Log lines as JSON objects, one a line, where FWM_LOG_FORMAT is `json`: drivers and workers read it alike.

An object has `time` (ISO 8601, UTC), `level`, `logger`, `message`, what the process said of itself (`run_id`), what
the line is about (`model_id`, `uri`, `verdict`, `error_code`) and, for an exception, `traceback`.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any, Final

FORMAT_VARIABLE: Final = "FWM_LOG_FORMAT"
#: Of a log record, where its call named them with `extra`.
_FIELDS: Final = ("run_id", "model_id", "uri", "verdict", "error_code")
#: What is the same for all lines of this process.
_process: dict[str, str] = {}


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_process,
        }
        values |= {name: str(value) for name in _FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)


def configure(text: str = "%(asctime)s %(levelname)s %(message)s") -> None:
    """Log to standard error from INFO on, as JSON if FWM_LOG_FORMAT says so, else as lines of this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json() else logging.Formatter(text))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def bind(**fields: str) -> None:
    """Put fields that all lines of this process have in common, such as its run_id, into their JSON."""
    _process.update(fields)


def as_json() -> bool:
    """Whether the environment asks for JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"
