"""Benchmark sets on disk: the customary layouts, names that carry a scale, lists, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.photos import Pair, find_pairs, pair_folders, read_pair, read_pixels, to_tensor
from zoo.pictures.read import open_picture
from zoo.pictures.write import write_picture


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(source: Path, scale: int = 1) -> list[tuple[str, str | None]]:
    pairs = find_pairs(source, scale)
    return [(pair.clean.stem, pair.degraded[0].parent.name if pair.degraded else None) for pair in pairs]


def test_a_folder_of_clean_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.jpg", "deep/c.webp", "notes.txt")
    assert found(tmp_path) == [("a", None), ("b", None), ("c", None)]


def test_super_resolution_sets(tmp_path: Path) -> None:
    """Set5's layout: HR, and one folder a scale with the scale in the names too."""
    touch(tmp_path, "HR/baby.png", "HR/fox2.png")
    touch(tmp_path, *(f"LR_bicubic/X{scale}/{name}x{scale}.png" for scale in (2, 4) for name in ("baby", "fox2")))
    assert found(tmp_path, 2) == [("baby", "X2"), ("fox2", "X2")]
    assert found(tmp_path, 4) == [("baby", "X4"), ("fox2", "X4")]
    with pytest.raises(ValueError, match=r"no degraded version at scale 3 of baby.png"):
        find_pairs(tmp_path, 3)


def test_flat_and_equal_names(tmp_path: Path) -> None:
    touch(tmp_path, "GT/baby.png", "LRbicx4/baby.png", "LRbicx2/baby.png")
    assert found(tmp_path, 4) == [("baby", "LRbicx4")]
    rain = touch(tmp_path / "rain", "target/1.png", "target/2.png", "input/1.png", "input/2.jpg")
    assert found(rain) == [("1", "input"), ("2", "input")]
    alone = touch(tmp_path / "alone", "HR/a.png")
    assert found(alone, 2) == [("a", None)]


def test_pairs_in_two_folders(tmp_path: Path) -> None:
    """Equal paths belong together, whatever suffix; where no name fits, the order of the names decides, 2 before 10."""
    touch(tmp_path, "target/a/1.png", "target/b/1.png", "input/a/1.jpg", "input/b/1.jpg", "input/b/2.jpg")
    pairs = pair_folders(tmp_path / "target", [tmp_path / "input"])
    assert [pair.degraded for pair in pairs] == [(tmp_path / "input" / name,) for name in ("a/1.jpg", "b/1.jpg")]
    touch(tmp_path, "GT/2_GT.png", "GT/10_GT.png", "GT/1_GT.png", "NOISY/1.png", "NOISY/10.png", "NOISY/2.png")
    pairs = pair_folders(tmp_path / "GT", [tmp_path / "NOISY"])
    assert {pair.clean.stem: pair.degraded[0].stem for pair in pairs} == {"1_GT": "1", "2_GT": "2", "10_GT": "10"}
    low = touch(tmp_path / "low", "HR/a.png", "HR/ab.png", "LR/abx2.png", "LR/ax2.png")
    pairs = pair_folders(low / "HR", [low / "LR"], scale=2)
    assert [(pair.clean.stem, pair.degraded[0].stem) for pair in pairs] == [("a", "ax2"), ("ab", "abx2")]


def test_missing_partners(tmp_path: Path) -> None:
    touch(tmp_path, *(f"target/{number}.png" for number in range(5)), "input/0.png", "input/1.png", "none/x.png")
    with pytest.raises(ValueError, match=r"input has no degraded version of 2\.png and 2 others"):
        pair_folders(tmp_path / "target", [tmp_path / "input"])
    with pytest.raises(ValueError, match=r"none has no degraded version of 0\.png and 4 others"):
        pair_folders(tmp_path / "target", [tmp_path / "none"])
    others = touch(tmp_path / "others", *(f"{name}.png" for name in "abcde"))
    with pytest.raises(ValueError, match=r"others has no degraded version at scale 2 of 0\.png and 4 others"):
        pair_folders(tmp_path / "target", [others], scale=2)
    with pytest.raises(FileNotFoundError, match="No folder"):
        pair_folders(tmp_path / "target", [tmp_path / "nowhere"])


def test_views_of_a_dual_pixel_sensor(tmp_path: Path) -> None:
    """DPDD: one network takes both views, the others the image of both together."""
    names = [f"{folder}/{index}.png" for folder in ("inputC", "inputL", "inputR", "target") for index in (1, 2)]
    touch(tmp_path, *names, "indoor_labels.txt")
    assert found(tmp_path) == [("1", "inputC"), ("2", "inputC")]
    both = find_pairs(tmp_path, views=2)
    assert [[path.parent.name for path in pair.degraded] for pair in both] == [["inputL", "inputR"]] * 2
    assert [{path.stem for path in (pair.clean, *pair.degraded)} for pair in both] == [{"1"}, {"2"}]
    (tmp_path / "indoor.txt").write_text("2.png\n")
    assert find_pairs(tmp_path / "indoor.txt", views=2) == both[1:]
    with pytest.raises(FileNotFoundError, match="no folders inputL and inputR"):
        find_pairs(touch(tmp_path / "one", "target/1.png", "input/1.png"), views=2)


def test_depth_of_pixels(tmp_path: Path) -> None:
    """Single images are read with 8 bits, as OpenCV does; the two views and their truth keep 16."""
    rng = np.random.default_rng(0)
    deep = [rng.integers(0, 65536, (6, 5, 3), dtype=np.uint16) for _ in range(3)]
    for name, pixels in zip(("left", "right", "clean"), deep, strict=True):
        write_picture(open_picture(pixels), tmp_path / f"{name}.png")
    left, right, clean = (tmp_path / f"{name}.png" for name in ("left", "right", "clean"))
    assert np.array_equal(read_pixels(left, "RGB"), deep[0] >> 8)
    source, target = read_pair(Pair(clean, (left, right)), "RGB")
    assert source is not None
    assert source.dtype == target.dtype == np.float32
    assert np.array_equal((source * 65535).round(), np.concatenate(deep[:2], axis=2))
    assert np.array_equal((target * 65535).round(), deep[2])
    single, target = read_pair(Pair(clean, (left,)), "RGB")
    assert single is not None
    assert single.dtype == target.dtype == np.uint8
    Image.fromarray(deep[0][..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(read_pixels(tmp_path / "gray.png", "RGB"), (deep[0][..., :1] >> 8).repeat(3, 2))
    with pytest.raises(ValueError, match="16-bit colour, which has no customary gray version"):
        read_pixels(left, "L", deep=True)
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    with pytest.raises(ValueError, match="is a CMYK image"):
        read_pixels(tmp_path / "print.jpg", "RGB")


def test_sizes_that_are_no_pair(tmp_path: Path) -> None:
    for name, size in (("large", (8, 6)), ("small", (7, 6)), ("half", (4, 3))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    large, small, half = (tmp_path / f"{name}.png" for name in ("large", "small", "half"))
    degraded, clean = read_pair(Pair(large, (half,)), "RGB", 2)
    assert degraded is not None
    assert (degraded.shape, clean.shape) == ((3, 4, 3), (6, 8, 3))
    for wrong in (Pair(large, (small,)), Pair(small, (large,))):
        with pytest.raises(ValueError, match=r"has [78]x6 pixels and .* [78]x6: not a pair at scale 1"):
            read_pair(wrong, "RGB")
    with pytest.raises(ValueError, match=r"half.png has 4x3 pixels and .*small.png 7x6: not a pair at scale 2"):
        read_pair(Pair(small, (half,)), "RGB", 2)
    with pytest.raises(ValueError, match=r"half.png has 4x3 pixels: too few for scale 4"):
        read_pair(Pair(half), "RGB", 4)
    with pytest.raises(ValueError, match="differ in size: no two views"):
        read_pair(Pair(large, (large, small)), "RGB")


def test_a_list_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "val/12.png", "val/3.jpg", "train/9.png", "train/double.png", "val/double.png")
    listed = tmp_path / "set.txt"
    listed.write_text("3\n12.png\n\n")
    assert found(listed) == [("3", None), ("12", None)]
    listed.write_text("4\n")
    with pytest.raises(FileNotFoundError, match=r"names 4, which is not below"):
        find_pairs(listed)
    listed.write_text("double\n")
    with pytest.raises(ValueError, match="names double, which fits"):
        find_pairs(listed)
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="neither a folder nor a text file"):
        find_pairs(listed)


def test_degraded_images_alone_are_no_set(tmp_path: Path) -> None:
    touch(tmp_path, "LR_bicubic/X2/ax2.png")
    with pytest.raises(FileNotFoundError, match="but not one folder of clean ones"):
        find_pairs(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="No folder"):
        find_pairs(tmp_path / "nowhere")


def test_read_and_turn_into_tensors(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_pixels(tmp_path / "a.png", "RGB"), pixels)
    assert read_pixels(tmp_path / "a.png", "L").shape == (5, 7, 1)
    tensor = to_tensor(pixels[:, ::-1])  # views with negative strides come from flips
    assert tensor.shape == (3, 5, 7)
    assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), pixels[:, ::-1])
