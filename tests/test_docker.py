"""The Dockerfile as far as it can be tried without Docker: its files are there, its shell lines do as they say."""

import fnmatch
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT
from test_packaging import MODULES, SCRIPTS

LINES = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
INSTRUCTIONS = [tuple(line.split(maxsplit=1)) for line in LINES if line.strip()]
IGNORED = (ROOT / ".dockerignore").read_text().split()
# Stand-ins for programs: each appends what it was called with to the file `calls`.
STUBS = {"pip": 'echo "pip $* index=$PIP_EXTRA_INDEX_URL" >> calls',
         "python3": 'echo "python3 $*" >> calls; mkdir -p downloaded/model; echo downloaded/model'}  # fmt: skip


def values(name: str) -> list[str]:
    """The arguments of an instruction, each time it is given."""
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out, by a pattern of it or of a folder that it is in."""
    folders = [path, *map(str, Path(path).parents)][:-1]
    return any(
        fnmatch.fnmatch(Path(folder).name if pattern.startswith("**/") else folder, pattern.removeprefix("**/"))
        for folder in folders
        for pattern in IGNORED
    )


def test_what_is_copied_is_there_and_not_left_out():
    copied = [source for rest in values("COPY") for source in rest.split()[:-1] if not source.startswith("--")]
    assert copied == ["requirements.txt", "."]
    example = [path for path in (ROOT / "example").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    paths = [*(ROOT / f"{script}.py" for script in SCRIPTS), *MODULES.values(), *example]
    needed = [str(path.relative_to(ROOT)) for path in paths]
    assert len(needed) > 25 and not [path for path in needed if ignored(path) or not (ROOT / path).exists()]


def test_what_a_checkout_gathers_is_left_out():
    """Environments, caches, runs and downloaded models do not go to the daemon, nor does what git leaves out."""
    gathered = [".git/HEAD", ".venv/bin/python", ".venv-oldest/bin/python", "runs/a/model.safetensors", "build/demo/a",
                "dataset_cache_1.bin", "__pycache__/a.pyc", "tests/__pycache__/a.pyc", ".pytest_cache/a",
                ".hypothesis/a", "models/a"]  # fmt: skip
    assert not [path for path in gathered if not ignored(path)]
    unversioned = (ROOT / ".gitignore").read_text().split()
    assert not [name for name in unversioned if not ignored(name.strip("/").replace("*", "x"))]


def run_shell(command: str, folder: Path, **arguments: str) -> subprocess.CompletedProcess:
    """A RUN instruction's command, with stand-ins for what needs a network."""
    (folder / "bin").mkdir()
    for name, body in STUBS.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"} | arguments
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("device", "index"), [("cpu", "https://download.pytorch.org/whl/cpu"), ("gpu", "")])
def test_requirements_are_installed_for_the_device(tmp_path, device, index):
    (command,) = [rest for rest in values("RUN") if "pip install" in rest]
    assert run_shell(command, tmp_path, DEVICE=device).returncode == 0
    assert (tmp_path / "calls").read_text() == f"pip install --no-cache-dir -r requirements.txt index={index}\n"
    assert (ROOT / "requirements.txt").is_file()


def test_a_device_that_is_none(tmp_path):
    (command,) = [rest for rest in values("RUN") if "pip install" in rest]
    done = run_shell(command, tmp_path, DEVICE="tpu")
    assert (done.returncode, done.stderr) == (1, "DEVICE is cpu or gpu, not 'tpu'\n")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("finetuned", ["", "1"])
def test_the_model_of_the_image(tmp_path, finetuned):
    """The embedded one, or that of 2019 where it is asked for, by a function that there is."""
    (tmp_path / "example").symlink_to(ROOT / "example")
    (command,) = [rest for rest in values("RUN") if "FINETUNED" in rest]
    done = run_shell(command, tmp_path, FINETUNED=finetuned)
    assert done.returncode == 0, done.stderr
    if finetuned:
        code = (tmp_path / "calls").read_text().removeprefix("python3 -c ")
        assert code == "from utils import download_pretrained_model; print(download_pretrained_model())\n"
        assert (tmp_path / "models").is_dir() and not (tmp_path / "downloaded" / "model").exists()
    else:
        assert (tmp_path / "models" / "config.json").is_file()


def test_arguments_have_defaults_and_are_those_that_are_documented():
    arguments = dict(rest.split("=", 1) for rest in values("ARG"))
    assert arguments == {"DEVICE": "cpu", "FINETUNED": '""'}
    documented = re.findall(r"--build-arg (\w+)", (ROOT / "README.md").read_text() + (ROOT / "Dockerfile").read_text())
    assert set(documented) == set(arguments)


def test_the_image_runs_as_a_user_on_the_oldest_python():
    (python,) = re.findall(r"^python:([\d.]+)-slim$", values("FROM")[0])
    assert f'target-version = "py{python.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    assert values("USER") == ["1000"]
