#!/usr/bin/env python3
"""Promises that are times, measured from outside: how late an expiry is told, how soon a cancel is, what a panic costs the next
request and a storm of malformed frames all of them, whether millions of answers are each their caller's, how a wrong start ends.

    cargo build --release && python3 benches/promises.py [deadlines] [cancels] [panics] [storm] [slow] [answers] [starts] [turns] [wakes] [--json]

    deadlines   every executor sleeps for ten seconds; requests whose deadlines end in 20 to 500 ms wait behind: answer - deadline
    cancels     the same, given up while they wait and while they run: cancel to answer
    panics      a thousand, one behind the other: from the error that a request gets to the answer of the next
    storm       four attackers connect, send a malformed frame, are sent away, again and again; beside them an open loop of echoes.
                Against the same open loop without them, in turns. Twice: with bans as they are (the attackers have an address of
                their own), and without any. Then with 1,024 requests that nobody can read on each connection, without points and bans
    slow        a thousand peers send a hello byte by byte; beside them the same echoes, and beside the same peers at another port
    answers     `ferry load --verify` with lengths of 1 to 2,000 bytes: each answer is compared with what its request must get
    starts      what cannot be served: exit status, lines said, seconds
    turns       how long a task has its shard to itself, at the open loop of echoes, at as much as goes and with payloads of 2 MiB; the
                load generator has the lowest priority
                (ferry_shard_turn_seconds): half, 99, 99.9 and 99.99 % of the turns are within so long. Beside that, the machine itself:
                how often a process that has a core alone and looks at nothing but the clock misses 2 ms, while another core is busy
    wakes       echo on an executor's thread: from the end of a batch to its answer among what its connection has to send, as the answers
                themselves say; asked one by one, alone and beside an open loop of 20,000/s

Standard library only. The load generators share the machine with the server.
"""

import argparse
import json
import os
import pathlib
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402

HELLO, HELLO_ACK, DESCRIBE, DESCRIPTION, INFER, RESULT, ERROR, CANCEL, CREDIT = 1, 2, 3, 4, 5, 6, 8, 9, 12
# Types of elements, a flag, and bytes of the six times at the end of a result that has them, with the two marks around them.
F32, U32, TIMINGS, TIMES_LEN = 11, 5, 1, 50
TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = (byte >> 1) ^ 0x82F63B78 if byte & 1 else byte >> 1
    TABLE.append(byte)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def frame(kind, request_id, metadata=b"", payload=b"", model=0):
    head = struct.pack("<3s3BHQ3I", b"FRY", 1, kind, 0, model, request_id, len(metadata), len(payload), crc32c(payload))
    return head + struct.pack("<I", crc32c(head + metadata)) + metadata + payload


class Caller:
    """One connection. Answers are read by a thread and noted with their time."""

    def __init__(self, addr, model):
        host, port = addr.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb")
        self.socket.sendall(frame(HELLO, 0, struct.pack("<BBQ", 1, 1, 0) + string("promises") + string("") + string("")))
        self.read()
        self.socket.sendall(frame(DESCRIBE, 1, string(model) + string("")))
        kind, _, metadata = self.read()
        assert kind == DESCRIPTION, f"expected a description, got kind {kind}"
        self.handle, self.next_id, self.ended = struct.unpack_from("<H", metadata)[0], 2, {}
        self.timed, self.scatter_ns = set(), []
        threading.Thread(target=self.collect, daemon=True).start()

    def read(self):
        head = self.stream.read(32)
        if len(head) < 32:
            raise EOFError
        _, _, kind, _, _, request_id, meta_len, pay_len, _, _ = struct.unpack("<3s3BHQ4I", head)
        metadata = self.stream.read(meta_len)
        self.stream.read(pay_len)
        return kind, request_id, metadata

    def collect(self):
        try:
            while True:
                kind, request_id, metadata = self.read()
                if kind == RESULT and request_id in self.timed:
                    *_, scatter_ns, receipt = struct.unpack("<B6QB", metadata[-TIMES_LEN:])
                    assert receipt == 0, "none was asked for"
                    self.scatter_ns.append(scatter_ns)
                if kind in (RESULT, ERROR):
                    code, stage = struct.unpack_from("<HB", metadata) if kind == ERROR else (0, 0)
                    self.ended[request_id] = (time.monotonic(), code, stage)
        except (EOFError, OSError):
            pass

    def sleep(self, micros, deadline_us=0):
        """Asks the model to sleep. Returns the request's id and when it was sent."""
        return self.ask(U32, struct.pack("<I", micros), deadline_us)

    def ask(self, dtype, values, deadline_us=0, flags=0):
        """Sends one row of 4-byte values. Returns the request's id and when it was sent."""
        request_id, self.next_id = self.next_id, self.next_id + 1
        tensor = struct.pack("<BBQ2I", 0, dtype, 2, 1, len(values) // 4)
        metadata = struct.pack("<QBBQIQBQ", deadline_us, 0, flags, 0, 0, 0, 0, 1) + tensor
        if flags & TIMINGS:
            self.timed.add(request_id)
        sent = time.monotonic()
        self.socket.sendall(frame(INFER, request_id, metadata, values, self.handle))
        return request_id, sent

    def cancel(self, request_id):
        at = time.monotonic()
        self.socket.sendall(frame(CANCEL, request_id))
        return at

    def wait(self, ids, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(one in self.ended for one in ids):
            time.sleep(0.002)
        return [self.ended.get(one) for one in ids]


def spread(seconds):
    times = sorted(1000 * one for one in seconds)
    at = lambda share: round(times[min(int(share * len(times)), len(times) - 1)], 3)  # noqa: E731
    return {"count": len(times), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": round(times[-1], 3)}


def stuck(server, executors=8):
    """Every executor sleeps for ten seconds, and what is bound behind it."""
    caller = Caller(server.data, "sleep")
    held = []
    for _ in range(executors):
        held.append(caller.sleep(10_000_000)[0])
        time.sleep(0.03)  # each is a batch of its own
    return caller, held


def deadlines():
    with Server(["sleep"]) as server:
        _, _ = stuck(server)
        caller = Caller(server.data, "sleep")
        asked = []
        for at in range(200):
            budget = 0.02 + 0.48 * (at * 37 % 200) / 200
            asked.append((*caller.sleep(1000, int(budget * 1e6)), budget))
            time.sleep(0.01)
        ended = caller.wait([one for one, *_ in asked], 3)
        assert all(ended), f"{sum(one is None for one in ended)} of 200 were never answered"
        late = [end[0] - sent - budget for end, (_, sent, budget) in zip(ended, asked)]
        codes = sorted({(end[1], end[2]) for end in ended})
    with Server(["sleep"]) as server:
        caller = Caller(server.data, "sleep")
        running = []
        for _ in range(20):
            running.append((*caller.sleep(400_000, 200_000), 0.2))
            time.sleep(0.45)
        ended = caller.wait([one for one, *_ in running], 3)
        ran = [end[0] - sent - budget for end, (_, sent, budget) in zip(ended, running)]
        codes = sorted({*codes, *((end[1], end[2]) for end in ended)})
    return {"behind_stuck_executors": spread(late), "while_it_runs": spread(ran), "codes_and_stages": codes}


def cancels():
    with Server(["sleep"]) as server:
        _, _ = stuck(server)
        caller = Caller(server.data, "sleep")
        took = []
        for _ in range(100):
            one, _ = caller.sleep(1000)
            time.sleep(0.01)
            at = caller.cancel(one)
            took.append(caller.wait([one], 2)[0][0] - at)
    with Server(["sleep"]) as server:
        caller = Caller(server.data, "sleep")
        ran = []
        for _ in range(20):
            one, _ = caller.sleep(300_000)
            time.sleep(0.05)
            at = caller.cancel(one)
            ran.append(caller.wait([one], 2)[0][0] - at)
            time.sleep(0.3)
    return {"while_it_waits": spread(took), "while_it_runs": spread(ran)}


def panics(count=1000):
    faulty = {"sleep": {"": {"architecture": '"faulty"'}, "input": {"range": "[0, 60000]"}, "output": {"dtype": '"f32"'}}}
    with Server(["sleep"], ["executor.quarantine_max=0", "abuse.points=0", "log.level=off", "recorder.batches=0"], faulty) as server:
        caller, next_took, mates = Caller(server.data, "sleep"), [], 0
        memory = []
        for at in range(count):
            if at in (count // 4, count - 1):
                memory.append(server.resident_kib())
            bad, _ = caller.sleep(1)
            caller.wait([bad], 5)
            failed_at, code, _ = caller.ended.pop(bad)
            assert code != 0, "it panicked"
            good, _ = caller.sleep(7)
            caller.wait([good], 5)
            done_at, code, _ = caller.ended.pop(good)
            mates += code == 0
            next_took.append(done_at - failed_at)
    return {"failed_to_next_answer": spread(next_took), "next_answered": mates,
            "kib_from_a_quarter_to_the_end": memory[1] - memory[0]}


# Frames that one attacker sends at once where it sends many.
VOLLEY = 1024


def volley():
    """A hello and many requests whose metadata nobody can read."""
    hello = frame(HELLO, 0, struct.pack("<BBQ", 1, 1, 0) + string("storm") + string("") + string(""))
    return hello + b"".join(frame(INFER, at, b"\xff" * 32) for at in range(1, VOLLEY + 1))


def attack(addr, source, until, counts, at, kind):
    host, port = addr.rsplit(":", 1)
    shot = b"FRY\x09" + bytes(28) if kind == "garbage" else volley()
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, int(port)), timeout=2, source_address=(source, 0)) as peer:
                peer.sendall(shot)
                if kind != "garbage":
                    peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass
            counts[at] += 1
        except OSError:
            counts[at] += 1


ATTACK = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from promises import attack
counts = [0, 0]
until = time.monotonic() + float(sys.argv[4])
threads = [threading.Thread(target=attack, args=(sys.argv[2], sys.argv[3], until, counts, at, sys.argv[5])) for at in range(2)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(sum(counts))
"""


def echoes(server, seconds, rate):
    """Good traffic: an open loop of small requests."""
    command = [FERRY, "load", "--addr", server.data, "--model", "echo", "--lengths", "fixed:64", "--rate", str(rate), "--warmup", "0.5s",
               "--duration", f"{seconds}s", "--connections", "4", "--deadline", "50ms", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"on_time_per_s": round(report["goodput_rps"]), "p99_ms": round(report["latency_us"]["p99"] / 1000, 3),
            "errors": report["errors"], "lost": report["lost"]}


def attacked(server, seconds, rate, kind):
    """Good traffic beside attackers, and how many connections they made and requests were refused in a second."""
    line = [sys.executable, "-c", ATTACK, str(pathlib.Path(__file__).parent), server.data, "127.0.0.2", str(seconds), kind]
    before = refused(server)
    attackers = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    good = echoes(server, seconds, rate)
    made = sum(int(one.communicate()[0]) for one in attackers)
    return good, round(made / seconds), round((refused(server) - before) / seconds)


def refused(server):
    page = urllib.request.urlopen(f"http://{server.control}/metrics").read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith("ferry_requests_refused_total{"))


def storm(seconds=6, rate=20_000):
    found = {"offered_per_s": rate}
    kept = lambda beside, calm: round(beside["on_time_per_s"] / max(calm["on_time_per_s"], 1), 4)  # noqa: E731
    for name, sets in [("with_bans", []), ("without_bans", ["abuse.ban_ms=0"])]:
        with Server(["echo"], sets) as server:
            calm = echoes(server, seconds, rate)
            stormy, made, _ = attacked(server, seconds, rate, "garbage")
            found[name] = {"calm": calm, "storm": stormy, "attacks_per_s": made, "goodput_kept": kept(stormy, calm)}
    with Server(["echo"], ["abuse.ban_ms=0", "abuse.points=0"]) as server:
        calm = echoes(server, seconds, rate)
        stormy, made, frames = attacked(server, seconds, rate, "volley")
        found["many_on_a_connection"] = {"calm": calm, "storm": stormy, "connections_per_s": made, "malformed_per_s": frames,
                                         "goodput_kept": kept(stormy, calm)}
    return found


def slow(peers=1000, seconds=6, rate=20_000, rounds=3):
    """Peers that send a hello byte by byte, all at once. The process that does it takes a core's time from all others, so the same
    peers also drip into a listener that never accepts: what is left between the two is the server's."""
    with Server(["echo"]) as server:
        host, port = server.data.rsplit(":", 1)
        found, gone, kib = {"calm": []}, [], 0
        for _ in range(rounds):
            found["calm"].append(echoes(server, seconds, rate))
            with socket.create_server(("127.0.0.1", 0), backlog=peers) as nobody:
                elsewhere = drip(server, nobody.getsockname(), peers, seconds, rate)[0]
            before = server.resident_kib()
            beside, closed, most = drip(server, (host, int(port)), peers, seconds, rate)
            found.setdefault("beside_them_elsewhere", []).append(elsewhere)
            found.setdefault("beside_them", []).append(beside)
            gone += closed
            kib = max(kib, (most - before) / peers)
    middle = lambda name, what: statistics.median(one[what] for one in found[name])  # noqa: E731
    return {"peers": peers, "rounds": rounds, "closed": len(gone), "closed_after": spread(gone) if gone else None,
            "kib_a_peer": round(kib, 2), **{name: {"p99_ms": middle(name, "p99_ms"), "each": each} for name, each in found.items()},
            "goodput_kept": round(middle("beside_them", "on_time_per_s") / max(middle("calm", "on_time_per_s"), 1), 4),
            "p99_ratio_to_elsewhere": round(middle("beside_them", "p99_ms") / middle("beside_them_elsewhere", "p99_ms"), 2)}


def drip(server, target, peers, seconds, rate):
    """Good traffic beside peers that say hello to `target` byte by byte; how long each peer was kept, and the most memory meanwhile."""
    hello = frame(HELLO, 0, struct.pack("<BBQ", 1, 1, 0) + string("slow") + string("") + string(""))
    held, gone = {}, []
    for at in range(peers):
        peer = socket.create_connection(target, timeout=2, source_address=("127.0.0.2", 0))
        peer.setblocking(False)
        held[peer] = time.monotonic()
    good = {}
    beside = threading.Thread(target=lambda: good.update(echoes(server, seconds, rate)))
    beside.start()
    sent, most = 0, 0
    while beside.is_alive():
        for peer, since in list(held.items()):
            try:
                if sent < len(hello) - 1:
                    peer.send(hello[sent:sent + 1])
                closed = peer.recv(4096) == b""
            except BlockingIOError:
                closed = False
            except OSError:
                closed = True
            if closed:
                gone.append(time.monotonic() - since)
                del held[peer]
        sent += 1
        most = max(most, server.resident_kib())
        time.sleep(0.2)
    beside.join()
    for peer in held:
        peer.close()
    return good, gone, most


def answers(seconds=20):
    with Server(["echo"]) as server:
        command = [FERRY, "load", "--addr", server.data, "--model", "echo", "--lengths", "uniform:1..2000", "--concurrency", "256",
                   "--connections", "8", "--duration", f"{seconds}s", "--verify=1", "--json"]
        report = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    return {key: report[key] for key in ("ok", "verified", "mismatches", "lost")}


def starts():
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    low = lambda what, value: lambda: resource.setrlimit(what, (value, value))  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        models = pathlib.Path(folder) / "models"
        (models / "broken").mkdir(parents=True)
        (models / "broken" / "model.toml").write_text("architecture = 7\n")
        good = ["--models", str(pathlib.Path(__file__).parents[1] / "models")]
        cases = {
            "port in use": ([*good, "--listen", f"127.0.0.1:{port}"], None),
            "no models directory": (["--models", folder + "/none"], None),
            "broken manifest": (["--models", str(models)], None),
            "unknown key": ([*good, "--set", "no.such=1"], None),
            "value out of range": ([*good, "--set", "executor.threads=0"], None),
            "beyond loopback without tenants": ([*good, "--listen", "0.0.0.0:0"], None),
            "no certificate": ([*good, "--set", "tls.certificate=/none", "--set", "tls.key=/none"], None),
            "few descriptors": (good, low(resource.RLIMIT_NOFILE, 24)),
            "little locked memory": (good, low(resource.RLIMIT_MEMLOCK, 4096)),
        }
        found = {}
        for name, (arguments, before) in cases.items():
            listen = [] if "--listen" in arguments else ["--listen", "127.0.0.1:0"]
            command = [FERRY, "serve", *listen, "--control", "127.0.0.1:0", *arguments]
            began = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, preexec_fn=before, timeout=20)
            said = (done.stderr + done.stdout).strip().splitlines()
            found[name] = {"status": done.returncode, "lines": len(said), "seconds": round(time.monotonic() - began, 3),
                           "said": (said or [""])[-1].replace(folder, "FOLDER")[:200]}
        return found


LOOK = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
until, last, pauses = time.perf_counter() + float(sys.argv[2]), time.perf_counter(), []
while last < until:
    now = time.perf_counter()
    if now - last > 0.002:
        pauses.append(now - last)
    last = now
print(len(pauses), max(pauses, default=0))
"""


def pauses_of_the_machine(seconds):
    busy, looked = sorted(os.sched_getaffinity(0))[:2]
    other = subprocess.Popen([sys.executable, "-c", LOOK, str(busy), str(seconds + 1)], stdout=subprocess.DEVNULL)
    said = subprocess.run([sys.executable, "-c", LOOK, str(looked), str(seconds)], capture_output=True, text=True, check=True).stdout
    other.wait()
    count, longest = said.split()
    return {"seconds": seconds, "pauses_beyond_2_ms": int(count), "longest_ms": round(1000 * float(longest), 1)}


def turns(seconds=10):
    """Which share of the turns took how long: the upper end of the bucket that it falls into, in microseconds."""
    def load(*more):
        command = ["nice", "-n", "19", FERRY, "load", "--addr", server.data, "--model", "echo", "--connections", "8", "--duration", f"{seconds}s", "--json", *more]
        return json.loads(subprocess.run(command, capture_output=True, text=True).stdout)

    def counts():
        page = urllib.request.urlopen(f"http://{server.control}/metrics").read().decode()
        found = {}
        for line in page.splitlines():
            if line.startswith("ferry_shard_turn_seconds_bucket{"):
                labels = dict(part.split("=", 1) for part in line.split("{", 1)[1].split("}", 1)[0].split(","))
                bound = float(labels["le"].strip('"').replace("+Inf", "inf"))
                found.setdefault(labels["task"].strip('"'), {})[bound] = int(float(line.rsplit(" ", 1)[1]))
        return found

    def shares(before, after):
        result = {}
        for task, buckets in after.items():
            # Cumulative, as they are exported.
            since = {bound: count - before.get(task, {}).get(bound, 0) for bound, count in sorted(buckets.items())}
            turns = since[float("inf")]
            if turns:
                within = lambda share: next(bound for bound, count in since.items() if count >= share * turns)  # noqa: E731
                result[task] = {"turns": turns, "beyond_2_ms": turns - since[0.002],
                                "us": {f"p{100 * share:g}": 1e6 * within(share) for share in (0.5, 0.99, 0.999, 0.9999)}}
        return result

    cases = {"20,000/s of 256 bytes": ["--lengths", "fixed:64", "--rate", "20000"],
             "256 callers, 256 bytes": ["--lengths", "fixed:64", "--concurrency", "256"],
             "8 callers, 2 MiB": ["--lengths", "fixed:524288", "--concurrency", "8"]}
    found = {}
    edits = {"echo": {"dims.values": {"max": 1 << 19}, "warmup": {"lengths": "[64]"},
                      "batching": {"padded_cells_max": 1 << 19, "buckets": f"[64, {1 << 19}]"}}}
    with Server(["echo"], edits=edits) as server:
        for name, more in cases.items():
            before = counts()
            report = load(*more)
            found[name] = {"ok_per_s": round(report["goodput_rps"]), **shares(before, counts())}
    if len(os.sched_getaffinity(0)) > 1:
        found["the machine itself"] = pauses_of_the_machine(seconds)
    return found


def wakes(count=3000):
    def asked(addr):
        caller = Caller(addr, "echo")
        for _ in range(count):
            one, _ = caller.ask(F32, bytes(256), flags=TIMINGS)
            assert caller.wait([one], 5)[0][1] == 0, "it is answered"
        return spread(nanos / 1e9 for nanos in caller.scatter_ns)

    with Server(["echo"], edits={"echo": {"": {"placement": '"executor"'}}}) as server:
        alone = asked(server.data)
        beside = subprocess.Popen(["nice", "-n", "19", FERRY, "load", "--addr", server.data, "--model", "echo", "--connections", "8", "--lengths",
                                   "fixed:64", "--rate", "20000", "--duration", "60s", "--json"], stdout=subprocess.DEVNULL)
        time.sleep(1)
        busy = asked(server.data)
        assert beside.poll() is None, "the load ended before it was measured beside it"
        beside.terminate()
        beside.wait()
    return {"alone": alone, "beside_20000_per_s": busy}


PARTS = {"deadlines": deadlines, "cancels": cancels, "panics": panics, "storm": storm, "slow": slow, "answers": answers, "starts": starts,
         "turns": turns, "wakes": wakes}


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    result = {"machine": machine()}
    for name in args.parts or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = PARTS[name]()
        if not args.json:
            print(json.dumps({name: result[name]}, indent=1), flush=True)
    if args.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
