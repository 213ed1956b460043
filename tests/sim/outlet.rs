//! The batcher's way out: simulated executors that take virtual time, and the shards' real mailboxes.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ferry::batcher::{Outlet, Replaced};
use ferry::executor::fence::{Fence, Pass};
use ferry::executor::sim::{Faults, SimExecutor as SimDevice};
use ferry::executor::slot::FilledSlot;
use ferry::executor::worker::{Answers, Worker};
use ferry::mail::{Finished, ToShard};
use ferry::mailbox::Sender;
use ferry::scheduler::Policy;
use ferry::vocab::{Refusal, TicketKey};
use rand::Rng;
use rand::rngs::StdRng;

use super::history::History;

/// An executor: the real worker on the simulated device, run at the moment its time is over.
pub struct SimExecutor {
    pub worker: Worker,
    pub answers: Answers,
    pub faults: Arc<Faults>,
    pub fence: Arc<Fence>,
    pub pass: Pass,
    pub inline: bool,
    pub queue: VecDeque<FilledSlot>,
    pub running: Option<Running>,
}

/// A batch that runs.
pub struct Running {
    pub slot: FilledSlot,
    pub service: Duration,
    /// Counted over all executors.
    pub number: u64,
}

impl SimExecutor {
    pub fn new(answers: Answers, inline: bool) -> SimExecutor {
        let (faults, fence) = (Arc::new(Faults::default()), Arc::new(Fence::default()));
        let pass = fence.pass();
        let mut executor = SimExecutor {
            worker: worker(&answers, &faults),
            answers,
            faults,
            pass,
            fence,
            inline,
            queue: VecDeque::new(),
            running: None,
        };
        if !inline {
            executor.worker.hold(executor.pass.clone());
        }
        executor
    }
}

fn worker(answers: &Answers, faults: &Arc<Faults>) -> Worker {
    Worker::new(answers.clone(), Box::new(SimDevice::new(Arc::clone(faults))))
}

pub struct SimOutlet {
    pub executors: Vec<SimExecutor>,
    pub shards: Vec<Sender<ToShard>>,
    pub policies: Vec<Policy>,
    pub history: Rc<RefCell<History>>,
    /// Batches that the batcher gave each executor and was not told the end of.
    pub given: Vec<u32>,
    pub slots: u32,
    pub rng: StdRng,
    /// Share of batches that fail.
    pub failures: f64,
    /// Time that inline batches took since it was last asked.
    pub inline_time: Duration,
    /// Batches that were given up, and the workers that still run them.
    pub ghosts: Vec<(Worker, Running)>,
    /// Requests that were told they were never executed, for the planted defect that executes them.
    pub refused: Vec<TicketKey>,
}

impl SimOutlet {
    /// Runs a batch whose time is over and says so as the worker does, but in virtual time.
    pub fn finish(&mut self, executor: usize, slot: FilledSlot, service: Duration) -> Finished {
        let fails = self.rng.random_bool(self.failures);
        let members = &slot.staging().members;
        if fails && members.len() == 1 {
            // Alone it fails for good; together they run once more.
            self.history.borrow_mut().excuse(members[0].key);
        }
        let seat = &mut self.executors[executor];
        seat.faults.failures.store(u64::from(fails), Ordering::Relaxed);
        Finished { service, ..seat.worker.run(slot) }
    }
}

impl Outlet for SimOutlet {
    fn submit(&mut self, executor: usize, slot: FilledSlot) -> Option<Finished> {
        let policy = self.policies[slot.batch.model.index()].clone();
        let mut history = self.history.borrow_mut();
        history.submitted(&slot, &policy);
        let seat = &self.executors[executor];
        if !seat.inline {
            if self.given[executor] > 0 {
                history.note("batches bound to a spare slot");
                let idle = self.executors.iter().zip(&self.given).position(|(seat, given)| !seat.inline && *given == 0);
                if let Some(idle) = idle {
                    history.violate(format!("executor {executor} got another batch while {idle} was idle"));
                }
            }
            self.given[executor] += 1;
            if self.given[executor] > self.slots {
                history.violate(format!("executor {executor} got more batches than it has slots"));
            }
            self.executors[executor].queue.push_back(slot);
            return None;
        }
        history.started(&slot);
        history.note("inline batches");
        drop(history);
        let service = Duration::from_nanos(self.rng.random_range(500..8_000));
        self.inline_time += service;
        Some(self.finish(executor, slot, service))
    }

    fn replace(&mut self, executor: usize, batch: u64) -> Replaced {
        let seat = &mut self.executors[executor];
        let Some(pass) = seat.fence.close(batch) else { return Replaced::NotRunning };
        let running = seat.running.take().expect("only what was started is closed");
        let mut history = self.history.borrow_mut();
        running.slot.staging().members.iter().for_each(|member| history.excuse(member.key));
        history.note("hung executors");
        let mut next = worker(&seat.answers, &seat.faults);
        next.hold(pass.clone());
        seat.pass = pass;
        self.ghosts.push((std::mem::replace(&mut seat.worker, next), running));
        self.given[executor] -= 1;
        Replaced::Yes
    }

    fn end(&mut self, shard: u16, ended: Vec<(TicketKey, Refusal)>) {
        let never = ended.iter().filter(|(_, refusal)| refusal.executed == ferry::vocab::Executed::Never);
        self.refused.extend(never.map(|(key, _)| *key));
        assert!(self.shards[usize::from(shard)].send(ToShard::Ended(ended)).is_ok(), "the mailbox has room");
    }
}
