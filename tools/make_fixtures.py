#!/usr/bin/env python3
"""Makes the reference answers that ferry's BERT encoder is tested against.

Run in an environment of its own; the server needs none of this:

    python3 -m venv "$VENV" && "$VENV/bin/pip" install torch transformers tokenizers safetensors numpy
    python3 tools/fetch_minilm.py
    "$VENV/bin/python" tools/make_fixtures.py

Writes, below the repository root (or --root):
    tests/fixtures/minilm.json                       sentences, token ids and embeddings of all-MiniLM-L6-v2
    tests/fixtures/tiny_bert/1/weights.safetensors   a tiny random BERT with the usual tensor names
    tests/fixtures/tiny_bert_expected.safetensors    its answers: ids (end to end), lengths, embeddings

Always true
- The reference is transformers' BertModel with eager attention, exact erf GELU and layer_norm_eps 1e-12, one sentence
  at a time, so no padding, mask or batch can have a part in the answer.
- Nothing is written before a second implementation, in float64 numpy below, agrees to 1e-5 in every component: two
  implementations that share no code.
- Token ids come from tokenizer.json with padding and truncation off (the published file switches both on).

Exit status: 0 written, 1 the two implementations disagree or a file is missing, 2 wrong use or a package is missing.
"""

import argparse
import json
import math
import sys
from pathlib import Path

try:
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel
except ImportError as missing:
    print(f"make_fixtures: {missing}; see the head of this file for the environment it needs", file=sys.stderr)
    sys.exit(2)

AGREE_WITHIN = 1e-5

MINILM = dict(
    vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
    max_position_embeddings=512, layer_norm_eps=1e-12, hidden_act="gelu", attn_implementation="eager",
)  # fmt: skip
TINY = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=64, layer_norm_eps=1e-12, hidden_act="gelu", attn_implementation="eager",
)  # fmt: skip
TINY_SEED = 7
TINY_LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 48, 64]

# Ours, written for this file. Very mixed lengths on purpose; also text that a tokenizer may stumble over.
SENTENCES = [
    "Hello",
    "",
    "?!",
    "naïve café, Ångström",
    "猫が好きです。",
    "🚀 launch",
    "The batch is full.",
    "A lone request waits no longer than it was promised.",
    "the batch IS full",
    "Padding is work that nobody asked for.",
    "Prices rose by 3.75 % between 2019-04-01 and 2021-12-31, to $1,234.56 per unit.",
    "How do I reset the password of my account?",
    "I forgot my login credentials and need to recover them.",
    "The recipe asks for two eggs, a cup of flour and a pinch of salt.",
    "fn main() { println!(\"{}\", xs.iter().map(|x| x * 2).sum::<u64>()); }",
    "https://example.org/a/very/long/path?with=query&and=more#fragment",
    "Donaudampfschifffahrtsgesellschaftskapitän and antidisestablishmentarianism are long words, "
    "pneumonoultramicroscopicsilicovolcanoconiosis is a longer one.",
    "A scheduler that looks only at the oldest request will close its batch early, and one that looks only at the "
    "fullest lane will let the oldest request wait; a good one does both sums before it decides.",
    "When the queue is short the window costs latency and buys nothing. When it is long the window closes by itself, "
    "because the batch is full before the clock runs out. The interesting part is between the two, and it moves "
    "with every change of the traffic.",
    "Rain fell on the harbour all morning. The boats stayed in, the gulls sat in a row on the wall, and the man "
    "who sold coffee from a van gave up at eleven and drove home. By two the clouds had gone, the cranes were "
    "moving again, and nobody could have said what the quiet had been for.",
    "Measure before you tune, and write down what you expected before you measure. A number that agrees with what "
    "you believed will not be questioned, and a number that does not will be explained away. Keep the command, the "
    "machine, the load and the commit beside the result. Run it again tomorrow. If it moves by a tenth, your change of "
    "a twentieth was never there.",
    "The museum's oldest clock has one hand. It was made for a town where nobody needed minutes: the market opened "
    "when the bell rang, the ferry left when it was full, and the baker's day began when he woke. The second hand and "
    "the third came with the railway, which had to agree with other towns, and so the clock was put away. It still runs, "
    "losing a quarter of an hour each week, and a guide sets it right on Mondays with a wooden key. Visitors ask her what "
    "time it is and she tells them, without looking, that it is about ten.",
    "To whom it may concern: the parcel that was sent on the third of the month arrived yesterday, opened, with two of "
    "the four glasses broken and the invoice missing. I have kept the box and photographed it from every side. Your "
    "terms say that damage must be reported within forty-eight hours, which this letter does, and that a replacement is "
    "sent at no charge, which I ask for. I do not want a refund, because the set was discontinued and I would not find "
    "it elsewhere. Should only single glasses remain in your store, please send three instead of two and I shall return "
    "the one that survived alone. You reach me in the evening at the number below, or at any time by post. I remain, "
    "with thanks for your trouble and in good hope of an early answer, yours faithfully.",
    "error: borrow of moved value `batch` --> src/executor/pipeline.rs:118:22 | 112 | let batch = lane.seal(now); | ----- "
    "move occurs because `batch` has type `SealedBatch`, which does not implement the `Copy` trait 115 | slot.submit(batch); "
    "| ----- value moved here 118 | self.trace(&batch); | ^^^^^^ value borrowed here after move. note: consider borrowing "
    "instead of transferring ownership; if this is intended, clone the rows before they are handed over, or trace before "
    "the submit. aborting due to 1 previous error; 2 warnings emitted.",
]  # fmt: skip


def normalised_mean(hidden):
    """[tokens, hidden] of one sentence, all tokens real, to its embedding of length 1."""
    mean = hidden.mean(0)
    return mean / (mean**2).sum() ** 0.5


def reference(model, ids):
    """transformers: one sentence alone."""
    with torch.inference_mode():
        row = torch.tensor([ids], dtype=torch.int64)
        hidden = model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0]
        return normalised_mean(hidden).numpy().astype(np.float32)


erf = np.vectorize(math.erf)


def second_opinion(weights, config, ids):
    """The same encoder from the paper, in float64 numpy; it shares no code with the reference."""
    w = lambda name: weights[name].astype(np.float64)  # noqa: E731

    def linear(x, name):
        return x @ w(name + ".weight").T + w(name + ".bias")

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w(name + ".weight") + w(name + ".bias")

    heads = config["num_attention_heads"]
    x = w("embeddings.word_embeddings.weight")[ids]
    x = x + w("embeddings.position_embeddings.weight")[: len(ids)] + w("embeddings.token_type_embeddings.weight")[0]
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        q, k, v = (
            linear(x, f"{at}attention.self.{part}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        context = (scores / scores.sum(-1, keepdims=True)) @ v
        context = context.transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(x + linear(context, at + "attention.output.dense"), at + "attention.output.LayerNorm")
        inner = linear(x, at + "intermediate.dense")
        inner = 0.5 * inner * (1.0 + erf(inner / math.sqrt(2.0)))
        x = norm(x + linear(inner, at + "output.dense"), at + "output.LayerNorm")
    return normalised_mean(x)


class Disagree(Exception):
    pass


def embed(model, weights, config, sequences, what):
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    answers, apart = [], 0.0
    for ids in sequences:
        answer = reference(model, ids)
        apart = max(apart, float(np.abs(answer - second_opinion(arrays, config, ids)).max()))
        answers.append(answer)
    print(f"{what}: {len(answers)} sequences, largest difference between the two implementations {apart:.1e}")
    if not apart <= AGREE_WITHIN:
        raise Disagree(f"{what}: expected at most {AGREE_WITHIN}, they differ by {apart}")
    return answers


def make_minilm(root):
    source = root / "models/minilm/1"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    weights = load_file(source / "weights.safetensors")
    model = BertModel(BertConfig(**MINILM)).eval()
    # position_ids is a counter that old checkpoints stored; everything else has to fit exactly.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if [n for n in missing if "position_ids" not in n] or [n for n in unexpected if "position_ids" not in n]:
        raise Disagree(f"minilm weights: missing {missing}, unexpected {unexpected}")

    sequences = [tokenizer.encode(text).ids for text in SENTENCES]
    answers = embed(model, weights, MINILM, sequences, "minilm")
    lengths = sorted(map(len, sequences))
    print(f"minilm: lengths {lengths}")
    rows = [
        {"text": text, "ids": ids, "embedding": [float(f"{v:.8g}") for v in answer]}
        for text, ids, answer in zip(SENTENCES, sequences, answers)
    ]
    path = root / "tests/fixtures/minilm.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One row per line: a change of one sentence is a change of one line.
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    path.write_text('{"sentences":[\n' + lines + "\n]}\n", encoding="utf-8")
    return path


def make_tiny(root):
    torch.manual_seed(TINY_SEED)
    model = BertModel(BertConfig(**TINY), add_pooling_layer=False).eval()
    # The usual initialisation (0.02, norms at 1 and 0) makes layers that hardly do anything: a swapped bias or a wrong
    # head order would pass. These are large enough that every parameter moves the answer.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.25)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if tensor.dtype == torch.float32}

    generator = torch.Generator().manual_seed(TINY_SEED)
    sequences = [torch.randint(0, TINY["vocab_size"], (n,), generator=generator).tolist() for n in TINY_LENGTHS]
    answers = embed(model, weights, TINY, sequences, "tiny_bert")
    weights_path = root / "tests/fixtures/tiny_bert/1/weights.safetensors"
    expected_path = root / "tests/fixtures/tiny_bert_expected.safetensors"
    weights_path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, weights_path)
    save_file(
        {
            "ids": torch.tensor([i for ids in sequences for i in ids], dtype=torch.uint32),
            "lengths": torch.tensor(TINY_LENGTHS, dtype=torch.uint32),
            "embeddings": torch.tensor(np.stack(answers)),
        },
        expected_path,
    )
    return [weights_path, expected_path]


def main():
    parser = argparse.ArgumentParser(description="Make the reference answers for the BERT encoder's tests.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="repository root")
    root = parser.parse_args().root
    if not (root / "models/minilm/1/weights.safetensors").is_file():
        print("make_fixtures: models/minilm is not fetched; run tools/fetch_minilm.py first", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    try:
        paths = [make_minilm(root), *make_tiny(root)]
    except Disagree as disagree:
        print(f"make_fixtures: {disagree}; nothing more is written", file=sys.stderr)
        return 1
    for path in paths:
        print(f"wrote {path.relative_to(root)}, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
