# SPDX-License-Identifier: Apache-2.0
"""Image files and arrays to bytes: every mode, depth, orientation, transparency, and broken files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs the packages of the trainers")

from PIL import Image
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.data.decode import Decoder
from ssltrain.errors import UserError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every value of a byte once


def ramp_of(dtype: str, top: int) -> np.ndarray:
    """The ramp stretched to 0..top."""
    return np.rint(RAMP.astype(np.float64) * top / 255).astype(dtype)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def rgb(image: Image.Image, **options: Any) -> np.ndarray:
    return np.asarray(Decoder(16, **options).to_rgb(image)).astype(int)


def close(ours: np.ndarray, expected: np.ndarray, within: int = 1) -> bool:
    return bool(np.abs(ours.astype(int) - expected.astype(int)).max() <= within)


# ---- modes of Pillow -----------------------------------------------------------------------------

COLOUR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)
OPAQUE = np.dstack([COLOUR, np.full_like(RAMP, 255)])


def test_every_mode_of_pillow_has_a_test() -> None:
    """A mode that a new Pillow brings must be looked at."""
    assert set(Image.MODES) <= {mode for mode, _, _, _ in MODES} | {"LAB"}


def made(mode: str, source: Image.Image) -> Image.Image:
    image = source.convert(mode)
    assert image.mode == mode
    return image


def deep(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (16, 16), values.tobytes())


L = Image.fromarray(RAMP)
RGB = Image.fromarray(COLOUR)
RGBA = Image.fromarray(OPAQUE)
SMALL_ENDIAN, BIG_ENDIAN = ramp_of("<u2", 65535), ramp_of(">u2", 65535)

# mode, image, what it must become, and by how much bytes may differ
MODES = [
    ("1", L.convert("1", dither=Image.Dither.NONE), grey(np.where(RAMP > 127, 255, 0)), 0),
    ("L", L, grey(RAMP), 0),
    ("P", L.convert("P"), grey(RAMP), 0),
    ("LA", made("LA", L), grey(RAMP), 0),
    ("La", made("La", L.convert("LA")), grey(RAMP), 0),
    ("PA", made("PA", L.convert("P")), grey(RAMP), 0),
    ("RGB", RGB, COLOUR, 0),
    ("RGBA", RGBA, COLOUR, 0),
    ("RGBX", made("RGBX", RGB), COLOUR, 0),
    ("RGBa", made("RGBa", RGBA), COLOUR, 0),
    ("CMYK", made("CMYK", RGB), COLOUR, 0),
    ("YCbCr", made("YCbCr", L.convert("RGB")), grey(RAMP), 1),
    ("HSV", made("HSV", L.convert("RGB")), grey(RAMP), 1),
    ("I", deep("I", ramp_of("<i4", 65535)), grey(RAMP), 0),
    ("F", deep("F", (RAMP / 255).astype("<f4")), grey(RAMP), 0),
    ("I;16", deep("I;16", SMALL_ENDIAN), grey(RAMP), 0),
    ("I;16L", deep("I;16L", SMALL_ENDIAN), grey(RAMP), 0),
    ("I;16B", deep("I;16B", BIG_ENDIAN), grey(RAMP), 0),
    ("I;16N", deep("I;16N", ramp_of("=u2", 65535)), grey(RAMP), 0),
]


@pytest.mark.parametrize(("mode", "image", "expected", "within"), MODES, ids=[m[0] for m in MODES])
def test_a_ramp_in_each_mode(
    mode: str, image: Image.Image, expected: np.ndarray, within: int
) -> None:
    ranges = {"F": "0:1"}.get(mode, "0:65535")
    found = rgb(image, pixel_range=ranges)
    assert image.mode == mode and close(found, expected, within)


def test_lab_becomes_the_colours_it_means() -> None:
    """L* 0, 53.6 and 100 are black, sRGB 128 and white (CIE 1976); a* and b* 0 are neutral."""
    values = np.full((16, 16, 3), 128, np.uint8)
    for row, lightness in ((0, 0.0), (1, 53.585), (2, 100.0)):
        values[row, :, 0] = round(lightness * 2.55)
    values[:, :, 1:] = 0  # Pillow keeps a* and b* as signed bytes
    found = rgb(Image.frombytes("LAB", (16, 16), values.tobytes()))
    assert np.abs(found[:3, 0] - np.array([[0] * 3, [128] * 3, [255] * 3])).max() <= 3


# ---- files ---------------------------------------------------------------------------------------


def folder_of(folder: Path, **images: Image.Image | bytes) -> Path:
    """A flat folder; ``a_png=image`` becomes a.png. A second image lets a test part be set aside."""
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        path = folder / ".".join(name.rsplit("_", 1))
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path)
    return folder


def by_title(data: ImageData) -> dict[str, np.ndarray]:
    """Every image as [H, W, 3] by its name."""
    found = {}
    for part in (data.train, data.test):
        pixels = part.images.read(torch.arange(len(part)))
        for row in range(len(part)):
            found[part.title(row)] = pixels[row].permute(1, 2, 0).numpy()
    return found


def read(folder: Path, **options: Any) -> dict[str, np.ndarray]:
    return by_title(load(f"folder:{folder}", DataOptions(image_size=16, **options)))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(colour_type: int, depth: int, rows: np.ndarray, *more: bytes) -> bytes:
    """A PNG file; ``rows`` are its scan lines as bytes [H, bytes a line]."""
    width = rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type])
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def as_bytes(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(values.tobytes(), np.uint8).reshape(len(values), -1)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_a_16_bit_file_is_scaled_by_its_type(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(ramp_of("<u2", 65535))
    if suffix == "pgm":
        body = b"P5 16 16 65535\n" + ramp_of(">u2", 65535).tobytes()
        folder_of(tmp_path, a_pgm=body, b_pgm=body)
    else:
        folder_of(tmp_path, **{f"a_{suffix}": image, f"b_{suffix}": image})
    data = load(str(tmp_path), DataOptions(image_size=16))
    assert all(close(found, grey(RAMP), 0) for found in by_title(data).values())
    assert data.notes == []


def test_a_pgm_names_its_greatest_value(tmp_path: Path) -> None:
    dark = b"P5 16 16 4095\n" + ramp_of(">u2", 1000).tobytes()
    found = read(folder_of(tmp_path, a_pgm=dark, b_pgm=dark))
    assert close(found["a.pgm"], grey(ramp_of("u1", 62)))


def test_colour_of_16_bits(tmp_path: Path) -> None:
    deep_colour = as_bytes(np.stack([ramp_of(">u2", 65535)] * 3, axis=2))
    file = png(2, 16, deep_colour)
    assert close(read(folder_of(tmp_path, a_png=file, b_png=file))["a.png"], grey(RAMP))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits(tmp_path: Path, depth: int) -> None:
    levels = 2**depth
    values = np.arange(256).reshape(16, 16) % levels
    bits = np.unpackbits(values.astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - depth :]
    file = png(0, depth, np.packbits(bits.reshape(16, -1), axis=1))
    assert close(
        read(folder_of(tmp_path, a_png=file, b_png=file))["a.png"],
        grey(np.rint(values * 255 / (levels - 1))),
        0,
    )


def test_12_bits_in_16_are_seen_over_the_whole_data_set(tmp_path: Path) -> None:
    dark = Image.fromarray(ramp_of("<u2", 400))
    bright = Image.fromarray(ramp_of("<u2", 4095))
    data = load(str(folder_of(tmp_path, a_png=dark, b_png=bright)), DataOptions(image_size=16))
    found = by_title(data)
    assert close(found["b.png"], grey(RAMP), 0)
    assert close(found["a.png"], grey(np.rint(ramp_of("f8", 400) * 255 / 4095)), 0)
    assert data.pixel_range == "0:4095"
    assert len(data.notes) == 1 and "0 was taken for black and 4095 for white" in data.notes[0]
    by_type = read(tmp_path, pixel_range="type")
    assert close(by_type["b.png"], grey(ramp_of("u1", 16)))
    assert close(read(tmp_path, pixel_range="image")["a.png"], grey(RAMP), 0)
    clipped = read(tmp_path, pixel_range="0:400")
    assert close(clipped["a.png"], grey(RAMP), 0) and clipped["b.png"].max() == 255
    # Decoding at every reading gives what decoding once gives.
    assert all(np.array_equal(v, found[k]) for k, v in read(tmp_path, cache_mb=0).items())


def test_a_tiff_may_name_12_bits(tmp_path: Path) -> None:
    packed = ramp_of("<u2", 4095).astype(np.int64).reshape(-1, 2)
    body = (
        np.stack(
            [packed[:, 0] >> 4, (packed[:, 0] & 15) << 4 | packed[:, 1] >> 8, packed[:, 1] & 255],
            axis=1,
        )
        .astype(np.uint8)
        .tobytes()
    )
    tags = [
        (256, 16),
        (257, 16),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 16),
        (279, len(body)),
    ]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file = b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + b"\0" * 4
    data = load(str(folder_of(tmp_path, a_tif=file, b_tif=file)), DataOptions(image_size=16))
    assert close(by_title(data)["a.tif"], grey(RAMP), 0) and data.notes == []


def test_floats_and_wide_integers_need_a_range(tmp_path: Path) -> None:
    unit, wide = (RAMP / 255).astype(np.float32), ramp_of("<i4", 1_000_000)
    floats = folder_of(tmp_path / "f", a_tif=Image.fromarray(unit), b_tif=Image.fromarray(unit))
    assert close(read(floats)["a.tif"], grey(RAMP), 0)
    folder_of(floats, c_tif=Image.fromarray(unit * 300 - 100))
    with pytest.raises(UserError, match=r"c.tif has pixels from -100 to 200.*--pixel-range -100:2"):
        read(floats)
    assert close(read(floats, pixel_range="-100:200")["c.tif"], grey(RAMP), 0)
    assert close(read(floats, pixel_range="image")["a.tif"], grey(RAMP), 0)
    integers = folder_of(tmp_path / "i", a_tif=Image.fromarray(wide), b_tif=Image.fromarray(wide))
    with pytest.raises(UserError, match=r"a.tif has pixels from 0 to 1e\+06.*--pixel-range"):
        read(integers)
    assert close(read(integers, pixel_range="0:1000000")["a.tif"], grey(RAMP), 0)
    unit[0, 0] = np.nan
    folder_of(floats, d_tif=Image.fromarray(unit))
    with pytest.raises(UserError, match="d.tif has pixels that are infinite or not a number"):
        read(floats)
    assert "d.tif" not in read(floats, skip_bad_images=True, pixel_range="image")


@pytest.mark.parametrize("text", ["0", "5:5", "9:1", "a:b", "0:inf", "whole"])
def test_a_range_is_checked(text: str) -> None:
    from ssltrain.config import TrainConfig

    with pytest.raises(UserError, match="--pixel-range must be auto, type, image, or LOW:HIGH"):
        TrainConfig(pixel_range=text).validate()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    """A bright top left corner and a grey top: turned as a viewer would turn it."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:] = 255, 128
    stored = {  # what a camera stores, so that the orientation sets it upright
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
    for name in "ab":
        image.save(tmp_path / f"{name}.{suffix}", exif=exif, **options)
    assert close(read(tmp_path)[f"a.{suffix}"], upright, 6)


def test_transparency_lies_on_the_background(tmp_path: Path) -> None:
    clear = np.dstack([np.full((16, 16, 3), 40), np.full((16, 16), 0)]).astype(np.uint8)
    half = clear.copy()
    half[:, :, 3] = 128
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 10, 10, 200, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "g.gif", transparency=1)
    Image.new("L", (16, 16), 7).save(tmp_path / "l.png", transparency=7)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "k.png", transparency=(1, 2, 3))
    Image.new("LA", (16, 16), (40, 0)).save(tmp_path / "la.png")
    (tmp_path / "d.png").write_bytes(
        png(0, 16, as_bytes(np.full((16, 16), 999, ">u2")), chunk(b"tRNS", struct.pack(">H", 999)))
    )
    folder_of(tmp_path, a_png=Image.fromarray(clear), w_webp=Image.fromarray(clear))
    folder_of(tmp_path, h_png=Image.fromarray(half))
    found = read(tmp_path)
    mixed = found.pop("h.png")
    assert np.abs(mixed.astype(int) - round(40 * 128 / 255 + 255 * 127 / 255)).max() <= 1
    assert len(found) == 8 and all((pixels == 255).all() for pixels in found.values()), found
    assert (read(tmp_path, background="#102030")["a.png"] == [16, 32, 48]).all()


@pytest.mark.parametrize("suffix", ["ppm", "gif", "webp", "tif", "tiff", "bmp", "PNG", "tga"])
def test_suffixes_of_images(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (16, 16), (0, 200, 0))
    for name in "ab":
        image.save(tmp_path / f"{name}.{suffix}", lossless=True)
    assert close(read(tmp_path)[f"a.{suffix}"], np.full((16, 16, 3), [0, 200, 0]), 3)


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 16), c) for c in ("red", "blue"))
    for name in "ab":
        first.save(tmp_path / f"{name}.gif", save_all=True, append_images=[second])
    assert (read(tmp_path)["a.gif"] == [255, 0, 0]).all()


# ---- broken and huge files -----------------------------------------------------------------------


def broken_files() -> dict[str, bytes]:
    whole = png(0, 8, RAMP)
    crc = bytearray(whole)
    crc[len(whole) // 2] ^= 255
    huge = png(0, 8, RAMP)
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    huge = whole[:8] + chunk(b"IHDR", header) + whole[33:]
    return {
        "chunk.png": bytes(crc),
        "cut.png": whole[: len(whole) // 2],
        "text.png": b"not an image",
        "empty.jpg": b"",
        "huge.png": huge,
        "head.png": whole[:20],
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_found_at_once(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, a_png=L, b_png=L, c_png=L)
    (tmp_path / name).write_bytes(broken_files()[name])
    with pytest.raises(UserError, match=f"{name} .*--skip-bad-images") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    if name == "huge.png":
        assert "pixels" in str(caught.value)
    data = load(str(tmp_path), DataOptions(image_size=16, skip_bad_images=True))
    assert sorted(by_title(data)) == ["a.png", "b.png", "c.png"]
    assert len(data.notes) == 1 and data.notes[0].startswith("1 image that cannot be read is left")


def test_all_broken_files_are_counted(tmp_path: Path) -> None:
    for name, content in broken_files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"\(and 5 more\)"):
        read(tmp_path)
    with pytest.raises(UserError, match="none of the 6 images can be read"):
        read(tmp_path, skip_bad_images=True)
    folder_of(tmp_path, a_png=L, b_png=L)
    data = load(str(tmp_path), DataOptions(skip_bad_images=True))
    assert data.notes[0].startswith("6 images that cannot be read are left out; the first: ")


def test_a_dangling_link_is_a_broken_image(tmp_path: Path) -> None:
    folder_of(tmp_path, a_png=L, b_png=L)
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="c.png .*No such file"):
        read(tmp_path)


def test_a_file_that_goes_while_training_is_named(tmp_path: Path) -> None:
    data = load(str(folder_of(tmp_path, a_png=L, b_png=L)), DataOptions(cache_mb=0))
    for name in "ab":
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*[ab].png: it cannot be read"):
        by_title(data)


# ---- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected", "chosen"),
    [
        (ramp_of("<u2", 65535), RAMP, "0:65535"),
        (ramp_of(">u2", 65535), RAMP, "0:65535"),
        (ramp_of("<u2", 4095), RAMP, "0:4095"),
        (ramp_of("<i8", 255), RAMP, "0:255"),
        (RAMP / 255, RAMP, "0:1"),
        ((RAMP / 255).astype(np.float16), RAMP, "0:1"),
        (RAMP > 127, np.where(RAMP > 127, 255, 0), "auto"),
        (RAMP, RAMP, "auto"),
    ],
    ids=["<u2", ">u2", "12 bits", "i8", "f8", "f2", "bool", "u1"],
)
def test_arrays_of_any_type(
    tmp_path: Path, array: np.ndarray, expected: np.ndarray, chosen: str
) -> None:
    np.savez(tmp_path / "a.npz", x_train=array[None], x_test=array[None])
    data = load(str(tmp_path / "a.npz"))
    for part in (data.train, data.test):
        found = part.images.read(torch.tensor([0]))[0, 0].numpy()
        assert close(found, expected, 1 if array.dtype == np.float16 else 0)
    assert data.pixel_range == chosen


def test_arrays_of_unknown_range(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.stack([RAMP, RAMP // 2]) * 3.0 - 9)
    with pytest.raises(UserError, match="a has pixels from -9 to 756.*--pixel-range -9:756"):
        load(str(tmp_path / "a.npz"))
    data = load(str(tmp_path / "a.npz"), DataOptions(pixel_range="image"))
    found = [part.images.read(torch.tensor([0]))[0, 0].numpy() for part in (data.train, data.test)]
    assert any(close(f, RAMP, 0) for f in found) and all(f.max() == 255 for f in found)


def test_arrays_with_transparency(tmp_path: Path) -> None:
    images = np.zeros((6, 5, 5, 4), np.uint8)
    images[:, :, :2, 3] = 255
    np.savez(tmp_path / "a.npz", images=images)
    data = load(str(tmp_path / "a.npz"))
    found = data.train.images.read(torch.tensor([0]))
    assert found.shape == (1, 3, 5, 5)
    assert (found[..., :2] == 0).all() and (found[..., 2:] == 255).all()
