//! Wakes a task that sleeps, once for many messages.
//!
//! Always true
//! - Whoever has rung after its message could be seen has either been seen, or wakes: the sleeper arms the bell before it looks, the
//!   ringer looks at the bell after its message is there, and the lock of the queue between them orders the two.
//!
//! tools/loom takes this very file in and runs it through all interleavings of its threads.

use std::task::{Context, Poll};

use super::primitives::{AtomicBool, AtomicWaker, Ordering};

#[derive(Debug, Default)]
pub(super) struct Bell {
    armed: AtomicBool,
    waker: AtomicWaker,
}

impl Bell {
    /// A message is there, or a sender has gone.
    pub(super) fn ring(&self) {
        if self.armed.load(Ordering::Acquire) && self.armed.swap(false, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Ready when `look` finds something; else whoever rings from now on wakes the task.
    pub(super) fn poll(&self, cx: &mut Context<'_>, look: impl Fn() -> bool) -> Poll<()> {
        if look() {
            return Poll::Ready(());
        }
        self.waker.register(cx.waker());
        // Swaps, not stores: each then comes behind a ringer's swap that went before it, by the rules for swaps alone, which loom knows
        // better than what follows from them for stores. On x86 the first costs the same.
        self.armed.swap(true, Ordering::SeqCst);
        if look() {
            self.armed.swap(false, Ordering::AcqRel);
            return Poll::Ready(());
        }
        Poll::Pending
    }
}
