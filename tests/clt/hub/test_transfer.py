"""Push and pull of folders against the local stand-in for the hub: real HTTP, the real library, real interruptions."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clt.errors import HubError
from clt.hub.transfer import pull_folder, push_folder

from ...hub_stand_in import HubStandIn, environment

REPO = "alice/store"
LAST = ("manifest.json",)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder like a store: nested names, small JSON, an empty file, small binaries and one of 12 MB."""
    folder = tmp_path / "store"
    contents = {
        "store.json": b"{}\n",
        "plan.json": b'{"units": [1, 2]}\n',
        "manifest.json": b'{"id": "one"}\n',
        "data.zarr/zarr.json": b'{"zarr_format": 3}',
        "data.zarr/acts/mlp in/c/0/0/0": random.Random(0).randbytes(12_000_000),
        "units/stats/empty": b"",
    }
    contents |= {f"data.zarr/tokens/id/c/{i}": b"\0" + random.Random(i).randbytes(5000) for i in range(5)}
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def push(folder: Path, repo: str = REPO, **options: object) -> str:
    return push_folder(folder, repo, **{"last": LAST, "message": "A store", **options})  # type: ignore[arg-type]


def pull(folder: Path, repo: str = REPO, **options: object) -> str:
    return pull_folder(repo, folder, **{"last": LAST, **options})  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its contents, and every folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def one_line(caught: pytest.ExceptionInfo[HubError], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def run_python(hub: HubStandIn, tmp_path: Path, code: str, **variables: str) -> subprocess.Popen[str]:
    """Python in a separate process with settings from the environment only."""
    settings = os.environ | environment(hub, tmp_path) | variables
    return subprocess.Popen(
        [sys.executable, "-c", code], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_pulled_folder_is_byte_identical(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    hub.page = 4
    pushed = push(store)
    assert pull(tmp_path / "copy") == pushed
    assert tree(tmp_path / "copy") == tree(store)
    assert hub.repositories[f"dataset:{REPO}"].private
    assert not any(request.authorized for request in hub.requests if request.path[1:65].isalnum())


def test_second_push_sends_nothing(hub: HubStandIn, store: Path) -> None:
    first = push(store)
    assert hub.bytes_received() > 12_000_000
    hub.requests.clear()
    assert push(store) == first
    assert hub.count("PUT") == hub.count("POST", "/commit/") == hub.count("POST", "/preupload/") == 0
    assert hub.bytes_received() < 1000


def test_commits_are_small_and_the_manifest_has_the_last_one_to_itself(hub: HubStandIn, store: Path) -> None:
    push(store, files_per_commit=3)
    history = hub.history(REPO)
    assert [len(names) for names in history] == [3, 3, 3, 1, 1]
    assert history[-1] == {"manifest.json"}


def test_push_that_was_cut_off_sends_only_the_rest(hub: HubStandIn, store: Path) -> None:
    hub.refuse_uploads_after = 4
    with pytest.raises(HubError) as caught:
        push(store, files_per_commit=2)
    one_line(caught, REPO, "507", "storage is full", "run again")
    begun = hub.tree(REPO)
    assert begun and "manifest.json" not in begun

    accepted = len(hub.objects)
    hub.refuse_uploads_after = None
    hub.requests.clear()
    push(store, files_per_commit=2)
    assert hub.count("PUT") == 6 - accepted == 2
    assert hub.tree(REPO) == {name: data for name, data in tree(store).items() if data is not None}
    assert hub.history(REPO)[-1] == {"manifest.json"}


def test_ignored_names_stay_here(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    complete = tree(store)
    (store / "units" / "leases").mkdir()
    (store / "units" / "leases" / "000000.0001.json").write_text("{}")
    (store / "data.zarr" / ".0.uuid.partial").write_text("")
    push(store, ignore=["*.partial", "units/leases/*"])
    pull(tmp_path / "copy")
    assert tree(tmp_path / "copy") == complete


def test_other_contents_in_the_repository_are_never_replaced(hub: HubStandIn, store: Path) -> None:
    push(store)
    before = hub.tree(REPO)
    for name in ("manifest.json", "plan.json"):
        kept = (store / name).read_bytes()
        (store / name).write_bytes(kept[:-2] + b"*\n")
        with pytest.raises(HubError) as caught:
            push(store)
        one_line(caught, REPO, str(store / name), "another repository")
        (store / name).write_bytes(kept)
    assert hub.tree(REPO) == before


def test_manifest_is_not_put_on_a_repository_that_changed_meanwhile(hub: HubStandIn, store: Path) -> None:
    hub.intruder = True
    with pytest.raises(HubError, match="the repository changed during the push; push again"):
        push(store)
    assert "manifest.json" not in hub.tree(REPO)


def test_file_that_the_repository_drops_is_missed_before_the_manifest_goes(
    hub: HubStandIn, store: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / ".gitignore").write_text("plan.json\n")
    push(rules, last=())
    with pytest.raises(HubError) as caught:
        push(store)
    one_line(caught, REPO, "'plan.json'", ".gitignore")
    assert "manifest.json" not in hub.tree(REPO)


def test_incomplete_folder_is_not_pushed(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    (store / "manifest.json").unlink()
    with pytest.raises(HubError, match="not complete"):
        push(store)
    with pytest.raises(HubError, match="no such folder"):
        push(tmp_path / "nowhere")
    assert hub.requests == []


def test_branch_is_made_and_pulled_by_name_or_commit(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    commit = push(store, revision="layers/early")
    assert "manifest.json" not in hub.tree(REPO)
    for revision in ("layers/early", commit):
        assert pull(tmp_path / revision, revision=revision) == commit
        assert tree(tmp_path / revision) == tree(store)


def test_model_repository_takes_a_card(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    (store / "README.md").write_text("---\nlicense: mit\n---\n# A transcoder\n")
    push(store, kind="model", private=False)
    assert list(hub.repositories) == [f"model:{REPO}"] and not hub.repositories[f"model:{REPO}"].private
    pull(tmp_path / "copy", kind="model")
    assert tree(tmp_path / "copy") == tree(store)


def test_pull_that_was_killed_leaves_whole_files_and_fetches_only_the_rest(
    hub: HubStandIn, store: Path, tmp_path: Path
) -> None:
    push(store)
    copy = tmp_path / "copy"
    hub.stall_after = 4
    code = f"from clt.hub.transfer import *; pull_folder({REPO!r}, Path({str(copy)!r}), last={LAST!r})"
    process = run_python(hub, tmp_path, code, HF_HUB_DISABLE_XET="1")
    assert hub.stalled.wait(60), process.communicate(timeout=1)[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.release.set()
    hub.stall_after = None

    arrived = {name for name, data in tree(copy).items() if data is not None and not name.startswith(".")}
    assert "manifest.json" not in arrived
    assert all((copy / name).read_bytes() == (store / name).read_bytes() for name in arrived)
    hub.requests.clear()
    pull(copy)
    assert tree(copy) == tree(store)
    assert set(hub.fetched()) == {name for name, data in tree(store).items() if data} - arrived
    hub.requests.clear()
    pull(copy)
    assert hub.fetched() == []


def test_body_that_ends_early_is_no_file(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    push(store)
    for faults in (hub.short, hub.damaged):
        for name in ("data.zarr/acts/mlp in/c/0/0/0", "plan.json"):
            copy = tmp_path / "copy"
            faults.add(name)
            with pytest.raises(HubError) as caught:
                pull(copy)
            one_line(caught, REPO, "again")
            assert not (copy / name).exists() and not (copy / "manifest.json").exists()
            assert tree(copy).items() <= tree(store).items()
            faults.clear()
            pull(copy)
            assert tree(copy) == tree(store)
            shutil.rmtree(copy)


def test_broken_connection_resumes(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    push(store)
    hub.cut.add("data.zarr/acts/mlp in/c/0/0/0")
    pull(tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(store)


def test_folder_that_holds_something_else_is_left_alone(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    push(store)
    hub.requests.clear()
    for name in ("plan.json", "notes.txt"):
        copy = tmp_path / name.removesuffix(".txt")
        copy.mkdir()
        (copy / name).write_text("mine")
        with pytest.raises(HubError) as caught:
            pull(copy)
        one_line(caught, REPO, str(copy / name), "folder")
        assert tree(copy) == {name: b"mine"}
    assert hub.fetched() == []


def test_unfinished_repository_is_not_pulled(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    push(store, last=(), ignore=LAST)
    with pytest.raises(HubError, match="its push is incomplete"):
        pull(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("alice/nothing", "hf_alice", "no such dataset repository, or a private one"),
        (REPO, None, "set HF_TOKEN or run 'hf auth login'"),
        (REPO, "hf_bob", "no such dataset repository, or a private one"),
        (REPO, "hf_nobody", "access token missing or not valid; set HF_TOKEN"),
        ("store", "hf_alice", "write OWNER/NAME"),
        ("alice/sto re", "hf_alice", "write OWNER/NAME"),
    ],
)
def test_repository_out_of_reach_is_one_line(
    hub: HubStandIn,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repo: str,
    token: str | None,
    words: str,
) -> None:
    push(store, ignore=["data.zarr/acts/*"])
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        pull(tmp_path / "copy", repo)
    one_line(caught, repo, words)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("token", "words"), [(None, "token missing"), ("hf_reader", "does not allow"), ("hf_bob", "does not allow")]
)
def test_push_without_the_right_to_write_is_one_line(
    hub: HubStandIn, store: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, words: str
) -> None:
    push(store, ignore=["data.zarr/acts/*"])
    before = hub.tree(REPO)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        push(store)
    one_line(caught, REPO, words, "HF_TOKEN")
    assert hub.tree(REPO) == before


def test_hub_that_does_not_answer_well_is_one_line(
    hub: HubStandIn, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(store, ignore=["data.zarr/acts/*"])
    with pytest.raises(HubError) as caught:
        pull(tmp_path / "copy", revision="v9")
    one_line(caught, REPO, "'v9'", "branches, tags or commits")
    for status, words in ((500, "error 500"), (429, "error 429"), (200, "not from a hub; check HF_ENDPOINT")):
        hub.failing = status
        with pytest.raises(HubError) as caught:
            pull(tmp_path / "copy")
        one_line(caught, REPO, words)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for act in (lambda: pull(tmp_path / "copy"), lambda: push(store)):
        with pytest.raises(HubError) as caught:
            act()
        one_line(caught, REPO, "cannot be reached", "HF_ENDPOINT")


def test_xet_storage_takes_large_files_and_gives_them_back(hub: HubStandIn, store: Path, tmp_path: Path) -> None:
    hub.xet_storage = f"local://{tmp_path / 'xet'}"
    large = sorted(str(path) for path in (store / "data.zarr").rglob("*") if path.is_file() and "c" in path.parts)
    code = f"""
import hashlib, hf_xet
from clt.hub.transfer import *
for path, found in zip({large!r}, hf_xet.hash_files({large!r})):
    print(hashlib.sha256(Path(path).read_bytes()).hexdigest(), found.hash)
push_folder(Path({str(store)!r}), {REPO!r}, last={LAST!r}, message="A store")
"""
    process = run_python(hub, tmp_path, code)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    hub.xet_hashes = dict(line.split() for line in output.splitlines())
    assert hub.count("PUT") == 0 and hub.count("GET", "xet-write-token") > 0

    code = f"from clt.hub.transfer import *; pull_folder({REPO!r}, Path({str(tmp_path / 'copy')!r}), last={LAST!r})"
    process = run_python(hub, tmp_path, code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert tree(tmp_path / "copy") == tree(store)
    assert not hub.count("GET", "[?]name=")
