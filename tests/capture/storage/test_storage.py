"""Guarantees of a storage, the same in a folder, in memory and behind an S3 API."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from clt.capture.storage import local
from clt.capture.storage.base import PARTIAL_SUFFIX, Storage
from clt.capture.storage.local import LocalStorage
from clt.capture.storage.open_storage import open_storage
from clt.errors import StoreError

from .s3_server import S3Server, s3_server

#: More than an object store holds in memory, and not a multiple of its parts.
LARGE = np.random.default_rng(0).integers(0, 256, 17 * (1 << 20) + 12345, dtype=np.uint8)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    pytest.importorskip("moto", reason="needs moto[s3,server]")
    with s3_server() as running:
        yield running


@pytest.fixture(params=["folder", "memory", "obstore-folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """An empty storage of each kind."""
    if request.param == "folder":
        yield LocalStorage(tmp_path / "store")
        return
    pytest.importorskip("obstore", reason="needs the extra 'remote'")
    from clt.capture.storage.object_store import ObjectStorage, forget_memory

    name = uuid.uuid4().hex
    if request.param == "memory":
        yield open_storage(f"memory://{name}")
        forget_memory(name)
    elif request.param == "obstore-folder":
        yield ObjectStorage(f"file://{tmp_path}/store")
    else:
        running: S3Server = request.getfixturevalue("server")
        for variable, value in running.environment.items():
            monkeypatch.setenv(variable, value)
        yield open_storage(f"s3://{running.bucket}/{name}")


def _keys(storage: Storage) -> list[str]:
    return [entry.key for entry in storage.list("")]


def _upload(storage: Storage, key: str, data: np.ndarray) -> bool:
    with storage.create(key) as upload:
        for piece in np.array_split(data, 7):
            upload.write([piece[:10], piece[10:]])
        return upload.publish()


def test_put_creates_and_never_overwrites(storage: Storage) -> None:
    assert storage.put("units/commits/000001.json", b"first")
    assert not storage.put("units/commits/000001.json", b"second")
    assert storage.read("units/commits/000001.json") == b"first"
    assert storage.size("units/commits/000001.json") == 5
    assert _keys(storage) == ["units/commits/000001.json"]


def test_replace_overwrites_or_creates(storage: Storage) -> None:
    storage.replace("lease.json", b"one")
    storage.read_into("lease.json", 0, [bytearray(3)])
    storage.replace("lease.json", b"three")
    found = bytearray(5)
    storage.read_into("lease.json", 0, [found])
    assert storage.read("lease.json") == bytes(found) == b"three"
    assert _keys(storage) == ["lease.json"]


def test_list_names_all_files_below_a_folder_in_order(storage: Storage) -> None:
    for key in ("b/2", "b/10/x", "b/1", "ab", f"b/.1.{'0' * 32}{PARTIAL_SUFFIX}"):
        storage.put(key, key.encode())
    entries = storage.list("b/")
    assert [entry.key for entry in entries] == [f"b/.1.{'0' * 32}.partial", "b/1", "b/10/x", "b/2"]
    assert [entry.bytes for entry in entries] == [len(entry.key) for entry in entries]
    # Clocks of file systems and servers have a coarse resolution.
    assert all(abs(entry.modified - time.time()) < 60 for entry in entries)
    assert [entry.key for entry in storage.list("")] == sorted(["ab", *(entry.key for entry in entries)])
    assert storage.list("nothing/here/") == []


def test_delete_removes_and_a_missing_file_is_fine(storage: Storage) -> None:
    storage.put("a/b", b"1")
    storage.delete("a/b")
    storage.delete("a/b")
    assert storage.size("a/b") is None and _keys(storage) == []


def test_recreated_file_is_read_afresh(storage: Storage) -> None:
    found = bytearray(3)
    for data in (b"one", b"two"):
        assert storage.put("a", data)
        storage.read_into("a", 0, [found])
        assert found == data
        storage.delete("a")


def test_move_renames(storage: Storage) -> None:
    storage.put("data/c/0", b"bad bytes")
    storage.read_into("data/c/0", 0, [bytearray(1)])
    storage.move("data/c/0", "quarantine/data/c/0")
    assert _keys(storage) == ["quarantine/data/c/0"]
    assert storage.put("data/c/0", b"good bytes")
    found = bytearray(10)
    storage.read_into("data/c/0", 0, [found])
    assert found == b"good bytes"
    with pytest.raises(StoreError, match=r"nowhere: missing from the store"):
        storage.move("nowhere", "elsewhere")


@pytest.mark.parametrize("count", [1, 2500], ids=["one-buffer", "more-buffers-than-one-call-takes"])
def test_read_into_scatters_consecutive_bytes(storage: Storage, count: int) -> None:
    data = LARGE[:200_000]
    storage.put("f", data.tobytes())
    sizes = np.random.default_rng(count).integers(0, 60, count)
    for offset in (0, 1, 4097):
        buffers = [np.full((size, 1, 2), -1, np.int8) for size in sizes]
        storage.read_into("f", offset, buffers)
        found = np.concatenate([buffer.reshape(-1) for buffer in buffers]).view(np.uint8)
        np.testing.assert_array_equal(found, data[offset : offset + len(found)])


def test_read_into_fills_up_to_the_last_byte(storage: Storage) -> None:
    storage.put("f", b"0123456789")
    found = [bytearray(4), bytearray(1)]
    storage.read_into("f", 5, found)
    assert found == [b"5678", b"9"]


@pytest.mark.parametrize("offset", [0, 6, 10, 11], ids=["past-end", "across-end", "at-end", "beyond-end"])
def test_read_past_the_end_names_file_and_sizes(storage: Storage, offset: int) -> None:
    storage.put("f", b"0123456789")
    name = storage.name("f")
    with pytest.raises(StoreError) as caught:
        storage.read_into("f", offset, [bytearray(3), bytearray(8)])
    expected = f"{name}: has 10 bytes, at least {offset + 11} expected; restore it or capture again"
    assert str(caught.value) == expected


def test_missing_file_is_named(storage: Storage) -> None:
    assert storage.size("units/x") is None
    attempts: list[Callable[[], object]] = [
        lambda: storage.read("units/x"),
        lambda: storage.read_into("units/x", 0, [bytearray(1)]),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError) as caught:
            attempt()
        assert str(caught.value) == f"{storage.url}/units/x: missing from the store; restore it or capture again"


def test_large_upload_is_published_once_and_read_in_parts(storage: Storage) -> None:
    assert _upload(storage, "acts/c/0/0", LARGE)
    assert not _upload(storage, "acts/c/0/0", LARGE ^ np.uint8(255))
    assert not storage.put("acts/c/0/0", b"small")
    assert [(entry.key, entry.bytes) for entry in storage.list("")] == [("acts/c/0/0", LARGE.nbytes)]
    found = np.zeros((LARGE.size - 3) // 2, np.uint16)
    trailer = bytearray(1)
    storage.read_into("acts/c/0/0", 2, [found, trailer])
    np.testing.assert_array_equal(found.view(np.uint8), LARGE[2:-1][: found.nbytes])


@pytest.mark.parametrize(("size", "rounds"), [(100, 8), (LARGE.size, 1)], ids=["small", "large"])
def test_of_two_racing_publishers_one_wins_whole(storage: Storage, size: int, rounds: int) -> None:
    for i in range(rounds):
        key, start = f"units/{i}", threading.Barrier(2)
        own = [LARGE[:size], LARGE[:size] ^ np.uint8(255)]
        won: dict[int, bool] = {}

        def publish(writer: int, key: str, start: threading.Barrier, own: list[np.ndarray], won: dict) -> None:
            with storage.create(key) as upload:
                upload.write([own[writer]])
                start.wait()
                won[writer] = upload.publish()

        threads = [threading.Thread(target=publish, args=(writer, key, start, own, won)) for writer in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won.values()) == [False, True]
        assert storage.read(key) == own[0 if won[0] else 1].tobytes()
    assert len(_keys(storage)) == rounds


@pytest.mark.parametrize("size", [100, LARGE.size], ids=["small", "large"])
def test_abandoned_upload_leaves_nothing(storage: Storage, size: int) -> None:
    upload = storage.create("acts/c/0")
    upload.write([LARGE[:size]])
    upload.abort()
    upload.abort()
    with pytest.raises(KeyError), storage.create("acts/c/0") as upload:
        upload.write([LARGE[:size]])
        raise KeyError
    assert storage.list("") == []


def test_empty_file_can_be_stored(storage: Storage) -> None:
    assert storage.put("empty", b"") and not storage.put("empty", b"1")
    assert storage.read("empty") == b"" and storage.size("empty") == 0


@pytest.mark.parametrize("key", ["/etc/passwd", "a/../../b", "", "a//b", "a/"])
def test_key_outside_the_store_is_refused(storage: Storage, key: str) -> None:
    with pytest.raises(AssertionError, match="not a key"):
        storage.put(key, b"")


def test_pickled_storage_reads_the_same_files(storage: Storage) -> None:
    storage.put("a/b", b"bytes")
    storage.read_into("a/b", 0, [bytearray(1)])
    again = pickle.loads(pickle.dumps(storage))
    assert again.read("a/b") == b"bytes" and again.url == storage.url


def test_spawned_process_reads_the_same_files(storage: Storage) -> None:
    storage.put("f", b"0123456789")
    storage.read_into("f", 0, [bytearray(4)])
    script = (
        "import pickle, sys\n"
        "try: storage = pickle.load(sys.stdin.buffer)\n"
        "except RuntimeError as error: sys.exit(str(error))\n"
        "found = bytearray(4); storage.read_into('f', 3, [found]); print(found.decode(), end='')\n"
    )
    child = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(storage), capture_output=True)
    if storage.url.startswith("memory://"):
        assert b"exists only in the process that created it; use a folder" in child.stderr
    else:
        assert child.stdout == b"3456", child.stderr.decode()


def _in_fork(work: Callable[[], None]) -> int:
    """Exit status of a forked child that does some work, 14 if it takes longer than 10 s."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_forked_children_read_while_threads_of_the_parent_do(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for i in range(100):
        storage.put(f"{i}", bytes([i]) * 4)
    done = threading.Event()

    def check(i: int) -> None:
        found = bytearray(4)
        storage.read_into(f"{i}", 0, [found])
        assert found == bytes([i]) * 4

    def keep_reading() -> None:
        while not done.is_set():
            for i in range(100):
                check(i)

    thread = threading.Thread(target=keep_reading)
    thread.start()
    try:
        assert [_in_fork(lambda: [check(i) for i in range(100)] and None) for _ in range(20)] == [0] * 20
    finally:
        done.set()
        thread.join()


def test_object_storage_refuses_a_forked_child_where_it_would_hang() -> None:
    pytest.importorskip("obstore", reason="needs the extra 'remote'")
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    storage.put("a", b"1")

    def refused() -> None:
        with pytest.raises(StoreError, match="forked process; start it with spawn"):
            storage.read("a")

    assert _in_fork(refused) == 0


def test_memory_of_one_name_is_one_storage_until_forgotten() -> None:
    pytest.importorskip("obstore", reason="needs the extra 'remote'")
    from clt.capture.storage.object_store import forget_memory

    name = uuid.uuid4().hex
    open_storage(f"memory://{name}").put("a", b"1")
    assert open_storage(f"memory://{name}").read("a") == b"1"
    forget_memory(name)
    assert open_storage(f"memory://{name}").size("a") is None
    forget_memory(name)


def test_open_descriptors_stay_bounded_and_are_closed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, durable=False)
    for i in range(500):
        storage.put(f"{i}", i.to_bytes(4, "little"))
    before = len(os.listdir("/proc/self/fd"))

    wrong: list[int] = []

    def read(storage: LocalStorage, order: np.ndarray) -> None:
        for i in order:
            found = np.zeros(1, np.int32)
            storage.read_into(f"{i}", 0, [found])
            if found[0] != i:
                wrong.append(i)

    orders = [np.random.default_rng(seed).permutation(500) for seed in range(4)]
    threads = [threading.Thread(target=read, args=(storage, order)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) <= before + local.OPEN_FILES
    del storage
    assert len(os.listdir("/proc/self/fd")) <= before


def test_killed_writer_leaves_a_partial_file_and_no_name(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from clt.capture.storage.local import LocalStorage\n"
        "upload = LocalStorage(Path(sys.argv[1])).create('acts/c/0')\n"
        "print(flush=True)\n"
        "while True: upload.write([bytes(1 << 16)])\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    storage = LocalStorage(tmp_path)
    while storage.list("")[0].bytes == 0:
        time.sleep(0.001)
    writer.kill()
    writer.wait()
    writer.stdout.close()
    (entry,) = storage.list("")
    assert entry.key.startswith("acts/c/.0.") and entry.key.endswith(PARTIAL_SUFFIX)
    assert storage.put("acts/c/0", b"the next writer's")


def test_failed_write_leaves_no_file_and_names_the_remedy(tmp_path: Path) -> None:
    # A file size limit in place of a full disk: the kernel fails in the same call.
    script = (
        "import resource, sys; from pathlib import Path; from clt.capture.storage.local import LocalStorage\n"
        "from clt.errors import StoreError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "storage = LocalStorage(Path(sys.argv[1]))\n"
        "try: storage.put('acts/c/0', bytes(3 << 20))\n"
        "except StoreError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout == (
        f"{tmp_path}/acts/c/0: file too large; raise the limit of file size (ulimit -f) or choose a smaller"
        " rows_per_unit\n"
    )
    assert LocalStorage(tmp_path).list("") == []


def test_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a", b"")
    with pytest.raises(StoreError, match=rf"{tmp_path}/a/b: .*a file has the name of a needed folder"):
        storage.put("a/b", b"")
    assert storage.size("a/b") is None and storage.list("a/") == []


@pytest.mark.parametrize("durable", [True, False])
def test_durable_name_is_forced_to_disk_with_its_folders(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[str] = []
    force = os.fsync

    def record(descriptor: int) -> None:
        forced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        force(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage = LocalStorage(tmp_path / "new" / "store", durable)
    # Created by another worker, which may not have synced it yet.
    (tmp_path / "new" / "store" / "c").mkdir(parents=True)
    assert storage.put("c/0/1", b"bytes")
    if not durable:
        assert forced == []
        return
    assert forced[0].endswith(PARTIAL_SUFFIX)
    assert forced[1:5] == [f"{tmp_path}/new/store/c/0", f"{tmp_path}/new/store/c", *_up(tmp_path / "new" / "store", 2)]
    forced.clear()
    assert storage.put("c/0/2", b"bytes") and not storage.put("c/0/2", b"other")
    assert [name for name in forced if not name.endswith(PARTIAL_SUFFIX)] == [f"{tmp_path}/new/store/c/0"] * 2


def _up(folder: Path, count: int) -> list[str]:
    return [str(path) for path in [folder, *folder.parents][:count]]


def test_locations_open_by_their_form(tmp_path: Path) -> None:
    for location in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        storage = open_storage(location)
        assert isinstance(storage, LocalStorage) and storage.name("a") == f"{tmp_path}/a"
    with pytest.raises(StoreError, match=r"ftp://host/x: unknown kind of location; use a folder or one of memory, s3"):
        open_storage("ftp://host/x")


def test_missing_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "clt.capture.storage.object_store", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"s3://b/x: .* pip install 'vlm-clt\[remote\]'"):
        open_storage("s3://b/x")


def test_unreachable_or_missing_bucket_is_one_line_with_the_variables(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="needs the extra 'remote'")
    from clt.capture.storage import object_store as object_storage

    monkeypatch.setattr(object_storage, "RETRY_SECONDS", 0)
    for variable, value in server.environment.items():
        monkeypatch.setenv(variable, value)
    absent = open_storage("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    unreachable = open_storage(f"s3://{server.bucket}/x")
    for storage in (absent, unreachable):
        for attempt in (lambda s: s.read("a"), lambda s: s.put("a", b"1"), lambda s: s.list("")):
            with pytest.raises(StoreError, match=rf"^{storage.url}.*AWS_ENDPOINT_URL.*AWS_ACCESS_KEY_ID") as caught:
                attempt(storage)
            assert "\n" not in str(caught.value)


def test_file_too_large_for_the_service_names_the_setting(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore", reason="needs the extra 'remote'")
    from clt.capture.storage import object_store as object_storage

    monkeypatch.setitem(object_storage.LARGEST_FILE, "s3", 1000)
    for variable, value in server.environment.items():
        monkeypatch.setenv(variable, value)
    storage = open_storage(f"s3://{server.bucket}/{uuid.uuid4().hex}")
    with pytest.raises(StoreError, match="more than 1000 bytes in one file; choose a smaller rows_per_unit"):
        storage.put("acts/c/0", bytes(1001))
    assert storage.list("") == []
