"""The summary reaches whoever is to know, and nothing about the way there changes what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fwm_audit import webhook
from fwm_audit.errors import UsageError
from fwm_audit.webhook import read_url, send
from jobs import _cli


@contextmanager
def receiver(*answers, then=200):
    """A real server: its URL, and what it was sent; it gives these answers, and `then` from there on."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            code = answers[len(seen) - 1] if len(seen) <= len(answers) else then
            if code is None:  # never answers
                time.sleep(3)
                return
            if isinstance(code, str):
                self.send_response(307)
                self.send_header("Location", code)
            else:
                self.send_response(code)
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - the server's name for it

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook/secret-part", seen
    finally:
        server.shutdown()
        server.server_close()


SUMMARY = {"run_id": "night", "complete": True, "tampered": 1}


def test_the_summary_is_posted_once():
    with receiver() as (url, seen):
        assert send(url, SUMMARY)
    assert [(path, json.loads(body)) for path, body in seen] == [("/hook/secret-part", SUMMARY)]


def test_a_receiver_that_is_busy_is_asked_again_and_one_that_refuses_is_not(caplog):
    with receiver(503, 429) as (url, seen):
        assert send(url, SUMMARY)
    assert len(seen) == 3
    with receiver(then=503) as (url, seen):
        assert not send(url, SUMMARY)
    assert len(seen) == 3  # bounded
    with receiver(then=404) as (url, seen):
        assert not send(url, SUMMARY)
    assert len(seen) == 1
    assert "404" in caplog.text
    assert "secret-part" not in caplog.text


def test_redirections_are_not_followed():
    with receiver() as (elsewhere, stolen), receiver(then=elsewhere) as (url, seen):
        assert not send(url, SUMMARY)
    assert (len(seen), stolen) == (1, [])


def test_a_receiver_that_never_answers_costs_little_and_nobody_there_too(monkeypatch, caplog):
    monkeypatch.setattr(webhook, "_PATIENCE_S", 1.0)
    with receiver(then=None) as (url, seen):
        began = time.monotonic()
        assert not send(url, SUMMARY)
        assert time.monotonic() - began < 2
    assert not send("http://127.0.0.1:9/secret-part", SUMMARY)
    assert len(seen) == 1
    assert "secret-part" not in caplog.text


@pytest.mark.parametrize("text", ["", "file:///etc/passwd", "ftp://host/x", "https://", "http://a b/", "no-url"])
def test_a_file_without_a_usable_url_is_told_before_anything_is_done(tmp_path, text):
    (tmp_path / "url").write_text(text)
    with pytest.raises(UsageError, match="--webhook"):
        read_url(tmp_path / "url")


def test_a_url_is_read_and_a_missing_file_told(tmp_path):
    (tmp_path / "url").write_text(" https://chat.example.com/hook/x\n")
    assert read_url(tmp_path / "url") == "https://chat.example.com/hook/x"
    with pytest.raises(UsageError, match="cannot read"):
        read_url(tmp_path / "none")


CLOSE = """
import sys, typer
from jobs import _cli
app = typer.Typer()
@app.command()
def close(url: str):
    _cli.emit(url, run_id="night", tampered=1)
    raise typer.Exit(_cli.EXIT_TAMPERED)
_cli.run(app)
"""


@pytest.mark.parametrize("answer", [200, 404])
def test_the_closing_line_and_the_exit_code_stand_whatever_the_receiver_says(answer):
    with receiver(then=answer) as (url, seen):
        done = subprocess.run([sys.executable, "-c", CLOSE, url], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"run_id": "night", "tampered": 1} == json.loads(seen[0][1])
    assert "secret-part" not in done.stdout + done.stderr


def test_an_interrupted_wait_for_the_receiver_leaves_the_exit_code(monkeypatch):
    """Ctrl-C while the receiver is slow: typer's exit code for it would mean "tampered" of an intact run."""
    monkeypatch.setattr(threading.Thread, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with receiver() as (url, _):
        assert not send(url, SUMMARY)
        monkeypatch.undo()


# ------------------------------------------------------------------------------------------------ logs

LOG = """
import logging
from fwm_audit import logs
logs.bind(run_id="night")
logs.configure()
log = logging.getLogger("x")
log.warning("tampered: %s", "m\\nn", extra={"model_id": "m", "uri": "s3://b/m", "verdict": "tampered", "other": 1})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("a bug")
"""


def test_json_lines_have_what_a_search_goes_by():
    told = subprocess.run(
        [sys.executable, "-c", LOG],
        env=os.environ | {"FWM_LOG_FORMAT": "json"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    first, second = map(json.loads, told.splitlines())
    assert first | {"time": ""} == {
        "time": "",
        "level": "WARNING",
        "logger": "x",
        "message": "tampered: m\nn",
        "run_id": "night",
        "model_id": "m",
        "uri": "s3://b/m",
        "verdict": "tampered",
    }
    assert first["time"].endswith("+00:00")
    assert "ZeroDivisionError" in second["traceback"]


def test_without_the_variable_lines_are_text():
    environment = {name: value for name, value in os.environ.items() if name != "FWM_LOG_FORMAT"}
    told = subprocess.run(
        [sys.executable, "-c", LOG], env=environment, capture_output=True, text=True, check=True
    ).stderr
    assert "WARNING tampered: m" in told
    assert not told.startswith("{")


def test_usage_errors_are_json_too():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.audit", "--catalog", "none.csv", "--keys", "k", "--out", "o"],
        env=os.environ | {"FWM_LOG_FORMAT": "json"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == _cli.EXIT_USAGE
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["level"], "none.csv" in last["message"]) == ("ERROR", True)
