# SPDX-License-Identifier: Apache-2.0
"""What the folders of an image folder mean, which files are data, and how a test part is chosen."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs the packages of the trainers")

from PIL import Image
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.data.fingerprint import changes, fingerprint, hash_names, split, trained_on
from ssltrain.data.folders import part_of
from ssltrain.errors import UserError

SMALL = DataOptions(image_size=4)


def draw(*paths: Path) -> None:
    """A small image at each path, of a colour of its own."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(hash_names([os.fsencode(path)]).view(np.uint8)[:3].tolist())
        Image.new("RGB", (4, 4), colour).save(path, format="png")


def classes(root: Path, *names: str, count: int = 4) -> None:
    """``count`` images in each folder."""
    draw(*(root / name / f"{i}.png" for name in names for i in range(count)))


def titles(part: object) -> list[str]:
    return [part.title(row) for row in range(len(part))]  # type: ignore[attr-defined, arg-type]


def load_folder(root: Path, **options: object) -> ImageData:
    return load(f"folder:{root}", DataOptions(image_size=4, **options))  # type: ignore[arg-type]


# ---- classes or parts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "valid"),
        ("train", "val"),
        ("Train", "Test"),
        ("TRAIN", "TESTING"),
        ("training", "validation"),
        ("train", "eval"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("train-images", "test-images"),
        ("Train Data", "dev"),
    ],
)
def test_parts_are_known_by_their_names(tmp_path: Path, train: str, test: str) -> None:
    classes(tmp_path / train, "cats", "dogs")
    classes(tmp_path / test, "cats", "dogs", count=2)
    data = load(str(tmp_path), SMALL)
    assert (len(data.train), len(data.test), data.class_names) == (8, 4, ["cats", "dogs"])
    assert all(title.startswith(train) for title in titles(data.train))
    assert data.has_labels


@pytest.mark.parametrize("name", ["trains", "contest", "value", "devil", "cats", "test tubes"])
def test_names_of_classes_are_no_parts(name: str) -> None:
    assert part_of(name) is None


@pytest.mark.parametrize(
    "folders",
    [
        ["train", "valid", "cats"],
        ["train", "car", "bus"],
        ["test", "cats"],
        ["train", "Training"],
        ["val", "test"],
    ],
)
def test_folders_that_could_be_either_are_refused(tmp_path: Path, folders: list[str]) -> None:
    for folder in folders:
        classes(tmp_path / folder, "x", "y")
    with pytest.raises(UserError, match="--layout classes"):
        load(str(tmp_path), SMALL)
    data = load_folder(tmp_path, layout="classes")
    assert data.class_names == sorted(folders)
    if folders == ["train", "valid", "cats"]:
        data = load_folder(tmp_path, layout="parts")
        assert data.class_names == ["x", "y"] and len(data.train) == len(data.test) == 8
        assert data.notes == ["left out beside the parts: cats"]


def test_parts_of_each_class_are_refused(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        classes(tmp_path / name, "train", "test")
    with pytest.raises(UserError, match="make train/CLASS and test/CLASS"):
        load(str(tmp_path), SMALL)
    data = load_folder(tmp_path, layout="classes")
    assert len(data.train) + len(data.test) == 16 and data.class_names == ["cats", "dogs"]


def test_a_folder_around_the_parts_is_looked_into(tmp_path: Path) -> None:
    classes(tmp_path / "archive" / "train", "cats", "dogs")
    classes(tmp_path / "archive" / "test", "cats", "dogs")
    data = load(str(tmp_path), SMALL)
    assert data.class_names == ["cats", "dogs"] and "archive is read" in data.notes[0]


def test_a_folder_around_the_classes_is_asked_about(tmp_path: Path) -> None:
    classes(tmp_path / "images", "cats", "dogs")
    with pytest.raises(UserError, match="say --data .*images if these are the classes"):
        load(str(tmp_path), SMALL)
    assert load_folder(tmp_path / "images").class_names == ["cats", "dogs"]
    assert load_folder(tmp_path, layout="classes").unlabelled == "has one class only"


def test_of_two_test_parts_one_is_taken(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        classes(tmp_path / part, "cats", "dogs", count=len(part))
    data = load(str(tmp_path), SMALL)
    assert len(data.test) == 8 and data.notes == ["val is left out; the test part is test"]


def test_a_test_part_with_classes_is_preferred(tmp_path: Path) -> None:
    classes(tmp_path / "train", "cats", "dogs")
    classes(tmp_path / "val", "cats", "dogs")
    draw(*(tmp_path / "test" / f"{i}.png" for i in range(5)))
    data = load(str(tmp_path), SMALL)
    assert data.has_labels and data.notes == ["test is left out; the test part is val"]


def test_train_alone_is_split(tmp_path: Path) -> None:
    classes(tmp_path / "train", "cats", "dogs", count=20)
    data = load(str(tmp_path), SMALL)
    assert data.class_names == ["cats", "dogs"] and len(data.train) + len(data.test) == 40
    assert "has no test part" in data.notes[0]


def test_classes_only_in_the_test_part(tmp_path: Path) -> None:
    classes(tmp_path / "train", "cats", "dogs")
    classes(tmp_path / "test", "cats", "owls")
    with pytest.raises(UserError, match="classes that its training part lacks: owls"):
        load(str(tmp_path), SMALL)


# ---- images without labels -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["flat", "one class", "flat parts", "flat test", "asked"])
def test_unlabelled_folders(tmp_path: Path, shape: str) -> None:
    many = [f"{i}.png" for i in range(12)]
    if shape == "flat":
        draw(*(tmp_path / name for name in many))
    elif shape == "one class":
        draw(*(tmp_path / "cats" / name for name in many))
    elif shape == "asked":
        classes(tmp_path, "cats", "dogs", count=6)
    else:
        draw(*(tmp_path / "test" / name for name in many[:4]))
        folder = tmp_path / "train" / ("cats" if shape == "flat test" else "")
        draw(*(folder / name for name in many[4:]))
        if shape == "flat test":
            draw(tmp_path / "train" / "dogs" / "0.png")
    data = load_folder(tmp_path, layout="flat" if shape == "asked" else "auto")
    assert data.unlabelled and not data.has_labels
    assert len(data.train) + len(data.test) == (13 if shape == "flat test" else 12)
    expected = {"one class": "has one class only", "flat test": "has no labels in its test part"}
    assert data.unlabelled == expected.get(shape, "has no labels")


# ---- which files are data ------------------------------------------------------------------------


def test_litter_is_no_data(tmp_path: Path) -> None:
    classes(tmp_path, "cats", "dogs")
    draw(
        tmp_path / ".ipynb_checkpoints" / "a.png",
        tmp_path / "__MACOSX" / "cats" / "b.png",
        tmp_path / "cats" / "._0.png",
        tmp_path / "cats" / ".hidden.png",
        tmp_path / "dogs" / ".ipynb_checkpoints" / "0-checkpoint.png",
        tmp_path / "cats" / "@eaDir" / "0.png",
        tmp_path / ".git" / "x.png",
    )
    (tmp_path / "dogs" / "x.png").mkdir()  # a folder, and an empty one
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("mine")
    (tmp_path / "cats" / "raw.heic").write_bytes(b"?")
    data = load(str(tmp_path), SMALL)
    assert data.class_names == ["cats", "dogs"] and len(data.train) + len(data.test) == 8
    (note,) = data.notes
    assert "1 .txt" in note and "1 .heic" in note


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    classes(tmp_path, "cats", "x.png")
    assert load(str(tmp_path), SMALL).class_names == ["cats", "x.png"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    classes(tmp_path / "elsewhere", "dogs")
    classes(tmp_path / "data", "cats")
    (tmp_path / "data" / "dogs").symlink_to(tmp_path / "elsewhere" / "dogs")
    (tmp_path / "data" / "cats" / "loop").symlink_to(tmp_path / "data" / "cats")
    data = load(str(tmp_path / "data"), SMALL)
    assert data.class_names == ["cats", "dogs"] and len(data.train) + len(data.test) == 8


def test_images_beside_the_classes_are_named(tmp_path: Path) -> None:
    classes(tmp_path, "cats", "dogs")
    draw(tmp_path / "preview.png")
    data = load(str(tmp_path), SMALL)
    assert len(data.train) + len(data.test) == 8
    assert "1 images directly in" in data.notes[0] and "they are in no class" in data.notes[0]


def test_folders_without_images(tmp_path: Path) -> None:
    for spec in (str(tmp_path), f"folder:{tmp_path}"):
        with pytest.raises(UserError, match="nothing known in|no images in"):
            load(spec)
    (tmp_path / "a.heic").write_bytes(b"?")
    with pytest.raises(UserError, match="no images in .*left out by their names: 1 .heic"):
        load(f"folder:{tmp_path}")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        load(f"folder:{tmp_path / 'a.txt'}")


def test_a_folder_named_like_idx_files_is_a_folder(tmp_path: Path) -> None:
    classes(tmp_path / "train-images", "cats", "dogs")
    classes(tmp_path / "test-images", "cats", "dogs")
    assert load(str(tmp_path), SMALL).kind == "folder"


def test_names_that_are_no_text(tmp_path: Path) -> None:
    classes(tmp_path, "cats", "dogs")
    try:
        draw(tmp_path / "cats" / os.fsdecode(b"\xff\xfe.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    data = load(str(tmp_path), SMALL)
    assert len(data.train) + len(data.test) == 9


# ---- the split and the fingerprint ---------------------------------------------------------------


def test_an_image_stays_in_its_part(tmp_path: Path) -> None:
    classes(tmp_path, "cats", "dogs", count=30)
    before = load(str(tmp_path), SMALL)
    assert 4 <= len(before.test) <= 22
    draw(*(tmp_path / "cats" / f"new{i}.png" for i in range(25)))
    (tmp_path / "dogs" / "3.png").unlink()
    after = load(str(tmp_path), SMALL)
    kept = set(titles(before.train) + titles(before.test)) & set(
        titles(after.train) + titles(after.test)
    )
    assert len(kept) == 59
    assert kept & set(titles(before.test)) == kept & set(titles(after.test))


def test_the_split_follows_pixels_where_there_are_no_names(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 3), dtype=np.uint8)
    parts = []
    for name, rows in (("a", np.arange(150)), ("b", np.arange(200)[::-1])):
        np.savez(tmp_path / f"{name}.npz", images=images[rows])
        data = load(str(tmp_path / f"{name}.npz"))
        parts.append(
            {bytes(image.numpy()) for image in data.test.images.read(torch.arange(len(data.test)))}
        )
    first = {bytes(image) for image in images[:150]}
    assert parts[0] == parts[1] & first and 20 <= len(parts[0]) <= 45


def test_the_split_by_name_is_a_fifth_and_never_empty() -> None:
    names = hash_names(str(i).encode() for i in range(20_000))
    train, test = split(names, None, "name")
    assert len(test) == pytest.approx(4000, abs=4 * (20_000 * 0.16) ** 0.5)
    assert sorted([*train, *test]) == list(range(20_000))
    for begin in range(0, 200, 2):
        assert [len(rows) for rows in split(names[begin : begin + 2], None, "name")] == [1, 1]
    with pytest.raises(UserError, match="there are 1 images"):
        split(names[:1], None, "name")


def test_the_stratified_split_needs_two_of_each_class() -> None:
    names = hash_names(str(i).encode() for i in range(20))
    _, test = split(names, np.arange(20) % 2, "stratified")
    assert np.bincount(np.arange(20)[test] % 2).tolist() == [2, 2]
    with pytest.raises(UserError, match="--split name can"):
        split(names, np.arange(20), "stratified")


def test_what_changed_is_said(tmp_path: Path) -> None:
    classes(tmp_path / "train", "cats", "dogs")
    classes(tmp_path / "test", "cats", "dogs", count=2)
    first = load(str(tmp_path), SMALL)
    before = fingerprint(first)
    assert changes(before, load(str(tmp_path), SMALL)) == []

    def now() -> str:
        return "; ".join(changes(before, load(str(tmp_path), SMALL)))

    draw(tmp_path / "train" / "cats" / "9.png")
    assert now() == "1 training image is new (first train/cats/9.png)"
    (tmp_path / "train" / "cats" / "9.png").rename(tmp_path / "train" / "dogs" / "9.png")
    (tmp_path / "test" / "dogs" / "0.png").unlink()
    assert now() == ("1 training image is new (first train/dogs/9.png); 1 test image is gone")
    draw(tmp_path / "test" / "dogs" / "0.png")
    (tmp_path / "train" / "dogs" / "9.png").unlink()
    assert now() == ""
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "cats" / "2.png")
    assert now() == "1 training image has another file size (first train/cats/2.png)"
    assert changes(before, load(str(tmp_path), DataOptions(image_size=5)))[0] == (
        "images are 3 x 5 x 5, not 3 x 4 x 4"
    )
    (tmp_path / "train" / "cats").rename(tmp_path / "train" / "cows")
    (tmp_path / "test" / "cats").rename(tmp_path / "test" / "cows")
    assert "4 training images are new (first train/cows/0.png); 4 training images are gone" in now()


def test_what_changed_in_arrays_is_said(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 3), dtype=np.uint8)
    labels = np.arange(30) % 3

    def written(rows: np.ndarray, classes: np.ndarray) -> ImageData:
        np.savez(
            tmp_path / "a.npz",
            x_train=images[rows],
            y_train=classes[rows],
            x_test=images[:3],
            y_test=labels[:3],
        )
        return load(str(tmp_path / "a.npz"))

    before = fingerprint(written(np.arange(3, 30), labels))
    other = labels.copy()
    other[7] = 2
    assert changes(before, written(np.arange(3, 30), other)) == [
        "1 training image has another label (first training image 4)"
    ]
    assert changes(before, written(np.arange(3, 30)[::-1], labels)) == [
        "the training images are in another order"
    ]
    assert changes(before, written(np.r_[3:30, 5], labels)) == [
        "the training part has 28 images, not 27"
    ]
    moved = written(np.r_[0, 3:30], labels)
    assert changes(before, moved) == [
        "1 training image is from the test part (first training image 0)"
    ]
    np.savez(tmp_path / "b.npz", x_train=images[:3], x_test=images[3:])
    swapped = load(str(tmp_path / "b.npz"))
    assert len(trained_on(before, swapped)) == 27
    assert changes(before, swapped)[0].startswith("3 training images are from the test part")
