#!/usr/bin/env python3
"""Compares ferry's CPU engine with ONNX Runtime and OpenVINO on the same encoder, one thread each. One command:

    cargo build --release && python3 tools/fetch_minilm.py
    python3 tools/compare.py                       # makes a throw-away environment, about 10 minutes in all
    python3 tools/compare.py --venv DIR            # makes the environment once and keeps it
    python3 tools/compare.py --quick               # fewer rounds, fewer sequences: a look, not a record
    python3 tools/compare.py --json FILE           # also writes every round's numbers

The packages (onnxruntime, openvino, onnx, numpy, safetensors; a few hundred MB) come from the package index that pip is set to
use and go into that environment only. The two ONNX graphs are written here, operator by operator, from the weights that
ferry itself runs: a fused one with ONNX Runtime's own BERT operators, and a plain one of ONNX's.

Work
- Static shapes: full-length rows, B x L.
- Mixed: 320 lengths of lognormal:40,0.8,256 in batches of 16, in the order they arrive and sorted by length. The other
  engines pad each batch to its longest row; ferry runs it packed, and padded for comparison.

Always true
- No engine is timed before its embeddings have a cosine of at least 0.9999 with tests/fixtures/minilm.json, alone and padded.
- One thread per engine, no spinning, f32. A round measures every engine back to back for each piece of work, and begins
  with another engine each time; a number in the table is the median over rounds.
- CPU time is user and system time of the whole process, all its threads (ferry: what it reports for its own threads).
  It is the number to compare on a machine that others use too; wall time is printed beside it.
- The others are given their best. ONNX Runtime runs the fused graph with SkipLayerNormalization, as its optimizer makes
  it, and with LayerNormalization, which is 8 % faster on one machine; OpenVINO runs the plain graph compiled for any
  shape and, where the shape is static, for that one. The ways are tried before the rounds, on each piece of work, and
  the fastest enters; the table names it.
- A token is a real token: padding never counts as work done.

Exit status: 0 measured, 1 the work failed (a package, the weights, an engine that answers wrongly), 2 wrong use.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["onnxruntime==1.32.0", "openvino==2026.4.1", "onnx==1.23.2", "numpy", "safetensors"]
INSIDE = "FERRY_COMPARE_INSIDE"

VOCAB, HIDDEN, LAYERS, HEADS, EPS = 30522, 384, 6, 12, 1e-12
SHAPES = [(1, 16), (1, 32), (1, 128), (8, 16), (8, 32), (8, 128), (32, 16), (32, 32), (4, 128)]
MEAN, SIGMA, LONGEST = 40.0, 0.8, 256
ROWS = 16
COSINE_MIN = 0.9999
# Far below any score, finite, and exactly no share after softmax.
MASKED = -1e30
# Least time one engine works on one shape in one round: long beside a scheduler's slice, short beside a noisy neighbour.
SLICE_S = 0.5

FERRY_FLAGS = ["--layout", "--order", "--batch-rows", "--repeat"]


class Failed(Exception):
    """The work failed for a reason outside this program; the message names what was tried."""


def say(*words):
    print(*words, file=sys.stderr, flush=True)


# ---- The environment. Everything above `inside` uses the standard library alone.


def make_environment(directory):
    python = directory / "bin/python"
    if not python.exists():
        say(f"compare: making an environment in {directory}")
        done = subprocess.run([sys.executable, "-m", "venv", str(directory)], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"cannot make a virtual environment:\n{(done.stdout + done.stderr).strip()}")
    say(f"compare: installing {', '.join(PACKAGES)}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    done = subprocess.run(pip + PACKAGES, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"pip could not install {', '.join(PACKAGES)}; it said:\n{(done.stdout + done.stderr).strip()}")
    return python


def again_inside(directory):
    python = make_environment(directory)
    # One thread for every library that reads these; the engines are told by their own options as well.
    one = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    command = [str(python), str(Path(__file__).resolve()), *sys.argv[1:]]
    return subprocess.run(command, env={**os.environ, **one, INSIDE: "1"}).returncode


# ---- The graphs.


class Graph:
    """An ONNX graph being written, one node at a time; each call returns the name of what the node makes."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, name, array):
        from onnx import numpy_helper

        import numpy as np

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, operator, *inputs, **attributes):
        from onnx import helper

        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def microsoft(self, operator, *inputs, **attributes):
        return self.node(operator, *inputs, domain="com.microsoft", **attributes)

    def save(self, output, path):
        import onnx
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Identity", [output], ["embedding"], name="embedding"))
        sides = ["rows", "tokens"]
        graph = helper.make_graph(
            self.nodes, "minilm",
            [helper.make_tensor_value_info(name, TensorProto.INT64, sides) for name in ("ids", "mask")],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["rows", HIDDEN])],
            self.constants,
        )  # fmt: skip
        domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, producer_name="ferry-compare")
        model.ir_version = 8
        onnx.save(model, str(path))


def load_weights(file):
    import numpy as np
    from safetensors.numpy import load_file

    return {name: array.astype(np.float32) for name, array in load_file(str(file)).items() if array.dtype != np.int64}


def pool(graph, x):
    """The mean of the real tokens, at length 1: a matmul with the mask, as ferry has it."""
    import numpy as np

    axis = graph.constant("pool_axis", np.array([1], np.int64))
    mask = graph.node("Unsqueeze", graph.node("Cast", "mask", to=1), axis)
    total = graph.node("Squeeze", graph.node("MatMul", mask, x), axis)
    # The mean's divisor falls out of the L2 norm: a sum and a mean point the same way.
    return graph.node("LpNormalization", total, axis=-1, p=2)


def write_fused(w, path, skip_norm):
    """With ONNX Runtime's own operators, as its optimizer makes them of BERT; or with ONNX's normalisation instead."""
    import numpy as np

    g = Graph()

    def linear(x, name):
        return g.node("MatMul", x, g.constant(f"{name}.w", w[f"{name}.weight"].T)), g.constant(f"{name}.b", w[f"{name}.bias"])

    def norm(name):
        return [g.constant(f"{name}.{part}", w[f"{name}.{part}"]) for part in ("weight", "bias")]

    def add_norm(y, bias, x, name):
        if skip_norm:
            return g.microsoft("SkipLayerNormalization", y, x, *norm(name), bias, epsilon=EPS)
        return g.node("LayerNormalization", g.node("Add", g.node("Add", y, bias), x), *norm(name), axis=-1, epsilon=EPS)

    at = "embeddings"
    # Segment 0 for every token, so it is a part of the positions.
    places = w[f"{at}.position_embeddings.weight"] + w[f"{at}.token_type_embeddings.weight"][0]
    tables = [g.constant("words", w[f"{at}.word_embeddings.weight"]), g.constant("places", places)]
    mask = g.node("Cast", "mask", to=6)
    ids = g.node("Cast", "ids", to=6)
    x = g.microsoft("EmbedLayerNormalization", ids, "", *tables, "", *norm(f"{at}.LayerNorm"), epsilon=EPS)
    g.nodes[-1].output.append("mask_index")
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        parts = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        weight = g.constant(f"{at}.qkv.w", np.concatenate([w[f"{part}.weight"].T for part in parts], 1))
        bias = g.constant(f"{at}.qkv.b", np.concatenate([w[f"{part}.bias"] for part in parts]))
        context = g.microsoft("Attention", x, weight, bias, mask, num_heads=HEADS)
        x = add_norm(*linear(context, f"{at}.attention.output.dense"), x, f"{at}.attention.output.LayerNorm")
        inner = g.microsoft("BiasGelu", *linear(x, f"{at}.intermediate.dense"))
        x = add_norm(*linear(inner, f"{at}.output.dense"), x, f"{at}.output.LayerNorm")
    g.save(pool(g, x), path)


def write_plain(w, path):
    """With ONNX's own operators, in the arrangement that importers know from transformers."""
    import numpy as np

    g = Graph()
    ints = lambda name, *values: g.constant(name, np.array(values, np.int64))  # noqa: E731
    scalar = lambda name, value: g.constant(name, np.array(value, np.float32))  # noqa: E731
    split = ints("split", 0, 0, HEADS, HIDDEN // HEADS)
    merge = ints("merge", 0, 0, HIDDEN)
    scale = scalar("scale", 1.0 / math.sqrt(HIDDEN // HEADS))
    root, half, one = scalar("root_half", math.sqrt(0.5)), scalar("half", 0.5), scalar("one", 1.0)

    def linear(x, name):
        weight = g.constant(f"{name}.w", w[f"{name}.weight"].T)
        return g.node("Add", g.node("MatMul", x, weight), g.constant(f"{name}.b", w[f"{name}.bias"]))

    def norm(x, name):
        parts = [g.constant(f"{name}.{part}", w[f"{name}.{part}"]) for part in ("weight", "bias")]
        return g.node("LayerNormalization", x, *parts, axis=-1, epsilon=EPS)

    def heads(x, *order):
        return g.node("Transpose", g.node("Reshape", x, split), perm=order)

    at = "embeddings"
    places = w[f"{at}.position_embeddings.weight"] + w[f"{at}.token_type_embeddings.weight"][0]
    words = g.node("Gather", g.constant("words", w[f"{at}.word_embeddings.weight"]), "ids")
    tokens = g.node("Slice", g.node("Shape", "ids"), ints("from_1", 1), ints("to_2", 2))
    place = g.node("Slice", g.constant("places", places), ints("from_0", 0), tokens, ints("axis_0", 0))
    x = norm(g.node("Add", words, place), f"{at}.LayerNorm")
    hidden = g.node("Sub", one, g.node("Cast", g.node("Unsqueeze", "mask", ints("axes_12", 1, 2)), to=1))
    floor = g.node("Mul", hidden, scalar("masked", MASKED))
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q = heads(linear(x, f"{at}.attention.self.query"), 0, 2, 1, 3)
        k = heads(linear(x, f"{at}.attention.self.key"), 0, 2, 1, 3)
        v = heads(linear(x, f"{at}.attention.self.value"), 0, 2, 1, 3)
        scores = g.node("MatMul", g.node("Mul", q, scale), g.node("Transpose", k, perm=[0, 1, 3, 2]))
        scores = g.node("Add", scores, floor)
        context = g.node("MatMul", g.node("Softmax", scores, axis=-1), v)
        context = g.node("Reshape", g.node("Transpose", context, perm=[0, 2, 1, 3]), merge)
        y = linear(context, f"{at}.attention.output.dense")
        x = norm(g.node("Add", y, x), f"{at}.attention.output.LayerNorm")
        inner = linear(x, f"{at}.intermediate.dense")
        share = g.node("Add", g.node("Erf", g.node("Mul", inner, root)), one)
        inner = g.node("Mul", g.node("Mul", inner, share), half)
        x = norm(g.node("Add", linear(inner, f"{at}.output.dense"), x), f"{at}.output.LayerNorm")
    g.save(pool(g, x), path)


# ---- The engines. Each turns (ids, mask), both [B, L] of int64, into [B, hidden].


class OnnxRuntime:
    def __init__(self, graph, way):
        import onnxruntime

        self.name, self.way = "ort", way

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"] if way == "norm" else None,
        )  # fmt: skip

    def __call__(self, ids, mask):
        return self.session.run(None, {"ids": ids, "mask": mask})[0]


class OpenVino:
    def __init__(self, graph, shape=None):
        import openvino

        self.name, self.way = "openvino", "dynamic" if shape is None else "static"
        core = openvino.Core()
        model = core.read_model(str(graph))
        if shape is not None:
            model.reshape({"ids": list(shape), "mask": list(shape)})
        compiled = core.compile_model(
            model, "CPU",
            {
                "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "ENABLE_CPU_PINNING": False,
            },
        )  # fmt: skip
        self.request = compiled.create_infer_request()

    def __call__(self, ids, mask):
        # The inputs live until the call returns, so the engine may read them where they are.
        answer = self.request.infer({"ids": ids, "mask": mask}, share_inputs=True, share_outputs=True)
        return answer[0]


def verify(engine, fixture):
    """Alone, and eight rows of different lengths behind padding, against the committed reference."""
    import numpy as np

    rows = json.loads(fixture.read_text(encoding="utf-8"))["sentences"]
    worst = 1.0
    for batch in [[row] for row in rows] + [rows[at : at + 8] for at in range(0, len(rows), 8)]:
        longest = max(len(row["ids"]) for row in batch)
        ids, mask = np.full((len(batch), longest), 7, np.int64), np.zeros((len(batch), longest), np.int64)
        for at, row in enumerate(batch):
            ids[at, : len(row["ids"])] = row["ids"]
            mask[at, : len(row["ids"])] = 1
        want = np.array([row["embedding"] for row in batch])
        got = np.array(engine(ids, mask), np.float64)
        cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
        worst = min(worst, float(cosines.min()))
    if not worst >= COSINE_MIN:
        raise Failed(f"{engine.name} ({engine.way}) answers wrongly: worst cosine {worst:.6f}, expected at least {COSINE_MIN}")
    say(f"compare: {engine.name} ({engine.way}): worst cosine with the reference {worst:.7f}")
    return worst


# ---- The work.


class Random:
    """ferry's own generator (src/load/mod.rs), so that the lengths are those of `ferry offline --lengths`."""

    BITS = (1 << 64) - 1

    def __init__(self, seed, stream):
        self.state = seed ^ (stream * 0xD6E8_FEB8_6659_FD93 & self.BITS)
        self.next()
        mixed = self.next()  # moves the state first, which the next line reads
        self.state ^= mixed

    def next(self):
        self.state = self.state + 0x9E37_79B9_7F4A_7C15 & self.BITS
        mixed = self.state
        mixed = (mixed ^ mixed >> 30) * 0xBF58_476D_1CE4_E5B9 & self.BITS
        mixed = (mixed ^ mixed >> 27) * 0x94D0_49BB_1331_11EB & self.BITS
        return mixed ^ mixed >> 31

    def unit(self):
        return (self.next() >> 11) / float(1 << 53)

    def normal(self):
        radius = math.sqrt(-2.0 * math.log(1.0 - self.unit()))
        return radius * math.cos(math.tau * self.unit())


def lognormal_lengths(count, seed):
    random = Random(seed, 2)
    mu = math.log(MEAN) - SIGMA * SIGMA / 2.0
    return [min(max(int(math.exp(mu + SIGMA * random.normal()) + 0.5), 1), LONGEST) for _ in range(count)]


class Work:
    """Batches of lengths, ids included, and how ferry is asked for the same."""

    def __init__(self, name, batches, repeat, ferry):
        import numpy as np

        random = np.random.default_rng(1)
        self.name, self.repeat, self.ferry = name, repeat, ferry
        self.tokens = sum(map(sum, batches))
        self.cells = sum(max(batch) * len(batch) for batch in batches)
        self.forwards = len(batches)
        self.batches = []
        for lens in batches:
            mask = (np.arange(max(lens)) < np.array(lens)[:, None]).astype(np.int64)
            self.batches.append((random.integers(0, VOCAB, mask.shape, dtype=np.int64) * mask, mask))

    def once(self, engine):
        for ids, mask in self.batches:
            engine(ids, mask)


def cut(lengths):
    return [lengths[at : at + ROWS] for at in range(0, len(lengths), ROWS)]


def cpu_now():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def time_engine(engine, work):
    """Seconds of CPU and wall time for one pass over the work; its shapes were run before."""
    wall, cpu = time.perf_counter(), cpu_now()
    for _ in range(work.repeat):
        work.once(engine)
    return {"cpu_s": (cpu_now() - cpu) / work.repeat, "wall_s": (time.perf_counter() - wall) / work.repeat}


class Ferry:
    """`ferry offline` as a process of its own for each measurement; it warms itself before its clock starts."""

    def __init__(self, binary, models):
        self.binary, self.models, self.layouts, self.absent = binary, models, [], None
        self.gflops_peak = None

    def try_out(self, work):
        """Finds what this ferry can do, and says what it cannot."""
        if not self.binary.is_file():
            self.absent = f"there is no {self.binary}; `cargo build --release` makes it"
        else:
            usage = subprocess.run([str(self.binary), "offline", "--help"], capture_output=True, text=True).stdout
            missing = [flag for flag in FERRY_FLAGS if flag not in usage]
            if missing:
                self.absent = f"this ferry's `offline` has no {', '.join(missing)}"
        if self.absent:
            return
        for layout in ("packed", "padded"):
            try:
                self.time(work, layout)
                self.layouts.append(layout)
            except Failed as failed:
                self.absent = str(failed)
                say(f"compare: ferry, layout {layout}: {failed}")
        if self.layouts:
            self.absent = None

    def time(self, work, layout):
        command = [
            str(self.binary), "offline", "--model", "minilm", "--models", str(self.models), "--threads", "1", "--json",
            "--layout", layout, "--repeat", "1", *work.ferry,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        report = json.loads(done.stdout)
        lacking = [field for field in ("tokens_per_cpu_s", "tokens_per_s") if not report.get(field)]
        if lacking:
            raise Failed(f"the report of this ferry has no {', '.join(lacking)}")
        self.gflops_peak = max(self.gflops_peak or 0.0, report.get("gemm_gflops_peak") or 0.0) or None
        # Per pass over the work, whatever number of passes it made.
        return {
            "cpu_s": work.tokens / report["tokens_per_cpu_s"],
            "wall_s": work.tokens / report["tokens_per_s"],
            "gflops": report.get("gflops"),
        }


def machine(binary):
    import numpy
    import onnxruntime
    import openvino

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        field = lambda key: next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "?")  # noqa: E731
        flags = field("flags").split()
        wide = [flag for flag in ("avx2", "fma", "avx512f", "avx512_vnni", "amx_bf16") if flag in flags]
        cpu = f"{field('model name')} (family {field('cpu family')} model {field('model')}; {' '.join(wide)})"
    except OSError:
        cpu = platform.processor() or platform.machine()
    version = None
    if binary.is_file():
        version = subprocess.run([str(binary), "--version"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__, "numpy": numpy.__version__,
        "ferry": version,
    }  # fmt: skip


# ---- The measurement.


def calibrate(work, engine):
    """How often a forward fits into a slice, so that a short one is not timed alone."""
    work.once(engine)
    if work.forwards == 1:
        started = time.perf_counter()
        for _ in range(3):
            work.once(engine)
        work.repeat = max(3, math.ceil(3 * SLICE_S / (time.perf_counter() - started)))
        work.ferry += ["--requests", str(work.repeat * len(work.batches[0][0]))]


def fastest(engines, work):
    """Of several ways to run one engine: the one with the least CPU time in three turns, taken in turn."""
    times = dict.fromkeys(engines, math.inf)
    for engine in engines:
        work.once(engine)
    for _ in range(3 if len(engines) > 1 else 0):
        for engine in engines:
            times[engine] = min(times[engine], time_engine(engine, work)["cpu_s"])
    return min(engines, key=times.get)


def write_graphs(weights_file, directory):
    say("compare: writing the graphs")
    directory.mkdir(parents=True, exist_ok=True)
    skip, norm, plain = (directory / f"minilm_{kind}.onnx" for kind in ("fused_skip", "fused_norm", "plain"))
    weights = load_weights(weights_file)
    write_fused(weights, skip, skip_norm=True)
    write_fused(weights, norm, skip_norm=False)
    write_plain(weights, plain)
    return skip, norm, plain


def measure(arguments, scratch):
    shapes = [(1, 32), (8, 32), (4, 128)] if arguments.quick else SHAPES
    count = 96 if arguments.quick else 320
    lengths = lognormal_lengths(count, arguments.seed)
    lengths_file = scratch / "lengths.txt"
    lengths_file.write_text("".join(f"{length}\n" for length in lengths))

    skip, norm, plain = write_graphs(arguments.models / "minilm/1/weights.safetensors", arguments.graphs or scratch)
    ort = [OnnxRuntime(norm, "norm"), OnnxRuntime(skip, "skip-norm")]
    openvino = [OpenVino(plain)]
    fixture = ROOT / "tests/fixtures/minilm.json"
    cosines = {f"{engine.name} {engine.way}": verify(engine, fixture) for engine in ort + openvino}

    works = []
    for rows, length in shapes:
        ferry = ["--lengths", f"fixed:{length}", "--batch-rows", str(rows), "--order", "arrival"]
        works.append(Work(f"{rows}x{length}", [[length] * rows], 1, ferry))
    file = ["--lengths", f"file:{lengths_file}", "--batch-rows", str(ROWS), "--requests", str(count)]
    works.append(Work("mixed, arrival", cut(lengths), 1, [*file, "--order", "arrival"]))
    works.append(Work("mixed, sorted", cut(sorted(lengths, reverse=True)), 1, [*file, "--order", "sorted"]))

    chosen = {}
    for work in works:
        calibrate(work, ort[0])
        static = [OpenVino(plain, work.batches[0][0].shape)] if work.forwards == 1 else []
        chosen[work.name] = [fastest(ort, work), fastest(openvino + static, work)]
        say(f"compare: {work.name}: " + ", ".join(f"{engine.name} {engine.way}" for engine in chosen[work.name]))
    ferry = Ferry(arguments.ferry, arguments.models)
    ferry.try_out(works[0])
    if ferry.absent:
        say(f"compare: {ferry.absent}; the columns of ferry stay empty")

    results = {work.name: {} for work in works}
    for turn in range(arguments.rounds):
        started = time.perf_counter()
        for work in works:
            runs = [(engine.name, lambda engine=engine: time_engine(engine, work)) for engine in chosen[work.name]]
            # Without padding the two layouts are the same work.
            layouts = ferry.layouts[:1] if work.tokens == work.cells else ferry.layouts
            runs += [(f"ferry {layout}", lambda layout=layout: ferry.time(work, layout)) for layout in layouts]
            first = turn % len(runs)
            for name, run in runs[first:] + runs[:first]:
                results[work.name].setdefault(name, []).append(run())
        say(f"compare: round {turn + 1} of {arguments.rounds} took {time.perf_counter() - started:.0f} s")
    return {
        "cosines": cosines,
        "ferry_absent": ferry.absent,
        "ferry_gemm_gflops_peak": ferry.gflops_peak,
        "work": [
            {
                "name": work.name, "forwards": work.forwards, "tokens": work.tokens, "cells": work.cells,
                "repeat": work.repeat, "ways": {engine.name: engine.way for engine in chosen[work.name]},
                "rounds": results[work.name],
            }
            for work in works
        ],
    }  # fmt: skip


def median(row, engine, key):
    samples = row["rounds"].get(engine)
    return statistics.median(sample[key] for sample in samples) if samples else None


def table(record):
    """Times are milliseconds for a whole pass over a row's work: one forward, or all batches of a mix."""
    lines = []
    widths = [16, 10, 10, 10, 11, 11, 13, 8, 8, 11, 10, 9]

    def line(*cells):
        lines.append("".join(f"{cell:<{w}}" if w == 16 else f"{cell:>{w}}" for cell, w in zip(cells, widths)).rstrip())

    def show(value, scale=1.0, digits=2):
        return "-" if value is None else f"{value * scale:.{digits}f}"

    def ratio(theirs, ours):
        return "-" if not (theirs and ours) else f"{theirs / ours:.2f}"

    for key, title in (("cpu_s", "CPU"), ("wall_s", "Wall")):
        lines.append(f"{title} time: ms for one pass, tokens per second, and ferry's speed over theirs (above 1: ferry is faster)")
        line("work", "ORT ms", "OV ms", "ferry ms", "ORT tok/s", "OV tok/s", "ferry tok/s", "/ ORT", "/ OV",
             "ORT as", "OV as", "padding")  # fmt: skip
        for row in record["work"]:
            layouts = [name for name in row["rounds"] if name.startswith("ferry")]
            layouts.sort()  # packed, then padded: a line of its own
            ort, openvino = median(row, "ort", key), median(row, "openvino", key)
            rate = lambda seconds: show(seconds and row["tokens"] / seconds, digits=0)  # noqa: B023, E731
            for at, layout in enumerate(layouts or [None]):
                ferry = median(row, layout, key)
                ours = [show(ferry, 1e3), rate(ferry), ratio(ort, ferry), ratio(openvino, ferry)]
                if at == 0:
                    padding = f"{100 * (1 - row['tokens'] / row['cells']):.0f} %"
                    line(row["name"], show(ort, 1e3), show(openvino, 1e3), ours[0], rate(ort), rate(openvino), *ours[1:],
                         row["ways"]["ort"], row["ways"]["openvino"], padding)  # fmt: skip
                else:
                    line(f"  {layout}", "", "", ours[0], "", "", *ours[1:], "", "", "")
        lines.append("")
    here = record["machine"]
    lines.append(f"{here['cpu']}, {here['cores']} cores; {here['system']}")
    lines.append(
        f"onnxruntime {here['onnxruntime']}, openvino {here['openvino']}, python {here['python']}, {here['ferry'] or 'no ferry'}"
    )
    before, after = record["load_before"], record["load_after"]
    lines.append(f"{record['rounds']} rounds; load average {before[0]:.2f} before, {after[0]:.2f} after")
    if record["ferry_gemm_gflops_peak"]:
        lines.append(f"ferry's own matmul peak: {record['ferry_gemm_gflops_peak']:.0f} GFLOP/s")
    if record["ferry_absent"]:
        lines.append(f"ferry is not measured: {record['ferry_absent']}")
    return "\n".join(lines)


def inside(arguments):
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="ferry_compare_") as scratch:
        record = measure(arguments, Path(scratch))
    record |= {
        "machine": machine(arguments.ferry), "rounds": arguments.rounds, "seed": arguments.seed,
        "load_before": before, "load_after": os.getloadavg(),
    }  # fmt: skip
    print(table(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        say(f"compare: wrote {arguments.json}")


def main():
    parser = argparse.ArgumentParser(description="Compare ferry with ONNX Runtime and OpenVINO, one CPU thread each.")
    parser.add_argument("--ferry", type=Path, default=ROOT / "target/release/ferry", metavar="FILE")
    parser.add_argument("--models", type=Path, default=ROOT / "models", metavar="DIR", help="where minilm is")
    parser.add_argument("--venv", type=Path, metavar="DIR", help="keep the environment here and use it again")
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="keep the two ONNX graphs here")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 7, with --quick 3")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the mixed lengths")
    parser.add_argument("--quick", action="store_true", help="three shapes and 96 sequences")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's numbers")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 7)
    if arguments.rounds < 1:
        parser.error("--rounds is at least 1")
    try:
        if not (arguments.models / "minilm/1/weights.safetensors").is_file():
            raise Failed("minilm is not fetched; run tools/fetch_minilm.py first")
        if os.environ.get(INSIDE):
            inside(arguments)
            return 0
        if arguments.venv:
            return again_inside(arguments.venv.resolve())
        with tempfile.TemporaryDirectory(prefix="ferry_compare_venv_") as directory:
            return again_inside(Path(directory))
    except (Failed, OSError) as failed:
        say(f"compare: {failed}")
        return 1
    except KeyboardInterrupt:
        say("compare: interrupted")
        return 1


if __name__ == "__main__":
    sys.exit(main())
