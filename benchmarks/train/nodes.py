"""One run on two machines: the same bits as on one, machines that are lost, and slow links.

    python benchmarks/train/nodes.py            network namespaces as machines; needs root and Linux
    python benchmarks/train/nodes.py --loopback two launchers on this machine's loopback

Each machine has one process, started by its own `torchrun --nnodes 2`, and its own folder with its
own copies of store and model. Lost machines are killed whole (SIGKILL), and `until` loops restart.
The slow link is a token bucket (`tc tbf`) on both ends.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

from benchmarks.demo.photos import write_photos
from benchmarks.demo.pipeline import make_pipeline, read_captions
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.errors import UserError
from xlsd_train.memory.several_cards import Link

ROOT = Path(__file__).parents[2]
PORT = 29511
GIVE_UP_S = 300.0


@dataclass(frozen=True)
class NodesBenchmark(JsonOption):
    """Train on two machines."""

    loopback: bool = False
    """No namespaces: two launchers on loopback. Without root this is what can be shown."""

    steps: int = 40
    """Steps of a run; its machines are killed on the way."""

    retries: tuple[int, ...] = (6,)
    """Values of tcp_retries2 with which a machine vanishes; with Linux's 15 it takes 15 minutes."""

    link: tuple[float, ...] = (1000.0, 200.0, 50.0, 20.0)
    """Mbit/s of the slow links; the first counts as fast."""

    link_steps: int = 12
    """Steps on each link."""


@dataclass(eq=False)
class Host:
    """A machine: a network namespace with an address of its own, or a part of loopback."""

    number: int
    folder: Path
    space: str | None  # the namespace
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of this machine, for the others."""
        return f"10.77.0.{self.number + 1}" if self.space else "127.0.0.1"

    def start(self, script: str, log: str) -> subprocess.Popen[bytes]:
        """Run a shell script on this machine, in its folder."""
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": self.device, "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        words = ["bash", "-c", script]
        if self.space:
            named = (  # torchrun's c10d rendezvous wants a name that it can resolve
                f"mount --bind {self.folder.parent}/hosts /etc/hosts; hostname node{self.number}; "
                f'exec bash -c "$0"'
            )
            words = ["ip", "netns", "exec", self.space, "unshare", "--uts", "--mount", "bash",
                     "-c", named, script]  # fmt: skip
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                words, cwd=self.folder, env=environment, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    @property
    def device(self) -> str:
        """The network device to the other machine."""
        return f"xlsd{self.number}" if self.space else "lo"

    def network(self, *words: str) -> None:
        """Change this machine's network: `ip` or `tc` with these words."""
        program, *rest = words
        subprocess.run([program, "-n", str(self.space), *rest], check=True)

    def pull_the_plug(self) -> None:
        """End all of this machine's processes at once, like a power cut."""
        for started in self.processes:
            if started.poll() is None:
                tree = psutil.Process(started.pid)
                for process in (tree, *tree.children(recursive=True)):
                    process.send_signal(signal.SIGKILL)
            started.wait()
        self.processes.clear()


@contextmanager
def two_hosts(folder: Path, loopback: bool) -> Iterator[list[Host]]:
    """Two machines with a link between them."""
    spaces = [None, None] if loopback else [f"xlsd-{os.getpid()}-{n}" for n in (0, 1)]
    hosts = [Host(n, folder / f"node{n}", space) for n, space in enumerate(spaces)]
    names = "".join(f"{host.address} node{host.number}\n" for host in hosts)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    for host in hosts:
        host.folder.mkdir()
    try:
        if not loopback:
            for host in hosts:
                subprocess.run(["ip", "netns", "add", str(host.space)], check=True)
            a, b = hosts
            a.network(
                "ip",
                "link",
                "add",
                a.device,
                "type",
                "veth",
                "peer",
                b.device,
                "netns",
                str(b.space),
            )
            for host in hosts:
                host.network("ip", "addr", "add", f"{host.address}/24", "dev", host.device)
                for device in (host.device, "lo"):
                    host.network("ip", "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            host.pull_the_plug()
            if host.space:
                subprocess.run(["ip", "netns", "del", host.space], check=False)


@dataclass(frozen=True)
class Runs:
    """Starts runs of the same options on the machines."""

    hosts: list[Host]
    words: str

    def command(self, host: Host, out: str, more: str = "", rendezvous: str = "static") -> str:
        """The launcher's command line for one machine."""
        first = self.hosts[0].address
        where = (
            f"--node-rank {host.number} --master-addr {first} --master-port {PORT}"
            if rendezvous == "static"
            else f"--rdzv-backend c10d --rdzv-endpoint {first}:{PORT} --rdzv-id run "
            f"--local-addr {host.address}"
        )
        return (
            f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 {where} "
            f"-m xlsd_train {self.words} --out {out} {more}"
        )

    def all(self, out: str, more: str = "", rendezvous: str = "static") -> list[int]:
        """Exit codes of one launcher on each machine."""
        started = [
            host.start(self.command(host, out, more, rendezvous), f"{out}.log")
            for host in self.hosts
        ]
        return [process.wait(GIVE_UP_S) for process in started]

    def loop(self, host: Host, out: str, pause_s: float, before: str = "true") -> Any:
        """Start the loop that restarts the launcher until the run is done."""
        script = f"until {before} && {self.command(host, out)}; do sleep {pause_s}; done"
        return host.start(script, f"{out}.log")

    def alone(self, out: str) -> int:
        """Exit code of the run of two processes on the first machine."""
        script = (
            f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 --master-port {PORT} "
            f"--master-addr {self.hosts[0].address} -m xlsd_train {self.words} --out {out}"
        )
        return self.hosts[0].start(script, f"{out}.log").wait(GIVE_UP_S)


def main(config: NodesBenchmark, arguments: Sequence[str]) -> None:
    """Print a line per case, then the table of links."""
    report = Report("benchmarks/train/nodes.py", arguments, machine("torch"))
    if not config.loopback and os.geteuid():
        raise UserError("network namespaces need root; use --loopback without")
    kind = "two launchers on loopback" if config.loopback else "two network namespaces, veth"
    report.fact("machines", f"{kind}; one process each, gloo, one thread")
    with (
        tempfile.TemporaryDirectory() as folder,
        two_hosts(Path(folder), config.loopback) as hosts,
    ):
        make_inputs(hosts[0].folder)
        shutil.copytree(hosts[0].folder, hosts[1].folder, dirs_exist_ok=True)
        cases = Cases(hosts, config, report)
        cases.same_bits()
        cases.differing()
        cases.lost()
        if not config.loopback:
            cases.vanished()
            cases.links()
    report.write(config.json)


def make_inputs(folder: Path) -> None:
    """A model and a store of photos."""
    write_photos(folder / "photos")
    make_pipeline(folder / "model", "nano", read_captions(folder / "photos"))
    build = "build photos --out latents --vae model/vae --resolution 128 --batch 4"
    subprocess.run(
        [sys.executable, "-m", "xlsd_cache", *build.split()], cwd=folder, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Cases:
    """What is shown, one method each."""

    hosts: list[Host]
    config: NodesBenchmark
    report: Report

    def runs(self, steps: int) -> Runs:
        """Runs of so many steps."""
        return Runs(
            self.hosts,
            f"--phase unet --data latents --model model --batch 4 --steps {steps} --keep 0 "
            f"--save-every {steps // 4} --lr 1e-3 --warmup 0 --threads 1 --device cpu "
            f"--sample-every 0 --validation-fraction 0.3 --validate-every {steps // 2}",
        )

    def show(self, what: str, met: bool, details: str) -> None:
        """Print and record whether a case is as promised."""
        print(f"{'PASS' if met else 'FAIL'}  {what}: {details}", flush=True)
        self.report.add("case", what=what, met=met, details=details)

    def same_bits(self) -> None:
        """Two machines against two processes on one; and a resume with the run on one disk only."""
        runs = self.runs(self.config.steps)
        code = runs.alone("reference")
        self.show("two processes on one machine", not code, f"exit code {code}")
        for kind in ("static", "c10d"):
            codes = runs.all(kind, rendezvous=kind)
            same = left(self.writer(kind) / kind) == left(self.hosts[0].folder / "reference")
            details = f"exit codes {codes}, weights, losses and validation equal: {same}"
            self.show(f"two machines, {kind} rendezvous", same and not any(codes), details)

    def writer(self, out: str) -> Path:
        """The folder of the machine whose process is the first one."""
        (found,) = [host.folder for host in self.hosts if (host.folder / out).exists()]
        return found

    def differing(self) -> None:
        """Machines whose files differ must be told before the first step."""
        runs, (first, second) = self.runs(self.config.steps), self.hosts
        runs.all("copied", f"--stop-after {self.config.steps // 2}")  # validated there anyway
        codes = runs.all("copied")
        self.refused("a resume whose run is on one machine", codes, "copied", "not started")
        shutil.copytree(first.folder / "copied", second.folder / "copied")
        codes = runs.all("copied")
        same = left(first.folder / "copied") == left(first.folder / "reference")
        self.show("the same, copied", same, f"exit codes {codes}, equal bits: {same}")
        shutil.move(second.folder / "latents", second.folder / "kept")
        min((second.folder / "photos").glob("*.txt")).write_text("another caption")
        make = "build photos --out latents --vae model/vae --resolution 128 --batch 4"
        second.start(f"{sys.executable} -m xlsd_cache {make}", "build.log").wait(GIVE_UP_S)
        codes = runs.all("other")
        self.refused("another store on one machine", codes, "other", "has stores of fingerprint")
        shutil.rmtree(second.folder / "latents")
        shutil.move(second.folder / "kept", second.folder / "latents")

    def refused(self, what: str, codes: list[int], out: str, words: str) -> None:
        """Whether both ended with one sentence that has these words."""
        logs = [(host.folder / f"{out}.log").read_text() for host in self.hosts]
        said = [x for log in logs for x in log.splitlines() if x.startswith("xlsd-train: ")]
        met = all(codes) and all(words in log for log in logs)
        self.show(what, met, f"exit codes {codes}; {said[-1] if said else 'nothing said'}")

    def lost(self) -> None:
        """Each machine is lost once while loops run; the run ends as if nothing was."""
        count, (first, second) = self.config.steps, self.hosts
        runs = self.runs(count)
        out, run = "lost", first.folder / "lost"
        copy = f"rm -rf {out} && if [ -e {run} ]; then cp -r {run} {out}; fi"  # as rsync would
        before = {first: "true", second: copy}

        def begin(host: Host) -> Any:
            return runs.loop(host, out, 1, before[host])

        loops = {host.number: begin(host) for host in self.hosts}
        for host, step in ((second, 3 * count // 10), (first, 6 * count // 10)):
            wait_for(lambda step=step: steps(run)[-1:] >= [step])  # type: ignore[misc]
            host.pull_the_plug()
            print(f"      node{host.number} lost at step {steps(run)[-1]}", flush=True)
            loops[host.number] = begin(host)
        codes = [loop.wait(GIVE_UP_S) for loop in loops.values()]
        same = left(run) == left(first.folder / "reference")
        once = steps(run) == [*range(1, count + 1)]
        details = f"exit codes {codes}, each step once: {once}, equal bits: {same}"
        self.show("each machine lost once, loops", same and once and not any(codes), details)

    def vanished(self) -> None:
        """A machine that vanishes without a word: its link is dead before its processes are."""
        runs, (first, second) = self.runs(100_000), self.hosts
        for retries in self.config.retries:
            name, out = f"net.ipv4.tcp_retries2={retries}", f"vanished{retries}"
            first.start(f"sysctl -w {name}", "sysctl.log").wait()
            started = [host.start(runs.command(host, out), f"{out}.log") for host in self.hosts]
            wait_for(lambda out=out: steps(first.folder / out)[-1:] >= [5])  # type: ignore[misc]
            second.network("ip", "link", "set", second.device, "down")
            begun = time.monotonic()
            second.pull_the_plug()
            code = started[0].wait(3600)
            seconds = time.monotonic() - begun
            log = (first.folder / f"{out}.log").read_text()
            said = "another process of this run has ended" in log
            details = f"exit code {code} after {seconds:.0f} s, said: {said}"
            self.show(f"a machine vanishes, {name}", said, details)
            second.network("ip", "link", "set", second.device, "up")

    def links(self) -> None:
        """Seconds that a step takes longer on a slow link, against those that the link takes."""
        runs, rows = self.runs(self.config.link_steps), []
        for rate in self.config.link:
            for host in self.hosts:
                bucket = f"rate {rate}mbit burst 256kb latency 400ms"
                host.network("tc", "qdisc", "replace", "dev", host.device, "root", "tbf",
                             *bucket.split())  # fmt: skip
            out = f"link{rate:g}"
            runs.all(out)
            rows.append((rate, statistics.median(seconds(self.writer(out) / out)[2:])))
        nbytes = trained_nbytes(self.writer(out) / out)
        self.report.fact("gradients", f"{nbytes / 1e6:.2f} MB")
        print(f"{'Mbit/s':>8}{'step s':>9}{'longer by':>11}{'predicted':>11}{'ratio':>8}")
        fast = rows[0][1]
        for rate, step in rows:
            taken = Link(2, rate / 8e3).seconds(nbytes)
            ratio = f"{(step - fast) / taken:8.2f}" if step != fast else ""
            print(f"{rate:8.0f}{step:9.3f}{step - fast:11.3f}{taken:11.3f}{ratio}", flush=True)
            self.report.add("link", mbit_per_s=rate, step_s=step, link_s=taken)


def left(run: Path) -> tuple[dict[str, bytes], list[dict[str, Any]], dict[str, bytes]]:
    """What a run leaves that must not depend on machines: last weights, metrics, validation."""
    last = max((run / "checkpoints").iterdir())
    weights = {path.name: path.read_bytes() for path in last.iterdir()}
    measured = {path.name: path.read_bytes() for path in (run / "validation").iterdir()}
    lines = metrics(run)
    for line in lines:
        for name in ("images_per_s", "wait_s", "peak_gib"):
            line.pop(name)
    return weights, lines, measured


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def steps(run: Path) -> list[int]:
    """The steps that a run has logged."""
    return [line["step"] for line in metrics(run)]


def seconds(run: Path) -> list[float]:
    """Of each step."""
    return [4 / line["images_per_s"] for line in metrics(run)]


def trained_nbytes(run: Path) -> int:
    """Bytes of the gradients of a step: those of the weights that train, in float32."""
    from safetensors import safe_open

    (path,) = max((run / "checkpoints").iterdir()).glob("unet.safetensors")
    with safe_open(path, "np") as file:
        return sum(4 * int(file.get_tensor(name).size) for name in file.keys())  # noqa: SIM118


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds."""
    end = time.monotonic() + GIVE_UP_S
    while not condition():
        if time.monotonic() > end:
            raise UserError(f"nothing happened in {GIVE_UP_S:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    run_script(main, NodesBenchmark, __doc__)
