"""What this machine has: settings that change no data, and nothing but rounding.

They come from `machine.yaml` (optional, ignored by git) and from environment variables
`GPT2_<KEY>`, which win. They stand in no stage's `params`, `deps` or `cmd`, so a bigger machine
invalidates nothing.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import first_error, nearest, read_yaml

PREFIX = "GPT2_"


def project_root() -> Path:
    """Where `machine.yaml` and the store are looked for.

    DVC names the main checkout in `DVC_ROOT`, also for the experiments that it runs in a workspace
    of their own, where ignored files are absent. Without DVC it is the current folder.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").absolute()


def usable_cores() -> int:
    """Cores that this process may use: of the machine's, those of its affinity (Linux)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
    """Ray worker processes of the data stages on this machine; null: one a core."""

    ray_address: str | None = None
    """A running Ray cluster to join, host:port; null: `RAY_ADDRESS`, else a local Ray."""

    data: Literal["shared", "ship"] = "shared"
    """How the nodes of a cluster have their data: repository, store and DVC's cache at the same
    paths on each (shared), or sent to them by this machine, which also takes in what they make
    (ship)."""

    work_dir: Path | None = None
    """Where the store of finished and half-finished pieces lies; null: `.work` in the project."""

    engine: Literal["gigatoken", "tiktoken"] = "gigatoken"
    """What tokenizes: gigatoken where it is installed and proven equal; or tiktoken alone."""

    check_fraction: float = Field(default=0.002, ge=0, le=1)
    """Of the documents that gigatoken encodes, the part that tiktoken encodes as well, to compare;
    in each chunk one at least. 0: none."""

    parallel_downloads: int = Field(default=4, ge=1)
    """Source files that are fetched at the same time."""

    patience: float = Field(default=600.0, gt=0)
    """Seconds for which a download goes on trying without a new byte, waits included."""

    processes: int | None = Field(default=None, ge=1)
    """Training processes on this machine; null: one a GPU, or 2 on a CPU with 2 cores or more."""

    cores: int | None = Field(default=None, ge=1)
    """Cores that one training on a CPU takes, and is bound to (Linux); null: all."""

    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences that a process computes at a time; null: chosen to divide the batch."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is computed; auto: cuda where there is a GPU."""

    compile: bool | None = None
    """Whether the model is compiled by torch.compile; null: on a GPU only."""

    restarts: int = Field(default=0, ge=0)
    """Times that training is started again, from its last checkpoint, when a process has died."""

    timeout: float = Field(default=900.0, gt=0)
    """Seconds that a training process waits for another before it ends the run."""

    overlap: bool = False
    """Cut a compiled model in several graphs, to send gradients while others are computed."""

    checkpoint_activations: bool = False
    """Train with less memory and a third more arithmetic: activations are computed a second time
    in the backward pass instead of being kept (gpt2-xl). The results are the same."""

    loss_chunk: int | None = Field(default=None, ge=1)
    """Tokens whose logits are held at a time in training; null: about twice the model's width.
    More are faster on a GPU that has memory left (docs/gpu.md)."""

    fresh: bool = False
    """Make everything anew, ignoring the finished pieces of the store."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, and the environment over `machine.yaml`."""
        path = project_root() / "machine.yaml"
        file = InitSettingsSource(settings_cls, read_yaml(path) if path.exists() else {})
        return init_settings, env_settings, file

    @classmethod
    def load(cls) -> "Machine":
        """The settings in force here.

        Raises:
            UserError: an unknown key or variable, or an impossible value.
        """
        for variable in os.environ:
            key = variable.removeprefix(PREFIX).lower()
            if variable.startswith(PREFIX) and key not in cls.model_fields:
                known = [PREFIX + name.upper() for name in cls.model_fields]
                raise UserError(f"{variable}: unknown variable; {nearest(variable, known)}")
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
        """Worker processes of a local Ray: as set, else one for each core."""
        return self.workers or usable_cores()
