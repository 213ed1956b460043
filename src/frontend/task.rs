//! The one way to start a task on a shard.
//!
//! Always true
//! - A task ends by itself; nobody holds a handle that could be dropped or cancelled, because glommio 0.9 leaks for each.
//! - A panic ends its own task, not the shard.
//! - How long each turn of a task took is counted (`ferry_shard_turn_seconds`): while one runs no other does.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::clock;
use crate::telemetry::{Telemetry, Turn};

/// Where the turns of a shard's tasks are counted.
#[derive(Clone)]
pub struct Turns {
    pub telemetry: Arc<Telemetry>,
    pub shard: usize,
}

impl Turns {
    /// Does something and counts how long it took.
    pub fn time<T>(&self, whose: Turn, act: impl FnOnce() -> T) -> T {
        let begin = clock::now();
        let done = act();
        self.telemetry.shard(self.shard).turn(whose, clock::now().since(begin));
        done
    }
}

struct Caught<F> {
    future: Pin<Box<F>>,
    whose: Turn,
    turns: Turns,
}

impl<F: Future<Output = ()>> Future for Caught<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Caught { future, whose, turns } = &mut *self;
        let polled = turns.time(*whose, || catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))));
        polled.unwrap_or_else(|_| {
            tracing::error!(task = self.whose.name(), "a task panicked; its shard goes on");
            Poll::Ready(())
        })
    }
}

/// Starts a task on this shard. `future` must come to an end.
#[allow(clippy::disallowed_methods)] // here is where it is allowed
pub fn spawn(whose: Turn, turns: &Turns, future: impl Future<Output = ()> + 'static) {
    glommio::spawn_local(Caught { future: Box::pin(future), whose, turns: turns.clone() }).detach();
}
