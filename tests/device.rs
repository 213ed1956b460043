//! The encoder of devices on the simulated one: its answers, and what becomes of slots, memory and batches under random order,
//! faults and planted defects. What a real GPU adds is checked by tools/gpu-check.

use std::ops::Range;
use std::sync::Arc;

use ferry::device::sim::{Faults, SimDevice, SimDriver};
use ferry::gpu::driver::{Fault, HostMemory};
use ferry::gpu::encoder::{self, Dense, Encoder, Form, Layer, Norm, Parameters};
use ferry::gpu::launch::Float;
use ferry::gpu::ops::Bounds;
use ferry::gpu::reference::{self, Activation, Pool};
use ferry::gpu::slot::{Capacity, Failed, Held, HostBatch, InFlight, Vacant};
use ferry::kernels::encoder as cpu;
use ferry::kernels::linear::{Packed, Then};
use ferry::kernels::product::Product;
use ferry::kernels::{self, rows};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

const VOCAB: usize = 30;
const LONGEST: usize = 12;
const SEGMENTS: usize = 3;

fn form(heads: usize, float: Float) -> Form {
    Form {
        hidden: heads * 32,
        heads,
        intermediate: 48,
        activation: Activation::GeluErf,
        pooling: Pool::Mean,
        normalize: true,
        eps: 1e-12,
        float,
        head: Vec::new(),
    }
}

fn floats(random: &mut StdRng, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| random.random_range(-scale..scale)).collect()
}

fn parameters(form: &Form, layers: usize, segments: bool, random: &mut StdRng) -> Parameters<Vec<f32>> {
    let (h, i) = (form.hidden, form.intermediate);
    fn dense(random: &mut StdRng, outputs: usize, inputs: usize) -> Dense<Vec<f32>> {
        let scale = 1.5 / (inputs as f32).sqrt();
        Dense { weight: floats(random, outputs * inputs, scale), bias: floats(random, outputs, 0.3) }
    }
    fn norm(random: &mut StdRng, size: usize) -> Norm<Vec<f32>> {
        let weight = floats(random, size, 0.5).into_iter().map(|value| 1.0 + value).collect();
        Norm { weight, shift: floats(random, size, 0.5) }
    }
    let mut head = Vec::new();
    let mut inputs = h;
    for (at, outputs) in form.head.iter().enumerate() {
        let then = if at + 1 == form.head.len() { Activation::None } else { Activation::Tanh };
        head.push((dense(random, *outputs, inputs), then));
        inputs = *outputs;
    }
    Parameters {
        words: floats(random, VOCAB * h, 1.0),
        places: floats(random, LONGEST * h, 1.0),
        segments: segments.then(|| floats(random, SEGMENTS * h, 1.0)),
        norm: norm(random, h),
        layers: (0..layers)
            .map(|_| Layer {
                qkv: dense(random, 3 * h, h),
                attention_out: dense(random, h, h),
                attention_norm: norm(random, h),
                inner: dense(random, i, h),
                out: dense(random, h, i),
                norm: norm(random, h),
            })
            .collect(),
        head,
    }
}

/// The same encoder by the CPU's kernels, which were compared with candle and with transformers.
fn on_cpu(form: &Form, p: &Parameters<Vec<f32>>) -> cpu::Encoder {
    let h = form.hidden;
    let norm = |n: &Norm<Vec<f32>>| rows::Norm { weight: n.weight.clone(), shift: n.shift.clone(), eps: form.eps };
    let packed = |d: &Dense<Vec<f32>>| Packed::new(&d.weight, &d.bias, d.weight.len() / d.bias.len());
    let product = |d: &Dense<Vec<f32>>| Product::F32(packed(d));
    let scale = 1.0 / ((h / form.heads) as f32).sqrt();
    // That encoder has the root of the head's size in the weights of its queries.
    let scaled = |d: &Dense<Vec<f32>>| {
        let mut d = d.clone();
        d.weight[..h * h].iter_mut().chain(&mut d.bias[..h]).for_each(|value| *value *= scale);
        d
    };
    let then = |activation: Activation| match activation {
        Activation::None => Then::Nothing,
        Activation::GeluErf => Then::GeluErf,
        Activation::GeluTanh => Then::GeluTanh,
        Activation::Relu => Then::Relu,
        Activation::Tanh => Then::Tanh,
    };
    cpu::Encoder {
        hidden: h,
        heads: form.heads,
        words: p.words.clone(),
        places: p.places.clone(),
        segments: p.segments.clone().unwrap_or_default(),
        norm: norm(&p.norm),
        layers: (p.layers.iter())
            .map(|l| cpu::Layer {
                qkv: product(&scaled(&l.qkv)),
                attention_out: product(&l.attention_out),
                attention_norm: norm(&l.attention_norm),
                inner: product(&l.inner),
                out: product(&l.out),
                norm: norm(&l.norm),
            })
            .collect(),
        activation: then(form.activation),
        pooling: match form.pooling {
            Pool::Mean => cpu::Pooling::Mean,
            Pool::First => cpu::Pooling::Cls,
            Pool::Max => cpu::Pooling::Max,
        },
        normalize: form.normalize,
        head: p.head.iter().map(|(d, activation)| (packed(d), then(*activation))).collect(),
    }
}

/// Rows end to end.
#[derive(Clone, Debug, Default)]
struct Rows {
    lens: Vec<u32>,
    ids: Vec<u32>,
    segments: Option<Vec<u32>>,
}

impl Rows {
    fn random(random: &mut StdRng, bounds: Bounds, segments: bool) -> Rows {
        let mut rows = Rows::default();
        let count = random.random_range(1..=bounds.rows);
        while rows.lens.len() < count {
            let len = random.random_range(1..=bounds.longest);
            if rows.ids.len() + len > bounds.tokens {
                break;
            }
            rows.lens.push(len as u32);
            rows.ids.extend((0..len).map(|_| random.random_range(0..VOCAB as u32)));
        }
        if segments {
            rows.segments = Some(rows.ids.iter().map(|_| random.random_range(0..SEGMENTS as u32)).collect());
        }
        rows
    }

    fn bounds(&self) -> Bounds {
        Bounds::of(&self.lens)
    }

    fn answers(&self, encoder: &cpu::Encoder) -> Vec<f32> {
        let mut out = vec![0.0; self.lens.len() * encoder.outputs()];
        let batch =
            cpu::Batch { ids: &self.ids, segments: self.segments.as_deref(), lens: &self.lens, padded_len: None };
        encoder.forward(kernels::arch(), &mut cpu::Scratch::default(), batch, &mut out);
        out
    }
}

/// A batch in host memory of the device, with what it was made of.
struct Batch {
    rows: Rows,
    host: HostBatch,
}

impl Held for Batch {
    fn lens(&self) -> &[u32] {
        self.host.lens()
    }

    fn input(&self, index: usize) -> Option<(&dyn HostMemory, Range<usize>)> {
        self.host.input(index)
    }

    fn output(&mut self, index: usize) -> Option<(&mut dyn HostMemory, Range<usize>)> {
        self.host.output(index)
    }
}

impl Batch {
    fn new(driver: &SimDriver, capacity: &Capacity) -> Result<Batch, Fault> {
        Ok(Batch { rows: Rows::default(), host: HostBatch::new(driver, capacity)? })
    }

    fn put(&mut self, rows: Rows, outputs: usize) {
        self.host.begin(rows.lens.iter().copied(), outputs * 4);
        self.host.input_mut(0, rows.ids.len() * 4).copy_from_slice(bytemuck::cast_slice(&rows.ids));
        if let Some(said) = &rows.segments {
            self.host.input_mut(1, said.len() * 4).copy_from_slice(bytemuck::cast_slice(said));
        }
        self.rows = rows;
    }

    fn answers(&self) -> Vec<f32> {
        reference::decode(Float::F32, self.host.answers())
    }
}

fn capacity(form: &Form, bounds: Bounds, inputs: usize) -> Capacity {
    Capacity {
        rows: bounds.rows,
        inputs: vec![encoder::bucket(bounds.tokens) * 4; inputs],
        outputs: vec![bounds.rows * form.outputs() * 4],
    }
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Poison that reached an answer is a NaN or far away; a NaN must not pass as near.
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most, d| if d.is_nan() { f32::INFINITY } else { most.max(d) })
}

const BOUNDS: Bounds = Bounds { rows: 6, tokens: 40, longest: LONGEST };

/// Goal: launches, their order, offsets and sizes are right for every form. Method: random encoders, the CPU's kernels beside them.
#[test]
fn answers_are_those_of_the_cpus_kernels() {
    let mut random = StdRng::seed_from_u64(1);
    for (float, tolerance) in [(Float::F32, 3e-5), (Float::F16, 2e-2), (Float::BF16, 2e-1)] {
        for pooling in [Pool::Mean, Pool::First, Pool::Max] {
            for (head, segments) in [(vec![], false), (vec![], true), (vec![16, 3], true), (vec![1], false)] {
                for activation in [Activation::GeluErf, Activation::GeluTanh, Activation::Relu] {
                    let normalize = head.is_empty() && pooling != Pool::Max;
                    let form = Form { head: head.clone(), pooling, activation, normalize, ..form(2, float) };
                    form.check().expect("the kernels have it");
                    let host = parameters(&form, 2, segments, &mut random);
                    let reference = on_cpu(&form, &host);
                    let mut driver = SimDevice::new(random.random()).driver();
                    let shared = Arc::new(encoder::put(&mut driver, &form, &host).expect("no fault was ordered"));
                    let mut encoder = Encoder::new(&driver, form.clone(), shared, BOUNDS).expect("no fault");
                    let capacity = capacity(&form, BOUNDS, 1 + usize::from(segments));
                    let mut vacant = Vacant::new(&driver, 0, &capacity).expect("no fault");
                    let mut batch = Batch::new(&driver, &capacity).expect("no fault");
                    for round in 0..4 {
                        // The same through captured graphs, whose launches are made for more than the batch has.
                        if round == 2 {
                            let graphs = encoder.capture(&mut driver, vacant.buffers(), 64, usize::MAX);
                            assert_eq!(graphs, Ok(encoder::buckets(BOUNDS.tokens).len()));
                        }
                        let rows = Rows::random(&mut random, BOUNDS, segments);
                        let (expected, bounds) = (rows.answers(&reference), rows.bounds());
                        batch.put(rows, form.outputs());
                        let landed = (vacant.fill(batch))
                            .submit(&mut driver, |driver, buffers| encoder.compute(driver, buffers, bounds))
                            .and_then(InFlight::wait);
                        let complete = landed.map_err(|failed| failed.fault).expect("no fault was ordered");
                        (vacant, batch) = complete.vacate();
                        let far = distance(&batch.answers(), &expected);
                        assert!(far <= tolerance, "{form:?}, {bounds:?}, round {round}: {far} apart");
                    }
                }
            }
        }
    }
}

/// What came of a simulated life.
#[derive(Debug, Default, PartialEq)]
struct Life {
    right: usize,
    wrong: usize,
    failed: usize,
    lost: bool,
    violations: Vec<String>,
    overlap: f64,
}

/// A world of one device, two executors and three slots each: batches come, are waited for in any order, or dropped.
fn live(seed: u64, batches: usize, faults: impl Fn(&mut StdRng) -> Faults) -> Result<Life, Fault> {
    let mut random = StdRng::seed_from_u64(seed);
    let form = form(1, Float::F32);
    let host = parameters(&form, 1, false, &mut random);
    let reference = on_cpu(&form, &host);
    let device = SimDevice::new(random.random());
    let mut life = Life::default();
    let capacity = capacity(&form, BOUNDS, 1);
    {
        let mut drivers = [device.driver(), device.driver()];
        let shared = Arc::new(encoder::put(&mut drivers[0], &form, &host)?);
        let mut encoders = Vec::new();
        let mut vacant = Vec::new();
        for (at, driver) in drivers.iter_mut().enumerate() {
            let mut encoder = Encoder::new(driver, form.clone(), Arc::clone(&shared), BOUNDS)?;
            let slots = (0..3).map(|index| Vacant::new(driver, index, &capacity)).collect::<Result<Vec<_>, _>>()?;
            if random.random_bool(0.5) {
                encoder.capture(driver, slots[at].buffers(), 64, usize::MAX)?;
            }
            encoders.push(encoder);
            vacant.push(slots);
        }
        let mut memory: Vec<Batch> =
            (0..8).map(|_| Batch::new(&drivers[0], &capacity)).collect::<Result<Vec<_>, _>>()?;
        device.set_faults(faults(&mut random));
        let mut flights: Vec<(usize, InFlight<SimDriver, Batch>)> = Vec::new();
        let mut asked = 0;
        let mut slots_gone = 0;
        while asked < batches || !flights.is_empty() {
            let executor = random.random_range(0..2);
            let can_ask = asked < batches && !memory.is_empty() && !vacant[executor].is_empty();
            if can_ask && random.random_bool(0.6) {
                asked += 1;
                let rows = Rows::random(&mut random, BOUNDS, false);
                let bounds = rows.bounds();
                let mut batch = memory.pop().expect("just looked");
                batch.put(rows, form.outputs());
                let slot = vacant[executor].pop().expect("just looked");
                let encoder = &encoders[executor];
                let compute = |driver: &mut SimDriver, buffers: &_| encoder.compute(driver, buffers, bounds);
                match slot.fill(batch).submit(&mut drivers[executor], compute) {
                    Ok(flight) => flights.push((executor, flight)),
                    Err(Failed { fault, held, vacant: slot }) => {
                        life.failed += 1;
                        life.lost |= fault.is_lost();
                        slots_gone += usize::from(slot.is_none());
                        vacant[executor].extend(slot);
                        memory.push(held);
                    }
                }
            } else if let Some(at) = (0..flights.len()).collect::<Vec<_>>().choose(&mut random).copied() {
                let (executor, flight) = flights.swap_remove(at);
                if random.random_bool(0.1) {
                    // Its caller has gone, and everybody with him: the slot waits before it is dropped.
                    drop(flight);
                    slots_gone += 1;
                    life.failed += 1;
                    memory.push(Batch::new(&drivers[0], &capacity).or_else(|fault| match fault.is_lost() {
                        true => Err(fault),
                        false => Batch::new(&drivers[0], &capacity),
                    })?);
                } else {
                    match flight.wait() {
                        Ok(complete) => {
                            let (slot, batch) = complete.vacate();
                            let far = distance(&batch.answers(), &batch.rows.answers(&reference));
                            life.right += usize::from(far <= 3e-5);
                            life.wrong += usize::from(far > 3e-5);
                            vacant[executor].push(slot);
                            memory.push(batch);
                        }
                        Err(Failed { fault, held, vacant: slot }) => {
                            life.failed += 1;
                            life.lost |= fault.is_lost();
                            slots_gone += usize::from(slot.is_none());
                            vacant[executor].extend(slot);
                            memory.push(held);
                        }
                    }
                }
            } else if vacant.iter().all(Vec::is_empty) {
                // All slots went with their callers.
                break;
            }
        }
        assert_eq!(vacant.iter().map(Vec::len).sum::<usize>() + slots_gone, 6, "seed {seed}: a slot is somewhere");
        assert_eq!(life.right + life.wrong + life.failed, asked, "seed {seed}: each batch ends once");
    }
    let (span, busy) = device.times();
    life.overlap = busy as f64 / span.max(1) as f64;
    life.violations = device.violations();
    if !life.lost {
        assert_eq!(device.allocated(), 0, "seed {seed}: device memory is given back");
    }
    Ok(life)
}

/// `SEEDS=100000 cargo test --release --test device` looks further.
fn seeds() -> u64 {
    std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(2000)
}

#[test]
fn random_lives_without_faults_answer_everything_rightly() {
    let mut overlap = 0.0;
    for seed in 0..seeds() {
        let life = live(seed, 12, |_| Faults::default()).expect("no fault was ordered");
        assert_eq!((life.wrong, &life.violations[..]), (0, &[][..]), "seed {seed}");
        assert!(life.right > 0, "seed {seed}: {life:?}");
        overlap += life.overlap;
    }
    // Copies of one slot while another computes, two executors beside each other.
    let overlap = overlap / seeds() as f64;
    assert!(overlap > 1.3, "queues were busy {overlap} times the time that passed");
}

#[test]
fn random_lives_with_failing_calls_lose_no_slot_and_answer_nothing_wrongly() {
    let (mut failed, mut lost) = (0, 0);
    for seed in 0..seeds() {
        let faults = |random: &mut StdRng| {
            let fault = match random.random_range(0..3) {
                0 => Fault::OutOfMemory { bytes: 1 },
                1 => Fault::Refused("on demand".into()),
                _ => Fault::Lost("on demand".into()),
            };
            Faults { call: Some((random.random_range(0..400), fault)), ..Faults::default() }
        };
        match live(seed, 12, faults) {
            Ok(life) => {
                assert_eq!((life.wrong, &life.violations[..]), (0, &[][..]), "seed {seed}");
                failed += life.failed;
                lost += usize::from(life.lost);
            }
            Err(fault) => assert!(fault.is_lost(), "seed {seed}: {fault}"),
        }
    }
    assert!(failed > 0 && lost > 0, "{failed} failed, {lost} lost: the faults were never met");
}

#[test]
fn a_device_that_is_lost_in_the_middle_answers_nothing_afterwards() {
    let mut lost = 0;
    for seed in 0..seeds() {
        let faults = |random: &mut StdRng| Faults { operation: Some(random.random_range(0..300)), ..Faults::default() };
        if let Ok(life) = live(seed, 12, faults) {
            assert_eq!((life.wrong, &life.violations[..]), (0, &[][..]), "seed {seed}");
            lost += usize::from(life.lost);
        } else {
            lost += 1;
        }
    }
    assert!(lost > 0, "the fault was never met");
}

/// A slot that is given back before its event: the host touches memory under a copy, or takes an answer that is not there yet.
#[test]
fn a_slot_that_is_released_early_is_noticed() {
    let noticed = (0..50)
        .filter(|seed| {
            let life = live(*seed, 60, |_| Faults { early_events: true, ..Faults::default() }).expect("no fault");
            life.wrong > 0 || !life.violations.is_empty()
        })
        .count();
    assert_eq!(noticed, 50);
}

/// Without waits between queues, a kernel can run before its input is there. Noticed also where the order happened to be right.
#[test]
fn queues_that_do_not_wait_for_each_other_are_noticed() {
    for seed in 0..50 {
        let life = live(seed, 12, |_| Faults { ignored_waits: true, ..Faults::default() }).expect("no fault");
        assert!(!life.violations.is_empty(), "seed {seed}: {life:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_life() {
    let once = live(7, 12, |_| Faults::default()).expect("no fault");
    assert_eq!(live(7, 12, |_| Faults::default()), Ok(once));
}

#[test]
fn buckets_serve_every_batch_up_to_the_largest_graph() {
    let buckets = encoder::buckets(encoder::GRAPH_TOKENS_MAX);
    for tokens in 1..=encoder::GRAPH_TOKENS_MAX {
        let bucket = encoder::bucket(tokens);
        assert!(bucket >= tokens && bucket < tokens + 128 && buckets.contains(&bucket), "{tokens}: {bucket}");
    }
    assert_eq!(buckets.len(), 42);
}

#[test]
fn a_form_that_the_kernels_do_not_have_is_refused_in_one_sentence() {
    let odd = Form { hidden: 36, heads: 3, ..form(1, Float::F32) };
    let error = odd.check().expect_err("heads of 12");
    assert!(error.contains("expected heads of 32, 64 or 128") && error.contains("3 heads of 36"), "{error}");
}
