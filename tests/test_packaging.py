"""The wheel: every package and every data file is in it, and nothing else."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
# Folders of the repository that are packages, and where the installed package has them.
HOMES = {"mlx_flashmoe": "mlx_flashmoe", "kernels": "mlx_flashmoe/kernels", "convert": "mlx_flashmoe/convert"}


def installed_files() -> dict[str, Path]:
    """Path in the wheel -> file of the repository, for everything below the package folders."""
    return {
        f"{home}/{path.relative_to(ROOT / folder).as_posix()}": path
        for folder, home in HOMES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    folders = {str(PurePosixPath(name).parent) for name in installed_files() if name.endswith(".py")}
    listed = SETUPTOOLS["packages"]
    assert len(listed) == len(set(listed))
    assert {name.replace(".", "/") for name in listed} == folders
    assert {name.replace(".", "/"): folder for name, folder in SETUPTOOLS["package-dir"].items()} == {
        home: folder for folder, home in HOMES.items() if home != folder
    }


def test_every_data_file_matches_package_data() -> None:
    patterns = SETUPTOOLS["package-data"]
    forgotten = [
        name
        for name in installed_files()
        if not name.endswith(".py")
        and not any(
            fnmatch.fnmatch(name, f"{package.replace('.', '/')}/{pattern}")
            for package, each in patterns.items()
            for pattern in each
        )
    ]
    assert not forgotten, f"[tool.setuptools.package-data] of pyproject.toml leaves out {forgotten}"


def build(kind: str, tree: Path, out: Path) -> Path:
    """Builds a "wheel" or an "sdist" of `tree` with the installed setuptools, which needs no network."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = out.iterdir()
    return made


# What builds and runs leave in a checkout.
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "demo", "*.egg-info")


@pytest.mark.parametrize("via", ["checkout", "sdist"])
def test_the_wheel_holds_the_package_and_nothing_else(via: str, tmp_path: Path) -> None:
    """Built from a checkout as pip does it, and from the source distribution as a release does it."""
    pytest.importorskip("setuptools", minversion="77", reason="the extra test installs what builds a wheel")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND)
    assert (tree / "tests").is_dir() and (tree / "examples").is_dir()
    if via == "sdist":
        unpacked = tmp_path / "unpacked"
        unpacked.mkdir()
        subprocess.run(["tar", "-xzf", build("sdist", tree, tmp_path / "sdist"), "-C", unpacked], check=True)
        (tree,) = unpacked.iterdir()
    with zipfile.ZipFile(build("wheel", tree, tmp_path / "wheel")) as wheel:
        about = {name for name in wheel.namelist() if ".dist-info/" in name}
        assert set(wheel.namelist()) - about == set(installed_files())
        assert {name: wheel.read(name) for name in installed_files()} == {
            name: path.read_bytes() for name, path in installed_files().items()
        }
    assert {PurePosixPath(name).name for name in about} == {
        "METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt", "top_level.txt"
    }  # fmt: skip
