//! The server's state: starting, serving, draining, stopped; and which models are not warm.
//!
//! Always true
//! - States only move forward. Setting an earlier one changes nothing, so a late `set_serving` cannot undo a drain.
//! - Ready means: serving, and no model is cold.
//! - Reading the state is one atomic load; only those who wait take the lock.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::clock;

/// In the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// Models are loaded and warmed.
    Starting = 0,
    Serving = 1,
    /// New requests are refused, accepted ones are finished.
    Draining = 2,
    Stopped = 3,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Serving => "serving",
            State::Draining => "draining",
            State::Stopped => "stopped",
        }
    }
}

/// Shared by all threads of a server.
#[derive(Debug, Default)]
pub struct Lifecycle {
    state: AtomicU8,
    /// Names of models that cannot serve yet or any more. Also what waiters hold while they look at the state.
    cold: Mutex<Vec<String>>,
    changed: Condvar,
}

impl Lifecycle {
    /// Starting, with no model known to be cold.
    pub fn new() -> Lifecycle {
        Lifecycle::default()
    }

    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::Starting,
            1 => State::Serving,
            2 => State::Draining,
            _ => State::Stopped,
        }
    }

    pub fn set_serving(&self) {
        self.advance(State::Serving);
    }

    pub fn set_draining(&self) {
        self.advance(State::Draining);
    }

    pub fn set_stopped(&self) {
        self.advance(State::Stopped);
    }

    fn advance(&self, to: State) {
        // Under the lock: a waiter has either seen the new state or is already waiting for the notice.
        let _cold = self.lock();
        self.state.fetch_max(to as u8, Ordering::AcqRel);
        self.changed.notify_all();
    }

    /// The model cannot serve: it is being warmed, or its executors were lost.
    pub fn set_cold(&self, model: &str) {
        let mut cold = self.lock();
        if !cold.iter().any(|name| name == model) {
            cold.push(model.to_owned());
        }
    }

    pub fn set_warm(&self, model: &str) {
        self.lock().retain(|name| name != model);
        self.changed.notify_all();
    }

    /// Whether requests for this model would be served now.
    pub fn serves(&self, model: &str) -> bool {
        self.state() == State::Serving && !self.lock().iter().any(|name| name == model)
    }

    /// Whether requests would be served now; otherwise why not.
    pub fn ready(&self) -> Result<(), String> {
        let cold = self.lock();
        match self.state() {
            State::Serving if cold.is_empty() => Ok(()),
            State::Starting | State::Serving if !cold.is_empty() => {
                Err(format!("{}: not warm: {}", self.state().name(), cold.join(", ")))
            }
            state => Err(state.name().into()),
        }
    }

    /// Waits until the state is `at_least` or later, no longer than `patience`. Says whether it came to that.
    pub fn wait(&self, at_least: State, patience: Duration) -> bool {
        let until = clock::now() + patience;
        let mut cold = self.lock();
        while self.state() < at_least {
            let left = until.since(clock::now());
            if left.is_zero() {
                return false;
            }
            (cold, _) = self.changed.wait_timeout(cold, left).expect("nobody panics while holding the list");
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.cold.lock().expect("nobody panics while holding the list")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const FOREVER: Duration = Duration::from_secs(3600);

    #[test]
    fn states_only_move_forward() {
        let lifecycle = Lifecycle::new();
        lifecycle.set_draining();
        lifecycle.set_serving();
        assert_eq!(lifecycle.state(), State::Draining);
        lifecycle.set_stopped();
        lifecycle.set_draining();
        assert_eq!(lifecycle.state(), State::Stopped);
    }

    #[test]
    fn ready_is_serving_with_every_model_warm() {
        let lifecycle = Lifecycle::new();
        assert_eq!(lifecycle.ready(), Err("starting".into()));
        lifecycle.set_cold("minilm");
        lifecycle.set_cold("minilm");
        lifecycle.set_serving();
        assert_eq!(lifecycle.ready(), Err("serving: not warm: minilm".into()));
        lifecycle.set_warm("minilm");
        assert_eq!(lifecycle.ready(), Ok(()));
        lifecycle.set_draining();
        assert_eq!(lifecycle.ready(), Err("draining".into()));
    }

    #[test]
    fn a_waiter_sees_a_state_set_before_or_after_it_began_to_wait() {
        let lifecycle = Arc::new(Lifecycle::new());
        let waiter = {
            let lifecycle = Arc::clone(&lifecycle);
            std::thread::spawn(move || lifecycle.wait(State::Draining, FOREVER))
        };
        lifecycle.set_draining();
        assert!(waiter.join().expect("the waiter does not panic"));
        assert!(lifecycle.wait(State::Serving, Duration::ZERO), "later states include earlier ones");
        assert!(!lifecycle.wait(State::Stopped, Duration::ZERO));
    }
}
