"""Publishing and downloading with the real Hub client, against a local server that speaks the Hub's API."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers import DiffusionPipeline
from hub_server import HubServer, Repository, use_hub
from huggingface_hub import constants
from safetensors.torch import save
from tiny_folders import classifier_folder, denoiser_folder

import zoo
from zoo import hub
from zoo.cli import main
from zoo.weights import CheckpointError

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Start a Hub of our own and point the client at it, with an empty cache and nobody logged in."""
    server = HubServer()
    use_hub(monkeypatch, server.url, tmp_path / "cache")
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a tiny timm model, laid out as a model card is."""
    return classifier_folder(tmp_path / "tiny")


def test_round_trip_of_a_timm_model(server: HubServer, folder: Path) -> None:
    """What is uploaded in one commit comes back, bit for bit, through timm and through zoo."""
    url = hub.upload(folder, "org/tiny", token="secret")
    repository = server.repositories["org/tiny"]
    assert url == f"{server.url}/org/tiny/commit/{repository.sha}"
    assert repository.commits == 1
    assert sorted(repository.files) == ["README.md", "config.json", "model.safetensors"]
    x = torch.rand(1, 3, 16, 16)
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
    assert torch.equal(timm.create_model("hf-hub:org/tiny", pretrained=True).eval()(x), expected)
    assert torch.equal(zoo.create_model("org/tiny")(x), expected)
    assert torch.equal(zoo.create_model(f"org/tiny@{repository.sha}")(x), expected)


def test_download_uses_the_cache(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is fetched once; offline it is still found."""
    hub.upload(folder, "org/tiny", token="secret")
    path = hub.download("org/tiny", "model.safetensors")
    assert path.read_bytes() == (folder / "model.safetensors").read_bytes()
    fetched = sum(request.startswith("GET /cdn/") for request in server.requests)
    assert hub.download("org/tiny", "model.safetensors") == path
    assert sum(request.startswith("GET /cdn/") for request in server.requests) == fetched == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download("org/tiny", "model.safetensors") == path


def test_flipped_byte_in_the_cache_is_found(server: HubServer, folder: Path) -> None:
    """The Hub's own digest of a large file is compared, whether or not a card came with it."""
    hub.upload(folder, "org/tiny", token="secret")
    blob = hub.download("org/tiny", "model.safetensors").resolve()
    assert hub.blob_digest(blob) == blob.name
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        timm.create_model("hf-hub:org/tiny", pretrained=True)


def test_round_trip_of_a_denoiser(server: HubServer, tmp_path: Path) -> None:
    """A diffusers folder comes back as a pipeline and as its transformer."""
    expected = zoo.create_pipeline(str(denoiser_folder(tmp_path / "dit"))).transformer.state_dict()
    hub.upload(tmp_path / "dit", "org/dit", token="secret")
    for model in (
        DiffusionPipeline.from_pretrained("org/dit").transformer,
        zoo.create_pipeline("org/dit").transformer,
        zoo.create_model("org/dit"),
    ):
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_publish_command(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`zoo publish` refuses a bad card, uploads nothing in a dry run, and prints the commit."""
    assert main(["publish", str(folder), "--repo-id", "org/tiny", "--token", "secret"]) == 1
    assert "no metrics" in capsys.readouterr().err
    monkeypatch.setattr("zoo.cards.card.check_card", lambda folder: [])
    assert main(["publish", str(folder), "--repo-id", "org/tiny", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] is None
    assert not server.repositories
    assert main(["publish", str(folder), "--repo-id", "org/tiny", "--token", "secret", "-q"]) == 0
    assert capsys.readouterr().out.strip() == f"{server.url}/org/tiny/commit/{server.repositories['org/tiny'].sha}"


@pytest.mark.parametrize(
    ("repo_id", "filename", "expected"),
    [
        ("org/none", "config.json", "shows no repository 'org/none'"),
        ("org/open", "none.bin", "has no file 'none.bin'"),
        ("org/open@v9", "config.json", "no such revision"),
        ("org/gated", "config.json", "gated"),
        ("a/b/c", "config.json", "must be 'org/name'"),
    ],
)
def test_download_errors_are_one_clear_line(server: HubServer, repo_id: str, filename: str, expected: str) -> None:
    server.repositories |= {"org/open": Repository(), "org/gated": Repository(gated=True)}
    with pytest.raises(hub.HubError, match=expected) as caught:
        hub.download(repo_id, filename)
    assert "\n" not in str(caught.value)


def test_missing_model_names_the_repository(server: HubServer) -> None:
    with pytest.raises(hub.HubError, match="org/none"):
        zoo.create_model("org/none")


def test_upload_errors(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, a wrong one, and a card that the Hub does not take."""
    for token in (None, "wrong"):
        with pytest.raises(hub.HubError, match="log in with `hf auth login`"):
            hub.upload(folder, "org/tiny", token=token)
    (folder / "README.md").write_text("no front matter")
    with pytest.raises(hub.HubError, match="no front matter"):
        hub.upload(folder, "org/tiny", token="secret")
    server.broken.add("/api/repos/create")
    with pytest.raises(hub.HubError, match="answered 400"):
        hub.upload(folder, "org/tiny", token="secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE"):
        hub.upload(folder, "org/tiny", token="secret")


def test_offline_names_the_file_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE answers at once, and no socket is opened."""
    use_hub(monkeypatch, "https://hub.example", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match=r"hf download org/tiny model\.safetensors"):
        hub.download("org/tiny", "model.safetensors")


def test_no_connection_names_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HubServer()
    use_hub(monkeypatch, server.url, tmp_path)
    server.stop()  # nobody listens on this port now
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
    with pytest.raises(hub.HubError, match=r"127\.0\.0\.1:\d+ cannot be reached"):
        hub.download("org/tiny", "config.json")
    with pytest.raises(hub.HubError, match="ConnectError"):
        hub.upload(tmp_path, "org/tiny", token="secret")


def test_a_busy_hub_answers_soon(server: HubServer, folder: Path) -> None:
    """Status, file, folder and variable within ten seconds; the cached file where there is one."""
    hub.upload(folder, "org/tiny", token="secret")
    kept = hub.download("org/tiny", "config.json")
    for status in (429, 500):
        server.failing = status
        begun = time.monotonic()
        with pytest.raises(hub.HubError, match=rf"answered {status} for org/tiny/README\.md.*HF_HUB_CACHE"):
            hub.download("org/tiny", "README.md")
        with pytest.raises(hub.HubError, match=f"answered {status} for org/tiny"):
            hub.list_files("org/tiny")
        assert hub.download("org/tiny", "config.json") == kept
        assert time.monotonic() - begun < 30


def test_weights_of_timm(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer at once for timm's own models, which timm would ask for again and again; then from the cache."""
    monkeypatch.setattr(hub, "_WAITS", (0.0, 0.0))
    name, repo = "test_vit.r160_in1k", "timm/test_vit.r160_in1k"
    server.failing = 500
    with pytest.raises(hub.HubError, match=rf"answered 500 for {repo}/model\.safetensors.*HF_HUB_CACHE"):
        zoo.create_model(name, pretrained=True)
    server.failing = 0
    model = timm.create_model("test_vit").eval()
    server.repositories[repo] = Repository({"model.safetensors": save(model.state_dict())})
    image = torch.randn(1, 3, 160, 160)
    for failing in (0, 500):  # the second time it is in the cache
        server.failing = failing
        found = zoo.create_model(name, pretrained=True)
        assert torch.equal(found(image), model(image))
        assert found.pretrained_cfg["file"] is None


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["RePaViT-Tiny.pth", "RePaViT-Small.pth", "RePaSwin-Tiny.pth", "README.md"], "RePaViT-Tiny.pth"),
        (["repa_deit_tiny_0.5.pth", "repa_deit_tiny_merged.pth", "repa_swin_tiny.pth"], "repa_deit_tiny_0.5.pth"),
        (["weights/deit_t.pth.tar", "weights/swin_t.pth.tar"], "weights/deit_t.pth.tar"),
        (["LV-ViT-S.pth", "deit_small.pth"], None),
        (["repavit_tiny_a.pth", "repavit_tiny_b.pth"], None),
    ],
)
def test_file_that_names_the_variant_is_taken(
    server: HubServer, files: list[str], taken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """RePaViT's repository is known, its file names are not: it is listed once, and what is taken must fit."""
    arguments: dict[str, Any] = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    model = timm.create_model("repavit_tiny", **arguments).eval()
    content = io.BytesIO()
    torch.save({"model": model.state_dict()}, content)
    server.repositories["Ackesnal/RePaViT"] = Repository({file: content.getvalue() for file in files})
    if taken is None:
        with pytest.raises(CheckpointError, match=rf"Ackesnal/RePaViT .*name.* repavit_tiny.*{files[0]}"):
            timm.create_model("repavit_tiny.in1k", pretrained=True, **arguments)
        return
    found = timm.create_model("repavit_tiny.in1k", pretrained=True, **arguments).eval()
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(found(x), model(x))
    assert f"took {taken} of Ackesnal/RePaViT" in caplog.text
    assert sum("api/models" in request for request in server.requests) == 1
    with pytest.raises(CheckpointError, match="does not fit"):
        timm.create_model("repavit_tiny.in1k", pretrained=True, **{**arguments, "depth": 2})
