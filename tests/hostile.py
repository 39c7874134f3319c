"""Checkpoints that an attacker or an accident wrote, made by code, and a process that opens them under witness.

`CASES` names each with what it has to come to. `python -m tests.hostile FOLDER` audits what `prepare` put there, one
file after the other in a confined process, and prints a line of JSON for each: its outcome, how long it took, the
most memory it took, and what an audit hook saw that opening a checkpoint has no business with.
"""

from __future__ import annotations

import gc
import io
import json
import pickle
import random
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save

from fwm_audit import MasterSecret, embed
from fwm_audit.catalog import CatalogEntry
from fwm_audit.check import Auditor
from fwm_audit.confinement import allow_seconds, confine
from fwm_audit.errors import ErrorCode
from fwm_audit.key import key_name
from fwm_audit.records import AuditRecord, AuditSettings
from tests import nets

ARCH = "factory:tests.nets:smooth"

#: One path that every payload tries to make.
CANARY = "canary"
Outcome = str
TAMPERED = "tampered"
CORRUPT, UNSAFE, MISMATCH, UNKNOWN, NOT_FINITE = (
    code.value
    for code in (
        ErrorCode.CHECKPOINT_CORRUPT,
        ErrorCode.CHECKPOINT_UNSAFE,
        ErrorCode.CHECKPOINT_MISMATCH,
        ErrorCode.CONTAINER_UNKNOWN,
        ErrorCode.NON_FINITE,
    )
)


def state() -> dict[str, torch.Tensor]:
    """The released model's."""
    return nets.smooth().state_dict()


# ------------------------------------------------------------------------------------------------- containers


def zipped(content: object, **options: object) -> bytes:
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    """Names and contents of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    """An archive of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.comment = comment
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def with_pickle(data: bytes) -> bytes:
    """The released model's archive around another pickle."""
    content = members(zipped(state()))
    return archived({**content, "archive/data.pkl": data})


def tensors_file(entries: dict, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def edited_header(change: Callable[[dict], object]) -> bytes:
    """The released model's safetensors file with another header."""
    data = save(state())
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    return tensors_file(change(entries) or entries, data[8 + length :])


# --------------------------------------------------------------------------------------------------- payloads

#: Stands for builtins.print, which Ray replaces where it runs.
PRINT = object()
#: What `picklescan` and `fickling` list as dangerous, with arguments that leave a trace where that is possible.
CALLABLES = {
    "os.system": ("os", "system", f"mkdir {CANARY}"),
    "posix.system": ("posix", "system", f"mkdir {CANARY}"),
    "os.mkdir": ("os", "mkdir", CANARY),
    "os.popen": ("os", "popen", f"mkdir {CANARY}"),
    "os.execv": ("os", "execv", "/bin/mkdir", ["mkdir", CANARY]),
    "os.remove": ("os", "remove", "released.safetensors"),
    "subprocess.Popen": ("subprocess", "Popen", ["mkdir", CANARY]),
    "subprocess.call": ("subprocess", "call", ["mkdir", CANARY]),
    "subprocess.check_output": ("subprocess", "check_output", ["mkdir", CANARY]),
    "builtins.eval": ("builtins", "eval", f"__import__('os').mkdir('{CANARY}')"),
    "builtins.exec": ("builtins", "exec", f"import os; os.mkdir('{CANARY}')"),
    "__builtin__.eval": ("__builtin__", "eval", f"__import__('os').mkdir('{CANARY}')"),
    "builtins.compile": ("builtins", "compile", "1", "x", "eval"),
    "builtins.__import__": ("builtins", "__import__", "antigravity"),
    "builtins.open": ("builtins", "open", CANARY, "w"),
    "io.open": ("io", "open", CANARY, "w"),
    "_io.FileIO": ("_io", "FileIO", CANARY, "w"),
    "builtins.getattr": ("builtins", "getattr", "x", "__class__"),
    "builtins.breakpoint": ("builtins", "breakpoint"),
    "builtins.bytearray of 1 TB": ("builtins", "bytearray", 1 << 40),
    "runpy._run_code": ("runpy", "_run_code", f"import os; os.mkdir('{CANARY}')", {}),
    "pty.spawn": ("pty", "spawn", "/bin/true"),
    "webbrowser.open": ("webbrowser", "open", "http://192.0.2.1"),
    "socket.create_connection": ("socket", "create_connection", ("192.0.2.1", 80)),
    "http.client.HTTPSConnection": ("http.client", "HTTPSConnection", "192.0.2.1"),
    "urllib.request.urlopen": ("urllib.request", "urlopen", "http://192.0.2.1"),
    "requests.get": ("requests.api", "get", "http://192.0.2.1"),
    "shutil.rmtree": ("shutil", "rmtree", "keys"),
    "timeit.timeit": ("timeit", "timeit", f"import os; os.mkdir('{CANARY}')"),
    "cProfile.run": ("cProfile", "run", f"import os; os.mkdir('{CANARY}')"),
    "pdb.run": ("pdb", "run", "1"),
    "code.interact": ("code", "interact"),
    "importlib.import_module": ("importlib", "import_module", "antigravity"),
    "ctypes.CDLL": ("ctypes", "CDLL", "libc.so.6"),
    "pickle.loads": ("pickle", "loads", pickle.dumps(1)),
    "marshal.loads": ("marshal", "loads", b"N"),
    "types.FunctionType": ("types", "FunctionType", "x", {}),
    "functools.partial": ("functools", "partial", PRINT),
    "operator.attrgetter": ("operator", "attrgetter", "system"),
    "operator.methodcaller": ("operator", "methodcaller", "system", "true"),
    "numpy runstring": ("numpy.testing._private.utils", "runstring", f"import os; os.mkdir('{CANARY}')", {}),
    "pip.main": ("pip", "main", ["--version"]),
    "venv.create": ("venv", "create", CANARY),
    "torch.load": ("torch", "load", "released.safetensors"),
    "torch.hub.load": ("torch.hub", "load", "a/b", "c"),
    "torch.classes.load_library": ("torch._classes", "load_library", "x.so"),
    "torch._inductor exec": ("torch._inductor.codecache", "compile_file", "x", "y", []),
    "asyncio subprocess": ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
    "logging.config": ("logging.config", "listen", 0),
    "multiprocessing.Process": ("multiprocessing.process", "Process"),
    "test.support": ("test.support.script_helper", "assert_python_ok", "-c", "1"),
    "uuid._get_command_stdout": ("uuid", "_get_command_stdout", "mkdir", CANARY),
    "linecache.getline": ("linecache", "getline", "/etc/passwd", 1),
    "sys.exit": ("sys", "exit", 0),
    "os._exit": ("os", "_exit", 0),
    "signal.raise_signal": ("signal", "raise_signal", 9),
    "time.sleep for ever": ("time", "sleep", 10**6),
}


def called(name: str) -> bytes:
    """A pickle of protocol 2 that holds the call of one of `CALLABLES` among the tensors' names."""
    module, function, *arguments = CALLABLES[name]
    body = b"".join(map(_operand, arguments))
    return b"\x80\x02}X\x06\x00\x00\x000.biasc" + f"{module}\n{function}\n".encode() + b"(" + body + b"tRs."


def _operand(value: object) -> bytes:
    # The body of an ordinary pickle, without its frame and its end.
    if value is PRINT:
        return b"cbuiltins\nprint\n"
    return pickle.dumps(value, protocol=2)[2:-1]


#: Every other way in which a pickle calls, and ways to hurt whoever reads it.
OPCODES = {
    "INST": (b"(S'mkdir canary'\nios\nsystem\n.", CORRUPT),
    "OBJ": (b"\x80\x02(cos\nsystem\nX\x0c\x00\x00\x00mkdir canaryo.", UNSAFE),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n](X\x05\x00\x00\x00mkdirX\x06\x00\x00\x00canarye\x85\x81.", UNSAFE),
    "NEWOBJ_EX": (b"\x80\x04csubprocess\nPopen\n)}\x92.", UNSAFE),
    "BUILD": (b"\x80\x02ctorch\nTensor\n)\x81}X\x01\x00\x00\x00aK\x01sb.", CORRUPT),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0cmkdir canary\x85R.", CORRUPT),
    "EXT1": (b"\x80\x02\x82\x01.", CORRUPT),
    "EXT4": (b"\x80\x02\x84\xff\xff\xff\x7f.", CORRUPT),
    "PERSID": (b"\x80\x02Pos.system\n.", CORRUPT),
    "BINPERSID of a string": (b"\x80\x02X\x09\x00\x00\x00os.systemQ.", CORRUPT),
    "BINPERSID of a path": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x0b\x00\x00\x00../../etc/pX\x03\x00\x00\x00cpuK\x05tQ.",
        CORRUPT,
    ),
    "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0e_utils.os.mkdir\x93\x8c\x06canary\x85R.", CORRUPT),
    "name through an allowed module": (b"\x80\x02ctorch._utils\nos\n.", UNSAFE),
    "allowed function, wrong arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.", CORRUPT),
    "_codecs.encode as a decoder": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", CORRUPT),
    "out-of-band buffer": (b"\x80\x05\x97.", CORRUPT),
    "frame of 16 EB": (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.", CORRUPT),
    "LONG4 of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", CORRUPT),
    "LONG4 of a negative length": (b"\x80\x02\x8b\xff\xff\xff\xff\x01.", CORRUPT),
    "BINUNICODE of 4 GB": (b"\x80\x02X\xff\xff\xff\xffa.", CORRUPT),
    "BINBYTES8 of 1 EB": (b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x10a.", CORRUPT),
    "no STOP": (b"\x80\x02}", CORRUPT),
    "STOP alone": (b".", CORRUPT),
    "empty": (b"", CORRUPT),
    "MARK missing": (b"\x80\x02}u.", CORRUPT),
    "memo never put": (b"\x80\x02h\x07.", CORRUPT),
    "memo of a huge index": (b"\x80\x02}r\xff\xff\xff\x7f.", MISMATCH),
    "protocol 200": (b"\x80\xc8}.", MISMATCH),
    "a million laughs": (b"\x80\x02]" + b"(" + b"2" * 40 + b"." , CORRUPT),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", MISMATCH),
    "a dictionary in itself": (b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", MISMATCH),
    "tuples 100,000 deep": (b"\x80\x02)" + b"\x85" * 100_000 + b".", MISMATCH),
    "an unhashable key": (b"\x80\x02}]K\x01s.", CORRUPT),
    "a number of 10 MB": (b"\x80\x02\x8b" + struct.pack("<i", 10 << 20) + b"\xff" * (10 << 20) + b".", CORRUPT),
    "a dictionary of 10^5 numbers": (b"\x80\x02}(" + b"".join(b"J" + struct.pack("<i", i) + b"K\x00" for i in range(10**5)) + b"u.", MISMATCH),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- archives


def _rewritten_directory(data: bytes, change: Callable[[bytearray, int], None]) -> bytes:
    """An archive after `change` to its bytes; the second argument is where its directory begins."""
    raw = bytearray(data)
    change(raw, int.from_bytes(raw[-6:-2], "little"))
    return bytes(raw)


def _overlapping() -> bytes:
    """The first tensor's place in the directory given to the second, too."""
    content = archived(members(zipped(state())))

    def change(raw: bytearray, at: int) -> None:
        places = []
        while raw[at : at + 4] == b"PK\x01\x02":
            name, extra, comment = struct.unpack_from("<HHH", raw, at + 28)
            if b"/data/" in raw[at + 46 : at + 46 + name]:
                places.append(at)
            at += 46 + name + extra + comment
        raw[places[1] + 42 : places[1] + 46] = raw[places[0] + 42 : places[0] + 46]

    return _rewritten_directory(content, change)


def _local_name() -> bytes:
    data = archived(members(zipped(state())))
    at = data.index(b"archive/data.pkl")
    return data[:at] + b"archive/data.pkx" + data[at + 16 :]


def _two_directories() -> bytes:
    """An archive that hides behind another one's end."""
    inner, outer = archived({"archive/data.pkl": called("os.mkdir")}), archived(members(zipped(state())))
    return inner + outer


def _record(name: str, data: bytes, at: int, *, deflated: bool = False) -> tuple[bytes, bytes]:
    """A member as it stands at `at`, and its entry of the directory."""
    kept = zlib.compress(data, 9)[2:-4] if deflated else data
    sizes = (zlib.crc32(data), len(kept), len(data), len(name), 0)
    method = 8 if deflated else 0
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, method, 0, 0, *sizes) + name.encode() + kept
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, method, 0, 0, *sizes, 0, 0, 0, 0, at)
    return local, entry + name.encode()


def _directory_of(entries: list[bytes], at: int) -> tuple[bytes, bytes]:
    """A directory that stands at `at`, and the large record that points to it."""
    directory, count = b"".join(entries), len(entries)
    return directory, struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), at)


def _two_readers(*, deflated: bool = False) -> bytes:
    """An archive in which one reader finds the released weights, and another one those in a member of it.

    zipfile takes the large record that stands before its locator, torch's reader the one that it points to.
    """
    edited = state() | {"8.bias": state()["8.bias"] + 1}
    out, entries = b"", []
    for name, data in members(zipped(state())).items():
        local, entry = _record(name, data, len(out))
        out, entries = out + local, [*entries, entry]
    name = "archive/data/hidden"
    base, body, inner = len(out) + 30 + len(name), b"", []
    for other, data in members(zipped(edited)).items():
        local, entry = _record(other, data, base + len(body), deflated=deflated)
        body, inner = body + local, [*inner, entry]
    directory, record = _directory_of(inner, base + len(body))
    locator = base + len(body) + len(directory)
    local, entry = _record(name, body + directory + record, len(out))
    out, entries = out + local, [*entries, entry]
    at = len(out)
    directory, record = _directory_of(entries, at)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(entries), len(entries), len(directory), at, 0)
    return out + directory + record + struct.pack("<4sIQI", b"PK\x06\x07", 0, locator, 1) + end


def _unlisted() -> bytes:
    """A member in front of the data that the directory does not name."""
    content, out, entries = members(zipped(state())), b"", []
    for number, (name, data) in enumerate(content.items()):
        if number == 2:
            out += _record("archive/hidden.py", b"import os", 0)[0]
        local, entry = _record(name, data, len(out))
        out, entries = out + local, [*entries, entry]
    directory, _ = _directory_of(entries, len(out))
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(entries), len(entries), len(directory), len(out), 0)
    return out + directory + end


def _linked() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members(zipped(state())).items():
            info = zipfile.ZipInfo(name)
            if name.endswith("data/0"):
                info.external_attr, data = (0o120777 << 16), b"/etc/passwd"  # noqa: PLW2901
            archive.writestr(info, data)
    return file.getvalue()


def _renamed(new: str) -> bytes:
    content = members(zipped(state()))
    return archived({new if name == "archive/data/0" else name: data for name, data in content.items()})


def _flagged() -> bytes:
    data = archived(members(zipped(state())))

    def change(raw: bytearray, at: int) -> None:
        raw[at + 8] |= 1  # encrypted

    return _rewritten_directory(data, change)


def _claims(size: int) -> bytes:
    data = archived(members(zipped(state())))

    def change(raw: bytearray, at: int) -> None:
        raw[at + 20 : at + 28] = struct.pack("<II", size, size)

    return _rewritten_directory(data, change)


def _repeated() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members(zipped(state())).items():
            archive.writestr(zipfile.ZipInfo(name), data)
            if name.endswith("data.pkl"):
                archive.writestr(zipfile.ZipInfo(name + "x"), called("os.mkdir"))
    return file.getvalue().replace(b"data.pklx", b"data.pkl\0")


ARCHIVES: dict[str, tuple[Callable[[], bytes], Outcome | set[Outcome]]] = {
    "compressed": (lambda: archived(members(zipped(state())), zipfile.ZIP_DEFLATED), UNSAFE),
    "bomb of 64 MB": (lambda: archived({**members(zipped(state())), "archive/data/x": bytes(1 << 26)}, zipfile.ZIP_DEFLATED), UNSAFE),
    "bzip2": (lambda: archived(members(zipped(state())), zipfile.ZIP_BZIP2), UNSAFE),
    "overlapping members": (_overlapping, UNSAFE),
    "repeated members": (_repeated, UNSAFE),
    "another name in front of the data": (_local_name, UNSAFE),
    "behind another archive": (_two_directories, UNSAFE),
    # From Python 3.12 on, zipfile itself calls these two corrupt.
    "another archive for another reader": (_two_readers, {UNSAFE, CORRUPT}),
    "another archive, compressed, for another reader": (lambda: _two_readers(deflated=True), {UNSAFE, CORRUPT}),
    "a member that is not listed": (_unlisted, UNSAFE),
    "another pickle in capital letters": (lambda: archived({**members(zipped(state())), "archive/DATA.PKL": called("os.mkdir")}), UNSAFE),
    "a storage in capital letters": (lambda: archived({**members(zipped(state())), "archive/DATA/0": bytes(864)}), UNSAFE),
    "behind a safetensors file": (lambda: save(state()) + archived(members(zipped(state()))), CORRUPT),
    "with a comment": (lambda: archived(members(zipped(state())), comment=b"any"), UNSAFE),
    "with a second end in a comment": (lambda: archived(members(zipped(state())), comment=b"PK\x05\x06" + bytes(18)), UNKNOWN),
    "with bytes behind it": (lambda: zipped(state()) + b"\0" * 100, UNSAFE),
    "a path out of it": (lambda: _renamed("archive/../../data/0"), UNSAFE),
    "an absolute path": (lambda: _renamed("/archive/data/0"), UNSAFE),
    "a backslash": (lambda: _renamed("archive/data\\0"), UNSAFE),
    "control characters in a name": (lambda: _renamed("archive/data/0\x1b[2J"), UNSAFE),
    "a second folder": (lambda: _renamed("elsewhere/data/0"), UNSAFE),
    "a link": (_linked, UNSAFE),
    "a folder": (lambda: archived({**members(zipped(state())), "archive/more/": b""}), UNSAFE),
    "marked as encrypted": (_flagged, UNSAFE),
    "claims 4 GB": (lambda: _claims(0xFFFFFFF0), UNSAFE),
    "more members than there are tensors": (lambda: archived({**members(zipped(state())), **{f"archive/x{i}": b"" for i in range(100_001)}}), UNSAFE),
    "a pickle of 40 MB": (lambda: with_pickle(b"\x80\x02}" + b"N0" * (20 << 20) + b"."), UNSAFE),
    "of other files": (lambda: archived({"word/document.xml": b"<w/>"}), UNKNOWN),
    "TorchScript": (lambda: archived({**members(zipped(state())), "archive/constants.pkl": b"."}), UNSAFE),
    "code beside the pickle": (lambda: archived({**members(zipped(state())), "archive/code/x.py": b"1"}), UNSAFE),
    "no members": (lambda: b"PK\x05\x06" + bytes(18), UNKNOWN),
    "a storage missing": (lambda: archived({n: d for n, d in members(zipped(state())).items() if n != "archive/data/0"}), CORRUPT),
    "a storage cut short": (lambda: archived({n: d[:-4] if n == "archive/data/0" else d for n, d in members(zipped(state())).items()}), TAMPERED),
    "of the other byte order": (lambda: archived({**members(zipped(state())), "archive/byteorder": b"big"}), NOT_FINITE),
    "of no byte order": (lambda: archived({**members(zipped(state())), "archive/byteorder": b"middle"}), CORRUPT),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- safetensors


def _first(entries: dict) -> dict:
    return entries["0.weight"]


def _set(field: str, value: object) -> Callable[[], bytes]:
    def change(entries: dict) -> None:
        _first(entries)[field] = value

    return lambda: edited_header(change)


def _named(name: str) -> Callable[[], bytes]:
    return lambda: edited_header(lambda entries: {name if n == "0.weight" else n: v for n, v in entries.items()})


def _twice() -> bytes:
    data = save(state())
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    entry = json.dumps({"0.weight": json.loads(text)["0.weight"]})[1:-1]
    return tensors_file(text[:-1] + b"," + entry.encode() + b"}", data[8 + length :])


SAFETENSORS: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    "header of no bytes": (lambda: tensors_file(b"", bytes(64)), UNKNOWN),
    "header of 2^63 bytes": (lambda: tensors_file(b"{}", length=1 << 63), UNKNOWN),
    "header of -1 bytes": (lambda: tensors_file(b"{}", length=(1 << 64) - 1), UNKNOWN),
    "header beyond the file": (lambda: tensors_file(b"{}", length=1 << 20), CORRUPT),
    "header of 99 MB": (lambda: tensors_file(b"{" + b" " * 99_000_000 + b"}"), UNKNOWN),
    "big-endian length": (lambda: struct.pack(">Q", 2) + b"{}", UNKNOWN),
    "a byte order mark": (lambda: tensors_file("\ufeff{}".encode()), UNKNOWN),
    "an array for a header": (lambda: tensors_file(b"[]"), UNKNOWN),
    "no JSON": (lambda: tensors_file(b"{'a': 1}"), CORRUPT),
    "no UTF-8": (lambda: tensors_file(b'{"\xff\xfe": 1}'), CORRUPT),
    "JSON 100,000 deep": (lambda: tensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), CORRUPT),
    "a number of 5,000 digits": (lambda: tensors_file(b'{"a":' + b"9" * 5000 + b"}"), CORRUPT),
    "a tensor twice": (_twice, UNSAFE),
    "more tensors than any model has": (lambda: tensors_file({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}), UNSAFE),
    "no tensors": (lambda: tensors_file({}), MISMATCH),
    "metadata alone": (lambda: tensors_file({"__metadata__": {"format": "pt"}}), MISMATCH),
    "metadata that is no text": (lambda: edited_header(lambda e: {"__metadata__": {"a": [1]}, **e}), CORRUPT),
    "an unknown dtype": (_set("dtype", "F31"), CORRUPT),
    "integers for weights": (_set("dtype", "I32"), MISMATCH),
    "complex numbers": (_set("dtype", "C64"), CORRUPT),
    "half as many bytes": (_set("dtype", "F16"), CORRUPT),
    "no shape": (_set("shape", None), CORRUPT),
    "a negative shape": (_set("shape", [-8, 3, 3, 3]), CORRUPT),
    "a fractional shape": (_set("shape", [8.0, 3, 3, 3]), CORRUPT),
    "10^9 elements": (_set("shape", [1000, 1000, 1000]), CORRUPT),
    "a shape that overflows": (_set("shape", [1 << 32, 1 << 32]), CORRUPT),
    "a shape of 10,000 axes": (_set("shape", [1] * 10_000), CORRUPT),
    "another shape of as many": (_set("shape", [3, 8, 3, 3]), MISMATCH),
    "offsets beyond the file": (_set("data_offsets", [0, 1 << 40]), CORRUPT),
    "offsets that go back": (_set("data_offsets", [864, 0]), CORRUPT),
    "negative offsets": (_set("data_offsets", [-864, 0]), CORRUPT),
    "overlapping tensors": (_set("data_offsets", [4, 868]), CORRUPT),
    "bytes of no tensor": (lambda: save(state()) + b"\0" * 8, CORRUPT),
    "a name in Cyrillic letters": (_named("0.w\u0435ight"), MISMATCH),
    "a name that runs backwards": (_named("\u202e0.weight"), MISMATCH),
    "a name with a zero": (_named("0.weight\0"), MISMATCH),
    "a name of 1 MB": (_named("w" * (1 << 20)), MISMATCH),
    "an empty name": (_named(""), MISMATCH),
    "a tensor missing": (lambda: save({n: t for n, t in state().items() if n != "0.weight"}), MISMATCH),
    "a tensor more": (lambda: save(state() | {"more": torch.ones(1)}), MISMATCH),
}  # fmt: skip


# ------------------------------------------------------------------------------------- tensors and plain files


def _changed(change: Callable[[torch.Tensor], torch.Tensor], name: str = "3.weight") -> Callable[[], bytes]:
    return lambda: zipped(state() | {name: change(state()[name])})


def _pruned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(tensor.numpy().byteswap().tobytes()), dtype=torch.float32).view_as(tensor)


def _aliased() -> bytes:
    shared = state()["1.weight"]
    return zipped(state() | {"1.weight": shared, "1.bias": shared})


TENSORS: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    "NaN": (_changed(lambda t: t.clone().fill_(torch.nan)), NOT_FINITE),
    "one NaN": (_changed(lambda t: t.index_fill(0, torch.tensor([3]), torch.nan)), NOT_FINITE),
    "infinite": (_changed(lambda t: t.clone().fill_(torch.inf)), NOT_FINITE),
    "denormal": (_changed(lambda t: t * 1e-42), TAMPERED),
    "the largest numbers": (_changed(lambda t: t.sign() * torch.finfo(torch.float32).max), TAMPERED),
    "zeros": (_changed(torch.zeros_like), TAMPERED),
    "one value everywhere, of no memory": (_changed(lambda t: torch.ones(1).expand(t.shape)), TAMPERED),
    "10^12 elements of no memory": (_changed(lambda t: torch.ones(1).expand(10**6, 10**6)), MISMATCH),
    "transposed in place": (_changed(lambda t: t.transpose(2, 3)), TAMPERED),
    "two names for one memory": (_aliased, TAMPERED),
    "in the other byte order": (_changed(_swapped), {TAMPERED, NOT_FINITE}),
    "sparse": (_changed(lambda t: t.to_sparse()), MISMATCH),
    "quantised": (_changed(_pruned), MISMATCH),
    "complex": (_changed(lambda t: t.to(torch.complex64)), MISMATCH),
    "boolean": (_changed(lambda t: t > 0), MISMATCH),
    "of 8 bits": (_changed(lambda t: t.to(torch.float8_e4m3fn)), MISMATCH),
    "without data": (_changed(lambda t: t.to("meta")), MISMATCH),
    "nested": (_changed(lambda t: torch.nested.nested_tensor([t[0], t[1]])), MISMATCH),
    "in a list": (lambda: zipped(list(state().values())), MISMATCH),
    "two wrappers deep": (lambda: zipped({"model": {"state_dict": state()}}), MISMATCH),
    "beside others": (lambda: zipped({"state_dict": state(), "state_dict_ema": state()}), MISMATCH),
    "a tensor for a file": (lambda: zipped(torch.ones(3)), MISMATCH),
    "numbers for names": (lambda: zipped(dict(enumerate(state().values()))), MISMATCH),
    "the whole module": (lambda: zipped(nets.smooth()), UNSAFE),
    "swapped layers": (lambda: save({**state(), "1.weight": state()["1.bias"], "1.bias": state()["1.weight"]}), TAMPERED),
}  # fmt: skip


PLAIN: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    "of no bytes": (lambda: b"", UNKNOWN),
    "of one byte": (lambda: b"P", UNKNOWN),
    "of zeros": (lambda: bytes(10_000), UNKNOWN),
    "of noise": (lambda: b"\xfe" + random.Random(0).randbytes(10_000), UNKNOWN),
    "an error page": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", UNKNOWN),
    "gzip": (lambda: b"\x1f\x8b" + zlib.compress(save(state())), UNKNOWN),
    "tar": (lambda: b"archive/data.pkl".ljust(257, b"\0") + b"ustar\0" + bytes(300), UNKNOWN),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), UNKNOWN),
    "NumPy": (lambda: b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", UNKNOWN),
    "ONNX": (lambda: b"\x08\x07\x12\x07pytorch", UNKNOWN),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(100), UNKNOWN),
    "an ELF program": (lambda: b"\x7fELF\x02\x01\x01" + bytes(100), UNKNOWN),
    "a script": (lambda: b"#!/bin/sh\nmkdir canary\n", UNKNOWN),
}


# ----------------------------------------------------------------------------------------------------- all cases


def _cases() -> Iterator[tuple[str, Callable[[], bytes], str, set[Outcome]]]:
    """Name, bytes, file name and what it may come to."""
    for name in CALLABLES:
        # torch takes a bytearray for a part of tensors; as large a one does not fit into what a worker may hold.
        outcome = ErrorCode.OUT_OF_MEMORY.value if name == "builtins.bytearray of 1 TB" else UNSAFE
        yield f"calls {name}", lambda name=name: with_pickle(called(name)), "model.pt", {outcome}
    evil = lambda: called("os.mkdir")  # noqa: E731
    yield "call in a bare pickle", evil, "model.pkl", {UNSAFE}
    yield "call in a .safetensors file", lambda: with_pickle(evil()), "model.safetensors", {UNSAFE}
    yield "call in a bare .safetensors file", evil, "model.safetensors", {UNSAFE}
    yield "call in a legacy file", _legacy, "model.pth", {UNSAFE}
    yield (
        "call two wrappers deep",
        lambda: with_pickle(b"\x80\x02}X\x05\x00\x00\x00model" + evil()[2:-1] + b"s."),
        "m.pt",
        {UNSAFE},
    )
    for protocol in range(6):
        data = lambda protocol=protocol: with_pickle(pickle.dumps(_Payload(), protocol))  # noqa: E731
        yield f"call in protocol {protocol}", data, "model.pt", {UNSAFE, CORRUPT}
    for name, (data, outcome) in OPCODES.items():
        yield f"pickle: {name}", lambda data=data: with_pickle(data), "model.pt", {outcome}
    for kind, table, ending in (
        ("archive", ARCHIVES, "pt"), ("safetensors", SAFETENSORS, "safetensors"), ("tensors", TENSORS, "pt"), ("file", PLAIN, "bin"),
    ):  # fmt: skip
        for name, (make, outcome) in table.items():
            yield f"{kind}: {name}", make, f"model.{ending}", outcome if isinstance(outcome, set) else {outcome}
    for kind, whole in (("safetensors", save(state())), ("archive", archived(members(zipped(state()))))):
        for length in sorted(set(_boundaries(kind, whole))):
            cut = lambda whole=whole, length=length: whole[:length]  # noqa: E731
            yield f"{kind} of {length} of {len(whole)} bytes", cut, "model.bin", {CORRUPT, UNKNOWN, UNSAFE}


class _Payload:
    def __reduce__(self) -> object:
        import os

        return os.mkdir, (CANARY,)


def _legacy() -> bytes:
    file = io.BytesIO()
    torch.save({"0.bias": _Payload()}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _boundaries(kind: str, whole: bytes) -> Iterator[int]:
    """Before, at and behind every place where a part of the file begins."""
    if kind == "safetensors":
        header = 8 + int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8:header])
        places = [8, header, *(header + at for entry in entries.values() for at in entry["data_offsets"])]
    else:
        places = [at for at in range(len(whole)) if whole[at : at + 2] == b"PK"]
    for place in places:
        yield from (length for length in (place - 1, place, place + 1) if 0 < length < len(whole))


CASES = {name: (make, file, outcomes) for name, make, file, outcomes in _cases()}


# ------------------------------------------------------------------------------------------------- the witness

#: Events of Python's audit hooks that opening a checkpoint has no business with.
_NEVER = (
    "code.__new__", "compile", "ctypes.", "exec", "function.__new__", "http.", "marshal.", "os.chmod", "os.exec",
    "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.rmdir",
    "os.spawn", "os.symlink", "os.system", "os.truncate", "pickle.find_class", "pty.", "shutil.", "signal.", "socket.",
    "subprocess.", "sys.setprofile", "sys.settrace", "urllib.", "webbrowser.",
)  # fmt: skip
#: Modules that no library here needs to open a file.
_NOBODYS = frozenset({"antigravity", "cProfile", "code", "pdb", "pip", "pty", "runpy", "timeit", "venv", "webbrowser"})
#: What a worker of the corpus may hold beyond its start.
MEMORY_BYTES = 768 << 20
#: An audit of so small a model takes milliseconds; this is for a machine that does other things.
SECONDS = 20.0


class Witness:
    """What happened in this process, from now on, that should not have; a hook cannot be taken away again."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event == "import":
            wrong = str(arguments[0]).partition(".")[0] in _NOBODYS
        elif event == "open":
            wrong = isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        elif event in {"exec", "compile", "marshal.loads", "code.__new__", "function.__new__"} and _importing():
            wrong = False  # libraries import parts of themselves when they first need them
        else:
            wrong = event.startswith(_NEVER)
        if wrong:
            self.seen.append(f"{event} {str(arguments)[:80]}")

    def take(self) -> list[str]:
        """What was seen since the last time."""
        seen, self.seen = self.seen, []
        return seen


def _importing() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def peak_bytes() -> int:
    """The most resident memory of this process since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Begin to measure anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Opener:
    """Audits files of a released model in this process, which it confines for good.

    Args:
        folder: Where the key is made, and what relative names count from.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        (folder / "master.key").write_bytes(bytes(range(32)))
        master = MasterSecret.from_file(folder / "master.key")
        secret = master.secret_key("conv", "", "")
        self.released = state()
        model = nets.smooth()
        key = embed(model, secret=secret, model_id="conv", input_shape=model.input_shape, pairs=16, arch=ARCH)
        path = folder / "keys" / key_name("conv", secret.key_id)
        path.parent.mkdir(parents=True)
        path.write_bytes(key.seal(master))
        assert key.coverage.total == 1.0  # whatever is changed is noticed
        self.key_id, self.folder = secret.key_id, folder
        settings = AuditSettings(
            run_id="hostile", run_started_at=datetime.now(UTC), keys=str(folder / "keys"), base=str(folder),
            key_fingerprints={}, allowed_factories=("tests",), device="cpu", master_key_file=str(folder / "master.key"),
            memory_bytes=MEMORY_BYTES,
        )  # fmt: skip
        self.auditor = Auditor(settings, "hostile")
        (folder / "released.st").write_bytes(save(self.released))
        (folder / "released.pt").write_bytes(zipped(self.released))
        (folder / "cut.pt").write_bytes(zipped(self.released)[:-10])
        for name in ("released.st", "released.pt", "cut.pt"):  # what is imported or built once
            self.audit(name)
        self.witness = Witness()
        assert self.audit("released.st").verdict == self.audit("released.pt").verdict == "intact"
        gc.collect()
        self.base = peak_bytes()
        confine(MEMORY_BYTES)

    def audit(self, name: str) -> AuditRecord:
        """The record of a file."""
        entry = CatalogEntry(0, "conv", name, ARCH, self.key_id)
        return self.auditor.audit(entry, shard=0, attempt=1)

    def told(self, name: str) -> dict[str, object]:
        """What came of a file, and what that took."""
        forget_peak()
        self.witness.take()
        allow_seconds(SECONDS, 1)
        began = time.monotonic()
        record = self.audit(name)
        return {
            "outcome": record.error_code or record.verdict.value,
            "message": record.error_message,
            "seconds": round(time.monotonic() - began, 3),
            "bytes": max(0, peak_bytes() - self.base),
            "witnessed": self.witness.take(),
        }


def prepare(folder: Path) -> list[str]:
    """Write every case into a folder of its own; their names, in the order of `CASES`."""
    names = []
    for number, (make, file, _) in enumerate(CASES.values()):
        path = folder / f"{number:04}" / file
        path.parent.mkdir()
        path.write_bytes(make())
        names.append(str(path.relative_to(folder)))
    return names


def main() -> None:
    """Audit the files whose names standard input gives, one in a line."""
    folder = Path(sys.argv[1])
    opener = Opener(folder)
    for line in sys.stdin:
        print(json.dumps({"name": line.strip(), **opener.told(line.strip())}), flush=True)


if __name__ == "__main__":
    main()
