"""`code_key`: which code made a piece, so that mended code never meets the old pieces."""

import hashlib
from pathlib import Path

from pipeline.errors import UserError
from pipeline.params import read_yaml


def stage_modules(stage: str, root: Path = Path()) -> list[Path]:
    """The Python modules among the ``deps`` of a stage of `dvc.yaml`, sorted.

    Raises:
        UserError: no `dvc.yaml` here, no such stage in it, or a module that is not there.
    """
    stages = read_yaml(root / "dvc.yaml").get("stages", {})
    if stage not in stages:
        raise UserError(f"dvc.yaml: stage {stage} is missing")
    modules = sorted(Path(dep) for dep in stages[stage]["deps"] if str(dep).endswith(".py"))
    for module in modules:
        if not (root / module).is_file():
            raise UserError(f"dvc.yaml: stage {stage}: {module} does not exist")
    return modules


def code_key(stage: str, root: Path = Path()) -> str:
    """The sha256 over the names and bytes of a stage's modules."""
    digest = hashlib.sha256()
    for module in stage_modules(stage, root):
        content = (root / module).read_bytes()
        digest.update(f"{module.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
