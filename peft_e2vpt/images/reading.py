# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""One image as a viewer shows it: upright, first frame, 8 bits, opaque. Scripts, commands and the demo use this."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # needed by those alone who read images
    from PIL.Image import Image


LFS_POINTER = b"version https://git-lfs"
LARGEST = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}
"""What white may be in a mode of 32 bits; the least that is not below the image's largest value counts."""


def read_image(source: Any, name: str | None = None) -> Image:
    """Reads an image as a viewer shows it, in RGB.

    Args:
        source: a path, the bytes of a file, an open image, or what `datasets` has in a column of images that are not
            decoded, `{"path": ..., "bytes": ...}`.
        name: what an error calls it; by default its path.

    Raises:
        ValueError: it cannot be read. The message names the file and says why.
    """
    from PIL import Image

    name = name or name_of(source)
    if isinstance(source, Image.Image):
        return as_rgb(source)
    content = content_of(source, name)
    try:
        with Image.open(BytesIO(content)) as image:
            return as_rgb(image)
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise ValueError(f"{name} {_reason(error, content, name)}") from error


def as_rgb(image: Image) -> Image:
    """An open image as a viewer shows it, in RGB: the first frame, turned as its camera was held, grey values of more
    than 8 bits scaled to 8, colours of print converted, and white where it is transparent.

    Raises:
        ValueError: its values are neither of 8 nor of 16 bits, nor between 0 and 1.
        OSError: the file is damaged.
    """
    from PIL import Image, ImageOps

    if image.tell() != 0:
        image.seek(0)
    is_png = image.format == "PNG"  # what follows may be a copy, which does not know
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image, is_png)
    if image.mode in ("CMYK", "LAB"):
        return _from_profile(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def name_of(source: Any) -> str:
    """What an error calls an image: its path, as seen from the working directory if it lies there."""
    if isinstance(source, Mapping):
        source = source.get("path")
    if not isinstance(source, (str, Path)):
        return "An image"
    here = Path.cwd()
    return str(Path(source).relative_to(here) if Path(source).is_relative_to(here) else source)


def content_of(source: Any, name: str) -> bytes:
    """The bytes of an image's file.

    Raises:
        ValueError: the file cannot be opened.
    """
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        return source
    if source is None:
        raise ValueError(f"{name} is missing")
    try:
        return Path(source).read_bytes()
    except FileNotFoundError as error:
        what = "is a link to a file that does not exist" if Path(source).is_symlink() else "does not exist"
        raise ValueError(f"{name} {what}") from error
    except PermissionError as error:
        raise ValueError(f"{name} may not be read by this user") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be opened ({error.strerror})") from error


def _reason(error: Exception, content: bytes, name: str) -> str:
    """Why the bytes of a file are no image."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        return "is empty (0 bytes)"
    if content.startswith(LFS_POINTER):
        return "is a pointer of Git LFS: fetch the file itself with git lfs pull"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more pixels than Pillow opens, which are {2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
    if isinstance(error, UnidentifiedImageError):
        suffix = Path(name).suffix.lower()
        known = not suffix or suffix in Image.registered_extensions()
        return "is no image" if known else f"is no image that Pillow can read ({suffix} is unknown to it)"
    if isinstance(error, ValueError) and str(error).startswith("has values"):
        return str(error)
    return f"is damaged ({str(error) or type(error).__name__})"


def _scaled(image: Image, is_png: bool) -> Image:
    """Grey values of 16 or 32 bits, or floating point, as 8 bits."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    least, largest = values.min(), values.max()
    if image.mode not in LARGEST or is_png:  # a grey PNG has at most 16 bits; Pillow 10 opens it with 32
        white = 65535.0
    else:
        white = next((limit for limit in LARGEST[image.mode] if largest <= limit), 0.0)
    if not (white and least >= 0):  # also where a value is not a number
        raise ValueError(f"has values from {least:g} to {largest:g}: save it with 8 or 16 bits")
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def _from_profile(image: Image) -> Image:
    """Colours of print, by the profile in the file if it has a good one, and CIE L*a*b*."""
    from PIL import ImageCms

    source: Any
    profile = image.info.get("icc_profile", b"")
    if image.mode == "CMYK" and not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.createProfile("LAB") if image.mode == "LAB" else ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        if image.mode == "LAB":
            raise
        return image.convert("RGB")  # a viewer shows an image whose profile is broken without it
    assert converted is not None
    return converted
