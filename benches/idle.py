#!/usr/bin/env python3
"""What an idle server costs: time to ready, resident memory, memory per idle connection, plain and encrypted, wake-ups' CPU time.

    cargo build --release && python3 benches/idle.py [CONNECTIONS [ENCRYPTED]]

Encrypted connections are made no faster than a shard lets handshakes begin. Needs the command openssl.
"""

import json
import pathlib
import socket
import struct
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import ROOT, Server, machine  # noqa: E402
from tls import HANDSHAKES_PER_SECOND, certificate, context  # noqa: E402


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


def hello(address, frame, encrypt=None):
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    if encrypt:
        connection = encrypt.wrap_socket(connection, server_hostname=host)
        time.sleep(1 / HANDSHAKES_PER_SECOND)
    connection.sendall(frame)
    header = receive(connection, 32)
    metadata, payload = struct.unpack_from("<II", header, 16)
    receive(connection, metadata + payload)
    return connection


def kib_per_connection(server, count, encrypt=None):
    """Memory that connections take that said hello and then nothing."""
    alone = server.resident_kib()
    connections = [hello(server.data, golden("hello.txt"), encrypt) for _ in range(count)]
    time.sleep(3)  # buffers of a connection that says nothing are given back after a second
    held = server.resident_kib()
    for connection in connections:
        connection.close()
    return round((held - alone) / count, 2)


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    encrypted = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    ready = []
    for _ in range(5):
        with Server(["echo"]) as server:
            ready.append(server.ready_ms)
    with Server(["echo"]) as server:
        time.sleep(2)
        alone = server.resident_kib()
        cpu = server.cpu_seconds()
        time.sleep(5)
        idle_cpu = (server.cpu_seconds() - cpu) / 5
        plain = kib_per_connection(server, count)
    with tempfile.TemporaryDirectory() as folder:
        chain, key = certificate(folder)
        with Server(["echo"], [f'tls.certificate="{chain}"', f'tls.key="{key}"']) as server:
            hello(server.data, golden("hello.txt"), context(chain)).close()
            over_tls = kib_per_connection(server, encrypted, context(chain))
    print(json.dumps({
        "machine": machine(),
        "ready_ms": {"median": sorted(ready)[2], "all": [round(ms, 1) for ms in ready]},
        "resident_mib": round(alone / 1024, 1),
        "idle_cpu_share": round(idle_cpu, 4),
        "connections": count,
        "kib_per_idle_connection": plain,
        "encrypted_connections": encrypted,
        "kib_per_idle_encrypted_connection": over_tls,
    }, indent=2))


if __name__ == "__main__":
    main()
