//! What can only be known on the device itself: each kernel and product, the encoder, graphs and the reuse of slots, beside the
//! simulated device, which computes the plain references.
//!
//! Always true
//! - The same code drives both devices with the same inputs; what differs is who computes.
//! - A check that could not run fails. The last one, where it is asked for, leaves the device lost.
//!
//! Elsewhere: how the references are checked (tests/kernels.rs, tests/device.rs), the command (commands/devices.rs).

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::sim::SimDevice;
use crate::clock;
use crate::gpu::driver::{Driver, Event, Fault, HostUse, Product, Queue};
use crate::gpu::encoder::{self, Activation, Dense, Encoder, Form, Layer, Norm, Parameters, Pool};
use crate::gpu::launch::{Float, Memory, Span, Table};
use crate::gpu::ops::{
    AddNorm, Attention, BiasAct, Bounds, DenseRows, EmbedNorm, Gather, MaskedSoftmax, PoolRows, Unpack,
};
use crate::gpu::reference;
use crate::gpu::slot::{Capacity, HostBatch, InFlight, Vacant};

/// How much is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Little of everything: for a run under a checker that is a hundred times slower.
    pub small: bool,
    /// At the end, make the device fail, and see that it is told.
    pub lose: bool,
}

/// One check's outcome.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub name: String,
    /// What was found, or why it is wrong.
    pub result: Result<String, String>,
    pub took: Duration,
}

/// Runs every check and tells each outcome as it comes. `make` makes an executor's queues on the device.
pub fn run<D: Driver>(make: &dyn Fn() -> Result<D, Fault>, options: Options, tell: &mut dyn FnMut(&Outcome)) {
    let mut check = |name: String, body: &mut dyn FnMut() -> Result<String, Fault>| {
        let start = clock::now();
        let result = body().map_err(|fault| fault.to_string());
        let took = clock::now().since(start);
        tell(&Outcome { name, result, took });
    };
    for float in [Float::F32, Float::F16, Float::BF16] {
        for kernel in KERNELS {
            check(format!("{}, {float:?}", kernel.name), &mut || compare(make, kernel, float, options));
        }
        check(format!("product, {float:?}"), &mut || compare(make, &PRODUCT, float, options));
        check(format!("encoder, {float:?}"), &mut || encoders(make, float, options));
    }
    for kernel in BYTES {
        check(kernel.name.to_owned(), &mut || compare(make, kernel, Float::F32, options));
    }
    check("graphs give what launches give".into(), &mut || graphs(make, options));
    check("slots are reused only when they are done".into(), &mut || slots(make, options));
    check("too much memory is refused, and the device goes on".into(), &mut || too_much(make));
    if options.lose {
        check("a lost device says so, again and again".into(), &mut || lost(make));
    }
}

/// A kernel with random inputs: what it wrote, as f32.
struct Kernel {
    name: &'static str,
    /// Largest difference from the reference, by [`Float`], where values are around 1.
    tolerance: [f32; 3],
    run: Run,
}

type Run = fn(&mut dyn Rigged, Float, Bounds, &[u32]) -> Result<Vec<f32>, Fault>;

const KERNELS: &[Kernel] = &[
    Kernel {
        name: "embed_norm",
        tolerance: [1e-4, 1e-2, 6e-2],
        run: |rig, float, b, lens| rig.embed_norm(float, b, lens),
    },
    Kernel { name: "add_norm", tolerance: [1e-4, 1e-2, 6e-2], run: |rig, float, b, lens| rig.add_norm(float, b, lens) },
    Kernel { name: "bias_act", tolerance: [1e-5, 5e-3, 4e-2], run: |rig, float, b, lens| rig.bias_act(float, b, lens) },
    Kernel {
        name: "masked_softmax",
        tolerance: [1e-5, 2e-3, 1e-2],
        run: |rig, float, b, lens| rig.masked_softmax(float, b, lens),
    },
    Kernel {
        name: "attention",
        tolerance: [1e-4, 1e-2, 6e-2],
        run: |rig, float, b, lens| rig.attention(float, b, lens),
    },
    Kernel { name: "pool", tolerance: [1e-4, 1e-3, 1e-3], run: |rig, float, b, lens| rig.pool(float, b, lens) },
];

const PRODUCT: Kernel =
    Kernel { name: "product", tolerance: [1e-3, 2e-2, 1e-1], run: |rig, float, b, lens| rig.product(float, b, lens) };

/// Those that have no floats, or only f32.
const BYTES: &[Kernel] = &[
    Kernel { name: "unpack", tolerance: [0.0; 3], run: |rig, _, b, lens| rig.unpack(b, lens) },
    Kernel { name: "gather", tolerance: [0.0; 3], run: |rig, _, b, lens| rig.gather(b, lens) },
    Kernel { name: "dense", tolerance: [1e-3; 3], run: |rig, _, b, lens| rig.dense(b, lens) },
];

fn compare<D: Driver>(
    make: &dyn Fn() -> Result<D, Fault>,
    kernel: &Kernel,
    float: Float,
    options: Options,
) -> Result<String, Fault> {
    let mut device = make()?;
    let tolerance = kernel.tolerance[float as usize];
    let (mut worst, mut values) = (0.0_f32, 0);
    for seed in 0..if options.small { 2 } else { 12 } {
        let mut random = StdRng::seed_from_u64(seed);
        let longest = random.random_range(1..=if options.small { 40 } else { 300 });
        let rows = random.random_range(1..=if options.small { 4 } else { 16 });
        let lens: Vec<u32> = (0..rows).map(|_| random.random_range(1..=longest as u32)).collect();
        let tokens = lens.iter().sum::<u32>() as usize;
        // Larger than the batch, as a graph's are.
        let bounds = Bounds { rows: rows + 3, tokens: tokens + 17, longest: longest + 5 };
        let got = (kernel.run)(&mut Rig::new(&mut device, seed), float, bounds, &lens)?;
        let expected = (kernel.run)(&mut Rig::new(&mut SimDevice::new(seed).driver(), seed), float, bounds, &lens)?;
        let far = distance(&got, &expected);
        if far > tolerance {
            return Err(Fault::Refused(format!("{far} from the reference ({tolerance} allowed), lengths {lens:?}")));
        }
        (worst, values) = (worst.max(far), values + got.len());
    }
    Ok(format!("{values} values, {worst:.1e} from the reference at most ({tolerance:.0e} allowed)"))
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return f32::INFINITY;
    }
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most, d| if d.is_nan() { f32::INFINITY } else { most.max(d) })
}

/// A device with seeded inputs.
struct Rig<'a, D: Driver> {
    driver: &'a mut D,
    random: StdRng,
}

/// [`Rig`] of whatever device.
trait Rigged {
    fn embed_norm(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn add_norm(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn bias_act(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn masked_softmax(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn attention(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn pool(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn product(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn unpack(&mut self, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn gather(&mut self, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
    fn dense(&mut self, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault>;
}

impl<'a, D: Driver> Rig<'a, D> {
    fn new(driver: &'a mut D, seed: u64) -> Rig<'a, D> {
        Rig { driver, random: StdRng::seed_from_u64(seed ^ 0x5eed) }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<D::Memory, Fault> {
        let memory = self.driver.allocate(bytes.len().max(1))?;
        let mut host = self.driver.host_memory(bytes.len().max(1), HostUse::Upload)?;
        bytemuck::cast_slice_mut::<u64, u8>(host.words_mut())[..bytes.len()].copy_from_slice(bytes);
        self.driver.upload(&*host, 0, Span::of(&memory).part(0, bytes.len()))?;
        self.driver.synchronize()?;
        Ok(memory)
    }

    fn floats(&mut self, float: Float, count: usize, scale: f32) -> Result<D::Memory, Fault> {
        let values: Vec<f32> = (0..count).map(|_| self.random.random_range(-scale..scale)).collect();
        self.put(&reference::encode(float, &values))
    }

    fn ids(&mut self, count: usize, below: u32) -> Result<D::Memory, Fault> {
        let ids: Vec<u32> = (0..count).map(|_| self.random.random_range(0..below)).collect();
        self.put(bytemuck::cast_slice(&ids))
    }

    fn table(&mut self, bounds: Bounds, lens: &[u32]) -> Result<D::Memory, Fault> {
        let mut table = vec![0_i32; Table::len(bounds.rows)];
        Table::write(lens, &mut table[..Table::len(lens.len())]);
        self.put(bytemuck::cast_slice(&table))
    }

    /// Zeros, so that what a kernel leaves alone is the same on both devices.
    fn room(&mut self, bytes: usize) -> Result<D::Memory, Fault> {
        self.put(&vec![0; bytes])
    }

    fn get(&mut self, float: Float, memory: &D::Memory) -> Result<Vec<f32>, Fault> {
        Ok(reference::decode(float, &self.bytes(memory)?))
    }

    fn bytes(&mut self, memory: &D::Memory) -> Result<Vec<u8>, Fault> {
        let event = self.driver.event()?;
        self.driver.record(Queue::Compute, &event)?;
        self.driver.wait(Queue::Readback, &event)?;
        let mut host = self.driver.host_memory(memory.bytes(), HostUse::Readback)?;
        self.driver.readback(Span::of(memory), &mut *host, 0)?;
        self.driver.synchronize()?;
        Ok(bytemuck::cast_slice::<u64, u8>(host.words())[..memory.bytes()].to_vec())
    }

    /// One of the sizes that models have.
    fn hidden(&mut self) -> usize {
        [32, 100, 384, 768][self.random.random_range(0..4)]
    }
}

impl<D: Driver> Rigged for Rig<'_, D> {
    fn embed_norm(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let (hidden, table) = (self.hidden(), self.table(bounds, lens)?);
        let (ids, segments) = (self.ids(bounds.tokens, 50)?, self.ids(bounds.tokens, 3)?);
        let words = self.floats(float, 50 * hidden, 1.0)?;
        let places = self.floats(float, bounds.longest * hidden, 1.0)?;
        let kinds = self.floats(float, 3 * hidden, 1.0)?;
        let (weight, shift) = (self.floats(Float::F32, hidden, 1.0)?, self.floats(Float::F32, hidden, 1.0)?);
        let out = self.room(bounds.tokens * hidden * float.bytes())?;
        let launch = EmbedNorm {
            table: Span::of(&table),
            ids: Span::of(&ids),
            segments: Some(Span::of(&segments)),
            words: Span::of(&words),
            places: Span::of(&places),
            segment_rows: Some(Span::of(&kinds)),
            weight: Span::of(&weight),
            shift: Span::of(&shift),
            out: Span::of(&out),
            hidden,
            eps: 1e-12,
        };
        self.driver.launch(&launch.launch(&bounds, float))?;
        self.get(float, &out)
    }

    fn add_norm(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let (hidden, table) = (self.hidden(), self.table(bounds, lens)?);
        let (x, y) =
            (self.floats(float, bounds.tokens * hidden, 1.0)?, self.floats(float, bounds.tokens * hidden, 1.0)?);
        let bias = self.floats(float, hidden, 1.0)?;
        let (weight, shift) = (self.floats(Float::F32, hidden, 1.0)?, self.floats(Float::F32, hidden, 1.0)?);
        let launch = AddNorm {
            table: Span::of(&table),
            x: Span::of(&x),
            y: Span::of(&y),
            bias: Some(Span::of(&bias)),
            weight: Span::of(&weight),
            shift: Span::of(&shift),
            hidden,
            eps: 1e-12,
        };
        self.driver.launch(&launch.launch(&bounds, float))?;
        self.get(float, &x)
    }

    fn bias_act(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let (width, table) = (self.hidden(), self.table(bounds, lens)?);
        let (x, bias) = (self.floats(float, bounds.tokens * width, 3.0)?, self.floats(float, width, 1.0)?);
        let all = [Activation::None, Activation::GeluErf, Activation::GeluTanh, Activation::Relu, Activation::Tanh];
        let activation = all[self.random.random_range(0..all.len())];
        let (table, x, bias) = (Span::of(&table), Span::of(&x), Some(Span::of(&bias)));
        self.driver.launch(&BiasAct { table, x, bias, width, activation }.launch(&bounds, float))?;
        self.get(float, x.memory)
    }

    fn masked_softmax(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let (heads, padded_len, table) = (3, bounds.longest, self.table(bounds, lens)?);
        let scores = self.floats(float, bounds.rows * heads * padded_len * padded_len, 4.0)?;
        let (table, scores) = (Span::of(&table), Span::of(&scores));
        self.driver.launch(&MaskedSoftmax { table, scores, heads, padded_len, scale: 0.7 }.launch(&bounds, float))?;
        self.get(float, scores.memory)
    }

    fn attention(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let table = self.table(bounds, lens)?;
        let (size, heads) = ([32, 64, 128][self.random.random_range(0..3)], 3);
        let qkv = self.floats(float, bounds.tokens * 3 * heads * size, 1.0)?;
        let context = self.room(bounds.tokens * heads * size * float.bytes())?;
        let scale = 1.0 / (size as f32).sqrt();
        let (table, qkv, context) = (Span::of(&table), Span::of(&qkv), Span::of(&context));
        self.driver.launch(&Attention { table, qkv, context, heads, size, scale }.launch(&bounds, float))?;
        self.get(float, context.memory)
    }

    fn pool(&mut self, float: Float, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let (hidden, table) = (self.hidden(), self.table(bounds, lens)?);
        let x = self.floats(float, bounds.tokens * hidden, 1.0)?;
        let out = self.room(bounds.rows * hidden * 4)?;
        let mode = [Pool::Mean, Pool::First, Pool::Max][self.random.random_range(0..3)];
        let normalize = self.random.random_bool(0.5);
        let (table, x, out) = (Span::of(&table), Span::of(&x), Span::of(&out));
        self.driver.launch(&PoolRows { table, x, out, hidden, mode, normalize }.launch(&bounds, float))?;
        self.get(Float::F32, out.memory)
    }

    fn product(&mut self, float: Float, bounds: Bounds, _lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let tokens = encoder::bucket(bounds.tokens);
        let (inputs, outputs) =
            ([64, 384, 768][self.random.random_range(0..3)], [64, 96, 384][self.random.random_range(0..3)]);
        let scale = 1.0 / (inputs as f32).sqrt();
        let (x, weights) = (self.floats(float, tokens * inputs, 1.0)?, self.floats(float, outputs * inputs, scale)?);
        let bias = self.floats(float, outputs, 1.0)?;
        let y = self.room(tokens * outputs * float.bytes())?;
        let bias = self.random.random_bool(0.5).then(|| Span::of(&bias));
        let (x, weights, y) = (Span::of(&x), Span::of(&weights), Span::of(&y));
        self.driver.product(&Product { x, weights, bias, y, tokens, inputs, outputs, float })?;
        self.get(float, y.memory)
    }

    fn unpack(&mut self, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let (table, padded_len) = (self.table(bounds, lens)?, bounds.longest);
        let (per_place, size) = (self.random.random_range(1..4), [1, 2, 4, 8][self.random.random_range(0..4)]);
        let bytes: Vec<u8> = (0..bounds.tokens * per_place * size).map(|_| self.random.random()).collect();
        let ragged = self.put(&bytes)?;
        let places = bounds.rows * padded_len;
        let padded = self.room(places * per_place * size)?;
        let (mask, positions) = (self.room(4 * places)?, self.room(4 * places)?);
        let launch = Unpack {
            table: Span::of(&table),
            ragged: Span::of(&ragged),
            padded: Span::of(&padded),
            mask: Some(Span::of(&mask)),
            positions: Some(Span::of(&positions)),
            padded_len,
            per_place,
            pad: 0x0807_0605_0403_0201,
        };
        self.driver.launch(&launch.launch(&bounds, size))?;
        let mut values: Vec<f32> = self.bytes(&padded)?.into_iter().map(f32::from).collect();
        values.extend(self.get(Float::F32, &mask)?);
        values.extend(self.bytes(&positions)?.into_iter().map(f32::from));
        Ok(values)
    }

    fn gather(&mut self, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let (table, padded_len) = (self.table(bounds, lens)?, bounds.longest);
        let (per_place, size) = (self.random.random_range(1..4), [1, 2, 4, 8][self.random.random_range(0..4)]);
        let bytes: Vec<u8> = (0..bounds.rows * padded_len * per_place * size).map(|_| self.random.random()).collect();
        let padded = self.put(&bytes)?;
        let ragged = self.room(bounds.tokens * per_place * size)?;
        let (table, padded, ragged) = (Span::of(&table), Span::of(&padded), Span::of(&ragged));
        self.driver.launch(&Gather { table, padded, ragged, padded_len, per_place }.launch(&bounds, size))?;
        Ok(self.bytes(ragged.memory)?.into_iter().map(f32::from).collect())
    }

    fn dense(&mut self, bounds: Bounds, lens: &[u32]) -> Result<Vec<f32>, Fault> {
        let table = self.table(bounds, lens)?;
        let (inputs, outputs) = (self.hidden(), self.random.random_range(1..40));
        let scale = 1.0 / (inputs as f32).sqrt();
        let x = self.floats(Float::F32, bounds.rows * inputs, 1.0)?;
        let w = self.floats(Float::F32, outputs * inputs, scale)?;
        let (bias, y) = (self.floats(Float::F32, outputs, 1.0)?, self.room(bounds.rows * outputs * 4)?);
        let (table, x, w, bias, y) =
            (Span::of(&table), Span::of(&x), Span::of(&w), Some(Span::of(&bias)), Span::of(&y));
        let dense = DenseRows { table, x, w, bias, y, inputs, outputs, activation: Activation::Tanh };
        self.driver.launch(&dense.launch(&bounds))?;
        self.get(Float::F32, y.memory)
    }
}

const VOCAB: usize = 60;

/// A random encoder of a model's shape.
fn random_encoder(float: Float, hidden: usize, layers: usize, longest: usize) -> (Form, Parameters<Vec<f32>>) {
    let form = Form {
        hidden,
        heads: hidden / 32,
        intermediate: 4 * hidden,
        activation: Activation::GeluErf,
        pooling: Pool::Mean,
        normalize: true,
        eps: 1e-12,
        float,
        head: Vec::new(),
    };
    let mut random = StdRng::seed_from_u64(hidden as u64);
    let mut floats = |count: usize, near: f32, scale: f32| -> Vec<f32> {
        (0..count).map(|_| near + random.random_range(-scale..scale)).collect()
    };
    let mut dense = |outputs: usize, inputs: usize| Dense {
        weight: floats(outputs * inputs, 0.0, 1.5 / (inputs as f32).sqrt()),
        bias: floats(outputs, 0.0, 0.3),
    };
    let (h, i) = (hidden, form.intermediate);
    let products: Vec<[Dense<Vec<f32>>; 4]> =
        (0..layers).map(|_| [dense(3 * h, h), dense(h, h), dense(i, h), dense(h, i)]).collect();
    let mut norm = || Norm { weight: floats(h, 1.0, 0.5), shift: floats(h, 0.0, 0.5) };
    let layers = (products.into_iter())
        .map(|[qkv, attention_out, inner, out]| {
            let (attention_norm, norm) = (norm(), norm());
            Layer { qkv, attention_out, attention_norm, inner, out, norm }
        })
        .collect();
    let norm = norm();
    let (words, places) = (floats(VOCAB * h, 0.0, 1.0), floats(longest * h, 0.0, 1.0));
    (form, Parameters { words, places, segments: None, norm, layers, head: Vec::new() })
}

/// Random rows within the bounds.
fn fill(batch: &mut HostBatch, random: &mut StdRng, bounds: Bounds, outputs: usize) {
    let mut lens = Vec::new();
    let mut tokens = 0;
    for _ in 0..random.random_range(1..=bounds.rows) {
        let len = random.random_range(1..=bounds.longest);
        if tokens + len > bounds.tokens {
            break;
        }
        lens.push(len as u32);
        tokens += len;
    }
    batch.begin(lens, outputs * 4);
    let ids: Vec<u32> = (0..tokens).map(|_| random.random_range(0..VOCAB as u32)).collect();
    batch.input_mut(0, tokens * 4).copy_from_slice(bytemuck::cast_slice(&ids));
}

fn floats_of(batch: &HostBatch) -> Vec<f32> {
    reference::decode(Float::F32, batch.answers())
}

fn capacity(form: &Form, bounds: Bounds) -> Capacity {
    let inputs = vec![encoder::bucket(bounds.tokens) * 4];
    Capacity { rows: bounds.rows, inputs, outputs: vec![bounds.rows * form.outputs() * 4] }
}

/// What an encoder answers to seeded batches; `captured`: through graphs.
fn answers<D: Driver>(
    driver: &mut D,
    float: Float,
    hidden: usize,
    options: Options,
    captured: bool,
) -> Result<Vec<f32>, Fault> {
    let longest = if options.small { 20 } else { 100 };
    let bounds = Bounds { rows: 6, tokens: 3 * longest, longest };
    let (form, host) = random_encoder(float, hidden, 2, longest);
    let parameters = Arc::new(encoder::put(driver, &form, &host)?);
    let mut encoder = Encoder::new(driver, form.clone(), parameters, bounds)?;
    let capacity = capacity(&form, bounds);
    let mut vacant = Vacant::new(driver, 0, &capacity)?;
    if captured && encoder.capture(driver, vacant.buffers(), bounds.tokens, usize::MAX)? == 0 {
        return Err(Fault::Refused("nothing was captured".into()));
    }
    let mut batch = HostBatch::new(driver, &capacity)?;
    let mut random = StdRng::seed_from_u64(9);
    let mut all = Vec::new();
    for _ in 0..if options.small { 2 } else { 6 } {
        fill(&mut batch, &mut random, bounds, form.outputs());
        let of_batch = batch.bounds();
        let asked = vacant.fill(batch).submit(driver, |driver, buffers| encoder.compute(driver, buffers, of_batch));
        (vacant, batch) = asked.and_then(InFlight::wait).map_err(|failed| failed.fault)?.vacate();
        all.extend(floats_of(&batch));
    }
    Ok(all)
}

fn encoders<D: Driver>(make: &dyn Fn() -> Result<D, Fault>, float: Float, options: Options) -> Result<String, Fault> {
    let hidden = if options.small { 32 } else { 96 };
    let got = answers(&mut make()?, float, hidden, options, false)?;
    let expected = answers(&mut SimDevice::new(1).driver(), float, hidden, options, false)?;
    let (far, allowed) = (distance(&got, &expected), [1e-4, 1e-2, 8e-2][float as usize]);
    match far <= allowed {
        true => Ok(format!("{} values, {far:.1e} from the reference at most ({allowed:.0e} allowed)", got.len())),
        false => Err(Fault::Refused(format!("{far} from the reference ({allowed} allowed)"))),
    }
}

/// The same launches: a graph that differs in one bit has other ones.
fn graphs<D: Driver>(make: &dyn Fn() -> Result<D, Fault>, options: Options) -> Result<String, Fault> {
    let mut values = 0;
    for float in [Float::F32, Float::BF16] {
        let launched = answers(&mut make()?, float, 64, options, false)?;
        let captured = answers(&mut make()?, float, 64, options, true)?;
        // A graph pools over a larger grid, and products are planned alike: the same sums in the same order.
        let far = distance(&launched, &captured);
        if far > 1e-6 {
            return Err(Fault::Refused(format!("{float:?}: {far} apart")));
        }
        values += launched.len();
    }
    Ok(format!("{values} values"))
}

/// Three slots in flight, over and over, and every answer compared with what that batch was answered alone before.
fn slots<D: Driver>(make: &dyn Fn() -> Result<D, Fault>, options: Options) -> Result<String, Fault> {
    const KINDS: usize = 16;
    let mut driver = make()?;
    let bounds = Bounds { rows: 4, tokens: 64, longest: 16 };
    let (form, host) = random_encoder(Float::F32, 32, 1, bounds.longest);
    let parameters = Arc::new(encoder::put(&mut driver, &form, &host)?);
    let encoder = Encoder::new(&driver, form.clone(), parameters, bounds)?;
    let capacity = capacity(&form, bounds);
    let mut vacant: Vec<Vacant<D>> = (0..3).map(|at| Vacant::new(&driver, at, &capacity)).collect::<Result<_, _>>()?;
    let mut memory: Vec<HostBatch> = (0..3).map(|_| HostBatch::new(&driver, &capacity)).collect::<Result<_, _>>()?;
    let mut alone: Vec<Option<Vec<f32>>> = vec![None; KINDS];
    let mut flights = std::collections::VecDeque::new();
    let rounds = if options.small { 30 } else { 100_000 };
    let mut landed = 0;
    for round in 0..rounds + 3 {
        // One after the other until every kind is known.
        let depth = if round < KINDS { 0 } else { 2 };
        while flights.len() > depth || (round >= rounds && !flights.is_empty()) {
            let (kind, flight): (usize, InFlight<D, HostBatch>) = flights.pop_front().expect("just counted");
            let (slot, batch) = flight.wait().map_err(|failed| failed.fault)?.vacate();
            let answers = floats_of(&batch);
            match &alone[kind] {
                Some(known) if *known != answers => {
                    return Err(Fault::Refused(format!(
                        "round {round}: an answer is {} off",
                        distance(known, &answers)
                    )));
                }
                Some(_) => {}
                empty => {
                    debug_assert!(empty.is_none());
                    alone[kind] = Some(answers);
                }
            }
            landed += 1;
            vacant.push(slot);
            memory.push(batch);
        }
        if round >= rounds {
            break;
        }
        let kind = round % KINDS;
        let (slot, mut batch) = (vacant.remove(0), memory.remove(0));
        fill(&mut batch, &mut StdRng::seed_from_u64(kind as u64), bounds, form.outputs());
        let of_batch = batch.bounds();
        let asked = slot.fill(batch).submit(&mut driver, |driver, buffers| encoder.compute(driver, buffers, of_batch));
        flights.push_back((kind, asked.map_err(|failed| failed.fault)?));
    }
    Ok(format!("{landed} batches through 3 slots, each as it was alone"))
}

fn too_much<D: Driver>(make: &dyn Fn() -> Result<D, Fault>) -> Result<String, Fault> {
    let driver = make()?;
    let (_, all) = driver.memory_info()?;
    match driver.allocate(all.saturating_mul(2)) {
        Err(Fault::OutOfMemory { .. }) => {}
        Err(other) => return Err(Fault::Refused(format!("expected to be out of memory, got: {other}"))),
        Ok(_) => return Err(Fault::Refused("twice the device's memory was given".into())),
    }
    driver.allocate(1 << 20)?;
    Ok(format!("{all} bytes in all"))
}

/// Token ids that the contract would have refused: the kernel reads far outside of its table.
fn lost<D: Driver>(make: &dyn Fn() -> Result<D, Fault>) -> Result<String, Fault> {
    let mut driver = make()?;
    let bounds = Bounds { rows: 1, tokens: 16, longest: 16 };
    let (form, host) = random_encoder(Float::F32, 32, 1, bounds.longest);
    let parameters = Arc::new(encoder::put(&mut driver, &form, &host)?);
    let encoder = Encoder::new(&driver, form.clone(), parameters, bounds)?;
    let capacity = capacity(&form, bounds);
    let vacant = Vacant::new(&driver, 0, &capacity)?;
    let mut batch = HostBatch::new(&driver, &capacity)?;
    fill(&mut batch, &mut StdRng::seed_from_u64(1), bounds, form.outputs());
    let of_batch = batch.bounds();
    // Half of the largest number, so that a product of 32 bits with it would be far away as well.
    batch.input_mut(0, of_batch.tokens * 4).fill(0x7f);
    let asked = vacant.fill(batch).submit(&mut driver, |driver, buffers| encoder.compute(driver, buffers, of_batch));
    let told = match asked.and_then(InFlight::wait) {
        Ok(_) => return Err(Fault::Refused("a batch of ids outside of the table was answered".into())),
        Err(failed) => failed.fault,
    };
    let again = driver.event().and_then(|event| driver.record(Queue::Compute, &event).and_then(|()| event.wait()));
    // What it holds cannot be given back to it.
    std::mem::forget((driver, encoder));
    match (&told, again) {
        (Fault::Lost(_), Err(Fault::Lost(_))) => Ok(told.to_string()),
        (told, again) => Err(Fault::Refused(format!("expected a lost device, twice; got {told:?} and {again:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sim::Faults;
    use super::*;

    #[test]
    fn the_simulated_device_passes_beside_itself() {
        let device = SimDevice::new(3);
        device.set_faults(Faults { memory_max: 1 << 30, ..Faults::default() });
        let mut names = Vec::new();
        run(&|| Ok(device.driver()), Options { small: true, lose: false }, &mut |outcome| {
            assert!(outcome.result.is_ok(), "{outcome:?}");
            names.push(outcome.name.clone());
        });
        assert_eq!(names.len(), 3 * (KERNELS.len() + 2) + BYTES.len() + 3, "{names:?}");
        assert_eq!(device.violations(), [""; 0]);
    }

    /// What compares with references must not pass on a device that computes eight bytes wrongly.
    #[test]
    fn a_device_that_is_wrong_does_not_pass() {
        let device = SimDevice::new(3);
        device.set_faults(Faults { memory_max: 1 << 30, spoils: true, ..Faults::default() });
        let mut passed = Vec::new();
        run(&|| Ok(device.driver()), Options { small: true, lose: false }, &mut |outcome| {
            passed.extend(outcome.result.is_ok().then(|| outcome.name.clone()));
        });
        // These compare the device with itself.
        let alike = ["graphs give what launches give", "too much memory is refused, and the device goes on"];
        assert!(passed.iter().all(|name| alike.contains(&&**name) || name.starts_with("slots")), "{passed:?}");
    }
}
