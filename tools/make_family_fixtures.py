#!/usr/bin/env python3
"""Makes the tiny checkpoints and reference answers that ferry's whole encoder family is tested against.

Run in an environment of its own; the server needs none of this:

    python3 -m venv "$VENV" && "$VENV/bin/pip" install torch transformers safetensors numpy
    "$VENV/bin/python" tools/make_family_fixtures.py

Writes, for each model named in MODELS, below the repository root (or --root):
    tests/fixtures/family/<name>/model.toml              its manifest
    tests/fixtures/family/<name>/1/weights.safetensors   random weights under the names that published checkpoints have
    tests/fixtures/family/<name>/expected.safetensors    ids (end to end), lengths, segments where the model takes them,
                                                         outputs (embeddings or logits)

Always true
- The reference is the model of transformers itself with eager attention, one sequence at a time, so no padding, mask or
  batch can have a part in the answer.
- Nothing is written before a second implementation, in float64 numpy below, agrees with every answer of every model to
  1e-5 in every component: two implementations that share no code.
- Every parameter moves the answers: they are larger than a usual initialisation. Each file has the names of NAMES and no
  others, so that a new transformers with other names is noticed here.
- No RoBERTa sequence has the id of padding (1): transformers counts positions past it, and real text has none.
- The same run gives the same bytes.

Exit status: 0 written, 1 the two implementations disagree or a checkpoint has other names, 2 wrong use or a package is
missing.
"""

import argparse
import math
import sys
from pathlib import Path

try:
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import save_file
except ImportError as missing:
    print(f"make_family_fixtures: {missing}; see the head of this file for the environment it needs", file=sys.stderr)
    sys.exit(2)

AGREE_WITHIN = 1e-5
LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 48, 64]
VOCAB, HIDDEN, LAYERS, HEADS, INTERMEDIATE, LENGTH_MAX = 100, 32, 2, 4, 64, 64
# RoBERTa's tables begin with a place for id 0 that nobody uses and one for padding.
ROBERTA_PADDING, ROBERTA_OFFSET = 1, 2

BERT = dict(family="bert", positions=LENGTH_MAX, segments=2, eps=1e-12)
ROBERTA = dict(family="roberta", positions=LENGTH_MAX + ROBERTA_OFFSET, segments=1, eps=1e-5)
DISTILBERT = dict(family="distilbert", positions=LENGTH_MAX, segments=0, eps=1e-12)
EMBEDDING = dict(head="embedding", activation="gelu_erf", pooling="mean", normalize=True, takes_segments=False, prefix="")
# A classifier reads the first token; the pooler or the dense layer before its last one belongs to its family's head.
CLASSIFY = EMBEDDING | dict(head="classify", pooling="cls", normalize=False)

# One line per fixture: what it is for, the class of transformers that answers, and what its manifest says. `prefix` is
# what stands before the encoder's names in the file.
MODELS = {
    "roberta": EMBEDDING | ROBERTA
    | dict(of="RobertaModel", about="A RoBERTa encoder: positions from 2, one segment."),
    "xlm_roberta": EMBEDDING | ROBERTA
    | dict(of="XLMRobertaModel", prefix="roberta.",
           about="An XLM-R encoder, RoBERTa by another name, as published: below `roberta.`."),
    "distilbert": EMBEDDING | DISTILBERT
    | dict(of="DistilBertModel", about="A DistilBERT encoder: no segments, names of its own."),
    "bert_cross": CLASSIFY | BERT
    | dict(of="BertForSequenceClassification", prefix="bert.", labels=1, takes_segments=True,
           about="A BERT cross-encoder: two texts in one row, told apart by segments, to one score."),
    "roberta_classify": CLASSIFY | ROBERTA
    | dict(of="RobertaForSequenceClassification", prefix="roberta.", labels=3,
           about="A RoBERTa classifier: dense, tanh, projection."),
    "distilbert_classify": CLASSIFY | DISTILBERT
    | dict(of="DistilBertForSequenceClassification", prefix="distilbert.", labels=2,
           about="A DistilBERT classifier: dense, ReLU, projection."),
    "bert_gelu_tanh": EMBEDDING | BERT
    | dict(of="BertModel", activation="gelu_tanh", about="A BERT encoder with GELU by tanh."),
    "bert_relu": EMBEDDING | BERT
    | dict(of="BertModel", activation="relu", about="A BERT encoder with ReLU."),
    "bert_cls": EMBEDDING | BERT
    | dict(of="BertModel", pooling="cls", about="A BERT encoder pooled by its first token."),
    "bert_max": EMBEDDING | BERT
    | dict(of="BertModel", pooling="max", normalize=False, about="A BERT encoder pooled by the largest of each component."),
}  # fmt: skip

HIDDEN_ACT = {"gelu_erf": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}

# Ours, for a part of the encoder, to the family's. `{n}` is the layer.
NAMES = {
    "bert": dict(
        words="embeddings.word_embeddings", places="embeddings.position_embeddings",
        segments="embeddings.token_type_embeddings", norm="embeddings.LayerNorm",
        q="encoder.layer.{n}.attention.self.query", k="encoder.layer.{n}.attention.self.key",
        v="encoder.layer.{n}.attention.self.value", attention_out="encoder.layer.{n}.attention.output.dense",
        attention_norm="encoder.layer.{n}.attention.output.LayerNorm", inner="encoder.layer.{n}.intermediate.dense",
        out="encoder.layer.{n}.output.dense", out_norm="encoder.layer.{n}.output.LayerNorm",
    ),
    "distilbert": dict(
        words="embeddings.word_embeddings", places="embeddings.position_embeddings", norm="embeddings.LayerNorm",
        q="transformer.layer.{n}.attention.q_lin", k="transformer.layer.{n}.attention.k_lin",
        v="transformer.layer.{n}.attention.v_lin", attention_out="transformer.layer.{n}.attention.out_lin",
        attention_norm="transformer.layer.{n}.sa_layer_norm", inner="transformer.layer.{n}.ffn.lin1",
        out="transformer.layer.{n}.ffn.lin2", out_norm="transformer.layer.{n}.output_layer_norm",
    ),
}  # fmt: skip
NAMES["roberta"] = NAMES["bert"]

# The dense layer and the projection of a classifier, by their full names in the file, and what is between them.
HEADS_OF = {
    "bert": ("bert.pooler.dense", np.tanh, "classifier"),
    "roberta": ("classifier.dense", np.tanh, "classifier.out_proj"),
    "distilbert": ("pre_classifier", lambda x: np.maximum(x, 0.0), "classifier"),
}


class Wrong(Exception):
    pass


def build(model):
    """The model of transformers, with weights that all matter."""
    common = dict(
        vocab_size=VOCAB, max_position_embeddings=model["positions"], attn_implementation="eager",
        num_labels=model.get("labels", 2),
    )  # fmt: skip
    act = HIDDEN_ACT[model["activation"]]
    if model["family"] == "distilbert":
        config = transformers.DistilBertConfig(
            dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INTERMEDIATE, activation=act, **common
        )
    else:
        config = {"Ber": transformers.BertConfig, "Rob": transformers.RobertaConfig, "XLM": transformers.XLMRobertaConfig}[
            model["of"][:3]
        ](
            hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INTERMEDIATE,
            type_vocab_size=model["segments"], layer_norm_eps=model["eps"], hidden_act=act, **common,
        )  # fmt: skip
    network = getattr(transformers, model["of"])
    pooler = dict(add_pooling_layer=False) if model["of"] in ("BertModel", "RobertaModel", "XLMRobertaModel") else {}
    network = network(config, **pooler).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm.weight" in name.lower():
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.25)
    return network


def in_file(model, network):
    """Tensors as the file has them. A bare encoder has no prefix in transformers; published files may."""
    add = model["prefix"] if model["head"] == "embedding" else ""
    tensors = {f"{add}{name}": tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    expected = set()
    for part, name in NAMES[model["family"]].items():
        tables = part in ("words", "places", "segments")
        for kind in ("weight",) if tables else ("weight", "bias"):
            expected |= {f"{model['prefix']}{name.format(n=n)}.{kind}" for n in range(LAYERS)}
    if model["head"] == "classify":
        dense, _, projection = HEADS_OF[model["family"]]
        expected |= {f"{name}.{kind}" for name in (dense, projection) for kind in ("weight", "bias")}
    if set(tensors) != expected:
        raise Wrong(f"names that only one side has: {sorted(set(tensors) ^ expected)}")
    return tensors


def pooled(model, hidden):
    """[tokens, hidden] of one sequence to its embedding."""
    x = {"mean": lambda: hidden.mean(0), "cls": lambda: hidden[0], "max": lambda: hidden.max(0)}[model["pooling"]]()
    return x / (x**2).sum() ** 0.5 if model["normalize"] else x


def reference(model, network, ids, segments):
    """transformers: one sequence alone."""
    row = torch.tensor([ids], dtype=torch.int64)
    arguments = dict(input_ids=row, attention_mask=torch.ones_like(row))
    if model["takes_segments"]:
        arguments["token_type_ids"] = torch.tensor([segments], dtype=torch.int64)
    with torch.inference_mode():
        answer = network(**arguments)
    if model["head"] == "classify":
        return answer.logits[0].numpy().astype(np.float32)
    return pooled(model, answer.last_hidden_state[0].numpy()).astype(np.float32)


erf = np.vectorize(math.erf)
ACTIVATION = {
    "gelu_erf": lambda x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
}


def second_opinion(model, weights, ids, segments):
    """The same model from the papers, in float64 numpy; it shares no code with the reference."""
    names = NAMES[model["family"]]

    def w(part, kind="weight", n=0):
        return weights[f"{model['prefix']}{names[part].format(n=n)}.{kind}"].astype(np.float64)

    def linear(x, part, n):
        return x @ w(part, "weight", n).T + w(part, "bias", n)

    def norm(x, part, n=0):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model["eps"])
        return x * w(part, "weight", n) + w(part, "bias", n)

    first = ROBERTA_OFFSET if model["family"] == "roberta" else 0
    x = w("words")[ids] + w("places")[first : first + len(ids)]
    if "segments" in names:
        x = x + w("segments")[segments]
    x = norm(x, "norm")
    for n in range(LAYERS):
        q, k, v = (linear(x, part, n).reshape(len(ids), HEADS, -1).transpose(1, 0, 2) for part in "qkv")
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        context = (scores / scores.sum(-1, keepdims=True)) @ v
        context = context.transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(x + linear(context, "attention_out", n), "attention_norm", n)
        inner = ACTIVATION[model["activation"]](linear(x, "inner", n))
        x = norm(x + linear(inner, "out", n), "out_norm", n)
    if model["head"] == "embedding":
        return pooled(model, x)
    dense, between, projection = HEADS_OF[model["family"]]
    w = lambda name: weights[name].astype(np.float64)  # noqa: E731
    x = between(x[0] @ w(f"{dense}.weight").T + w(f"{dense}.bias"))
    return x @ w(f"{projection}.weight").T + w(f"{projection}.bias")


def sequences_of(model, generator):
    """Ids and segments. Pairs are cut at different places; the first sequences have one text only."""
    low = ROBERTA_PADDING + 1 if model["family"] == "roberta" else 0
    ids = [torch.randint(low, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    if not model["takes_segments"]:
        return [(row, [0] * len(row)) for row in ids]
    cuts = [len(row) * (at % 4) // 4 if at % 4 else len(row) for at, row in enumerate(ids)]
    return [(row, [0] * cut + [1] * (len(row) - cut)) for row, cut in zip(ids, cuts)]


def manifest(name, model):
    """`[model]` as the encoder family reads it; the rest is as tiny_bert has it."""
    classify = model["head"] == "classify"
    segments = ""
    if model["takes_segments"]:
        segments = (
            '\n# 0 for the tokens of the first text, 1 for those of the second.\n[[input]]\nname = "segments"\ndtype = "u32"\n'
            f'shape = ["tokens"]\nrange = [0, {model["segments"] - 1}]\n'
        )
    weights = ""
    if model["prefix"]:
        weights = f'prefix = "{model["prefix"]}"\n'
    if classify:
        # The head's names have no prefix in the file; a name that `map` mentions takes none.
        ends = [part for part in HEADS_OF[model["family"]][::2] if not part.startswith(model["prefix"])]
        full = [f"{part}.{kind}" for part in ends for kind in ("weight", "bias")]
        weights += "[weights.map]\n" + "".join(f'"{tensor}" = "{tensor}"\n' for tensor in full)
    labels = f"labels = {model['labels']}\n" if classify else ""
    output = ("logits", model["labels"]) if classify else ("embedding", HIDDEN)
    return f"""\
# {model["about"]} Random weights; made by tools/make_family_fixtures.py.
architecture = "bert"
version = "1"

[dims.tokens]
min = 1
max = {LENGTH_MAX}

[[input]]
name = "ids"
dtype = "u32"
shape = ["tokens"]
range = [0, {VOCAB - 1}]
{segments}
[[output]]
name = "{output[0]}"
dtype = "f32"
shape = [{output[1]}]

[batching]
rows_max = 16
padded_cells_max = 1024
buckets = [8, 16, 32, 64]

[weights]
{weights}
[model]
family = "{model["family"]}"
layers = {LAYERS}
hidden = {HIDDEN}
heads = {HEADS}
intermediate = {INTERMEDIATE}
vocab = {VOCAB}
positions = {model["positions"]}
segments = {model["segments"]}
layer_norm_eps = {model["eps"]:.0e}
activation = "{model["activation"]}"
pooling = "{model["pooling"]}"
normalize = {str(model["normalize"]).lower()}
head = "{model["head"]}"
{labels}"""


def make(name, model, seed):
    """Everything of one fixture, checked, not yet written: the files' names with what belongs into them."""
    torch.manual_seed(seed)
    network = build(model)
    tensors = in_file(model, network)
    arrays = {tensor: value.numpy() for tensor, value in tensors.items()}
    sequences = sequences_of(model, torch.Generator().manual_seed(seed))
    answers, apart = [], 0.0
    for ids, segments in sequences:
        answer = reference(model, network, ids, segments)
        apart = max(apart, float(np.abs(answer - second_opinion(model, arrays, ids, segments)).max()))
        answers.append(answer)
    largest = max(float(np.abs(answer).max()) for answer in answers)
    print(f"{name}: largest difference between the two implementations {apart:.1e}, largest output {largest:.2f}")
    if not apart <= AGREE_WITHIN:
        raise Wrong(f"expected at most {AGREE_WITHIN} between the two implementations, they differ by {apart}")
    expected = {
        "ids": torch.tensor([i for ids, _ in sequences for i in ids], dtype=torch.uint32),
        "lengths": torch.tensor(LENGTHS, dtype=torch.uint32),
        "outputs": torch.tensor(np.stack(answers)),
    }
    if model["takes_segments"]:
        expected["segments"] = torch.tensor([s for _, segments in sequences for s in segments], dtype=torch.uint32)
    return {"model.toml": manifest(name, model), "1/weights.safetensors": tensors, "expected.safetensors": expected}


def main():
    parser = argparse.ArgumentParser(description="Make the reference answers for the encoder family's tests.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="repository root")
    root = parser.parse_args().root / "tests/fixtures/family"
    torch.set_num_threads(1)
    made, total = {}, 0
    for at, (name, model) in enumerate(MODELS.items()):
        try:
            made[name] = make(name, model, 7 + at)
        except Wrong as wrong:
            print(f"make_family_fixtures: {name}: {wrong}; nothing is written", file=sys.stderr)
            return 1
    for name, files in made.items():
        (root / name / "1").mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            path = root / name / file
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                save_file(content, path)
            total += path.stat().st_size
    print(f"wrote {len(made)} models, {total:,} bytes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
