"""Real Ray hosts on this one Linux machine, each in namespaces of its own, and a bucket; needs root and `ip`.

python tools/hosts.py up 3 --bucket   start three hosts with one Ray, and say how to use them
python tools/hosts.py on 1 COMMAND…   run a command on the first host, in this folder
python tools/hosts.py down            end all their processes and remove them

A host has its own network, hostname, /etc/hosts, /dev/shm, home and temporary folder. It shares the machine's disks and
cores. Nothing outside can reach it: even the bridge between the hosts lies in a namespace.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREFIX = "mh"  # short: Ray's sockets lie below the folder of a host, and their paths may have 107 bytes
BRIDGE = "10.77.0.1"  # where the bucket listens
HEAD = "10.77.0.11:6379"
SETUP = """
set -e
hostname "host$1"
mount --make-rprivate /
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind "$2/etc-hosts" /etc/hosts
[ -z "$3" ] || mount --bind "$2/private" "$3"
echo ready
exec sleep infinity
"""
CREDENTIALS = {
    "AWS_ENDPOINT_URL": f"http://{BRIDGE}:5000",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
NOT_INHERITED = ("TUTORIAL_", "RAY_", "AWS_", "GLOO_", "JPY_", "PYTEST_")


def unavailable() -> str:
    """Return why this machine can't have hosts, or nothing."""
    if sys.platform != "linux" or os.geteuid():
        return "hosts in network namespaces need Linux and root"
    if missing := [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name)]:
        return f"hosts in network namespaces need `{missing[0]}`: apt install iproute2 util-linux"
    name = f"{PREFIX}-try-{secrets.token_hex(2)}"
    tried = [["ip", "netns", "add", name], ["ip", "netns", "exec", name, "unshare", "-m", "-u", "mount", "-t", "tmpfs"]]
    tried[1] += ["tmpfs", "/dev/shm"]
    done = [subprocess.run(command, capture_output=True, text=True) for command in tried]
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    failed = [one.stderr.strip() for one in done if one.returncode]
    return f"this machine allows no namespaces ({failed[0]})" if failed else ""


class Hosts:
    """Hosts 1 to `count` as a context manager: on leaving it, no process, namespace, mount or file is left.

    Args:
        count: how many hosts.
        cpus: how many CPUs Ray counts on each host.
        ray: whether to start Ray on them; the first is the head.
        bucket: whether to start one, `s3://bucket`.
        shared: whether all hosts see one folder `self.folder`, or each a folder of its own under this path.
        loopback_names: whether each host's own name leads to 127.0.1.1, as Debian writes it into /etc/hosts.
        token: whether Ray asks for a token.
        dashboard: whether the head has one, which accepts jobs.
    """

    bucket = "s3://bucket"
    credentials = CREDENTIALS
    # The same in one URI.
    bucket_with_query = f"s3://key:secret@bucket/in-uri?region=us-east-1&scheme=http&endpoint_override={BRIDGE}:5000"

    def __init__(
        self, count, cpus=2, *, ray=True, bucket=False, shared=True, loopback_names=False, token=True, dashboard=False
    ):
        self.count, self.cpus, self.token, self.dashboard = count, cpus, token, dashboard
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        self.folder = self.root / "shared"
        self.folder.mkdir()
        self.pids = {}  # host to the process that holds its namespaces
        try:
            self._start_network()
            secret = secrets.token_hex(32)
            for host in self.numbers:
                self._start_host(host, secret, shared, loopback_names)
            (self.root / "state.json").write_text(json.dumps([count, cpus, token, self.pids]))
            if bucket:
                self._start_bucket()
            if ray:
                for host in self.numbers:
                    self.start_ray(host)
        except BaseException:
            self.down()
            raise

    @classmethod
    def running(cls) -> "Hosts":
        """Return the hosts that `up` started, the only ones on this machine; or end this program."""
        states = sorted(Path("/tmp").glob(f"{PREFIX}*/state.json"))
        if len(states) != 1:
            raise SystemExit(f"{len(states)} groups of hosts are running, and this command is for one.")
        hosts = object.__new__(cls)
        hosts.count, hosts.cpus, hosts.token, pids = json.loads(states[0].read_text())
        hosts.root, hosts.folder = states[0].parent, states[0].parent / "shared"
        hosts.pids = {int(host): pid for host, pid in pids.items()}
        return hosts

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.down()

    @property
    def numbers(self) -> range:
        """The hosts' numbers."""
        return range(1, self.count + 1)

    def run(self, host: int, command: list, timeout: float = 600, **variables) -> subprocess.CompletedProcess:
        """Run a command on a host in this folder and return it with its `stdout`, errors included, as text."""
        process = self.start(host, command, **variables)
        try:
            printed = process.communicate(timeout=timeout)[0]
        except BaseException:
            process.kill()
            process.wait()
            raise
        return subprocess.CompletedProcess(command, process.returncode, printed)

    def start(self, host: int, command: list, **variables) -> subprocess.Popen:
        """Start a command on a host, with more variables or without those that are None."""
        to_pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self._enter(host, command), env=self._environment(host, variables), **to_pipe)

    def start_ray(self, host: int, **variables) -> None:
        """Start Ray on a host, with more variables: the head on the first, nodes that join it on the others."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--num-cpus={self.cpus}"]
        command += [f"--node-ip-address=10.77.0.{10 + host}", "--object-store-memory=300000000"]
        head = ["--head", "--port=6379", f"--include-dashboard={str(self.dashboard).lower()}"]
        role = head if host == 1 else [f"--address={HEAD}"]
        done = self.run(host, [*command, *role, "--disable-usage-stats"], **variables)
        if done.returncode:
            raise RuntimeError(f"Ray does not start on host {host}:\n{done.stdout}")

    def unplug(self, host: int) -> None:
        """Pull a host's network cable: the others hear nothing more of it, and no connection is closed."""
        self._ip("-n", self._namespace(0), "link", "set", f"v{host}", "down")

    def plug(self, host: int) -> None:
        """Put the cable back."""
        self._ip("-n", self._namespace(0), "link", "set", f"v{host}", "up")

    def block(self, host: int, address: str = BRIDGE) -> None:
        """Let a host no longer reach an address, as behind a firewall; by default that of the bucket."""
        self._ip("-n", self._namespace(host), "route", "add", "unreachable", address)

    def unblock(self, host: int, address: str = BRIDGE) -> None:
        """Let a host reach an address again."""
        self._ip("-n", self._namespace(host), "route", "del", "unreachable", address)

    def kill(self, host: int) -> None:
        """End all processes of a host at once."""
        while processes := [pid for pid in self._processes(host) if pid != self.pids.get(host)]:
            for pid in processes:
                subprocess.run(["kill", "-9", str(pid)], capture_output=True)  # it may be gone
            time.sleep(0.1)

    def restart(self, host: int, **variables) -> None:
        """Plug a host in again, and start its Ray again, as after a reboot."""
        self.plug(host)
        self.kill(host)
        self.start_ray(host, **variables)

    def down(self) -> None:
        """Remove the hosts, the bucket and everything in them."""
        existing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
        self.pids.clear()  # their last processes, too
        for host in range(self.count + 1):
            if self._namespace(host) in existing:
                self.kill(host)
                self._ip("netns", "del", self._namespace(host))
        shutil.rmtree(self.root, ignore_errors=True)

    def _start_network(self) -> None:
        for host in (0, *self.numbers):
            self._ip("netns", "add", self._namespace(host))
            self._ip("-n", self._namespace(host), "link", "set", "lo", "up")
        between = ("-n", self._namespace(0))
        self._ip(*between, "link", "add", "bridge", "type", "bridge")
        self._ip(*between, "addr", "add", f"{BRIDGE}/24", "dev", "bridge")
        self._ip(*between, "link", "set", "bridge", "up")
        for host in self.numbers:
            peer = ("type", "veth", "peer", "name", "eth0", "netns", self._namespace(host))
            self._ip(*between, "link", "add", f"v{host}", *peer)
            self._ip(*between, "link", "set", f"v{host}", "master", "bridge", "up")
            self._ip("-n", self._namespace(host), "addr", "add", f"10.77.0.{10 + host}/24", "dev", "eth0")
            self._ip("-n", self._namespace(host), "link", "set", "eth0", "up")

    def _start_host(self, host: int, secret: str, shared: bool, loopback_names: bool) -> None:
        home = self.root / str(host)
        for name in ("tmp", "private", ".ray"):
            (home / name).mkdir(parents=True)
        if self.token:
            (home / ".ray" / "auth_token").write_text(secret)
        lines = ["127.0.0.1 localhost"]
        for other in self.numbers:
            address = "127.0.1.1" if loopback_names and other == host else f"10.77.0.{10 + other}"
            lines.append(f"{address} host{other}")
        (home / "etc-hosts").write_text("\n".join(lines) + "\n")
        command = ["ip", "netns", "exec", self._namespace(host), "unshare", "-m", "-u", "bash", "-c", SETUP, "hosts"]
        command += [str(host), str(home), "" if shared else str(self.folder)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "start_new_session": True}
        holder = subprocess.Popen(command, **streams)
        self.pids[host] = holder.pid  # `ip`, `unshare` and `bash` each become the next program
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"host {host} can't be set up")

    def _start_bucket(self) -> None:
        inside = ["ip", "netns", "exec", self._namespace(0), sys.executable]
        (self.root / "0").mkdir()
        nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        variables = self._environment(0, {})
        server = [*inside, Path(__file__).with_name("bucket.py"), BRIDGE, "5000", self.root / "0"]
        subprocess.Popen(server, env=variables, start_new_session=True, **nowhere)
        request = f"urllib.request.Request('http://{BRIDGE}:5000/bucket', method='PUT')"
        create = [*inside, "-c", f"import urllib.request; urllib.request.urlopen({request})"]
        deadline = time.monotonic() + 60
        while (done := subprocess.run(create, capture_output=True, text=True, env=variables)).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the bucket does not answer: {done.stderr}")
            time.sleep(0.5)

    def _environment(self, host: int, variables: dict) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
        home = str(self.root / str(host))
        own = {"HOME": home, "TMPDIR": f"{home}/tmp", "RAY_TMPDIR": home, "TUTORIAL_CHOICES": f"{home}/settings.json"}
        own |= {"RAY_AUTH_MODE": "token" if self.token else "disabled"}
        given = {name: value for name, value in {**inherited, **own, **variables}.items() if value is not None}
        return {name: str(value) for name, value in given.items() if not name.lower().endswith("_proxy")}

    def _enter(self, host: int, command: list) -> list[str]:
        words = [str(word) for word in command]
        return ["nsenter", "-t", str(self.pids[host]), "-m", "-u", "-n", f"--wd={os.getcwd()}", *words]

    def _namespace(self, host: int) -> str:
        return f"{self.root.name}-{host}"

    def _processes(self, host: int) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._namespace(host)], capture_output=True, text=True).stdout
        return [int(pid) for pid in listed.split()]

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def main() -> None:
    """Read the command line, and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start hosts")
    up.add_argument("count", type=int)
    up.add_argument("--cpus", type=int, default=2, help="how many CPUs Ray counts on each host")
    up.add_argument("--bucket", action="store_true", help="with a bucket, s3://bucket")
    up.add_argument("--not-shared", action="store_true", help="each host has a copy of its own of the shared folder")
    up.add_argument("--loopback-names", action="store_true", help="each host's own name leads to 127.0.1.1")
    up.add_argument("--no-token", action="store_true", help="anyone on these hosts may use Ray")
    on = commands.add_parser("on", help="run a command on a host")
    on.add_argument("host", type=int)
    on.add_argument("words", nargs=argparse.REMAINDER)
    commands.add_parser("down", help="end and remove the hosts")
    options = parser.parse_args()
    if reason := unavailable():
        raise SystemExit(f"Sorry: {reason}.")
    if options.command == "up":
        given = {"bucket": options.bucket, "shared": not options.not_shared, "token": not options.no_token}
        hosts = Hosts(options.count, options.cpus, loopback_names=options.loopback_names, **given)
        print(f"RAY_ADDRESS={HEAD} TUTORIAL_STORAGE={hosts.folder}/storage")
        if options.bucket:
            print(f"TUTORIAL_STORAGE={hosts.bucket}/storage", *(f"{k}={v}" for k, v in hosts.credentials.items()))
    elif options.command == "down":
        Hosts.running().down()
    else:
        hosts = Hosts.running()
        variables = hosts._environment(options.host, {"RAY_ADDRESS": HEAD})
        os.execvpe("nsenter", hosts._enter(options.host, options.words), variables)


if __name__ == "__main__":
    main()
