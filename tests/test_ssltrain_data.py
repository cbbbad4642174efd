# SPDX-License-Identifier: Apache-2.0
"""Each data format, from files made here, and the messages for files that are broken."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs the packages of the trainers")

from PIL import Image
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 2


def everything(data: ImageData) -> tuple[np.ndarray, np.ndarray]:
    """Training images and labels as arrays."""
    images = data.train.images.read(torch.arange(len(data.train)))
    assert images.dtype == torch.uint8
    assert data.train.labels is not None and data.train.labels.dtype == np.int64
    return images.numpy(), data.train.labels


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def idx_folder(folder: Path, dot: str = "-", end: str = "") -> Path:
    for part, rows in (("train", slice(0, 14)), ("t10k", slice(14, 20))):
        write_idx(folder / f"{part}-images{dot}idx3-ubyte{end}", IMAGES[rows])
        write_idx(folder / f"{part}-labels{dot}idx1-ubyte{end}", LABELS[rows])
    return folder


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    data, again = load("digits"), load("digits")
    assert (len(data.train), len(data.test), data.channels, data.size) == (1437, 360, 1, (8, 8))
    assert np.array_equal(data.test.labels, again.test.labels)
    shares = np.bincount(data.test.labels) / np.bincount(load_digits().target)
    assert shares.min() > 0.18 and shares.max() < 0.22
    together = torch.cat([p.images.read(torch.arange(len(p))) for p in (data.train, data.test)])
    assert together.max() == 255
    expected = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    # The two parts hold every image once: equal as multisets of images.
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, expected))


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_folder(tmp_path: Path, dot: str, end: str) -> None:
    data = load(str(idx_folder(tmp_path, dot, end)))
    images, labels = everything(data)
    assert data.kind == "mnist" and len(data.test) == 6
    assert np.array_equal(images[:, 0], IMAGES[:14]) and np.array_equal(labels, LABELS[:14])


def test_idx_errors(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte is cut short"):
        load(f"mnist:{tmp_path}")
    path.write_bytes(b"GIF89a" + whole)
    with pytest.raises(UserError, match="is not an idx file"):
        load(f"mnist:{tmp_path}")
    path.unlink()
    with pytest.raises(UserError, match="has no t10k-images-idx3-ubyte"):
        load(f"mnist:{tmp_path}")


def cifar_rows(count: int) -> tuple[np.ndarray, list[int]]:
    return RNG.integers(0, 256, (count, 3072), dtype=np.uint8), [i % 10 for i in range(count)]


def test_cifar10_python(tmp_path: Path) -> None:
    batches = {name: cifar_rows(3) for name in ("data_batch_1", "data_batch_2", "test_batch")}
    for name, (rows, labels) in batches.items():
        content = {b"data": rows, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a"]}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    data = load(str(tmp_path))
    images, labels = everything(data)
    assert (data.kind, data.channels, data.size) == ("cifar10", 3, (32, 32))
    assert np.array_equal(images[3], batches["data_batch_2"][0][0].reshape(3, 32, 32))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_cifar10_pickles_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "owned"),))

    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}, protocol=2))
    with pytest.raises(UserError, match="is not a CIFAR-10 batch: .* is not allowed"):
        load(str(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_cifar10_binary(tmp_path: Path) -> None:
    rows, labels = cifar_rows(4)
    raw = np.concatenate([np.array(labels, np.uint8)[:, None], rows], axis=1).tobytes()
    (tmp_path / "data_batch_1.bin").write_bytes(raw)
    (tmp_path / "test_batch.bin").write_bytes(raw)
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\nbird\ncat\n\n")
    data = load(str(tmp_path))
    images, found = everything(data)
    assert np.array_equal(images.reshape(4, -1), rows) and found.tolist() == labels
    assert data.class_names == ["plane", "car", "bird", "cat"]
    (tmp_path / "test_batch.bin").write_bytes(raw[:-1])
    with pytest.raises(UserError, match="no multiple of 3073"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_with_a_test_part(tmp_path: Path, names: tuple[str, ...]) -> None:
    arrays = (IMAGES[:14], LABELS[:14, None], IMAGES[14:], LABELS[14:, None])
    np.savez(tmp_path / "a.npz", **dict(zip(names, arrays, strict=True)))
    data = load(str(tmp_path / "a.npz"))
    images, labels = everything(data)
    assert np.array_equal(images[:, 0], IMAGES[:14]) and np.array_equal(labels, LABELS[:14])
    assert np.array_equal(data.test.labels, LABELS[14:])


def test_npz_without_a_test_part_or_labels(tmp_path: Path) -> None:
    colour = RNG.random((20, 6, 5, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", images=colour)
    data = load(f"npz:{tmp_path / 'a.npz'}")
    assert not data.has_labels and data.channels == 3
    assert len(data.train) + len(data.test) == 20
    first = data.train.images.read(torch.tensor([0]))[0].permute(1, 2, 0).numpy()
    gaps = np.abs(np.rint(colour * 255) - first).reshape(20, -1).max(axis=1)
    assert gaps.min() == 0, "floats from 0 to 1 become bytes by rounding"


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"pictures": IMAGES}, "has the arrays pictures; name them images and labels"),
        ({"images": IMAGES.astype("U3")}, "images must be numbers, got <U3"),
        ({"images": IMAGES - 300.0}, "a has pixels from -300 to -4[0-9], .* --pixel-range -300:-4"),
        ({"images": IMAGES[0]}, r"got \[6, 5\]"),
        ({"images": IMAGES, "labels": LABELS[:-1]}, "got 19 of type uint8 for 20 images"),
        ({"images": IMAGES, "labels": LABELS / 2}, "labels must be one integer or word an image"),
        ({"images": IMAGES[:1]}, "cannot set a test part aside: there are 1 images"),
        ({"x_train": IMAGES, "x_test": IMAGES[:0]}, "the test part of a has no images"),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=expected):
        load(str(tmp_path / "a.npz"))


def test_broken_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(
        UserError, match="cannot read .*a.npz: it is no .npz file, or was cut short"
    ):
        load(str(tmp_path / "a.npz"))


def test_a_pixel_that_is_no_number_is_found(tmp_path: Path) -> None:
    images = np.zeros((12, 8, 8), np.float32)
    images[7, 3, 3] = np.nan
    np.savez(tmp_path / "a.npz", images=images)
    with pytest.raises(UserError, match=r"a has pixels .* not a number \(first in image 7 of 12\)"):
        load(str(tmp_path / "a.npz"))


def image_folder(folder: Path, count: int) -> None:
    for name, colour in (("cats", (200, 0, 0)), ("dogs", (0, 0, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 8), colour).save(folder / name / f"{i}.png")


def test_image_folder(tmp_path: Path) -> None:
    image_folder(tmp_path, 5)
    data = load(str(tmp_path), DataOptions(image_size=4))
    images, labels = everything(data)
    assert (data.kind, data.size, data.class_names) == ("folder", (4, 4), ["cats", "dogs"])
    assert len(data.train) + len(data.test) == 10 and len(data.test) >= 1
    assert np.all(images[labels == 0, 0] == 200) and np.all(images[labels == 1, 2] == 200)


def test_image_folder_with_a_test_part(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 3)
    image_folder(tmp_path / "val", 2)
    data = load(f"folder:{tmp_path}", DataOptions(image_size=8))
    assert (len(data.train), len(data.test)) == (6, 4)
    (tmp_path / "val" / "owls").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "val" / "owls" / "0.png")
    with pytest.raises(UserError, match="classes that its training part lacks: owls"):
        load(str(tmp_path))


def test_resizing_keeps_the_mean(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.full((20, 6, 5), 77, np.uint8), labels=LABELS)
    data = load(str(tmp_path / "a.npz"), DataOptions(image_size=9))
    images, _ = everything(data)
    assert data.size == (9, 9) and images.shape[2:] == (9, 9) and np.all(images == 77)


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.where(LABELS == 0, 20251231, -7), ["-7", "20251231"]),
        (np.where(LABELS == 0, "cat", "a dog"), ["a dog", "cat"]),
        (np.where(LABELS == 0, b"cat", b"dog"), ["cat", "dog"]),
        (LABELS == 0, ["False", "True"]),
        (np.where(LABELS == 0, 2**64 - 1, 3).astype(np.uint64), ["3", str(2**64 - 1)]),
    ],
    ids=["numbers", "words", "bytes", "truths", "uint64"],
)
def test_classes_are_the_values_that_occur(
    tmp_path: Path, labels: np.ndarray, names: list[str]
) -> None:
    np.savez(
        tmp_path / "a.npz", x_train=IMAGES, y_train=labels, x_test=IMAGES[:3], y_test=labels[:3]
    )
    data = load(str(tmp_path / "a.npz"))
    assert data.class_names == names
    _, found = everything(data)
    first_is_second_class = int(
        str(labels[0].item()) != names[0] and labels[0] != names[0].encode()
    )
    assert found.tolist() == [(first_is_second_class + i) % 2 for i in range(20)]


def test_a_class_of_the_test_part_only_has_a_name(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        x_train=IMAGES,
        y_train=LABELS,
        x_test=IMAGES[:3],
        y_test=np.array([0, 1, 900]),
    )
    data = load(str(tmp_path / "a.npz"))
    assert data.class_names == ["0", "1", "900"]
    assert data.test.labels is not None and data.test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("train", "test", "unlabelled"),
    [
        (np.full(20, -1), np.full(3, -1), "has no labels"),
        (np.full(20, 7), np.full(3, 7), "has one class only"),
        (np.where(LABELS == 0, -1, 4), np.full(3, 4), "has one class only"),
        (LABELS, np.full(3, -1), "has no labels in its test part"),
        (np.full(20, -1), np.arange(3), "has no labels in its training part"),
        (LABELS, None, "has no labels in its test part"),
        (np.array([-1] * 10 + [0, 1] * 5), np.array([1, -1, 0]), ""),
    ],
)
def test_what_is_unlabelled(
    tmp_path: Path, train: np.ndarray, test: np.ndarray | None, unlabelled: str
) -> None:
    arrays = {"x_train": IMAGES, "y_train": train, "x_test": IMAGES[:3]}
    if test is not None:
        arrays["y_test"] = test
    np.savez(tmp_path / "a.npz", **arrays)
    data = load(str(tmp_path / "a.npz"))
    assert data.unlabelled == unlabelled and data.has_labels == (unlabelled == "")
    missing = int((train == -1).sum() + (0 if test is None else (test == -1).sum()))
    expected = f"{missing} images have the label -1, which means that they have none"
    assert data.notes == ([expected] if missing else [])


def test_idx_without_labels(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="has no t10k-labels-idx1-ubyte"):
        load(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert load(str(tmp_path)).unlabelled == "has no labels"


def test_cifar10_labels_beyond_the_names(tmp_path: Path) -> None:
    rows, _ = cifar_rows(4)
    raw = np.concatenate([np.array([[0], [1], [7], [1]], np.uint8), rows], axis=1).tobytes()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\n")
    assert load(str(tmp_path)).class_names == ["plane", "car", "7"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x93NUMPY", "cannot read"),
        (b"", "cannot read"),
    ],
)
def test_files_that_are_no_npz(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load(str(tmp_path / "a.npz"))
    np.save(tmp_path / "b.npy", IMAGES)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(UserError, match="holds one array without a name"):
        load(str(tmp_path / "b.npz"))


def test_a_damaged_npz_and_one_with_other_things_in_it(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.repeat(IMAGES, 20, axis=0))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(UserError, match="cannot read .*a.npz"):
        load(str(tmp_path / "a.npz"))
    # Objects would need pickle, but nobody asks for them.
    np.savez(tmp_path / "b.npz", images=IMAGES, meta=np.array([{}], dtype=object))
    assert len(load(str(tmp_path / "b.npz")).train) > 0
