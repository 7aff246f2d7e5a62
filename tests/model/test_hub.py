"""Test models given by their Hugging Face id: what is fetched, the cache, and the message for every failure.

The hub is tests/fake_hub.py; nothing here leaves the machine.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils._http import close_session

from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model import hub
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.hub import locate
from d2q_edge.model.peft_files import adapter_files, locate_adapter
from d2q_edge.model.weight_files import INDEX_FILE
from tests.checkpoints import write_checkpoint
from tests.fake_hub import COMMIT, LATER, REPO, Fault, Hub, serve
from tests.paths import ROOT

Settings = Callable[..., None]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the repository's content: a model in two shards, and files that aren't needed."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    write_checkpoint(directory, "llama", shards=2)
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    (directory / "README.md").write_text("---\nlicense: mit\nbase_model: other/parent\n---\n# Tiny\n")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (directory / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "model.gguf", "a.py"):
        (directory / name).write_bytes(b"not needed")
    return directory


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """settings(NAME=value): change settings of huggingface_hub, which reads its variables when it is imported."""

    def change(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)

    return change


@pytest.fixture
def server(
    model: Path, tmp_path: Path, settings: Settings, environment: Settings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """Serve the hub, with an empty cache, no token and no delays before retries."""
    with serve(model) as state:
        settings(
            ENDPOINT=state.endpoint,
            HUGGINGFACE_CO_URL_TEMPLATE=state.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            HF_HUB_CACHE=str(tmp_path / "cache"),
            HF_HUB_OFFLINE=False,
            DOWNLOAD_CHUNK_SIZE=1000,
        )
        environment(HF_TOKEN=None)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        yield state
        close_session()


def refused(pattern: str, model: str = REPO, revision: str | None = None) -> None:
    with pytest.raises(D2QError, match=pattern) as caught:
        locate(model, revision)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_fetches_what_is_needed_and_nothing_else(server: Hub, model: Path) -> None:
    directory = locate(REPO)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert found == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors.index.json", *SHARDS),
        *("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"),
    }
    for name in found:
        assert (directory / name).read_bytes() == (model / name).read_bytes()
    assert directory.name == COMMIT
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(checkpoint.tensor(name), Checkpoint.open(model).tensor(name))


def test_second_time_nothing_is_fetched(server: Hub) -> None:
    first = locate(REPO)
    server.requests.clear()
    assert locate(REPO) == first
    assert {request.method for request in server.requests if "/api/" not in request.path} <= {"HEAD"}


def test_single_file_repository(server: Hub, model: Path) -> None:
    server.files["model.safetensors"] = server.files[SHARDS[0]]
    for name in (*SHARDS, INDEX_FILE):
        del server.files[name]
    directory = locate(REPO)
    assert (directory / "model.safetensors").is_file()
    assert not any((directory / name).exists() for name in SHARDS)


def test_repository_with_a_left_over_index(server: Hub, model: Path, settings: Settings) -> None:
    """The shards aren't fetched, because transformers reads the single file."""
    server.files["model.safetensors"] = server.files[SHARDS[0]]
    directory = locate(REPO)
    assert not any((directory / name).exists() for name in SHARDS)
    assert (directory / "model.safetensors").read_bytes() == (model / SHARDS[0]).read_bytes()
    (directory / INDEX_FILE).write_bytes((model / INDEX_FILE).read_bytes())
    settings(HF_HUB_OFFLINE=True)
    assert locate(REPO) == directory, "complete without the shards"


def test_checkpoint_opens_an_id(server: Hub) -> None:
    assert Checkpoint.open(REPO).directory.name == COMMIT


@pytest.mark.parametrize("revision", ["v1", LATER])
def test_revision(server: Hub, revision: str) -> None:
    assert locate(REPO, revision).name == LATER
    assert locate(REPO).name == COMMIT


def test_branch_that_moves_meanwhile(server: Hub) -> None:
    """All files come from one commit, even if the branch moves after its files were listed."""
    lists = 0

    def move() -> None:
        nonlocal lists
        lists += 1
        if lists == 2:
            server.commits["main"] = LATER

    server.faults.append(Fault("GET /api/.*/revision/main", action=move))
    assert locate(REPO).name == LATER
    assert {request.path.split("/")[4] for request in server.requests if "/resolve/" in request.path} == {LATER}


def test_directory_wins(server: Hub, model: Path) -> None:
    shutil.copytree(model, REPO)
    assert locate(REPO) == Path(REPO)
    assert server.requests == []


@pytest.mark.parametrize(
    "path",
    ["absent", "/absent/model", "a/b/c", "../model", "~/x", "models/../x", ".hidden/x", "a/b--c", "a/b.git", "a/b."],
)
def test_what_cannot_be_an_id_is_a_directory(server: Hub, path: str) -> None:
    assert locate(path) == Path(path).expanduser()
    refused("is not a Hugging Face id, so --revision has no meaning", path, "main")
    assert server.requests == []


class TestConnections:
    def test_goes_on_where_it_broke(self, server: Hub, model: Path) -> None:
        server.faults.append(Fault(f"GET /large/{SHARDS[1]}", keep=20_000, times=2))
        directory = locate(REPO)
        assert (directory / SHARDS[1]).read_bytes() == (model / SHARDS[1]).read_bytes()
        ranges = [request.range for request in server.requests if request.path == f"/large/{SHARDS[1]}"]
        assert ranges == ["", "bytes=20000-", "bytes=40000-"]

    def test_broken_for_good_then_repeated(self, server: Hub) -> None:
        server.faults.append(Fault(f"GET /large/{SHARDS[1]}", keep=0))
        refused(f"connection to .* failed at {SHARDS[1]} of {REPO} .*run the same command later")
        server.faults.clear()
        server.requests.clear()
        directory = locate(REPO)
        assert [request.path for request in server.requests if request.path.startswith("/large")] == [
            f"/large/{SHARDS[1]}"
        ], "the first shard is there already"
        Checkpoint.open(directory)

    def test_interrupted(self, server: Hub) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.file_download, "_chmod_and_move", interrupt)
            with pytest.raises(KeyboardInterrupt):
                locate(REPO)
        Checkpoint.open(locate(REPO))

    def test_server_that_lies_about_sizes(self, server: Hub) -> None:
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": '"x"', "X-Linked-Size": "5"}
        headers["Location"] = server.endpoint.replace("127.0.0.1", "localhost") + f"/large/{SHARDS[0]}"
        server.faults.append(Fault(f"HEAD /tiny-org/.*{SHARDS[0]}", 302, headers))
        refused(f"failed at {SHARDS[0]}.*Consistency check failed")

    def test_no_network(self, server: Hub, settings: Settings) -> None:
        settings(ENDPOINT="http://127.0.0.1:9")
        refused("connection to http://127.0.0.1:9 failed at the list of files of tiny-org/.*Connect")

    def test_no_network_with_a_cached_copy(
        self, server: Hub, settings: Settings, capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = locate(REPO)
        settings(ENDPOINT="http://127.0.0.1:9")
        assert locate(REPO) == directory
        assert f"using the cached copy in {directory}" in capsys.readouterr().err

    def test_offline(self, server: Hub, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
        directory = locate(REPO)
        server.requests.clear()
        settings(HF_HUB_OFFLINE=True)
        assert locate(REPO) == locate(REPO, "main") == locate(REPO, COMMIT) == directory
        assert capsys.readouterr().err == ""
        assert server.requests == []
        refused(
            "there is no directory other/model, and the model of that name isn't in .*cache, but HF_HUB_OFFLINE",
            "other/model",
        )
        refused("HF_HUB_OFFLINE", REPO, "v1")

    def test_offline_with_an_incomplete_copy(self, server: Hub, settings: Settings) -> None:
        server.faults.append(Fault(f"GET /large/{SHARDS[1]}", 404))
        refused(SHARDS[1])
        settings(HF_HUB_OFFLINE=True)
        refused(f"HF_HUB_OFFLINE forbids fetching .*the cached copy in .* lacks {SHARDS[1]}")


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "headers", "pattern"),
        [
            (401, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at http.*tiny-org/.*set HF_TOKEN"),
            (403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms"),
            (403, {}, "is gated: accept its terms"),
            (401, {}, "no directory tiny-org/.*, and no model of that name that is visible to everybody.*HF_TOKEN"),
            (
                404,
                {"X-Error-Code": "RepoNotFound"},
                "no model of that name that is visible to everybody .*check the spelling",
            ),
            (429, {}, "for now .too many requests.; run the same command later"),
            (500, {}, "for now .HTTP status 500.; run the same command later"),
            (503, {}, "for now .HTTP status 503.; run the same command later"),
        ],
    )
    def test_status(self, server: Hub, status: int, headers: dict[str, str], pattern: str) -> None:
        server.faults.append(Fault("/api/", status, headers))
        refused(pattern)
        server.faults[:] = [Fault("HEAD .*/resolve/.*config.json", status, headers)]
        refused(pattern)

    def test_status_of_a_large_file(self, server: Hub) -> None:
        server.faults.append(Fault(f"GET .*{SHARDS[0]}", 500))
        refused(f"refuses {SHARDS[0]} of {REPO} for now .HTTP status 500.; run the same command later")
        server.faults.clear()
        Checkpoint.open(locate(REPO))

    def test_passing_trouble_is_not_reported(self, server: Hub) -> None:
        server.faults.append(Fault("HEAD .*/resolve/.*config.json", 503, times=2))
        server.faults.append(Fault("GET /large/", 429, times=2))
        Checkpoint.open(locate(REPO))

    def test_unknown_model(self, server: Hub) -> None:
        refused("there is no directory a/b, and no model of that name", "a/b")

    def test_unknown_revision(self, server: Hub) -> None:
        refused(f"{REPO} has no revision v9; see", revision="v9")

    def test_pickles_are_not_fetched(self, server: Hub) -> None:
        for name in (*SHARDS, INDEX_FILE, "consolidated.safetensors"):
            del server.files[name]
        refused(f"{REPO} has its weights as PyTorch pickle files only, which can run any code")
        assert not any("/resolve/" in request.path for request in server.requests)

    def test_no_weights(self, server: Hub) -> None:
        for name in (*SHARDS, INDEX_FILE, "consolidated.safetensors", "pytorch_model.bin"):
            del server.files[name]
        refused(f"{REPO} has no weights: neither model.safetensors nor")

    def test_an_adapter_is_not_a_model(self, server: Hub) -> None:
        del server.files["config.json"]
        server.files["adapter_config.json"] = b"{}"
        refused(f"{REPO} is a PEFT adapter, not a model; run d2q-edge convert BASE --adapter {REPO}, where BASE is")

    def test_no_config(self, server: Hub) -> None:
        del server.files["config.json"]
        refused(f"{REPO} has no config.json, so it isn't a model that can be converted")

    @pytest.mark.parametrize(
        "file", ["../../../../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "x.bin"]
    )
    def test_index_that_leads_elsewhere(self, server: Hub, file: str) -> None:
        server.files[INDEX_FILE] = json.dumps({"weight_map": {"a": file}}).encode()
        refused("which isn't the plain name of a .safetensors file")

    def test_index_that_names_a_file_too_many(self, server: Hub) -> None:
        server.files[INDEX_FILE] = json.dumps({"weight_map": {"a": "x.safetensors"}}).encode()
        refused("names x.safetensors, but the repository has no such file")

    def test_too_little_space(self, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        class Usage(NamedTuple):
            free: int

        needed = sum(len(server.files[name]) for name in SHARDS)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
        refused("needs 0.0 GiB more in .*cache, which has 0.0 GiB of free space")
        assert not any("/large/" in request.path for request in server.requests)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed))
        locate(REPO)

    def test_full_disk(self, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(huggingface_hub.file_download, "_chmod_and_move", full)
        refused("the disk of .*cache is full, so the settings and the tokenizer of .* could not be stored")


class TestToken:
    def test_from_the_environment(self, server: Hub, environment: Settings) -> None:
        server.token = "hf_secret"
        refused("is gated")
        environment(HF_TOKEN="hf_wrong")
        refused("is gated")
        environment(HF_TOKEN="hf_secret")
        locate(REPO)

    def test_is_not_sent_elsewhere(self, server: Hub, environment: Settings) -> None:
        environment(HF_TOKEN="hf_secret")
        locate(REPO)
        assert {request.token for request in server.requests if "/large/" not in request.path} == {"hf_secret"}
        assert {request.token for request in server.requests if "/large/" in request.path} == {""}

    def test_stored_one_is_not_used(self, server: Hub, tmp_path: Path, settings: Settings) -> None:
        (tmp_path / "token").write_text("hf_stored")
        settings(HF_TOKEN_PATH=str(tmp_path / "token"))
        assert huggingface_hub.get_token() == "hf_stored"
        locate(REPO)
        assert {request.token for request in server.requests} == {""}


class TestCache:
    def test_says_which_model_it_is(self, server: Hub) -> None:
        assert hub.repository(locate(REPO)) == REPO

    @pytest.mark.parametrize("path", ["x", "models--a--b", "models--a--b/refs/main", "models--a/snapshots/1"])
    def test_other_directories_are_no_repositories(self, tmp_path: Path, path: str) -> None:
        assert hub.repository(tmp_path / path) is None
        assert hub.blob_directories(tmp_path / path) == ()

    def test_its_links_are_allowed_and_no_others(self, server: Hub, tmp_path: Path) -> None:
        directory = locate(REPO)
        file = directory / "config.json"
        assert file.is_symlink()
        shared = tmp_path / "cache" / "blobs" / "ab" / "abcd"
        shared.parent.mkdir(parents=True)
        shutil.copy(file, shared)
        blob = file.resolve()
        blob.unlink()
        blob.symlink_to(shared)
        Checkpoint.open(directory)
        blob.unlink()
        blob.symlink_to("/etc/hostname")
        with pytest.raises(D2QError, match=r"config.json is a symbolic link to /etc/hostname, outside of"):
            Checkpoint.open(directory)


@pytest.mark.slow
def test_command_line(model: Path, tmp_path: Path) -> None:
    """An id becomes a file that records its origin, and the same file without network."""
    with serve(model) as state:
        environment = {
            **os.environ,
            **{"HF_ENDPOINT": state.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "d2q_edge.cli", "convert", REPO, "--no-calibration"]

        def run(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )

        first = run("--revision", "main")
        assert first.returncode == 0, first.stderr
        fetched = [r.path for r in state.requests if r.method == "GET" and not r.path.startswith("/api/")]
        assert len(fetched) == len(set(fetched)), "every file once"
    (output,) = tmp_path.glob("Tiny-Model-*-D2Q2.gguf")
    kv = GGUFFile(output).kv
    assert {key: kv[key] for key in kv if key.startswith(("general.name", "general.base", "general.source"))} == {
        "general.name": "Tiny Model 2M",
        "general.basename": "Tiny-Model",
        "general.source.repo_url": f"https://huggingface.co/{REPO}",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny Model 2M",
        "general.base_model.0.organization": "Tiny Org",
        "general.base_model.0.repo_url": f"https://huggingface.co/{REPO}",
    }
    environment["HF_HUB_OFFLINE"] = "1"
    again = run("-o", "again.gguf")
    assert (again.returncode, again.stderr) == (0, first.stderr)
    assert (tmp_path / "again.gguf").read_bytes() == output.read_bytes()
    failed = run("--revision", "v9")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"Error: there is no directory {REPO}, and the model of that name isn't in")
    assert failed.stderr.count("\n") == 1


def test_plain_export_names_the_models_own_base(server: Hub, tmp_path: Path) -> None:
    export(locate(REPO), tmp_path / "x.gguf", "f16")
    kv = GGUFFile(tmp_path / "x.gguf").kv
    assert kv["general.name"] == "Tiny Model 2M"
    assert kv["general.organization"] == "Tiny Org"
    assert kv["general.sampling.temp"] == pytest.approx(0.6)
    assert kv["general.license"] == "mit"
    assert kv["general.base_model.0.repo_url"] == "https://huggingface.co/other/parent"


class TestAdapters:
    def test_only_its_files_are_fetched(self, server: Hub) -> None:
        server.files |= {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": b"weights",
            "adapter_model.bin": b"x",
        }
        directory = locate_adapter(REPO)
        assert {path.name for path in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert adapter_files(str(directory)) == adapter_files(REPO)

    def test_failures(self, server: Hub) -> None:
        with pytest.raises(D2QError, match=rf"^{REPO} has no adapter_config\.json, so it isn't a PEFT adapter"):
            adapter_files(REPO)
        with pytest.raises(D2QError, match="there is no directory no-org/nothing, and no model of that name"):
            adapter_files("no-org/nothing")

    def test_a_directory_wins(self, server: Hub) -> None:
        Path(REPO).mkdir(parents=True)
        assert locate_adapter(REPO) == Path(REPO)
