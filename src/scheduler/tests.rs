//! The scheduler's promises, one by one with a manual clock, and all together against a plain model of it.

use super::*;
use crate::vocab::{Executed, Layout};

const MS: Duration = Duration::from_millis(1);
const US: Duration = Duration::from_micros(1);
const MODEL: ModelHandle = ModelHandle(0);

fn policy() -> Policy {
    Policy {
        kind: PolicyKind::Buckets,
        queue_delay_max: Some(MS),
        fill_waste_max: 0.0,
        ..Policy::new(4, 64, Buckets::new(&[8, 16]).expect("ascending"))
    }
}

fn request() -> Arrival {
    Arrival {
        model: MODEL,
        rows: 1,
        len: 8,
        bytes: 100,
        deadline: None,
        compose: None,
        class: Class::default(),
        tenant: TenantId::default(),
    }
}

/// One executor and one inline seat. Tests ask for batches seat by seat; what they get is taken off the seat at once.
const SEATS: [SeatSpec; 2] = [
    SeatSpec { group: Group::Executors, slots: 1 << 20, device: 0 },
    SeatSpec { group: Group::Inline, slots: 1 << 20, device: 0 },
];

fn seat_of(group: Group) -> usize {
    SEATS.iter().position(|seat| seat.group == group).expect("both are there")
}

fn poll_seat(
    scheduler: &mut Scheduler,
    now: Moment,
    group: Group,
    vacancy: Vacancy,
    members: &mut Vec<TicketId>,
) -> Option<SealedBatch> {
    members.clear();
    scheduler.models.iter_mut().for_each(|queue| queue.hold = None);
    let batch = scheduler.poll_seat(now, seat_of(group), vacancy, members);
    scheduler.seats.seats.iter_mut().for_each(|seat| seat.running.clear());
    batch
}

/// The next moment, as if only executors of these groups were idle.
fn timeout(scheduler: &mut Scheduler, now: Moment, idle: &[Group]) -> Option<Moment> {
    for seat in scheduler.seats.seats.iter_mut().filter(|seat| !idle.contains(&seat.group)) {
        seat.running.push(running(0));
    }
    let next = scheduler.poll_timeout(now);
    scheduler.seats.seats.iter_mut().for_each(|seat| seat.running.clear());
    next
}

fn running(batch: u64) -> Running {
    let zero = Moment::ZERO;
    Running { batch, model: MODEL, sealed_at: zero, started: zero, predicted: 0.0, until: zero, promised: zero }
}

/// A batch of a model comes back.
fn finish(scheduler: &mut Scheduler, now: Moment, model: ModelHandle, rows: u32, service: Duration) {
    let batch = SealedBatch {
        id: u64::MAX,
        model,
        executor: 0,
        rows,
        rows_possible: rows,
        layout: Layout::Padded,
        squares_real: 0,
        padded_len: 8,
        cells_real: 8,
        reason: SealReason::Full,
        sealed_at: now,
        generation: 1,
        predicted: 0,
        objective: Duration::ZERO,
    };
    scheduler.seats.seats[0].running.push(running(batch.id));
    scheduler.handle_finished(now, &batch, service);
}

/// A scheduler and the time that it is told.
struct Rig {
    scheduler: Scheduler,
    now: Moment,
    members: Vec<TicketId>,
}

impl Rig {
    fn new(policies: Vec<Policy>) -> Rig {
        Rig::with_limits(QueueLimits::NONE, policies)
    }

    fn with_limits(limits: QueueLimits, policies: Vec<Policy>) -> Rig {
        Rig { scheduler: Scheduler::new(limits, policies, &SEATS), now: Moment::ZERO, members: Vec::new() }
    }

    fn wait(&mut self, by: Duration) {
        self.now = self.now + by;
    }

    fn now(&self) -> Moment {
        self.now
    }

    fn try_arrive(&mut self, arrival: Arrival) -> Result<TicketId, Refusal> {
        self.scheduler.handle_arrival(self.now, arrival)
    }

    fn arrive(&mut self, arrival: Arrival) -> TicketId {
        self.try_arrive(arrival).expect("it fits")
    }

    fn refused(&mut self, arrival: Arrival) -> Refusal {
        let before = self.scheduler.waiting(MODEL);
        let refusal = self.try_arrive(arrival).expect_err("it must be refused");
        assert_eq!(self.scheduler.waiting(MODEL), before, "a refused request was never queued");
        assert_eq!(refusal.executed, Executed::Never);
        refusal
    }

    fn poll(&mut self, group: Group, vacancy: Vacancy) -> Option<(SealedBatch, Vec<TicketId>)> {
        let mut members = std::mem::take(&mut self.members);
        let batch = poll_seat(&mut self.scheduler, self.now, group, vacancy, &mut members);
        let taken = members.clone();
        self.members = members;
        batch.map(|batch| (batch, taken))
    }

    fn poll_idle(&mut self) -> Option<(SealedBatch, Vec<TicketId>)> {
        self.poll(Group::Executors, Vacancy::Idle)
    }

    fn expect_batch(&mut self) -> (SealedBatch, Vec<TicketId>) {
        self.poll_idle().expect("a batch is due")
    }

    fn expired(&mut self) -> Vec<TicketId> {
        let now = self.now();
        std::iter::from_fn(|| self.scheduler.poll_expired(now)).map(Expired::id).collect()
    }

    fn timeout_when_idle(&mut self) -> Option<Moment> {
        timeout(&mut self.scheduler, self.now, &[Group::Executors, Group::Inline])
    }
}

#[test]
fn without_a_window_nothing_is_held_while_an_executor_is_idle() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), ..policy() }]);
    let id = rig.arrive(request());
    let (batch, members) = rig.expect_batch();
    assert_eq!((batch.reason, batch.rows, members), (SealReason::Idle, 1, vec![id]));
    assert_eq!(rig.poll_idle(), None);
}

#[test]
fn a_lone_request_is_sealed_when_its_promised_wait_is_over() {
    let mut rig = Rig::new(vec![policy()]);
    rig.arrive(request());
    assert_eq!(rig.poll_idle(), None);
    let due = rig.timeout_when_idle().expect("a window is open");
    assert_eq!(due, rig.now() + MS);
    rig.wait(MS - Duration::from_nanos(1));
    assert_eq!(rig.poll_idle(), None);
    rig.wait(Duration::from_nanos(1));
    assert_eq!(rig.expect_batch().0.reason, SealReason::QueueDelay);
}

#[test]
fn the_window_is_measured_from_the_oldest_row() {
    let mut rig = Rig::new(vec![policy()]);
    rig.arrive(request());
    rig.wait(MS / 2);
    rig.arrive(request());
    assert_eq!(rig.timeout_when_idle(), Some(Moment::ZERO + MS));
    rig.wait(MS / 2);
    assert_eq!(rig.expect_batch().0.rows, 2);
}

#[test]
fn time_spent_waiting_for_an_executor_counts_as_waited() {
    let mut rig = Rig::new(vec![policy()]);
    rig.arrive(request());
    rig.wait(MS * 10);
    assert_eq!(rig.expect_batch().0.reason, SealReason::QueueDelay);
}

#[test]
fn a_full_batch_is_not_delayed() {
    let mut rig = Rig::new(vec![policy()]);
    for _ in 0..3 {
        rig.arrive(request());
        assert_eq!(rig.poll_idle(), None);
    }
    rig.arrive(request());
    let (batch, _) = rig.expect_batch();
    assert_eq!((batch.reason, batch.rows, batch.rows_possible), (SealReason::Full, 4, 4));
}

#[test]
fn rows_of_shorter_lanes_make_a_batch_full_as_well() {
    let mut rig = Rig::new(vec![Policy { fill_waste_max: 0.5, ..policy() }]);
    for len in [16, 16, 8] {
        rig.arrive(Arrival { len, ..request() });
        assert_eq!(rig.poll_idle(), None);
    }
    rig.arrive(request());
    let (batch, _) = rig.expect_batch();
    assert_eq!((batch.reason, batch.rows, batch.padded_len, batch.cells_real), (SealReason::Full, 4, 16, 48));
}

#[test]
fn shorter_rows_that_would_waste_too_much_do_not_join() {
    let mut rig = Rig::new(vec![Policy { fill_waste_max: 0.4, ..policy() }]);
    rig.arrive(Arrival { len: 16, ..request() });
    rig.wait(US);
    rig.arrive(request());
    rig.wait(MS);
    assert_eq!(rig.expect_batch().0.padded_len, 16);
    assert_eq!(rig.expect_batch().0.padded_len, 8);
}

#[test]
fn a_batch_never_has_more_padded_cells_than_its_budget() {
    let mut rig = Rig::new(vec![Policy { rows_max: 100, cells_max: 40, ..policy() }]);
    for _ in 0..3 {
        rig.arrive(Arrival { len: 9, ..request() });
    }
    let (batch, _) = rig.expect_batch();
    // Two rows padded to 16 are 32 cells; a third would make 48, although the real lengths add up to 27.
    assert_eq!((batch.rows, batch.rows_possible, batch.cells_padded(), batch.cells_real), (2, 2, 32, 18));
}

#[test]
fn a_batch_never_has_more_rows_than_its_limit() {
    let mut rig = Rig::new(vec![Policy { rows_max: 3, ..policy() }]);
    for _ in 0..7 {
        rig.arrive(request());
    }
    rig.wait(MS);
    let rows: Vec<u32> = std::iter::from_fn(|| rig.poll_idle()).map(|(batch, _)| batch.rows).collect();
    assert_eq!(rows, [3, 3, 1]);
}

#[test]
fn a_row_that_does_not_fit_is_looked_past_and_goes_first_next_time() {
    let mut rig = Rig::new(vec![policy()]);
    let a = rig.arrive(Arrival { rows: 3, ..request() });
    let b = rig.arrive(Arrival { rows: 3, ..request() });
    let c = rig.arrive(request());
    assert_eq!(rig.expect_batch().1, [a, c]);
    assert_eq!(rig.poll_idle(), None);
    rig.wait(MS);
    assert_eq!(rig.expect_batch().1, [b]);
}

#[test]
fn looking_past_rows_has_an_end() {
    let mut rig = Rig::new(vec![policy()]);
    let first = rig.arrive(Arrival { rows: 3, ..request() });
    for _ in 0..1000 {
        rig.arrive(Arrival { rows: 2, ..request() });
    }
    rig.arrive(request());
    assert_eq!(rig.expect_batch().1, [first]);
}

#[test]
fn what_fits_no_batch_is_refused_at_once() {
    let mut rig = Rig::new(vec![Policy { cells_max: 40, ..policy() }]);
    for arrival in
        [Arrival { rows: 5, ..request() }, Arrival { len: 17, ..request() }, Arrival { rows: 3, len: 16, ..request() }]
    {
        assert_eq!(rig.refused(arrival).code, Code::TooLarge);
    }
    assert_eq!(rig.refused(Arrival { rows: 0, ..request() }).code, Code::InvalidArgument);
    assert_eq!(rig.refused(Arrival { model: ModelHandle(9), ..request() }).code, Code::NotFound);
    assert!(rig.scheduler.is_empty());
}

#[test]
fn what_may_wait_is_bounded_in_rows_cells_and_bytes_of_server_and_model() {
    let bounds = [
        QueueLimits { rows_max: 3, ..QueueLimits::NONE },
        QueueLimits { cells_max: 3 * 8, ..QueueLimits::NONE },
        QueueLimits { bytes_max: 300, ..QueueLimits::NONE },
    ];
    for bound in bounds {
        let of_server = Rig::with_limits(bound, vec![policy()]);
        let of_model = Rig::new(vec![Policy { queue: bound, ..policy() }]);
        for mut rig in [of_server, of_model] {
            for _ in 0..3 {
                rig.arrive(request());
            }
            let refusal = rig.refused(request());
            assert_eq!(refusal.code, Code::Overloaded);
            assert!(refusal.retry_after_ms >= 1, "{refusal:?}");
            let too_large = rig.refused(Arrival { rows: 4, bytes: 400, ..request() });
            assert_eq!(too_large.code, Code::TooLarge, "a retry could not help it");
            rig.wait(MS);
            rig.expect_batch();
            rig.arrive(request());
        }
    }
}

#[test]
fn near_a_bound_lower_classes_are_refused_first_and_the_highest_may_fill_it() {
    let bounds = [
        QueueLimits { rows_max: 100, ..QueueLimits::NONE },
        QueueLimits { cells_max: 100 * 8, ..QueueLimits::NONE },
        QueueLimits { bytes_max: 100 * 100, ..QueueLimits::NONE },
    ];
    let of_class = |class: u8| Arrival { class: Class::from_priority(class), ..request() };
    for bound in bounds {
        for mut rig in [Rig::with_limits(bound, vec![policy()]), Rig::new(vec![Policy { queue: bound, ..policy() }])] {
            for (class, filled) in [(2, 85), (1, 95), (0, 100)] {
                while rig.scheduler.waiting(MODEL).0 < filled {
                    rig.arrive(of_class(class));
                }
                // The class that has filled its share and those below are refused; the next higher one goes on.
                for refused in class..3 {
                    let refusal = rig.refused(of_class(refused));
                    assert_eq!(refusal.code, Code::Overloaded, "{filled}");
                    assert!(refusal.retry_after_ms >= 1);
                }
            }
        }
    }
}

#[test]
fn the_hint_when_to_come_back_follows_the_pace_of_the_queue() {
    let bound = QueueLimits { rows_max: 4, ..QueueLimits::NONE };
    let mut rig = Rig::with_limits(bound, vec![policy()]);
    finish(&mut rig.scheduler, rig.now, MODEL, 1, MS * 50);
    for _ in 0..4 {
        rig.arrive(request());
    }
    assert_eq!(rig.refused(request()).retry_after_ms, 4 * 50);
}

#[test]
fn a_deadline_that_is_over_on_arrival_is_refused() {
    let mut rig = Rig::new(vec![policy()]);
    rig.wait(MS);
    let refusal = rig.refused(Arrival { deadline: Some(rig.now()), ..request() });
    assert_eq!((refusal.code, refusal.stage), (Code::DeadlineExceeded, Stage::Arrival));
}

#[test]
fn a_waiting_ticket_expires_at_its_deadline_and_not_before() {
    let mut rig = Rig::new(vec![policy()]);
    let late = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS * 3), ..request() });
    let soon = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS * 2), ..request() });
    // No executor is idle: windows do not matter, deadlines do.
    assert_eq!(timeout(&mut rig.scheduler, rig.now, &[]), Some(Moment::ZERO + MS * 2));
    rig.wait(MS * 2 - Duration::from_nanos(1));
    assert_eq!(rig.expired(), []);
    rig.wait(Duration::from_nanos(1));
    assert_eq!(rig.expired(), [soon]);
    assert_eq!(timeout(&mut rig.scheduler, rig.now, &[]), Some(Moment::ZERO + MS * 3));
    rig.wait(MS);
    assert_eq!(rig.expired(), [late]);
    assert_eq!(rig.timeout_when_idle(), None);
    assert!(rig.scheduler.is_empty());
}

#[test]
fn the_oldest_ticket_of_a_lane_expires_like_any_other() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 10), ..policy() }]);
    let first = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS), ..request() });
    let second = rig.arrive(request());
    rig.wait(MS * 10);
    assert_eq!(rig.expired(), [first]);
    assert_eq!(rig.expect_batch().1, [second]);
}

#[test]
fn a_deadline_inside_the_window_ends_the_window_in_time_for_the_batch() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 100), ..policy() }]);
    finish(&mut rig.scheduler, rig.now, MODEL, 1, MS * 8);
    rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS * 50), ..request() });
    assert_eq!(rig.poll_idle(), None);
    let start = rig.timeout_when_idle().expect("a deadline");
    assert!(start + MS * 8 < Moment::ZERO + MS * 50, "{start:?}");
    rig.wait(start.since(Moment::ZERO));
    assert_eq!(rig.expect_batch().0.reason, SealReason::Deadline);
}

#[test]
fn a_deadline_behind_the_oldest_row_ends_the_window_as_well() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 100), ..policy() }]);
    rig.arrive(request());
    rig.wait(MS);
    rig.arrive(Arrival { deadline: Some(rig.now() + MS * 10), ..request() });
    assert_eq!(rig.poll_idle(), None);
    let start = rig.timeout_when_idle().expect("a deadline");
    assert!(start > rig.now() && start < rig.now() + MS * 10, "{start:?}");
    rig.wait(start.since(rig.now()));
    assert_eq!(rig.expect_batch().0.rows, 2);
}

#[test]
fn a_deadline_that_left_its_lane_no_longer_ends_the_window() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 100), ..policy() }]);
    rig.arrive(request());
    let urgent = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS * 10), ..request() });
    assert!(rig.scheduler.handle_cancel(urgent));
    rig.wait(MS * 10);
    assert_eq!(rig.poll_idle(), None);
    assert_eq!(rig.timeout_when_idle(), Some(Moment::ZERO + MS * 100));
}

#[test]
fn a_deadline_shorter_than_a_wake_up_is_not_waited_for() {
    let mut rig = Rig::new(vec![policy()]);
    rig.arrive(Arrival { deadline: Some(Moment::ZERO + US * 300), ..request() });
    assert_eq!(rig.expect_batch().0.reason, SealReason::Deadline);
}

#[test]
fn a_ticket_can_be_cancelled_anywhere_and_leaves_once() {
    for leaver in 0..4 {
        let mut rig = Rig::new(vec![policy()]);
        let mut ids: Vec<TicketId> = (0..4).map(|_| rig.arrive(request())).collect();
        let gone = ids.remove(leaver);
        assert!(rig.scheduler.handle_cancel(gone));
        assert!(!rig.scheduler.handle_cancel(gone));
        assert_eq!(rig.scheduler.waiting(MODEL), (3, 24, 300));
        rig.wait(MS);
        assert_eq!(rig.expect_batch().1, ids);
        assert!(!rig.scheduler.handle_cancel(ids[0]), "a sealed ticket is not waiting");
        assert_eq!(rig.scheduler.waiting(MODEL), (0, 0, 0));
    }
}

#[test]
fn a_number_that_was_reused_does_not_inherit_the_deadline_of_its_last_user() {
    let mut rig = Rig::new(vec![policy()]);
    let gone = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS), ..request() });
    assert!(rig.scheduler.handle_cancel(gone));
    let next = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS * 5), ..request() });
    assert_eq!(next, gone);
    rig.wait(MS * 4);
    assert_eq!(rig.expired(), []);
}

#[test]
fn a_storm_of_cancels_leaves_no_deadlines_behind() {
    let mut rig = Rig::new(vec![policy()]);
    let lasting = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS), ..request() });
    for round in 0..1000 {
        for _ in 0..100 {
            let id = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS * 1000), ..request() });
            assert!(rig.scheduler.handle_cancel(id));
        }
        assert_eq!(timeout(&mut rig.scheduler, rig.now, &[]), Some(Moment::ZERO + MS));
        let entries = rig.scheduler.models[0].due.len();
        assert_eq!(entries, 1, "entries for one waiting ticket in round {round}");
    }
    rig.wait(MS);
    assert_eq!(rig.expired(), [lasting]);
}

#[test]
fn a_spare_slot_takes_only_a_full_batch() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), ..policy() }]);
    for _ in 0..3 {
        rig.arrive(request());
    }
    assert_eq!(rig.poll(Group::Executors, Vacancy::Spare), None);
    rig.scheduler.drain();
    assert_eq!(rig.poll(Group::Executors, Vacancy::Spare), None);
    rig.arrive(request());
    let (batch, _) = rig.poll(Group::Executors, Vacancy::Spare).expect("four rows");
    assert_eq!(batch.reason, SealReason::Full);
}

#[test]
fn a_busy_lane_does_not_starve_its_neighbour() {
    // Full batches of the short lane arrive all the time, so the executor is never idle, only spare.
    let mut rig = Rig::new(vec![policy()]);
    finish(&mut rig.scheduler, rig.now, MODEL, 1, MS);
    let lone = rig.arrive(Arrival { len: 16, ..request() });
    let mut spare_batches = 0;
    loop {
        for _ in 0..4 {
            rig.arrive(request());
        }
        rig.wait(MS);
        if rig.poll(Group::Executors, Vacancy::Spare).is_none() {
            break;
        }
        spare_batches += 1;
        assert!(spare_batches < 10, "the lone row is overtaken for ever");
    }
    assert_eq!(rig.expect_batch().1, [lone]);
}

#[test]
fn the_lane_that_has_waited_longest_goes_first_whatever_its_length_or_model() {
    let other = ModelHandle(1);
    let mut rig = Rig::new(vec![policy(), policy()]);
    let first = rig.arrive(Arrival { len: 16, ..request() });
    rig.wait(US);
    let second = rig.arrive(Arrival { model: other, ..request() });
    rig.wait(US);
    for _ in 0..4 {
        rig.arrive(request());
    }
    rig.wait(MS);
    assert_eq!(rig.expect_batch().1, [first]);
    let (batch, members) = rig.expect_batch();
    assert_eq!((batch.model, members), (other, vec![second]));
    assert_eq!(rig.expect_batch().0.reason, SealReason::Full);
}

#[test]
fn models_of_another_group_are_left_to_its_executors() {
    let inline = Policy { group: Group::Inline, queue_delay_max: Some(Duration::ZERO), ..policy() };
    let mut rig = Rig::new(vec![inline]);
    rig.arrive(request());
    assert_eq!(rig.poll_idle(), None);
    assert_eq!(timeout(&mut rig.scheduler, rig.now, &[Group::Executors]), None);
    assert!(rig.poll(Group::Inline, Vacancy::Idle).is_some());
}

fn composed(tag: u64, rows: u32) -> Arrival {
    Arrival { compose: Some(Compose { tag, rows }), ..request() }
}

#[test]
fn a_composition_is_exactly_its_members() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), fill_waste_max: 1.0, ..policy() }]);
    let a = rig.arrive(composed(7, 3));
    let b = rig.arrive(Arrival { len: 12, ..composed(7, 3) });
    assert_eq!(rig.poll_idle(), None, "one row is missing");
    let stranger = rig.arrive(request());
    let other_tag = rig.arrive(composed(8, 2));
    let c = rig.arrive(composed(7, 3));
    let (batch, members) = rig.expect_batch();
    assert_eq!((batch.reason, batch.rows, batch.padded_len), (SealReason::Composed, 3, 16));
    assert_eq!(members, [a, b, c]);
    assert_eq!(rig.expect_batch().1, [stranger]);
    assert_eq!(rig.poll_idle(), None);
    assert!(rig.scheduler.handle_cancel(other_tag));
    assert!(rig.scheduler.is_empty());
}

#[test]
fn a_composition_that_cannot_be_is_refused() {
    let mut rig = Rig::new(vec![policy()]);
    assert_eq!(rig.refused(composed(7, 0)).code, Code::InvalidArgument);
    assert_eq!(rig.refused(composed(7, 5)).code, Code::InvalidArgument, "more rows than a batch has");
    rig.arrive(composed(7, 3));
    assert_eq!(rig.refused(composed(7, 2)).code, Code::InvalidArgument, "another count than before");
    assert_eq!(rig.refused(Arrival { rows: 3, ..composed(7, 3) }).code, Code::InvalidArgument, "one row too many");
}

#[test]
fn an_incomplete_composition_expires() {
    let mut rig = Rig::new(vec![policy()]);
    let a = rig.arrive(composed(7, 3));
    let b = rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS), ..composed(7, 3) });
    rig.wait(MS);
    assert_eq!(rig.expired(), [b], "a member's own deadline holds");
    rig.wait(compose::WAIT_MAX - MS);
    assert_eq!(rig.expired(), [a]);
    assert!(rig.scheduler.is_empty());
    rig.arrive(composed(7, 2));
}

#[test]
fn a_complete_composition_that_loses_a_member_waits_for_another() {
    let mut rig = Rig::new(vec![policy()]);
    rig.arrive(composed(7, 2));
    let leaver = rig.arrive(composed(7, 2));
    assert!(rig.scheduler.handle_cancel(leaver));
    assert_eq!(rig.poll_idle(), None);
    rig.arrive(composed(7, 2));
    assert_eq!(rig.expect_batch().0.rows, 2);
}

#[test]
fn a_complete_composition_gets_an_idle_executor_although_full_batches_wait() {
    let mut rig = Rig::new(vec![policy()]);
    for _ in 0..4 {
        rig.arrive(request());
    }
    rig.arrive(composed(7, 1));
    assert_eq!(rig.poll(Group::Executors, Vacancy::Spare), None);
    assert_eq!(rig.expect_batch().0.reason, SealReason::Composed);
}

#[test]
fn drain_releases_held_rows() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 1000), ..policy() }]);
    rig.arrive(request());
    assert_eq!(rig.poll_idle(), None);
    rig.scheduler.drain();
    assert_eq!(rig.expect_batch().0.reason, SealReason::Drain);
    rig.arrive(request());
    assert_eq!(rig.expect_batch().0.reason, SealReason::Drain, "what was accepted before is still on its way");
}

#[test]
fn a_new_window_holds_for_rows_that_wait_already() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 1000), ..policy() }]);
    rig.arrive(request());
    rig.wait(MS);
    assert_eq!(rig.poll_idle(), None);
    let shorter = Policy { queue_delay_max: Some(MS), ..policy() };
    assert_eq!(rig.scheduler.set_policy(MODEL, shorter), Ok(2));
    assert_eq!(rig.expect_batch().0.reason, SealReason::QueueDelay);
}

#[test]
fn books_that_do_not_add_up_are_noticed() {
    type Drift = fn(&mut Scheduler);
    let drifts: [(&str, Drift); 5] = [
        ("rows", |scheduler| scheduler.models[0].totals.rows += 1),
        ("payload bytes", |scheduler| scheduler.models[0].totals.bytes -= 1),
        ("server", |scheduler| scheduler.totals.cells += 8),
        ("deadlines", |scheduler| {
            scheduler.models[0]
                .due
                .first()
                .map(|(_, id)| scheduler.tickets[id].due_at = ticket::NONE)
                .expect("one waits");
        }),
        ("lane", |scheduler| {
            let id = scheduler.tickets.of(MODEL).next().expect("one waits");
            scheduler.tickets[id].rows += 1;
        }),
    ];
    for (what, drift) in drifts {
        let mut rig = Rig::new(vec![policy()]);
        rig.arrive(Arrival { deadline: Some(Moment::ZERO + MS), ..request() });
        rig.arrive(Arrival { len: 16, ..request() });
        assert_eq!(rig.scheduler.audit(), Ok(()));
        drift(&mut rig.scheduler);
        let said = rig.scheduler.audit().expect_err("planted");
        assert!(said.contains(what) || what == "lane", "{what}: {said}");
    }
}

#[test]
fn a_policy_that_would_strand_a_waiting_request_is_refused_and_changes_nothing() {
    let mut rig = Rig::new(vec![policy()]);
    rig.arrive(Arrival { rows: 4, ..request() });
    let coarser = Policy { cells_max: 16, buckets: Buckets::new(&[16]).expect("ascending"), ..policy() };
    let smaller = Policy { rows_max: 3, ..policy() };
    for bad in [coarser, smaller] {
        let refusal = rig.scheduler.set_policy(MODEL, bad).expect_err("4 rows of 8 fit no batch of it");
        assert!(refusal.message.contains("4 rows of length 8"), "{refusal}");
    }
    assert_eq!((rig.scheduler.policy(MODEL), rig.scheduler.generation(MODEL)), (&policy(), 1));
    rig.expect_batch();
}

#[test]
fn what_waits_is_counted_in_the_cells_of_the_new_buckets() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 1000), ..policy() }]);
    rig.arrive(Arrival { rows: 3, ..request() });
    assert_eq!(rig.scheduler.waiting(MODEL).1, 24);
    let coarse = Policy { buckets: Buckets::new(&[16]).expect("ascending"), ..rig.scheduler.policy(MODEL).clone() };
    assert_eq!(rig.scheduler.set_policy(MODEL, coarse), Ok(2));
    assert_eq!((rig.scheduler.waiting(MODEL).1, rig.scheduler.audit()), (48, Ok(())));
}

#[test]
fn coarser_buckets_alone_can_strand_a_request_too() {
    let fine = Policy { rows_max: 8, ..policy() };
    let mut rig = Rig::new(vec![fine.clone()]);
    rig.arrive(Arrival { rows: 8, ..request() });
    let coarse = Policy { buckets: Buckets::new(&[16]).expect("ascending"), ..fine };
    assert!(rig.scheduler.set_policy(MODEL, coarse).is_err(), "64 cells hold 4 rows of 16");
    rig.expect_batch();
}

#[test]
fn a_policy_that_would_strand_a_composition_is_refused() {
    let mut rig = Rig::new(vec![policy()]);
    rig.arrive(composed(7, 3));
    let smaller = Policy { rows_max: 2, ..policy() };
    assert!(rig.scheduler.set_policy(MODEL, smaller).is_err());
    rig.arrive(composed(7, 3));
    rig.arrive(composed(7, 3));
    assert_eq!(rig.expect_batch().0.rows, 3);
}

/// A model of lengths up to 512 whose buckets the scheduler chooses, three at most.
fn automatic() -> Policy {
    let buckets = Buckets::new(&[512]).expect("ascending");
    Policy { edges: Edges::Auto, shapes_max: 3, ..Policy::new(32, 32 * 512, buckets) }
}

#[test]
fn automatic_buckets_follow_the_lengths_that_come_and_are_left_alone_while_little_is_gained() {
    let mut rig = Rig::new(vec![automatic()]);
    rig.wait(MS * 60_000);
    assert_eq!(rig.scheduler.poll_edges(rig.now()), None, "nothing was seen");
    for _ in 0..40 {
        for len in [10, 20, 20, 30] {
            rig.arrive(Arrival { rows: 32, len, ..request() });
        }
        while rig.poll_idle().is_some() {}
    }
    rig.wait(MS * 29_000);
    assert_eq!(rig.scheduler.poll_edges(rig.now()), None, "too early");
    rig.wait(MS * 1000);
    rig.arrive(Arrival { len: 20, ..request() });
    let change = rig.scheduler.poll_edges(rig.now()).expect("one bucket of 512 pads nearly all");
    // Two for what came; the longest stays.
    assert_eq!((change.from.lens(), change.to.lens(), change.generation), (&[512][..], &[20, 30, 512][..], 2));
    assert_eq!(rig.scheduler.policy(MODEL).buckets, change.to);
    assert_eq!(rig.expect_batch().0.padded_len, 20, "also what waited is padded to the new buckets");
    assert_eq!(rig.scheduler.poll_edges(rig.now()), None);
    rig.wait(MS * 31_000);
    assert_eq!(rig.scheduler.poll_edges(rig.now()), None, "they are the best already");
    assert_eq!(rig.scheduler.generation(MODEL), 2);
}

#[test]
fn buckets_given_by_hand_are_never_touched() {
    let mut rig = Rig::new(vec![Policy { edges: Edges::Given, ..automatic() }]);
    for _ in 0..100 {
        rig.arrive(Arrival { rows: 32, len: 10, ..request() });
        while rig.poll_idle().is_some() {}
    }
    rig.wait(MS * 100_000);
    assert_eq!(rig.scheduler.poll_edges(rig.now()), None);
    assert_eq!(rig.scheduler.generation(MODEL), 1);
}

#[test]
fn a_policy_that_becomes_automatic_has_its_buckets_at_once() {
    let given = Policy { edges: Edges::Given, buckets: Buckets::geometric(512), ..automatic() };
    let mut rig = Rig::new(vec![given.clone()]);
    let auto = given.with([("buckets", "auto"), ("shapes_max", "5")]).expect("knobs");
    assert_eq!(rig.scheduler.set_policy(MODEL, auto), Ok(2));
    let chosen = rig.scheduler.policy(MODEL).buckets.clone();
    assert_eq!((chosen.len(), chosen.longest()), (5, 512));
    let fewer = rig.scheduler.policy(MODEL).with([("shapes_max", "2")]).expect("a knob");
    assert_eq!(rig.scheduler.set_policy(MODEL, fewer), Ok(3));
    assert_eq!(rig.scheduler.policy(MODEL).buckets.len(), 2);
}

#[test]
fn what_was_held_shed_and_refused_is_counted() {
    let mut rig = Rig::new(vec![Policy { kind: PolicyKind::Cost, queue_delay_max: None, ..policy() }]);
    let batch = rig.scheduler.verdicts(MODEL);
    assert_eq!(batch, VerdictCounts::default());
    for _ in 0..50 {
        rig.scheduler.prime(MODEL, 4, 16, MS * 10);
    }
    rig.arrive(request());
    let hopeless = Arrival { deadline: Some(rig.now() + MS), ..request() };
    rig.refused(hopeless);
    assert_eq!(rig.scheduler.verdicts(MODEL).refused, 1);
    assert_eq!(rig.scheduler.log().last(1).next().map(|decision| decision.verdict), Some(Verdict::Refused));
}

const LOWEST: Class = Class::ALL[Class::COUNT - 1];

/// Twice what an executor can do, of the lowest class with 100 ms each, for so long: rows end to end, ten to a batch of 10 ms.
/// How many were refused, and the most that waited.
fn overloaded(rig: &mut Rig, rounds: u32) -> (u32, u64) {
    let (mut refused, mut most) = (0, 0);
    for _ in 0..rounds {
        for _ in 0..20 {
            let arrival = Arrival { class: LOWEST, deadline: Some(rig.now() + MS * 100), ..request() };
            match rig.try_arrive(arrival) {
                Ok(_) => most = most.max(rig.scheduler.waiting(MODEL).0),
                Err(refusal) => {
                    assert_eq!((refusal.code, refusal.executed), (Code::Overloaded, Executed::Never));
                    assert!(refusal.message.contains("does not get shorter"), "{refusal:?}");
                    refused += 1;
                }
            }
        }
        rig.expect_batch();
        rig.wait(MS * 10);
        rig.expired();
    }
    (refused, most)
}

fn end_to_end() -> Policy {
    let policy = Policy { kind: PolicyKind::Cost, can_pack: true, layout: Layout::Packed, rows_max: 10, ..policy() };
    policy.with([("overload_admission", "0.25")]).expect("a knob")
}

#[test]
fn a_queue_that_stands_is_kept_short_and_only_for_those_whom_it_makes_late() {
    let mut rig = Rig::new(vec![end_to_end()]);
    let (refused, most) = overloaded(&mut rig, 7);
    assert!(refused == 0 && most > 60, "what may be a burst is taken: {refused} refused, {most} waited");
    let (refused, _) = overloaded(&mut rig, 50);
    assert!(refused > 400, "{refused} of 1,000");
    // A quarter of the slack is 25 ms, 20 rows; and three of five are refused, which makes it three tenths less.
    let (_, most) = overloaded(&mut rig, 50);
    assert!((14..=16).contains(&most), "{most}");
    let asked =
        |rig: &Rig, slack: Duration, class: Class| Arrival { class, deadline: Some(rig.now() + slack), ..request() };
    while rig.scheduler.waiting(MODEL).0 < 30 {
        rig.arrive(asked(&rig, MS * 100, Class::default()));
    }
    let refusal = rig.refused(asked(&rig, MS * 100, LOWEST));
    // Eight rows went into each batch of 10 ms: 30 take 37.5, of which it may wait 17.5.
    assert!((19..=21).contains(&refusal.retry_after_ms), "{refusal:?}");
    rig.arrive(asked(&rig, MS * 10_000, LOWEST));
    rig.arrive(asked(&rig, MS * 30, Class::default()));
    rig.arrive(Arrival { deadline: None, ..request() });
    rig.scheduler.audit().expect("the books are right");
}

#[test]
fn padded_rows_wait_for_as_long_as_they_may_however_many_are_refused() {
    let mut rig = Rig::new(vec![Policy { layout: Layout::Padded, ..end_to_end() }]);
    let refused = overloaded(&mut rig, 57).0;
    let (_, most) = overloaded(&mut rig, 50);
    assert!(refused > 400 && (20..=22).contains(&most), "{refused} refused, {most} waited");
}

#[test]
fn a_tenant_with_little_in_a_standing_queue_does_not_open_it_for_the_one_that_fills_it() {
    // Fair admission is off: it refuses the heaviest in its own way.
    let mut rig = Rig::new(vec![end_to_end().with([("fair_admission", "0")]).expect("a knob")]);
    let mut waited = Vec::new();
    for _ in 0..100 {
        let light = Arrival { tenant: TenantId(9), deadline: Some(rig.now() + MS * 100), class: LOWEST, ..request() };
        rig.arrive(light);
        waited.push(overloaded(&mut rig, 1).1);
    }
    // The beginning may be a burst, and what came with it may expire.
    assert!(waited[40..].iter().all(|most| *most <= 22), "{waited:?}");
}

#[test]
fn tenants_that_share_a_place_are_refused_by_what_waits_in_it() {
    let mut tenants = tenants::Tenants::new();
    for tenant in 0..tenants::PLACES as u16 {
        tenants.arrive(TenantId(tenant), 10);
    }
    // No place is free: it counts as the last.
    tenants.arrive(TenantId(900), 5);
    assert_eq!(tenants.waiting_of(TenantId(900)), (15, tenants::PLACES));
    assert_eq!(tenants.waiting_of(TenantId(3)), (10, tenants::PLACES));
}

#[test]
fn a_tenant_with_little_in_a_standing_queue_is_let_in() {
    let mut rig = Rig::new(vec![end_to_end()]);
    overloaded(&mut rig, 60);
    while rig.scheduler.waiting(MODEL).0 < 40 {
        rig.arrive(Arrival { deadline: Some(rig.now() + MS * 100), ..request() });
    }
    let hurried =
        |rig: &Rig, tenant| Arrival { class: LOWEST, tenant, deadline: Some(rig.now() + MS * 100), ..request() };
    rig.refused(hurried(&rig, TenantId::default()));
    let _ = rig.arrive(hurried(&rig, TenantId(9)));
}

#[test]
fn the_knob_leaves_a_standing_queue_to_its_deadlines() {
    let mut rig = Rig::new(vec![end_to_end().with([("overload_admission", "0")]).expect("a knob")]);
    let (refused, most) = overloaded(&mut rig, 100);
    assert!(refused == 0 && most > 90, "{refused} refused, {most} waited");
}

#[test]
fn policies_that_are_kept_to_compare_with_refuse_behind_a_standing_queue_where_they_are_told_to() {
    for kind in PolicyKind::ALL.into_iter().filter(|kind| *kind != PolicyKind::Cost) {
        let told = Policy { kind, ..end_to_end() };
        let untold = told.with([("overload_admission", "auto")]).expect("a knob");
        let [with, without] = [told, untold].map(|policy| {
            let mut rig = Rig::new(vec![policy]);
            let refused = overloaded(&mut rig, 57).0;
            let (_, most) = overloaded(&mut rig, 50);
            rig.scheduler.audit().expect("the books are right");
            (refused, most)
        });
        assert!(with.0 > 400 && (14..=16).contains(&with.1), "{kind}: {with:?}");
        assert!(without.0 == 0 && without.1 > 90, "{kind}: {without:?}");
    }
}

#[test]
fn what_a_batch_holds_is_what_the_division_says() {
    for (rows_max, cells_max) in [(1, 1), (4, 100), (65_536, 1 << 40), (7, 63)] {
        let policy = Policy { rows_max, cells_max, ..policy() };
        for len in [0, 1, 2, 9, 16, 25, 26, 100, 101, u32::MAX] {
            for rows in [1, 2, 3, 4, 5, 7, 8, 65_536, u32::MAX] {
                assert_eq!(policy.holds(rows, len), rows <= policy.rows_at(len), "{rows} of {len}");
            }
        }
    }
}

#[test]
fn batches_are_numbered_from_one() {
    let mut rig = Rig::new(vec![Policy { rows_max: 1, ..policy() }]);
    rig.arrive(request());
    rig.arrive(request());
    assert_eq!((rig.expect_batch().0.id, rig.expect_batch().0.id), (1, 2));
}

/// Each batch alone on the executor it is given to; the second takes three times as long as the first.
#[test]
fn of_executors_that_differ_each_is_known_and_the_fastest_of_the_idle_ones_goes_first() {
    let seats = SeatSpec::separate(Group::Executors, 2, 1);
    let policy = Policy { kind: PolicyKind::Cost, rows_max: 4, ..policy() };
    let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![policy], &seats);
    let (mut now, mut members) = (Moment::ZERO, Vec::new());
    let mut given = Vec::new();
    for round in 0..200u32 {
        let mut batches = Vec::new();
        // One batch at a time at the end: then there is a choice.
        for _ in 0..if round < 150 { 2 } else { 1 } {
            scheduler.handle_arrival(now, Arrival { rows: 1 + round % 4, ..request() }).expect("it fits");
            batches.extend(scheduler.poll_batch(now, &mut members));
        }
        for batch in batches {
            let alone = Duration::from_micros(900 + 100 * u64::from(batch.rows));
            let service = alone * if batch.executor == 0 { 3 } else { 1 };
            now = now + service;
            scheduler.handle_finished(now, &batch, service);
            given.push((round, batch.executor));
        }
    }
    let cost = scheduler.cost(MODEL);
    let ratio = cost.on(0).predict(4, 8) / cost.on(1).predict(4, 8);
    assert!((ratio - 3.0).abs() < 0.4, "{ratio}");
    assert!((cost.on(1).predict(4, 8) / 1.3e6 - 1.0).abs() < 0.1, "{}", cost.on(1).predict(4, 8));
    assert!(cost.error() < 0.1, "a difference between executors is no error: {}", cost.error());
    assert!(given.iter().any(|(_, executor)| *executor == 0), "both were used while both had something to do");
    let alone = |(round, executor): &(u32, u16)| *round < 150 || *executor == 1;
    assert!(given.iter().all(alone), "alone, a batch goes to the fast one");
}

/// A plain model of the scheduler: a list of who waits, searched from end to end. Each step of a random run is done by
/// both, and whatever the scheduler says is checked against the list.
mod against_a_plain_model {
    use super::*;
    use proptest::prelude::*;

    /// All batches take this long, so that the learned mean is known.
    const SERVICE: Duration = Duration::from_micros(800);

    #[derive(Clone, Debug)]
    enum Step {
        Advance(u64),
        Arrive { model: u16, rows: u32, len: u32, bytes: u64, deadline_us: Option<u64>, compose: Option<(u64, u32)> },
        Cancel(prop::sample::Index),
        Expire,
        Batch { inline: bool, spare: bool },
        Finish(u16),
        SetDelay { model: u16, delay_us: u64 },
        Drain,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let compose = prop_oneof![9 => Just(None), 1 => (1..3u64, 1..4u32).prop_map(Some)];
        let deadline = prop_oneof![Just(None), (0..4000u64).prop_map(Some)];
        let arrive = (0..3u16, 0..6u32, 0..20u32, 0..50u64, deadline, compose).prop_map(
            |(model, rows, len, bytes, deadline_us, compose)| Step::Arrive {
                model,
                rows,
                len,
                bytes,
                deadline_us,
                compose,
            },
        );
        let step = prop_oneof![
            20 => arrive,
            8 => (0..1500u64).prop_map(Step::Advance),
            5 => any::<prop::sample::Index>().prop_map(Step::Cancel),
            6 => Just(Step::Expire),
            12 => (any::<bool>(), any::<bool>()).prop_map(|(inline, spare)| Step::Batch { inline, spare }),
            2 => (0..3u16).prop_map(Step::Finish),
            1 => (0..3u16, 0..2000u64).prop_map(|(model, delay_us)| Step::SetDelay { model, delay_us }),
            1 => Just(Step::Drain),
        ];
        prop::collection::vec(step, 1..120)
    }

    fn policies() -> impl Strategy<Value = Vec<Policy>> {
        let lens = prop_oneof![Just(vec![16]), Just(vec![8, 16]), Just(vec![4, 6, 8, 12, 16]),];
        let queue = (3..40u64, 30..500u64, 50..900u64).prop_map(|(rows_max, cells_max, bytes_max)| QueueLimits {
            rows_max,
            cells_max,
            bytes_max,
        });
        let delay = prop_oneof![Just(0u64), 1..2000u64];
        let one = (1..6u32, 16..100u64, delay, lens, 0.0..1.0f64, any::<bool>(), queue).prop_map(
            |(rows_max, cells_max, delay_us, lens, fill_waste_max, inline, queue)| Policy {
                kind: PolicyKind::Buckets,
                queue_delay_max: Some(US * delay_us as u32),
                fill_waste_max,
                group: if inline { Group::Inline } else { Group::Executors },
                queue,
                // Executor time counts for nothing: the oldest row decides between models.
                weight: f64::INFINITY,
                ..Policy::new(rows_max, cells_max, Buckets::new(&lens).expect("ascending"))
            },
        );
        prop::collection::vec(one, 1..4)
    }

    #[derive(Clone, Debug)]
    struct Waiting {
        id: TicketId,
        arrival: Arrival,
        admitted_at: Moment,
        /// The effective one: compositions have one of their own.
        deadline: Option<Moment>,
        bucket_len: u32,
    }

    struct World {
        scheduler: Scheduler,
        limits: QueueLimits,
        policies: Vec<Policy>,
        finished: Vec<bool>,
        /// In order of admission.
        waiting: Vec<Waiting>,
        now: Moment,
        draining: bool,
        members: Vec<TicketId>,
    }

    impl World {
        fn new(policies: Vec<Policy>) -> World {
            let limits = QueueLimits { rows_max: 50, cells_max: 600, bytes_max: 1200 };
            World {
                scheduler: Scheduler::new(limits, policies.clone(), &SEATS),
                limits,
                finished: vec![false; policies.len()],
                policies,
                waiting: Vec::new(),
                now: Moment(1),
                draining: false,
                members: Vec::new(),
            }
        }

        fn model(&self, model: u16) -> ModelHandle {
            ModelHandle(model % self.policies.len() as u16)
        }

        fn of(&self, model: ModelHandle) -> impl Iterator<Item = &Waiting> {
            self.waiting.iter().filter(move |waiting| waiting.arrival.model == model)
        }

        fn sums<'a>(&self, of: impl Iterator<Item = &'a Waiting>) -> (u64, u64, u64) {
            of.fold((0, 0, 0), |(rows, cells, bytes), waiting| {
                let mine = u64::from(waiting.arrival.rows);
                (rows + mine, cells + mine * u64::from(waiting.bucket_len), bytes + waiting.arrival.bytes)
            })
        }

        fn take(&mut self, id: TicketId) -> Waiting {
            let at = self.waiting.iter().position(|waiting| waiting.id == id).expect("it left before, or never came");
            self.waiting.remove(at)
        }

        /// What an arrival must come to: `None` when it is to be admitted.
        fn expected_refusal(&self, arrival: &Arrival) -> Option<Code> {
            let policy = &self.policies[arrival.model.index()];
            if arrival.deadline.is_some_and(|deadline| deadline <= self.now) {
                return Some(Code::DeadlineExceeded);
            }
            let Some(bucket_len) = policy.buckets.lens().iter().find(|len| **len >= arrival.len) else {
                return Some(Code::TooLarge);
            };
            let rows = u64::from(arrival.rows);
            let cells = rows * u64::from(*bucket_len);
            if rows == 0 {
                return Some(Code::InvalidArgument);
            }
            if rows > u64::from(policy.rows_max) || cells > policy.cells_max {
                return Some(Code::TooLarge);
            }
            for (limits, sums) in
                [(self.limits, self.sums(self.waiting.iter())), (policy.queue, self.sums(self.of(arrival.model)))]
            {
                let asked = [
                    (rows, sums.0, limits.rows_max),
                    (cells, sums.1, limits.cells_max),
                    (arrival.bytes, sums.2, limits.bytes_max),
                ];
                for (asked, waits, max) in asked {
                    if asked > max {
                        return Some(Code::TooLarge);
                    }
                    if asked + waits > max {
                        return Some(Code::Overloaded);
                    }
                }
            }
            let compose = arrival.compose?;
            let longest = u64::from(policy.buckets.longest());
            let mates: Vec<&Waiting> = self.mates(arrival.model, compose.tag).collect();
            let there: u32 = mates.iter().map(|mate| mate.arrival.rows).sum();
            let wanted = mates.first().map_or(compose.rows, |mate| mate.arrival.compose.expect("a mate").rows);
            let fits = compose.rows > 0
                && compose.rows <= policy.rows_max
                && u64::from(compose.rows) * longest <= policy.cells_max;
            let joins = compose.rows == wanted && there + arrival.rows <= wanted;
            (!(fits && joins)).then_some(Code::InvalidArgument)
        }

        fn mates(&self, model: ModelHandle, tag: u64) -> impl Iterator<Item = &Waiting> {
            self.of(model).filter(move |waiting| waiting.arrival.compose.is_some_and(|compose| compose.tag == tag))
        }

        fn step(&mut self, step: &Step) {
            match step {
                Step::Advance(by) => self.now = self.now + US * *by as u32,
                Step::Arrive { model, rows, len, bytes, deadline_us, compose } => {
                    let arrival = Arrival {
                        model: self.model(*model),
                        rows: *rows,
                        len: *len,
                        bytes: *bytes,
                        deadline: deadline_us.map(|us| self.now + US * us as u32),
                        compose: compose.map(|(tag, rows)| Compose { tag, rows }),
                        class: Class::default(),
                        tenant: TenantId::default(),
                    };
                    self.arrive(arrival);
                }
                Step::Cancel(which) => {
                    if !self.waiting.is_empty() {
                        let id = self.waiting[which.index(self.waiting.len())].id;
                        assert!(self.scheduler.handle_cancel(id));
                        assert!(!self.scheduler.handle_cancel(id));
                        self.take(id);
                    }
                }
                Step::Expire => self.expire(),
                Step::Batch { inline, spare } => {
                    let group = if *inline { Group::Inline } else { Group::Executors };
                    // As the batcher does: what is over is never sealed.
                    self.expire();
                    self.batch(group, if *spare { Vacancy::Spare } else { Vacancy::Idle });
                }
                Step::Finish(model) => {
                    let model = self.model(*model);
                    finish(&mut self.scheduler, self.now, model, 2, SERVICE);
                    self.finished[model.index()] = true;
                }
                Step::SetDelay { model, delay_us } => {
                    let model = self.model(*model);
                    let delay = US * *delay_us as u32;
                    self.policies[model.index()].queue_delay_max = Some(delay);
                    let policy = self.policies[model.index()].clone();
                    self.scheduler.set_policy(model, policy).expect("a window strands nobody");
                }
                Step::Drain => {
                    self.scheduler.drain();
                    self.draining = true;
                }
            }
            self.check_books();
        }

        fn arrive(&mut self, arrival: Arrival) {
            let expected = self.expected_refusal(&arrival);
            match self.scheduler.handle_arrival(self.now, arrival) {
                Ok(id) => {
                    assert_eq!(expected, None, "{arrival:?} was admitted");
                    let buckets = &self.policies[arrival.model.index()].buckets;
                    let bucket_len = *buckets.lens().iter().find(|len| **len >= arrival.len).expect("it fits");
                    let deadline = match arrival.compose {
                        Some(_) => Some(arrival.deadline.unwrap_or(Moment::FAR).min(self.now + compose::WAIT_MAX)),
                        None => arrival.deadline,
                    };
                    assert!(
                        self.waiting.iter().all(|waiting| waiting.id != id),
                        "two waiting tickets are called {id:?}"
                    );
                    self.waiting.push(Waiting { id, arrival, admitted_at: self.now, deadline, bucket_len });
                }
                Err(refusal) => {
                    assert_eq!(Some(refusal.code), expected, "{arrival:?}: {refusal}");
                    assert_eq!(refusal.executed, Executed::Never);
                    assert_eq!(refusal.retry_after_ms > 0, refusal.code == Code::Overloaded);
                }
            }
        }

        fn expire(&mut self) {
            let mut last = Moment::ZERO;
            while let Some(id) = self.scheduler.poll_expired(self.now) {
                let deadline = self.take(id.id()).deadline.expect("only a deadline expires");
                assert!(deadline <= self.now && deadline >= last, "expired at {:?}: {deadline:?}", self.now);
                last = deadline;
            }
            assert!(self.waiting.iter().all(|waiting| waiting.deadline.is_none_or(|deadline| deadline > self.now)));
        }

        /// Rows that a batch padded to `len` could take from the lanes.
        fn rows_for(&self, model: ModelHandle, len: u32) -> u32 {
            let policy = &self.policies[model.index()];
            self.of(model)
                .filter(|waiting| waiting.arrival.compose.is_none() && waiting.bucket_len <= len)
                .filter(|waiting| {
                    let waste = 1.0 - f64::from(waiting.bucket_len) / f64::from(len);
                    waiting.bucket_len == len || waste <= policy.fill_waste_max
                })
                .map(|waiting| waiting.arrival.rows)
                .sum()
        }

        fn rows_possible(&self, model: ModelHandle, len: u32) -> u32 {
            let policy = &self.policies[model.index()];
            policy.rows_max.min((policy.cells_max / u64::from(len)) as u32)
        }

        fn latest_start(&self, model: ModelHandle, deadline: Moment) -> Moment {
            let service = if self.finished[model.index()] { SERVICE } else { Duration::ZERO };
            deadline - service.mul_f64(1.25) - US * 500
        }

        /// Whether a lane may be sealed for an idle executor, by the promises alone.
        fn is_due(&self, model: ModelHandle, len: u32) -> bool {
            let presses = |deadline| self.latest_start(model, deadline) <= self.now;
            self.has_waited(model, len) || self.soonest(model, |w| w.bucket_len == len).is_some_and(presses)
        }

        /// The same without deadlines.
        fn has_waited(&self, model: ModelHandle, len: u32) -> bool {
            let policy = &self.policies[model.index()];
            let mut lane = self.of(model).filter(|w| w.arrival.compose.is_none() && w.bucket_len == len);
            let Some(oldest) = lane.next() else { return false };
            self.draining
                || policy.window().is_zero()
                || oldest.admitted_at + policy.window() <= self.now
                || self.rows_for(model, len) >= self.rows_possible(model, len)
        }

        fn soonest(&self, model: ModelHandle, of: impl Fn(&Waiting) -> bool) -> Option<Moment> {
            let lanes = self.of(model).filter(|w| w.arrival.compose.is_none() && of(w));
            lanes.filter_map(|w| w.deadline).min()
        }

        /// Whether a lane must not be overtaken: it has waited, or the soonest deadline of its model is in it and presses. A
        /// later one that presses too gets the next batch.
        fn comes_first(&self, model: ModelHandle, len: u32) -> bool {
            let others = self.soonest(model, |w| w.bucket_len != len);
            let mine = self.soonest(model, |w| w.bucket_len == len).filter(|mine| others.is_none_or(|at| *mine < at));
            let presses = mine.is_some_and(|mine| self.latest_start(model, mine) <= self.now);
            self.has_waited(model, len) || presses
        }

        fn is_complete(&self, waiting: &Waiting) -> bool {
            waiting.arrival.compose.is_some_and(|compose| {
                let rows: u32 = self.mates(waiting.arrival.model, compose.tag).map(|mate| mate.arrival.rows).sum();
                rows == compose.rows
            })
        }

        fn batch(&mut self, group: Group, vacancy: Vacancy) {
            let mut members = std::mem::take(&mut self.members);
            let sealed = poll_seat(&mut self.scheduler, self.now, group, vacancy, &mut members);
            match sealed {
                Some(batch) => self.check_batch(&batch, &members, group, vacancy),
                None => self.check_nothing_due(group, vacancy),
            }
            self.members = members;
        }

        fn check_nothing_due(&mut self, group: Group, vacancy: Vacancy) {
            if vacancy == Vacancy::Spare {
                return;
            }
            for waiting in &self.waiting {
                let model = waiting.arrival.model;
                if self.policies[model.index()].group != group {
                    continue;
                }
                assert!(!self.is_complete(waiting), "a complete composition waits before an idle executor");
                let held = waiting.arrival.compose.is_some() || !self.is_due(model, waiting.bucket_len);
                assert!(held, "{waiting:?} waits before an idle executor at {:?}", self.now);
            }
            let timeout = timeout(&mut self.scheduler, self.now, &[group]);
            let latest = self.waiting.iter().filter_map(|waiting| {
                let model = waiting.arrival.model;
                let policy = &self.policies[model.index()];
                let window = (policy.group == group && waiting.arrival.compose.is_none())
                    .then(|| waiting.admitted_at + policy.window());
                [window, waiting.deadline].into_iter().flatten().min()
            });
            assert!(timeout.unwrap_or(Moment::FAR) <= latest.min().unwrap_or(Moment::FAR), "{timeout:?} is too late");
            assert!(timeout.is_none_or(|at| at > self.now), "woken at {timeout:?} for nothing at {:?}", self.now);
        }

        fn check_batch(&mut self, batch: &SealedBatch, members: &[TicketId], group: Group, vacancy: Vacancy) {
            let model = batch.model;
            let policy = self.policies[model.index()].clone();
            assert_eq!(policy.group, group);
            let before_rows = self.rows_for(model, batch.padded_len);
            let due = self.is_due(model, batch.padded_len);
            let oldest_of_lane = |world: &World, len: u32| {
                world.of(model).find(|w| w.arrival.compose.is_none() && w.bucket_len == len).map(|w| w.admitted_at)
            };
            let oldest = oldest_of_lane(self, batch.padded_len);
            if batch.reason != SealReason::Composed {
                for waiting in self.waiting.iter().filter(|w| w.arrival.compose.is_none()) {
                    let theirs = waiting.arrival.model;
                    let same_kind = self.policies[theirs.index()].group == group;
                    let full =
                        self.rows_for(theirs, waiting.bucket_len) >= self.rows_possible(theirs, waiting.bucket_len);
                    let sealable =
                        if vacancy == Vacancy::Idle { self.comes_first(theirs, waiting.bucket_len) } else { full };
                    // The lane is sealable, so its oldest, and with it each of its tickets, must not be older.
                    assert!(
                        !same_kind || !sealable || oldest <= Some(waiting.admitted_at),
                        "{waiting:?} has waited longer than the oldest in {batch:?}"
                    );
                }
            }
            let taken: Vec<Waiting> = members.iter().map(|id| self.take(*id)).collect();
            let rows: u32 = taken.iter().map(|member| member.arrival.rows).sum();
            let real: u64 =
                taken.iter().map(|member| u64::from(member.arrival.rows) * u64::from(member.arrival.len)).sum();
            let longest = taken.iter().map(|member| member.bucket_len).max().expect("a batch has members");
            assert_eq!((batch.rows, batch.padded_len, batch.cells_real), (rows, longest, real));
            assert_eq!(batch.rows_possible, self.rows_possible(model, longest));
            assert!(rows <= policy.rows_max && batch.cells_padded() <= policy.cells_max, "{batch:?}");
            assert!(taken.iter().all(|m| m.arrival.model == model && m.deadline.is_none_or(|at| at > self.now)));
            assert!(vacancy == Vacancy::Idle || batch.reason == SealReason::Full, "{batch:?}");
            assert!(batch.sealed_at == self.now);
            if batch.reason == SealReason::Composed {
                let compose = taken[0].arrival.compose.expect("a composition");
                assert!(taken.iter().all(|member| member.arrival.compose == Some(compose)));
                assert_eq!(rows, compose.rows);
                assert_eq!(self.mates(model, compose.tag).count(), 0);
                return;
            }
            assert!(taken.iter().all(|member| member.arrival.compose.is_none()), "nobody else joins, either way");
            let oldest = oldest.expect("the lane had tickets");
            assert_eq!(taken[0].admitted_at, oldest, "the batch starts with its lane's oldest ticket");
            match batch.reason {
                SealReason::Full => assert!(before_rows >= batch.rows_possible),
                SealReason::Idle => assert!(policy.window().is_zero()),
                SealReason::QueueDelay => assert!(oldest + policy.window() <= self.now),
                SealReason::Deadline => assert!(due),
                SealReason::Drain => assert!(self.draining),
                SealReason::Composed => unreachable!("returned above"),
                SealReason::Urgent | SealReason::Economic => panic!("{batch:?} is not of this policy"),
            }
            self.check_order(batch, &taken);
        }

        /// First in, first out inside each lane, except for tickets that did not fit.
        fn check_order(&self, batch: &SealedBatch, taken: &[Waiting]) {
            let room = batch.rows_possible - batch.rows;
            for pair in taken.windows(2) {
                assert!(pair[0].bucket_len != pair[1].bucket_len || pair[0].admitted_at <= pair[1].admitted_at);
                assert!(pair[0].bucket_len >= pair[1].bucket_len, "shorter lanes come after");
            }
            for left in self.of(batch.model).filter(|left| left.arrival.compose.is_none()) {
                let overtaken = taken
                    .iter()
                    .any(|member| member.bucket_len == left.bucket_len && member.admitted_at > left.admitted_at);
                let of_this_lane = left.bucket_len == batch.padded_len;
                assert!(left.arrival.rows > room || !(overtaken || of_this_lane), "{left:?} fitted {batch:?}");
            }
        }

        fn check_books(&self) {
            for index in 0..self.policies.len() {
                let model = ModelHandle(index as u16);
                assert_eq!(self.scheduler.waiting(model), self.sums(self.of(model)));
            }
            assert_eq!(self.scheduler.is_empty(), self.waiting.is_empty());
            let (rows, cells, bytes) = self.sums(self.waiting.iter());
            assert!(rows <= self.limits.rows_max && cells <= self.limits.cells_max && bytes <= self.limits.bytes_max);
        }

        /// Everything that waits leaves when the server drains, except members of compositions, which expire.
        fn finish(&mut self) {
            self.step(&Step::Drain);
            self.expire();
            for group in [Group::Executors, Group::Inline] {
                loop {
                    let before = self.waiting.len();
                    self.batch(group, Vacancy::Idle);
                    if self.waiting.len() == before {
                        break;
                    }
                }
            }
            assert!(self.waiting.iter().all(|waiting| waiting.arrival.compose.is_some()));
            self.now = self.now + compose::WAIT_MAX;
            self.expire();
            self.check_books();
            assert!(self.scheduler.is_empty());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        #[test]
        fn the_scheduler_keeps_its_promises(policies in policies(), steps in steps()) {
            let mut world = World::new(policies);
            for step in &steps {
                world.step(step);
            }
            world.finish();
        }
    }
}

#[test]
fn what_waits_is_told_by_group() {
    let inline = Policy { group: Group::Inline, ..policy() };
    let mut rig = Rig::new(vec![policy(), policy(), inline]);
    assert_eq!(rig.scheduler.waits(), [false, false]);
    let executors = rig.arrive(Arrival { model: ModelHandle(1), ..request() });
    let mut only = [false; 2];
    only[Group::Executors as usize] = true;
    assert_eq!(rig.scheduler.waits(), only);
    rig.arrive(Arrival { model: ModelHandle(2), ..request() });
    assert_eq!(rig.scheduler.waits(), [true, true]);
    assert!(rig.scheduler.handle_cancel(executors));
    only.reverse();
    assert_eq!(rig.scheduler.waits(), only);
}

#[test]
fn what_a_class_leaves_free_is_a_share_of_bounds_of_any_size() {
    // 15 and 5 percent of it, rounded down.
    for (bound, kept) in [(6, [0, 0]), (7, [1, 0]), (99, [14, 4]), (199, [29, 9]), (1999, [299, 99])] {
        let mut rig = Rig::with_limits(QueueLimits { rows_max: bound, ..QueueLimits::NONE }, vec![policy()]);
        for (class, kept) in [(2, kept[0]), (1, kept[1]), (0, 0)] {
            let of_class = Arrival { class: Class::from_priority(class), ..request() };
            while rig.try_arrive(of_class).is_ok() {}
            assert_eq!(rig.scheduler.waiting(MODEL).0, bound - kept, "class {class} of {bound}");
        }
    }
}

fn decision() -> Decision {
    Decision {
        at: Moment(5),
        verdict: Verdict::Held,
        model: ModelHandle(1),
        executor: 1,
        batch: 3,
        rows: 4,
        padded_len: 8,
        rows_possible: 8,
        padding: 0.0,
        shortest: 8,
        waiting: 9,
        predicted: 77,
        efficiency: 0.0,
        best_efficiency: 0.0,
        generation: 1,
    }
}

#[test]
fn decisions_that_differ_have_another_hash_and_equal_ones_the_same() {
    let hash = |decisions: &[Decision], members: &[(u32, u32)]| {
        let mut log = DecisionLog::default();
        decisions.iter().for_each(|decision| log.push(*decision));
        members.iter().for_each(|(sequence, len)| log.mix_member(*sequence, *len));
        (log.count(), log.hash())
    };
    let same = decision();
    let others = [
        Decision { at: Moment(6), ..same },
        Decision { verdict: Verdict::Shed, ..same },
        Decision { verdict: Verdict::Refused, ..same },
        Decision { verdict: Verdict::Sealed(SealReason::Full), ..same },
        Decision { verdict: Verdict::Sealed(SealReason::Idle), ..same },
        Decision { model: ModelHandle(2), ..same },
        Decision { executor: 2, ..same },
        Decision { batch: 4, ..same },
        Decision { rows: 5, ..same },
        Decision { padded_len: 9, ..same },
        Decision { predicted: 78, ..same },
    ];
    let mut seen = std::collections::BTreeSet::from([hash(&[same], &[])]);
    for other in others {
        assert!(seen.insert(hash(&[other], &[])), "{other:?}");
    }
    for members in [[(1, 2)], [(2, 1)], [(1, 3)], [(3, 2)]] {
        assert!(seen.insert(hash(&[same], &members)), "{members:?}");
    }
    assert!(seen.insert(hash(&[same, others[0]], &[])) && seen.insert(hash(&[others[0], same], &[])), "order counts");
    assert_eq!(hash(&[same, others[3]], &[(1, 2)]), hash(&[same, others[3]], &[(1, 2)]));
}

#[test]
fn the_log_keeps_the_last_decisions_in_order() {
    let mut log = DecisionLog::default();
    let numbers = |log: &DecisionLog, count: usize| -> Vec<u64> { log.last(count).map(|one| one.batch).collect() };
    assert_eq!(log.last(5).count(), 0);
    // Twice around, and a few more.
    let ring = 8192;
    for batch in 0..2 * ring + 3 {
        log.push(Decision { batch, ..decision() });
        if [1, ring - 1, ring, ring + 1, 2 * ring + 2].contains(&batch) {
            let first = (batch + 1).saturating_sub(4);
            assert_eq!(numbers(&log, 4), (first..=batch).collect::<Vec<_>>());
        }
    }
    assert_eq!(numbers(&log, usize::MAX), (ring + 3..2 * ring + 3).collect::<Vec<_>>());
    assert_eq!(log.count(), 2 * ring + 3);
}

#[test]
fn every_verdict_has_its_own_name() {
    let others = [Verdict::Held, Verdict::Shed, Verdict::Refused];
    assert_eq!(others.map(Verdict::name), ["held", "shed", "refused"]);
    let all = SealReason::ALL.into_iter().map(Verdict::Sealed).chain(others).map(Verdict::name);
    let names: std::collections::BTreeSet<_> = all.clone().collect();
    assert_eq!(names.len(), all.count(), "{names:?}");
}

/// Whatever came and went, a bucket's sums are those of what is still there.
#[test]
fn the_age_of_a_bucket_is_that_of_the_rows_that_are_still_in_it() {
    let mut rig = Rig::new(vec![Policy { kind: PolicyKind::Cost, rows_max: 8, ..policy() }]);
    let slack = MS * 10;
    let gone = rig.arrive(Arrival { rows: 5, deadline: Some(rig.now + slack), ..request() });
    rig.wait(MS);
    rig.arrive(Arrival { rows: 3, deadline: Some(rig.now + slack), ..request() });
    rig.wait(MS);
    let age = |rig: &Rig| rig.scheduler.models[0].lanes.sums(Class::default(), 0).age(rig.now.nanos() as f64);
    // In slacks: five rows for 2 of 10 ms, three for 1 of 10.
    assert!((age(&rig) - (5.0 * 0.2 + 3.0 * 0.1)).abs() < 1e-4, "{}", age(&rig));
    assert!(rig.scheduler.handle_cancel(gone));
    assert!((age(&rig) - 3.0 * 0.1).abs() < 1e-4, "{}", age(&rig));
}

#[test]
fn the_mean_batch_time_moves_by_a_fifth_of_what_is_new() {
    let mut service = lengths::ServiceTime::default();
    assert_eq!(service.mean(), Duration::ZERO);
    service.observe(MS * 10);
    assert_eq!(service.mean(), MS * 10);
    service.observe(MS * 20);
    assert_eq!(service.mean(), MS * 12);
}

/// A part of a saved state, as somebody else may have written it: the same fields in the same order.
fn decoded<T: bincode::Decode<()>>(fields: impl bincode::Encode) -> T {
    let config = bincode::config::standard();
    let bytes = bincode::encode_to_vec(fields, config).expect("plain data");
    bincode::decode_from_slice(&bytes, config).expect("the same fields").0
}

#[test]
fn lanes_that_are_fewer_or_more_than_they_say_are_not_whole() {
    let lane = (ticket::NONE, ticket::NONE, 0u32, Moment::FAR);
    let lanes = |lanes: Vec<(u32, u32, u32, Moment)>, sums: usize, tenants: u16| -> Lanes {
        decoded((2u16, true, lanes, vec![(0u32, 0u32, 0f64, 0f64); sums], tenants))
    };
    let is_link = |link: u32| link == ticket::NONE || link < 3;
    let block = 2 * Class::COUNT;
    assert!(lanes(vec![lane; block], block, 1).is_whole(is_link));
    assert!(lanes(vec![lane; 2 * block], block, 2).is_whole(is_link));
    for (count, of_sums, tenants) in
        [(block, block - 1, 1), (block - 1, block, 1), (block, block, 2), (block, block + 1, 1)]
    {
        assert!(!lanes(vec![lane; count], of_sums, tenants).is_whole(is_link), "{count} lanes, {of_sums} sums");
    }
    for broken in [(3, ticket::NONE, 0, Moment::FAR), (ticket::NONE, 3, 0, Moment::FAR)] {
        let mut all = vec![lane; block];
        all[block - 1] = broken;
        assert!(!lanes(all, block, 1).is_whole(is_link), "{broken:?}");
    }
}

#[test]
fn paces_and_costs_of_another_number_of_executors_are_not_whole() {
    let paces =
        |paces: usize, factors: usize| -> pace::Paces { decoded((vec![(0f64, 0u32); paces], vec![1f64; factors])) };
    assert!(paces(2, 2).is_whole(2));
    assert!(!paces(2, 1).is_whole(2) && !paces(1, 2).is_whole(2) && !paces(1, 1).is_whole(2));
    let mut cost = CostModel::default();
    cost.set_executors(2);
    assert!(cost.is_whole(2) && !cost.is_whole(1) && !cost.is_whole(3));
}

#[test]
fn an_executor_of_a_device_that_is_not_there_is_not_whole() {
    let seat = |group: Group, device: u16, model: u16| {
        let running = Running { model: ModelHandle(model), ..running(1) };
        Seat { group, slots: 1, device, running: vec![running] }
    };
    let whole =
        |seat: Seat| Seats { seats: vec![seat], devices: vec![Default::default()] }.is_whole(|model| model.0 < 2);
    assert!(whole(seat(Group::Executors, 0, 1)));
    assert!(!whole(seat(Group::Executors, 1, 1)), "there is one device");
    assert!(whole(seat(Group::Inline, 1, 1)), "it has none");
    assert!(!whole(seat(Group::Executors, 0, 2)), "there are two models");
}

#[test]
fn how_long_rows_were_is_whole_with_a_bin_for_each_length_only() {
    let histogram = |longest: u32, width: u32, bins: usize| -> LengthHistogram {
        decoded((longest, width, vec![(0f64, 0f64); bins], 0f64, Moment::ZERO))
    };
    assert!(histogram(16, 1, 16).is_whole() && histogram(1025, 3, 342).is_whole());
    assert!(!histogram(16, 1, 15).is_whole() && !histogram(16, 1, 17).is_whole() && !histogram(0, 1, 0).is_whole());
}

#[test]
fn in_order_of_arrival_rows_are_held_for_the_window_unless_no_other_fits() {
    for kind in [PolicyKind::Window, PolicyKind::GreedyTokens] {
        let mut rig = Rig::new(vec![Policy { kind, ..policy() }]);
        let ids: Vec<TicketId> = [8, 16, 8].map(|len| rig.arrive(Arrival { len, ..request() })).to_vec();
        assert_eq!(rig.poll_idle(), None, "{kind:?}: a fourth row would fit");
        assert_eq!(rig.timeout_when_idle(), Some(rig.now() + MS));
        rig.wait(MS - Duration::from_nanos(1));
        assert_eq!(rig.poll_idle(), None);
        rig.wait(Duration::from_nanos(1));
        assert_eq!(rig.poll(Group::Executors, Vacancy::Spare), None, "a spare slot is for full batches");
        let (batch, members) = rig.expect_batch();
        assert_eq!((batch.reason, batch.padded_len, members), (SealReason::QueueDelay, 16, ids), "{kind:?}");

        // Four rows of 16 are all that rows and cells allow.
        for _ in 0..4 {
            assert_eq!(rig.poll(Group::Executors, Vacancy::Spare), None);
            rig.arrive(Arrival { len: 16, ..request() });
        }
        let (batch, _) = rig.poll(Group::Executors, Vacancy::Spare).expect("it is full");
        assert_eq!((batch.reason, batch.rows), (SealReason::Full, 4), "{kind:?}");
    }
}

#[test]
fn in_order_of_arrival_the_first_row_that_does_not_fit_closes_the_batch() {
    let mut rig = Rig::new(vec![Policy { kind: PolicyKind::Window, ..policy() }]);
    let first = rig.arrive(Arrival { rows: 3, ..request() });
    let wide = rig.arrive(Arrival { rows: 2, ..request() });
    let narrow = rig.arrive(request());
    let (batch, members) = rig.expect_batch();
    assert_eq!((batch.reason, members), (SealReason::Full, vec![first]), "nobody overtakes the second");
    rig.scheduler.drain();
    let (batch, members) = rig.expect_batch();
    assert_eq!((batch.reason, members), (SealReason::Drain, vec![wide, narrow]));

    let at_once = Policy { kind: PolicyKind::Window, queue_delay_max: Some(Duration::ZERO), ..policy() };
    let mut rig = Rig::new(vec![at_once]);
    rig.arrive(request());
    assert_eq!(rig.expect_batch().0.reason, SealReason::Idle);
}

#[test]
fn in_order_of_arrival_rows_that_lie_end_to_end_are_full_at_their_own_cells_or_rows() {
    let packed = || Policy {
        kind: PolicyKind::GreedyTokens,
        layout: Layout::Packed,
        can_pack: true,
        rows_max: 6,
        cells_max: 40,
        ..policy()
    };
    // 16 + 16 + 8 cells are all of them; one cell less is not.
    for (last, full) in [(8, true), (7, false)] {
        let mut rig = Rig::new(vec![packed()]);
        for len in [16, 16, last] {
            rig.arrive(Arrival { len, ..request() });
        }
        assert_eq!(rig.poll_idle().map(|(batch, _)| (batch.reason, batch.rows)), full.then_some((SealReason::Full, 3)));
    }
    let mut rig = Rig::new(vec![packed()]);
    for _ in 0..6 {
        assert_eq!(rig.poll_idle(), None);
        rig.arrive(Arrival { len: 1, ..request() });
    }
    assert_eq!(rig.expect_batch().0.reason, SealReason::Full);
}

#[test]
fn a_policy_comes_back_from_its_bytes_and_not_from_others() {
    let policies = [policy(), automatic(), Policy { kind: PolicyKind::Cost, queue_delay_max: None, ..policy() }];
    for policy in policies {
        let saved = state::save_policy(&policy);
        assert_eq!(state::restore_policy(state::LAYOUT, &saved), Ok(policy));
        assert!(state::restore_policy(state::LAYOUT + 1, &saved).is_err());
        for len in 0..saved.len() {
            assert!(state::restore_policy(state::LAYOUT, &saved[..len]).is_err(), "{len} of {} bytes", saved.len());
        }
        assert!(state::restore_policy(state::LAYOUT, &[&saved[..], &[0]].concat()).is_err());
    }
}

#[test]
fn rows_end_to_end_could_be_as_many_as_the_cells_of_rows_like_them_allow() {
    let padded = Policy { rows_max: 40, cells_max: 100, ..policy() };
    let packed = Policy { layout: Layout::Packed, can_pack: true, ..padded.clone() };
    let like = |policy: &Policy, rows: u32, cells: u64| policy.rows_like(Work { rows, cells, squares: 0 }, 16);
    assert_eq!([like(&packed, 4, 40), like(&packed, 3, 50), like(&packed, 7, 99)], [10, 6, 7]);
    assert_eq!([like(&packed, 9, 9), like(&packed, 1, 100), like(&packed, 1, 0)], [40, 1, 40]);
    assert_eq!(like(&padded, 4, 40), 6, "rows padded to 16");
}

#[test]
fn the_heaviest_tenant_is_who_offers_no_less_than_any_other_lately_and_is_not_alone() {
    let (one, two) = (TenantId(1), TenantId(2));
    let offered = |offers: &[(u64, TenantId, u64)], at: u64| {
        let mut tenants = Tenants::new();
        for (ms, tenant, cells) in offers {
            tenants.offer(Moment::ZERO + MS * *ms as u32, *tenant, *cells);
        }
        [one, two].map(|tenant| tenants.is_heaviest(Moment::ZERO + MS * at as u32, tenant))
    };
    assert_eq!(offered(&[(0, one, 100)], 0), [false, false], "nobody else is here");
    assert_eq!(offered(&[(0, one, 100), (0, two, 100)], 0), [true, true], "as much as the other");
    assert_eq!(offered(&[(0, one, 100), (0, two, 99)], 0), [true, false]);
    assert_eq!(offered(&[(0, one, 1000), (0, two, 10)], 0), [false, false], "next to nothing, and nothing waits");
    assert_eq!(offered(&[(0, one, 1000), (0, two, 11)], 0), [true, false]);
    // Halved each second: 100 are 25 after two.
    assert_eq!(offered(&[(0, one, 100), (2000, two, 24)], 2000), [true, false]);
    assert_eq!(offered(&[(0, one, 100), (2000, two, 26)], 2000), [false, true]);
    assert_eq!(offered(&[(0, one, 100), (1000, one, 50), (1000, two, 99)], 1000), [true, false]);
}

#[test]
fn the_pace_of_the_queue_is_a_mean_of_recent_batches_and_a_hint_is_neither_noise_nor_for_ever() {
    let mut rate = admission::DrainRate::default();
    assert_eq!(rate.nanos(1000, 1), 0.0, "nothing is known");
    rate.observe(100, MS);
    assert_eq!(rate.nanos(300, 1), 3e6);
    rate.observe(100, MS * 2);
    assert!((rate.nanos(100, 1) - 1.1e6).abs() < 1.0, "a tenth of what is new");
    assert!((rate.nanos(100, 2) - 0.55e6).abs() < 1.0, "two executors");
    assert!((rate.nanos(100, 0) - 1.1e6).abs() < 1.0);
    let hint = |cells: u64| rate.time_to_drain(cells, 1);
    assert_eq!([hint(1), hint(10_000), hint(1 << 40)], [MS, MS * 110, Duration::from_secs(10)]);
}

#[test]
fn a_batch_behind_others_begins_when_its_executor_is_free_and_computes_when_its_device_is() {
    let at = |ms: u64| Moment::ZERO + MS * ms as u32;
    let on = |device: u16| SeatSpec { group: Group::Executors, slots: 2, device };
    let mut seats = Seats::new(&[on(0), on(1), on(1), SeatSpec { group: Group::Inline, slots: 1, device: 0 }]);
    let until = |ms: u64| Running { until: at(ms), ..running(1) };
    assert_eq!([0, 1, 2, 3].map(|seat| seats.executors_of(seat)), [1, 2, 2, 1]);
    assert_eq!([0, 1, 2, 3].map(|seat| seats.is_shared(seat)), [false, true, true, false]);
    // Alone: fixed part and rows, one after the other.
    assert_eq!(seats.forecast(0, at(10), 1e6, 2e6), (at(10), at(13)));
    seats.seats[0].running.push(until(20));
    assert_eq!(seats.forecast(0, at(10), 1e6, 2e6), (at(20), at(23)));
    // Beside others on one device: the fixed part overlaps with what the device computes.
    seats.devices[1].free_at = at(15);
    assert_eq!(seats.forecast(1, at(10), 1e6, 2e6), (at(10), at(17)));
    assert_eq!(seats.forecast(1, at(10), 7e6, 2e6), (at(10), at(19)), "the fixed part is longer");
    // Each holds what it holds, and the device is free after the last.
    seats.seats[1].running.push(until(30));
    seats.seats[2].running.push(until(25));
    seats.expect_free(2, at(12));
    assert_eq!(seats.devices[1].free_at, at(30));
    seats.seats[1].running.clear();
    seats.expect_free(2, at(12));
    assert_eq!((seats.devices[1].free_at, seats.devices[0].free_at), (at(25), Moment::ZERO));
    assert_eq!((seats.idle(Group::Executors), seats.idle_seat(Group::Executors)), (1, Some(1)));
    assert_eq!((seats.idle(Group::Inline), seats.idle_seat(Group::Inline)), (1, Some(3)));
    assert_eq!((seats.running_of(MODEL), seats.running_of(ModelHandle(1))), (2, 0));
}

#[test]
fn beyond_the_places_tenants_share_the_last_until_one_is_free() {
    let mut tenants = Tenants::new();
    let places = tenants::PLACES as u16;
    for tenant in 0..places {
        assert_eq!(tenants.arrive(TenantId(tenant), 10), tenant);
    }
    assert_eq!(tenants.arrive(TenantId(3), 1), 3, "who is here keeps its place");
    assert_eq!(tenants.arrive(TenantId(1000), 5), places - 1, "all are taken");
    assert_eq!(tenants.waiting_in_all(), u64::from(places) * 10 + 6);
    tenants.leave(7, 10);
    assert_eq!(tenants.arrive(TenantId(1001), 5), 7);
    assert_eq!((tenants.waiting(TenantId(1001)), tenants.waiting(TenantId(7))), (5, 0));
    tenants.resize(7, 5, 8);
    assert_eq!(tenants.waiting(TenantId(1001)), 8);
    assert!(tenants.is_place(places - 1) && !tenants.is_place(places));
}

#[test]
fn who_comes_back_from_rest_begins_at_the_present() {
    let mut tenants = Tenants::new();
    let (busy, rested) = (tenants.arrive(TenantId(1), 100), tenants.arrive(TenantId(2), 10));
    tenants.charge(busy, 60);
    tenants.charge(busy, 30);
    tenants.charge(rested, 10);
    tenants.leave(rested, 10);
    assert_eq!((tenants.time(busy), tenants.time(rested)), (90.0, 10.0));
    tenants.charge(busy, 10);
    assert_eq!(tenants.arrive(TenantId(2), 10), rested);
    assert_eq!(tenants.time(rested), 90.0, "where the last row was taken");
    assert_eq!(tenants.arrive(TenantId(1), 10), busy);
    assert_eq!(tenants.time(busy), 100.0, "it was never away");
    assert_eq!(tenants.arrive(TenantId(3), 10), 2);
    assert_eq!(tenants.time(2), 90.0);
}
