"""Limits that the system enforces: what a worker may hold, how long it computes, and what a crash leaves behind."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

import pytest

from fwm_audit import confinement
from fwm_audit.confinement import share_of_memory


def limited(code):
    """A process that runs this after the imports."""
    start = "import resource\nfrom fwm_audit.confinement import allow_seconds, confine\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, check=False, timeout=120
    )


def test_memory_above_the_limit_is_an_error_that_can_be_told():
    """In Python, in torch, and in a model that is audited; below the limit nothing changes."""
    done = limited("""
import torch
from fwm_audit.verification import ask
held = torch.zeros(32 << 20, dtype=torch.uint8)
confine(256 << 20)
fine = bytearray(128 << 20)
del fine
try:
    bytearray(512 << 20)
except MemoryError:
    print("python")
try:
    torch.zeros(512 << 20, dtype=torch.uint8)
except RuntimeError:
    print("torch")
try:
    ask(lambda batch: torch.zeros(512 << 20, dtype=torch.uint8), torch.ones(1, 1))
except MemoryError:
    print("model")
print(resource.getrlimit(resource.RLIMIT_CORE))
""")
    assert done.stdout.split("\n") == ["python", "torch", "model", "(0, 0)", ""], done.stderr


def test_what_computes_for_too_long_is_ended():
    done = limited("""
from fwm_audit import confinement
confinement._GRACE_S = 0.0
allow_seconds(0.5, 1)
print("began", flush=True)
while True:
    pass
""")
    assert (done.stdout, done.returncode) == ("began\n", -signal.SIGXCPU)


def test_each_audit_has_its_own_time():
    done = limited("""
from fwm_audit import confinement
import time
confinement._GRACE_S = 0.0
for _ in range(4):
    allow_seconds(2.0, 1)
    began = time.process_time()
    while time.process_time() - began < 1.0:
        pass
print("fine")
""")
    assert (done.stdout, done.returncode) == ("fine\n", 0)


def test_a_limit_from_outside_is_kept():
    code = "confine(1 << 40)\nprint(resource.getrlimit(resource.RLIMIT_DATA))\n"
    outside = 8 << 30
    done = subprocess.run(
        [sys.executable, "-c", "import resource\nfrom fwm_audit.confinement import confine\n" + code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (outside, outside)),
    )
    assert done.stdout == f"({outside}, {outside})\n"


@pytest.mark.parametrize(("text", "share", "expected"), [("8589934592", 0.5, 2 << 30), ("1", 1.0, 1 << 30)])
def test_a_share_of_a_container_is_told_by_its_limit(tmp_path, monkeypatch, text, share, expected):
    (tmp_path / "memory.max").write_text(text + "\n")
    monkeypatch.setattr(confinement, "_CGROUPS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    assert share_of_memory(share) == expected


def test_without_a_limit_it_is_a_share_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(confinement, "_CGROUPS", (str(tmp_path / "memory.max"),))
    total = next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("MemTotal"))  # noqa: PTH123, SIM115
    assert share_of_memory(1.0) == total // 2
