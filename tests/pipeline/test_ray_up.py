"""`ray up docs/cluster-hosts.yaml` as docs/cluster.md has it, on hosts reached over SSH."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.manifest import Manifest
from tests.clone import make_clone
from tests.hosts import Hosts, wait_for, why_not

HOME = Path("/root")
HEAD, WORKER, LAPTOP = "10.77.0.1", "10.77.0.2", "10.77.0.3"

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}"),
    pytest.mark.skipif(
        not all(shutil.which(tool, path="/usr/sbin:/usr/bin") for tool in ("sshd", "rsync")),
        reason="no sshd or rsync here: apt-get install openssh-server rsync",
    ),
]


def give_home(hosts: Hosts, name: str) -> Path:
    """A home folder of the host's own, which its own key opens; and a running sshd."""
    tmp = hosts.folder / name / "tmp"
    ssh = tmp / "home" / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    for file in ("id_ed25519", "id_ed25519.pub"):
        shutil.copy2(hosts.folder / file, ssh)
    shutil.copy2(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    python = Path(sys.base_prefix)
    hidden = python.is_relative_to(HOME)  # by that home: it is mounted there once more
    if hidden:
        (tmp / "python").mkdir()
        hosts[name].run("mount", "--bind", str(python), "/tmp/python")
        (tmp / "home" / python.relative_to(HOME)).mkdir(parents=True)
    hosts[name].run("mount", "--bind", "/tmp/home", str(HOME))
    if hidden:
        hosts[name].run("mount", "--bind", "/tmp/python", str(python))
    hosts[name].run("mount", "-t", "tmpfs", "run", "/run/sshd")
    hosts[name].start(
        "/usr/sbin/sshd", "-D", "-e", "-h", f"{HOME}/.ssh/id_ed25519",
        "-o", "PidFile=none", "-o", "UsePAM=no", "-o", "PermitRootLogin=yes",
        log=hosts.folder / f"{name}.sshd.log",
    )  # fmt: skip
    return tmp / "home"


def test_ray_up_on_machines_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "hosts"
    folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "id_ed25519")]
    subprocess.run(key, check=True)
    with Hosts(folder, ["head", "worker", "laptop"], {}) as hosts:
        home = {name: give_home(hosts, name) for name in hosts.hosts}
        project = home["laptop"] / "gpt2"
        make_clone(project, "mini")
        path = project / "docs/cluster-hosts.yaml"
        yaml = YAML()
        cluster = yaml.load(path)
        cluster["provider"] |= {"head_ip": HEAD, "worker_ips": [WORKER]}
        cluster["auth"]["ssh_user"] = "root"
        cluster["min_workers"] = cluster["max_workers"] = 1
        # In place of an installation: there is no network here.
        installed = f"ln -s {sys.prefix} ~/venv && echo '. ~/venv/bin/activate' >> ~/.bashrc"
        cluster["setup_commands"], cluster["head_setup_commands"] = [installed], []
        yaml.dump(cluster, path)

        def laptop(*command: str) -> str:
            done = hosts["laptop"].run(
                str(Path(sys.prefix) / "bin" / "ray"), *command,
                cwd=HOME / "gpt2", HOME=str(HOME), RAY_AUTH_TOKEN_PATH="",
            )  # fmt: skip
            print(done)
            return done

        laptop("get-auth-token", "--generate")
        laptop("up", "-y", "docs/cluster-hosts.yaml")
        two = "python -c \"import ray; ray.init('auto'); print(len(ray.nodes()), 'nodes')\""
        environment = ". ~/gpt2/docs/node-environment.sh"
        run = ("exec", "docs/cluster-hosts.yaml")
        wait_for(lambda: "2 nodes" in laptop(*run, f"{environment}; {two}"), 120, every=5)
        work = "rm dvc.lock; RAY_ADDRESS=localhost:6379 GPT2_DATA=ship dvc repro verify"
        said = laptop(*run, f"{environment}; cd ~/gpt2; {work}")
        assert "2 nodes: " in said
        laptop("rsync-down", "docs/cluster-hosts.yaml", "~/gpt2/data/tokens/", "data/tokens/")
        manifest = Manifest.load(project / "data/tokens")
        assert all((project / "data/tokens" / shard.name).exists() for shard in manifest.shards)
        laptop("down", "-y", "docs/cluster-hosts.yaml")
