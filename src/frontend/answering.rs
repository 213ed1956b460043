//! A finished batch's answers, in parts: so that large ones keep their shard from nothing else for long.
//!
//! Always true
//! - Members are answered in their order, each whole, and nothing else that came in the mailbox is acted on in between.
//! - One part is at most [`ANSWERS_MAX`], or one answer, of however many batches.

use std::sync::Arc;

use super::inflight::Waiting;
use super::state::State;
use crate::clock;
use crate::mail::{FinishedBatch, Member};
use crate::scatter::{append_end, append_item, append_result, failure_of};
use crate::vocab::{Code, Moment};

/// Most work at one go on answers of a batch, in bytes that are copied: half a millisecond or so. One answer is always whole.
const ANSWERS_MAX: usize = 512 << 10;
/// What an answer costs beside its bytes, as bytes.
const ANSWER_COST: usize = 512;

/// What may still be done at one go, in bytes that are copied.
#[derive(Clone, Copy, Debug)]
pub struct Budget(usize);

impl Budget {
    /// For answers, before others have their turn.
    pub fn of_answers() -> Budget {
        Budget(ANSWERS_MAX)
    }

    fn spend(&mut self, bytes: usize) {
        self.0 = self.0.saturating_sub(bytes);
    }

    pub fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

impl State {
    /// Goes on with the batch that is being answered, for as long as `budget` lasts. True when none is left to be answered.
    pub fn answer_some(&mut self, budget: &mut Budget, now: Moment) -> bool {
        let Some(finished) = self.answering.as_ref().map(|(finished, _)| Arc::clone(finished)) else { return true };
        let mut ok = 0;
        let mut spent = budget.is_spent();
        // Each is passed before it is answered: who comes after a panic goes on behind it.
        while let Some((_, at)) = &mut self.answering
            && let Some(member) = finished.members.get(*at)
            && !spent
        {
            *at += 1;
            if member.key.shard == self.index {
                budget.spend(ANSWER_COST + finished.answer_bytes(member));
                ok += u64::from(self.answer(&finished, member, now));
                spent = budget.is_spent();
            }
        }
        if ok > 0 {
            self.metrics().finished(finished.batch.model, Code::Ok, ok);
        }
        if self.answering.as_ref().is_some_and(|(_, at)| *at < finished.members.len()) {
            return false;
        }
        self.answering = None;
        if self.telemetry.keeps_answered() {
            self.telemetry.answered(finished.batch.id, clock::now());
        }
        true
    }

    /// Whether members of a batch are left for [`State::answer_some`].
    pub fn is_answering(&self) -> bool {
        self.answering.is_some()
    }

    /// Answers a member. True when its request has its result with that.
    fn answer(&mut self, finished: &FinishedBatch, member: &Member, now: Moment) -> bool {
        match failure_of(finished, member) {
            Some(refusal) => {
                if member.is_part() {
                    // Its other parts are for nobody now; the batcher is told with the next burst.
                    self.cancels_left.push(member.key);
                }
                self.end_in(member.key, &refusal, Some((finished, member)));
                false
            }
            None if self.in_flight.get(member.key).is_some_and(|waiting| waiting.items) => {
                self.answer_item(finished, member, now)
            }
            None if member.is_part() => {
                if self.in_flight.get(member.key).is_none() {
                    self.metrics().late_answer();
                    return false;
                }
                let whole = self.assemblies.take_part(finished, member, now);
                if whole {
                    let mut assemblies = std::mem::take(&mut self.assemblies);
                    let waiting = self.release(member.key).expect("found above");
                    self.count_answer(&waiting, finished, member, now);
                    let out = self.output(waiting.connection).out.end();
                    assemblies.append_result(out, finished, member, waiting.request_id, waiting.details);
                    self.assemblies = assemblies;
                }
                whole
            }
            None => {
                let Some(waiting) = self.release(member.key) else {
                    self.metrics().late_answer();
                    return false;
                };
                self.count_answer(&waiting, finished, member, now);
                let out = self.output(waiting.connection).out.end();
                append_result(out, finished, member, waiting.request_id, waiting.details, now);
                true
            }
        }
    }

    /// Answers rows of a request that wants them as they are done. True when they were its last.
    fn answer_item(&mut self, finished: &FinishedBatch, member: &Member, now: Moment) -> bool {
        let waiting = *self.in_flight.get(member.key).expect("the caller found it");
        append_item(self.output(waiting.connection).out.end(), finished, member, waiting.request_id);
        let last = !member.is_part() || self.assemblies.count_part(member);
        if last {
            self.release(member.key);
            self.count_answer(&waiting, finished, member, now);
            let out = self.output(waiting.connection).out.end();
            append_end(out, finished, member, waiting.request_id, waiting.details, now);
        }
        last
    }

    /// A request is answered with a result now.
    fn count_answer(&mut self, waiting: &Waiting, finished: &FinishedBatch, member: &Member, now: Moment) {
        self.connections[waiting.connection as usize].points.earn(&self.options.rules);
        self.metrics().answered(waiting.model, now.since(member.received_at), waiting.send_lag());
        self.record(waiting, (Code::Ok, ""), Some((finished, member)), || now);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
    use crate::executor::batch::BatchOutput;
    use crate::frontend::connection::Connection;
    use crate::frontend::{Catalog, Options};
    use crate::mail::{Part, ToShard};
    use crate::mailbox::mailbox;
    use crate::scheduler::SealedBatch;
    use crate::telemetry::{ModelLabels, Telemetry};
    use crate::vocab::{DType, Layout, ModelHandle, SealReason};
    use crate::wire::decoder::Step;
    use crate::wire::{Decoder, Limits};

    /// A shard with a connection that has nothing to send yet.
    fn state() -> (State, u32, [UnixStream; 2]) {
        let telemetry = Telemetry::new(&[ModelLabels { name: "m".into(), version: "1".into() }], 1, 1);
        let catalog = Arc::new(Catalog::new(&[]));
        let mut state = State::new(0, Options::unbounded(), catalog, telemetry, mailbox(1).0, None);
        let sockets = UnixStream::pair().expect("sockets");
        let at = state.connections.insert(Connection::new(sockets.0.as_raw_fd(), Moment(1))) as u32;
        (state, at, sockets.into())
    }

    /// A batch of one row for each length, in bytes, of one connection's requests 1, 2, …; their answers are their numbers.
    fn finished(state: &mut State, connection: u32, lens: &[u32]) -> Arc<FinishedBatch> {
        let tensor = TensorSpec {
            name: "y".into(),
            dtype: DType::U8,
            shape: vec![Dim::Named("n".into())],
            pad: 0.0,
            range: None,
            nonfinite: NonFinite::Refuse,
        };
        let contract = Contract {
            name: "m".into(),
            version: "1".into(),
            architecture: "m".into(),
            inputs: vec![tensor.clone()],
            outputs: vec![tensor],
            length: Some(Length { name: "n".into(), min: 1, max: 4 << 20 }),
            text: None,
            rows_max: 1,
        };
        let mut output = BatchOutput::default();
        output.prepare(&contract, Layout::Packed, lens, 4 << 20);
        let mut members = Vec::new();
        let mut begin = 0;
        for (row, len) in (0u32..).zip(lens) {
            let waiting = Waiting::plain(connection, u64::from(row) + 1);
            let of = &mut state.connections[connection as usize];
            of.requests_in_flight += 1;
            let key = state.in_flight.insert(waiting, &mut of.owned).expect("there is room");
            let end = begin + *len as usize;
            output.output_mut::<u8>(0)[begin..end].fill((row as u8).wrapping_add(1));
            begin = end;
            members.push(Member {
                key,
                first_row: row,
                rows: 1,
                len: *len,
                part: Part::whole(1),
                received_at: Moment(0),
                admitted_at: Moment(1),
                waited: Default::default(),
                truncated: false,
            });
        }
        let batch = SealedBatch {
            id: 1,
            model: ModelHandle(0),
            executor: 0,
            rows: lens.len() as u32,
            rows_possible: lens.len() as u32,
            layout: Layout::Packed,
            padded_len: 4 << 20,
            cells_real: begin as u64,
            squares_real: 0,
            reason: SealReason::Full,
            sealed_at: Moment(2),
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        };
        Arc::new(FinishedBatch {
            contract: Arc::new(contract),
            batch,
            members,
            output,
            failure: None,
            packed_at: Moment(3),
            started_at: Moment(4),
            finished_at: Moment(5),
            device: None,
        })
    }

    /// Request, length and first byte of each result that `connection` has to send.
    fn results(state: &mut State, connection: u32) -> Vec<(u64, u32, u8)> {
        let out = &mut state.connections[connection as usize].out;
        let mut results = Vec::new();
        while !out.is_empty() {
            let limits = Limits { metadata_bytes: Limits::METADATA_CEILING, payload_bytes: 8 << 20 };
            let piece = out.front();
            let Ok(Step::Frame(frame)) = Decoder::new(limits).next(piece) else { panic!("no frame") };
            assert!(frame.payload_is_intact(piece));
            results.push((frame.header.request_id, frame.header.payload_len, frame.payload(piece)[0]));
            let len = frame.len;
            out.advance(len);
        }
        results
    }

    #[test]
    fn a_batch_is_answered_in_parts_of_bounded_size() {
        let (mut state, at, _sockets) = state();
        let kib = |kib: u32| kib << 10;
        // One that is more than all that is done at one go, two that are, many that are nothing beside what each costs anyway.
        let lens = [&[kib(2048), kib(300), kib(300), kib(300)][..], &[1; 1500]].concat();
        let finished = finished(&mut state, at, &lens);
        state.take_mail(ToShard::Batch(finished), Moment(6));
        let mut parts = Vec::new();
        let mut next = 1;
        while state.is_answering() {
            let done = state.answer_some(&mut Budget::of_answers(), Moment(7));
            assert_eq!(done, !state.is_answering());
            let part = results(&mut state, at);
            for (request, len, first) in &part {
                assert_eq!((*request, *len, *first), (next, lens[next as usize - 1], next as u8));
                next += 1;
            }
            parts.push(part.len());
        }
        assert_eq!(parts, [1, 2, 424, 1023, 54], "the fourth with as many small ones as fit beside it");
        assert_eq!((state.in_flight.len(), state.connections[at as usize].requests_in_flight), (0, 0));
        assert!(state.answer_some(&mut Budget::of_answers(), Moment(8)), "there is none");
    }

    #[test]
    fn many_small_batches_share_what_is_done_at_one_go() {
        let (mut state, at, _sockets) = state();
        let mut budget = Budget::of_answers();
        let batch = |state: &mut State, budget: &mut Budget| {
            let finished = finished(state, at, &[600 << 10]);
            state.take_mail(ToShard::Batch(finished), Moment(6));
            state.answer_some(budget, Moment(7))
        };
        assert!(batch(&mut state, &mut budget) && budget.is_spent());
        assert!(!batch(&mut state, &mut budget), "it is left for later");
        assert_eq!(results(&mut state, at).len(), 1);
        assert!(state.answer_some(&mut Budget::of_answers(), Moment(8)));
        assert_eq!(results(&mut state, at).len(), 1);
    }

    #[test]
    fn who_leaves_while_a_batch_is_answered_keeps_nobody_else_from_it() {
        let (mut state, at, _sockets) = state();
        let finished = finished(&mut state, at, &[600 << 10; 4]);
        state.take_mail(ToShard::Batch(finished), Moment(6));
        assert!(!state.answer_some(&mut Budget::of_answers(), Moment(7)));
        state.remove(at);
        let mut rounds = 0;
        while !state.answer_some(&mut Budget::of_answers(), Moment(8)) {
            rounds += 1;
        }
        assert!(rounds <= 3 && state.in_flight.is_empty());
        state.publish();
        let page = state.telemetry.encode();
        assert!(page.contains("ferry_late_answers_total{shard=\"0\"} 3\n"), "{page}");
    }
}
