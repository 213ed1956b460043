//! Bounded queue with a wake-up; the only way one thread hands work to another.
//!
//! Always true
//! - A full mailbox gives the message back to its sender; nothing blocks and nothing is lost.
//! - A task that waits is woken once per idle phase, not once per message: it arms the bell, looks again, then sleeps.
//!
//! Elsewhere: why the bell cannot be missed (bell.rs).

mod bell;
/// What bell.rs is made of; loom has its own.
mod primitives {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering};

    pub(super) use atomic_waker::AtomicWaker;
}

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::clock;
use crate::vocab::Moment;
use bell::Bell;

/// Rings when a sender goes: the last one leaves nothing behind that could wake the receiver.
#[derive(Debug)]
struct RingAtEnd(Arc<Bell>);

impl Drop for RingAtEnd {
    fn drop(&mut self) {
        self.0.ring();
    }
}

/// The sending end. Clones send to the same mailbox.
#[derive(Debug)]
pub struct Sender<T> {
    // Dropped in this order: the receiver that is woken by the bell finds the queue closed.
    queue: flume::Sender<T>,
    bell: RingAtEnd,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender { queue: self.queue.clone(), bell: RingAtEnd(Arc::clone(&self.bell.0)) }
    }
}

/// The receiving end; one per mailbox.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: flume::Receiver<T>,
    bell: Arc<Bell>,
}

/// A message that was not taken, with the reason.
#[derive(Debug, PartialEq, Eq)]
pub enum SendError<T> {
    Full(T),
    /// The receiver is gone.
    Closed(T),
}

/// What waiting brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<T> {
    Message(T),
    TimedOut,
    /// All senders are gone and the queue is empty.
    Closed,
}

/// A mailbox for at most `capacity` messages.
pub fn mailbox<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = flume::bounded(capacity);
    let bell = Arc::new(Bell::default());
    (Sender { queue: sender, bell: RingAtEnd(Arc::clone(&bell)) }, Receiver { queue: receiver, bell })
}

impl<T> Sender<T> {
    /// Never blocks.
    pub fn send(&self, message: T) -> Result<(), SendError<T>> {
        match self.queue.try_send(message) {
            Ok(()) => {
                self.bell.0.ring();
                Ok(())
            }
            Err(flume::TrySendError::Full(message)) => Err(SendError::Full(message)),
            Err(flume::TrySendError::Disconnected(message)) => Err(SendError::Closed(message)),
        }
    }

    /// Waits for room. For threads that may block and mailboxes that are sized so that it does not happen; false when
    /// the receiver is gone.
    pub fn send_or_wait(&self, message: T) -> bool {
        match self.send(message) {
            Ok(()) => true,
            Err(SendError::Closed(_)) => false,
            Err(SendError::Full(message)) => {
                tracing::warn!("a mailbox was full: its sender waits");
                let sent = self.queue.send(message).is_ok();
                self.bell.0.ring();
                sent
            }
        }
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

impl<T> Receiver<T> {
    /// The next message, if one is there. One relaxed look when there is none.
    pub fn try_recv(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// For a task: ready when a message is there or no sender is left.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.bell.poll(cx, || !self.queue.is_empty() || self.queue.is_disconnected())
    }

    /// For a thread: waits for a message until `until`, for ever when that is `None`. Looks without sleeping for `spin`
    /// first: a sleeping core costs tens of microseconds to wake.
    pub fn recv_until(&self, until: Option<Moment>, spin: Duration) -> Received<T> {
        match self.queue.try_recv() {
            Ok(message) => return Received::Message(message),
            Err(flume::TryRecvError::Disconnected) => return Received::Closed,
            Err(flume::TryRecvError::Empty) => {}
        }
        if !spin.is_zero() {
            let end = clock::now() + spin;
            let end = until.map_or(end, |until| until.min(end));
            while clock::now() < end {
                for _ in 0..32 {
                    std::hint::spin_loop();
                }
                if let Some(message) = self.try_recv() {
                    return Received::Message(message);
                }
            }
        }
        match until {
            None => self.queue.recv().map_or(Received::Closed, Received::Message),
            Some(until) => match self.queue.recv_deadline(clock::instant_of(until)) {
                Ok(message) => Received::Message(message),
                Err(flume::RecvTimeoutError::Timeout) => Received::TimedOut,
                Err(flume::RecvTimeoutError::Disconnected) => Received::Closed,
            },
        }
    }
}

/// A place for one answer. Giving it never blocks, and an asker that went away is no fault.
#[derive(Debug)]
pub struct Reply<T>(flume::Sender<T>);

/// Where the answer will be.
#[derive(Debug)]
pub struct Awaited<T>(flume::Receiver<T>);

pub fn reply<T>() -> (Reply<T>, Awaited<T>) {
    let (sender, receiver) = flume::bounded(1);
    (Reply(sender), Awaited(receiver))
}

impl<T> Reply<T> {
    pub fn give(self, answer: T) {
        // There is room: it is given once.
        let _ = self.0.try_send(answer);
    }
}

impl<T> Awaited<T> {
    /// `None` when nobody is left who could answer.
    pub async fn answer(self) -> Option<T> {
        self.0.recv_async().await.ok()
    }

    /// For a thread. `None` when there is no answer within `patience`, or nobody is left who could give one.
    pub fn wait(self, patience: Duration) -> Option<T> {
        self.0.recv_timeout(patience).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    #[derive(Default)]
    struct CountWakes(AtomicUsize);

    impl Wake for CountWakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_full_mailbox_gives_the_message_back() {
        let (sender, receiver) = mailbox(1);
        assert_eq!(sender.send(1), Ok(()));
        assert_eq!(sender.send(2), Err(SendError::Full(2)));
        assert_eq!(receiver.try_recv(), Some(1));
        drop(receiver);
        assert_eq!(sender.send(3), Err(SendError::Closed(3)));
    }

    #[test]
    fn an_idle_task_is_woken_once_for_many_messages() {
        let (sender, receiver) = mailbox(8);
        let wakes = Arc::new(CountWakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let mut cx = Context::from_waker(&waker);
        assert!(receiver.poll_ready(&mut cx).is_pending());
        sender.send(1).expect("room");
        sender.send(2).expect("room");
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        assert!(receiver.poll_ready(&mut cx).is_ready());
    }

    #[test]
    fn an_idle_task_is_woken_when_the_last_sender_goes() {
        let (sender, receiver) = mailbox::<u32>(8);
        let wakes = Arc::new(CountWakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let mut cx = Context::from_waker(&waker);
        assert!(receiver.poll_ready(&mut cx).is_pending());
        drop(sender);
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        assert!(receiver.poll_ready(&mut cx).is_ready());
    }

    #[test]
    fn a_thread_that_waits_for_nothing_is_let_go_at_its_moment() {
        let (sender, receiver) = mailbox::<u32>(1);
        assert_eq!(receiver.recv_until(Some(clock::now()), Duration::ZERO), Received::TimedOut);
        drop(sender);
        assert_eq!(receiver.recv_until(None, Duration::ZERO), Received::Closed);
    }

    #[test]
    fn an_answer_is_given_without_waiting_for_whoever_asked() {
        let (given, awaited) = reply();
        given.give(7);
        assert_eq!(awaited.wait(Duration::ZERO), Some(7));
        let (given, awaited) = reply();
        drop(awaited);
        given.give(8);
        let (given, awaited) = reply::<u32>();
        drop(given);
        assert_eq!(awaited.wait(Duration::from_secs(3600)), None, "at once: nobody is left");
    }

    #[test]
    fn every_message_of_many_threads_arrives_once() {
        let (sender, receiver) = mailbox(64);
        std::thread::scope(|scope| {
            for part in 0..4u32 {
                let sender = sender.clone();
                scope.spawn(move || {
                    for n in 0..1000 {
                        let mut message = part * 1000 + n;
                        while let Err(SendError::Full(back)) = sender.send(message) {
                            message = back;
                            std::thread::yield_now();
                        }
                    }
                });
            }
            drop(sender);
            let mut seen = vec![false; 4000];
            while let Received::Message(n) = receiver.recv_until(None, Duration::ZERO) {
                assert!(!std::mem::replace(&mut seen[n as usize], true), "{n} came twice");
            }
            assert!(seen.into_iter().all(|seen| seen));
        });
    }
}
