"""The folder of optimizer states is never created on an unintended disk."""

import os
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.optim.offload.swap import SwapFile
from allometry.parallel.folder import FileSystem, ready


def test_the_last_component_is_made_for_its_user_alone(tmp_path: Path) -> None:
    for _ in range(2):
        ready(tmp_path / "swap")
    assert (tmp_path / "swap").stat().st_mode & 0o777 == 0o700


def test_a_mistyped_parent_is_refused_with_the_nearest_folder(tmp_path: Path) -> None:
    wrong = tmp_path / "nvmee" / "job" / "swap"
    with pytest.raises(UserError) as error:
        SwapFile(wrong, 1 << 20)
    said = str(error.value)
    assert said.startswith(f"parallel.zero.optimizer_states.nvme={wrong}: {wrong.parent} does not")
    assert f"the nearest folder that does is {tmp_path}; correct the path" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_beside_mounted_disks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvme0").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("nvme0"))
    with pytest.raises(UserError, match=r"nvme1: it does not exist, and .*nvme0 beside it is a"):
        ready(tmp_path / "nvme1")
    ready(tmp_path / "nvme0" / "swap")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvme0"]


def test_the_root_is_no_place_for_a_new_folder() -> None:
    with pytest.raises(UserError, match="beside it is a mounted disk"):
        ready(Path("/scrtch-that-nobody-has"))


def test_a_broken_link_and_a_file_are_not_folders(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    for name in ("link", "file", "file/swap"):
        with pytest.raises(OSError, match=r"exists|Not a directory"):
            ready(tmp_path / name)


TABLE = """\
22 1 0:1 / / rw - overlay overlay rw
23 22 0:2 / {0}/disk rw - ext4 /dev/nvme0n1 rw
24 23 0:3 / {0}/disk/with\\040space rw - nfs4 server:/x rw
25 22 0:4 / {0}/disks rw shared:1 - tmpfs tmpfs rw
26 22 0:5 / {0}/twice rw - ext4 /dev/a rw
27 22 0:6 / {0}/twice rw - xfs /dev/b rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "note"),
    [
        ("disk/a", "ext4", ""),
        ("disk/with space/b", "nfs4", "use a local disk"),
        ("disks", "tmpfs", "in the host's memory"),
        ("twice/x", "xfs", ""),
        ("elsewhere", "overlay", ""),
    ],
)
def test_the_file_system_of_a_folder(tmp_path: Path, folder: str, kind: str, note: str) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE.format(tmp_path))
    (tmp_path / folder).mkdir(parents=True)
    found = FileSystem.of(tmp_path / folder, table)
    assert found is not None
    assert found.kind == kind
    assert note in found.note
    assert bool(note) == bool(found.note)


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert FileSystem.of(tmp_path, tmp_path / "none") is None
    (tmp_path / "odd").write_text("nothing that is known\n")
    assert FileSystem.of(tmp_path, tmp_path / "odd") is None


def test_this_system_says() -> None:
    memory = FileSystem.of(Path("/dev/shm"))
    if memory is None or memory.kind != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    assert memory.note


def test_another_rank_may_make_it_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = os.path.lexists

    def late(path: Path) -> bool:
        path.mkdir(exist_ok=True)
        return there(path)

    monkeypatch.setattr(os.path, "lexists", late)
    ready(tmp_path / "swap")
    assert (tmp_path / "swap").is_dir()
