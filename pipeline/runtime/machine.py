"""Machine settings: they change no data, and no weights beyond rounding.

They come from `machine.yaml` (optional, ignored by git) and from environment variables
`GPT2_<KEY>`, which override the file. No stage has them in its `params`, `deps` or `cmd`, so moving
to another machine invalidates no result.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.params_file import first_error, nearest, read_yaml

PREFIX = "GPT2_"

LoggerName = Literal["tensorboard", "wandb", "trackio"]
AttentionKernel = Literal["cudnn", "flash", "efficient", "math"]


def project_root() -> Path:
    """Return the folder of `machine.yaml` and the store.

    DVC sets `DVC_ROOT` to the main checkout, even for experiments that run in a temporary workspace
    without ignored files. Without DVC it is the current folder.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").absolute()


def find_file(path: str) -> Path:
    """Find a file or folder of `params.yaml` in the working directory or in the main checkout.

    DVC experiments run in a workspace of their own, without the files that git ignores.

    Returns:
        The path as it is written, with `~` expanded, unless it is only in the main checkout.
    """
    here = Path(path)
    with contextlib.suppress(RuntimeError):  # no such user
        here = here.expanduser()
    there = project_root() / here
    # `Path.exists` fails for a name that is too long; callers name it when they open the file.
    return there if os.path.lexists(there) and not os.path.lexists(here) else here


def usable_cores() -> int:
    """Return the number of cores in this process's CPU affinity (Linux), or of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def private_folder() -> Path:
    """Return this user's folder for temporary files of all projects on this machine.

    Raises:
        UserError: Its place is taken. Others may write to /tmp: a folder or a link there may be a
            trap of another user.
    """
    folder = Path(tempfile.gettempdir()) / f"gpt2-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(
            f"{folder}: is no folder that only you can write to; remove it, or set TMPDIR"
        )
    return folder


class Machine(BaseSettings):
    """The settings of `machine.yaml`; each is also an environment variable `GPT2_<KEY>`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    workers: int | None = Field(default=None, ge=1)
    """Ray worker processes of the data stages on this machine; null: one per core."""

    ray_address: str | None = None
    """Address (host:port) of the Ray cluster to join; null: `RAY_ADDRESS`, else a local Ray."""

    data: Literal["shared", "ship"] = "shared"
    """How the nodes of a cluster get their data. shared: repository, store and DVC's cache are at
    the same paths on every node; ship: this machine sends text to the nodes and receives tokens."""

    work_dir: Path | None = None
    """Folder of the store of finished and unfinished pieces; null: `.work` in the project."""

    engine: Literal["gigatoken", "tiktoken"] = "gigatoken"
    """Tokenizer. gigatoken: where it is installed and proven equal to tiktoken, else tiktoken;
    tiktoken: tiktoken only."""

    check_fraction: float = Field(default=0.002, ge=0, le=1)
    """Fraction of the documents encoded by gigatoken that tiktoken encodes as well, to compare the
    two; at least one document per chunk. 0: none."""

    parallel_downloads: int = Field(default=4, ge=1)
    """Source files downloaded at the same time."""

    patience: float = Field(default=600.0, gt=0)
    """Seconds for which a download is retried without a new byte, waits included."""

    processes: int | None = Field(default=None, ge=1)
    """Training processes on this machine; null: one per GPU, one on a CPU."""

    cores: int | None = Field(default=None, ge=1)
    """Cores of one training run on a CPU, which is pinned to them (Linux); null: all."""

    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences per process in one forward pass; null: chosen to divide the batch and to
    fit the memory of a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto: cuda if there is a GPU, else cpu."""

    compile: bool | None = None
    """Compile the model with torch.compile; null: on a GPU, and on a CPU in runs of some minutes if
    there is a C++ compiler."""

    attention: AttentionKernel | None = None
    """Attention kernel that a GPU tries first; null: cudnn on Hopper and Blackwell of data centres,
    else flash. One that cannot compute the model is passed over."""

    loggers: list[LoggerName] = Field(default=[])
    """Programs, in addition to DVC, that draw the log of a training run (docs/machine.md)."""

    restarts: int = Field(default=0, ge=0)
    """Times that training restarts from its last checkpoint after a process died."""

    timeout: float = Field(default=900.0, gt=0)
    """Seconds that a training process waits for another before it ends the run."""

    overlap: bool = False
    """Split a compiled model into several graphs, to send gradients while others are computed."""

    checkpoint_activations: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, a third
    more arithmetic, the same results (gpt2-xl)."""

    loss_chunk: int | None = Field(default=None, ge=1)
    """Tokens whose logits are in memory at a time in training; null: chosen from the memory of a
    GPU; on a CPU about twice the model's width (docs/gpu.md)."""

    other_rounding: bool = False
    """Resume a run with `train.invariant` on another processor, or with other versions or settings
    that change its rounding; its checkpoints record it."""

    fresh: bool = False
    """Rebuild everything, ignoring the finished pieces in the store."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take arguments first, then the environment, then `machine.yaml`."""
        path = project_root() / "machine.yaml"
        file = InitSettingsSource(settings_cls, read_yaml(path) if path.exists() else {})
        return init_settings, env_settings, file

    @classmethod
    def load(cls) -> "Machine":
        """Read the settings of this machine.

        Raises:
            UserError: An unknown key or variable, or an invalid value.
        """
        for variable in os.environ:
            key = variable.removeprefix(PREFIX).lower()
            if variable.startswith(PREFIX) and key not in cls.model_fields:
                known = [PREFIX + name.upper() for name in cls.model_fields]
                shown = printable(variable)[:100]
                raise UserError(f"{shown}: unknown variable; {nearest(variable, known)}")
        try:
            return cls()
        except ValidationError as error:
            key = str(error.errors()[0]["loc"][0])
            variable = PREFIX + key.upper()
            where = "environment" if variable in os.environ else "machine.yaml"
            message = first_error(error, where, cls)
            raise UserError(message.replace(f"environment.{key}", variable, 1)) from None

    @property
    def worker_count(self) -> int:
        """Worker processes of a local Ray: `workers`, or one per core."""
        return self.workers or usable_cores()
