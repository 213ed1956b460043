//! Writes down what the scheduler is told, while a capture is on or the shadow schedulers take a stretch.
//!
//! Always true
//! - The batcher never waits for it: a chunk that finds no room ends the capture.
//! - Held: one chunk, sixteen bytes for each place in a shard's table, and eight for each ticket. A chunk leaves when it is full, and after
//!   [`FLUSH`] at the latest.
//!
//! Elsewhere: the bytes (capture), where they go (control/admin.rs).

use std::time::Duration;

use crate::capture::{
    CHECKPOINT_EVERY, Cancelled, CaptureEnd, Done, Ended, Event, Header, PolicyChange, Sink, Writer, end_chunk,
    knobs_of,
};
use crate::scheduler::decision::DecisionLog;
use crate::scheduler::{Arrival, Scheduler, TicketId, state};
use crate::vocab::{ModelHandle, Moment, TicketKey};

/// Longest time that a chunk waits for more: whoever reads sees that the server lives.
pub const FLUSH: Duration = Duration::from_secs(1);

/// Who records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    Capture,
    Shadow,
    /// The last seconds, in memory, for a dump.
    Dump,
}

pub struct Recorder {
    pub by: Tap,
    writer: Writer,
    sink: Sink,
    /// The capture's end.
    until: Moment,
    flush_at: Moment,
    checkpoint_at: u64,
    /// By shard and slot: the last request's generation, and its number among the arrivals plus one.
    arrivals: Vec<Vec<(u32, u64)>>,
    /// By ticket: the number among the arrivals, plus one, of the last that became it.
    tickets: Vec<u64>,
    /// Chunks that found room.
    delivered: u32,
    /// It could not be gone on with.
    failed: Option<CaptureEnd>,
}

impl Recorder {
    /// Begins a capture of `time`. `Err`: it ended at once, as whoever reads it will be told.
    pub fn start(
        scheduler: &Scheduler,
        names: &[String],
        shards: usize,
        now: Moment,
        time: Duration,
        (by, mut sink): (Tap, Sink),
    ) -> Result<Recorder, CaptureEnd> {
        let header = Header::of(scheduler, names, now);
        let Some(state) = scheduler.save() else {
            let (writer, start) = Writer::start(&header, &[]);
            let _ = sink.send(start);
            sink.end(Ended { end: CaptureEnd::TooLarge, chunks: writer.chunks() });
            return Err(CaptureEnd::TooLarge);
        };
        let (writer, start) = Writer::start(&header, &state);
        let mut recorder = Recorder {
            by,
            writer,
            sink,
            until: now + time,
            flush_at: now + FLUSH,
            checkpoint_at: header.decisions + CHECKPOINT_EVERY,
            arrivals: vec![Vec::new(); shards],
            tickets: Vec::new(),
            delivered: 0,
            failed: None,
        };
        recorder.deliver(start);
        Ok(recorder)
    }

    pub fn arrival(&mut self, now: Moment, arrival: &Arrival, key: TicketKey, log: &DecisionLog) {
        self.note(&Event::Arrival { at: now, arrival: *arrival }, log);
        let slots = &mut self.arrivals[usize::from(key.shard)];
        if slots.len() <= key.slot as usize {
            slots.resize(key.slot as usize + 1, (0, 0));
        }
        slots[key.slot as usize] = (key.generation, self.writer.arrivals());
    }

    /// The arrival just written down became this ticket.
    pub fn admitted(&mut self, id: TicketId) {
        if self.tickets.len() <= id.index() {
            self.tickets.resize(id.index() + 1, 0);
        }
        self.tickets[id.index()] = self.writer.arrivals();
    }

    /// A cancel, of a ticket that waits or of a request that no longer does.
    pub fn cancel(&mut self, now: Moment, key: TicketKey, waits: Option<TicketId>, log: &DecisionLog) {
        let of = match waits {
            Some(id) => self.waiting(id),
            None => {
                let slot = self.arrivals.get(usize::from(key.shard)).and_then(|slots| slots.get(key.slot as usize));
                match slot {
                    Some((generation, number)) if *generation == key.generation && *number > 0 => {
                        Cancelled::Left(number - 1)
                    }
                    // It came before the capture and has left: it is nothing to this trace.
                    _ => return,
                }
            }
        };
        self.note(&Event::Cancel { at: now, of }, log);
    }

    fn waiting(&self, id: TicketId) -> Cancelled {
        match self.tickets.get(id.index()) {
            Some(number @ 1..) => Cancelled::Waiting(number - 1),
            _ => Cancelled::Ticket(id),
        }
    }

    /// A part of a request that is run in parts was taken out with the others: in the middle of a turn with the one that has
    /// just expired, or before one.
    pub fn cancel_part(&mut self, now: Moment, id: TicketId, with: Option<TicketId>, log: &DecisionLog) {
        match with {
            // No checkpoint comes between what a turn decides.
            Some(with) => self.writer.event(&Event::Cancel { at: now, of: Cancelled::Within { id, with } }),
            None => self.note(&Event::Cancel { at: now, of: self.waiting(id) }, log),
        }
    }

    pub fn finished(&mut self, now: Moment, batch: Done, log: &DecisionLog) {
        self.note(&Event::Finished { at: now, batch }, log);
    }

    pub fn turn(&mut self, now: Moment, log: &DecisionLog) {
        self.note(&Event::Turn { at: now }, log);
    }

    pub fn drain(&mut self, log: &DecisionLog) {
        self.note(&Event::Drain, log);
    }

    /// A model's policy was changed, to what it is now.
    pub fn policy(&mut self, model: ModelHandle, scheduler: &Scheduler) {
        let policy = scheduler.policy(model);
        let change = PolicyChange { model, knobs: knobs_of(policy), exact: state::save_policy(policy) };
        self.note(&Event::Policy(change), scheduler.log());
    }

    /// Writes an input down, before the scheduler is told or while it has decided nothing since.
    ///
    /// Hot while a capture is on.
    fn note(&mut self, event: &Event, log: &DecisionLog) {
        if self.writer.is_full() {
            self.flush(log);
        } else if log.count() >= self.checkpoint_at {
            self.writer.event(&Event::Checkpoint { decisions: log.count(), hash: log.hash() });
            self.checkpoint_at = log.count() + CHECKPOINT_EVERY;
        }
        self.writer.event(event);
    }

    fn flush(&mut self, log: &DecisionLog) {
        let chunk = self.writer.close(log.count(), log.hash());
        self.checkpoint_at = log.count() + CHECKPOINT_EVERY;
        self.deliver(chunk);
    }

    fn deliver(&mut self, bytes: Vec<u8>) {
        if self.failed.is_none() {
            match self.sink.send(bytes) {
                Ok(()) => self.delivered = self.writer.chunks(),
                Err(end) => self.failed = Some(end),
            }
        }
    }

    /// Everything of a turn was done: says when to be asked again, or why the capture is over.
    pub fn settle(&mut self, now: Moment, log: &DecisionLog) -> Result<Moment, CaptureEnd> {
        if let Some(end) = self.failed {
            return Err(end);
        }
        if now >= self.until {
            return Err(CaptureEnd::Complete);
        }
        if now >= self.flush_at {
            self.flush(log);
            self.flush_at = now + FLUSH;
        }
        match self.failed {
            Some(end) => Err(end),
            None => Ok(self.flush_at.min(self.until)),
        }
    }

    /// Bytes in memory.
    pub fn kept_bytes(&self) -> usize {
        self.sink.kept().len()
    }

    /// The trace of what has been recorded in memory so far, whole. Between turns; recording goes on.
    pub fn whole(&mut self, log: &DecisionLog) -> Vec<u8> {
        self.flush(log);
        let last = end_chunk(Ended { end: CaptureEnd::Complete, chunks: self.writer.chunks() });
        [self.sink.kept(), &last].concat()
    }

    /// Ends the capture with what has been recorded so far. Returns why it really ended.
    pub fn end(mut self, end: CaptureEnd, log: &DecisionLog) -> CaptureEnd {
        self.flush(log);
        let end = self.failed.unwrap_or(end);
        self.sink.end(Ended { end, chunks: self.delivered });
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::batcher::{Batcher, Outlet};
    use crate::capture::{CHUNKS_MAX, Source, TraceReader, channel, end_chunk, next_number};
    use crate::executor::slot::FilledSlot;
    use crate::mail::{Finished, ToBatcher};
    use crate::scheduler::{Group, QueueLimits, SeatSpec};
    use crate::telemetry::Telemetry;
    use crate::vocab::Refusal;
    use std::sync::Arc;

    struct Nobody;

    impl Outlet for Nobody {
        fn submit(&mut self, _: usize, _: FilledSlot) -> Option<Finished> {
            unreachable!("nothing is asked for")
        }

        fn end(&mut self, _: u16, _: Vec<(TicketKey, Refusal)>) {}
    }

    const START: Moment = Moment(1_000_000_000);

    /// A batcher with nothing to do but a capture.
    fn capturing(time: Duration) -> (Batcher<Nobody>, Source, Arc<Telemetry>) {
        let telemetry = Telemetry::new(&[], 1, 1);
        let seats = SeatSpec::separate(Group::Executors, 1, 1);
        let scheduler = Scheduler::new(QueueLimits::NONE, Vec::new(), &seats);
        let mut batcher = Batcher::new(scheduler, Nobody, &[], 1, Arc::clone(&telemetry));
        let (sink, source) = channel();
        batcher.take(START, ToBatcher::Capture { time, sink });
        (batcher, source, telemetry)
    }

    /// Makes the turns that the batcher asks for, until it asks for none. Returns when the last was.
    fn live(batcher: &mut Batcher<Nobody>) -> Moment {
        let mut now = START;
        while let Some(next) = batcher.turn(now) {
            assert!(next > now, "it sleeps between turns");
            now = next;
        }
        now
    }

    fn counted(telemetry: &Arc<Telemetry>, end: CaptureEnd) -> bool {
        let line = format!("ferry_captures_total{{end=\"{}\"}} 1\n", end.name());
        telemetry.encode().contains(&line)
    }

    fn read(source: &Source) -> TraceReader<std::io::Cursor<Vec<u8>>> {
        let mut bytes: Vec<u8> = source.chunks.try_iter().flat_map(|chunk| chunk.to_vec()).collect();
        bytes.extend(end_chunk(source.ended().expect("it ended")));
        let mut reader = TraceReader::open(std::io::Cursor::new(bytes)).expect("a whole trace");
        while reader.next_event().expect("a whole trace").is_some() {}
        reader
    }

    #[test]
    fn a_capture_ends_by_itself_at_its_time_and_says_each_second_that_it_lives() {
        let (mut batcher, source, telemetry) = capturing(Duration::from_millis(3500));
        assert_eq!(live(&mut batcher), START + Duration::from_millis(3500));
        assert_eq!(source.chunks.len(), 1 + 3 + 1, "the start, three seconds, the end");
        assert_eq!(read(&source).end(), Some(CaptureEnd::Complete));
        assert!(counted(&telemetry, CaptureEnd::Complete));
    }

    #[test]
    fn whoever_falls_behind_gets_what_found_room_as_a_whole_trace() {
        let (mut batcher, source, telemetry) = capturing(Duration::from_secs(500));
        let end = live(&mut batcher);
        // The start took a place, too.
        assert_eq!(end, START + FLUSH * CHUNKS_MAX as u32);
        assert_eq!(read(&source).end(), Some(CaptureEnd::ReaderSlow));
        assert!(counted(&telemetry, CaptureEnd::ReaderSlow));
    }

    #[test]
    fn whoever_goes_away_is_noticed_with_the_next_chunk() {
        let (mut batcher, source, telemetry) = capturing(Duration::from_secs(500));
        drop(source);
        assert_eq!(live(&mut batcher), START + FLUSH);
        assert!(counted(&telemetry, CaptureEnd::ReaderGone));
    }

    #[test]
    fn a_batcher_that_ends_ends_the_capture() {
        let (mut batcher, source, telemetry) = capturing(Duration::from_secs(500));
        batcher.take(START, ToBatcher::Stop);
        assert_eq!(read(&source).end(), Some(CaptureEnd::Stopped));
        assert!(counted(&telemetry, CaptureEnd::Stopped));
    }

    #[test]
    fn another_capture_takes_the_place_of_one_that_nobody_reads() {
        let (mut batcher, first, telemetry) = capturing(Duration::from_secs(500));
        let (sink, second) = channel();
        batcher.take(START + FLUSH, ToBatcher::Capture { time: FLUSH, sink });
        assert_eq!(first.ended().map(|ended| ended.end), Some(CaptureEnd::ReaderGone));
        batcher.turn(START + FLUSH * 3);
        assert_eq!(read(&second).end(), Some(CaptureEnd::Complete));
        assert!(counted(&telemetry, CaptureEnd::ReaderGone) && counted(&telemetry, CaptureEnd::Complete));
    }

    #[test]
    fn the_shadow_records_beside_a_capture_and_is_not_counted_as_one() {
        let (mut batcher, capture, telemetry) = capturing(Duration::from_secs(5));
        let (sink, first) = channel();
        batcher.take(START, ToBatcher::Shadow { time: Duration::from_secs(2), sink });
        let (sink, second) = channel();
        batcher.take(START + FLUSH, ToBatcher::Shadow { time: Duration::from_secs(2), sink });
        assert_eq!(first.ended().map(|ended| ended.end), Some(CaptureEnd::ReaderGone));
        assert_eq!(live(&mut batcher), START + Duration::from_secs(5));
        for source in [capture, second] {
            assert_eq!(read(&source).end(), Some(CaptureEnd::Complete));
        }
        assert!(counted(&telemetry, CaptureEnd::Complete));
        assert!(!counted(&telemetry, CaptureEnd::ReaderGone), "that was no capture");
    }

    #[test]
    fn a_trace_that_is_cut_behind_a_chunk_is_whole_with_an_end_of_its_number() {
        let (mut batcher, source, _) = capturing(Duration::from_millis(3500));
        live(&mut batcher);
        let chunks: Vec<_> = source.chunks.try_iter().take(3).collect();
        let next = next_number(&chunks[2]).expect("a chunk");
        let mut bytes = chunks.concat();
        bytes.extend(end_chunk(Ended { end: CaptureEnd::Complete, chunks: next }));
        let mut reader = TraceReader::open(std::io::Cursor::new(bytes)).expect("a whole trace");
        while reader.next_event().expect("a whole trace").is_some() {}
        assert_eq!((reader.end(), next_number(b"abc")), (Some(CaptureEnd::Complete), None));
    }

    #[test]
    fn captures_are_counted_under_their_own_ends() {
        let names: Vec<&str> = CaptureEnd::ALL.iter().map(|end| end.name()).collect();
        assert_eq!(names, crate::telemetry::CAPTURE_ENDS);
        assert!(CaptureEnd::ALL.iter().enumerate().all(|(at, end)| at == *end as usize));
    }
}
