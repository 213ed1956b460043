#!/usr/bin/env python3
"""A server in a memory cgroup, and callers that offer several times what it may hold: nothing is killed, what does not fit is refused.

    cargo build --release && sudo python3 benches/memory_cap.py [--cap-mib 1024] [--seconds 10] [--payload-kib 4096] [--connections 512]
                                                               [--set KEY=VALUE]

Needs root and the memory controller, of either version. queue.bytes_max is what the server makes of the cap by itself, a quarter: beside what
is queued there are frames on their way, batches and answers (docs/operations.md). Ends with 1 if the server was killed, did not answer afterwards, left something
that it had accepted without an answer (its own exit status), or had to refuse nothing, for then nothing was shown.

With `--set queue.bytes_max=8589934592` it has to fail: the server is killed.
"""

import argparse
import json
import os
import pathlib
import stat
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
import server as support  # noqa: E402


class Cap:
    """A cgroup of its own."""

    def __init__(self, cap_bytes):
        root = pathlib.Path("/sys/fs/cgroup")
        one = (root / "memory" / "memory.limit_in_bytes").exists()
        self.path = root / ("memory" if one else "") / f"ferry-cap-{os.getpid()}"
        self.names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if one else ("memory.max", "memory.peak")
        self.path.mkdir()
        (self.path / self.names[0]).write_text(str(cap_bytes))
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            if (self.path / swap).exists():
                (self.path / swap).write_text(str(cap_bytes if one else 0))

    def peak_bytes(self):
        return int((self.path / self.names[1]).read_text())

    def kills(self):
        for name in ("memory.oom_control", "memory.events"):
            if (self.path / name).exists():
                counts = dict(line.split() for line in (self.path / name).read_text().splitlines())
                return int(counts.get("oom_kill", 0))
        raise RuntimeError("the controller does not count kills")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.path.rmdir()


def load(addr, seconds, kib, callers, connections):
    values = kib * 256
    command = [support.FERRY, "load", "--addr", addr, "--model", "echo", "--lengths", f"fixed:{values}", "--duration", f"{seconds}s",
               "--warmup", "0s", "--concurrency", str(callers), "--connections", str(connections), "--impatient", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("--cap-mib", type=int, default=1024)
    options.add_argument("--seconds", type=int, default=10)
    options.add_argument("--payload-kib", type=int, default=4096)
    options.add_argument("--connections", type=int, default=512)
    options.add_argument("--set", action="append", default=[], help="a setting of the server")
    args = options.parse_args()
    kib = args.payload_kib
    cap = args.cap_mib << 20
    edits = {"echo": {
        "": {"placement": '"executor"'}, "dims.values": {"max": kib * 256},
        "batching": {"rows_max": 4, "padded_cells_max": kib * 1024, "buckets": f"[{kib * 256}]"}, "warmup": {"rows": "[1]", "lengths": f"[{kib * 256}]"},
    }}
    sets = ["queue.cells_max=1073741824", *args.set]
    # As many as hold four times the cap, all of them in flight at once.
    callers = 4 * args.cap_mib * 1024 // kib
    with tempfile.TemporaryDirectory() as folder, Cap(cap) as cgroup:
        inside = pathlib.Path(folder) / "ferry"
        inside.write_text(f'#!/bin/sh\necho $$ > {cgroup.path}/cgroup.procs\nexec {support.FERRY} "$@"\n')
        inside.chmod(inside.stat().st_mode | stat.S_IXUSR)
        outside, support.FERRY = support.FERRY, str(inside)
        with support.Server(["echo"], sets, edits) as server:
            support.FERRY = outside
            over = load(server.data, args.seconds, kib, callers, args.connections)
            lives = server.process.poll() is None
            after = load(server.data, 2, kib, 1, 1) if lives else None
            peak, kills = cgroup.peak_bytes(), cgroup.kills()
            status = server.terminate() if lives else server.process.returncode
    result = {
        "machine": support.machine(), "cap_mib": args.cap_mib, "payload_kib": kib, "callers": callers, "settings": sets,
        "ok": over["ok"], "errors": over["errors"], "cut_off": over["lost"], "refusal_us": over["refusal_us"],
        "peak_mib": round(peak / (1 << 20), 1), "oom_kills": kills, "ok_after": after and after["ok"], "exit_status": status,
    }
    print(json.dumps(result, indent=1))
    refused = over["errors"].get("overloaded", 0)
    return 0 if lives and not kills and refused and after["ok"] and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
