"""Folders and tar files as people have them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image
from spot_vit.data.fetch import Unreadable
from spot_vit.data.folders import folders_in, open_folder, split_folder
from spot_vit.data.pictures import Pictures
from spot_vit.utils.errors import UserError
from support.pictures import BROKEN, ODD, folder, write


def names(path: Path, **given: object) -> list[str]:
    opened = open_folder(path, **given)  # type: ignore[arg-type]
    assert opened.source is not None
    return [opened.source.name(i) for i in range(len(opened))]


def test_each_folder_is_a_class(tmp_path: Path) -> None:
    opened = open_folder(folder(tmp_path, ("cat", "dog", "emu"), count=2))
    assert opened.classes == ["cat", "dog", "emu"] and opened.targets == [0, 0, 1, 1, 2, 2]
    assert opened.source is not None and len(opened) == 6
    assert opened.source.name(4) == "emu/emu000.jpg"
    assert opened.source.path(4) == str(tmp_path / "emu/emu000.jpg")
    assert opened.notes == [] and opened.left_out == []


def test_endings_of_all_kinds_are_pictures(tmp_path: Path) -> None:
    """Timm alone reads .png, .jpg and .jpeg."""
    folder(tmp_path, count=1, extra=[*ODD])
    assert {Path(name).name for name in names(tmp_path)} >= set(ODD)
    assert all(name.endswith(".png") for name in names(tmp_path, endings=".png"))
    assert (
        len(names(tmp_path, endings=".png;.GIF".lower()))
        == len(names(tmp_path, endings=".png")) + 1
    )


def test_files_that_are_no_pictures_are_counted_and_named(tmp_path: Path) -> None:
    folder(tmp_path, extra=["notes.txt"])
    (tmp_path / "readme.md").write_text("x")
    (tmp_path / "empty").mkdir()
    opened = open_folder(tmp_path)
    assert sorted(opened.left_out) == [str(tmp_path / "cat/notes.txt"), str(tmp_path / "readme.md")]
    note, empty = opened.notes
    assert "2 files left out" in note and "cat/notes.txt" in note and "readme.md" in note
    assert empty.endswith("class folders without a picture: empty")
    assert opened.classes == ["cat", "dog"]


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    folder(tmp_path)
    for i in range(25):
        (tmp_path / "cat" / f"{i:02d}.txt").write_text("x")
    (note,) = open_folder(tmp_path).notes
    assert "25 files" in note and "09.txt and 15 more" in note and "10.txt" not in note


def test_pictures_beside_the_class_folders_are_left_out_and_named(tmp_path: Path) -> None:
    """Timm would make a class without a name of them."""
    folder(tmp_path)
    write(tmp_path / "loose.jpg", 5)
    opened = open_folder(tmp_path)
    assert opened.classes == ["cat", "dog"] and len(opened) == 8
    assert opened.left_out == [str(tmp_path / "loose.jpg")]
    assert "pictures in no class folder left out: loose.jpg" in opened.notes[0]


def test_a_class_map_gives_labels_and_order(tmp_path: Path) -> None:
    folder(tmp_path, ("cat", "dog", "emu"), count=2)
    (tmp_path / "map.txt").write_text("emu\ncat\n")
    opened = open_folder(tmp_path, class_map="map.txt")
    assert opened.classes == ["emu", "cat"] and opened.targets == [1, 1, 0, 0]
    assert open_folder(tmp_path, class_map={"dog": 0}).targets == [0, 0]
    with pytest.raises(UserError, match=r"class_map: .*expected a \.txt file"):
        open_folder(tmp_path, class_map="nowhere.txt")
    with pytest.raises(UserError, match="no picture lies in a folder that class_map names"):
        open_folder(tmp_path, class_map={"rat": 0})


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_folder(path)
        assert "\n" not in str(caught.value)

    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", r"none: no pictures \(\.jpg .*but no file at all")
    (tmp_path / "none/a.txt").write_text("x")
    refused(tmp_path / "none", r"but 1 other files \(a\.txt\)")
    (tmp_path / "none/a.tar").write_text("x")
    refused(tmp_path / "none", r"tar files .*--dataset wds/")
    for i in range(3):
        write(tmp_path / "flat" / f"{i}.jpg", i)
    refused(tmp_path / "flat", "3 pictures lie in it, but in no folder of a class.*flat/CLASS")
    refused(tmp_path / "flat/0.jpg", r"expected a folder of pictures or a \.tar file")
    (tmp_path / "bad.tar").write_bytes(b"nothing")
    refused(tmp_path / "bad.tar", "this tar file cannot be read: ")


def archive(path: Path, root: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname=".")
    return path


def test_tar_files_are_read_as_folders_are(tmp_path: Path) -> None:
    folder(tmp_path / "in", count=3)
    write(tmp_path / "in/cat/text.jpg", 1)
    path = archive(tmp_path / "all.tar", tmp_path / "in")
    opened, plain = open_folder(path), open_folder(tmp_path / "in")
    assert opened.classes == plain.classes and opened.targets == plain.targets
    assert opened.source is not None and plain.source is not None
    for i in range(7):
        assert opened.source.name(i).endswith(plain.source.name(i))
    there, here = Pictures(opened.source), Pictures(plain.source)
    for i in (0, 6, 2):
        assert there[i][0].tobytes() == here[i][0].tobytes()
    with pytest.raises(Unreadable) as caught:
        there[3]
    assert str(caught.value).startswith(f"{path}: ") and "text.jpg" in caught.value.name


def test_pictures_of_no_class_in_a_tar_file(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jpg", 1)
    with pytest.raises(UserError, match="its pictures are in no folder of a class"):
        open_folder(archive(tmp_path / "flat.tar", tmp_path / "in"))
    folder(tmp_path / "in", count=2)
    opened = open_folder(archive(tmp_path / "mixed.tar", tmp_path / "in"))
    assert opened.classes == ["cat", "dog"] and opened.targets == [0, 0, 1, 1]


def test_splits_by_name_synonym_and_tar(tmp_path: Path) -> None:
    for name in ("training", "val", "test"):
        (tmp_path / name).mkdir()
    (tmp_path / "more.tar").write_bytes(b"")
    (tmp_path / ".hidden").mkdir()
    assert split_folder(tmp_path, "train") == tmp_path / "training"
    assert split_folder(tmp_path, "validation") == tmp_path / "val"
    assert split_folder(tmp_path, "test") == tmp_path / "test"
    assert split_folder(tmp_path, "more") == tmp_path / "more.tar"
    assert split_folder(tmp_path, "other") is None
    assert folders_in(tmp_path) == ["more.tar", "test", "training", "val"]
    with pytest.raises(UserError, match="no such folder of pictures; did you mean photos"):
        (tmp_path / "photos").mkdir()
        split_folder(tmp_path / "fotos", "train")


@pytest.mark.parametrize("name", [*ODD, *BROKEN])
def test_files_are_closed(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a" / name, 1)
    pictures = Pictures(open_folder(tmp_path).source)  # type: ignore[arg-type]
    opened = []
    read = pictures.source.__getitem__
    pictures.source = type(
        "Source",
        (),
        {
            "__len__": lambda self: 1,
            "__getitem__": lambda self, i: opened.append(read(i)) or opened[-1],
            "path": lambda self, i: "here",
        },
    )()  # type: ignore[assignment]
    try:
        assert isinstance(pictures[0][0], Image.Image)
    except Unreadable:
        assert name in BROKEN
    assert opened[0][0].closed
