"""Loading and publishing: bugs of one line that the other tests would let live."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors.torch import save
from torch import nn

from zoo import hub, weights
from zoo.cfg import ModelCfg
from zoo.record import is_safetensors, kept_by_lightning, record_of
from zoo.weights import CheckpointError, load_strict, merge_adapters, read_checkpoint, save_checkpoint, verify_component


@pytest.mark.parametrize(("own", "given"), [((2, 3), (3, 2)), ((6, 1), (6,)), ((4,), (2, 2)), ((4,), (1, 4))])
def test_a_misshaped_tensor_of_equal_size_is_refused(own: tuple[int, ...], given: tuple[int, ...]) -> None:
    """A transposed or flattened weight has as many numbers, and is another weight."""
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.zeros(own)))
    with pytest.raises(CheckpointError, match=r"wrong shape: w \("):
        load_strict(module, {"w": torch.ones(given)})
    assert not module.w.any()


def test_a_component_with_a_transposed_weight_is_refused(tmp_path: Path) -> None:
    save_checkpoint(nn.Linear(2, 3, bias=False).state_dict(), tmp_path / "transformer" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wrong shape: weight \(3, 2\) for \(2, 3\)"):
        verify_component(tmp_path, "transformer", nn.Linear(3, 2, bias=False))


def test_a_component_in_several_files_is_checked_as_one(tmp_path: Path) -> None:
    """Keys of all files count, and a damaged last file is found."""
    module = nn.Linear(2, 2)
    save_checkpoint({"weight": module.weight}, tmp_path / "transformer" / "a.safetensors")
    with pytest.raises(CheckpointError, match="missing: bias"):
        verify_component(tmp_path, "transformer", module)
    save_checkpoint({"bias": module.bias}, tmp_path / "transformer" / "b.safetensors")
    verify_component(tmp_path, "transformer", module)
    save_checkpoint({"bias": torch.full((2,), torch.nan)}, tmp_path / "transformer" / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors holds values that are not finite in bias"):
        verify_component(tmp_path, "transformer", module)


def test_only_a_prefix_of_all_keys_is_removed(tmp_path: Path) -> None:
    """One key without it, and the prefix is a part of the names; in the middle of a name it always is."""
    for keys in (["model.w", "v"], ["net.model.w", "net.module.v"]):
        torch.save({key: torch.ones(2) for key in keys}, tmp_path / "c.pth")
        assert sorted(read_checkpoint(tmp_path / "c.pth")) == sorted(keys)


def test_values_of_later_keys_are_looked_at_and_whole_numbers_pass(tmp_path: Path) -> None:
    values = {"count": torch.tensor(2**40), "a": torch.ones(3), "z": torch.tensor([1.0, float("-inf")])}
    torch.save(values, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="not finite in z"):
        read_checkpoint(tmp_path / "c.pth")


def test_saved_weights_are_cast_and_described(tmp_path: Path) -> None:
    """Types are kept unless one is asked for; whole numbers always; the header has the text given."""
    from safetensors import safe_open

    values = {"w": torch.ones(2, dtype=torch.float64), "n": torch.tensor([3])}
    save_checkpoint(values, tmp_path / "m.safetensors", metadata={"note": "x"})
    assert read_checkpoint(tmp_path / "m.safetensors")["w"].dtype == torch.float64
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
    save_checkpoint(values, tmp_path / "m.safetensors", dtype=torch.bfloat16)
    read = read_checkpoint(tmp_path / "m.safetensors")
    assert (read["w"].dtype, read["n"].dtype) == (torch.bfloat16, torch.int64)


def test_the_stem_of_four_channels_keeps_the_response(tmp_path: Path) -> None:
    """More channels repeat the first ones, scaled so that an equal picture gives an equal map."""
    size: dict[str, Any] = dict(embed_dim=16, depth=1, num_heads=2, img_size=16, patch_size=8)
    model = timm.create_model("repavit_tiny", num_classes=5, **size)
    digest = save_checkpoint(model.state_dict(), tmp_path / "m.safetensors")
    cfg = ModelCfg(
        file=str(tmp_path / "m.safetensors"),
        sha256=digest,
        num_classes=5,
        input_size=(3, 16, 16),
        first_conv="patch_embed.proj",
        classifier="head",
    )
    wide = timm.create_model("repavit_tiny", pretrained=True, pretrained_cfg=cfg, in_chans=6, **size)
    assert torch.equal(wide.head.weight, model.head.weight), "as many classes: the head is loaded"
    same = wide.patch_embed.proj(torch.ones(1, 6, 16, 16))
    torch.testing.assert_close(same, model.patch_embed.proj(torch.ones(1, 3, 16, 16)))


def test_weights_are_converted_before_they_are_loaded() -> None:
    model, seen = nn.Linear(2, 2, bias=False), []

    def filter_fn(state_dict: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
        seen.append(module)
        return {key.removeprefix("theirs."): value for key, value in state_dict.items()}

    weights.load_pretrained(model, ModelCfg(state_dict={"theirs.weight": torch.ones(2, 2)}), filter_fn)
    weights.load_pretrained(model, ModelCfg(state_dict={"weight": torch.full((2, 2), 3.0)}))
    assert seen == [model]
    assert (model.weight == 3).all()


@pytest.mark.parametrize("head", [b"\x08\x07onnx", b"\x08\x07pytorch", b"\x08\x07else", b"pytorch"])
def test_an_onnx_file_of_another_name_is_told(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(head + bytes(64))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "model.bin")
    assert ("an ONNX model" in str(error.value)) == (head in (b"\x08\x07onnx", b"\x08\x07pytorch"))


def test_safetensors_without_a_suffix_are_known_by_a_header_that_fits(tmp_path: Path) -> None:
    """With tensors of no values the header ends the file; a byte less, and it is cut short or something else."""
    whole = save({"none": torch.empty(0)})
    assert int.from_bytes(whole[:8], "little") + 8 == len(whole)
    (tmp_path / "blob").write_bytes(whole)
    assert is_safetensors(tmp_path / "blob")
    (tmp_path / "blob").write_bytes(whole[:-1])
    assert not is_safetensors(tmp_path / "blob")


def test_hyper_parameters_of_lightning_are_a_record() -> None:
    kept: dict[str, Any] = {"model": "repavit_tiny.cifar10", "num_classes": 3, "model_args": {"depth": 2}}
    record = kept_by_lightning({"hyper_parameters": kept})
    assert record is not None
    assert (record.architecture, record.base) == ("repavit_tiny", "repavit_tiny.cifar10")
    assert (record.num_classes, record.model_args) == (3, {"depth": 2})
    assert kept_by_lightning({"hyper_parameters": {"model": "a path/of something"}}) is None
    assert kept_by_lightning({}) is None


@pytest.mark.parametrize(("channels", "mean"), [(1, (0.449,)), (4, (0.485, 0.456, 0.406, 0.485))])
def test_means_follow_the_channels(channels: int, mean: tuple[float, ...]) -> None:
    size: dict[str, Any] = dict(embed_dim=16, depth=1, num_heads=2, img_size=16, patch_size=8)
    record = record_of(timm.create_model("repavit_tiny", in_chans=channels, **size))
    assert record.pretrained_cfg["mean"] == pytest.approx(mean)


def test_an_address_is_asked_for_its_head_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched twice, and the folder in the advice is the one that is looked in."""
    asked = []

    def urlopen(request: Any, timeout: float) -> Any:
        asked.append(request.get_method())
        raise OSError("away")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    with pytest.raises(hub.HubError, match=re.escape(f"into {tmp_path} (TORCH_HOME)")):
        weights._fetch("https://example.org/m.pth", tmp_path)
    assert asked == ["HEAD"]


# --- the Hub


def test_a_revision_and_a_folder_go_to_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *names, **options: asked.append(options) or "file")
    hub.download("org/name@v2", "m.safetensors", cache_dir=tmp_path)
    hub.download("org/name", "m.safetensors")
    assert asked == [{"revision": "v2", "cache_dir": tmp_path}, {"revision": None, "cache_dir": None}]


def test_a_file_that_was_searched_for_comes_into_the_given_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(weights, "_search", lambda architecture, repo_id: f"{architecture}.safetensors")
    monkeypatch.setattr(hub, "download", lambda *names, cache_dir: asked.append((*names, cache_dir)) or tmp_path)
    weights._locate(ModelCfg(architecture="a", hf_hub_id="org/name", hub_search=True), tmp_path)
    assert asked == [("org/name", "a.safetensors", tmp_path)]


def test_a_folder_inside_a_hidden_one_is_published(tmp_path: Path) -> None:
    """What is hidden counts from the folder on: its own place may be ~/.cache/__run__."""
    folder = tmp_path / ".cache" / "__run__" / "model"
    for name in ("README.md", "transformer/model.safetensors", ".git/config", "__pycache__/a.pyc", ".hidden", "a/.b/c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = [path.relative_to(folder).as_posix() for path in hub.files_of(folder)]
    assert found == ["README.md", "transformer/model.safetensors"]


@pytest.mark.parametrize(
    ("place", "known"),
    [(("blobs", "a" * 64), True), (("blobs", "a" * 40), False), (("files", "a" * 64), False), (("blobs", "a" * 65), 0)],
)
def test_only_large_files_of_the_cache_have_a_digest(tmp_path: Path, place: tuple[str, str], known: bool) -> None:
    """The Hub's cache keeps small files under another digest, of 40 digits."""
    blob = tmp_path.joinpath(*place)
    blob.parent.mkdir()
    blob.touch()
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert hub.blob_digest(link) == (place[1] if known else None)


def test_merged_adapters_leave_plain_weights_only() -> None:
    """W + 2 B A, of linear layers and convolutions; the rest, biases too, stays."""
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [5.0]])
    state = {"norm.weight": torch.ones(2)}
    for name, weight in (("fc", torch.zeros(2, 2)), ("conv", torch.zeros(2, 2, 1, 1))):
        state |= {f"{name}.base_layer.weight": weight, f"{name}.base_layer.bias": torch.ones(2)}
        shape = weight.shape[2:]
        state |= {f"{name}.lora_A.default.weight": down.view(1, 2, *shape)}
        state |= {f"{name}.lora_B.default.weight": up.view(2, 1, *shape)}
    merged = merge_adapters(state)
    assert set(merged) == {"norm.weight", "fc.weight", "fc.bias", "conv.weight", "conv.bias"}
    expected = torch.tensor([[6.0, 12.0], [10.0, 20.0]])
    assert torch.equal(merged["fc.weight"], expected)
    assert torch.equal(merged["conv.weight"], expected[..., None, None])


@pytest.mark.parametrize(
    ("architecture", "files", "found"),
    [
        ("repavit_tiny", ["RePaViT-Tiny.pth", "RePaViT-Small.pth", "README.md"], "RePaViT-Tiny.pth"),
        ("repavit_tiny", ["RePaDeiT-T.pth", "RePaDeiT-S.pth", "tiny.txt"], "RePaDeiT-T.pth"),
        ("repavit_tiny", ["repa_vit_tiny.pth", "repa_vit_tiny_merged.pth", "repa_swin_tiny.pth"], "repa_vit_tiny.pth"),
        ("repavit_small", ["RePaLVViT-S.pth", "RePaViT-S.safetensors"], "RePaViT-S.safetensors"),
        ("repaswin_base", ["RePaViT-Base.pth", "RePa-Swin-Base.pth"], "RePa-Swin-Base.pth"),
        ("repamlpmixer_s32", ["mixer_s32.pth"], None),
        ("repavit_huge", ["RePaViT-Large.pth"], None),
        ("repavit_tiny", ["a/RePaViT-Tiny.pth", "b/RePaViT-Tiny.pth"], None),
        ("repavit_tiny", ["RePaViT-Tiny-deploy.pth", "RePaViT-Tiny-merged.pth"], None),
    ],
)
def test_the_weight_file_of_a_repository_is_found_by_family_and_size(
    architecture: str, files: list[str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training form, and only where one file alone has the name."""
    monkeypatch.setattr(hub, "list_files", lambda repo_id: files)
    if found is not None:
        assert weights._search(architecture, "org/name") == found
        return
    with pytest.raises(CheckpointError, match=f"file.* name.? {architecture}"):
        weights._search(architecture, "org/name")


def _answer(code: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=code, headers={}, request=None)
    return HfHubHTTPError("busy", response=response)


@pytest.mark.parametrize(
    ("code", "words"), [(401, "refused access"), (403, "refused access"), (404, "answered 404"), (500, "answered 500")]
)
def test_a_refusal_says_that_a_token_is_needed(code: int, words: str) -> None:
    with pytest.raises(hub.HubError, match=words), hub._explained("org/name"):
        raise _answer(code)


@pytest.mark.parametrize(
    ("code", "left", "asked"), [(429, 1.5, 2), (503, 1.5, 2), (429, 0.5, 1), (500, -2.0, 1), (404, 1.5, 1)]
)
def test_a_busy_hub_is_asked_again_only_while_there_is_time(
    code: int, left: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that comes with `left` seconds beyond the next wait: one of them is kept for asking."""
    now, calls = [100.0], []
    monkeypatch.setattr(hub.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def ask(seconds: float) -> str:
        calls.append(seconds)
        if len(calls) > 1:
            return "here"
        now[0] += hub._PATIENCE - hub._WAITS[0] - left
        raise _answer(code)

    if asked == 2:
        assert hub._few_tries(ask) == "here"
        assert calls == [hub._PATIENCE, pytest.approx(left)]
    else:
        with pytest.raises(HfHubHTTPError):
            hub._few_tries(ask)
    assert len(calls) == asked


def test_files_of_a_repository_are_listed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["model.safetensors", "README.md", "a/b.txt"]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    asked = []
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda self, name, **given: asked.append((name, given)) or info)
    assert hub.list_files("org/name@v1") == sorted(names)
    ((name, given),) = asked
    assert (name, given["revision"]) == ("org/name", "v1")
    assert 0 < given["timeout"] <= hub._PATIENCE
    info.siblings = None
    assert hub.list_files("org/name") == []


@pytest.mark.parametrize(
    ("error", "filename", "words"),
    [
        (HTTPError("too late"), "a.txt", r"name/a\.txt is not in the download cache .* \(HTTPError\)"),
        (HTTPError("too late"), None, r"cannot be reached for org/name \(HTTPError\)"),
        (OSError("disk full"), "a.txt", r"^org/name/a\.txt: OSError: disk full$"),
    ],
)
def test_what_failed_is_said(error: Exception, filename: str | None, words: str) -> None:
    with pytest.raises(hub.HubError, match=words), hub._explained("org/name", filename):
        raise error
