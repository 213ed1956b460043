//! How long batches would take: the cost model fitted to the recorded ones, times how far those were from it.
//!
//! Always true
//! - Equal traces and seeds give equal times.
//! - A shape like recorded ones (same octave of rows and of length) takes a time that one of them took, scaled by the fit. A
//!   shape unlike all of them takes what the fit says, times how far the nearest were from it: that is a guess, and counted.

use std::time::Duration;

use crate::capture::{Done, Header};
use crate::load::Rng;
use crate::scheduler::cost::{Coefficients, CostModel, Work};
use crate::vocab::Moment;

const OCTAVES: usize = 24;
/// Times kept for each octave of rows and of length.
const KEPT: usize = 512;
/// Batches that are looked at, at most.
const BATCHES_MAX: usize = 1 << 20;
/// Hand-overs kept for each group.
const HANDOVERS: usize = 4096;

/// A batch of the trace, as far as its time is concerned.
#[derive(Clone, Copy, Debug)]
struct Sample {
    model: u16,
    work: Work,
    nanos: u64,
    /// Its fixed part was not hidden behind another batch's run on the same device.
    alone: bool,
}

/// Collects what batches took.
#[derive(Debug)]
pub struct Observer {
    samples: Vec<Sample>,
    /// By executor: its device, where others share it.
    shared: Vec<Option<usize>>,
    last_finish: Vec<Moment>,
    /// By group: how long after its seal and service a batch was heard of, in ns.
    handovers: [Reservoir<u64>; 2],
}

impl Observer {
    pub fn new(header: &Header, seed: u64) -> Observer {
        Observer {
            samples: Vec::new(),
            shared: shared_devices(header),
            last_finish: vec![
                Moment::ZERO;
                header.seats.iter().map(|seat| usize::from(seat.device) + 1).max().unwrap_or(0)
            ],
            handovers: [Reservoir::new(HANDOVERS, seed), Reservoir::new(HANDOVERS, seed + 1)],
        }
    }

    pub fn finished(&mut self, at: Moment, done: &Done) {
        if self.samples.len() >= BATCHES_MAX {
            return;
        }
        let (mut took, mut alone) = (done.service, true);
        if let Some(device) = self.shared.get(usize::from(done.executor)).copied().flatten() {
            // What the batch before left of the device is not this one's.
            let last = std::mem::replace(&mut self.last_finish[device], at);
            if at.since(last) < took {
                (took, alone) = (at.since(last), false);
            }
        }
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let sample = Sample { model: done.model.0, work: done.work(), nanos, alone };
        self.samples.push(sample);
    }

    pub fn handed_over(&mut self, group: usize, late: Duration) {
        self.handovers[group].add(u64::try_from(late.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn fit(self, header: &Header, seed: u64) -> Services {
        let models = header.models.iter().enumerate().map(|(index, model)| {
            let [batch, cell, square] = model.cost;
            let learned = Coefficients { batch, cell, square };
            let usable = model.observations > 0 && model.cost.iter().all(|part| part.is_finite() && *part >= 0.0);
            let prior = if usable { learned } else { Coefficients::PRIOR };
            let mut cost = CostModel::new(prior);
            let mine = || self.samples.iter().filter(|sample| usize::from(sample.model) == index);
            for sample in mine() {
                cost.observe_work(sample.work, Duration::from_nanos(sample.nanos), sample.alone);
            }
            let fit = cost.coefficients();
            let mut ratios: Vec<Reservoir<f64>> =
                (0..OCTAVES * OCTAVES).map(|octave| Reservoir::new(KEPT, seed + octave as u64)).collect();
            for sample in mine().filter(|sample| sample.alone) {
                let expected = fit.work_time(sample.work).max(1.0);
                ratios[octave(sample.work)].add(sample.nanos as f64 / expected);
            }
            ModelServices { fit, ratios: ratios.into_iter().map(|ratios| ratios.kept).collect() }
        });
        Services { models: models.collect(), handovers: self.handovers.map(|handovers| handovers.kept) }
    }
}

/// By executor: its device, where others of the trace share it.
pub fn shared_devices(header: &Header) -> Vec<Option<usize>> {
    use crate::scheduler::Group;
    let on = |device: u16| {
        header.seats.iter().filter(|seat| seat.group == Group::Executors && seat.device == device).count()
    };
    header
        .seats
        .iter()
        .map(|seat| (seat.group == Group::Executors && on(seat.device) > 1).then_some(usize::from(seat.device)))
        .collect()
}

#[derive(Debug)]
struct ModelServices {
    fit: Coefficients,
    /// By octave: observed ÷ fitted.
    ratios: Vec<Vec<f64>>,
}

/// A batch's time, in ns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The part that a shared device hides behind another batch's run.
    pub fixed: f64,
    pub rows: f64,
    /// No recorded batch is like it.
    pub guessed: bool,
}

/// Times of batches, to be drawn from.
#[derive(Debug)]
pub struct Services {
    models: Vec<ModelServices>,
    handovers: [Vec<u64>; 2],
}

impl Services {
    pub fn fit(&self, model: usize) -> Coefficients {
        self.models[model].fit
    }

    pub fn draw(&self, rng: &mut Rng, model: usize, work: Work) -> Drawn {
        let services = &self.models[model];
        let own = &services.ratios[octave(work)];
        let guessed = own.is_empty();
        let known = if guessed { services.nearest(work) } else { Some(own) };
        let ratio = known.map_or(1.0, |ratios| ratios[pick(rng, ratios.len())]);
        let fit = services.fit;
        Drawn { fixed: fit.batch * ratio, rows: (fit.work_time(work) - fit.batch) * ratio, guessed }
    }

    /// How long after its seal and service a batch is heard of.
    pub fn handover(&self, rng: &mut Rng, group: usize) -> Duration {
        let known = &self.handovers[group];
        match known.is_empty() {
            true => Duration::ZERO,
            false => Duration::from_nanos(known[pick(rng, known.len())]),
        }
    }
}

impl ModelServices {
    /// The times of the nearest octave that has any.
    fn nearest(&self, work: Work) -> Option<&Vec<f64>> {
        let at = octave(work);
        let far = |other: usize| (at / OCTAVES).abs_diff(other / OCTAVES) + (at % OCTAVES).abs_diff(other % OCTAVES);
        let known = self.ratios.iter().enumerate().filter(|(_, ratios)| !ratios.is_empty());
        known.min_by_key(|(other, _)| far(*other)).map(|(_, ratios)| ratios)
    }
}

fn octave(work: Work) -> usize {
    let of = |n: u32| (n.max(1).ilog2() as usize).min(OCTAVES - 1);
    of(work.rows) * OCTAVES + of(work.mean_len())
}

fn pick(rng: &mut Rng, count: usize) -> usize {
    rng.between(0, count as i128 - 1) as usize
}

/// So many of all that came, each with the same chance.
#[derive(Debug)]
struct Reservoir<T> {
    kept: Vec<T>,
    size: usize,
    came: u64,
    rng: Rng,
}

impl<T> Reservoir<T> {
    fn new(size: usize, seed: u64) -> Reservoir<T> {
        Reservoir { kept: Vec::new(), size, came: 0, rng: Rng::new(seed, 32) }
    }

    fn add(&mut self, value: T) {
        self.came += 1;
        if self.kept.len() < self.size {
            self.kept.push(value);
        } else {
            let at = self.rng.between(0, i128::from(self.came) - 1) as usize;
            if at < self.size {
                self.kept[at] = value;
            }
        }
    }
}
