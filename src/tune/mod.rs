//! Looks for better settings of one model: which to try, how they compare, and how the answer is shown.
//!
//! Pure: what a setting is predicted to give comes from outside (replay/whatif.rs, in virtual time), and what time it is too.
//!
//! | file | what |
//! | --- | --- |
//! | space.rs | the settings there are: a grid, and the neighbours of a setting |
//! | search.rs | rounds of settings to try, within bounds |
//! | front.rs | the Pareto front, and which of all is chosen |
//! | block.rs | a policy as a manifest's `[batching]` block, and the difference of two |
//! | page.rs | everything as one document, and that as one HTML file |
//!
//! Elsewhere: running it in threads, measuring live, printing (commands/tune).

pub mod block;
pub mod front;
pub mod page;
pub mod search;
pub mod space;

use crate::replay::ledger::Report;
use crate::vocab::ModelHandle;

/// What a setting is predicted to give. Times are queue and run in the server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Predicted {
    /// Requests of the model per second that were answered, and that were answered in time.
    pub throughput_rps: f64,
    pub goodput_rps: f64,
    /// Of those whose time is over, cancelled ones aside.
    pub on_time_share: f64,
    /// Of the answered, in ms. Infinite where nothing was.
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// Executor time of all models ÷ requests of all models that were answered, in µs.
    pub device_us: f64,
    /// Executor time ÷ time of all executors.
    pub utilization: f64,
    pub batches: u64,
    pub batch_rows: f64,
    pub fill: f64,
    pub waste: f64,
    pub refused: u64,
    pub expired: u64,
    /// Executor time that cheaper batches of the same rows would have saved, as a share; and µs a request that these take.
    pub regret: f64,
    pub device_least_us: f64,
    /// Share of the batches whose time is a guess: no recorded or measured one is like them.
    pub guessed: f64,
}

impl Predicted {
    pub fn of(report: &Report, model: ModelHandle) -> Predicted {
        let mine = &report.models[model.index()];
        let seconds = report.span.as_secs_f64().max(1e-9);
        let millis = |share: f64| match mine.answered {
            0 => f64::INFINITY,
            _ => mine.percentile(share).as_secs_f64() * 1e3,
        };
        let answered = report.models.iter().map(|model| model.answered).sum::<u64>() as f64;
        let each = |time: std::time::Duration| match answered > 0.0 {
            true => time.as_secs_f64() * 1e6 / answered,
            false => f64::INFINITY,
        };
        let busy: std::time::Duration = report.busy.iter().sum();
        let batches: u64 = report.models.iter().map(|model| model.batches).sum();
        Predicted {
            throughput_rps: mine.answered as f64 / seconds,
            goodput_rps: mine.on_time as f64 / seconds,
            on_time_share: mine.on_time_share(),
            p50_ms: millis(0.5),
            p99_ms: millis(0.99),
            device_us: each(busy),
            utilization: busy.as_secs_f64() / (seconds * report.busy.len().max(1) as f64),
            batches: mine.batches,
            batch_rows: mine.batch_rows(),
            fill: mine.fill(),
            waste: mine.waste(),
            refused: mine.refused_total(),
            expired: mine.expired,
            regret: report.regret.lost_share(),
            device_least_us: each(busy) * (1.0 - report.regret.lost_share()),
            guessed: report.guessed as f64 / batches.max(1) as f64,
        }
    }

    /// The mean of several replays, whose batch times were drawn with different seeds. None of none.
    pub fn mean(replays: &[Predicted]) -> Option<Predicted> {
        let first = *replays.first()?;
        let share = 1.0 / replays.len() as f64;
        let of = |part: fn(&Predicted) -> f64| share * replays.iter().map(part).sum::<f64>();
        let count = |part: fn(&Predicted) -> u64| {
            (share * replays.iter().map(|replay| part(replay) as f64).sum::<f64>()).round() as u64
        };
        if replays.len() == 1 {
            return Some(first);
        }
        Some(Predicted {
            throughput_rps: of(|p| p.throughput_rps),
            goodput_rps: of(|p| p.goodput_rps),
            on_time_share: of(|p| p.on_time_share),
            p50_ms: of(|p| p.p50_ms),
            p99_ms: of(|p| p.p99_ms),
            device_us: of(|p| p.device_us),
            utilization: of(|p| p.utilization),
            batches: count(|p| p.batches),
            batch_rows: of(|p| p.batch_rows),
            fill: of(|p| p.fill),
            waste: of(|p| p.waste),
            refused: count(|p| p.refused),
            expired: count(|p| p.expired),
            regret: of(|p| p.regret),
            device_least_us: of(|p| p.device_least_us),
            guessed: of(|p| p.guessed),
        })
    }
}
