#!/usr/bin/env python3
"""What an idle server costs: time to ready, resident memory, memory per idle connection, wake-ups' CPU time.

    cargo build --release && python3 benches/idle.py [CONNECTIONS]
"""

import json
import pathlib
import socket
import struct
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import ROOT, Server, machine  # noqa: E402


def golden(name):
    """The bytes of a golden frame."""
    text = (ROOT / "tests" / "golden" / name).read_text()
    hexes = "".join(line for line in text.splitlines() if not line.startswith("#"))
    return bytes.fromhex("".join(hexes.split()))


def receive(connection, count):
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise RuntimeError("the server closed the connection")
        data += part
    return data


def hello(address, frame):
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.sendall(frame)
    header = receive(connection, 32)
    metadata, payload = struct.unpack_from("<II", header, 16)
    receive(connection, metadata + payload)
    return connection


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    ready = []
    for _ in range(5):
        with Server(["echo"]) as server:
            ready.append(server.ready_ms)
    frame = golden("hello.txt")
    with Server(["echo"]) as server:
        time.sleep(2)
        alone = server.resident_kib()
        cpu = server.cpu_seconds()
        time.sleep(5)
        idle_cpu = (server.cpu_seconds() - cpu) / 5
        connections = [hello(server.data, frame) for _ in range(count)]
        time.sleep(3)  # buffers of a connection that says nothing are given back after a second
        held = server.resident_kib()
        for connection in connections:
            connection.close()
    print(json.dumps({
        "machine": machine(),
        "ready_ms": {"median": sorted(ready)[2], "all": [round(ms, 1) for ms in ready]},
        "resident_mib": round(alone / 1024, 1),
        "idle_cpu_share": round(idle_cpu, 4),
        "connections": count,
        "kib_per_idle_connection": round((held - alone) / count, 2),
    }, indent=2))


if __name__ == "__main__":
    main()
