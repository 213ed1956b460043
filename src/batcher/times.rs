//! Tells the waterfall what the batcher does and hears, and lets others read it.
//!
//! Always true
//! - An executor's books are written once for each thing that happens to it, and for one that rests only when what it waits
//!   for changes. Nothing here is done per request.
//!
//! Elsewhere: what the time is counted as (telemetry/waterfall.rs).

use std::sync::Arc;

use crate::scheduler::{Scheduler, SealedBatch};
use crate::telemetry::Telemetry;
use crate::telemetry::waterfall::{Cells, GROUPS, Waterfall};
use crate::vocab::{Moment, Run};

#[derive(Debug)]
pub struct Times {
    /// `None` before the first turn.
    books: Option<Waterfall>,
    /// By executor.
    groups: Vec<usize>,
    telemetry: Arc<Telemetry>,
}

impl Times {
    pub fn new(scheduler: &Scheduler, telemetry: Arc<Telemetry>) -> Times {
        let groups = scheduler.seats().iter().map(|seat| seat.group as usize).collect();
        Times { books: None, groups, telemetry }
    }

    /// The executors' time begins, if it has not begun before.
    pub fn begin(&mut self, now: Moment) {
        if self.books.is_none() {
            self.books = Some(Waterfall::new(now, self.groups.iter().copied()));
            (0..self.groups.len()).for_each(|executor| self.write(executor, |_| ()));
        }
    }

    /// Changes an executor's books: nothing before what somebody was shown of them.
    fn write<T>(&mut self, executor: usize, change: impl FnOnce(&mut Waterfall) -> T) -> T {
        let books = self.books.as_mut().expect("time begins before anything happens");
        let cell = self.telemetry.executor(executor).times();
        let shown = cell.open();
        books.shown(executor, shown);
        let changed = change(books);
        cell.close(&books.view(executor));
        changed
    }

    /// A burst came whose first request was received then.
    pub fn came(&mut self, group: usize, received_at: Moment) {
        if let Some(books) = &mut self.books {
            books.came(group, received_at);
        }
    }

    /// A batch was sealed. `fixed`: the share of its run that every batch takes.
    pub fn sealed(&mut self, batch: &SealedBatch, cells: Cells, fixed: f64) {
        let executor = usize::from(batch.executor);
        self.write(executor, |books| books.sealed(batch.sealed_at, executor, batch.id, cells, fixed));
    }

    /// A batch came back. Returns what it took of its executor's time, in ns.
    pub fn finished(&mut self, executor: usize, batch: u64, run: &Run) -> u64 {
        self.write(executor, |books| books.finished(executor, batch, run))
    }

    /// A turn is over.
    pub fn turned(&mut self, now: Moment, waits: [bool; GROUPS], wake: Option<Moment>) {
        let Some(books) = &mut self.books else { return };
        books.turning(now, waits);
        for executor in 0..self.groups.len() {
            if self.books.as_ref().is_some_and(|books| books.is_to_rest(executor, now)) {
                self.write(executor, |books| books.rest(executor, now));
            }
        }
        self.books.as_mut().expect("looked at above").turned(wake);
    }
}
