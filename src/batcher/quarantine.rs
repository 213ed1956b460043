//! Requests that made their model fail while they were alone, so that they are not run again and again.
//!
//! Always true
//! - A request is refused only if the very same bytes made the same model fail twice: in company and alone, or alone two times.
//! - At most so many are remembered, each for a limited time; where there is no room, the one that would be forgotten first goes.
//! - Payloads are hashed only while something of the same model and shape is remembered, with keys that nobody outside knows.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::contract::Contract;
use crate::executor::batch::BatchView;
use crate::mail::{Blamed, Request};
use crate::vocab::{Code, Executed, ModelHandle, Moment, Refusal, Retry};

/// Which model, how many rows of which length, and what was in them.
type Fingerprint = (ModelHandle, u32, u32, u64);

/// Failures after which a request is not run any more.
const TIMES_MAX: u32 = 2;

#[derive(Debug)]
struct Entry {
    times: u32,
    until: Moment,
}

#[derive(Debug)]
pub struct Quarantine {
    keys: RandomState,
    /// Zero: nothing is remembered.
    max: usize,
    time: Duration,
    entries: BTreeMap<Fingerprint, Entry>,
    /// No entry's time is over before.
    forget_at: Moment,
}

impl Quarantine {
    pub fn new(max: usize, time: Duration) -> Quarantine {
        Quarantine { keys: RandomState::new(), max, time, entries: BTreeMap::new(), forget_at: Moment::FAR }
    }

    /// Refuses a request that is known to make its model fail.
    ///
    /// Hot: once per request, one look while nothing is remembered.
    pub fn check(&mut self, now: Moment, contract: &Contract, request: &Request) -> Result<(), Refusal> {
        if self.entries.is_empty() {
            return Ok(());
        }
        self.forget(now);
        let shape = (request.model, request.rows, request.len);
        let alike = |hash| (shape.0, shape.1, shape.2, hash);
        if self.entries.range(alike(0)..=alike(u64::MAX)).next().is_none() {
            return Ok(());
        }
        let rows = (0..contract.inputs.len()).flat_map(|index| {
            let row_bytes = contract.inputs[index].row_bytes(request.len);
            let start = contract.input_offset(index, request.part.of_rows, request.len);
            let first = start + request.part.at_row as usize * row_bytes;
            (0..request.rows as usize).map(move |row| first + row * row_bytes..first + (row + 1) * row_bytes)
        });
        let hash = self.hash(rows.map(|place| &request.payload[place]));
        match self.entries.get(&alike(hash)) {
            Some(entry) if entry.times >= TIMES_MAX => {
                let message = "this very request made the model fail before, and is not run again for a while";
                let refusal = Refusal::new(Code::ExecutorFailed, message);
                Err(Refusal { executed: Executed::Never, retry: Retry::No, ..refusal })
            }
            _ => Ok(()),
        }
    }

    /// A member of this batch made its model fail.
    pub fn blame(&mut self, now: Moment, model: ModelHandle, batch: BatchView<'_>, Blamed { rows, times }: &Blamed) {
        let first = rows.start as usize;
        if self.max == 0 || rows.end as usize > batch.lens.len() || rows.is_empty() {
            return;
        }
        self.forget(now);
        let of_rows = || rows.start as usize..rows.end as usize;
        let bytes = (0..batch.contract.inputs.len()).flat_map(|index| of_rows().map(move |row| batch.row(index, row)));
        let fingerprint = (model, rows.len() as u32, batch.lens[first], self.hash(bytes));
        if self.entries.len() == self.max
            && !self.entries.contains_key(&fingerprint)
            && let Some(first) = self.entries.iter().min_by_key(|(_, entry)| entry.until).map(|(first, _)| *first)
        {
            self.entries.remove(&first);
        }
        let until = now + self.time;
        let entry = self.entries.entry(fingerprint).or_insert(Entry { times: 0, until });
        entry.times = entry.times.saturating_add(*times);
        entry.until = until;
        self.forget_at = self.forget_at.min(until);
    }

    /// How many requests are remembered.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    fn forget(&mut self, now: Moment) {
        if now < self.forget_at {
            return;
        }
        self.entries.retain(|_, entry| entry.until > now);
        self.forget_at = self.entries.values().map(|entry| entry.until).min().unwrap_or(Moment::FAR);
    }

    fn hash<'a>(&self, rows: impl Iterator<Item = &'a [u8]>) -> u64 {
        let mut hasher = self.keys.build_hasher();
        rows.for_each(|row| hasher.write(row));
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::contract::{Dim, Length, NonFinite, TensorSpec};
    use crate::executor::pack::{Pads, Row, pack};
    use crate::executor::slot::VacantSlot;
    use crate::mail::Part;
    use crate::scheduler::SealedBatch;
    use crate::vocab::{DType, Layout, SealReason, TicketKey};

    const MODEL: ModelHandle = ModelHandle(0);
    const TIME: Duration = Duration::from_secs(60);

    /// Two inputs, so that a payload has a gap between them.
    fn contract() -> Arc<Contract> {
        let spec = |name: &str, dtype, shape| TensorSpec {
            name: name.into(),
            dtype,
            shape,
            pad: 9.0,
            range: None,
            nonfinite: NonFinite::Allow,
        };
        let inputs = vec![
            spec("a", DType::U8, vec![Dim::Named("tokens".into())]),
            spec("b", DType::U32, vec![Dim::Named("tokens".into())]),
        ];
        let contract = Contract {
            name: "m".into(),
            version: "1".into(),
            architecture: "echo".into(),
            outputs: vec![TensorSpec { name: "out".into(), ..inputs[0].clone() }],
            inputs,
            length: Some(Length { name: "tokens".into(), min: 1, max: 64 }),
            text: None,
            rows_max: 8,
        };
        Arc::new(contract.checked().expect("a contract"))
    }

    fn request(contract: &Contract, rows: u32, len: u32, fill: u8) -> Request {
        let mut payload = Vec::new();
        for spec in &contract.inputs {
            payload.resize(payload.len().next_multiple_of(8), 0);
            payload.extend((0..rows as usize * spec.row_bytes(len)).map(|at| fill.wrapping_add(at as u8)));
        }
        Request {
            key: TicketKey { shard: 0, slot: 0, generation: 0 },
            model: MODEL,
            rows,
            len,
            part: Part::whole(rows),
            payload: payload.into(),
            received_at: Moment::ZERO,
            deadline: None,
            compose: None,
            class: Default::default(),
            tenant: Default::default(),
            truncated: false,
        }
    }

    /// Packs the requests and blames one of them.
    fn blame(quarantine: &mut Quarantine, now: Moment, requests: &[&Request], at: usize, times: u32, layout: Layout) {
        let contract = contract();
        let rows = requests.iter().map(|request| request.rows).sum();
        let padded_len = requests.iter().map(|request| request.len).max().expect("there is one") + 3;
        let batch = SealedBatch {
            id: 1,
            model: MODEL,
            executor: 0,
            rows,
            rows_possible: rows,
            layout,
            padded_len,
            cells_real: 1,
            squares_real: 1,
            reason: SealReason::Full,
            sealed_at: Moment::ZERO,
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        };
        let mut slot = VacantSlot::default();
        let members =
            requests.iter().map(|request| Row { request, admitted_at: Moment::ZERO, waited: Default::default() });
        pack(&mut slot, &contract, &Pads::of(&contract), &batch, members);
        let first = requests[..at].iter().map(|request| request.rows).sum::<u32>();
        let blamed = Blamed { rows: first..first + requests[at].rows, times };
        let staging = slot.staging();
        let view =
            BatchView { contract: &contract, layout, rows, padded_len, lens: &staging.lens, inputs: &staging.inputs };
        quarantine.blame(now, MODEL, view, &blamed);
    }

    #[test]
    fn a_request_that_failed_twice_is_refused_and_every_other_is_not() {
        let contract = contract();
        for layout in [Layout::Padded, Layout::Packed] {
            let mut quarantine = Quarantine::new(8, TIME);
            let (bad, mate, other) =
                (request(&contract, 2, 5, 1), request(&contract, 1, 7, 2), request(&contract, 2, 5, 3));
            let refused = |quarantine: &mut Quarantine, request: &Request| {
                quarantine.check(Moment(1), &contract, request).err().map(|refusal| (refusal.code, refusal.executed))
            };
            assert_eq!(refused(&mut quarantine, &bad), None);
            blame(&mut quarantine, Moment(1), &[&mate, &bad], 1, 2, layout);
            assert_eq!(refused(&mut quarantine, &bad), Some((Code::ExecutorFailed, Executed::Never)));
            assert_eq!([refused(&mut quarantine, &mate), refused(&mut quarantine, &other)], [None, None]);
            // The same bytes as another shape are another request.
            let reshaped = Request { rows: 1, len: 10, part: Part::whole(1), ..bad.clone() };
            assert_eq!(refused(&mut quarantine, &reshaped), None);
            // As a part of a larger request it is what it was.
            let mut payload = request(&contract, 4, 5, 0).payload.to_vec();
            for (index, spec) in contract.inputs.iter().enumerate() {
                let bytes = 2 * spec.row_bytes(5);
                let (from, to) = (contract.input_offset(index, 2, 5), contract.input_offset(index, 4, 5) + bytes);
                payload[to..to + bytes].copy_from_slice(&bad.payload[from..from + bytes]);
            }
            let part =
                |at_row| Request { part: Part { at_row, of_rows: 4 }, payload: payload.clone().into(), ..bad.clone() };
            assert!(refused(&mut quarantine, &part(2)).is_some() && refused(&mut quarantine, &part(0)).is_none());
        }
    }

    #[test]
    fn one_failure_alone_may_be_chance_and_two_are_not() {
        let contract = contract();
        let mut quarantine = Quarantine::new(8, TIME);
        let bad = request(&contract, 1, 5, 1);
        blame(&mut quarantine, Moment(1), &[&bad], 0, 1, Layout::Padded);
        assert!(quarantine.check(Moment(2), &contract, &bad).is_ok());
        blame(&mut quarantine, Moment(3), &[&bad], 0, 1, Layout::Padded);
        assert!(quarantine.check(Moment(4), &contract, &bad).is_err());
        let over = Moment(3) + TIME;
        assert!(quarantine.check(Moment(over.nanos() - 1), &contract, &bad).is_err());
        assert!(quarantine.check(over, &contract, &bad).is_ok(), "its time is over");
        assert_eq!(quarantine.len(), 0);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest_first() {
        let contract = contract();
        let mut quarantine = Quarantine::new(3, TIME);
        let bad: Vec<Request> = (0..5).map(|fill| request(&contract, 1, 5, fill)).collect();
        for (at, request) in (1..).zip(&bad) {
            blame(&mut quarantine, Moment(at), &[request], 0, 2, Layout::Packed);
            assert!(quarantine.len() <= 3);
        }
        let refused: Vec<bool> =
            bad.iter().map(|request| quarantine.check(Moment(9), &contract, request).is_err()).collect();
        assert_eq!(refused, [false, false, true, true, true]);
        let mut off = Quarantine::new(0, TIME);
        blame(&mut off, Moment(1), &[&bad[0]], 0, 2, Layout::Padded);
        assert!(off.check(Moment(1), &contract, &bad[0]).is_ok());
    }
}
