"""How fast `pipeline.download` is, and what it costs: `python -m tests.benchmarks.download`.

*Speed*: 4 downloads at once against 1 at a time, from a hub on loopback that gives 10 MB/s a
connection. *Cost*: CPU seconds of the stage against those of `curl | sha256sum` on the same bytes,
as fast as they come.

Start-up of Python and Ray is left out by a gate: the hub holds back every body until as many files
were asked for as come at once, and only then is the clock started, and the CPU seconds that were
used so far noted. From there on all is counted until the stage's last process is gone; what a run
over tiny files costs from its gate on (its end, and Ray's) is subtracted. Runs alternate; medians.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.support.downloads import Project, sample_files
from tests.support.hub import FINEWEB, Hub


@dataclass(frozen=True)
class Cost:
    """What a run took from its gate on."""

    transfer: float
    """Seconds until the last byte was sent."""
    wall: float
    """Seconds until the stage had ended."""
    cpu: float
    """CPU seconds, user and system, of all its processes."""


class Meter(threading.Thread):
    """CPU seconds of all processes whose environment holds a mark: Ray's are nobody's children."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark = mark
        self.used: dict[tuple[int, float], float] = {}
        self._not_ours: set[tuple[int, float]] = set()
        self._stop_asked = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self._stop_asked.wait(0.03):
            self.sample()

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def sample(self) -> float:
        """CPU seconds so far; a process that is gone counts with what it was last seen at."""
        with self._lock:
            for process in psutil.process_iter():
                try:
                    key = (process.pid, process.create_time())
                    if key in self._not_ours:
                        continue
                    if key not in self.used and process.environ().get("BENCHMARK") != self.mark:
                        # A process that was just forked may still become ours by exec.
                        if time.time() - key[1] > 1:
                            self._not_ours.add(key)
                        continue
                    times = process.cpu_times()
                    self.used[key] = times.user + times.system
                except psutil.Error:
                    continue
            return sum(self.used.values())


def stage(folder: Path, hub: Hub, files: Mapping[str, bytes], parallel: int) -> Cost:
    """Run the stage once, in a new project with a store of its own."""
    hub.forget()
    hub.gate.clear()
    project = Project(folder, hub)
    mark = f"{os.getpid()}-{folder.name}"
    meter = Meter(mark)
    meter.start()
    process = project.start(GPT2_PARALLEL_DOWNLOADS=str(parallel), BENCHMARK=mark)
    wanted = min(parallel, len(files))
    end = time.monotonic() + 60
    while len({request.path for request in hub.asked("cdn")}) < wanted:
        if process.poll() is not None or time.monotonic() > end:
            hub.gate.set()
            raise RuntimeError(f"{wanted} files were not asked for at once: {project.end(process)}")
        time.sleep(0.002)
    time.sleep(0.3)  # the workers come to rest
    before, began = meter.sample(), time.monotonic()
    hub.gate.set()
    project.end(process)
    wall = time.monotonic() - began
    meter.stop()
    project.check(files)
    assert sum(hub.sent().values()) == sum(map(len, files.values()))
    last = max(request.ended for request in hub.asked("cdn"))
    return Cost(last - began, wall, meter.sample() - before)


def curl(hub: Hub, files: Mapping[str, bytes]) -> Cost:
    """`curl | sha256sum` on the same files, all at once."""
    hub.forget()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    urls = [f"{hub.endpoint}/datasets/{FINEWEB}/resolve/main/{path}" for path in files]
    running = [
        subprocess.Popen(["sh", "-c", 'curl -sSfL "$0" | sha256sum', url], stdout=subprocess.PIPE)
        for url in urls
    ]
    for process, data in zip(running, files.values(), strict=True):
        out, _ = process.communicate(timeout=300)
        assert out.split()[0].decode() == hub.repo().sha256(data)
    wall = time.monotonic() - began
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return Cost(wall, wall, cpu)


def median(values: list[float]) -> str:
    """Median and range, for a table."""
    return f"{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.download")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--mb", type=int, default=420, help="of all files together, for speed")
    parser.add_argument("--cost-mb", type=int, default=1000, help="the same, for cost")
    parser.add_argument("--rate", type=float, default=10.0, help="MB/s a connection, for speed")
    args = parser.parse_args()
    fast: list[float] = []
    slow: list[float] = []
    ours: list[float] = []
    tiny: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        for part in ("speed", "cost"):
            size = (args.mb if part == "speed" else args.cost_mb) * 10**6 // args.files
            files = sample_files(args.files, size)
            small = sample_files(args.files, 20_000)
            with Hub(args.rate * 1e6 if part == "speed" else None) as hub, Hub() as tiny_hub:
                hub.repo().commit(files)
                tiny_hub.repo().commit(small)
                for i in range(args.rounds):
                    name = f"{part}-{i}"
                    if part == "speed":
                        fast.append(stage(folder / f"{name}-4", hub, files, args.files).transfer)
                        slow.append(stage(folder / f"{name}-1", hub, files, 1).transfer)
                    else:
                        ours.append(stage(folder / name, hub, files, args.files).cpu)
                        tiny.append(stage(folder / f"{name}-t", tiny_hub, small, args.files).cpu)
                        theirs.append(curl(hub, files).cpu)
                    for old in folder.iterdir():
                        subprocess.run(["rm", "-rf", old], check=True)
                    print(f"{part}: round {i + 1} of {args.rounds}", flush=True)
    speed_up = statistics.median(slow) / statistics.median(fast)
    net = statistics.median(ours) - statistics.median(tiny)
    ratio = net / statistics.median(theirs)
    print(f"speed: {args.mb} MB in {args.files} files at {args.rate:g} MB/s a connection")
    print(f"  1 at a time            {median(slow)} s")
    print(f"  {args.files} at once              {median(fast)} s")
    print(f"  times as fast          {speed_up:8.2f}  (at least 3)")
    print(f"cost: {args.cost_mb} MB in {args.files} files at once, not throttled")
    print(f"  the stage              {median(ours)} CPU s")
    print(f"  the same, tiny files   {median(tiny)} CPU s")
    print(f"  curl | sha256sum       {median(theirs)} CPU s")
    print(f"  stage less tiny / curl {ratio:8.2f}  (at most 1.3)")
    sys.exit(int(speed_up < 3 or ratio > 1.3))


if __name__ == "__main__":
    main()
