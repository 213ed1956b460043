//! Where one outcome is put by whoever learns it and picked up by whoever waits for it, in a thread or as a future.
//!
//! Always true
//! - A slot is filled at most once and taken at most once.
//! - Its lock is not held while a waker runs: a waker may do anything.
//!
//! Elsewhere: who fills it (connection.rs, pool.rs).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::clock;
use crate::vocab::Moment;

/// Locks of the client guard plain data that is consistent between statements, so a panic of another holder is no
/// reason to fail every thread.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Slot<T> {
    state: Mutex<SlotState<T>>,
    filled: Condvar,
}

enum SlotState<T> {
    Empty,
    Watched(Waker),
    Filled(T),
    Taken,
}

impl<T> SlotState<T> {
    fn take(&mut self) -> Option<T> {
        match std::mem::replace(self, SlotState::Taken) {
            SlotState::Filled(outcome) => Some(outcome),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl<T> Default for Slot<T> {
    fn default() -> Slot<T> {
        Slot { state: Mutex::new(SlotState::Empty), filled: Condvar::new() }
    }
}

impl<T> Slot<T> {
    pub(super) fn fill(&self, outcome: T) {
        let before = {
            let mut state = lock(&self.state);
            debug_assert!(
                matches!(*state, SlotState::Empty | SlotState::Watched(_)),
                "whoever takes a waiter out of its table is the only one to fill its slot"
            );
            std::mem::replace(&mut *state, SlotState::Filled(outcome))
        };
        self.filled.notify_all();
        if let SlotState::Watched(waker) = before {
            waker.wake();
        }
    }

    /// Waits for the outcome; `None` when `until` came first.
    pub(super) fn wait(&self, until: Moment) -> Option<T> {
        let mut state = lock(&self.state);
        loop {
            if let Some(outcome) = state.take() {
                return Some(outcome);
            }
            if until == Moment::FAR {
                state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = until.since(clock::now());
            if left.is_zero() {
                return None;
            }
            state = self.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn poll(&self, context: &mut Context<'_>) -> Poll<T> {
        let mut state = lock(&self.state);
        match state.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                assert!(!matches!(*state, SlotState::Taken), "a future is not polled after it was ready");
                *state = SlotState::Watched(context.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(*lock(&self.state), SlotState::Filled(_) | SlotState::Taken)
    }
}
