"""Of the house: who imports whom, what the stages say they are made of, and the committed files."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.runtime.params_file import validate
from train import preset

REPO = Path(__file__).parents[1]
PACKAGES = ("pipeline", "model", "train")
MODULES = sorted(path for package in PACKAGES for path in (REPO / package).rglob("*.py"))
NAMES = [path.relative_to(REPO).as_posix() for path in MODULES]

# How a stage is scheduled, stored, shown and ended: no byte of an out depends on these rooms, so
# they are deps of no stage.
DECIDE_NO_BYTE = (
    "pipeline/cluster/",
    "pipeline/runtime/",
    "pipeline/store/",
    "pipeline/params.py",  # the values are part of each key
    "train/launch/",
    "train/monitor/",
    "train/run_summary.py",
    "train/distributed/devices.py",
    "train/distributed/interrupt.py",
    "train/distributed/rendezvous.py",
    "train/distributed/torchrun.py",
)
# What a stage imports and its outs do not depend on: the train stage samples and asks evaluation
# tasks to observe a run; `model/gpt.py` offers more than each stage needs.
NOT_USED_BY = {
    "train": ("train/evals/", "model/generation.py"),
    "evaluate": ("model/hf.py",),
    "export": ("model/generation.py",),
    "report": ("model/generation.py", "model/hf.py"),
}
# The train stage hands over to torchrun, which runs the second.
STARTS = {"train": ["train/launch/__main__.py", "train/__main__.py"]}


def file_of(module: str) -> str | None:
    """The file of a dotted name of ours: `pipeline.store` -> pipeline/store.py."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (REPO / candidate).is_file() and candidate.startswith(PACKAGES):
            return candidate
    return None


def imports(name: str, everywhere: bool = True, typing: bool = False) -> Iterator[str]:
    """The dotted names that a file imports.

    Args:
        name: The file.
        everywhere: Also inside functions.
        typing: Also for the type checker alone.
    """

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative import"
                assert child.module is not None
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif (
                not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            ):
                continue
            elif everywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child)

    yield from visit(ast.parse((REPO / name).read_text(encoding="utf-8")))


def provider(module: str) -> str | None:
    """The file behind a dotted name; a name that a package passes on is its module's."""
    package, _, name = module.rpartition(".")
    if package in PACKAGES and file_of(module) is None:
        for node in ast.walk(ast.parse((REPO / package / "__init__.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                return file_of(str(node.module))
    return file_of(module)


def reached(*names: str, without: tuple[str, ...] = ()) -> set[str]:
    """The files and every file of the three packages that they import, however far.

    A package's `__init__.py` only passes names on: what it passes on is followed where it is used.
    """
    found, todo = set(), list(names)
    while todo:
        current = todo.pop()
        if current in found or current.startswith(without) or current.endswith("__init__.py"):
            continue
        found.add(current)
        todo += [file for module in imports(current) if (file := provider(module)) is not None]
    return found


def roots(name: str, everywhere: bool = True) -> set[str]:
    return {module.split(".")[0] for module in imports(name, everywhere)}


@pytest.mark.parametrize("name", NAMES)
def test_borders(name: str) -> None:
    package, found = name.split("/")[0], roots(name)
    if package == "pipeline":
        assert found.isdisjoint({"model", "train", "torch"})
    if package == "model":
        assert "train" not in found
        commands = ("model/generate.py", "model/export.py")
        if "pipeline" in found:
            assert name in commands
            assert "pipeline" not in roots(name, everywhere=False), "only inside functions"
            reaches = {m for m in imports(name) if m.startswith("pipeline")}
            assert reaches <= {"pipeline", "pipeline.format", "pipeline.format.tokenizer"} | {
                m for m in reaches if m.startswith("pipeline.format.tokenizer.")
            }
        allowed = {*sys.stdlib_module_names, "torch", "safetensors", "model", "pipeline"}
        if name == "model/import_hf.py":  # where the user asks for a hub id
            assert "huggingface_hub" not in roots(name, everywhere=False)
            allowed |= {"huggingface_hub"}
        assert found <= allowed, found - allowed


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_short_and_named_by_what_they_hold(name: str) -> None:
    assert len((REPO / name).read_text(encoding="utf-8").splitlines()) <= 400
    assert not re.search(r"util|common|helper|misc", name)


def dvc() -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load(REPO / "dvc.yaml")["stages"]
    return stages


def stage_names() -> list[str]:
    return list(dvc())


@pytest.mark.parametrize("stage", stage_names())
def test_a_stage_lists_the_modules_it_is_made_of(stage: str) -> None:
    described = dvc()[stage]
    match = re.match(r"exec python -m ([\w.]+)", described["cmd"])
    assert match, described["cmd"]
    start = file_of(f"{match[1]}.__main__") or file_of(match[1])
    assert start, f"{match[1]} is no module"
    starts = STARTS.get(stage, [start])
    assert start in starts
    deps = described["deps"]
    ours = [dep for dep in deps if dep.startswith(tuple(f"{package}/" for package in PACKAGES))]
    needed = {
        name
        for name in reached(*starts, without=NOT_USED_BY.get(stage, ()))
        if not name.startswith(DECIDE_NO_BYTE) and not name.endswith("/__main__.py")
    } | ({"train/__main__.py"} if stage == "train" else set())

    def covers(dep: str, name: str) -> bool:
        return dep == name or name.startswith(f"{dep}/")

    assert {name for name in needed if not any(covers(dep, name) for dep in ours)} == set()
    assert {dep for dep in ours if not any(covers(dep, name) for name in needed)} == set()


def test_no_cycles() -> None:
    """Imports inside functions and for the type checker count as well."""
    graph = {name: {f for m in imports(name, typing=True) if (f := provider(m))} for name in NAMES}
    packages = {name for name in NAMES if name.endswith("__init__.py")}  # they pass names on
    sorter = graphlib.TopologicalSorter(
        {name: uses - packages - {name} for name, uses in graph.items() if name not in packages}
    )
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


@pytest.mark.parametrize(
    "command",
    [
        "train.preset",
        "train.launch",
        *(f"pipeline.{name}" for name in ("verify", "store", "convert")),
    ],
)
def test_commands_that_compute_nothing_import_no_torch(command: str) -> None:
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        f"sys.argv = ['x', '--help']; runpy.run_module('{command}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_the_plan_needs_no_trainer() -> None:
    assert "train/trainer.py" not in reached("train/plan/__main__.py")


@pytest.mark.parametrize("stage", stage_names())
def test_a_stage_lists_the_ranks_with_the_tokenizer(stage: str) -> None:
    deps = dvc()[stage]["deps"]
    if "pipeline/format/tokenizer.py" in deps:
        assert "pipeline/format/gpt2.tiktoken" in deps


def test_no_stage_hangs_on_the_machine() -> None:
    for name, stage in dvc().items():
        text = str(stage)
        assert "machine.yaml" not in text, name
        assert "GPT2_" not in text, name
        assert "persist" not in text, name


def params_text() -> str:
    return (REPO / "params.yaml").read_text(encoding="utf-8")


def test_every_parameter_has_a_comment() -> None:
    bare = [
        line
        for line in params_text().splitlines()
        if re.match(r"\s*\w+:", line) and not re.search(r" # \w|#.*\w", line)
    ]
    assert bare == []


def test_the_committed_parameters_hold_every_section_and_every_key() -> None:
    params = YAML(typ="safe", pure=True).load(params_text())
    assert set(params) == set(preset.SECTIONS)
    for name, section in preset.SECTIONS.items():
        validate(section, params[name], name)
        # Written out: the file, and no default in the code, is the whole truth.
        assert set(params[name]) == set(section.model_fields), name


def preset_names() -> list[str]:
    return list(preset.preset_files())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_can_be_applied_and_applied_twice(name: str) -> None:
    once = preset.merge(params_text(), preset.read_preset(name))
    assert preset.merge(once, preset.read_preset(name)) == once
    assert once.count("#") == params_text().count("#")


def test_the_committed_parameters_are_the_preset_mini() -> None:
    mini, params = preset.read_preset("mini"), YAML(typ="safe", pure=True).load(params_text())
    assert mini == params  # whole: it undoes any other preset
    assert preset.merge(params_text(), mini) == params_text()
    for name in preset_names():
        other = preset.merge(params_text(), preset.read_preset(name))
        assert YAML(typ="safe", pure=True).load(preset.merge(other, mini)) == params


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("__main__.py")])
def test_nothing_happens_at_import(name: str) -> None:
    """At the top of a module: definitions, imports, constants, and the guard of a command."""
    tree = ast.parse((REPO / name).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)
        elif isinstance(node, ast.If):
            test = ast.unparse(node.test)
            assert "__name__" in test or "TYPE_CHECKING" in test or "sys." in test, test
        else:
            assert not isinstance(node, ast.For | ast.While | ast.With), ast.unparse(node)
