#!/usr/bin/env python3
"""PyTorch on the same card: an encoder in bf16 with scaled_dot_product_attention and torch.compile, batches sorted by length.

    benches/gpu_torch.py --weights FOLDER --lengths lognormal:40,0.8,512 [--tokens 32768] [--requests 50000]

FOLDER is of tools/random_encoder.py. Prints one JSON document; `tokens_per_s` counts real tokens, as `ferry offline` does. Padding is to
the longest of a batch, rounded up to 16 so that few shapes are compiled; a batch has at most --tokens places.
"""

import argparse
import json
import random
import struct
import sys
import time
import tomllib

import torch
import torch.nn.functional as F


def load(folder, device):
    with open(f"{folder}/model.toml", "rb") as file:
        model = tomllib.load(file)["model"]
    tensors = {}
    with open(f"{folder}/1/weights.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        values = torch.frombuffer(data, dtype=torch.float32, count=(last - first) // 4, offset=first)
        tensors[name] = values.reshape(entry["shape"]).to(device=device, dtype=torch.bfloat16)
    return model, tensors


class Encoder(torch.nn.Module):
    def __init__(self, model, tensors):
        super().__init__()
        self.layers, self.heads, self.hidden = model["layers"], model["heads"], model["hidden"]
        self.t = tensors
        for n in range(self.layers):
            at = f"encoder.layer.{n}.attention.self"
            for kind in ("weight", "bias"):
                self.t[f"{at}.qkv.{kind}"] = torch.cat([self.t[f"{at}.{part}.{kind}"] for part in ("query", "key", "value")])

    def linear(self, x, name):
        return F.linear(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def norm(self, x, name):
        return F.layer_norm(x, (self.hidden,), self.t[f"{name}.weight"], self.t[f"{name}.bias"], 1e-12)

    def forward(self, ids, mask):
        rows, length = ids.shape
        t = self.t
        x = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.position_embeddings.weight"][:length]
        x = self.norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        attend = mask[:, None, None, :]
        for n in range(self.layers):
            at = f"encoder.layer.{n}"
            qkv = self.linear(x, f"{at}.attention.self.qkv").view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=attend)
            y = self.linear(y.transpose(1, 2).reshape(rows, length, -1), f"{at}.attention.output.dense")
            x = self.norm(x + y, f"{at}.attention.output.LayerNorm")
            y = self.linear(F.gelu(self.linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
            x = self.norm(x + y, f"{at}.output.LayerNorm")
        weight = mask[:, :, None].to(torch.float32)
        pooled = (x.float() * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=1)


def draw(text, count):
    kind, _, rest = text.partition(":")
    generator = random.Random(1)
    if kind == "fixed":
        return [int(rest)] * count
    if kind == "lognormal":
        mean, sigma, most = (float(part) for part in rest.split(","))
        # `mean` is that of the distribution before it is cut, as `ferry offline` has it.
        import math

        mu = math.log(mean) - sigma * sigma / 2
        return [max(1, min(int(most), round(generator.lognormvariate(mu, sigma)))) for _ in range(count)]
    sys.exit(f"expected fixed:N or lognormal:MEAN,SIGMA,MAX, got {text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--lengths", required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--requests", type=int, default=50000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    model, tensors = load(options.weights, options.device)
    encoder = Encoder(model, tensors)
    run = encoder if options.eager else torch.compile(encoder, dynamic=True)
    lengths = sorted(draw(options.lengths, options.requests), reverse=True)
    batches, at = [], 0
    while at < len(lengths):
        width = -(-lengths[at] // 16) * 16
        rows = max(1, options.tokens // width)
        of_batch = lengths[at : at + rows]
        ids = torch.randint(0, model["vocab"], (len(of_batch), width)).pin_memory() if options.device == "cuda" else torch.randint(
            0, model["vocab"], (len(of_batch), width)
        )
        mask = torch.arange(width)[None, :] < torch.tensor(of_batch)[:, None]
        batches.append((ids, mask))
        at += rows
    synchronize = torch.cuda.synchronize if options.device == "cuda" else (lambda: None)

    def everything():
        answers = None
        for ids, mask in batches:
            answers = run(ids.to(options.device, non_blocking=True), mask.to(options.device, non_blocking=True))
            answers = answers.to("cpu", non_blocking=True)
        synchronize()
        return answers

    times = []
    with torch.inference_mode():
        everything()
        for _ in range(3):
            start = time.perf_counter()
            everything()
            times.append(time.perf_counter() - start)
    seconds = sorted(times)[1]
    real = sum(lengths)
    print(json.dumps({"torch": torch.__version__, "tokens_per_s": real / seconds, "duration_s": seconds, "batches": len(batches), "compiled": not options.eager}))


main()
