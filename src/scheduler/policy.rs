//! The knobs: how one model is batched, and which policy decides.

use std::time::Duration;

use super::cost::Work;
use super::{Buckets, QueueLimits};
use crate::vocab::Layout;

/// Who decides. The first three are what other servers do, kept to compare with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, bincode::Decode, bincode::Encode)]
#[repr(u8)]
pub enum PolicyKind {
    /// First come, first served, until the batch is full or its oldest row has waited `queue_delay_max`: a fixed window,
    /// like Triton's dynamic batcher.
    Window = 0,
    /// First come, first served, as much as the padded-cell budget holds, at once: like text-embeddings-inference.
    GreedyTokens = 1,
    /// A queue for each length bucket, each with the window.
    Buckets = 2,
    /// Packs by length, learned cost, age and deadline, over the whole queue.
    #[default]
    Cost = 3,
}

impl PolicyKind {
    pub const ALL: [PolicyKind; 4] =
        [PolicyKind::Window, PolicyKind::GreedyTokens, PolicyKind::Buckets, PolicyKind::Cost];

    pub fn name(self) -> &'static str {
        match self {
            PolicyKind::Window => "window",
            PolicyKind::GreedyTokens => "greedy_tokens",
            PolicyKind::Buckets => "buckets",
            PolicyKind::Cost => "cost",
        }
    }

    pub fn from_name(name: &str) -> Option<PolicyKind> {
        PolicyKind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether classes and tenants have queues of their own. The others know arrival order only.
    pub fn is_fair(self) -> bool {
        self == PolicyKind::Cost
    }
}

impl std::fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Which executors run a model. Models of one group compete for its executors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub enum Group {
    /// The executor threads.
    #[default]
    Executors,
    /// The batcher's own thread, for models whose whole batch costs less than handing it to another thread.
    Inline,
}

/// To which length a batch is padded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub enum PadTo {
    /// The bucket of its longest row: few shapes, for executors that prepare each of them.
    #[default]
    Bucket,
    /// Its longest row.
    Longest,
}

/// Who chooses the buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub enum Edges {
    /// Whoever wrote the policy.
    #[default]
    Given,
    /// The scheduler, from the lengths that come; the longest bucket stays.
    Auto,
}

/// How one model is batched.
#[derive(Clone, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Policy {
    pub kind: PolicyKind,
    /// Most rows in a batch.
    pub rows_max: u32,
    /// Most cells in a batch: rows × padded length, or the sum of the rows' lengths where they lie end to end. At least the
    /// longest bucket.
    pub cells_max: u64,
    /// How long the oldest row may be held for others while an executor is idle. 0: never. `None`: for as long as that
    /// pays (`cost`), never (the others).
    pub queue_delay_max: Option<Duration>,
    pub buckets: Buckets,
    pub edges: Edges,
    /// Most buckets where the scheduler chooses them.
    pub shapes_max: u16,
    pub pad_to: PadTo,
    /// How the rows of its batches lie.
    pub layout: Layout,
    /// The model can run rows that lie end to end.
    pub can_pack: bool,
    /// `buckets`: a shorter lane joins a batch when at most this share of its rows would be padding.
    pub fill_waste_max: f64,
    /// Which executors run it.
    pub group: Group,
    /// Bounds on what may wait for this model.
    pub queue: QueueLimits,
    /// Share of the executors, beside those of the other models of the group.
    pub weight: f64,
    /// Slack of a request without a deadline, and the unit of ageing.
    pub slo: Duration,
    pub tuning: Tuning,
}

/// What rarely needs to be touched, of the policy `cost`. Flat: the ten best of fifty random settings differed by 1.4 % in
/// goodput.
#[derive(Clone, Copy, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Tuning {
    /// Least efficiency, as a share of the best batch's, at which an urgent batch goes first or a batch shrinks for a
    /// deadline. Without it, deadlines make batches small, small batches make everything late, and goodput collapses.
    pub efficiency_floor: f64,
    /// Worth of a row that has just come; its age in units of its slack is added. Higher: throughput; lower: tail.
    pub base_worth: f64,
    /// Share of a batch's fixed cost that counts as worth of its rows. Higher favours many short rows.
    pub overhead_worth: f64,
    /// Longest batch, as a share of its rows' slack.
    pub slack_share: f64,
    /// Worth of a row by class, the highest class first.
    pub class_worth: [f64; Class::COUNT],
    /// Holding pays while the next row is expected within this share of a batch's fixed cost, for each row that waits.
    pub hold: f64,
    /// With several tenants: one may add to the queue while it drains within this share of the request's slack, or is
    /// not the one with the most queued. 0: always.
    pub fair_admission: f64,
    /// Once the queue has been longer than this share of a request's slack for half of that slack, what would wait longer
    /// is refused; where rows lie end to end and most are refused, half of it. 0: never. `None`: [`Policy::overload_admission`].
    pub overload_admission: Option<f64>,
    /// A row that has waited this many slacks is in the next batch.
    pub age_max: f64,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            efficiency_floor: 0.65,
            base_worth: 0.3,
            overhead_worth: 0.5,
            slack_share: 1.0,
            class_worth: [1.0, 0.55, 0.3],
            hold: 1.0,
            fair_admission: 0.7,
            overload_admission: None,
            age_max: 10.0,
        }
    }
}

impl Policy {
    pub const SLO: Duration = Duration::from_millis(100);

    /// A policy with every knob but the budgets at its default.
    pub fn new(rows_max: u32, cells_max: u64, buckets: Buckets) -> Policy {
        Policy {
            kind: PolicyKind::default(),
            rows_max,
            cells_max,
            queue_delay_max: None,
            buckets,
            edges: Edges::default(),
            shapes_max: super::edges::SHAPES,
            pad_to: PadTo::default(),
            layout: Layout::Padded,
            can_pack: false,
            fill_waste_max: 0.25,
            group: Group::Executors,
            queue: QueueLimits::NONE,
            weight: 1.0,
            slo: Policy::SLO,
            tuning: Tuning::default(),
        }
    }

    /// [`Tuning::overload_admission`] as it holds. Left to the policy it is 0 for those that are kept to compare with, which do not do
    /// it elsewhere either: in overload everybody is late then. Otherwise it is 0.15 where rows lie end to end: there a short
    /// queue fills batches nearly as well as a long one. Where all of them share one bucket it does, too, but nobody's rows are shorter
    /// than others', so that waiting hurts only whoever is late: half. Where they are padded to several lengths, choosing from
    /// many is what makes batches dense; to refuse early costs up to a quarter of the goodput then, and deadlines alone keep it
    /// (benches/admission.rs).
    pub fn overload_admission(&self) -> f64 {
        self.tuning.overload_admission.unwrap_or(match self.layout {
            _ if self.kind != PolicyKind::Cost => 0.0,
            Layout::Packed => 0.15,
            Layout::Padded if self.buckets.len() == 1 => 0.5,
            Layout::Padded => 0.0,
        })
    }

    /// Rows that fit a batch at this padded length.
    pub fn rows_at(&self, padded_len: u32) -> u32 {
        let by_cells = self.cells_max / u64::from(padded_len.max(1));
        self.rows_max.min(u32::try_from(by_cells).unwrap_or(u32::MAX))
    }

    /// Whether one batch holds so many rows of a padded length: [`Policy::rows_at`] without the division, asked for each request.
    pub fn holds(&self, rows: u32, padded_len: u32) -> bool {
        rows <= self.rows_max && u64::from(rows) * u64::from(padded_len.max(1)) <= self.cells_max
    }

    /// Whether a batch of these rows and no others is within the budgets; `longest` is already a padded length.
    pub fn fits(&self, work: Work, longest: u32) -> bool {
        match self.layout {
            Layout::Padded => work.rows <= self.rows_at(longest),
            Layout::Packed => work.rows <= self.rows_max && work.cells <= self.cells_max,
        }
    }

    /// Rows like these that a batch could hold.
    pub fn rows_like(&self, work: Work, longest: u32) -> u32 {
        match self.layout {
            Layout::Padded => self.rows_at(longest),
            Layout::Packed => {
                let by_cells = u64::from(work.rows) * self.cells_max / work.cells.max(1);
                self.rows_max.min(u32::try_from(by_cells).unwrap_or(u32::MAX)).max(work.rows)
            }
        }
    }

    /// The window of the policies that have one.
    pub fn window(&self) -> Duration {
        self.queue_delay_max.unwrap_or(Duration::ZERO)
    }

    /// What a batch is padded to when this is its longest row.
    pub fn padded_len(&self, longest: u32) -> u32 {
        match self.pad_to {
            // Nothing is padded where rows lie end to end.
            _ if self.layout == Layout::Packed => longest,
            PadTo::Longest => longest,
            PadTo::Bucket => {
                let bucket = self.buckets.of(longest).expect("a queued row has a bucket");
                self.buckets.len_at(bucket)
            }
        }
    }
}

/// Priority: 0 is the highest. Larger numbers on the wire mean the lowest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class(u8);

impl Class {
    pub const COUNT: usize = 3;
    pub const ALL: [Class; Class::COUNT] = [Class(0), Class(1), Class(2)];

    pub fn from_priority(priority: u8) -> Class {
        Class(priority.min(Class::COUNT as u8 - 1))
    }

    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}
