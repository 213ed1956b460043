//! How long batches would take: what the cost model, fitted to the recorded ones, says of their shape, at the pace that the
//! machine had about then.
//!
//! The pace is that of the recorded batches, one behind the other: time taken ÷ time expected. A machine is slow for a while,
//! not for a batch, and queues grow in such a while: drawn from anywhere in the trace, slow batches would come one by one,
//! and the predicted p99 would be too low. A batch of a long expected time goes on at the pace of as many recorded ones as it
//! lasts, because what holds up a short one for long is little of a long one.
//!
//! Always true
//! - Equal traces and seeds give equal times.
//! - A shape like recorded ones (same octave of rows and of length) is expected to take what those took, scaled by the fit. A
//!   shape unlike all of them is expected to take what the fit says, as far off as the nearest: that is a guess, and counted.

use std::time::Duration;

use crate::capture::{Done, Header};
use crate::load::Rng;
use crate::scheduler::cost::{Coefficients, CostModel, Work};
use crate::vocab::Moment;

const OCTAVES: usize = 24;
/// Batches that an octave's correction takes from the fit: one slow batch is not yet a slow shape.
const DOUBT: f64 = 4.0;
/// A batch goes at the pace of one of so many that began next. Not of the one that ran then: at any moment, that is more
/// likely a slow one.
const NEXT: i128 = 4;
/// Batches that are looked at, at most.
const BATCHES_MAX: usize = 1 << 20;
/// Hand-overs kept for each group.
const HANDOVERS: usize = 4096;

/// A batch of the trace, as far as its time is concerned.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// It began.
    at: Moment,
    model: u16,
    executor: u16,
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
        if done.service.is_zero() {
            // It failed: what it took is no batch's time.
            if let Some(device) = self.shared.get(usize::from(done.executor)).copied().flatten() {
                self.last_finish[device] = at;
            }
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
        let sample = Sample {
            at: Moment(at.nanos().saturating_sub(nanos)),
            model: done.model.0,
            executor: done.executor,
            work: done.work(),
            nanos,
            alone,
        };
        self.samples.push(sample);
    }

    pub fn handed_over(&mut self, group: usize, late: Duration) {
        self.handovers[group].add(u64::try_from(late.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn fit(self, header: &Header) -> Services {
        let models = header.models.iter().enumerate().map(|(index, model)| {
            let [batch, cell, square] = model.cost;
            let learned = Coefficients { batch, cell, square };
            let usable = model.observations > 0 && model.cost.iter().all(|part| part.is_finite() && *part >= 0.0);
            let prior = if usable { learned } else { Coefficients::PRIOR };
            let mut cost = CostModel::new(prior);
            cost.set_executors(header.seats.len());
            let mine = || self.samples.iter().filter(|sample| usize::from(sample.model) == index);
            for sample in mine() {
                let (executor, took) = (usize::from(sample.executor), Duration::from_nanos(sample.nanos));
                cost.observe_on(executor, sample.work, took, sample.alone);
            }
            let fit = cost.coefficients();
            let executors: Vec<f64> = (0..header.seats.len()).map(|at| cost.paces().factor(at)).collect();
            let factor = |sample: &Sample| executors.get(usize::from(sample.executor)).copied().unwrap_or(1.0);
            let mut sums = vec![(0.0, 0u64); OCTAVES * OCTAVES];
            for sample in mine().filter(|sample| sample.alone) {
                let (sum, count) = &mut sums[octave(sample.work)];
                *sum += sample.nanos as f64 / factor(sample) / fit.work_time(sample.work).max(1.0);
                *count += 1;
            }
            let corrections = corrections(sums);
            let mut services = ModelServices { fit, corrections, executors: executors.clone(), paces: Vec::new() };
            let paces = mine().filter(|sample| sample.alone).map(|sample| Pace {
                at: sample.at,
                took: sample.nanos as f64,
                expected: services.expected(sample.work).0 * factor(sample),
            });
            services.paces = paces.collect();
            services.paces.sort_by_key(|pace| pace.at);
            services
        });
        Services { models: models.collect(), handovers: self.handovers.map(|handovers| handovers.kept) }
    }
}

/// A batch that was measured by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    pub work: Work,
    pub took: Duration,
}

/// Paces of a described load, at most.
const PACES_MAX: usize = 1 << 16;

impl Services {
    /// Times of one model, learned from batches that were measured one behind the other. From `begin` on for `span` batches go at
    /// the paces that these had, again and again in their order, each off by `error` more: the mean relative error where the
    /// measured times are themselves predictions.
    pub fn measured(measured: &[Measured], error: f64, begin: Moment, span: Duration, seed: u64) -> Services {
        let mut cost = CostModel::default();
        measured.iter().for_each(|batch| cost.observe_on(0, batch.work, batch.took, true));
        let fit = cost.coefficients();
        let mut sums = vec![(0.0, 0u64); OCTAVES * OCTAVES];
        for batch in measured {
            let (sum, count) = &mut sums[octave(batch.work)];
            *sum += batch.took.as_nanos() as f64 / fit.work_time(batch.work).max(1.0);
            *count += 1;
        }
        // Executors are not told apart in a measurement.
        let mut services =
            ModelServices { fit, corrections: corrections(sums), executors: Vec::new(), paces: Vec::new() };
        let batches = measured.iter().map(|batch| (batch.took.as_nanos() as f64, services.expected(batch.work).0));
        let batches: Vec<(f64, f64)> = batches.collect();
        let mut rng = Rng::new(seed, 33);
        let (mut at, step_min) = (0.0, span.as_nanos() as f64 / PACES_MAX as f64);
        let mut paces = Vec::new();
        for (took, expected) in batches.iter().cycle() {
            if at > span.as_nanos() as f64 || paces.len() == PACES_MAX {
                break;
            }
            // Of a normal deviation the mean absolute value is √(2/π).
            let off = 1.0 + error * (std::f64::consts::PI / 2.0).sqrt() * rng.normal();
            let took = took * off.clamp(0.2, 5.0);
            paces.push(Pace { at: begin + Duration::from_nanos(at as u64), took, expected: *expected });
            at += took.max(step_min).max(1.0);
        }
        services.paces = paces;
        Services { models: vec![services], handovers: [Vec::new(), Vec::new()] }
    }
}

/// By octave: observed ÷ fitted, of the sums of that and how many there were.
fn corrections(sums: Vec<(f64, u64)>) -> Vec<Option<f64>> {
    let corrected = |(sum, count): (f64, u64)| (count > 0).then(|| (sum + DOUBT) / (count as f64 + DOUBT));
    sums.into_iter().map(corrected).collect()
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

/// A recorded batch: when it began, and its time in ns.
#[derive(Clone, Copy, Debug)]
struct Pace {
    at: Moment,
    took: f64,
    expected: f64,
}

#[derive(Debug)]
struct ModelServices {
    fit: Coefficients,
    /// By octave: observed ÷ fitted, where any was observed.
    corrections: Vec<Option<f64>>,
    /// By executor: its time beside the mean of all.
    executors: Vec<f64>,
    /// In the order of their moments.
    paces: Vec<Pace>,
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

    /// For a batch that is sealed at `now` for this executor.
    pub fn draw(&self, rng: &mut Rng, now: Moment, model: usize, executor: usize, work: Work) -> Drawn {
        let services = &self.models[model];
        let (expected, guessed) = services.expected(work);
        let expected = expected * services.executors.get(executor).copied().unwrap_or(1.0);
        let fit = services.fit;
        let ratio = expected / fit.work_time(work).max(1.0) * services.pace(rng, now, expected);
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
    /// ns of such a batch at the trace's usual pace, and whether that is a guess.
    fn expected(&self, work: Work) -> (f64, bool) {
        let at = octave(work);
        let fitted = self.fit.work_time(work).max(1.0);
        if let Some(own) = self.corrections[at] {
            return (fitted * own, false);
        }
        let far = |other: usize| (at / OCTAVES).abs_diff(other / OCTAVES) + (at % OCTAVES).abs_diff(other % OCTAVES);
        let known = self.corrections.iter().enumerate().filter_map(|(other, factor)| Some((far(other), (*factor)?)));
        (fitted * known.min_by_key(|(far, _)| *far).map_or(1.0, |(_, factor)| factor), true)
    }

    /// Time taken ÷ time expected, about `now`, over `expected` ns of batches.
    fn pace(&self, rng: &mut Rng, now: Moment, expected: f64) -> f64 {
        let Some(last) = self.paces.len().checked_sub(1) else { return 1.0 };
        let next = self.paces.partition_point(|pace| pace.at < now);
        let first = (next + rng.between(0, NEXT - 1) as usize).min(last);
        let (mut took, mut done) = (0.0, 0.0);
        for pace in &self.paces[first..] {
            let part = ((expected - done) / pace.expected).min(1.0);
            took += part * pace.took;
            done += part * pace.expected;
            if part < 1.0 {
                break;
            }
        }
        took / done
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

#[cfg(test)]
mod tests {
    use super::*;

    fn services(paces: Vec<Pace>) -> Services {
        let fit = Coefficients { batch: 100.0, cell: 10.0, square: 0.0 };
        let mut corrections = vec![None; OCTAVES * OCTAVES];
        corrections[octave(Work::padded(4, 8))] = Some(2.0);
        Services {
            models: vec![ModelServices { fit, corrections, executors: vec![1.0, 3.0], paces }],
            handovers: [Vec::new(), Vec::new()],
        }
    }

    #[test]
    fn a_slow_while_of_the_trace_is_slow_in_the_replay_and_the_rest_is_not() {
        let slow = |at: u64| if (100..200).contains(&at) { 3.0 } else { 1.0 };
        let paces = (0..300).map(|at| Pace { at: Moment(at), took: 840.0 * slow(at), expected: 840.0 });
        let services = services(paces.collect());
        let mut rng = Rng::new(1, 1);
        for (now, pace) in [(20, 1.0), (150, 3.0), (280, 1.0), (9999, 1.0)] {
            let drawn = services.draw(&mut rng, Moment(now), 0, 0, Work::padded(4, 8));
            assert_eq!(drawn, Drawn { fixed: 200.0 * pace, rows: 640.0 * pace, guessed: false });
            // A shape that never ran: as far off the fit as those that did.
            let drawn = services.draw(&mut rng, Moment(now), 0, 0, Work::padded(1, 8));
            assert_eq!(drawn, Drawn { fixed: 200.0 * pace, rows: 160.0 * pace, guessed: true });
        }
    }

    #[test]
    fn what_holds_up_a_short_batch_is_little_of_a_long_one() {
        // Every tenth short batch takes ten times as long.
        let pace =
            |at: u64| Pace { at: Moment(at), took: if at.is_multiple_of(10) { 50.0 } else { 5.0 }, expected: 5.0 };
        let services = services((0..1000).map(pace).collect());
        let mut rng = Rng::new(1, 1);
        let drawn = services.draw(&mut rng, Moment(300), 0, 0, Work::padded(7, 12));
        let ratio = (drawn.fixed + drawn.rows) / (2.0 * (100.0 + 7.0 * 120.0));
        assert!((1.8..2.0).contains(&ratio), "{ratio}");
    }

    #[test]
    fn without_a_recorded_batch_the_fit_is_all_there_is() {
        let drawn = services(Vec::new()).draw(&mut Rng::new(1, 1), Moment(5), 0, 0, Work::padded(4, 8));
        assert_eq!(drawn, Drawn { fixed: 200.0, rows: 640.0, guessed: false });
    }

    #[test]
    fn a_slow_executor_is_slow_in_the_replay() {
        let drawn = services(Vec::new()).draw(&mut Rng::new(1, 1), Moment(5), 0, 1, Work::padded(4, 8));
        assert_eq!(drawn, Drawn { fixed: 600.0, rows: 1920.0, guessed: false });
    }

    #[test]
    fn measured_batches_are_expected_to_take_what_they_took_at_the_paces_they_had() {
        let took = |rows: u32, len: u32| 1_000_000.0 + 10_000.0 * f64::from(rows * len);
        let shapes = [(1, 8), (1, 64), (4, 16), (8, 64), (16, 32)];
        let at_pace = |pace: f64| {
            let of = |(rows, len): (u32, u32)| Measured {
                work: Work::padded(rows, len),
                took: Duration::from_nanos((pace * took(rows, len)) as u64),
            };
            shapes.map(of)
        };
        let measured: Vec<Measured> = (0..40).flat_map(|_| at_pace(1.0)).collect();
        let (begin, span) = (Moment(5_000_000), Duration::from_secs(10));
        let services = Services::measured(&measured, 0.0, begin, span, 1);
        let mut rng = Rng::new(1, 1);
        for (rows, len) in shapes {
            let drawn = services.draw(&mut rng, Moment(6_000_000_000), 0, 0, Work::padded(rows, len));
            let off = (drawn.fixed + drawn.rows) / took(rows, len) - 1.0;
            assert!(off.abs() < 0.05 && !drawn.guessed, "{rows}×{len}: {off}");
        }
        // The machine was three times as slow for every second turn of the measurement: so it is again and again.
        let measured: Vec<Measured> = (0..40).flat_map(|turn| at_pace(if turn % 2 == 0 { 1.0 } else { 3.0 })).collect();
        let services = Services::measured(&measured, 0.0, begin, span, 1);
        let drawn = |at: u64| services.draw(&mut Rng::new(1, at), Moment(at * 10_000_000), 0, 0, Work::padded(1, 8));
        let times: Vec<f64> = (1..900).map(|at| drawn(at).fixed + drawn(at).rows).collect();
        let (least, most) = times.iter().fold((f64::MAX, 0.0f64), |(least, most), t| (least.min(*t), most.max(*t)));
        assert!(most > 2.0 * least, "{least} to {most}");
        assert_eq!(times, (1..900).map(|at| drawn(at).fixed + drawn(at).rows).collect::<Vec<_>>());
    }

    #[test]
    fn predictions_that_stand_for_measurements_get_their_error_back() {
        let measured = [Measured { work: Work::padded(4, 8), took: Duration::from_millis(1) }];
        let spread = |error: f64| {
            let services = Services::measured(&measured, error, Moment(0), Duration::from_secs(3), 1);
            let paces = &services.models[0].paces;
            assert!(paces.len() <= PACES_MAX && paces.is_sorted_by_key(|pace| pace.at));
            let ratios: Vec<f64> = paces.iter().map(|pace| pace.took / pace.expected).collect();
            let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
            ratios.iter().map(|ratio| (ratio / mean - 1.0).abs()).sum::<f64>() / ratios.len() as f64
        };
        assert!(spread(0.0) < 1e-9);
        assert!((spread(0.2) / 0.2 - 1.0).abs() < 0.1, "{}", spread(0.2));
    }
}
