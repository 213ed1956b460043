//! What any version can read of a trace: what was served, with which knobs, by whom, and what it cost.

use crate::scheduler::knobs::KNOBS;
use crate::scheduler::{Buckets, Group, Policy, QueueLimits, Scheduler, SeatSpec, state};
use crate::vocab::{Layout, ModelHandle, Moment};

/// The first chunk. Moments are the server's own clock.
#[derive(Clone, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Header {
    /// Version of the program that recorded it.
    pub ferry: String,
    /// Layout of the state and of exact policies.
    pub layout: u32,
    /// When it begins.
    pub at: Moment,
    /// Decisions until then, and their hash.
    pub decisions: u64,
    pub hash: u64,
    pub limits: QueueLimits,
    pub seats: Vec<SeatHeader>,
    pub models: Vec<ModelHeader>,
}

/// An executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub struct SeatHeader {
    pub group: Group,
    pub slots: u32,
    pub device: u16,
}

/// A model, in the order of the handles.
#[derive(Clone, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct ModelHeader {
    pub name: String,
    pub group: Group,
    /// The padded lengths of its buckets, ascending.
    pub buckets: Vec<u32>,
    /// All its knobs, as text.
    pub knobs: Vec<(String, String)>,
    /// Learned cost of a batch, a cell and a squared cell, in ns; and how well it predicts.
    pub cost: [f64; 3],
    pub error: f64,
    /// Batches behind it.
    pub observations: u64,
}

/// All knobs of a policy, as text.
pub fn knobs_of(policy: &Policy) -> Vec<(String, String)> {
    let text = |name: &str| policy.get(name).expect("KNOBS lists what can be shown");
    KNOBS.iter().map(|knob| (knob.name.to_owned(), text(knob.name))).collect()
}

impl Header {
    pub fn of(scheduler: &Scheduler, names: &[String], at: Moment) -> Header {
        let models = names.iter().enumerate().map(|(index, name)| {
            let model = ModelHandle(index as u16);
            let (policy, cost) = (scheduler.policy(model), scheduler.cost(model));
            let fit = cost.coefficients();
            ModelHeader {
                name: name.clone(),
                group: policy.group,
                buckets: policy.buckets.lens().to_vec(),
                knobs: knobs_of(policy),
                cost: [fit.batch, fit.cell, fit.square],
                error: cost.error(),
                observations: cost.observations(),
            }
        });
        let seat =
            |seat: &crate::scheduler::Seat| SeatHeader { group: seat.group, slots: seat.slots, device: seat.device };
        Header {
            ferry: env!("CARGO_PKG_VERSION").to_owned(),
            layout: state::LAYOUT,
            at,
            decisions: scheduler.log().count(),
            hash: scheduler.log().hash(),
            limits: *scheduler.limits(),
            seats: scheduler.seats().iter().map(seat).collect(),
            models: models.collect(),
        }
    }

    pub fn seat_specs(&self) -> Vec<SeatSpec> {
        let spec = |seat: &SeatHeader| SeatSpec { group: seat.group, slots: seat.slots, device: seat.device };
        self.seats.iter().map(spec).collect()
    }

    /// The handle of a model by its name.
    pub fn model(&self, name: &str) -> Option<ModelHandle> {
        let at = self.models.iter().position(|model| model.name == name)?;
        Some(ModelHandle(at as u16))
    }
}

impl ModelHeader {
    /// Its policy, from its knobs. Knobs that this version does not know are left out and named.
    pub fn policy(&self) -> Result<(Policy, Vec<String>), String> {
        let buckets = Buckets::new(&self.buckets).map_err(|error| error.to_string())?;
        // What its knobs say that it does, it can.
        let can_pack = self.knobs.iter().any(|(key, value)| key == "layout" && value == Layout::Packed.name());
        let start = Policy { group: self.group, can_pack, ..Policy::new(1, u64::from(buckets.longest()), buckets) };
        let (known, unknown): (Vec<_>, Vec<_>) =
            self.knobs.iter().partition(|(key, _)| KNOBS.iter().any(|knob| knob.name == key));
        let policy = start.with(known.iter().map(|(key, value)| (key.as_str(), value.as_str())))?;
        Ok((policy, unknown.into_iter().map(|(key, _)| key.clone()).collect()))
    }
}
