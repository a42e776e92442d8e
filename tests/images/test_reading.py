# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""An image is read as a viewer shows it, and one that cannot be read says why."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("PIL")
from PIL import Image, ImageCms  # noqa: E402

from peft_e2vpt.images import as_rgb, read_image  # noqa: E402


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = np.repeat(RAMP[..., None], 3, axis=2)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------------------------------------ as a viewer shows it
@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm", "JPG"])
def test_colours_of_every_format_are_kept(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    settings = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(COLOURS).save(path, **settings)
    error = 60 if suffix == "JPG" else 0  # a JPEG is not exact, least where colours change from pixel to pixel
    assert np.abs(pixels(read_image(path)) - COLOURS).max() <= error


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_to_8(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert np.array_equal(pixels(read_image(path)), GREY)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_every_order_of_bytes_of_16_bits_is_read(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (16, 16), (RAMP.astype(np.uint16) * 257).astype(order).tobytes())
    assert np.array_equal(pixels(as_rgb(image)), GREY)


@pytest.mark.parametrize(("kind", "scale"), [(np.int32, 1), (np.int32, 257), (np.float32, 1 / 255), (np.float32, 257)])
def test_grey_of_32_bits_is_scaled_by_what_white_must_be(kind: type, scale: float, tmp_path: Path) -> None:
    Image.fromarray((RAMP * np.float64(scale)).astype(kind)).save(tmp_path / "a.tiff")
    assert np.array_equal(pixels(read_image(tmp_path / "a.tiff")), GREY)


def test_a_dark_grey_png_that_an_older_pillow_opens_with_32_bits_stays_dark() -> None:
    image = Image.fromarray(np.full((4, 4), 200, dtype=np.int32))
    image.format = "PNG"
    assert pixels(as_rgb(image)).max() == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBX", "HSV", "YCbCr"])
def test_other_opaque_modes_are_converted(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    assert np.array_equal(pixels(as_rgb(image)), pixels(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    assert (pixels(as_rgb(image)) == 255).all()


@pytest.mark.parametrize(("mode", "suffix"), [("P", "png"), ("L", "png"), ("RGB", "png"), ("P", "gif")])
def test_a_colour_that_stands_for_transparent_is_white(mode: str, suffix: str, tmp_path: Path) -> None:
    image = Image.new(mode, (4, 4), 0)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / f"a.{suffix}", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (pixels(read_image(tmp_path / f"a.{suffix}")) == 255).all()


def test_half_transparent_colours_are_mixed_with_white() -> None:
    assert pixels(as_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(orientation: int, tmp_path: Path) -> None:
    upright = Image.new("RGB", (16, 8))
    upright.paste("white", (0, 0, 8, 4))  # in the upper left
    turn = Image.Transpose
    held = [turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE]
    held += [turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(held[orientation - 2])
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(read_image(tmp_path / "a.png")), pixels(upright))


def test_cmyk_is_converted_and_a_broken_profile_does_not_stop_it(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for name, settings in (("plain", {}), ("broken", {"icc_profile": b"no profile"})):
        image.save(tmp_path / f"{name}.jpg", quality=95, **settings)
        red, green, blue = pixels(read_image(tmp_path / f"{name}.jpg"))[4, 4]
        assert red > 200 and green < 40 and blue < 40


def test_lab_is_converted(tmp_path: Path) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (4, 4), (200, 40, 60)), to_lab)
    assert lab is not None
    lab.save(tmp_path / "a.tiff")
    assert np.abs(pixels(read_image(tmp_path / "a.tiff"))[0, 0] - [200, 40, 60]).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "tiff", "png"])
def test_of_an_animation_the_first_frame_is_read_wherever_it_stands(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "black")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert pixels(read_image(path)).min() > 250
    with Image.open(path) as image:
        image.seek(1)
        assert pixels(as_rgb(image)).min() > 250


def test_path_bytes_open_image_and_entry_of_a_dataset_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "a[1] ü.png"
    Image.fromarray(COLOURS).save(path)
    content = path.read_bytes()
    sources = [path, str(path), content, {"path": str(path), "bytes": None}, {"path": None, "bytes": content}]
    with Image.open(path) as image:
        assert all(np.array_equal(pixels(read_image(source)), COLOURS) for source in [*sources, image])


def test_datasets_and_this_package_show_the_same_photograph(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    decoded = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    assert np.array_equal(pixels(as_rgb(decoded[0]["image"])), pixels(read_image(tmp_path / "a.png")))


# --------------------------------------------------------------------------------------------------- what is not read
def png(size: tuple[int, int] = (40, 40)) -> bytes:
    file = BytesIO()
    Image.effect_noise(size, 90).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = BytesIO()
    Image.effect_noise((200, 200), 90).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"", "is empty (0 bytes)"),
        ("a.jpg", b"<!doctype html><p>404", "is no image"),
        ("a.heic", b"\0\0\0\x18ftypheic", "is no image that Pillow can read (.heic is unknown to it)"),
        ("a.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
        ("a.jpg", jpeg()[:3000], "is damaged (image file is truncated"),
        ("a.png", png()[:600], "is damaged (image file is truncated"),
        ("a.png", png()[:60] + b"zz" + png()[62:], "is damaged"),
    ],
    ids=["empty", "page", "heic", "lfs", "jpeg", "png", "bits"],
)
def test_a_bad_file_is_named_with_the_reason(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_image(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name} {reason}")


def test_a_file_that_would_unpack_to_gigabytes_is_not_unpacked(tmp_path: Path, monkeypatch) -> None:
    Image.new("1", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png has more pixels than Pillow opens, which are 2,000"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("values", [[-1.0, 3.0], [0.0, 1e9], [0.0, float("nan")], [0.0, float("inf")]])
def test_values_without_black_and_white_are_refused(values: list[float], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff has values from .* to .*: save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tiff")


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match="is a link to a file that does not exist"):
        read_image(tmp_path / "link.png")
    with pytest.raises(ValueError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"cannot be opened \(Is a directory\)"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="Image 3 is missing"):
        read_image(None, "Image 3")


def test_a_file_of_somebody_else_says_so(tmp_path: Path, monkeypatch) -> None:
    def refuse(self: Path) -> bytes:  # a test may run as root, who reads all
        raise PermissionError(13, "Permission denied", os.fspath(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"a\.png may not be read by this user"):
        read_image(tmp_path / "a.png")
