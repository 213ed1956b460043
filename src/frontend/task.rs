//! The one way to start a task on a shard.
//!
//! Always true
//! - A task ends by itself; nobody holds a handle that could be dropped or cancelled, because glommio 0.9 leaks for each.
//! - A panic ends its own task, not the shard.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

struct Caught<F> {
    future: Pin<Box<F>>,
    name: &'static str,
}

impl<F: Future<Output = ()>> Future for Caught<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let future = self.future.as_mut();
        match catch_unwind(AssertUnwindSafe(|| future.poll(cx))) {
            Ok(poll) => poll,
            Err(_) => {
                tracing::error!(task = self.name, "a task panicked; its shard goes on");
                Poll::Ready(())
            }
        }
    }
}

/// Starts a task on this shard. `future` must come to an end.
#[allow(clippy::disallowed_methods)] // here is where it is allowed
pub fn spawn(name: &'static str, future: impl Future<Output = ()> + 'static) {
    glommio::spawn_local(Caught { future: Box::pin(future), name }).detach();
}
