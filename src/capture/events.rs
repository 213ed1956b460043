//! The inputs of a scheduler, and how each is written.
//!
//! A byte with the kind in its three low bits and flags above, then what the flags say, as LEB128 numbers: times as signed
//! differences in ns to the input before, a batch's number as a difference to the last, whatever is as last time left out.
//!
//! Always true
//! - Writing and reading keep the same memory of what was before, so a trace is read from its start.
//! - A number that cannot be (a model beyond 16 bits, a varint beyond 64) is an error.

use std::time::Duration;

use crate::scheduler::cost::Work;
use crate::scheduler::{Arrival, Class, Compose, TenantId, TicketId};
use crate::vocab::{ModelHandle, Moment};

/// One input of the scheduler, in the order in which it was given.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The batcher made a turn: who expired, and batches until there are no more.
    Turn {
        at: Moment,
    },
    Arrival {
        at: Moment,
        arrival: Arrival,
    },
    Cancel {
        at: Moment,
        of: Cancelled,
    },
    Finished {
        at: Moment,
        batch: Done,
    },
    Policy(PolicyChange),
    Drain,
    /// What had been decided when everything before it was done.
    Checkpoint {
        decisions: u64,
        hash: u64,
    },
}

/// Whom a cancel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// A ticket that waited when the capture began.
    Ticket(TicketId),
    /// An arrival of this trace, counted from 0, that waited.
    Waiting(u64),
    /// A part of a request of more rows than fit a batch: it goes in the middle of a turn, with the part `with` that has just
    /// expired.
    Within { id: TicketId, with: TicketId },
    /// An arrival of this trace that no longer waited, or never did: no input of the scheduler. In another replay it may
    /// be one.
    Left(u64),
}

/// A batch that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub id: u64,
    pub executor: u16,
    pub model: ModelHandle,
    pub rows: u32,
    pub padded_len: u32,
    /// Sum of its rows' lengths, and of their squares, where they lay end to end.
    pub packed: Option<(u64, u64)>,
    /// Zero: it failed, and says nothing about the time that such a batch takes.
    pub service: Duration,
    /// It ran on the batcher's thread, in the turn that sealed it, which went on when it was done.
    pub inline: bool,
}

impl Done {
    /// What the executor had to compute.
    pub fn work(&self) -> Work {
        match self.packed {
            None => Work::padded(self.rows, self.padded_len),
            Some((cells, squares)) => Work { rows: self.rows, cells, squares },
        }
    }
}

/// A model got another policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyChange {
    pub model: ModelHandle,
    /// All its knobs, as text.
    pub knobs: Vec<(String, String)>,
    /// The policy, for versions of the same layout.
    pub exact: Vec<u8>,
}

const TURN: u8 = 0;
const ARRIVAL: u8 = 1;
const CANCEL: u8 = 2;
const FINISHED: u8 = 3;
const POLICY: u8 = 4;
const DRAIN: u8 = 5;
const CHECKPOINT: u8 = 6;
const KIND: u8 = 7;

/// The time differs from the last.
const MOVED: u8 = 0x08;

const DEADLINE: u8 = 0x10;
const ROWS: u8 = 0x20;
const MORE: u8 = 0x40;
const MODEL: u8 = 0x80;

const MORE_CLASS: u8 = 0x03;
const MORE_TENANT: u8 = 0x04;
const MORE_COMPOSE: u8 = 0x08;

const BY_TICKET: u8 = 0x10;
const LEFT: u8 = 0x20;
const WITHIN: u8 = BY_TICKET | LEFT;

const INLINE: u8 = 0x10;
const EXECUTOR: u8 = 0x40;

/// Knobs of a policy, at most, and bytes of one of their names, of its value and of an exact policy.
const KNOBS_MAX: u64 = 256;
const TEXT_MAX: u64 = 8 << 10;

/// What both ends remember of the events before.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    at: Moment,
    arrivals: u64,
    model: ModelHandle,
    done: u64,
    done_model: ModelHandle,
    executor: u16,
    decisions: u64,
}

impl Memory {
    pub fn new(at: Moment, decisions: u64) -> Memory {
        Memory { at, decisions, ..Memory::default() }
    }

    /// Arrivals so far.
    pub fn arrivals(&self) -> u64 {
        self.arrivals
    }

    /// Appends one event.
    ///
    /// Hot while a capture is on: once per request, per batch and per turn.
    pub fn write(&mut self, out: &mut Vec<u8>, event: &Event) {
        let first = out.len();
        out.push(0);
        let kind = match event {
            Event::Turn { at } => TURN | self.write_at(out, *at),
            Event::Arrival { at, arrival } => ARRIVAL | self.write_at(out, *at) | self.write_arrival(out, arrival),
            Event::Cancel { at, of } => {
                let moved = self.write_at(out, *at);
                let flags = match *of {
                    Cancelled::Ticket(id) => {
                        put(out, id.0.into());
                        BY_TICKET
                    }
                    Cancelled::Within { id, with } => {
                        put(out, id.0.into());
                        put(out, with.0.into());
                        WITHIN
                    }
                    Cancelled::Waiting(arrival) => {
                        put(out, self.arrivals - arrival);
                        0
                    }
                    Cancelled::Left(arrival) => {
                        put(out, self.arrivals - arrival);
                        LEFT
                    }
                };
                CANCEL | moved | flags
            }
            Event::Finished { at, batch } => FINISHED | self.write_done(out, *at, batch),
            Event::Policy(change) => {
                put(out, change.model.0.into());
                put(out, change.knobs.len() as u64);
                for (key, value) in &change.knobs {
                    put_bytes(out, key.as_bytes());
                    put_bytes(out, value.as_bytes());
                }
                put_bytes(out, &change.exact);
                POLICY
            }
            Event::Drain => DRAIN,
            Event::Checkpoint { decisions, hash } => {
                put(out, decisions - self.decisions);
                self.decisions = *decisions;
                out.extend_from_slice(&hash.to_le_bytes());
                CHECKPOINT
            }
        };
        out[first] = kind;
    }

    fn write_at(&mut self, out: &mut Vec<u8>, at: Moment) -> u8 {
        if at == self.at {
            return 0;
        }
        put_signed(out, at.nanos().wrapping_sub(self.at.nanos()) as i64);
        self.at = at;
        MOVED
    }

    fn write_arrival(&mut self, out: &mut Vec<u8>, arrival: &Arrival) -> u8 {
        let mut flags = 0;
        if arrival.model != self.model {
            flags |= MODEL;
            put(out, arrival.model.0.into());
            self.model = arrival.model;
        }
        if arrival.rows != 1 {
            flags |= ROWS;
            put(out, arrival.rows.into());
        }
        let mut more = arrival.class.index() as u8;
        if arrival.tenant != TenantId::default() {
            more |= MORE_TENANT;
        }
        if arrival.compose.is_some() {
            more |= MORE_COMPOSE;
        }
        if more != 0 {
            flags |= MORE;
            out.push(more);
            if more & MORE_TENANT != 0 {
                put(out, arrival.tenant.0.into());
            }
            if let Some(compose) = arrival.compose {
                put(out, compose.tag);
                put(out, compose.rows.into());
            }
        }
        put(out, arrival.len.into());
        put(out, arrival.bytes);
        if let Some(deadline) = arrival.deadline {
            flags |= DEADLINE;
            put_signed(out, deadline.nanos().wrapping_sub(self.at.nanos()) as i64);
        }
        self.arrivals += 1;
        flags
    }

    fn write_done(&mut self, out: &mut Vec<u8>, at: Moment, batch: &Done) -> u8 {
        let service = u64::try_from(batch.service.as_nanos()).unwrap_or(u64::MAX);
        // Its end is when it was given, and what it took.
        let follows = batch.inline && at == self.at + Duration::from_nanos(service);
        let mut flags = if batch.inline { INLINE } else { 0 };
        if follows {
            self.at = at;
        } else {
            // Told even where it did not move: an inline batch without it ends when it was done.
            put_signed(out, at.nanos().wrapping_sub(self.at.nanos()) as i64);
            self.at = at;
            flags |= MOVED;
        }
        if batch.executor != self.executor {
            flags |= EXECUTOR;
            put(out, batch.executor.into());
            self.executor = batch.executor;
        }
        if batch.model != self.done_model {
            flags |= MODEL;
            put(out, batch.model.0.into());
            self.done_model = batch.model;
        }
        if batch.rows != 1 {
            flags |= ROWS;
            put(out, batch.rows.into());
        }
        put_signed(out, batch.id.wrapping_sub(self.done) as i64);
        self.done = batch.id;
        put(out, batch.padded_len.into());
        match batch.packed {
            // No batch is empty, so no sum is 0.
            None => put(out, 0),
            Some((cells, squares)) => {
                put(out, cells);
                put(out, squares);
            }
        }
        put(out, service);
        flags
    }

    /// Reads one event off the front of `bytes`.
    pub fn read(&mut self, bytes: &mut &[u8]) -> Result<Event, &'static str> {
        let first = take(bytes, 1)?[0];
        let inline = first & KIND == FINISHED && first & INLINE != 0;
        if first & MOVED != 0 {
            self.at = Moment(self.at.nanos().wrapping_add(get_signed(bytes)? as u64));
        }
        let at = self.at;
        let only = |flags: u8| match first & !KIND & !flags {
            0 => Ok(()),
            _ => Err("an unknown flag"),
        };
        Ok(match first & KIND {
            TURN => {
                only(MOVED)?;
                Event::Turn { at }
            }
            ARRIVAL => Event::Arrival { at, arrival: self.read_arrival(bytes, first)? },
            CANCEL => {
                only(MOVED | BY_TICKET | LEFT)?;
                let number = get(bytes)?;
                let arrival = || match number {
                    1.. => self.arrivals.checked_sub(number).ok_or("a cancel of an arrival before the trace"),
                    0 => Err("a cancel of an arrival to come"),
                };
                let ticket = |number: u64| u32::try_from(number).map(TicketId).map_err(|_| "a ticket's number");
                let of = match first & WITHIN {
                    BY_TICKET => Cancelled::Ticket(ticket(number)?),
                    LEFT => Cancelled::Left(arrival()?),
                    WITHIN => Cancelled::Within { id: ticket(number)?, with: ticket(get(bytes)?)? },
                    _ => Cancelled::Waiting(arrival()?),
                };
                Event::Cancel { at, of }
            }
            FINISHED => {
                let mut batch = self.read_done(bytes, first)?;
                batch.inline = inline;
                if inline && first & MOVED == 0 {
                    self.at = self.at + batch.service;
                }
                Event::Finished { at: self.at, batch }
            }
            POLICY => {
                only(0)?;
                let model = ModelHandle(small(bytes)?);
                let count = get(bytes)?;
                if count > KNOBS_MAX {
                    return Err("a policy with too many knobs");
                }
                let mut knobs = Vec::new();
                for _ in 0..count {
                    knobs.push((text(bytes)?, text(bytes)?));
                }
                Event::Policy(PolicyChange { model, knobs, exact: blob(bytes)?.to_vec() })
            }
            DRAIN => {
                only(0)?;
                Event::Drain
            }
            CHECKPOINT => {
                only(0)?;
                self.decisions = self.decisions.checked_add(get(bytes)?).ok_or("a number of decisions")?;
                let hash = u64::from_le_bytes(take(bytes, 8)?.try_into().expect("8 bytes were taken"));
                Event::Checkpoint { decisions: self.decisions, hash }
            }
            _ => return Err("an event of an unknown kind"),
        })
    }

    fn read_arrival(&mut self, bytes: &mut &[u8], flags: u8) -> Result<Arrival, &'static str> {
        if flags & MODEL != 0 {
            self.model = ModelHandle(small(bytes)?);
        }
        let rows = if flags & ROWS != 0 { get_u32(bytes)? } else { 1 };
        let more = if flags & MORE != 0 { take(bytes, 1)?[0] } else { 0 };
        if more & !(MORE_CLASS | MORE_TENANT | MORE_COMPOSE) != 0 || more & MORE_CLASS >= Class::COUNT as u8 {
            return Err("an unknown class or flag of an arrival");
        }
        let tenant = if more & MORE_TENANT != 0 { TenantId(small(bytes)?) } else { TenantId::default() };
        let compose = match more & MORE_COMPOSE {
            0 => None,
            _ => Some(Compose { tag: get(bytes)?, rows: get_u32(bytes)? }),
        };
        let len = get_u32(bytes)?;
        let payload = u64::from(get_u32(bytes)?);
        let deadline = match flags & DEADLINE {
            0 => None,
            _ => Some(Moment(self.at.nanos().wrapping_add(get_signed(bytes)? as u64))),
        };
        self.arrivals += 1;
        let class = Class::from_priority(more & MORE_CLASS);
        Ok(Arrival { model: self.model, rows, len, bytes: payload, deadline, compose, class, tenant })
    }

    fn read_done(&mut self, bytes: &mut &[u8], flags: u8) -> Result<Done, &'static str> {
        if flags & EXECUTOR != 0 {
            self.executor = small(bytes)?;
        }
        if flags & MODEL != 0 {
            self.done_model = ModelHandle(small(bytes)?);
        }
        let rows = if flags & ROWS != 0 { get_u32(bytes)? } else { 1 };
        self.done = self.done.wrapping_add(get_signed(bytes)? as u64);
        let padded_len = get_u32(bytes)?;
        let packed = match get(bytes)? {
            0 => None,
            cells => Some((cells, get(bytes)?)),
        };
        let service = Duration::from_nanos(get(bytes)?);
        let (executor, model) = (self.executor, self.done_model);
        Ok(Done { id: self.done, executor, model, rows, padded_len, packed, service, inline: false })
    }
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, (value << 1 ^ value >> 63) as u64);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], &'static str> {
    let (taken, rest) = bytes.split_at_checked(count).ok_or("an event that goes beyond its chunk")?;
    *bytes = rest;
    Ok(taken)
}

fn get(bytes: &mut &[u8]) -> Result<u64, &'static str> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        let part = u64::from(byte & 0x7f);
        if shift == 63 && part > 1 {
            break;
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number beyond 64 bits")
}

fn get_signed(bytes: &mut &[u8]) -> Result<i64, &'static str> {
    let value = get(bytes)?;
    Ok((value >> 1) as i64 ^ -((value & 1) as i64))
}

fn get_u32(bytes: &mut &[u8]) -> Result<u32, &'static str> {
    u32::try_from(get(bytes)?).map_err(|_| "a number beyond 32 bits")
}

fn small(bytes: &mut &[u8]) -> Result<u16, &'static str> {
    u16::try_from(get(bytes)?).map_err(|_| "a number beyond 16 bits")
}

fn blob<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], &'static str> {
    match get(bytes)? {
        len @ 0..=TEXT_MAX => take(bytes, len as usize),
        _ => Err("a text that is too long"),
    }
}

fn text(bytes: &mut &[u8]) -> Result<String, &'static str> {
    String::from_utf8(blob(bytes)?.to_vec()).map_err(|_| "a text that is no UTF-8")
}
