//! The mailbox's bell, in every interleaving of a task that waits and threads that send (F81: no wake-up is lost).
//!
//!     cargo test --release --manifest-path tools/loom/Cargo.toml
//!
//! bell.rs is the file of the server; the queue beside it is a stand-in with what matters of flume's: a lock around everything.

#![cfg(test)]

// The bell's own path for what it is made of.
mod primitives {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering};

    #[derive(Debug, Default)]
    pub(super) struct AtomicWaker(loom::future::AtomicWaker);

    impl AtomicWaker {
        pub(super) fn register(&self, waker: &std::task::Waker) {
            self.0.register_by_ref(waker);
        }

        pub(super) fn wake(&self) {
            self.0.wake();
        }
    }
}

#[path = "../../../src/mailbox/bell.rs"]
mod bell;

mod tests {
    use std::collections::VecDeque;
    use std::future::poll_fn;
    use std::task::Poll;

    use loom::sync::{Arc, Mutex};
    use loom::thread;

    use super::bell::Bell;

    #[derive(Default)]
    struct Mailbox {
        queue: Mutex<(VecDeque<u32>, usize)>,
        bell: Bell,
    }

    impl Mailbox {
        fn with_senders(senders: usize) -> Arc<Mailbox> {
            Arc::new(Mailbox { queue: Mutex::new((VecDeque::new(), senders)), ..Mailbox::default() })
        }

        fn send(&self, message: u32) {
            self.queue.lock().expect("no panic").0.push_back(message);
            self.bell.ring();
        }

        fn leave(&self) {
            self.queue.lock().expect("no panic").1 -= 1;
            self.bell.ring();
        }

        /// All messages until the last sender has gone. Loom fails if it sleeps for ever.
        fn receive_all(&self) -> Vec<u32> {
            let mut received = Vec::new();
            loom::future::block_on(poll_fn(|cx| {
                loop {
                    let look = || {
                        let queue = self.queue.lock().expect("no panic");
                        !queue.0.is_empty() || queue.1 == 0
                    };
                    if self.bell.poll(cx, look).is_pending() {
                        return Poll::Pending;
                    }
                    let mut queue = self.queue.lock().expect("no panic");
                    match queue.0.pop_front() {
                        Some(message) => received.push(message),
                        None if queue.1 == 0 => return Poll::Ready(()),
                        None => {}
                    }
                }
            }));
            received
        }
    }

    /// Threads are interrupted at most so often, at every place: more takes minutes. What they do by themselves is not counted.
    fn bounded() -> loom::model::Builder {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model
    }

    #[test]
    fn a_message_wakes_the_task_whenever_it_comes() {
        bounded().check(|| {
            let mailbox = Mailbox::with_senders(1);
            let sender = Arc::clone(&mailbox);
            let thread = thread::spawn(move || {
                sender.send(1);
                sender.send(2);
                sender.leave();
            });
            assert_eq!(mailbox.receive_all(), [1, 2]);
            thread.join().expect("no panic");
        });
    }

    #[test]
    fn of_two_senders_each_is_heard() {
        bounded().check(|| {
            let mailbox = Mailbox::with_senders(2);
            let threads: Vec<_> = (1..=2)
                .map(|message| {
                    let sender = Arc::clone(&mailbox);
                    thread::spawn(move || {
                        sender.send(message);
                        sender.leave();
                    })
                })
                .collect();
            let mut received = mailbox.receive_all();
            received.sort_unstable();
            assert_eq!(received, [1, 2]);
            for thread in threads {
                thread.join().expect("no panic");
            }
        });
    }

    /// A ringer that looks before its message is there: loom must find the task that sleeps for ever.
    #[test]
    #[should_panic(expected = "deadlock")]
    fn a_bell_that_is_rung_too_early_is_found_out() {
        loom::model(|| {
            let mailbox = Mailbox::with_senders(1);
            let sender = Arc::clone(&mailbox);
            let thread = thread::spawn(move || {
                sender.bell.ring();
                sender.queue.lock().expect("no panic").1 -= 1;
            });
            assert_eq!(mailbox.receive_all(), [] as [u32; 0]);
            thread.join().expect("no panic");
        });
    }
}
