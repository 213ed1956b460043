//! Keeps what a hung executor thread may still do from reaching anybody, when another thread has its seat.
//!
//! Always true
//! - One thread holds a seat's pass at a time. A thread loses it only in the middle of a batch, so a batch that is taken is run by
//!   whoever has the pass.
//! - Whether a batch was done before it was declared hung, or not, is decided once, here.
//!
//! Elsewhere: who is hung (batcher/hang.rs).

use std::sync::{Arc, Mutex, MutexGuard};

/// One executor's seat.
#[derive(Debug, Default)]
pub struct Fence(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Raised with each thread that loses its pass.
    holder: u64,
    running: Option<u64>,
}

impl Fence {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nothing that can panic is done with it")
    }

    /// For the first thread.
    pub fn pass(self: &Arc<Fence>) -> Pass {
        Pass { fence: Arc::clone(self), holder: self.state().holder }
    }

    /// Takes the pass from the thread that runs this batch, and gives it for the next one. None: it does not run it, and may have
    /// run it.
    pub fn close(self: &Arc<Fence>, batch: u64) -> Option<Pass> {
        let mut state = self.state();
        if state.running != Some(batch) {
            return None;
        }
        state.running = None;
        state.holder += 1;
        Some(Pass { fence: Arc::clone(self), holder: state.holder })
    }
}

/// A thread's right to a seat.
#[derive(Clone, Debug)]
pub struct Pass {
    fence: Arc<Fence>,
    holder: u64,
}

impl Pass {
    /// The batch runs now.
    pub fn begin(&self, batch: u64) {
        let mut state = self.fence.state();
        if state.holder == self.holder {
            state.running = Some(batch);
        }
    }

    /// False: another thread has the seat.
    pub fn is_valid(&self) -> bool {
        self.fence.state().holder == self.holder
    }

    /// The batch is done. False: it was declared hung, and its result is nobody's.
    pub fn end(&self) -> bool {
        let mut state = self.fence.state();
        let valid = state.holder == self.holder;
        if valid {
            state.running = None;
        }
        valid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_either_done_or_hung() {
        let fence = Arc::new(Fence::default());
        let first = fence.pass();
        first.begin(1);
        assert!(fence.close(2).is_none(), "another batch is not this one");
        assert!(first.is_valid() && first.end());
        assert!(fence.close(1).is_none(), "it was done before");
        first.begin(2);
        let second = fence.close(2).expect("it runs");
        assert!(!first.is_valid() && !first.end(), "its result came too late");
        assert!(fence.close(2).is_none(), "it is declared hung once");
        second.begin(3);
        first.begin(2);
        assert!(!first.end(), "who lost the pass disturbs nobody");
        assert!(fence.close(2).is_none());
        assert!(second.is_valid() && second.end());
    }

    /// Method: a thread runs batches while another declares each of them hung at any moment.
    #[test]
    fn of_a_batch_that_ends_while_it_is_declared_hung_one_of_the_two_holds() {
        let fence = Arc::new(Fence::default());
        let mut pass = fence.pass();
        for batch in 0..2000 {
            pass.begin(batch);
            let closing = Arc::clone(&fence);
            let closer = std::thread::spawn(move || closing.close(batch));
            let done = pass.end();
            let next = closer.join().expect("it does not panic");
            assert_eq!(done, next.is_none(), "batch {batch}");
            pass = next.unwrap_or(pass);
        }
    }
}
