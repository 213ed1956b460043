//! One executor's books, written by the batcher and read by whoever asks, without a lock.
//!
//! Always true
//! - What is read is whole: its parts add up to its time.
//! - No part that was read is ever read smaller. A reader goes on counting what the executor was doing when it was last written
//!   about, and says so; the writer looks at that, and changes nothing before it. Either the reader sees that something is
//!   being written and reads again, or the writer sees what was read: both say first what they do, and look then.
//! - One thread writes. It waits for nobody.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU64, fence};

use super::waterfall::{PARTS, Part, Parts, View};
use crate::vocab::Moment;

/// On cache lines of its own: the executor counts beside it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct TimeCell {
    /// Odd while it is being written.
    version: AtomicU64,
    /// Until when readers went on counting.
    shown: AtomicU64,
    begin: AtomicU64,
    until: AtomicU64,
    /// Number of the part that goes on, plus one; 0: none.
    state: AtomicU64,
    parts: [AtomicU64; PARTS.len()],
}

/// Looks before a reader gives up its core to whoever writes.
const LOOKS: u32 = 200;

impl TimeCell {
    /// Begins to write: returns until when somebody was shown what goes on. [`TimeCell::close`] must follow soon.
    pub fn open(&self) -> Moment {
        let version = self.version.load(Relaxed);
        self.version.store(version + 1, SeqCst);
        fence(Release);
        Moment(self.shown.load(SeqCst))
    }

    pub fn close(&self, view: &View) {
        self.begin.store(view.begin.nanos(), Relaxed);
        self.until.store(view.until.nanos(), Relaxed);
        self.state.store(view.state.map_or(0, |part| part as u64 + 1), Relaxed);
        for (place, nanos) in self.parts.iter().zip(view.parts.0) {
            place.store(nanos, Relaxed);
        }
        let version = self.version.load(Relaxed);
        self.version.store(version + 1, Release);
    }

    /// The books up to `now`, or to where the running batch began.
    pub fn read(&self, now: Moment) -> View {
        let mut looks = 0;
        loop {
            looks += 1;
            if looks % LOOKS == 0 {
                std::thread::yield_now();
            }
            let version = self.version.load(Acquire);
            if version % 2 == 1 {
                std::hint::spin_loop();
                continue;
            }
            let view = View {
                begin: Moment(self.begin.load(Relaxed)),
                until: Moment(self.until.load(Relaxed)),
                state: (self.state.load(Relaxed) as usize).checked_sub(1).map(|part| Part::ALL[part]),
                parts: Parts(std::array::from_fn(|part| self.parts[part].load(Relaxed))),
            };
            fence(Acquire);
            if view.state.is_none() {
                if self.version.load(Relaxed) == version {
                    return view;
                }
                continue;
            }
            let before = self.shown.fetch_max(now.nanos(), SeqCst);
            if self.version.load(SeqCst) == version {
                return view.extended(now.max(Moment(before)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::waterfall::{Cells, Waterfall};
    use crate::vocab::Run;

    #[test]
    fn an_idle_executors_time_goes_on_while_nobody_writes() {
        let cell = TimeCell::default();
        let mut books = Waterfall::new(Moment(100), [0]);
        books.turn(Moment(150), [true, false], None);
        cell.open();
        cell.close(&books.view(0));
        let seen = cell.read(Moment(1_000));
        assert_eq!((seen.parts.get(Part::IdleHold), seen.elapsed(), seen.parts.total()), (850, 900, 900));
        // What was shown stays so, also when it turns out that the batch had been sealed before.
        let shown = cell.open();
        assert_eq!(shown, Moment(1_000));
        books.shown(0, shown);
        books.sealed(Moment(900), 0, 1, Cells { real: 1, ..Cells::default() }, 0.0);
        cell.close(&books.view(0));
        assert_eq!(cell.read(Moment(5_000)), seen.extended(Moment(1_000)).without_state(), "a batch runs");
    }

    impl View {
        fn without_state(self) -> View {
            View { state: None, ..self }
        }
    }

    #[test]
    fn readers_see_whole_books_and_no_part_shrinks() {
        let cell = TimeCell::default();
        let clock = AtomicU64::new(1);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = Parts::default();
                    while !done.load(Relaxed) {
                        let view = cell.read(Moment(clock.fetch_add(1, Relaxed)));
                        assert_eq!(view.elapsed(), view.parts.total());
                        assert!(
                            last.0.iter().zip(view.parts.0).all(|(before, now)| *before <= now),
                            "{last:?} {view:?}"
                        );
                        last = view.parts;
                    }
                });
            }
            let mut books = Waterfall::new(Moment(0), [0]);
            let now = || Moment(clock.fetch_add(1, Relaxed));
            let write = |books: &mut Waterfall, change: &mut dyn FnMut(&mut Waterfall)| {
                let shown = cell.open();
                books.shown(0, shown);
                change(books);
                cell.close(&books.view(0));
            };
            for batch in 0..20_000u64 {
                let came = now();
                let sealed = now();
                books.came(0, came);
                write(&mut books, &mut |books| {
                    books.sealed(sealed, 0, batch, Cells { real: 3, longest_row: 1, bucket: 1 }, 0.1);
                });
                let (began, ended) = (now(), now());
                let run = Run { began_at: began, ended_at: ended, computed_in: ended.since(began), ..Run::default() };
                write(&mut books, &mut |books| {
                    books.finished(0, batch, &run);
                });
                let at = now();
                write(&mut books, &mut |books| books.turn(at, [batch % 3 == 0, false], None));
            }
            done.store(true, Relaxed);
        });
    }
}
