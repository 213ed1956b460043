//! What the policy `cost` does where batches end later than promised.

use super::*;

/// Asks a queue that has seen batches take twice as long as promised.
fn ask_in_doubt<T>(rig: &mut Rig, more: Outlook, asked: impl FnOnce(&mut Queue<'_>, &Outlook) -> T) -> T {
    ask(rig, |queue, outlook| {
        let Outlook { executors, overrun, .. } = more;
        asked(queue, &Outlook { executors, overrun, ..*outlook })
    })
}

fn twice() -> Outlook {
    Outlook {
        now: Moment::ZERO,
        start: Moment::ZERO,
        device_free: Moment::ZERO,
        executors: 1.0,
        sharing: 1.0,
        others_idle: false,
        overrun: 2.0,
        draining: false,
    }
}

#[test]
fn experience_is_doubted_with_beyond_twice_the_margin_or_without_trust_and_for_deadlines_only() {
    let doubts = |rig: &mut Rig, overrun: f64| ask_in_doubt(rig, Outlook { overrun, ..twice() }, |q, o| q.doubts(o));
    let mut rig = Rig::new(vec![policy()], 1);
    rig.arrive_as(request(16));
    assert!(!doubts(&mut rig, 8.0), "nobody has a deadline");
    rig.arrive(16, MS * 100);
    // The margin is a twentieth at least.
    assert_eq!([doubts(&mut rig, 1.0), doubts(&mut rig, 1.1), doubts(&mut rig, 1.11)], [false, false, true]);
    let inflate = |rig: &mut Rig, overrun: f64| ask_in_doubt(rig, Outlook { overrun, ..twice() }, |q, o| q.inflate(o));
    assert!([1.0, 1.1].map(|overrun| inflate(&mut rig, overrun)).into_iter().all(|factor| near(factor, 1.05)));
    assert_eq!(inflate(&mut rig, 3.0), 3.0);

    let mut unforeseen = Rig::new(vec![policy()], 1);
    for took in [MS, MS * 800].into_iter().cycle().take(100) {
        unforeseen.scheduler.prime(MODEL, 1, 16, took);
    }
    unforeseen.arrive(16, MS * 100);
    assert!(doubts(&mut unforeseen, 1.0), "predictions are worth nothing");
    assert_eq!(inflate(&mut unforeseen, 1.0), 1.5, "the widest margin");
    let mut unknown = Rig {
        scheduler: Scheduler::new(QueueLimits::NONE, vec![policy()], &SeatSpec::separate(Group::Executors, 1, 1)),
        now: Moment(1),
        members: Vec::new(),
    };
    unknown.arrive(16, MS * 100);
    assert!(!doubts(&mut unknown, 8.0), "nothing was promised");
}

#[test]
fn who_would_be_late_by_experience_is_given_up_while_others_fill_a_batch_for_each_executor() {
    // Sixteen rows of 16 take 3.56 ms as predicted, 7.1 as it is.
    let given_up = |late: u32, others: u32, slack_us: u64, outlook: Outlook| {
        let mut rig = Rig::new(vec![policy()], 1);
        let ids: Vec<_> = (0..late).map(|_| rig.arrive(16, Duration::from_micros(slack_us))).collect();
        (0..others).for_each(|_| _ = rig.arrive(16, MS * 1000));
        let any = ask_in_doubt(&mut rig, outlook, |queue, outlook| {
            let plan = queue.look(outlook).expect("rows wait");
            assert_eq!(plan.rows, 16, "{plan:?}");
            queue.give_up_doubtful(outlook, &plan)
        });
        assert_eq!(any, !rig.scheduler.shed.is_empty());
        assert!(ids.starts_with(&rig.scheduler.shed), "the soonest first, and nobody else");
        rig.scheduler.shed.len()
    };
    assert_eq!(given_up(4, 16, 6_000, twice()), 4);
    assert_eq!(given_up(4, 40, 6_000, twice()), 4);
    assert_eq!(given_up(4, 14, 6_000, twice()), 2, "sixteen are left");
    assert_eq!(given_up(4, 12, 6_000, twice()), 0);
    assert_eq!(given_up(4, 30, 6_000, Outlook { executors: 2.0, ..twice() }), 2);
    assert_eq!(given_up(4, 16, 6_000, Outlook { executors: 0.5, ..twice() }), 4, "one batch at least");
    assert_eq!(given_up(4, 16, 7_000, twice()), 4);
    assert_eq!(given_up(4, 16, 7_200, twice()), 0, "they can make it");
    assert_eq!(given_up(4, 16, 6_000, Outlook { overrun: 1.5, ..twice() }), 0);
}

/// The batch begins when its executor is free, and that may be late as well.
#[test]
fn the_wait_for_the_executor_is_part_of_what_takes_longer() {
    for (slack, given_up) in [(10, 4), (12, 0)] {
        let mut rig = Rig::new(vec![policy()], 1);
        (0..4).for_each(|_| _ = rig.arrive(16, MS * slack));
        (0..16).for_each(|_| _ = rig.arrive(16, MS * 1000));
        ask_in_doubt(&mut rig, twice(), |queue, outlook| {
            let outlook = Outlook { start: outlook.now + MS * 2, ..*outlook };
            let plan = queue.look(&outlook).expect("rows wait");
            queue.give_up_doubtful(&outlook, &plan);
        });
        assert_eq!(rig.scheduler.shed.len(), given_up, "2 and 3.56 ms, twice, before {slack} ms");
    }
}

#[test]
fn of_those_in_doubt_the_lowest_class_is_given_up_first() {
    let mut rig = Rig::new(vec![policy()], 1);
    let soon = Some(rig.now + MS * 6);
    let high: Vec<_> = (0..3).map(|_| rig.arrive_as(Arrival { deadline: soon, ..request(16) })).collect();
    let lowest = Class::from_priority(2);
    let low: Vec<_> = (0..3).map(|_| rig.arrive_as(Arrival { deadline: soon, class: lowest, ..request(16) })).collect();
    (0..14).for_each(|_| _ = rig.arrive(16, MS * 1000));
    ask_in_doubt(&mut rig, twice(), |queue, outlook| {
        let plan = queue.look(outlook).expect("rows wait");
        assert!(queue.give_up_doubtful(outlook, &plan));
    });
    assert_eq!(rig.scheduler.shed, [&low[..], &high[..1]].concat());
}

#[test]
fn in_doubt_a_batch_takes_half_of_its_rows_slack_by_experience() {
    let room = |slack: Duration, overrun: f64| {
        let mut rig = Rig::new(vec![policy()], 1);
        (0..20).for_each(|_| _ = rig.arrive(16, slack));
        ask_in_doubt(&mut rig, Outlook { overrun, ..twice() }, |queue, outlook| {
            queue.fill_cells(outlook, Class::COUNT - 1);
            (queue.packer.cells[0].room, queue.packer.slack)
        })
    };
    // 8 ms: a quarter of it is 2 ms, the fixed one and 6 rows of 160 µs.
    let (rows, slack) = room(MS * 8, 2.0);
    assert!(rows == 6.0 && near(slack, 8e6), "{rows} {slack}");
    assert_eq!(room(MS * 8, 1.0).0, 16.0, "without doubt as many as fit");
    assert_eq!(room(MS * 4, 2.0).0, 1.0, "not even one row: one");
    assert_eq!(room(MS * 100, 2.0).0, 16.0);
}

#[test]
fn in_doubt_rows_end_to_end_are_cut_to_half_of_their_slack_by_experience() {
    let plan = |slack: Duration, overrun: f64| {
        let policy = Policy { layout: Layout::Packed, can_pack: true, rows_max: 64, ..policy() };
        let mut rig = Rig::new(vec![policy], 1);
        (0..40).for_each(|_| _ = rig.arrive(16, slack));
        ask_in_doubt(&mut rig, Outlook { overrun, ..twice() }, |queue, outlook| queue.look_packed(outlook))
            .expect("rows wait")
    };
    // 40 rows take 6.4 ms beside the fixed one; a quarter of 20 ms is 5: 25 rows.
    let cut = plan(MS * 20, 2.0);
    assert!((395..=402).contains(&cut.cells) && near(cut.predicted, 5e6), "{cut:?}");
    assert!(near(cut.efficiency, 0.8), "{cut:?}");
    let whole = plan(MS * 20, 1.0);
    assert!(whole.cells == 2048 && near(whole.predicted, 7.4e6), "{whole:?}");
    let one = plan(MS * 3, 2.0);
    assert!(one.cells == 16 && near(one.predicted, 1.16e6), "one row at least: {one:?}");
    assert_eq!(plan(MS * 100, 2.0).cells, 2048, "all fit");
}

#[test]
fn a_deadline_is_staked_on_what_experience_says() {
    let fitted = |overrun: f64| {
        let mut rig = Rig::new(vec![policy()], 1);
        (0..16).for_each(|_| _ = rig.arrive(16, MS * 6));
        ask_in_doubt(&mut rig, Outlook { overrun, ..twice() }, |queue, outlook| {
            let plan = queue.look(&Outlook { overrun: 1.0, ..*outlook }).expect("rows wait");
            queue.fit_deadlines(outlook, plan).expect("nobody is given up")
        })
    };
    assert_eq!(fitted(1.0).rows, 16, "3.6 of 6 ms");
    let shrunk = fitted(2.0);
    // Half of 6 ms: the fixed one and 12 rows.
    assert!(shrunk.rows == 12 && shrunk.reason == SealReason::Urgent, "{shrunk:?}");
}

#[test]
fn what_a_shape_takes_beside_the_fit_counts_where_it_is_more() {
    let mut rig = Rig::new(vec![policy()], 1);
    for took in [time(16, 16), time(16, 16) * 3].into_iter().cycle().take(200) {
        rig.scheduler.prime(MODEL, 16, 16, took);
    }
    rig.arrive(16, MS * 20);
    let cost = rig.scheduler.cost(MODEL).clone();
    let fit = cost.coefficients();
    let by_hand = cost.predict(16, 16) / (fit.batch + 16.0 * fit.row(16));
    assert!(by_hand > 1.1, "{by_hand}");
    let (more, less) = ask(&mut rig, |queue, _| (queue.correction(16.0, 16), queue.correction(1.0, 256)));
    assert!(near(more, by_hand), "{more} {by_hand}");
    assert!(less >= 1.0, "{less}");
    // Half of 20 ms by experience; the rows are dearer than the fit says, so that fewer fit.
    let room = |rig: &mut Rig, overrun| {
        ask_in_doubt(rig, Outlook { overrun, ..twice() }, |queue, outlook| {
            queue.fill_cells(outlook, Class::COUNT - 1);
            queue.packer.cells[0].room
        })
    };
    let expected = (20e6 * 0.25 / by_hand - fit.batch) / fit.row(16);
    let found = room(&mut rig, 2.0);
    assert!((found - expected).abs() <= 1.0 && (2.0..16.0).contains(&expected), "{found} {expected}");
}

/// From sealing to the end, whatever the executor says it spent.
#[test]
fn how_much_later_than_promised_batches_end_is_learned_from_those_that_ran() {
    let mut rig = Rig::new(vec![policy()], 1);
    let factor = |rig: &Rig| rig.scheduler.models[0].overrun.factor();
    let turn = |rig: &mut Rig, late: Duration, service: Option<Duration>| {
        (0..16).for_each(|_| _ = rig.arrive_as(request(16)));
        let batch = rig.poll().expect("a full batch");
        rig.now = rig.now + time(16, 16) + late;
        rig.scheduler.handle_finished(rig.now, &batch, service.unwrap_or(time(16, 16)));
    };
    for _ in 0..10 {
        turn(&mut rig, Duration::ZERO, None);
    }
    assert!(factor(&rig) < 1.06, "{}", factor(&rig));
    for _ in 0..60 {
        turn(&mut rig, time(16, 16), None);
    }
    assert!((1.9..2.2).contains(&factor(&rig)), "the executor's own time was as foreseen: {}", factor(&rig));
    let before = factor(&rig);
    turn(&mut rig, MS * 500, Some(Duration::ZERO));
    assert_eq!(factor(&rig), before, "a failure");
}
