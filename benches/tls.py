#!/usr/bin/env python3
"""What encryption costs: latency and throughput with TLS beside without, CPU time of a handshake, and what a flood of handshakes does
to those who are served.

    cargo build --release && python3 benches/tls.py [SECONDS]

Every pair is measured in turns, plain and encrypted, so that a machine that becomes slower is slower for both. The handshakes are made
by processes of Python beside the server: their own CPU time is not counted, the server's is. Needs the command openssl.
"""

import json
import multiprocessing
import os
import pathlib
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402

ROUNDS = 3
# Below what a shard lets begin in a second, so that none is turned away.
HANDSHAKES_PER_SECOND = 150
FLOOD_PER_SECOND = 1000
FLOODERS = 4


def certificate(folder):
    """A self-signed one for this machine: the file, its key."""
    made = [str(pathlib.Path(folder) / name) for name in ("server.pem", "server.key")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         # A server of its own, not an authority: else no client would take it for one.
         "-addext", "basicConstraints=critical,CA:FALSE",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", made[0], "-keyout", made[1]],
        check=True, capture_output=True)
    return made


def load(address, ca, *flags):
    """A report of `ferry load`."""
    command = [FERRY, "load", "--addr", address, "--warmup", "1s", "--json", *flags]
    if ca:
        command += ["--tls-ca", ca]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def context(ca):
    made = ssl.create_default_context(cafile=ca)
    made.set_alpn_protocols(["ferry/1"])
    return made


def connect(address, tls):
    """One connection, with its handshake; False where it was turned away."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            with tls.wrap_socket(plain, server_hostname=host):
                return True
    except OSError:
        return False


def paced(address, ca, per_second, until, counts):
    """Handshakes at an even rate, until a moment of the monotonic clock. Adds what came of them."""
    tls, due = context(ca), time.monotonic()
    done = refused = 0
    while (now := time.monotonic()) < until:
        if now < due:
            time.sleep(min(due - now, until - now))
            continue
        # What could not be begun in time is not made up for.
        due = max(due + 1 / per_second, now - 1)
        if connect(address, tls):
            done += 1
        else:
            refused += 1
    with counts.get_lock():
        counts[0] += done
        counts[1] += refused


def handshakes(server, ca, seconds):
    """The server's CPU time per handshake, in microseconds."""
    counts = multiprocessing.Array("q", 2)
    idle = server.cpu_seconds()
    time.sleep(seconds)
    before = server.cpu_seconds()
    idle = before - idle
    process = multiprocessing.Process(
        target=paced, args=(server.data, ca, HANDSHAKES_PER_SECOND, time.monotonic() + seconds, counts))
    process.start()
    process.join()
    used = server.cpu_seconds() - before - idle
    done, refused = counts
    return {"done": done, "refused": refused, "per_second": round(done / seconds, 1),
            "server_cpu_us_each": round(used / max(done, 1) * 1e6)}


def flood(server, ca, seconds, rate):
    """Goodput of callers who are there already, alone and beside a flood."""
    flags = ["--model", "echo", "--rate", str(rate), "--slo", "20ms", "--duration", f"{seconds}s"]
    alone = load(server.data, ca, *flags)
    counts = multiprocessing.Array("q", 2)
    # The callers' own connections are made first; the flood is there for longer than they measure.
    until = time.monotonic() + seconds + 3
    process = subprocess.Popen(
        [FERRY, "load", "--addr", server.data, "--tls-ca", ca, "--warmup", "2s", "--json", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    flooders = [
        multiprocessing.Process(target=paced, args=(server.data, ca, FLOOD_PER_SECOND / FLOODERS, until, counts))
        for _ in range(FLOODERS)]
    for flooder in flooders:
        flooder.start()
    out, err = process.communicate()
    for flooder in flooders:
        flooder.join()
    if process.returncode != 0:
        raise RuntimeError(err)
    beside = json.loads(out)
    return {"offered_handshakes": sum(counts), "made": counts[0], "turned_away": counts[1],
            "goodput_alone": alone["goodput_rps"], "goodput_beside": beside["goodput_rps"],
            "share_kept": round(beside["goodput_rps"] / max(alone["goodput_rps"], 1e-9), 3)}


def middle(values):
    return {"median": statistics.median(values), "all": values}


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        ca, key = certificate(folder)
        encrypted = [f'tls.certificate="{ca}"', f'tls.key="{key}"']
        shapes = {
            # Small rows at a rate that both carry: what is added to each answer.
            "small_open": ["--model", "echo", "--rate", "2000", "--lengths", "fixed:16"],
            # As many as one shard carries.
            "small_closed": ["--model", "echo", "--concurrency", "64", "--lengths", "fixed:16"],
            # Bytes: rows of 4 KiB.
            "large_closed": ["--model", "echo", "--concurrency", "64", "--lengths", "fixed:1024"],
        }
        figures = {name: {"plain": [], "tls": []} for name in shapes}
        with Server(["echo"], ["threads.shards=1"]) as plain, Server(["echo"], ["threads.shards=1", *encrypted]) as tls:
            for _ in range(ROUNDS):
                for name, flags in shapes.items():
                    for kind, server, trusted in [("plain", plain, None), ("tls", tls, ca)]:
                        before = server.cpu_seconds()
                        report = load(server.data, trusted, "--duration", f"{seconds}s", *flags)
                        figures[name][kind].append({
                            "per_second": report["throughput_rps"],
                            "p50_us": report["latency_us"]["p50"],
                            "p99_us": report["latency_us"]["p99"],
                            "server_cpu_seconds": round(server.cpu_seconds() - before, 2),
                        })
            made = handshakes(tls, ca, seconds)
            flooded = flood(tls, ca, seconds, 2000)
        print(json.dumps({
            "machine": machine(),
            "openssl": ssl.OPENSSL_VERSION,
            "cpus": os.cpu_count(),
            "pairs": {
                name: {kind: {key: middle([run[key] for run in runs]) for key in runs[0]} for kind, runs in pair.items()}
                for name, pair in figures.items()},
            "handshakes": made,
            "flood": flooded,
        }, indent=2))


if __name__ == "__main__":
    main()
