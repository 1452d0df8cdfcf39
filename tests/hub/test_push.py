"""Adapters and results on a Hub: one on loopback that records what it is asked."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.hub import adapters
from tests.hub.server import TOKEN, serving
from vlmcompress import hub, patch
from vlmcompress.core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(adapters.PEFT_WARNING)

BASE = "llava-hf/llava-1.5-7b-hf"
REPO = "models/me/half"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub with one base model on it; nothing is cached between tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving() as running:
        running.cards[BASE] = {"license": "other", "license_name": "llama2"}
        yield running


def trained():
    """A handle of a model with LoRA and parts, and the logits it gives."""
    model = adapters.model()
    handle = patch(adapters.with_lora(model), f"vtc_cls:0.5 | {adapters.ATP}")
    return handle, adapters.logits(model)


def push(handle, server, **options):
    return hub.push(handle, "me/half", endpoint=server.endpoint, token=TOKEN, **options)


def test_an_adapter_goes_and_comes_back(server, tmp_path):
    handle, want = trained()
    url = push(
        handle,
        server,
        private=True,
        trained_keep=(0.25, 0.5),
        results=adapters.RESULTS,
        base_model=BASE,
        datasets=["me/data"],
        commit_message="Half of the tokens",
    )
    assert url == server.address("models", "me/half")
    assert [commit["summary"] for commit in server.commits] == ["Half of the tokens"]
    repository = server.repositories[REPO]
    assert repository.private is True
    assert sorted(repository.files) == [
        ".eval_results/lmms-lab-pope-default-keep-0.5-lora-accuracy.yaml",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "atp.safetensors",
        "results.json",
        "vlmcompress_config.json",
    ]
    model = adapters.model()
    loaded = hub.load(
        model, "me/half", endpoint=server.endpoint, token=TOKEN, cache_dir=tmp_path / "downloads"
    )
    assert torch.equal(adapters.logits(model), want)
    assert loaded.config.trained_keep == (0.25, 0.5)
    assert {token for _, _, token in server.calls} == {TOKEN}


def test_what_is_asked_of_the_hub(server):
    push(trained()[0], server, base_model=BASE)
    asked = [(method, path) for method, path, _ in server.calls]
    assert asked[0] == ("GET", f"/api/models/{BASE}")  # for its licence
    assert ("HEAD", "/me/half/resolve/main/README.md") in asked  # for what others wrote
    posts = [path for method, path in asked if method == "POST"]
    assert posts == [
        "/api/repos/create",
        "/api/validate-yaml",
        "/api/models/me/half/preupload/main",
        "/api/models/me/half/commit/main",
    ]


def test_the_card_has_the_licence_of_the_base_model(server):
    push(trained()[0], server, base_model=BASE)
    _, front, body = server.repositories[REPO].files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(front)
    assert (data["license"], data["license_name"]) == ("other", "llama2")
    assert data["base_model"] == BASE
    assert 'hub.load(model, "me/half")' in body


def test_a_card_on_the_hub_is_not_overwritten(server):
    handle, _ = trained()
    push(handle, server)
    files = server.repositories[REPO].files
    files["README.md"] += b"\nWritten by hand.\n"
    push(handle, server)
    assert b"Written by hand." in files["README.md"]
    assert files["README.md"].count(b"## Use") == 1


def test_of_a_folder_only_the_adapter_goes(server, tmp_path):
    folder = hub.save(trained()[0], tmp_path / "run", results=adapters.RESULTS)
    for name in ("checkpoint.safetensors", "log.jsonl", "optimizer.pt", ".env"):
        (folder / name).write_text("private")
    push(folder, server)
    assert set(server.repositories[REPO].files) == {
        *(".eval_results/lmms-lab-pope-default-keep-0.5-lora-accuracy.yaml", "README.md"),
        *("adapter_config.json", "adapter_model.safetensors", "atp.safetensors"),
        *("results.json", "vlmcompress_config.json"),
    }
    with pytest.raises(ConfigError, match=re.escape("vlmcompress.hub.save")):
        push(folder, server, license="mit")


def test_nothing_goes_when_the_adapter_cannot_be_saved(server):
    handle, _ = trained()
    with pytest.raises(ConfigError):
        push(handle, server, results={"evaluations": [{}]})
    assert not server.repositories


def test_only_what_is_safe_is_downloaded(server, tmp_path):
    push(trained()[0], server)
    files = server.repositories[REPO].files
    for name in ("adapter_model.bin", "modeling.py", "model.safetensors", "checkpoint.pt"):
        files[name] = b"unsafe, or large"
    model = adapters.model()
    hub.load(model, "me/half", endpoint=server.endpoint, cache_dir=tmp_path / "downloads")
    fetched = {p.name for p in (tmp_path / "downloads").rglob("snapshots/*/*")}
    assert fetched == {
        *("adapter_config.json", "adapter_model.safetensors", "atp.safetensors"),
        "vlmcompress_config.json",
    }


def test_what_is_not_on_the_hub(server, tmp_path):
    model = adapters.model()
    before = adapters.weights(model)
    options = {"endpoint": server.endpoint, "cache_dir": tmp_path / "downloads"}
    with pytest.raises(ConfigError, match="'me/nothing' is no folder here"):
        hub.load(model, "me/nothing", **options)
    push(trained()[0], server)
    del server.repositories[REPO].files["vlmcompress_config.json"]
    with pytest.raises(ConfigError, match="is no adapter"):
        hub.load(model, "me/half", **options)
    with pytest.raises(ConfigError, match="is no adapter"):
        hub.load(model, "no such folder")
    adapters.assert_untouched(model, before)


def test_a_hub_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="could not be had from the Hub"):
        hub.load(
            adapters.model(), "me/half", endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache"
        )


def test_a_hub_that_cannot_be_asked_for_its_card(server, monkeypatch):
    """Nothing goes: a card that others wrote there would be lost."""

    def unreachable(*args, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", unreachable)
    with pytest.raises(LocalEntryNotFoundError):
        push(trained()[0], server)
    assert not server.repositories


def rows(server, name="me/results"):
    files = server.repositories[f"datasets/{name}"].files
    return files, [json.loads(line) for line in files["evaluations.jsonl"].splitlines()]


def test_results_become_a_data_set(server, tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("pope.json", "scenes.json"):
        (tmp_path / "results" / name).write_text(json.dumps(adapters.RESULTS))
    url = hub.push_results(
        tmp_path / "results", "me/results", endpoint=server.endpoint, token=TOKEN, license="mit"
    )
    assert url == server.address("datasets", "me/results")
    files, lines = rows(server)
    assert sorted(files) == [
        "README.md",
        "evaluations.jsonl",
        "results/pope.json",
        "results/scenes.json",
    ]
    assert json.loads(files["results/pope.json"]) == adapters.RESULTS
    assert [line["value"] for line in lines] == [0.8625, 0.93, 0.987] * 2
    assert lines[0]["file"] == "pope.json"
    assert lines[0]["dataset_id"] == "lmms-lab/POPE"
    _, front, body = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "mit"
    assert data["configs"] == [{"config_name": "default", "data_files": "evaluations.jsonl"}]
    assert "| `results/pope.json` | 2026-11-20T17:24:39+00:00 | 0526f6a | cpu |" in body
    assert "| drawn scenes | all tokens | accuracy | 0.987 | 2000 |" in body
    assert adapters.RESULTS["command"] in body
    assert not re.search(r"\n{3,}", body)


def test_results_of_any_kind(server):
    hub.push_results({"floor_ratio": 1.01}, "me/results", endpoint=server.endpoint, token=TOKEN)
    files = server.repositories["datasets/me/results"].files
    assert sorted(files) == ["README.md", "results/results.json"]
    assert "results/*.json" in files["README.md"].decode()
    assert "1.01" not in files["README.md"].decode()


def test_what_are_no_results(server, tmp_path):
    def refused(results, match):
        with pytest.raises(ConfigError, match=match):
            hub.push_results(results, "me/results", endpoint=server.endpoint)

    refused(tmp_path, "no results files")
    (tmp_path / "a.json").write_text("[]")
    refused(tmp_path / "a.json", "not an object")
    refused(tmp_path / "b.json", "no results file")
    (tmp_path / "a.json").write_text("{}")
    refused([tmp_path / "a.json", tmp_path / "." / "a.json"], "Two results files")
    assert not server.calls
