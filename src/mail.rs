//! What threads write to each other: requests from shards, answers to shards, finished batches to the batcher.
//!
//! Always true
//! - A request travels once from its shard to the batcher (through a tokenizer if it is text) and its answer once back.
//! - Messages to a shard are bounded by its in-flight table: at most two name the same ticket, a deadline's and a batch's.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::capture::Sink;
use crate::contract::Contract;
use crate::executor::batch::BatchOutput;
use crate::executor::slot::VacantSlot;
use crate::mailbox::Reply;
use crate::scheduler::cost::CostModel;
use crate::scheduler::decision::Decision;
use crate::scheduler::edges::LengthHistogram;
use crate::scheduler::lint::Facts;
use crate::scheduler::waiting::WaitingLane;
use crate::scheduler::{Class, Compose, Policy, SealedBatch, TenantId};
use crate::timeline::{BatchRecord, Ran};
pub use crate::timeline::{DeviceTimes, Waited};
use crate::trial;
use crate::vocab::{ModelHandle, Moment, Refusal, Run, TicketKey};

/// An accepted request: read whole, checksum right, checked against its contract, in its shard's in-flight table.
#[derive(Clone, Debug)]
pub struct Request {
    pub key: TicketKey,
    pub model: ModelHandle,
    pub rows: u32,
    pub len: u32,
    /// Which of its caller's rows these are.
    pub part: Part,
    /// Tensor bytes as received: a slice of the read buffer, or a tokenizer's ids. Of all rows, also in a part.
    pub payload: Bytes,
    pub received_at: Moment,
    pub deadline: Option<Moment>,
    pub compose: Option<Compose>,
    pub class: Class,
    pub tenant: TenantId,
    /// Text was cut to the longest length, as the caller allowed.
    pub truncated: bool,
}

/// The place of some rows among those of one request. A request of more rows than fit a batch is run in parts, and
/// answered as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its first row among the request's.
    pub at_row: u32,
    /// Rows of the request.
    pub of_rows: u32,
}

impl Part {
    pub fn whole(rows: u32) -> Part {
        Part { at_row: 0, of_rows: rows }
    }
}

/// All that one read of one connection brought, or one tokenizer finished.
#[derive(Debug, Default)]
pub struct Burst {
    pub arrivals: Vec<Request>,
    /// Requests whose caller no longer wants an answer. The shard has ended them already.
    pub cancelled: Vec<TicketKey>,
}

#[derive(Debug)]
pub enum ToBatcher {
    Burst(Burst),
    Finished(Finished),
    /// Hold nothing back any more.
    Drain,
    /// Some time after that: hand back what waits, and what still comes, as `draining`.
    HandBack,
    SetPolicy(SetPolicy),
    Trial(StartTrial),
    /// End the model's trial, if one is on, and go back to the policy before it. Answered with how it ended.
    EndTrial {
        model: ModelHandle,
        reply: Reply<Option<trial::Report>>,
    },
    Ask(Question),
    /// Record for `time` what the scheduler is told.
    Capture {
        time: Duration,
        sink: Sink,
    },
    /// The same for the shadow schedulers, beside a capture that may be on.
    Shadow {
        time: Duration,
        sink: Sink,
    },
    /// What a setting was predicted to bring, beside what it brought: for the history of the model's policy.
    Judged {
        model: ModelHandle,
        /// Of the policy since it is in force.
        generation: u32,
        prediction: Prediction,
    },
    /// End the thread. Sent when every shard has ended.
    Stop,
}

/// Changes knobs of a model's policy while it serves: all of them or none.
#[derive(Debug)]
pub struct SetPolicy {
    pub model: ModelHandle,
    /// Names and values, as [`Policy::with`] takes them.
    pub set: Vec<(String, String)>,
    pub reply: Reply<Result<PolicyChange, SetPolicyError>>,
}

/// Tries knobs for a while: all of them or none. See [`trial`].
#[derive(Debug)]
pub struct StartTrial {
    pub model: ModelHandle,
    /// Names and values, as [`Policy::with`] takes them.
    pub set: Vec<(String, String)>,
    pub time: Duration,
    pub plan: PlanOf,
    pub reply: Reply<Result<trial::Report, SetPolicyError>>,
}

/// What is asked for of a trial; the rest is as by default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PlanOf {
    pub share: Option<f64>,
    /// Of the model's policy, where nobody says another.
    pub slo: Option<Duration>,
    pub on_time_min: Option<f64>,
    pub keep: Option<trial::Keep>,
    pub margin: Option<f64>,
}

/// Why a policy stays as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetPolicyError {
    /// A knob or its value is wrong: what was expected, and what came.
    Invalid(String),
    /// Something that waits would fit no batch any more.
    Stranded(Refusal),
    /// A trial is on: of this model, or of another that shares the executors.
    Busy(String),
}

/// Who changed a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangedBy {
    /// Somebody, through the control port.
    Operator,
    /// The scheduler: automatic buckets.
    Auto,
    /// A trial, when it first put its policy in force, and when it ended.
    Trial,
}

/// One knob's part in a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnobChange {
    pub knob: &'static str,
    pub from: String,
    pub to: String,
}

/// A figure that was predicted and the one that came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictionError {
    /// `p50` and `p99` (s), `fill`, `waste` (shares).
    pub what: &'static str,
    pub predicted: f64,
    pub happened: f64,
    /// |predicted ÷ happened − 1|; of the waste, |predicted − happened|.
    pub error: f64,
}

/// What a shadow scheduler said of a policy before it was put in force, and what came over as long a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    pub span: Duration,
    pub errors: Vec<PredictionError>,
}

/// A change that was made, or one that changed nothing: then no knob is named, and the generation is the old one.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyChange {
    pub at: Moment,
    pub by: ChangedBy,
    pub knobs: Vec<KnobChange>,
    pub generation: u32,
    /// What there is to say about it: of a trial what it is, and how it ended.
    pub note: Option<String>,
    /// Of a change to what a shadow scheduler looked at, once as much time has passed.
    pub prediction: Option<Prediction>,
}

/// What the batcher knows and others may ask for. It answers with copies of bounded size.
#[derive(Debug)]
pub enum Question {
    /// A policy and its generation.
    Policy {
        model: ModelHandle,
        reply: Reply<(Policy, u32)>,
    },
    /// The last changes of a policy, oldest first.
    History {
        model: ModelHandle,
        reply: Reply<Vec<PolicyChange>>,
    },
    Lengths {
        model: ModelHandle,
        reply: Reply<LengthHistogram>,
    },
    Cost {
        model: ModelHandle,
        reply: Reply<CostModel>,
    },
    /// What the linter looks at.
    Facts {
        model: ModelHandle,
        reply: Reply<Facts>,
    },
    /// The model's trial: the one that is on, or the last that was.
    Trial {
        model: ModelHandle,
        reply: Reply<Option<trial::Report>>,
    },
    /// The last decisions about all models, oldest first; at most [`Question::DECISIONS_MAX`].
    Decisions {
        last: usize,
        reply: Reply<Vec<Decision>>,
    },
    /// Of the batches that are kept, the last that were sealed at `since` or later, oldest first.
    Batches {
        last: usize,
        since: Moment,
        reply: Reply<Vec<BatchRecord>>,
    },
    /// What waits, by model and length; at most [`Question::LANES_MAX`] lanes.
    Lanes {
        reply: Reply<Vec<WaitingLane>>,
    },
}

impl Question {
    pub const DECISIONS_MAX: usize = 1000;
    pub const LANES_MAX: usize = 512;
}

/// An executor's word to the batcher: this slot is vacant again.
#[derive(Debug)]
pub struct Finished {
    pub executor: usize,
    pub slot: VacantSlot,
    pub batch: SealedBatch,
    pub service: Duration,
    /// When it ran, and how it ended.
    pub ran: Ran,
    /// When it did what.
    pub run: Run,
    /// Members that made the model fail while they were alone.
    pub blamed: Vec<Blamed>,
}

/// A member that made its model fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blamed {
    /// Its rows in the batch.
    pub rows: Range<u32>,
    /// How often: with others, and alone.
    pub times: u32,
}

#[derive(Debug)]
pub enum ToShard {
    /// A batch ran; its members that belong to this shard are answered from it.
    Batch(Arc<FinishedBatch>),
    /// Requests that ended without a result.
    Ended(Vec<(TicketKey, Refusal)>),
    /// Accept nothing more; answer what was accepted; then end.
    Drain,
    /// End now: what is unanswered is answered `executor_failed`.
    Abort,
}

/// One request's place in a batch.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub key: TicketKey,
    pub first_row: u32,
    pub rows: u32,
    pub len: u32,
    pub part: Part,
    pub received_at: Moment,
    pub admitted_at: Moment,
    pub waited: Waited,
    pub truncated: bool,
}

impl Member {
    /// These are not all rows of the request.
    pub fn is_part(&self) -> bool {
        self.rows != self.part.of_rows
    }
}

/// A batch that ran, with all that is needed to answer its members. Shared by the shards, reused when all let go.
#[derive(Debug)]
pub struct FinishedBatch {
    pub contract: Arc<Contract>,
    pub batch: SealedBatch,
    pub members: Vec<Member>,
    pub output: BatchOutput,
    /// The batch as a whole failed.
    pub failure: Option<Refusal>,
    pub packed_at: Moment,
    pub started_at: Moment,
    pub finished_at: Moment,
    /// Where it ran on a device, and as one.
    pub device: Option<DeviceTimes>,
}

impl FinishedBatch {
    /// Bytes of a member's rows, of all outputs.
    pub fn answer_bytes(&self, member: &Member) -> usize {
        let row: usize = self.contract.outputs.iter().map(|spec| spec.row_bytes(member.len)).sum();
        row * member.rows as usize
    }
}
