//! The shard's books, recomputed from what is there: what was accepted has ended once or is in flight, and what is charged is held.
//!
//! Counts that drift do harm slowly: credit that is never given back refuses a connection for ever, bytes that are never subtracted
//! refuse everybody. So they are not believed but compared, every [`EVERY`], with a walk over the tables. A difference is an alarm;
//! nothing is mended, for nobody would look for its cause any more.

use std::time::Duration;

use super::state::State;
use crate::telemetry::Books;
use crate::vocab::{ModelHandle, Moment};

/// Between two audits. A walk over 10,000 requests and connections takes a tenth of a millisecond.
const EVERY: Duration = Duration::from_secs(10);

impl State {
    /// Counts an audit, if one is due, and says what does not add up.
    pub(super) fn audit_when_due(&mut self, now: Moment) {
        if now < self.audit_at {
            return;
        }
        self.audit_at = now + EVERY;
        let outcome = self.audit();
        self.telemetry.audited(Books::Shard, outcome.is_ok());
        if let Err(message) = outcome {
            tracing::error!(shard = self.index, message, "the shard's books do not add up");
        }
    }

    /// Compares every count of this shard with what it counts. Between two steps only: within one they are on their way.
    pub fn audit(&self) -> Result<(), String> {
        let equal = |what: &str, booked: u64, counted: u64| match booked == counted {
            true => Ok(()),
            false => Err(format!("the books say {booked} {what}, counted {counted}")),
        };
        let mut by_model = vec![0i64; self.catalog.entries.len()];
        let mut slots = 0;
        for waiting in self.in_flight.live() {
            slots += 1;
            by_model[waiting.model.index()] += 1;
        }
        equal("requests in flight", self.in_flight.len() as u64, slots)?;
        for (index, counted) in by_model.into_iter().enumerate() {
            let owed = self.metrics().owed_of(ModelHandle(index as u16));
            if owed != counted {
                let name = &self.catalog.entries[index].contract.name;
                return Err(format!("the books say that {owed} answers of {name} are owed, counted {counted}"));
            }
        }
        let (mut listed, mut receiving, mut unsent, mut admitted) = (0, 0, 0, 0);
        for (at, connection) in &self.connections {
            let (mut requests, mut bytes) = (0, 0);
            for (_, waiting) in self.in_flight.iter(&connection.owned) {
                requests += 1;
                bytes += u64::from(waiting.payload_bytes);
            }
            equal("requests of a connection", connection.requests_in_flight.into(), requests)?;
            equal("payload bytes of a connection", connection.bytes_in_flight, bytes)?;
            if self.in_flight.iter(&connection.owned).any(|(_, waiting)| waiting.connection as usize != at) {
                return Err("a request is on the list of another connection".into());
            }
            listed += requests;
            admitted += bytes;
            receiving += connection.partial.len() as u64;
            unsent += connection.counted as u64;
        }
        equal("requests in flight", slots, listed)?;
        let strangers = self.connections.iter().filter(|(_, connection)| connection.is_stranger).count();
        equal("connections that have not said hello", self.strangers.len() as u64, strangers as u64)?;
        let is_one = |at: &u32| self.connections.get(*at as usize).is_some_and(|connection| connection.is_stranger);
        if !self.strangers.iter().all(is_one) {
            return Err("one that is gone or known is listed among those that have not said hello".into());
        }
        equal("payload bytes of all connections", self.admitted, admitted)?;
        equal("bytes of unfinished frames", self.receiving, receiving)?;
        equal("bytes of unsent answers", self.unsent, unsent)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::contract::{Contract, Dim, NonFinite, TensorSpec};
    use crate::frontend::connection::Connection;
    use crate::frontend::inflight::Waiting;
    use crate::frontend::{Catalog, Options};
    use crate::mailbox::mailbox;
    use crate::telemetry::{ModelLabels, Telemetry};
    use crate::vocab::{Code, DType};

    const MODEL: ModelHandle = ModelHandle(0);

    /// A shard with two connections and three requests, as they are when books are right.
    fn state() -> State {
        let spec = || TensorSpec {
            name: "x".into(),
            dtype: DType::F32,
            shape: vec![Dim::Fixed(2)],
            pad: 0.0,
            range: None,
            nonfinite: NonFinite::Allow,
        };
        let contract = Contract {
            name: "model".into(),
            version: "1".into(),
            architecture: "echo".into(),
            inputs: vec![spec()],
            outputs: vec![spec()],
            length: None,
            text: None,
            rows_max: 1,
        };
        let labels = [ModelLabels { name: "model".into(), version: "1".into() }];
        let catalog = Arc::new(Catalog::new(&[Arc::new(contract.checked().expect("sound"))]));
        let mut state = State::new(0, Options::unbounded(), catalog, Telemetry::new(&labels, 1, 1), mailbox(1).0, None);
        for requests in [1, 2] {
            let at = state.connections.insert(Connection::new(-1, Moment(1))) as u32;
            for request_id in 0..requests {
                let waiting = Waiting { payload_bytes: 8, ..Waiting::plain(at, request_id) };
                let connection = &mut state.connections[at as usize];
                state.in_flight.insert(waiting, &mut connection.owned).expect("room");
                connection.requests_in_flight += 1;
                connection.bytes_in_flight += 8;
                state.admitted += 8;
                state.metrics().accepted(MODEL, 1);
            }
        }
        state
    }

    #[test]
    fn right_books_add_up_and_each_planted_drift_is_found() {
        assert_eq!(state().audit(), Ok(()));
        type Drift<'a> = (&'a str, &'a dyn Fn(&mut State));
        let drifts: &[Drift] = &[
            ("answers of model are owed", &|state| state.metrics().accepted(MODEL, 1)),
            ("answers of model are owed", &|state| state.metrics().finished(MODEL, Code::Ok, 1)),
            ("requests of a connection", &|state| state.connections[1].requests_in_flight += 1),
            ("payload bytes of a connection", &|state| state.connections[0].bytes_in_flight -= 1),
            ("payload bytes of all connections", &|state| state.admitted += 1),
            ("bytes of unfinished frames", &|state| state.receiving += 1),
            ("bytes of unsent answers", &|state| state.unsent += 1),
            ("have not said hello", &|state| state.strangers.push(0)),
            ("is listed among those", &|state| {
                state.connections[0].is_stranger = true;
                state.strangers.push(1);
            }),
            ("requests in flight", &|state| drop(state.connections.remove(1))),
            ("another connection", &|state| {
                let (first, second) = state.connections.get2_mut(0, 1).expect("two");
                std::mem::swap(&mut first.owned, &mut second.owned);
                std::mem::swap(&mut first.requests_in_flight, &mut second.requests_in_flight);
                std::mem::swap(&mut first.bytes_in_flight, &mut second.bytes_in_flight);
            }),
        ];
        for (expected, plant) in drifts {
            let mut state = state();
            plant(&mut state);
            let found = state.audit().expect_err(expected);
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn audits_are_made_when_due_and_drift_raises_the_alarm() {
        let mut state = state();
        let counted = |state: &State, outcome: &str| {
            let line = format!("ferry_audits_total{{books=\"shard\",outcome=\"{outcome}\"}} ");
            let page = state.telemetry.encode();
            page.lines().find_map(|text| text.strip_prefix(&line)?.parse::<u32>().ok()).expect("exported")
        };
        state.housekeep(Moment(1));
        state.housekeep(Moment(2));
        assert_eq!((counted(&state, "ok"), counted(&state, "drift")), (1, 0));
        state.receiving += 1;
        state.housekeep(Moment(1) + EVERY - Duration::from_nanos(1));
        assert_eq!((counted(&state, "ok"), counted(&state, "drift")), (1, 0));
        state.housekeep(Moment(1) + EVERY);
        assert_eq!((counted(&state, "ok"), counted(&state, "drift")), (1, 1));
    }
}
