#!/usr/bin/env python3
"""Writes the starting corpus of the fuzz targets: what fuzzing has found so far, minimized (seeds/), and what can be had from files of
the repository (golden frames, manifests, traces, weights).

    tools/fuzz/seed.py [--to FOLDER] [TARGET…]     of all targets, into tools/fuzz/corpus, which git ignores

Standard library only. Running it again gives the same files.
"""
import argparse
import pathlib
import re
import tarfile

here = pathlib.Path(__file__).resolve().parent
root = here.parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--to", type=pathlib.Path, default=here / "corpus")
parser.add_argument("targets", nargs="*")
args = parser.parse_args()
corpus = args.to

for archive in sorted((here / "seeds").glob("*.tar.xz")):
    target = archive.name.split(".")[0]
    if not args.targets or target in args.targets:
        (corpus / target).mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as seeds:
            seeds.extractall(corpus / target, filter="data")


def seed(target, name, content):
    if args.targets and target not in args.targets:
        return
    folder = corpus / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


frames = {}
for path in sorted((root / "tests/golden").glob("*.txt")):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    frames[path.stem] = bytes.fromhex(" ".join(lines))
# In the order of the target: hello, hello_ack, describe, description, infer, result, error, credit, goaway, item.
KINDS = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 8: 6, 12: 7, 13: 8, 7: 9}
for name, frame in frames.items():
    # The last byte: checksums are mended (bit 0), pieces of 8 bytes.
    seed("stream", name, frame + bytes([0x0F]))
    seed("header", name, frame[:32] + bytes([12, 16]))
    metadata_len = int.from_bytes(frame[16:20], "little")
    metadata = frame[32 : 32 + metadata_len]
    if frame[4] in KINDS:
        seed("metadata", name, bytes([KINDS[frame[4]]]) + metadata)
    if frame[4] == 5 and metadata_len < 256:  # infer: contract, metadata length, metadata, payload
        for contract in range(3):
            seed("contract", f"{name}_{contract}", bytes([contract, metadata_len]) + frame[32:])
seed("stream", "all", b"".join(frames.values()) + bytes([0x0F]))

for path in sorted((root / "models").glob("*/model.toml")):
    seed("manifest", path.parent.name, path.read_bytes())
keys = re.findall(r'key: "([a-z_.]+)"', (root / "src/config/limits.rs").read_text())
for key in keys:
    for value in ("1", "0", "4096", '"a"', "true", "127.0.0.1:0"):
        seed("config", f"{key}-{re.sub('[^a-z0-9]', '', value)}", f"{key}={value}".encode())
seed("config", "all", "\n".join(f"{key}=7" for key in keys).encode())
for path in sorted((root / "tests/traces").glob("*.trace")):
    # The beginning: a state, and the first events.
    seed("trace", path.stem, b"\0" + path.read_bytes()[:3000])
weights = b'\x01{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F32","shape":[4],"data_offsets":[24,40]},' \
          b'"c":{"dtype":"F32","shape":[],"data_offsets":[40,44]}}' + bytes(44)
seed("weights", "whole", weights)
seed("weights", "f16", weights.replace(b"F32", b"F16"))
texts = re.findall(r'r#"(.*?)"#', (root / "tests/import.rs").read_text(), re.S)
for number, text in enumerate(texts):
    seed("import", f"text-{number}", text.encode())
# A connection that says hello and asks, twice, and the batches that follow: choices and who, as the target reads them.
hello = bytes([15, 0, 1, 0])
ask = bytes([11, 0, 0, 2, 3, 0, 5])
seed("session", "asks", bytes([0, 0]) + hello + ask * 3 + bytes([5, 0, 6, 0, 0, 8, 0, 10, 0]) * 2)
seed("session", "fails", bytes([0, 0]) + hello + ask + bytes([11, 0, 0, 2, 3, 0, 0xF1, 11, 0, 0, 1, 3, 0, 0xF9]) + bytes([5, 0, 6, 0, 0, 8, 0, 10, 0]))
seed("tenants", "one", b'[tenant.a]\nroles = ["infer", "observe", "admin"]\ntokens = [{ id = "a1", sha256 = "' + b"0" * 64 + b'", expires = "2027-01-31" }]\n'
     b'certificates = ["spiffe://x/a"]\n[tenant.a.quota]\nrequests_per_second = 5\nin_flight_max = 7\n')
seed("scheduler", "some", bytes(range(40)) * 6)
print(f"{len(list(corpus.glob('*/*')))} inputs for {len(list(corpus.iterdir()))} targets")
