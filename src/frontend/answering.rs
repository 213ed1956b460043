//! A finished batch's answers, in parts: so that large ones keep their shard from nothing else for long.
//!
//! Always true
//! - Members are answered in their order, and nothing else that came in the mailbox is acted on in between.
//! - One part copies at most [`ANSWERS_MAX`] and an answer that is not long, of however many batches; an answer goes to its
//!   connection whole. Only one row of a request that is run in parts is copied whole, however long.
//! - A request is in flight until its answer is whole: what ends it before that ends it.

use std::sync::Arc;

use super::inflight::Waiting;
use super::state::State;
use crate::clock;
use crate::mail::{FinishedBatch, Member};
use crate::scatter::{LongAnswer, append_end, append_item, append_result, failure_of};
use crate::vocab::{Code, Moment};

/// Most work at one go on answers of a batch, in bytes that are copied: some tenths of a millisecond.
const ANSWERS_MAX: usize = 512 << 10;
/// What an answer costs beside its bytes, as bytes.
const ANSWER_COST: usize = 512;
/// An answer of more bytes is long: it may be copied in parts.
const LONG_MIN: usize = 256 << 10;

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

/// A batch that is being answered.
pub struct Answering {
    finished: Arc<FinishedBatch>,
    /// The next member.
    next: usize,
    /// How far the one before it came, if that is not answered yet.
    begun: Option<Begun>,
}

/// How far an answer came.
enum Begun {
    /// So many rows of a part are kept.
    Rows(u32),
    /// Some of its frame is written.
    Frame(LongAnswer),
}

/// What came of a member.
enum Answered {
    /// Its request has its result with that.
    Whole,
    /// Its request has not, or not of it.
    Passed,
    /// There is more of it than could be done at one go.
    Begun(Begun),
}

impl Answering {
    pub fn of(finished: Arc<FinishedBatch>) -> Answering {
        Answering { finished, next: 0, begun: None }
    }
}

impl State {
    /// Goes on with the batch that is being answered, for as long as `budget` lasts. True when none is left to be answered.
    pub fn answer_some(&mut self, budget: &mut Budget, now: Moment) -> bool {
        let Some(answering) = &self.answering else { return true };
        let finished = Arc::clone(&answering.finished);
        let mut ok = 0;
        while !budget.is_spent()
            && let Some(answering) = &mut self.answering
        {
            // Each is passed before it is answered, and what it began is given up: who comes after a panic goes on behind it.
            let begun = answering.begun.take();
            answering.next += usize::from(begun.is_none());
            let Some(member) = finished.members.get(answering.next - 1) else { break };
            if member.key.shard != self.index {
                continue;
            }
            match self.answer(&finished, member, begun, budget, now) {
                Answered::Whole => ok += 1,
                Answered::Passed => {}
                Answered::Begun(begun) => self.answering.as_mut().expect("it is there").begun = Some(begun),
            }
        }
        if ok > 0 {
            self.metrics().finished(finished.batch.model, Code::Ok, ok);
        }
        let is_left = |answering: &Answering| answering.begun.is_some() || answering.next < finished.members.len();
        if self.answering.as_ref().is_some_and(is_left) {
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

    /// Answers a member, or goes on with that.
    fn answer(
        &mut self,
        finished: &FinishedBatch,
        member: &Member,
        begun: Option<Begun>,
        budget: &mut Budget,
        now: Moment,
    ) -> Answered {
        if begun.is_none() {
            budget.spend(ANSWER_COST);
        }
        if let Some(refusal) = failure_of(finished, member) {
            if member.is_part() {
                // Its other parts are for nobody now; the batcher is told with the next burst.
                self.cancels_left.push(member.key);
            }
            self.end_in(member.key, &refusal, Some((finished, member)));
            return Answered::Passed;
        }
        let Some(waiting) = self.in_flight.get(member.key).copied() else {
            self.metrics().late_answer();
            return Answered::Passed;
        };
        let rows_kept = match begun {
            Some(Begun::Frame(long)) => return self.write_long(long, waiting, finished, member, budget, now),
            Some(Begun::Rows(rows)) => rows,
            None => 0,
        };
        if member.is_part() && !waiting.items {
            return self.assemble(waiting, finished, member, rows_kept, budget, now);
        }
        let bytes = finished.answer_bytes(member);
        if bytes > LONG_MIN {
            let memory = self.connections[waiting.connection as usize].out.memory();
            let long = match waiting.items {
                true => LongAnswer::item(finished, member, waiting.request_id, memory),
                false => LongAnswer::result(finished, member, waiting.request_id, waiting.details, now, memory),
            };
            return self.write_long(long, waiting, finished, member, budget, now);
        }
        budget.spend(bytes);
        if waiting.items {
            append_item(self.output(waiting.connection).out.end(), finished, member, waiting.request_id);
            return self.end_item(waiting, finished, member, now);
        }
        self.complete(&waiting, finished, member, now);
        let out = self.output(waiting.connection).out.end();
        append_result(out, finished, member, waiting.request_id, waiting.details, now);
        Answered::Whole
    }

    /// Keeps a part's rows from `row` on, and answers the request when it has all.
    fn assemble(
        &mut self,
        waiting: Waiting,
        finished: &FinishedBatch,
        member: &Member,
        mut row: u32,
        budget: &mut Budget,
        now: Moment,
    ) -> Answered {
        let row_bytes = finished.answer_bytes(member) / member.rows as usize;
        let mut whole = false;
        while row < member.rows {
            if budget.is_spent() {
                return Answered::Begun(Begun::Rows(row));
            }
            // At least one, and as many as the budget is for.
            let rows = (budget.0 / row_bytes.max(1)).clamp(1, (member.rows - row) as usize) as u32;
            whole = self.assemblies.take_rows(finished, member, row..row + rows, now);
            budget.spend(rows as usize * row_bytes);
            row += rows;
        }
        if !whole {
            return Answered::Passed;
        }
        let Waiting { connection, request_id, details, .. } = waiting;
        let bytes = row_bytes * member.part.of_rows as usize;
        if bytes > LONG_MIN {
            let memory = self.connections[connection as usize].out.memory();
            let long = self.assemblies.long_result(finished, member, request_id, details, memory);
            return self.write_long(long, waiting, finished, member, budget, now);
        }
        budget.spend(bytes);
        // Completing frees what was kept.
        let mut assemblies = std::mem::take(&mut self.assemblies);
        self.complete(&waiting, finished, member, now);
        assemblies.append_result(self.output(connection).out.end(), finished, member, request_id, details);
        self.assemblies = assemblies;
        Answered::Whole
    }

    /// Writes of an answer what the budget is for, and gives it to its connection when it is whole.
    fn write_long(
        &mut self,
        mut long: LongAnswer,
        waiting: Waiting,
        finished: &FinishedBatch,
        member: &Member,
        budget: &mut Budget,
        now: Moment,
    ) -> Answered {
        let before = long.written();
        let whole = long.write(finished, member, budget.0);
        budget.spend(long.written() - before);
        if !whole {
            return Answered::Begun(Begun::Frame(long));
        }
        self.output(waiting.connection).out.push(long.end());
        if waiting.items {
            return self.end_item(waiting, finished, member, now);
        }
        self.complete(&waiting, finished, member, now);
        Answered::Whole
    }

    /// Rows of a request that wants them as they are done have been answered: if they were its last, so is the request.
    fn end_item(&mut self, waiting: Waiting, finished: &FinishedBatch, member: &Member, now: Moment) -> Answered {
        let last = !member.is_part() || self.assemblies.count_part(member);
        if !last {
            return Answered::Passed;
        }
        self.complete(&waiting, finished, member, now);
        let out = self.output(waiting.connection).out.end();
        append_end(out, finished, member, waiting.request_id, waiting.details, now);
        Answered::Whole
    }

    /// A request that is in flight is answered with a result now.
    fn complete(&mut self, waiting: &Waiting, finished: &FinishedBatch, member: &Member, now: Moment) {
        self.release(member.key).expect("the caller found it in flight");
        self.connections[waiting.connection as usize].points.earn(&self.options.rules);
        self.metrics().answered(waiting.model, now.since(member.received_at), waiting.send_lag());
        self.record(waiting, (Code::Ok, ""), Some((finished, member)), || now);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
    use crate::executor::batch::BatchOutput;
    use crate::frontend::connection::Connection;
    use crate::frontend::{Catalog, Options};
    use crate::mail::{Part, ToShard};
    use crate::mailbox::mailbox;
    use crate::scheduler::SealedBatch;
    use crate::telemetry::{ModelLabels, Telemetry};
    use crate::vocab::{DType, Layout, Refusal, TicketKey};
    use crate::wire::decoder::Step;
    use crate::wire::{Decoder, Kind, Limits};

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
            let key = insert(state, Waiting::plain(connection, u64::from(row) + 1));
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
        let batch = SealedBatch::plain(Layout::Packed, lens, 4 << 20);
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

    /// Puts a request in flight.
    fn insert(state: &mut State, waiting: Waiting) -> TicketKey {
        let of = &mut state.connections[waiting.connection as usize];
        of.requests_in_flight += 1;
        state.in_flight.insert(waiting, &mut of.owned).expect("there is room")
    }

    /// Kind, request and payload of each frame that `connection` has to send.
    fn frames(state: &mut State, connection: u32) -> Vec<(Kind, u64, Vec<u8>)> {
        let out = &mut state.connections[connection as usize].out;
        let mut frames = Vec::new();
        while !out.is_empty() {
            let limits = Limits { metadata_bytes: Limits::METADATA_CEILING, payload_bytes: 8 << 20 };
            let piece = out.front();
            let Ok(Step::Frame(frame)) = Decoder::new(limits).next(piece) else { panic!("no frame") };
            assert!(frame.payload_is_intact(piece));
            frames.push((frame.kind, frame.header.request_id, frame.payload(piece).to_vec()));
            let len = frame.len;
            out.advance(len);
        }
        frames
    }

    /// Request, length and first byte of each result that `connection` has to send.
    fn results(state: &mut State, connection: u32) -> Vec<(u64, u32, u8)> {
        let result = |(kind, request, payload): (Kind, u64, Vec<u8>)| {
            assert_eq!(kind, Kind::Result);
            (request, payload.len() as u32, payload[0])
        };
        frames(state, connection).into_iter().map(result).collect()
    }

    #[test]
    fn a_batch_is_answered_in_parts_of_bounded_size() {
        let (mut state, at, _sockets) = state();
        let kib = |kib: u32| kib << 10;
        // One that is more than all that is done at one go, some of which two are, many that are nothing beside what each costs anyway.
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
        // Of 512 KiB each: the first ends in the fifth with 512 bytes, the third in the sixth.
        assert_eq!(parts, [0, 0, 0, 0, 2, 246, 1023, 233]);
        assert_eq!((state.in_flight.len(), state.connections[at as usize].requests_in_flight), (0, 0));
        assert!(state.answer_some(&mut Budget::of_answers(), Moment(8)), "there is none");
    }

    #[test]
    fn many_small_batches_share_what_is_done_at_one_go() {
        let (mut state, at, _sockets) = state();
        let mut budget = Budget::of_answers();
        let batch = |state: &mut State, budget: &mut Budget| {
            let finished = finished(state, at, &[200 << 10]);
            state.take_mail(ToShard::Batch(finished), Moment(6));
            state.answer_some(budget, Moment(7))
        };
        assert!(batch(&mut state, &mut budget) && batch(&mut state, &mut budget) && !budget.is_spent());
        assert!(batch(&mut state, &mut budget) && budget.is_spent());
        assert!(!batch(&mut state, &mut budget), "it is left for later");
        assert_eq!(results(&mut state, at).len(), 3);
        assert!(state.answer_some(&mut Budget::of_answers(), Moment(8)));
        assert_eq!(results(&mut state, at).len(), 1);
    }

    #[test]
    fn rows_that_were_run_in_parts_are_answered_in_parts_too() {
        for items in [false, true] {
            let (mut state, at, _sockets) = state();
            let mut finished = finished(&mut state, at, &[300 << 10; 4]);
            let others: Vec<TicketKey> = finished.members.iter().map(|member| member.key).collect();
            others.into_iter().for_each(|key| _ = state.release(key));
            // The four rows are of one request, which was cut behind the third.
            let key = insert(&mut state, Waiting { items, ..Waiting::plain(at, 9) });
            let members = &mut Arc::get_mut(&mut finished).expect("nobody else has it").members;
            members.drain(1..3);
            members.iter_mut().for_each(|member| (member.key, member.part.of_rows) = (key, 4));
            (members[0].rows, members[1].part.at_row) = (3, 3);
            state.take_mail(ToShard::Batch(finished), Moment(6));
            let (mut goes, mut sent) = (0, Vec::new());
            while state.is_answering() {
                state.answer_some(&mut Budget::of_answers(), Moment(7));
                sent.extend(frames(&mut state, at));
                goes += 1;
            }
            let rows =
                |rows: std::ops::RangeInclusive<u8>| rows.flat_map(|row| vec![row; 300 << 10]).collect::<Vec<u8>>();
            let result = |rows| (Kind::Result, 9, rows);
            match items {
                // 1.2 MB are kept, and then written.
                false => assert!(sent == [result(rows(1..=4))] && goes == 5, "{goes}"),
                true => {
                    let expected = [(Kind::Item, 9, rows(1..=3)), (Kind::Item, 9, rows(4..=4)), result(Vec::new())];
                    assert!(sent == expected && goes == 3, "{goes}");
                }
            }
            assert!(state.in_flight.is_empty() && state.assemblies.is_empty());
        }
    }

    #[test]
    fn a_request_that_ends_while_its_answer_is_copied_has_one_end() {
        let (mut state, at, _sockets) = state();
        let finished = finished(&mut state, at, &[600 << 10; 2]);
        let first = finished.members[0].key;
        state.take_mail(ToShard::Batch(finished), Moment(6));
        assert!(!state.answer_some(&mut Budget::of_answers(), Moment(7)));
        state.end(first, &Refusal::new(Code::Cancelled, "its caller left"));
        while !state.answer_some(&mut Budget::of_answers(), Moment(8)) {}
        let sent = frames(&mut state, at);
        let ends: Vec<(Kind, u64)> = sent.iter().map(|(kind, request, _)| (*kind, *request)).collect();
        assert_eq!(ends, [(Kind::Error, 1), (Kind::Result, 2)]);
        assert!(sent[1].2 == vec![2; 600 << 10], "with nothing of the first in it");
    }

    #[test]
    fn who_leaves_while_a_batch_is_answered_keeps_nobody_else_from_it() {
        let (mut state, at, _sockets) = state();
        let finished = finished(&mut state, at, &[600 << 10; 4]);
        state.take_mail(ToShard::Batch(finished), Moment(6));
        // The first goes out, and the second is begun.
        assert!(!state.answer_some(&mut Budget::of_answers(), Moment(7)));
        assert!(!state.answer_some(&mut Budget::of_answers(), Moment(7)));
        assert_eq!(results(&mut state, at).len(), 1);
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
