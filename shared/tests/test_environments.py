"""What is said of packages in several files agrees: ranges in the pyproject files, exact pins, conda environments."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "environments"
OWN = {"qprobe", "qprobe-code-gen", "qprobe-preference"}
DISTRIBUTIONS = {"qprobe": "shared", "qprobe-code-gen": "code_gen", "qprobe-preference": "preference"}


def lines(path: Path) -> list[str]:
    return [line for text in path.read_text().splitlines() if (line := text.partition("#")[0].strip())]


def pins(name: str) -> dict[str, str]:
    found = {}
    for line in lines(ENVIRONMENTS / name):
        package, same, version = line.partition("==")
        assert same, f"{name}: {line} is no exact version"
        assert canonicalize_name(package) not in found, f"{name}: {package} stands there twice"
        found[canonicalize_name(package)] = version
    return found


def project(folder: str) -> dict[str, list[str]]:
    """A distribution's requirements, by extra; "" are those without one."""
    table = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = table.get("optional-dependencies", {})
    return {"": table["dependencies"], **extras}


def required() -> list[Requirement]:
    """Everything that the pyproject files and the files of requirements ask for, less our own distributions."""
    texts = [text for folder in DISTRIBUTIONS.values() for group in project(folder).values() for text in group]
    texts += lines(ENVIRONMENTS / "development.txt")
    return [wanted for wanted in map(Requirement, texts) if canonicalize_name(wanted.name) not in OWN]


def test_every_package_that_is_asked_for_is_pinned_within_its_range() -> None:
    pinned = pins("constraints.txt")
    wanted = required()
    assert len(wanted) > 20
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, but constraints.txt pins {pinned[name]}"


def test_the_environment_of_the_vllm_tests_has_what_they_ask_for_at_the_same_versions() -> None:
    cpu, pinned = pins("vllm_cpu.txt"), pins("constraints.txt")
    for requirement in map(Requirement, lines(ENVIRONMENTS / "vllm_cpu.in")):
        assert requirement.specifier.contains(cpu[canonicalize_name(requirement.name)])
    different = {name: (cpu[name], pinned[name]) for name in cpu.keys() & pinned.keys() if cpu[name] != pinned[name]}
    assert not different
    assert Requirement("vllm" + project("code_gen")["vllm"][0].removeprefix("vllm")).specifier.contains(cpu["vllm-cpu"])


def test_the_integrations_are_pinned_within_their_extras_and_to_the_versions_of_the_other_list() -> None:
    extras, pinned, others = project("shared"), pins("integrations.txt"), pins("constraints.txt")
    asked = [Requirement(text) for name in ("trl", "lm-eval", "inspect") for text in extras[name]]
    assert sorted(map(str, asked)) == sorted(str(Requirement(text)) for text in lines(ENVIRONMENTS / "integrations.in"))
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pinned[name])
        assert pinned[name] == others[name]


@pytest.mark.parametrize("half", ["code_gen", "preference"])
def test_a_conda_environment_takes_pins_torch_and_extras_that_there_are(half: str) -> None:
    entries = [line.removeprefix("- ") for line in lines(ENVIRONMENTS / f"{half}.yaml")]
    assert "--constraint constraints.txt" in entries
    pinned = pins("constraints.txt")
    assert f"torch=={pinned['torch']}" in entries
    (python,) = [entry.removeprefix("python=") for entry in entries if entry.startswith("python=")]
    installed = [entry.removeprefix("-e ../") for entry in entries if entry.startswith("-e ")]
    assert {entry.partition("[")[0] for entry in installed} == {"shared", half}
    for entry in installed:
        folder, _, named = entry.rstrip("]").partition("[")
        table = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        assert Requirement("python" + table["requires-python"]).specifier.contains(python)
        assert set(filter(None, named.split(","))) <= set(project(folder))
    # Whatever else the file names is pinned to the same version.
    for entry in entries:
        if match := re.fullmatch(r"([\w.-]+)==([\w.]+)", entry):
            assert pinned[canonicalize_name(match[1])] == match[2]


def test_our_distributions_ask_each_other_for_extras_that_there_are() -> None:
    for folder in DISTRIBUTIONS.values():
        for requirement in (Requirement(text) for group in project(folder).values() for text in group):
            if (other := DISTRIBUTIONS.get(canonicalize_name(requirement.name))) is not None:
                assert requirement.extras <= set(project(other))
