"""Tests for the layout: imports between rooms, the deps of stages, and the committed files."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.params import SourceParams
from pipeline.runtime.params_file import SECTIONS, validate
from pipeline.store.code_key import PACKAGES
from tests.support.repo import REPO
from train import preset

MODULES = sorted(path for package in PACKAGES for path in (REPO / package).rglob("*.py"))
NAMES = [path.relative_to(REPO).as_posix() for path in MODULES]

# Scheduling, storage, display and exit: no byte of an out depends on these, so no stage has them as
# deps. Nor on what is chosen for a GPU, which changes rounding only, as machine.yaml does.
DECIDE_NO_BYTE = (
    "pipeline/cluster/",
    "pipeline/runtime/",
    "pipeline/store/",
    "pipeline/params.py",  # the values are part of each key
    "train/attention_kernels.py",
    "train/launch/",
    "train/monitor/",
    "train/plan/",
    "train/run_summary.py",
    "train/distributed/compiler.py",
    "train/distributed/devices.py",
    "train/distributed/group.py",
    "train/distributed/interrupt.py",
    "train/distributed/rendezvous.py",
    "train/distributed/torchrun.py",
)
# Imports of a stage on which its outs do not depend: `download` restores files of `data/raw` with
# the hashes of its manifest; training uses samples and evaluation tasks to observe a run;
# `model/gpt.py` offers more than each stage needs.
NOT_USED_BY = {
    "curate": ("pipeline/download/",),
    "tokenize": ("pipeline/download/",),
    "verify": ("pipeline/download/",),
    "train": ("train/evals/", "model/generation.py"),
    "evaluate": ("model/hf.py",),
    "export": ("model/generation.py",),
    "report": ("model/generation.py", "model/hf.py"),
}
# The train stage starts torchrun, which runs the second.
STARTS = {"train": ["train/launch/__main__.py", "train/__main__.py"]}


def file_of(module: str) -> str | None:
    """Return the file of a module of this project: `pipeline.params` -> pipeline/params.py."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (REPO / candidate).is_file() and candidate.startswith(PACKAGES):
            return candidate
    return None


def imports(name: str, everywhere: bool = True, typing: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports.

    Args:
        everywhere: Also those imported inside functions.
        typing: Also those imported only for the type checker.
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
    """Return the file that defines a dotted name, also if a package re-exports it."""
    package, _, name = module.rpartition(".")
    if package in PACKAGES and file_of(module) is None:
        for node in ast.walk(ast.parse((REPO / package / "__init__.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                return file_of(str(node.module))
    return file_of(module)


def reached(*names: str, without: tuple[str, ...] = ()) -> set[str]:
    """Return the files and all files of the three packages that they import, directly or not.

    A package's `__init__.py` only re-exports names: these are followed where they are used.
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
def test_packages_import_only_what_they_may(name: str) -> None:
    package, found = name.split("/")[0], roots(name)
    if package == "pipeline":
        assert found.isdisjoint({"model", "train", "torch"})
    if package == "model":
        assert "train" not in found
        if "pipeline" in found:
            assert name in ("model/generate.py", "model/export.py")
            assert "pipeline" not in roots(name, everywhere=False), "only inside functions"
            reaches = {m for m in imports(name) if m.startswith("pipeline")}
            assert reaches <= {"pipeline", "pipeline.format", "pipeline.format.tokenizer"} | {
                m for m in reaches if m.startswith("pipeline.format.tokenizer.")
            } | {"pipeline.runtime", "pipeline.runtime.command"}  # for a stage of DVC
        allowed = {*sys.stdlib_module_names, "torch", "safetensors", "model", "pipeline"}
        if name == "model/hub.py":  # only for a hub id
            assert "huggingface_hub" not in roots(name, everywhere=False)
            allowed |= {"huggingface_hub"}
        if name == "model/gguf.py":
            assert "gguf" not in roots(name, everywhere=False)
            allowed |= {"gguf"}
        if name == "model/tokenizer_files.py":
            assert "tokenizers" not in roots(name, everywhere=False)
            allowed |= {"tokenizers"}
        assert found <= allowed, found - allowed


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_short_and_named_by_what_they_hold(name: str) -> None:
    most = 500 if name == "train/one_page.py" else 400
    assert len((REPO / name).read_text(encoding="utf-8").splitlines()) <= most
    assert not re.search(r"util|common|helper|misc", name)


GRAPH: dict[str, Any] = YAML(typ="safe", pure=True).load(REPO / "dvc.yaml")
STAGES: dict[str, Any] = GRAPH["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_lists_the_modules_that_decide_its_outs(stage: str) -> None:
    described = STAGES[stage]
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


def test_imports_have_no_cycle() -> None:
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
    assert "train/trainer.py" not in reached("train/plan/__main__.py")


WITHOUT_TORCH = ["train.preset", "train.launch", "train.study", "train.watch"]
WITHOUT_TORCH += ["pipeline.verify", "pipeline.store"]


@pytest.mark.parametrize("command", [*WITHOUT_TORCH, "pipeline.convert"])
def test_commands_that_compute_nothing_import_no_torch(command: str) -> None:
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        f"sys.argv = ['x', '--help']; runpy.run_module('{command}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_stages_with_the_tokenizer_list_its_ranks_and_no_stage_depends_on_the_machine() -> None:
    for name, stage in STAGES.items():
        if "pipeline/format/tokenizer.py" in stage["deps"]:
            assert "pipeline/format/gpt2.tiktoken" in stage["deps"]
        assert not re.search(r"machine\.yaml|GPT2_|persist", str(stage)), name


def test_each_plot_has_a_title_and_no_curve_is_drawn_twice() -> None:
    drawn = [path for plot in GRAPH["plots"] for options in plot.values() for path in options["y"]]
    for stage in STAGES.values():
        for plot in stage.get("plots", []):
            ((path, options),) = plot.items()
            assert options["title"]
            drawn.append(path)
    assert len(set(drawn)) == len(drawn) > 0


def test_committed_parameters_have_every_section_key_and_comment() -> None:
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r"\s*\w+:", line)]
    assert [line for line in lines if not re.search(r"#.*\w", line)] == []
    params = YAML(typ="safe", pure=True).load(text)
    assert tuple(params) == ("sources", *preset.SECTIONS) == SECTIONS
    (source,) = params["sources"].values()
    assert set(source) == set(SourceParams.model_fields)
    for name, section in preset.SECTIONS.items():
        validate(section, params[name], name)
        assert set(params[name]) == set(section.model_fields), name  # no default of the code


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("__main__.py")])
def test_importing_a_module_runs_nothing(name: str) -> None:
    """The top of a module holds definitions, imports, constants, and a command's guard."""
    tree = ast.parse((REPO / name).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)
        elif isinstance(node, ast.If):
            test = ast.unparse(node.test)
            assert "__name__" in test or "TYPE_CHECKING" in test or "sys." in test, test
        else:
            assert not isinstance(node, ast.For | ast.While | ast.With), ast.unparse(node)


COMMANDS = [
    *(f"pipeline.{name}" for name in ("convert", "curate", "download", "store", "tokenize")),
    *(f"model.{name}" for name in ("export", "generate", "import_hf")),
    *(
        f"train.{name}"
        for name in ("audit", "bench", "evaluate", "launch", "plan", "play", "preset")
    ),
    *("pipeline.repair", "pipeline.verify", "train.report", "train.trace", "train.watch", "train"),
    "train.study",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_refuses_an_unknown_flag(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(f"{name}.__main__") or file_of(name)
    assert file is not None
    main = importlib.import_module(file.removesuffix(".py").replace("/", ".")).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert f"python -m {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--unknown-flag"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
