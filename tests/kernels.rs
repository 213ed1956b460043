//! The kernels' own source against their references, without a device.
//!
//! Goal: what a kernel computes is right for every shape it may meet, it touches nothing but its batch, and its launch is
//! large enough.
//! Method: g++ compiles kernels/*.cu for the CPU through kernels/emulation, with the address and undefined-behaviour
//! sanitizers and every buffer an allocation of its exact size. A launch made by `ops` runs there and in `reference`, on the
//! same bytes. All that no batch reaches is NaN, in inputs as in outputs: it must neither be used nor written. Threads run in
//! an order drawn from the seed, so that a missing barrier shows.
//!
//! Random ones print `repeat with: KERNELS_SEED=…` when they fail.

use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use ferry::gpu::launch::{Arg, Float, Launch, Memory, Span, Table};
use ferry::gpu::ops::{
    self, AddNorm, Attention, BiasAct, Bounds, DenseRows, EmbedNorm, Gather, MaskedSoftmax, PoolRows, Unpack,
};
use ferry::gpu::reference::{self, Activation, HostMemory, Pool, Value};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::BF16];

/// What a buffer holds, and so how two of them are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Float(Float),
    Exact,
}

/// A buffer of a device, with the bytes it starts with.
struct Buffer {
    id: usize,
    kind: Kind,
    bytes: Vec<u8>,
}

impl Memory for Buffer {
    fn bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// Buffers in the order they were made.
#[derive(Default)]
struct Buffers(Vec<Buffer>);

impl Buffers {
    fn add(&mut self, kind: Kind, bytes: Vec<u8>) -> usize {
        let id = self.0.len();
        self.0.push(Buffer { id, kind, bytes });
        id
    }

    /// Values, and NaN behind them up to `count`.
    fn floats(&mut self, float: Float, values: &[f32], count: usize) -> usize {
        let mut bytes = reference::encode(float, values);
        bytes.resize(count * float.bytes(), 0xff);
        self.add(Kind::Float(float), bytes)
    }

    fn all(&self, id: usize) -> Span<'_, Buffer> {
        Span::of(&self.0[id])
    }
}

struct HostBytes(Vec<Vec<u8>>);

impl HostMemory for HostBytes {
    fn bytes(&self, id: usize) -> &[u8] {
        &self.0[id]
    }

    fn bytes_mut(&mut self, id: usize) -> &mut [u8] {
        &mut self.0[id]
    }
}

/// Lengths of a batch, and what its launch is made for.
#[derive(Clone, Debug)]
struct Batch {
    lens: Vec<u32>,
    bounds: Bounds,
}

impl Batch {
    fn tokens(&self) -> usize {
        self.lens.iter().sum::<u32>() as usize
    }

    /// The table, in a buffer for the bounds. -1 behind it: as a start it leads out of every buffer.
    fn table(&self, buffers: &mut Buffers) -> usize {
        let mut table = vec![-1; Table::len(self.bounds.rows)];
        Table::write(&self.lens, &mut table[..Table::len(self.lens.len())]);
        buffers.add(Kind::Exact, table.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

/// Batches that differ in what goes wrong easily: one row, rows of one token, full ones, and ones that are much smaller than
/// what the launch is made for.
fn batches(random: &mut StdRng, longest: u32) -> Vec<Batch> {
    let full: Vec<u32> = (0..random.random_range(2..5)).map(|_| random.random_range(1..=longest)).collect();
    let ones = vec![1; random.random_range(1..6)];
    let mut mixed = vec![longest, 1, random.random_range(1..=longest)];
    mixed.rotate_left(random.random_range(0..3));
    let exact = |lens: Vec<u32>| {
        let tokens = lens.iter().sum::<u32>() as usize;
        Batch { bounds: Bounds { rows: lens.len(), tokens, longest: longest as usize }, lens }
    };
    let roomy = |lens: Vec<u32>| {
        let rows = lens.len() * 3 + 2;
        Batch { lens, bounds: Bounds { rows, tokens: rows * longest as usize, longest: longest as usize } }
    };
    vec![exact(full.clone()), roomy(ones), exact(mixed), roomy(vec![random.random_range(1..=longest)])]
}

/// The emulation, as a process that carries out launches.
struct Emulation {
    child: Child,
    to: BufWriter<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Emulation {
    fn start() -> Emulation {
        let mut child = Command::new(program())
            .env("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=0:exitcode=99")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the emulation starts: it was just built");
        let to = BufWriter::new(child.stdin.take().expect("piped"));
        let from = BufReader::new(child.stdout.take().expect("piped"));
        Emulation { child, to, from }
    }

    /// The buffers after a launch, or what the emulation died of.
    fn run(&mut self, launch: &Launch<Buffer>, buffers: &Buffers, order: u32) -> Result<Vec<Vec<u8>>, String> {
        let mut answer = || -> std::io::Result<Result<Vec<Vec<u8>>, String>> {
            self.to.write_all(&encode(launch, buffers, order))?;
            self.to.flush()?;
            if self.number()? != 0 {
                let mut sentence = vec![0; self.number()? as usize];
                self.from.read_exact(&mut sentence)?;
                return Ok(Err(String::from_utf8_lossy(&sentence).into_owned()));
            }
            let mut all = Vec::new();
            for buffer in &buffers.0 {
                let mut bytes = vec![0; buffer.bytes.len()];
                self.from.read_exact(&mut bytes)?;
                all.push(bytes);
            }
            Ok(Ok(all))
        };
        answer().unwrap_or_else(|_| {
            let mut report = String::new();
            let mut stderr = self.child.stderr.take().expect("piped, and the emulation dies once");
            stderr.read_to_string(&mut report).expect("a report in UTF-8");
            self.child.wait().expect("it has ended");
            Err(report)
        })
    }

    fn number(&mut self) -> std::io::Result<u32> {
        let mut bytes = [0; 4];
        self.from.read_exact(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }
}

impl Drop for Emulation {
    fn drop(&mut self) {
        // It may have ended already, by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A launch as kernels/emulation/main.cpp reads it.
fn encode(launch: &Launch<Buffer>, buffers: &Buffers, order: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let mut words = |words: &[u32]| words.iter().for_each(|word| out.extend(word.to_le_bytes()));
    words(&[launch.function.len() as u32]);
    out.extend(launch.function.as_bytes());
    let mut words = |words: &[u32]| words.iter().for_each(|word| out.extend(word.to_le_bytes()));
    words(&launch.grid);
    words(&[launch.block, launch.shared_bytes, order, buffers.0.len() as u32]);
    for buffer in &buffers.0 {
        out.extend((buffer.bytes.len() as u64).to_le_bytes());
        out.extend(&buffer.bytes);
    }
    out.extend((launch.args().len() as u32).to_le_bytes());
    for arg in launch.args() {
        let (kind, value): (u32, Vec<u8>) = match arg {
            Arg::Memory(span) => {
                (0, [(span.memory.id as u32).to_le_bytes().as_slice(), &(span.at as u64).to_le_bytes()].concat())
            }
            Arg::Null => (1, Vec::new()),
            Arg::I32(x) => (2, x.to_le_bytes().to_vec()),
            Arg::F32(x) => (3, x.to_le_bytes().to_vec()),
            Arg::Bits(x) => (4, x.to_le_bytes().to_vec()),
        };
        out.extend(kind.to_le_bytes());
        out.extend(value);
    }
    out
}

/// The emulation's program, built if a source is newer.
fn program() -> PathBuf {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = folder.join("kernels-emulation");
    // Tests run side by side, in processes and in threads: one builds, the others wait for it.
    let lock = std::fs::File::create(folder.join("kernels-emulation.lock")).expect("a writable target folder");
    lock.lock().expect("a lock on the target folder");
    let changed = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    let newest = [kernels.clone(), kernels.join("emulation")]
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).expect("the kernels' folder"))
        .filter_map(|entry| changed(&entry.expect("a readable folder").path()))
        .max();
    if changed(&program) >= newest && program.exists() {
        return program;
    }
    let fresh = folder.join("kernels-emulation.new");
    let built = Command::new("g++")
        .args(["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
        // Kernels read 16 bytes as one word, which nvcc allows.
        .args(["-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
        .arg(kernels.join("emulation/main.cpp"))
        .arg("-o")
        .arg(&fresh)
        .output()
        .unwrap_or_else(|e| panic!("the kernels' tests need g++ with its sanitizers, and it does not start: {e}"));
    assert!(built.status.success(), "g++ refuses the kernels:\n{}", String::from_utf8_lossy(&built.stderr));
    std::fs::rename(&fresh, &program).expect("a writable target folder");
    program
}

/// Runs a launch in the emulation and in the reference, and compares every buffer. `tolerance` is relative for results
/// above 1 and absolute below. Places that the reference leaves must be left by the kernel.
#[track_caller]
fn check(emulation: &mut Emulation, launch: &Launch<Buffer>, buffers: &Buffers, tolerance: f32, order: u32) {
    let name = launch.function;
    let got = emulation.run(launch, buffers, order).unwrap_or_else(|report| panic!("{name}:\n{report}"));
    let args: Vec<Value> = launch
        .args()
        .iter()
        .map(|arg| match arg {
            Arg::Memory(span) => Value::Memory { id: span.memory.id, at: span.at, bytes: span.bytes },
            Arg::Null => Value::Null,
            Arg::I32(x) => Value::I32(*x),
            Arg::F32(x) => Value::F32(*x),
            Arg::Bits(x) => Value::Bits(*x),
        })
        .collect();
    let mut expected = HostBytes(buffers.0.iter().map(|buffer| buffer.bytes.clone()).collect());
    reference::execute(name, &args, &mut expected).expect("a launch that the reference takes");
    let mut changed = false;
    for (buffer, (got, expected)) in buffers.0.iter().zip(got.iter().zip(&expected.0)) {
        changed |= buffer.bytes != *expected;
        match buffer.kind {
            Kind::Exact => assert!(got == expected, "{name}: buffer {} differs", buffer.id),
            Kind::Float(float) => {
                let size = float.bytes();
                let values = reference::decode(float, got).into_iter().zip(reference::decode(float, expected));
                for (i, (a, b)) in values.enumerate() {
                    let range = i * size..(i + 1) * size;
                    // What nobody wrote is the same to the bit, NaN included.
                    let same = got[range.clone()] == expected[range];
                    let near = (a - b).abs() <= tolerance * b.abs().max(1.0);
                    assert!(same || near, "{name}: buffer {} has {a} for {b} at {i}", buffer.id);
                }
            }
        }
    }
    assert!(changed, "{name}: the reference has something to do");
}

/// How far a result may be from the reference's. `exact` is the f32 kernel's error; the others round once more, by half a
/// unit of their last place: 2^-11 in f16, 2^-8 in bf16. Twice that, for a result that falls on the other side of a tie.
fn tolerance(float: Float, exact: f32) -> f32 {
    exact
        + match float {
            Float::F32 => 0.0,
            Float::F16 => 1.0 / 1024.0,
            Float::BF16 => 1.0 / 128.0,
        }
}

/// Runs `case` for each of some seeds, or for the one that the environment names.
fn seeded(name: &str, case: impl Fn(&mut StdRng)) {
    let one = std::env::var("KERNELS_SEED").ok().map(|seed| seed.parse::<u64>().expect("KERNELS_SEED is a number"));
    let seeds = one.map_or(1..=2, |seed| seed..=seed);
    for seed in seeds {
        let run = std::panic::AssertUnwindSafe(|| case(&mut StdRng::seed_from_u64(seed)));
        if let Err(cause) = std::panic::catch_unwind(run) {
            eprintln!("{name}: repeat with: KERNELS_SEED={seed}");
            std::panic::resume_unwind(cause);
        }
    }
}

/// Values in -size..size.
fn values(random: &mut StdRng, count: usize, size: f32) -> Vec<f32> {
    (0..count).map(|_| random.random_range(-size..size)).collect()
}

/// Numbers below `end` for real tokens. Behind them, as an index, one that leads out of every buffer.
fn indices(random: &mut StdRng, buffers: &mut Buffers, count: usize, end: u32, room: usize) -> usize {
    let mut all: Vec<u32> = (0..count).map(|_| random.random_range(0..end)).collect();
    all.resize(room, u32::MAX);
    buffers.add(Kind::Exact, all.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn add_norm(random: &mut StdRng, hidden: usize) {
    let mut emulation = Emulation::start();
    for float in FLOATS {
        for batch in batches(random, 9) {
            let (room, real) = (batch.bounds.tokens * hidden, batch.tokens() * hidden);
            let mut buffers = Buffers::default();
            let table = batch.table(&mut buffers);
            let x = buffers.floats(float, &values(random, real, 2.0), room);
            let y = buffers.floats(float, &values(random, real, 2.0), room);
            let bias = buffers.floats(float, &values(random, hidden, 1.0), hidden);
            let weight = buffers.floats(Float::F32, &values(random, hidden, 1.5), hidden);
            let shift = buffers.floats(Float::F32, &values(random, hidden, 1.0), hidden);
            let bias = random.random_bool(0.7).then(|| buffers.all(bias));
            let launch = AddNorm {
                table: buffers.all(table),
                x: buffers.all(x),
                y: buffers.all(y),
                bias,
                weight: buffers.all(weight),
                shift: buffers.all(shift),
                hidden,
                eps: 1e-12,
            }
            .launch(&batch.bounds, float);
            check(&mut emulation, &launch, &buffers, tolerance(float, 1e-5), random.random());
        }
    }
}

#[test]
fn a_sum_is_normed_in_place() {
    seeded("a_sum_is_normed_in_place", |random| {
        for hidden in [32, 100, 384, 768] {
            add_norm(random, hidden);
        }
    });
}

/// Beyond 1,024 values a row is read once per pass.
#[test]
fn a_wide_sum_is_normed_in_place() {
    seeded("a_wide_sum_is_normed_in_place", |random| {
        for hidden in [1028, 2048] {
            add_norm(random, hidden);
        }
    });
}

#[test]
fn embeddings_are_summed_and_normed() {
    seeded("embeddings_are_summed_and_normed", |random| {
        let mut emulation = Emulation::start();
        for (hidden, float) in [32, 100, 384, 768].into_iter().flat_map(|hidden| FLOATS.map(|float| (hidden, float))) {
            for batch in batches(random, 9) {
                let vocabulary = 50;
                let (room, tokens) = (batch.bounds.tokens, batch.tokens());
                let mut buffers = Buffers::default();
                let table = batch.table(&mut buffers);
                let ids = indices(random, &mut buffers, tokens, vocabulary, room);
                let segments = indices(random, &mut buffers, tokens, 2, room);
                let mut parameter = |buffers: &mut Buffers, float, rows: usize| {
                    buffers.floats(float, &values(random, rows * hidden, 1.0), rows * hidden)
                };
                let words = parameter(&mut buffers, float, vocabulary as usize);
                let places = parameter(&mut buffers, float, batch.bounds.longest);
                let segment_rows = parameter(&mut buffers, float, 2);
                let weight = parameter(&mut buffers, Float::F32, 1);
                let shift = parameter(&mut buffers, Float::F32, 1);
                let out = buffers.floats(float, &[], room * hidden);
                let with_segments = random.random_bool(0.7);
                let launch = EmbedNorm {
                    table: buffers.all(table),
                    ids: buffers.all(ids),
                    segments: with_segments.then(|| buffers.all(segments)),
                    words: buffers.all(words),
                    places: buffers.all(places),
                    segment_rows: with_segments.then(|| buffers.all(segment_rows)),
                    weight: buffers.all(weight),
                    shift: buffers.all(shift),
                    out: buffers.all(out),
                    hidden,
                    eps: 1e-12,
                }
                .launch(&batch.bounds, float);
                check(&mut emulation, &launch, &buffers, tolerance(float, 1e-5), random.random());
            }
        }
    });
}

#[test]
fn rows_go_to_their_places_and_back() {
    seeded("rows_go_to_their_places_and_back", |random| {
        let mut emulation = Emulation::start();
        for (bytes, per_place) in [(1, 1), (1, 16), (2, 3), (4, 1), (4, 4), (4, 384), (8, 2), (8, 5)] {
            // Rows without a token are legal here.
            let mut all = batches(random, 9);
            all.push(Batch { lens: vec![0, 3, 0, 0, 2, 0], bounds: Bounds { rows: 6, tokens: 5, longest: 4 } });
            for batch in all {
                let (rows, longest) = (batch.bounds.rows, batch.bounds.longest);
                let padded_len = longest + random.random_range(0..4);
                let of_token = per_place * bytes;
                let content = |random: &mut StdRng, places: usize| -> Vec<u8> {
                    (0..places * of_token).map(|_| random.random()).collect()
                };
                let mut buffers = Buffers::default();
                let table = batch.table(&mut buffers);
                let ragged = content(random, batch.bounds.tokens);
                let ragged = buffers.add(Kind::Exact, ragged);
                let padded = content(random, rows * padded_len);
                let padded = buffers.add(Kind::Exact, padded);
                let mask = buffers.floats(Float::F32, &[], rows * padded_len);
                let positions = buffers.add(Kind::Exact, vec![0xff; 4 * rows * padded_len]);
                let launch = Unpack {
                    table: buffers.all(table),
                    ragged: buffers.all(ragged),
                    padded: buffers.all(padded),
                    mask: random.random_bool(0.6).then(|| buffers.all(mask)),
                    positions: random.random_bool(0.6).then(|| buffers.all(positions)),
                    padded_len,
                    per_place,
                    pad: random.random(),
                }
                .launch(&batch.bounds, bytes);
                check(&mut emulation, &launch, &buffers, 0.0, random.random());
                let launch = Gather {
                    table: buffers.all(table),
                    padded: buffers.all(padded),
                    ragged: buffers.all(ragged),
                    padded_len,
                    per_place,
                }
                .launch(&batch.bounds, bytes);
                check(&mut emulation, &launch, &buffers, 0.0, random.random());
            }
        }
    });
}

#[test]
fn activations_follow_a_bias() {
    seeded("activations_follow_a_bias", |random| {
        let mut emulation = Emulation::start();
        for (width, float) in [32, 100, 384, 1536].into_iter().flat_map(|width| FLOATS.map(|float| (width, float))) {
            for (batch, activation) in batches(random, 6).into_iter().zip(Activation::ALL.into_iter().skip(1)) {
                let room = batch.bounds.tokens * width;
                let mut buffers = Buffers::default();
                let table = batch.table(&mut buffers);
                let x = buffers.floats(float, &values(random, batch.tokens() * width, 6.0), room);
                let bias = buffers.floats(float, &values(random, width, 1.0), width);
                let bias = random.random_bool(0.7).then(|| buffers.all(bias));
                let launch = BiasAct { table: buffers.all(table), x: buffers.all(x), bias, width, activation }
                    .launch(&batch.bounds, float);
                check(&mut emulation, &launch, &buffers, tolerance(float, 2e-6), random.random());
            }
        }
    });
}

#[test]
fn padding_has_no_share_of_a_softmax() {
    seeded("padding_has_no_share_of_a_softmax", |random| {
        let mut emulation = Emulation::start();
        for (longest, float) in [8, 21, 40].into_iter().flat_map(|longest| FLOATS.map(|float| (longest, float))) {
            for mut batch in batches(random, longest) {
                batch.lens.truncate(2);
                batch.bounds.rows = batch.bounds.rows.min(3);
                let (heads, len) = (2, longest as usize);
                let mut buffers = Buffers::default();
                let table = batch.table(&mut buffers);
                let of_row = heads * len * len;
                let mut scores = values(random, batch.lens.len() * of_row, 20.0);
                // Whatever a product left in padding.
                for (i, score) in scores.iter_mut().enumerate() {
                    let real = batch.lens[i / of_row] as usize;
                    if i % len >= real || i / len % len >= real {
                        *score = f32::NAN;
                    }
                }
                let scores = buffers.floats(float, &scores, batch.bounds.rows * of_row);
                let launch = MaskedSoftmax {
                    table: buffers.all(table),
                    scores: buffers.all(scores),
                    heads,
                    padded_len: len,
                    scale: 0.37,
                }
                .launch(&batch.bounds, float);
                check(&mut emulation, &launch, &buffers, tolerance(float, 1e-6), random.random());
            }
        }
    });
}

/// Beyond 1,024 columns a query is read once per pass.
#[test]
fn a_long_softmax_is_one_too() {
    let mut emulation = Emulation::start();
    let mut random = StdRng::seed_from_u64(1);
    for (len, float) in [(1030, Float::F32), (1032, Float::F16)] {
        let batch = Batch { lens: vec![5], bounds: Bounds { rows: 1, tokens: len, longest: len } };
        let mut buffers = Buffers::default();
        let table = batch.table(&mut buffers);
        let long = Batch { lens: vec![len as u32 - 3], ..batch.clone() };
        let long_table = long.table(&mut buffers);
        let scores = buffers.floats(float, &values(&mut random, len * len, 5.0), len * len);
        // A short row, whose other queries are set to 0, and one that fills its place but for three.
        let softmax = |table| {
            MaskedSoftmax {
                table: buffers.all(table),
                scores: buffers.all(scores),
                heads: 1,
                padded_len: len,
                scale: 0.5,
            }
            .launch(&batch.bounds, float)
        };
        check(&mut emulation, &softmax(table), &buffers, tolerance(float, 1e-6), 1);
        check(&mut emulation, &softmax(long_table), &buffers, tolerance(float, 1e-6), 2);
    }
}

/// qkv of a batch with NaN behind it. `growth` raises a row's scores with each key, so that sums must be scaled again.
fn attention(random: &mut StdRng, emulation: &mut Emulation, float: Float, size: usize, batch: &Batch, growth: f32) {
    let heads = 2;
    let width = heads * size;
    let mut qkv = values(random, batch.tokens() * 3 * width, 1.0);
    let places = batch.lens.iter().flat_map(|len| (0..*len).map(move |place| (place, *len)));
    for (token, (place, len)) in qkv.chunks_exact_mut(3 * width).zip(places) {
        // Queries have a positive mean, so longer keys in one direction give larger scores.
        token[..width].iter_mut().for_each(|q| *q = 0.5 + 0.5 * *q);
        token[width..2 * width].iter_mut().for_each(|k| *k += growth * place as f32 / len as f32);
    }
    let mut buffers = Buffers::default();
    let table = batch.table(&mut buffers);
    let qkv = buffers.floats(float, &qkv, batch.bounds.tokens * 3 * width);
    let context = buffers.floats(float, &[], batch.bounds.tokens * width);
    let launch = Attention {
        table: buffers.all(table),
        qkv: buffers.all(qkv),
        context: buffers.all(context),
        heads,
        size,
        scale: 1.0 / (size as f32).sqrt(),
    }
    .launch(&batch.bounds, float);
    // A power's relative error is its exponent's absolute one, which grows with the scores: up to 250 at the largest growth.
    // In the others shares are rounded to T before they meet values of up to 1.
    let tolerance = match float {
        Float::F32 => 1e-5 + 2e-6 * growth,
        Float::F16 => 1.0 / 512.0,
        Float::BF16 => 1.0 / 64.0,
    };
    check(emulation, &launch, &buffers, tolerance, random.random());
}

fn attention_of(float: Float) {
    seeded(&format!("attention_of {float:?}"), |random| {
        let mut emulation = Emulation::start();
        for size in [32, 64, 128] {
            // Rows of one, two and three tiles of queries and of keys, and of all that lies between.
            for mut batch in batches(random, 150) {
                batch.lens.truncate(3);
                attention(random, &mut emulation, float, size, &batch, 0.0);
            }
            for growth in [3.0, 30.0] {
                let batch = Batch { lens: vec![64, 130, 17], bounds: Bounds { rows: 3, tokens: 211, longest: 130 } };
                attention(random, &mut emulation, float, size, &batch, growth);
            }
        }
    });
}

#[test]
fn attention_in_f32_stays_within_rows() {
    attention_of(Float::F32);
}

#[test]
fn attention_in_f16_stays_within_rows() {
    attention_of(Float::F16);
}

#[test]
fn attention_in_bf16_stays_within_rows() {
    attention_of(Float::BF16);
}

#[test]
fn a_row_becomes_one_vector() {
    seeded("a_row_becomes_one_vector", |random| {
        let mut emulation = Emulation::start();
        for (hidden, float) in
            [32, 100, 384, 768, 2052].into_iter().flat_map(|hidden| FLOATS.map(|float| (hidden, float)))
        {
            let mut all = batches(random, 20);
            all.push(Batch { lens: vec![0, 3, 0], bounds: Bounds { rows: 3, tokens: 4, longest: 4 } });
            for (i, mut batch) in all.into_iter().enumerate() {
                batch.bounds.rows = batch.bounds.rows.min(6);
                let mut buffers = Buffers::default();
                let table = batch.table(&mut buffers);
                let x = values(random, batch.tokens() * hidden, 2.0);
                let x = buffers.floats(float, &x, batch.bounds.tokens * hidden);
                let out = buffers.floats(Float::F32, &[], batch.bounds.rows * hidden);
                let mut launch = PoolRows {
                    table: buffers.all(table),
                    x: buffers.all(x),
                    out: buffers.all(out),
                    hidden,
                    mode: Pool::ALL[(i + random.random_range(0..3)) % 3],
                    normalize: random.random(),
                }
                .launch(&batch.bounds, float);
                // One block for all rows, half of the time: what it shares is used again.
                launch.grid[0] = if random.random() { 1 } else { launch.grid[0] };
                check(&mut emulation, &launch, &buffers, 1e-5, random.random());
            }
        }
    });
}

#[test]
fn a_head_is_a_product_of_each_row() {
    seeded("a_head_is_a_product_of_each_row", |random| {
        let mut emulation = Emulation::start();
        for (inputs, outputs) in [(32, 2), (100, 7), (384, 384), (768, 3)] {
            for (batch, activation) in batches(random, 3).into_iter().zip(Activation::ALL.into_iter().rev()) {
                let (rows, real) = (batch.bounds.rows, batch.lens.len());
                let mut buffers = Buffers::default();
                let table = batch.table(&mut buffers);
                let x = buffers.floats(Float::F32, &values(random, real * inputs, 1.0), rows * inputs);
                let w = buffers.floats(Float::F32, &values(random, outputs * inputs, 0.1), outputs * inputs);
                let bias = buffers.floats(Float::F32, &values(random, outputs, 1.0), outputs);
                let y = buffers.floats(Float::F32, &[], rows * outputs);
                let launch = DenseRows {
                    table: buffers.all(table),
                    x: buffers.all(x),
                    w: buffers.all(w),
                    bias: random.random_bool(0.7).then(|| buffers.all(bias)),
                    y: buffers.all(y),
                    inputs,
                    outputs,
                    activation,
                }
                .launch(&batch.bounds);
                check(&mut emulation, &launch, &buffers, 1e-5, random.random());
            }
        }
    });
}

/// A graph that was captured at any grid serves a batch: one block does it all, and blocks beyond it do nothing.
#[test]
fn every_grid_gives_the_same() {
    let mut emulation = Emulation::start();
    let mut random = StdRng::seed_from_u64(1);
    let (hidden, heads, size) = (64, 2, 32);
    let batch = Batch { lens: vec![70, 1, 9], bounds: Bounds { rows: 3, tokens: 80, longest: 70 } };
    for grid in [[1, 1, 1], [3, 5, 7]] {
        let mut buffers = Buffers::default();
        let table = batch.table(&mut buffers);
        let x = buffers.floats(Float::F16, &values(&mut random, 80 * 3 * hidden, 1.0), 80 * 3 * hidden);
        // The context's place, behind them, is not at a memory's start.
        let y = buffers.floats(Float::F16, &values(&mut random, 80 * hidden, 1.0), 2 * 80 * hidden);
        let out = buffers.floats(Float::F32, &[], 3 * hidden);
        let one = buffers.floats(Float::F32, &values(&mut random, hidden, 1.0), hidden);
        let padded = buffers.add(Kind::Exact, vec![0xff; 3 * 70 * hidden * 2]);
        let (table, x, y, one) = (buffers.all(table), buffers.all(x), buffers.all(y), buffers.all(one));
        let (y, context) = (y.part(0, 80 * hidden * 2), y.part(80 * hidden * 2, 80 * hidden * 2));
        let launches = [
            Unpack {
                table,
                ragged: y,
                padded: buffers.all(padded),
                mask: None,
                positions: None,
                padded_len: 70,
                per_place: hidden,
                pad: 0,
            }
            .launch(&batch.bounds, 2),
            AddNorm { table, x, y, bias: None, weight: one, shift: one, hidden, eps: 1e-12 }
                .launch(&batch.bounds, Float::F16),
            BiasAct { table, x: y, bias: None, width: hidden, activation: Activation::GeluErf }
                .launch(&batch.bounds, Float::F16),
            Attention { table, qkv: x, context, heads, size, scale: 0.2 }.launch(&batch.bounds, Float::F16),
            PoolRows { table, x: y, out: buffers.all(out), hidden, mode: Pool::Mean, normalize: true }
                .launch(&batch.bounds, Float::F16),
        ];
        for mut launch in launches {
            // Dimensions that a kernel does not use repeat its work, and in place that is not the same.
            let used = if launch.function.starts_with("attention") {
                3
            } else {
                1 + usize::from(launch.function.starts_with("unpack"))
            };
            launch.grid[..used].copy_from_slice(&grid[..used]);
            check(&mut emulation, &launch, &buffers, 1.0 / 256.0, random.random());
        }
    }
}

#[test]
fn every_function_is_known_to_the_emulation() {
    let mut emulation = Emulation::start();
    for (file, functions) in ops::FUNCTIONS {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(file).exists(), "{file} is missing");
        for function in *functions {
            let answer = emulation.run(&Launch::new(function, [1; 3], 32, 0, &[]), &Buffers::default(), 0);
            assert_eq!(answer, Err(format!("{function} takes other arguments")));
        }
    }
    let answer = emulation.run(&Launch::new("add_norm_f64", [1; 3], 32, 0, &[]), &Buffers::default(), 0);
    assert_eq!(answer, Err("no kernel add_norm_f64".to_owned()));
}

/// The tests above can fail: a buffer that is one value too short is noticed, and so are a block that lacks shared memory and
/// a value behind the batch.
#[test]
fn a_broken_launch_is_caught() {
    let batch = Batch { lens: vec![5], bounds: Bounds { rows: 1, tokens: 5, longest: 5 } };
    let width = 32;
    let run = |x_count: usize, shared_missing: u32| {
        let mut buffers = Buffers::default();
        let table = batch.table(&mut buffers);
        let x = buffers.floats(Float::F32, &vec![1.0; x_count], x_count);
        let context = buffers.floats(Float::F32, &[], 5 * width);
        let qkv = buffers.floats(Float::F32, &vec![1.0; 5 * 3 * width], 5 * 3 * width);
        let arg = |id| Arg::Memory(buffers.all(id));
        let act =
            Launch::new("bias_act_f32", [1; 3], 128, 0, &[arg(table), arg(x), Arg::Null, Arg::I32(32), Arg::I32(1)]);
        let mut attend = Attention {
            table: buffers.all(table),
            qkv: buffers.all(qkv),
            context: buffers.all(context),
            heads: 1,
            size: width,
            scale: 1.0,
        }
        .launch(&batch.bounds, Float::F32);
        attend.shared_bytes -= shared_missing;
        let mut emulation = Emulation::start();
        emulation.run(&act, &buffers, 0).and_then(|_| emulation.run(&attend, &buffers, 0)).err()
    };
    assert_eq!(run(5 * width, 0), None);
    let report = run(5 * width - 1, 0).expect("the last value is missing");
    assert!(report.contains("heap-buffer-overflow") && report.contains("bias_act"), "{report}");
    // Behind the last share lie 16 bytes that only widen its row.
    let report = run(5 * width, 32).expect("four shares are missing");
    assert!(report.contains("heap-buffer-overflow") && report.contains("attention"), "{report}");
}
