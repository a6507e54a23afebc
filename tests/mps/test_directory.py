"""Directories of daemons: which are swept, which are left alone, which are refused."""

import os

import pytest

from colospec.mps import directory
from colospec.mps.errors import MpsError


@pytest.fixture
def root(tmp_path):
    """A place for daemons' directories."""
    path = tmp_path / "root"
    path.mkdir(mode=0o700)
    return path


def test_sweep_leaves_links_files_and_other_users_directories_alone(root, tmp_path):
    (root / "colospec-mps-link").symlink_to(tmp_path)
    (root / "colospec-mps-file").write_text("mine")
    (root / "colospec-mps-open").mkdir(mode=0o755)
    (root / "other").mkdir(mode=0o700)
    (root / "colospec-mps-dead").mkdir(mode=0o700)
    if os.getuid() == 0:
        (root / "colospec-mps-foreign").mkdir(mode=0o700)
        os.chown(root / "colospec-mps-foreign", 65534, 65534)
    before = {path.name for path in root.iterdir()}
    directory.sweep(root)
    assert {path.name for path in root.iterdir()} == before - {"colospec-mps-dead"}
    assert tmp_path.is_dir()


def test_a_locked_directory_is_never_swept(root):
    with directory.private_directory(root) as home:
        directory.sweep(root)
        assert (home / "pipe").is_dir()
    assert not home.exists()


def test_a_root_that_others_may_change_is_refused(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    for path, words in ((tmp_path / "link", "symbolic link"), (tmp_path / "none", "No such file")):
        with pytest.raises(MpsError, match=words), directory.private_directory(path):
            pass
    root.chmod(0o777)
    with pytest.raises(MpsError, match="chmod"), directory.private_directory(root):
        pass
