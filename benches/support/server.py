"""Starts `ferry serve` on free ports and stops it again. Used by the measuring scripts beside this folder."""

import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FERRY = os.environ.get("FERRY_BIN", str(ROOT / "target" / "release" / "ferry"))


class Server:
    """A running server with the named models; `sets` are `--set` settings, `edits` changes lines of manifests:
    {"minilm": {"batching": {"policy": '"window"'}}}; the table "" is the head of the file; a value of None drops the key."""

    def __init__(self, models, sets=(), edits=None):
        self.folder = tempfile.TemporaryDirectory()
        for name in models:
            shutil.copytree(ROOT / "models" / name, pathlib.Path(self.folder.name) / name)
        for name, tables in (edits or {}).items():
            manifest = pathlib.Path(self.folder.name) / name / "model.toml"
            manifest.write_text(edited(manifest.read_text(), tables))
        command = [FERRY, "serve", "--models", self.folder.name, "--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"]
        for setting in sets:
            command += ["--set", setting]
        started = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.ready_ms = (time.monotonic() - started) * 1000
        if not line.startswith("ready "):
            raise RuntimeError(f"no ready line: {line!r} {self.process.stderr.read()}")
        fields = dict(part.split("=", 1) for part in line.split()[1:])
        self.data, self.control = fields["data"], fields["control"]

    def resident_kib(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self):
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.terminate()
        self.folder.cleanup()


def edited(text, tables):
    """Manifest text with keys of some tables replaced."""
    lines, table = [], ""
    pending = {name: dict(keys) for name, keys in tables.items()}
    for line in text.splitlines() + ["[end]"]:
        head = line.strip()
        if head.startswith("["):
            lines += [f"{key} = {value}" for key, value in pending.pop(table, {}).items() if value is not None]
            table = head.strip("[]")
        key = head.split("=", 1)[0].strip()
        if table in pending and "=" in head and key in pending[table]:
            value = pending[table].pop(key)
            if value is not None:
                lines.append(f"{key} = {value}")
            continue
        lines.append(line)
    if pending:
        raise ValueError(f"no table {sorted(pending)} in the manifest")
    return "\n".join(lines[:-1]) + "\n"


def machine():
    """One line that says what ran this."""
    model = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "?")
    load = os.getloadavg()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return f"{os.cpu_count()} cores {model}, load {load:.1f}, commit {commit.stdout.strip()}, {time.strftime('%Y-%m-%d %H:%M')}"
