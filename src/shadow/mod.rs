//! Shadow schedulers: what other settings of a model's policy would have made of the requests that come.
//!
//! One thread takes a stretch of what the scheduler is told, which is the trace that a capture is made of. When the stretch is over,
//! the production scheduler gets it in virtual time (replay/whatif.rs): once as it was recorded, once simulated with nothing
//! set, and once for each setting. All begin from the state that the real one had, with all that it had learned, and batches
//! take what those of the same stretch took. Then the next stretch is taken.
//!
//! A thread of its own, and not the control thread: that one answers health checks, and a stretch is worked on for longer than
//! a supervisor should wait.
//!
//! Always true
//! - The batcher never waits for it. A stretch whose trace found no room is dropped and counted, and the window begins anew.
//! - It works for at most [`CPU_SHARE`] of the time, in slices of [`SLICE`]: where more comes than that is enough for, stretches are
//!   shorter and farther apart, and what share of the time they cover is told.
//! - While nothing is asked it sleeps, and the batcher has no more to do than look whether anybody records.
//! - Held: one stretch of at most [`BYTES_MAX`], and the figures of [`STRETCHES`] stretches for each setting.
//!
//! Elsewhere: the tap (batcher/recorder.rs), HTTP (control/shadow.rs).

mod board;
mod judge;
mod worker;

use std::time::Duration;

pub use board::{Board, Panel, View};
pub use judge::{Judged, Sample, Window};
pub use worker::{Word, Worker};

/// Settings for each model, at most, and in all.
pub const SETTINGS_MAX: usize = 4;
pub const SETTINGS_TOTAL_MAX: usize = 16;
/// Share of a core that the thread may use.
pub const CPU_SHARE: f64 = 0.018;
/// It works for so long before it sleeps: nobody waits longer for the core that it is on.
pub const SLICE: Duration = Duration::from_millis(1);
/// Length of a stretch, unless its trace is full before: requests that have not been answered at its end are in no percentile,
/// so it has to be long beside the time that requests take.
pub const STRETCH: Duration = Duration::from_secs(10);
/// Bytes of a stretch's trace: some 40,000 requests.
pub const BYTES_MAX: usize = 768 << 10;
/// Stretches that figures are taken of.
pub const STRETCHES: usize = 6;

/// A setting: knobs with their values, as `ferry set` takes them.
pub type Knobs = Vec<(String, String)>;
