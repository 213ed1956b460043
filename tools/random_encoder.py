#!/usr/bin/env python3
"""An encoder of all-MiniLM-L6-v2's or BERT-base's shape with seeded random weights: to measure speed where the real ones are not.

    tools/random_encoder.py FOLDER minilm|base [PRECISION]     makes FOLDER/random_minilm or FOLDER/random_base

Needs nothing beyond Python. Its embeddings mean nothing; its arithmetic is that of the real one.
"""

import array
import json
import os
import random
import struct
import sys

SHAPES = {
    "minilm": {"layers": 6, "hidden": 384, "heads": 12, "intermediate": 1536},
    "base": {"layers": 12, "hidden": 768, "heads": 12, "intermediate": 3072},
}
VOCAB, POSITIONS, TOKENS_MAX = 30522, 512, 512

MANIFEST = """# Random weights in the shape of {name}, to measure with. Made by tools/random_encoder.py.
architecture = "bert"
version = "1"

[dims.tokens]
min = 1
max = {tokens_max}

[[input]]
name = "ids"
dtype = "u32"
shape = ["tokens"]
pad = 0
range = [0, {last_id}]

[[output]]
name = "embedding"
dtype = "f32"
shape = [{hidden}]

[batching]
rows_max = {rows_max}
padded_cells_max = {cells_max}

[warmup]
rows = [1, 64]
lengths = [8, 64, 256]

[weights]

[model]
layers = {layers}
hidden = {hidden}
heads = {heads}
intermediate = {intermediate}
vocab = {vocab}
positions = {positions}
segments = 2
layer_norm_eps = 1e-12
activation = "gelu_erf"
pooling = "mean"
normalize = true
precision = "{precision}"
"""


def tensors(shape):
    """Names and shapes, in the order in which they are written."""
    hidden, wide = shape["hidden"], shape["intermediate"]
    yield "embeddings.word_embeddings.weight", [VOCAB, hidden]
    yield "embeddings.position_embeddings.weight", [POSITIONS, hidden]
    yield "embeddings.token_type_embeddings.weight", [2, hidden]
    yield "embeddings.LayerNorm.weight", [hidden]
    yield "embeddings.LayerNorm.bias", [hidden]
    for layer in range(shape["layers"]):
        at = f"encoder.layer.{layer}"
        parts = [(f"attention.self.{part}", hidden, hidden) for part in ("query", "key", "value")]
        parts += [("attention.output.dense", hidden, hidden), ("intermediate.dense", wide, hidden), ("output.dense", hidden, wide)]
        for part, outputs, inputs in parts:
            yield f"{at}.{part}.weight", [outputs, inputs]
            yield f"{at}.{part}.bias", [outputs]
        for part in ("attention.output", "output"):
            yield f"{at}.{part}.LayerNorm.weight", [hidden]
            yield f"{at}.{part}.LayerNorm.bias", [hidden]


def write_weights(path, shape):
    header, end = {}, 0
    for name, dims in tensors(shape):
        size = 4
        for dim in dims:
            size *= dim
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # One block of random numbers for all, begun at another place in each tensor: as good as fresh ones for speed.
    generator = random.Random(1)
    block = array.array("f", (generator.gauss(0.0, 0.02) for _ in range(1 << 18)))
    if sys.byteorder != "little":
        block.byteswap()
    with open(path + ".new", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors(shape):
            first, last = header[name]["data_offsets"]
            count = (last - first) // 4
            if name.endswith("LayerNorm.weight"):
                file.write(array.array("f", [1.0]).tobytes() * count if sys.byteorder == "little" else struct.pack("<f", 1.0) * count)
                continue
            start = generator.randrange(len(block))
            turned = (block[start:] + block[:start]).tobytes()
            whole, rest = divmod(count, len(block))
            file.write(turned * whole + turned[: 4 * rest])
    os.replace(path + ".new", path)


def main():
    if len(sys.argv) not in (3, 4) or sys.argv[2] not in SHAPES:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    name = sys.argv[2]
    shape = SHAPES[name]
    folder = os.path.join(sys.argv[1], f"random_{name}")
    os.makedirs(os.path.join(folder, "1"), exist_ok=True)
    write_weights(os.path.join(folder, "1", "weights.safetensors"), shape)
    precision = sys.argv[3] if len(sys.argv) == 4 else "f32"
    limits = {"rows_max": 256, "cells_max": '"auto"', "precision": precision}
    values = {"name": name, "tokens_max": TOKENS_MAX, "last_id": VOCAB - 1, "vocab": VOCAB, "positions": POSITIONS}
    with open(os.path.join(folder, "model.toml"), "w", encoding="utf-8") as file:
        file.write(MANIFEST.format(**values, **shape, **limits))
    print(folder)


main()
