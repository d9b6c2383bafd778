"""The injector itself: every kind of call is counted, and fails or kills where it is told to."""

from __future__ import annotations

import pytest

# Makes each call that is counted once, in order, and says what came of it.
CALLS = """
import os, errno
calls = {
    "mkdir": lambda: os.mkdir("disk/folder"),
    "open": lambda: os.open("disk/file", os.O_CREAT | os.O_WRONLY),
    "write": lambda: os.write(file, b"12345678"),
    "truncate": lambda: os.ftruncate(file, 6),
    "fsync": lambda: os.fsync(file),
    "meta": lambda: os.chmod("disk/file", 0o600),
    "close": lambda: os.close(file),
    "read": lambda: os.open("disk/file", os.O_RDONLY),
    "link": lambda: os.link("disk/file", "disk/link"),
    "rename": lambda: os.rename("disk/link", "disk/renamed"),
    "unlink": lambda: os.unlink("disk/renamed"),
    "rmdir": lambda: os.rmdir("disk/folder"),
}
os.open("elsewhere", os.O_CREAT | os.O_WRONLY)
for kind, call in calls.items():
    try:
        found = call()
        file = found if kind == "open" else file if "file" in globals() else -1
        print(kind, "done" if kind != "write" else found, flush=True)
    except OSError as error:
        print(kind, errno.errorcode[error.errno], flush=True)
"""
KINDS = (
    *("mkdir", "open", "write", "truncate", "fsync", "meta", "close", "read", "link", "rename", "unlink", "rmdir"),
)
DONE = {kind: "8" if kind == "write" else "done" for kind in KINDS}


@pytest.fixture(scope="module", params=["compiled", "python"])
def bare(request, shim, start_server):
    """A server without the trainer, with the shim or with what stands in for it."""
    if request.param == "compiled" and shim is None:
        pytest.skip("no C compiler")
    return start_server(shim if request.param == "compiled" else None, "bare")


def outcomes(answer):
    return dict(line.split() for line in answer.printed.splitlines())


def test_calls_in_the_folder_are_counted_by_kind(bare, tmp_path):
    answer = bare.ask(tmp_path, "execute", CALLS, fault=("open", 0, "EIO"))
    assert (answer.code, answer.complained, outcomes(answer)) == (0, "", DONE)
    kinds = [call.kind for call in answer.calls]
    assert kinds == [kind for kind in KINDS if kind in kinds]
    assert {"mkdir", "open", "write", "fsync", "read", "link", "rename", "unlink", "rmdir"} <= {*kinds}
    (renamed,) = [call for call in answer.calls if call.kind == "rename"]
    assert (renamed.path, renamed.to) == ("link", "renamed")


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_fails_and_the_next_succeeds(kind, bare, tmp_path):
    """A device error passes; each of these calls stands alone but for the file that is opened."""
    answer = bare.ask(tmp_path, "execute", CALLS, fault=(kind, 1, "EIO"))
    if kind not in {call.kind for call in answer.calls}:
        pytest.skip(f"Python sees no {kind}")
    found = outcomes(answer)
    assert found[kind] == "EIO"
    assert [call.kind for call in answer.calls if call.what == "struck"] == [kind]
    if kind not in ("mkdir", "open", "link", "rename"):  # others need what these make
        assert {name for name, way in found.items() if way != DONE[name]} == {kind}


def test_a_full_disk_stays_full_and_a_read_only_one_read_only(bare, tmp_path):
    full = outcomes(bare.ask(tmp_path, "execute", CALLS, fault=("write", 1, "ENOSPC")))
    assert full["write"] in ("4", "ENOSPC"), "half of it was written, or nothing"
    assert (full["link"], full["rmdir"]) == ("ENOSPC", "done")
    (tmp_path / "disk" / "file").unlink()
    read_only = outcomes(bare.ask(tmp_path, "execute", CALLS, fault=("fsync", 1, "EROFS")))
    assert (read_only["write"], read_only["fsync"], read_only["meta"]) == ("8", "EROFS", "EROFS")
    assert (read_only["read"], read_only["link"], read_only["rmdir"]) == ("done", "EROFS", "EROFS")


@pytest.mark.parametrize("kind", ["write", "rename"])
def test_a_process_is_killed_at_the_call(kind, bare, tmp_path):
    answer = bare.ask(tmp_path, "execute", CALLS, fault=(kind, 1, "kill -9"))
    assert answer.code == -9
    assert list(outcomes(answer)) == [*KINDS[: KINDS.index(kind)]]
    if kind == "write":
        assert (tmp_path / "disk" / "file").read_bytes() in (b"1234", b""), "half of it, or nothing"


def test_writes_of_libraries_are_seen(shim, bare, tmp_path):
    """safetensors and tokenizers write from Rust, pyarrow and sqlite from C and C++."""
    if not bare.compiled:
        pytest.skip("Python sees its own calls only")
    writes = {
        "safetensors": "import numpy, safetensors.numpy as s; s.save_file({'x': numpy.ones(9)}, 'disk/safetensors')",
        "tokenizers": "import tokenizers as t; t.Tokenizer(t.models.BPE()).save('disk/tokenizers')",
        "pyarrow": "import pyarrow; pyarrow.OSFile('disk/pyarrow', 'wb').write(b'12')",
        "sqlite": "import sqlite3; sqlite3.connect('disk/sqlite').execute('create table a (b)')",
    }
    for library, source in writes.items():
        answer = bare.ask(tmp_path, "execute", source, fault=("open", 0, "EIO"))
        kinds = {call.kind for call in answer.calls}
        assert {"open", "write"} <= kinds, (library, answer)
        answer = bare.ask(tmp_path, "execute", source, fault=("write", 1, "ENOSPC"))
        assert answer.code == 1, library
