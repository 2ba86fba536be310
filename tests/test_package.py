"""What ``pip install .`` installs: the loss and its op alone. ``.ci/package`` installs it and trains with it."""

import ast
import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

OP = sorted(path for path in (REPOSITORY / "similarity_cuda").iterdir() if path.is_file())
# Where pip puts each file, and where it is in the repository.
INSTALLED = {
    "self_similarity.py": REPOSITORY / "utils" / "utils_ssl.py",
    **{f"similarity_cuda/{path.name}": path for path in OP},
}


def build(target: str, source: Path, folder: Path) -> Path:
    """Build a "wheel" or "sdist" of the project in ``source``; -> its file."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: pip install -r requirements-dev.txt")
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, bytes]:
    return contents(build("wheel", REPOSITORY, tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_the_loss_and_the_op_as_they_are_here_and_nothing_else(wheel):
    code = {name: text for name, text in wheel.items() if ".dist-info/" not in name}
    assert code == {name: path.read_bytes() for name, path in INSTALLED.items()}
    assert sum(name.endswith("/licenses/LICENSE") for name in wheel) == 1


def test_the_wheel_asks_for_what_the_repository_asks_for(wheel):
    (metadata,) = (text.decode() for name, text in wheel.items() if name.endswith("/METADATA"))
    asked = Parser().parsestr(metadata).get_all("Requires-Dist")
    assert {line.partition(">")[0] for line in asked} == {"torch", "ninja"}
    assert set(asked) <= set((REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines())


def test_a_source_distribution_gives_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", REPOSITORY, tmp_path / "sdist")) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("self_similarity_loss-*")
    assert contents(build("wheel", source, tmp_path / "wheel")) == wheel


@pytest.mark.parametrize(
    "path", [path for path in INSTALLED.values() if path.suffix == ".py"], ids=lambda path: path.name
)
def test_what_is_installed_imports_pytorch_and_itself_alone(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names <= {"torch", "similarity_cuda", "ninja"}
