#!/usr/bin/env python3
"""Writes the starting corpus of the fuzz targets from the golden frames, so that no binary file is committed.

Standard library only. Files land in tools/fuzz/corpus, which git ignores; running it again gives the same files.
"""
import pathlib

here = pathlib.Path(__file__).resolve().parent
for target in ("stream", "contract"):
    (here / "corpus" / target).mkdir(parents=True, exist_ok=True)
frames = {}
for path in sorted((here / "../../tests/golden").glob("*.txt")):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    frames[path.stem] = bytes.fromhex(" ".join(lines))
for name, frame in frames.items():
    # The last byte: checksums are mended (bit 0), pieces of 8 bytes.
    (here / "corpus/stream" / name).write_bytes(frame + bytes([0x0F]))
    metadata_len = int.from_bytes(frame[16:20], "little")
    if frame[4] == 5:  # infer: contract, metadata length, metadata, payload
        for contract in range(3):
            seed = bytes([contract, metadata_len]) + frame[32:]
            (here / "corpus/contract" / f"{name}_{contract}").write_bytes(seed)
(here / "corpus/stream/all").write_bytes(b"".join(frames.values()) + bytes([0x0F]))
print(f"{len(frames) + 1} streams and {len(list((here / 'corpus/contract').iterdir()))} requests")
