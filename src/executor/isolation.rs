//! Runs the members of a failed batch again, in parts, so that it costs the one that made it fail and nobody else.
//!
//! Always true
//! - A part is members of the batch that lie together, as they lay in it: padded to the same length, or end to end.
//! - Answers end where those of the whole batch would. The places of those that have none hold zeros.
//! - An executor that cannot run anything stops it: nobody is blamed for that.
//!
//! Elsewhere: who runs next (bisect.rs).

use std::ops::Range;

use super::batch::{AlignedBytes, BatchOutput, BatchView, RowError};
use super::bisect::{Bisection, Failing, Step};
use super::{Blame, Failure};
use crate::mail::{Blamed, Member};
use crate::vocab::{Code, Layout, ModelHandle};

/// What came of a failed batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Isolated {
    /// Some run ended with a panic, that of the whole batch included.
    pub panicked: bool,
    /// Rows of members that ran again and have their answers.
    pub saved: u32,
    /// Rows of members that failed alone.
    pub culprits: u32,
    /// Rows of members that nobody ran alone.
    pub given_up: u32,
    /// Runs, that of the whole batch not counted.
    pub runs: u32,
    /// Culprits that did not fail for want of memory.
    pub blamed: Vec<Blamed>,
}

/// What an executor needs to do it: buffers that are used again.
#[derive(Debug, Default)]
pub struct Isolation {
    bisection: Bisection,
    inputs: Vec<AlignedBytes>,
    output: BatchOutput,
}

impl Isolation {
    /// Finds whose fault it was that `batch` failed so. Whoever it was not has its answer in `out` afterwards; the others' rows are
    /// among its errors. `Err` where there is nothing to find: one member alone, or a failure that is nobody's.
    ///
    /// `run` runs members, and `in_time` says whether there is time for that.
    pub fn isolate(
        &mut self,
        (model, batch): (ModelHandle, BatchView<'_>),
        members: &[Member],
        failure: Failure,
        out: &mut BatchOutput,
        mut run: impl FnMut(ModelHandle, BatchView<'_>, &mut BatchOutput) -> Result<(), Failure>,
        in_time: impl Fn() -> bool,
    ) -> Result<Isolated, Failure> {
        if members.len() < 2 || failure.blame == Blame::Executor {
            return Err(failure);
        }
        out.prepare(batch.contract, batch.layout, batch.lens, batch.padded_len);
        // They hold another batch: whoever gets no answer here must not get one of those.
        out.outputs.iter_mut().for_each(|output| output.bytes_mut().fill(0));
        let mut isolated = Isolated { panicked: failure.panicked, ..Isolated::default() };
        let work = |member: &Member| match batch.layout {
            Layout::Padded => u64::from(member.rows) * u64::from(batch.padded_len),
            Layout::Packed => u64::from(member.rows) * u64::from(member.len),
        };
        self.bisection.start(failing(&failure), members.iter().map(work));
        let rows_of = |members: &[Member]| {
            let (first, last) = (members[0], members[members.len() - 1]);
            first.first_row..last.first_row + last.rows
        };
        let mut stopped = None;
        while in_time()
            && let Some(part) = self.bisection.poll_next()
        {
            let rows = rows_of(&members[part.clone()]);
            let result = self.run_rows(model, batch, rows.clone(), &mut run);
            isolated.runs += 1;
            if let Err(failure) = &result {
                isolated.panicked |= failure.panicked;
                if failure.blame == Blame::Executor {
                    stopped = Some((part, failure.clone()));
                    break;
                }
            }
            match self.bisection.report(result.as_ref().copied().map_err(failing)) {
                Step::Saved(_) => {
                    isolated.saved += rows.len() as u32;
                    out.take_rows(batch.contract, rows, &mut self.output);
                }
                Step::Halved => {}
                Step::Culprit(_) => {
                    isolated.culprits += rows.len() as u32;
                    let failure = result.expect_err("it failed");
                    blame(out, rows.clone(), failure.refusal.code, &failure.refusal.message);
                    if failing(&failure) == Failing::Model {
                        isolated.blamed.push(Blamed { rows, times: 2 });
                    }
                }
            }
        }
        let (stopped, failure) = stopped.unzip();
        let (code, message) = match &failure {
            Some(failure) => (failure.refusal.code, failure.refusal.message.as_str()),
            None => {
                (Code::ExecutorFailed, "the batch failed, and too much of it failed again to run every request alone")
            }
        };
        for part in self.bisection.given_up().chain(stopped) {
            let rows = rows_of(&members[part]);
            isolated.given_up += rows.len() as u32;
            blame(out, rows, code, message);
        }
        Ok(isolated)
    }

    /// Runs some rows of the batch by themselves; their answers are in `self.output` then.
    fn run_rows(
        &mut self,
        model: ModelHandle,
        batch: BatchView<'_>,
        rows: Range<u32>,
        run: impl FnOnce(ModelHandle, BatchView<'_>, &mut BatchOutput) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let count = batch.contract.inputs.len();
        // Kept for a model with more inputs, when this one has fewer.
        if self.inputs.len() < count {
            self.inputs.resize_with(count, AlignedBytes::default);
        }
        for (index, input) in self.inputs[..count].iter_mut().enumerate() {
            let bytes = &batch.inputs[index].bytes()[batch.places(index, rows.clone())];
            input.set_len(bytes.len());
            input.bytes_mut().copy_from_slice(bytes);
        }
        let lens = &batch.lens[rows.start as usize..rows.end as usize];
        let padded_len = match batch.layout {
            Layout::Padded => batch.padded_len,
            Layout::Packed => *lens.iter().max().expect("members have rows"),
        };
        self.output.prepare(batch.contract, batch.layout, lens, padded_len);
        let (rows, inputs) = (rows.len() as u32, &self.inputs[..count]);
        let view = BatchView { rows, padded_len, lens, inputs, ..batch };
        run(model, view, &mut self.output)
    }
}

/// A batch that failed as a whole, if one member was all of it and may be to blame.
pub fn blamed_alone(members: &[Member], failure: &Failure) -> Option<Blamed> {
    match members {
        [member] if failure.blame == Blame::Member && failing(failure) == Failing::Model => {
            Some(Blamed { rows: 0..member.rows, times: 1 })
        }
        _ => None,
    }
}

fn failing(failure: &Failure) -> Failing {
    match failure.refusal.code {
        Code::OutOfMemory => Failing::Memory,
        _ => Failing::Model,
    }
}

fn blame(out: &mut BatchOutput, rows: Range<u32>, code: Code, message: &str) {
    out.row_errors.extend(rows.map(|row| RowError { row, code, message: message.to_owned() }));
}
