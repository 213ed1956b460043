//! Staging sets as types: `VacantSlot` is the only way to fill one, `FilledSlot` the only way to run one.
//!
//! Always true
//! - A slot has one owner. The batcher owns it vacant, the executor filled; it comes back only through
//!   [`FilledSlot::vacate`], after the model has let go of it.

use crate::live::{Kind, Live};
use crate::mail::Member;
use crate::scheduler::SealedBatch;
use crate::vocab::Moment;

use super::batch::AlignedBytes;

/// Buffers for one padded batch. Grow to the largest batch and stay.
#[derive(Debug)]
pub struct Staging {
    pub inputs: Vec<AlignedBytes>,
    /// Real length of each row.
    pub lens: Vec<u32>,
    pub members: Vec<Member>,
    _live: Live,
}

impl Default for Staging {
    fn default() -> Staging {
        Staging { inputs: Vec::new(), lens: Vec::new(), members: Vec::new(), _live: Live::new(Kind::Staging) }
    }
}

impl Staging {
    /// With buffers of its own, instead of those that it would grow.
    pub fn of(inputs: Vec<AlignedBytes>) -> Staging {
        Staging { inputs, ..Staging::default() }
    }
}

/// A staging set that nothing reads.
#[derive(Debug, Default)]
pub struct VacantSlot(pub(super) Box<Staging>);

/// A packed batch on its way to, or in, an executor.
#[derive(Debug)]
pub struct FilledSlot {
    pub(super) staging: Box<Staging>,
    pub batch: SealedBatch,
    pub packed_at: Moment,
}

impl VacantSlot {
    pub fn new(staging: Staging) -> VacantSlot {
        VacantSlot(Box::new(staging))
    }

    /// The staging set now holds `batch`.
    pub fn fill(self, batch: SealedBatch, packed_at: Moment) -> FilledSlot {
        FilledSlot { staging: self.0, batch, packed_at }
    }

    /// What lies in it of the batch that it held last.
    pub fn staging(&self) -> &Staging {
        &self.0
    }

    pub fn staging_mut(&mut self) -> &mut Staging {
        &mut self.0
    }
}

impl FilledSlot {
    pub fn staging(&self) -> &Staging {
        &self.staging
    }

    pub(super) fn staging_mut(&mut self) -> &mut Staging {
        &mut self.staging
    }

    pub(super) fn vacate(self) -> VacantSlot {
        VacantSlot(self.staging)
    }
}
