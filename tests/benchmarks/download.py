"""Benchmark of `pipeline.download`, speed and CPU cost: `python -m tests.benchmarks.download`.

*Speed*: 4 downloads in parallel against 1 at a time, from a loopback hub limited to 10 MB/s per
connection. *Cost*: CPU seconds of the stage against those of `curl | sha256sum` on the same bytes,
without a limit.

A gate excludes the start-up of Python and Ray: the hub sends no body until as many files have been
requested as are downloaded in parallel; then the clock starts and the CPU seconds used so far are
noted. Everything after that counts, until the stage's last process has exited; the cost of a run
over tiny files after its gate (the shutdown of the stage and Ray) is subtracted. Runs alternate;
the results are medians.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.support.downloads import Project, sample_files
from tests.support.hub import FINEWEB, Hub


class CpuMeter(threading.Thread):
    """Sums the CPU seconds of all processes with a mark in their environment.

    Ray's processes are not children of the stage.
    """

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark = mark
        self.used: dict[tuple[int, float], float] = {}
        self._unmarked: set[tuple[int, float]] = set()
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self._stopping.wait(0.03):
            self.sample()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def sample(self) -> float:
        """Return the CPU seconds so far; exited processes count with their last sample."""
        with self._lock:
            for process in psutil.process_iter():
                try:
                    key = (process.pid, process.create_time())
                    if key in self._unmarked:
                        continue
                    if key not in self.used and process.environ().get("BENCHMARK") != self.mark:
                        # A process that was just forked may still get the mark by exec.
                        if time.time() - key[1] > 1:
                            self._unmarked.add(key)
                        continue
                    times = process.cpu_times()
                    self.used[key] = times.user + times.system
                except psutil.Error:
                    continue
            return sum(self.used.values())


def stage(top: Path, hub: Hub, files: Mapping[str, bytes], parallel: int) -> tuple[float, float]:
    """Run the stage once, in a new project with its own store.

    Returns:
        Seconds from the opening of the gate to the last byte sent, and CPU seconds (user and
        system) of all processes of the stage from then until it exited.
    """
    hub.clear_requests()
    hub.gate.clear()
    folder = Path(tempfile.mkdtemp(dir=top))
    project = Project(folder / "project", hub)
    mark = str(folder)
    meter = CpuMeter(mark)
    meter.start()
    process = project.start(GPT2_PARALLEL_DOWNLOADS=str(parallel), BENCHMARK=mark)
    wanted = min(parallel, len(files))
    end = time.monotonic() + 60
    while len({request.path for request in hub.asked("cdn")}) < wanted:
        if process.poll() is not None or time.monotonic() > end:
            hub.gate.set()
            raise RuntimeError(f"{wanted} files were not requested: {project.end(process)}")
        time.sleep(0.002)
    time.sleep(0.3)  # until the workers are idle
    before, began = meter.sample(), time.monotonic()
    hub.gate.set()
    project.end(process)
    meter.stop()
    project.check(files)
    assert sum(hub.sent().values()) == sum(map(len, files.values()))
    last = max(request.ended for request in hub.asked("cdn"))
    shutil.rmtree(folder)
    return last - began, meter.sample() - before


def curl(hub: Hub, files: Mapping[str, bytes]) -> float:
    """Return the CPU seconds of `curl | sha256sum` on the same files, all in parallel."""
    hub.clear_requests()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    urls = [f"{hub.endpoint}/datasets/{FINEWEB}/resolve/main/{path}" for path in files]
    running = [
        subprocess.Popen(["sh", "-c", 'curl -sSfL "$0" | sha256sum', url], stdout=subprocess.PIPE)
        for url in urls
    ]
    for process, data in zip(running, files.values(), strict=True):
        out, _ = process.communicate(timeout=300)
        assert out.split()[0].decode() == hub.repo().sha256(data)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def median(values: list[float]) -> str:
    """Format median and range for a table."""
    return f"{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.download")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--mb", type=int, default=420, help="size of all files together, for speed")
    parser.add_argument("--cost-mb", type=int, default=1000, help="the same for cost")
    parser.add_argument("--rate", type=float, default=10.0, help="MB/s per connection, for speed")
    args = parser.parse_args()
    count = args.files
    runs = defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        files = sample_files(count, args.mb * 10**6 // count)
        with Hub(args.rate * 1e6) as hub:
            hub.repo().commit(files)
            for i in range(args.rounds):
                runs["fast"].append(stage(top, hub, files, count)[0])
                runs["slow"].append(stage(top, hub, files, 1)[0])
                print(f"speed: round {i + 1} of {args.rounds}", flush=True)
        files, small = (sample_files(count, n) for n in (args.cost_mb * 10**6 // count, 20_000))
        with Hub() as hub, Hub() as tiny_hub:
            hub.repo().commit(files)
            tiny_hub.repo().commit(small)
            for i in range(args.rounds):
                runs["ours"].append(stage(top, hub, files, count)[1])
                runs["tiny"].append(stage(top, tiny_hub, small, count)[1])
                runs["theirs"].append(curl(hub, files))
                print(f"cost: round {i + 1} of {args.rounds}", flush=True)
    speed_up = statistics.median(runs["slow"]) / statistics.median(runs["fast"])
    net = statistics.median(runs["ours"]) - statistics.median(runs["tiny"])
    ratio = net / statistics.median(runs["theirs"])
    print(f"speed: {args.mb} MB in {count} files at {args.rate:g} MB/s per connection")
    print(f"  1 at a time            {median(runs['slow'])} s")
    print(f"  {count} in parallel          {median(runs['fast'])} s")
    print(f"  speed-up               {speed_up:8.2f}  (at least 3)")
    print(f"cost: {args.cost_mb} MB in {count} files in parallel, no limit")
    print(f"  stage                  {median(runs['ours'])} CPU s")
    print(f"  stage, tiny files      {median(runs['tiny'])} CPU s")
    print(f"  curl | sha256sum       {median(runs['theirs'])} CPU s")
    print(f"  (stage - tiny) / curl  {ratio:8.2f}  (at most 1.3)")
    sys.exit(int(speed_up < 3 or ratio > 1.3))


if __name__ == "__main__":
    main()
