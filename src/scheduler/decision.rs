//! The decision log: each batch, hold and shed with its reason and the numbers behind it, in a ring of fixed size.
//!
//! Always true
//! - Writing allocates nothing. The hash covers every decision since the scheduler was made, so two runs decided alike
//!   when their hashes are equal.

use crate::vocab::{ModelHandle, Moment, SealReason};

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Sealed(SealReason),
    /// Rows are held for others to come.
    Held,
    /// A request was given up: it could no longer be served by its deadline.
    Shed,
    /// A request was refused for its deadline, or for its tenant's share.
    Refused,
}

impl Verdict {
    fn number(self) -> u8 {
        match self {
            Verdict::Sealed(reason) => reason as u8,
            Verdict::Held => 64,
            Verdict::Shed => 65,
            Verdict::Refused => 66,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Verdict::Sealed(reason) => reason.name(),
            Verdict::Held => "held",
            Verdict::Shed => "shed",
            Verdict::Refused => "refused",
        }
    }
}

/// How often what was decided other than to seal; batches are counted by their reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub struct VerdictCounts {
    pub held: u64,
    pub shed: u64,
    pub refused: u64,
}

impl VerdictCounts {
    pub fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Sealed(_) => {}
            Verdict::Held => self.held += 1,
            Verdict::Shed => self.shed += 1,
            Verdict::Refused => self.refused += 1,
        }
    }
}

/// One decision. Times in ns; lengths in cells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    pub at: Moment,
    pub verdict: Verdict,
    pub model: ModelHandle,
    /// Of a batch.
    pub executor: u16,
    /// Number of the batch; of a shed or refused request, its length.
    pub batch: u64,
    pub rows: u32,
    pub padded_len: u32,
    /// Rows that would have fitted a batch like it.
    pub rows_possible: u32,
    /// Share of its cells that are padding.
    pub padding: f32,
    /// Shortest bucket length whose rows may be in the batch.
    pub shortest: u32,
    /// Rows of the model that waited, before.
    pub waiting: u32,
    /// Expected time of the batch. Of a held one: how long it is held at most. Of a shed or refused one: how long it would
    /// have taken, or waited.
    pub predicted: u64,
    /// Share of the batch's expected time that is work on real cells; 0 where nothing is known.
    pub efficiency: f32,
    /// The same of the batch that would have been best if no deadline pressed.
    pub best_efficiency: f32,
    /// Generation of the policy that decided.
    pub generation: u32,
}

/// The last decisions.
#[derive(Debug)]
pub struct DecisionLog {
    ring: Vec<Decision>,
    next: usize,
    count: u64,
    hash: u64,
}

const RING: usize = 8192;

impl Default for DecisionLog {
    fn default() -> DecisionLog {
        DecisionLog { ring: Vec::with_capacity(RING), next: 0, count: 0, hash: 0xcbf2_9ce4_8422_2325 }
    }
}

impl DecisionLog {
    /// A log that goes on where another stood. Its ring is empty.
    pub fn resume(count: u64, hash: u64) -> DecisionLog {
        DecisionLog { count, hash, ..DecisionLog::default() }
    }

    pub fn push(&mut self, decision: Decision) {
        let mut mix = |value: u64| self.hash = (self.hash ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
        mix(decision.at.nanos());
        mix(u64::from(decision.verdict.number())
            | u64::from(decision.model.0) << 8
            | u64::from(decision.executor) << 24);
        mix(decision.batch);
        mix(u64::from(decision.rows) | u64::from(decision.padded_len) << 32);
        mix(decision.predicted);
        self.count += 1;
        if self.ring.len() < RING {
            self.ring.push(decision);
        } else {
            self.ring[self.next] = decision;
            self.next = (self.next + 1) % RING;
        }
    }

    /// Also who was taken belongs to what was decided.
    pub fn mix_member(&mut self, sequence: u32, len: u32) {
        let value = u64::from(sequence) | u64::from(len) << 32;
        self.hash = (self.hash ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
    }

    /// Of all decisions so far, in order.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// The last `count` decisions, oldest first.
    pub fn last(&self, count: usize) -> impl Iterator<Item = &Decision> {
        let (newer, older) = self.ring.split_at(self.next);
        let skip = self.ring.len().saturating_sub(count);
        older.iter().chain(newer).skip(skip)
    }
}
