"""pyproject.toml, constraints.txt and environment.yml say the same, and none of them asks for a GPU."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import deepseek_lab

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base"}
BY_PIP = ["mmaemu", "playwright"]  # not on conda-forge, or there under another meaning
GPU = re.compile(r"cuda|nvidia|\bcu1\d\d\b|rocm|triton", re.I)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["test"]]
FOR_A_GPU = [Requirement(text) for text in EXTRAS["cuda"]]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
CONSTRAINTS = [
    Requirement(line) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"
]


def test_the_package_has_the_version_of_the_project():
    from importlib.metadata import version

    assert "version" in PROJECT["dynamic"]
    assert version("deepseek_lab") == deepseek_lab.__version__


def test_every_requirement_is_pinned_once_to_a_version_it_allows():
    names = [canonicalize_name(pin.name) for pin in CONSTRAINTS]
    assert len(names) == len(set(names))
    pins = dict(zip(names, CONSTRAINTS, strict=True))
    for requirement in REQUIRED + FOR_A_GPU:
        if str(requirement.specifier).startswith("=="):
            continue  # it is held there, to any patch of a release
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not pinned in constraints.txt"
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert exact.version in requirement.specifier, f"constraints.txt: {pin}; pyproject.toml: {requirement}"


def test_conda_asks_for_what_pyproject_asks_for():
    *conda, last = ENVIRONMENT["dependencies"]
    conda = dict(re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups() for line in conda)
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert "pip" in conda
    for requirement in REQUIRED:
        if requirement.name not in BY_PIP:
            name = CONDA_NAMES.get(requirement.name, requirement.name)
            assert name in conda, f"{name} is missing from environment.yml"
            assert SpecifierSet(conda[name]) == requirement.specifier, name
    assert set(conda) == {"python", "pip"} | {CONDA_NAMES.get(r.name, r.name) for r in REQUIRED if r.name not in BY_PIP}
    assert last == {"pip": [*(str(r) for r in REQUIRED if r.name in BY_PIP), "-e ."]}


def test_binder_can_read_which_python_is_meant():
    (python,) = (line for line in ENVIRONMENT["dependencies"] if str(line).startswith("python"))
    assert re.fullmatch(r"python=3\.\d+", python)  # the one form that Binder recognises
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


def test_no_environment_asks_for_a_gpu():
    assert not GPU.findall((ROOT / "environment.yml").read_text("utf-8"))
    assert not [requirement for requirement in REQUIRED if GPU.search(str(requirement))]
    assert {pin.name for pin in CONSTRAINTS if GPU.search(pin.name)} <= {requirement.name for requirement in FOR_A_GPU}


def test_no_requirement_names_a_place_to_download_from():
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile"):
        assert not re.search(r"--(extra-)?index-url|--find-links|git\+|://", (ROOT / name).read_text("utf-8")), name
