"""A Flower deployment on one machine: SuperLink and SuperNodes as processes of their own, to be killed.

Every process gets private folders and ports and is ended by its id. (Finding all of them relies on Linux'
`/proc`.) With `tls` the SuperLink has a certificate and lets in only the nodes whose keys were registered.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from processes import MARK, end_marked, free_ports, marked

from fedkl import dates
from fedkl.masking import MemberFile, MemberKeys, Mode, Rules, new_roster

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "flower"
PASSPHRASE = "correct horse battery staple"  # noqa: S105 (of locks that nobody needs)

sys.path.insert(0, str(EXAMPLE))

from make_credentials import make_credentials  # noqa: E402


def masked_example(folder: Path) -> Path:
    """A copy of the example whose clients mask what they send, and write down what masks they used."""
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    recorded = ROOT / "benchmarks" / "recorded_client_app.py"
    shutil.copy(recorded, folder / "fedkl_flower_example")
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace(".client_app:app", ".recorded_client_app:app", 1), encoding="utf-8")
    return folder


def make_members(folder: Path, *, nodes: int, mode: Mode) -> None:
    """Secret files ``client-0.secret`` … of the members of a new cohort."""
    today = dates.today()
    keys = [MemberKeys.new(f"client-{node}", today=today) for node in range(nodes)]
    cards = [each.card() for each in keys]
    sealed = new_roster(name="study", cards=cards, rules=Rules(mode=mode), signer=keys[0], today=today)
    folder.mkdir(mode=0o700)
    for each in keys:
        path = folder / f"{each.name}.secret"
        with MemberFile.create(path, each, passphrase=PASSPHRASE) as file:
            file.join(sealed, today=today, fingerprint=sealed.roster.fingerprint)


class DeploymentError(RuntimeError):
    """Something did not happen in time; the message ends with the processes' last lines."""


class Deployment:
    """The processes; use `deployment`, which ends them.

    Args:
        folder: For logs, stores, checkpoints and credentials.
        nodes: Number of SuperNodes.
        tls: Certificate, registered node keys; else everything is in the clear.
        record: Every node connects through a recording proxy; without TLS only.
        masking: Mode of the cohort that the nodes' members are in; None: nothing is masked.
        app: The folder of the Flower app; None: the example.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        tls: bool = True,
        record: bool = False,
        masking: Mode | None = None,
        app: Path | None = None,
    ) -> None:
        self.folder, self.nodes, self.tls, self.masking = folder, nodes, tls, masking
        self.mark = uuid.uuid4().hex
        self.checkpoints = folder / "checkpoints"
        self.port, *self._node_ports = free_ports(1 + nodes)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.recorders = [Recorder(self.port) for _ in range(nodes)] if record else []
        self._credentials = folder / "credentials"
        folder.mkdir(parents=True, exist_ok=True)
        if tls:
            make_credentials(self._credentials, nodes=nodes)
        (folder / "passphrase").write_text(PASSPHRASE + "\n", encoding="utf-8")
        (folder / "passphrase").chmod(0o600)
        self.app = app or (masked_example(folder / "app") if masking else EXAMPLE)
        if masking:
            make_members(self.members, nodes=nodes, mode=masking)

    @property
    def members(self) -> Path:
        """The folder of the members' secret files, where updates are masked."""
        return self.folder / "members"

    def store(self, node: int) -> Path:
        """The store of a node's lock."""
        return self.folder / f"store-{node}"

    def lock_file(self, node: int) -> Path:
        """A node's encrypted lock."""
        return self.store(node) / f"client-{node}" / "lock.fedkl"

    def uploads(self) -> list[dict[str, Any]]:
        """What every message to a member with masks was answered with, in order of time."""
        path = self.folder / "uploads.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def masks_used_twice(self) -> int:
        """How many uploads share a nonce, or with pair masks a member and context, with one before."""
        found = [upload for upload in self.uploads() if "nonce" in upload]
        pairs = {(upload["client"], upload["context"]) for upload in found}
        distinct = {upload["nonce"] for upload in found}
        return len(found) - min(len(distinct), len(found) if self.masking == "blind" else len(pairs))

    def model_file(self, node: int) -> Path:
        """The trained model, as a node with a member has written it down."""
        return self.members / f"client-{node}.study.safetensors"

    def log(self, name: str) -> str:
        """What a process has printed so far."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def history(self) -> dict[str, dict[str, dict[str, float]]]:
        """The metrics that the server has kept."""
        path = self.checkpoints / "history.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def rounds(self) -> int:
        """The newest round of which there is a checkpoint."""
        numbers = [int(path.stem.removeprefix("round-")) for path in self.checkpoints.glob("round-*.fedkl")]
        return max(numbers, default=0)

    def start(self) -> None:
        """Starts everything; with TLS the nodes' public keys are registered in between."""
        self.start_link()
        for node in range(self.nodes):
            self.start_node(node)

    def start_link(self) -> None:
        """Starts the SuperLink, waits until it listens, and registers the nodes' keys."""
        flags = ["--host", "127.0.0.1", "--port", str(self.port), "--disable-runtime-dependency-installation"]
        secured = [
            *("--ssl-certfile", str(self._credentials / "server.pem")),
            *("--ssl-keyfile", str(self._credentials / "server.key")),
            *("--ssl-ca-certfile", str(self._credentials / "ca.crt")),
            "--enable-supernode-auth",
        ]
        self._spawn("superlink", ["flower-superlink", *flags, *(secured if self.tls else ["--insecure"])])
        self.wait(lambda: _listens(self.port), "the SuperLink to listen")
        home = self._home("cli")
        trust = f'root-certificates = "{self._credentials / "ca.crt"}"' if self.tls else "insecure = true"
        text = f'[superlink]\ndefault = "dep"\n[superlink.dep]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        (home / "config.toml").write_text(text)
        self._register(range(self.nodes if self.tls else 0))

    def _register(self, nodes: range) -> None:
        keys = [str(self._credentials / f"node-{node}.pub") for node in nodes]
        commands = [["flwr", "supernode", "register", key, "dep"] for key in keys]
        started = [self._spawn(f"register-{n}", c, home="cli") for n, c in zip(nodes, commands, strict=True)]
        self.wait(lambda: all(p.poll() is not None for p in started), "the nodes to be registered")
        if any(process.returncode for process in started):
            raise DeploymentError("\n".join(self.log(f"register-{node}")[-1000:] for node in nodes))

    def start_node(self, node: int) -> None:
        """Starts a SuperNode."""
        link = self.recorders[node].port if self.recorders else self.port
        config = (
            f'partition-id={node} num-partitions={self.nodes} fedkl-store="{self.store(node)}" '
            f'fedkl-passphrase-file="{self.folder / "passphrase"}"'
        )
        if self.masking:
            config += f' fedkl-member="{self.members}"'
        secured = [
            *("--root-certificates", str(self._credentials / "ca.crt")),
            *("--auth-supernode-private-key", str(self._credentials / f"node-{node}.key")),
        ]
        command = [
            *("flower-supernode", "--superlink", f"127.0.0.1:{link}", "--host", "127.0.0.1"),
            *("--port", str(self._node_ports[node]), "--node-config", config),
            *(secured if self.tls else ["--insecure"]),
        ]
        self._spawn(f"node-{node}", command, FEDKL_NODE=str(node))

    def run(self, config: Mapping[str, bool | float | int | str]) -> subprocess.Popen[bytes]:
        """Starts `flwr run`; it ends with the run."""
        values = {"checkpoints": str(self.checkpoints), "masked": self.masking is not None, **config}
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        command = ["flwr", "run", str(self.app), "dep", "--stream", "--run-config", text]
        return self._spawn("run", command, home="cli")

    def finish(self, config: Mapping[str, bool | float | int | str], *, rounds: int, seconds: float) -> float:
        """Runs until all rounds are done, evaluations included; returns the seconds that took."""
        begin = time.monotonic()
        run = self.run({"rounds": rounds, **config})
        kind = "evaluate" if config.get("fraction-evaluate", 1.0) else "train"

        def done() -> bool:
            return str(rounds) in self.history().get(f"{kind}_metrics_clientapp", {})

        self.wait(lambda: done() or run.poll() is not None, f"round {rounds}", seconds=seconds)
        self.wait(done, f"round {rounds}, though the run has ended,", seconds=5)
        return time.monotonic() - begin

    def simulate(
        self, config: Mapping[str, bool | float | int | str], *, rounds: int, seconds: float
    ) -> float:
        """The same app in Flower's simulation, which needs ray; in place of `start` and `finish`.

        All clients find their locks in the first node's store. Returns the seconds that took.
        """
        text = '[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local-in-memory:"\n'
        (self._home("cli") / "config.toml").write_text(text)
        values = {"checkpoints": str(self.checkpoints), "rounds": rounds, **config}
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        nodes = f"num-supernodes={self.nodes} client-resources-num-cpus=1 init-args-num-cpus=2"
        command = ["flwr", "run", str(self.app), "--stream", "--run-config", given]
        runtime, control = free_ports(2)
        begin = time.monotonic()
        run = self._spawn(
            "run",
            [*command, "--federation-config", nodes],
            home="cli",
            FEDKL_STORE=str(self.store(0)),
            FEDKL_PASSPHRASE=PASSPHRASE,
            FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(runtime),
            FLWR_LOCAL_CONTROL_API_PORT=str(control),
            RAY_TMPDIR=str(self.folder),
            RAY_USAGE_STATS_ENABLED="0",
        )
        self.wait(lambda: run.poll() is not None, f"{rounds} simulated rounds", seconds=seconds)
        return time.monotonic() - begin

    def kill(self, name: str) -> None:
        """Kill -9 of a process by name: ``superlink`` or ``node-<i>``; what it started is left to itself."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def client_processes(self, node: int) -> list[int]:
        """The processes in which a node's ClientApp runs at this moment."""
        return marked(self.mark, f"FEDKL_NODE={node}", command="flwr-clientapp")

    def kill_client(self, node: int) -> None:
        """Kill -9 of the process that a node's ClientApp runs in, as soon as there is one."""
        self.wait(lambda: bool(self.client_processes(node)), f"a client process of node {node}")
        for pid in self.client_processes(node):
            os.kill(pid, signal.SIGKILL)

    def wait(self, condition: Callable[[], bool], what: str, *, seconds: float = 90.0) -> None:
        """Waits until something is so.

        Raises:
            DeploymentError: It did not happen in time.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"== {p.stem}\n{p.read_text()[-1500:]}" for p in self.folder.glob("*.log"))
                raise DeploymentError(f"waited {seconds:.0f} s for {what}\n{logs}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends everything that was started."""
        end_marked(self.mark, *self._processes.values())
        for recorder in self.recorders:
            recorder.close()

    def _home(self, name: str) -> Path:
        home = self.folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _spawn(
        self, name: str, command: list[str], *, home: str | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        folder = Path(sys.executable).parent
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("FEDKL_PASS")},
            "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(self._home(home or name)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "NO_COLOR": "1",
            MARK: self.mark,
            **environment,
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 (commands of this file)
                [str(folder / command[0]), *command[1:]],
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        return process


@contextmanager
def deployment(folder: Path, **options: Any) -> Iterator[Deployment]:
    """A running deployment, ended in any case; see `Deployment`."""
    started = Deployment(folder, **options)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder / "home", ignore_errors=True)


class Recorder:
    """A TCP proxy that keeps every byte, a stream for each connection and direction.

    Args:
        target: Port on the loopback interface that it forwards to.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.sent: list[bytearray] = []  # by the node
        self.received: list[bytearray] = []
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # nobody there: the node tries again
                client.close()
                continue
            up, down = bytearray(), bytearray()
            self.sent.append(up)
            self.received.append(down)
            Thread(target=_forward, args=(client, server, up), daemon=True).start()
            Thread(target=_forward, args=(server, client, down), daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()


def _forward(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    try:
        while data := source.recv(65536):
            kept += data
            target.sendall(data)
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
