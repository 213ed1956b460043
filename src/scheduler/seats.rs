//! The executors as the scheduler sees them: who is idle, who has a spare slot, and when who is expected to be free.
//!
//! Always true
//! - A seat holds at most as many batches as it has slots.

use super::Group;
use crate::vocab::{ModelHandle, Moment};

/// What a seat is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeatSpec {
    pub group: Group,
    /// Batches that it may hold: the one that runs and those bound behind it.
    pub slots: u32,
    /// Executors of one device share it: their batches' fixed parts overlap, the rest runs one after the other.
    pub device: u16,
}

impl SeatSpec {
    /// Executors that share nothing.
    pub fn separate(group: Group, executors: usize, slots: u32) -> Vec<SeatSpec> {
        (0..executors).map(|at| SeatSpec { group, slots, device: at as u16 }).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Running {
    pub batch: u64,
    pub model: ModelHandle,
    pub sealed_at: Moment,
    pub started: Moment,
    pub predicted: f64,
    /// When it should be done.
    pub until: Moment,
    /// The same, as it was expected when the batch was sealed.
    pub promised: Moment,
}

#[derive(Clone, Debug, bincode::Decode, bincode::Encode)]
pub struct Seat {
    pub group: Group,
    pub slots: u32,
    pub device: u16,
    /// In the order of their runs.
    pub running: Vec<Running>,
}

impl Seat {
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    pub fn has_room(&self) -> bool {
        (self.running.len() as u32) < self.slots
    }

    /// When it should have finished all it holds.
    pub fn free_at(&self) -> Moment {
        self.running.last().map_or(Moment::ZERO, |running| running.until)
    }
}

#[derive(Clone, Copy, Debug, Default, bincode::Decode, bincode::Encode)]
pub struct Device {
    pub executors: u32,
    /// When it should have computed all it was given.
    pub free_at: Moment,
    pub last_finish: Moment,
}

#[derive(Clone, Debug, bincode::Decode, bincode::Encode)]
pub struct Seats {
    pub seats: Vec<Seat>,
    /// Of the executors; inline seats have none.
    pub devices: Vec<Device>,
}

impl Seats {
    pub fn new(specs: &[SeatSpec]) -> Seats {
        let mut devices: Vec<Device> = Vec::new();
        for spec in specs.iter().filter(|spec| spec.group == Group::Executors) {
            let at = usize::from(spec.device);
            if devices.len() <= at {
                devices.resize(at + 1, Device::default());
            }
            devices[at].executors += 1;
        }
        let seats = specs
            .iter()
            .map(|spec| Seat {
                group: spec.group,
                slots: spec.slots,
                device: spec.device,
                running: Vec::with_capacity(spec.slots as usize),
            })
            .collect();
        Seats { seats, devices }
    }

    /// Every executor has its device, and every batch its model.
    pub fn is_whole(&self, is_model: impl Fn(ModelHandle) -> bool) -> bool {
        self.seats.iter().all(|seat| {
            let on_device = seat.group == Group::Inline || usize::from(seat.device) < self.devices.len();
            on_device && seat.running.iter().all(|running| is_model(running.model))
        })
    }

    pub fn is_shared(&self, seat: usize) -> bool {
        self.executors_of(seat) > 1
    }

    /// Executors on the same device as this one.
    pub fn executors_of(&self, seat: usize) -> u32 {
        let seat = &self.seats[seat];
        match seat.group {
            Group::Inline => 1,
            Group::Executors => self.devices[usize::from(seat.device)].executors,
        }
    }

    pub fn count(&self, group: Group) -> usize {
        self.seats.iter().filter(|seat| seat.group == group).count()
    }

    pub fn idle(&self, group: Group) -> usize {
        self.seats.iter().filter(|seat| seat.group == group && seat.is_idle()).count()
    }

    pub fn idle_seat(&self, group: Group) -> Option<usize> {
        self.seats.iter().position(|seat| seat.group == group && seat.is_idle())
    }

    /// Batches of a model that executors hold.
    pub fn running_of(&self, model: ModelHandle) -> usize {
        self.seats.iter().filter(|seat| seat.running.iter().any(|running| running.model == model)).count()
    }

    /// A batch of this seat finished: its device is expected to be free when the other batches on it are done.
    pub fn expect_free(&mut self, seat: usize, now: Moment) {
        let device = self.seats[seat].device;
        let on_it = self.seats.iter().filter(|seat| seat.group == Group::Executors && seat.device == device);
        let free_at = on_it.map(Seat::free_at).max().unwrap_or(now);
        self.devices[usize::from(device)].free_at = free_at;
    }

    /// When a batch given now would begin to be computed, and be done: `fixed` and `rows` are the parts of its time.
    pub fn forecast(&self, seat: usize, now: Moment, fixed: f64, rows: f64) -> (Moment, Moment) {
        let start = now.max(self.seats[seat].free_at());
        let after = |moment: Moment, nanos: f64| Moment(moment.nanos().saturating_add(nanos as u64));
        let ready = after(start, fixed);
        if !self.is_shared(seat) {
            return (start, after(ready, rows));
        }
        let device = &self.devices[usize::from(self.seats[seat].device)];
        (start, after(ready.max(device.free_at), rows))
    }
}
