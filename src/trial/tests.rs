use proptest::prelude::*;

use super::*;
use crate::scheduler::{SealedBatch, TicketId};
use crate::vocab::{Layout, ModelHandle, SealReason};

const MS: u64 = 1_000_000;
const START: Moment = Moment(7_000 * MS);

fn at(ms: u64) -> Moment {
    Moment(START.nanos() + ms * MS)
}

fn plan(seconds: u64) -> Plan {
    Plan::new(Duration::from_secs(seconds), Duration::from_millis(50))
}

fn batch(id: u64, rows: u32) -> SealedBatch {
    SealedBatch {
        id,
        model: ModelHandle(0),
        executor: 0,
        rows,
        rows_possible: 8,
        layout: Layout::Padded,
        squares_real: 0,
        padded_len: 10,
        cells_real: 10 * u64::from(rows),
        reason: SealReason::Idle,
        sealed_at: START,
        generation: 1,
        predicted: 0,
        objective: Duration::ZERO,
    }
}

/// Serves one request each `every` ms, answered after as long as the policy in force lets it wait. Follows the trial's steps and
/// returns its outcome and when it came.
fn serve(trial: &mut Trial, every: u64, took: impl Fn(Arm) -> u64) -> (Outcome, u64) {
    let mut answers: Vec<(u64, u64, Arm)> = Vec::new();
    let mut generation = 1;
    for ms in 0..4_000_000 {
        answers.retain(|(due, number, arm)| {
            if *due == ms {
                trial.meter.sealed(*arm, &batch(*number, 1), &[TicketId(*number as u32)]);
                trial.meter.finished(at(ms), *number);
            }
            *due > ms
        });
        if ms % every == 0 {
            trial.meter.arrived(at(ms), trial.arm(), None, Some(TicketId(ms as u32)));
            answers.push((ms + took(trial.arm()), ms, trial.arm()));
        }
        match trial.poll(at(ms)) {
            Some(Step::Switch(arm)) => {
                generation += 1;
                trial.switched(at(ms), arm, generation);
            }
            Some(Step::End(outcome)) => return (outcome, ms),
            None => {}
        }
        assert!(trial.next(at(ms)) > at(ms), "nothing is left to do at {ms}");
    }
    panic!("it does not end")
}

#[test]
fn policies_take_turns_the_old_one_first() {
    let mut trial = Trial::new(plan(20), START, 1);
    let (outcome, ended) = serve(&mut trial, 10, |_| 5);
    assert_eq!((outcome.why, ended), (Why::NotBetter, 20_000));
    let slices = trial.report(&[], None).slices;
    let turns: Vec<(Arm, u64)> =
        slices.iter().map(|slice| (slice.arm, slice.at.since(START).as_millis() as u64)).collect();
    assert_eq!(turns[..3], [(Arm::Baseline, 0), (Arm::Changed, 2000), (Arm::Baseline, 4000)]);
    assert_eq!(turns.len(), 10);
    assert_eq!(slices.last().map(|slice| slice.generation), Some(10));
}

#[test]
fn a_share_of_the_time_is_the_changed_policys() {
    let mut trial = Trial::new(Plan { share: 0.25, ..plan(8) }, START, 1);
    serve(&mut trial, 10, |_| 5);
    let report = trial.report(&[], None);
    assert_eq!((report.baseline.offered, report.changed.offered), (601, 200), "of 800, one each 10 ms");
}

#[test]
fn all_of_the_time_can_be_the_changed_policys_and_then_only_the_guard_decides() {
    let mut trial = Trial::new(Plan { share: 1.0, keep: Keep::Unbroken, ..plan(8) }, START, 1);
    let (outcome, ended) = serve(&mut trial, 10, |_| 5);
    assert_eq!((outcome.why, ended), (Why::Unbroken, 8000));
    let report = trial.report(&[], None);
    assert_eq!((report.slices.len(), report.slices[1].at, report.baseline.offered), (2, START, 1));
}

#[test]
fn a_policy_that_is_better_stays() {
    let mut trial = Trial::new(plan(8), START, 1);
    let (outcome, ended) = serve(&mut trial, 10, |arm| if arm == Arm::Baseline { 20 } else { 10 });
    assert_eq!((outcome.why, ended), (Why::Better, 8000), "{}", outcome.message);
    assert!(outcome.message.contains("p99 in ms: 20"), "{}", outcome.message);
}

/// Goal: nobody has to wait for an answer to know that it is late. Method: the changed policy holds everything for two seconds.
#[test]
fn a_policy_that_holds_everybody_back_is_reverted_before_its_first_answer() {
    let mut trial = Trial::new(plan(60), START, 1);
    let (outcome, ended) = serve(&mut trial, 10, |arm| if arm == Arm::Baseline { 5 } else { 2000 });
    assert_eq!(outcome.why, Why::Breach, "{}", outcome.message);
    let report = trial.report(&[], Some(Ended { at: at(ended), outcome, generation: 3 }));
    assert_eq!(report.changed.answered, 0);
    // The fifth comes at 50 ms, and is late 50 ms later; then one look.
    let exposed = report.exposed().expect("it ended in its turn").as_millis();
    assert!((100..=106).contains(&exposed), "{exposed} ms");
}

#[test]
fn a_slow_baseline_allows_the_change_to_be_as_slow() {
    let mut trial = Trial::new(plan(8), START, 1);
    let (outcome, _) = serve(&mut trial, 10, |arm| if arm == Arm::Baseline { 80 } else { 70 });
    assert_eq!(outcome.why, Why::Better, "{}", outcome.message);
}

#[test]
fn few_answers_keep_nothing() {
    let mut trial = Trial::new(plan(8), START, 1);
    let (outcome, _) = serve(&mut trial, 200, |arm| if arm == Arm::Baseline { 20 } else { 10 });
    assert_eq!((outcome.why, outcome.word()), (Why::TooFew, "reverted"), "{}", outcome.message);
}

#[test]
fn criteria_decide_by_their_own_figure() {
    for (keep, why) in [
        (Keep::P50, Why::Better),
        (Keep::OnTime, Why::NotBetter),
        (Keep::Fill, Why::NotBetter),
        (Keep::Waste, Why::NotBetter),
        (Keep::Unbroken, Why::Unbroken),
        (Keep::Never, Why::Measured),
    ] {
        let mut trial = Trial::new(Plan { keep, ..plan(8) }, START, 1);
        let (outcome, _) = serve(&mut trial, 10, |arm| if arm == Arm::Baseline { 20 } else { 10 });
        assert_eq!(outcome.why, why, "{}: {}", keep.name(), outcome.message);
        assert_eq!(Keep::from_name(keep.name()), Some(keep));
    }
}

#[test]
fn a_refused_step_is_tried_again_a_little_later() {
    let mut trial = Trial::new(plan(4), START, 1);
    assert_eq!(trial.poll(at(2000)), Some(Step::Switch(Arm::Changed)));
    trial.refused(at(2000));
    assert_eq!((trial.poll(at(2009)), trial.next(at(2009))), (None, at(2010)));
    assert_eq!(trial.poll(at(2010)), Some(Step::Switch(Arm::Changed)));
    trial.switched(at(2010), Arm::Changed, 2);
    assert_eq!(trial.next(at(2010)), at(4000));
    assert!(matches!(trial.poll(at(4000)), Some(Step::End(_))));
    trial.refused(at(4000));
    assert_eq!((trial.poll(at(4001)), trial.next(at(4001))), (None, at(4010)));
    assert!(matches!(trial.poll(at(4010)), Some(Step::End(_))));
}

#[test]
fn numbers_that_cannot_be_are_told_with_what_was_expected() {
    let good = plan(30);
    assert_eq!(good.check(), Ok(()));
    for (wrong, said) in [
        (Plan { time: Duration::from_millis(10), ..good }, "seconds: expected 1 to 3600, got 0.01"),
        (Plan { share: 1.5, ..good }, "share: expected 0.05 to 1, got 1.5"),
        (Plan { share: f64::NAN, ..good }, "share"),
        (Plan { slo: Duration::ZERO, ..good }, "slo_ms: expected 0.01"),
        (Plan { on_time_min: 99.0, ..good }, "on_time_min: expected 0 to 1, got 99"),
        (Plan { margin: -0.1, ..good }, "margin: expected 0 to 1"),
    ] {
        assert!(wrong.check().expect_err("it is wrong").contains(said), "{wrong:?}");
    }
}

#[derive(Clone, Debug)]
enum Input {
    Arrive,
    Refuse,
    Seal(usize),
    Finish,
    Expire(usize),
    Cancel(usize),
    StepFails,
}

fn input() -> impl Strategy<Value = (u64, Input)> {
    let what = prop_oneof![
        6 => Just(Input::Arrive),
        1 => Just(Input::Refuse),
        3 => (1usize..5).prop_map(Input::Seal),
        3 => Just(Input::Finish),
        1 => (0usize..9).prop_map(Input::Expire),
        1 => (0usize..9).prop_map(Input::Cancel),
        1 => Just(Input::StepFails),
    ];
    (0u64..120, what)
}

proptest! {
    /// Whatever comes in whatever order: each request is judged once or cancelled or open; policies take turns; the trial has an
    /// end no later than its time and the last refusal; kept is only what was in force and not in breach.
    #[test]
    fn every_trial_ends_and_its_books_add_up(
        inputs in proptest::collection::vec(input(), 0..300),
        seconds in 1u64..12,
        share in prop_oneof![0.05f64..0.95, Just(1.0)],
    ) {
        let mut trial = Trial::new(Plan { share, keep: Keep::Unbroken, ..plan(seconds) }, START, 1);
        let (mut now, mut next_ticket, mut next_batch, mut generation) = (0u64, 0u32, 1u64, 1u32);
        let (mut waiting, mut running) = (Vec::new(), Vec::new());
        let mut ended = None;
        // What did not end by then is led to its end by the clock alone.
        let rest = (0..400).map(|_| (40, Input::Finish));
        for (ms, input) in inputs.into_iter().chain(rest) {
            now += ms;
            let mut fails = false;
            match input {
                Input::Arrive => {
                    trial.meter.arrived(at(now), trial.arm(), None, Some(TicketId(next_ticket)));
                    waiting.push(TicketId(next_ticket));
                    next_ticket += 1;
                }
                Input::Refuse => trial.meter.arrived(at(now), trial.arm(), None, None),
                Input::Seal(rows) if !waiting.is_empty() => {
                    let members: Vec<TicketId> = waiting.drain(..rows.min(waiting.len())).collect();
                    trial.meter.sealed(trial.arm(), &batch(next_batch, members.len() as u32), &members);
                    running.push(next_batch);
                    next_batch += 1;
                }
                Input::Finish if !running.is_empty() => trial.meter.finished(at(now), running.remove(0)),
                Input::Expire(place) if place < waiting.len() => trial.meter.expired(waiting.remove(place)),
                Input::Cancel(place) if place < waiting.len() => trial.meter.cancelled(waiting.remove(place)),
                Input::StepFails => fails = true,
                _ => {}
            }
            match trial.poll(at(now)) {
                Some(_) if fails => trial.refused(at(now)),
                Some(Step::Switch(arm)) => {
                    prop_assert_ne!(arm, trial.arm());
                    generation += 1;
                    trial.switched(at(now), arm, generation);
                }
                Some(Step::End(outcome)) => {
                    ended = Some((now, outcome));
                    break;
                }
                None => {}
            }
            // It asks for a look in the future, or for one that a refusal delays.
            prop_assert!(trial.next(at(now)) > at(now) || fails, "{:?} at {now}", trial.next(at(now)));
        }
        let (when, outcome) = ended.expect("it ended");
        let report = trial.report(&[], None);
        prop_assert!(report.slices.len() <= SLICES_MAX as usize);
        prop_assert!(report.slices.is_sorted_by(|a, b| a.at <= b.at && a.generation < b.generation));
        // A step is made at an input: at most 120 ms late, and 10 more after a refusal, and again.
        prop_assert!(when <= seconds * 1000 + 400 || outcome.why == Why::Breach, "{when}");
        let mut judged_or_gone = 0;
        for arm in [&report.baseline, &report.changed] {
            prop_assert!(arm.late <= arm.judged && arm.judged + arm.cancelled <= arm.offered);
            prop_assert!(arm.answered + arm.refused + arm.expired + arm.cancelled <= arm.offered);
            judged_or_gone += arm.judged + arm.cancelled;
        }
        let offered = report.baseline.offered + report.changed.offered;
        prop_assert_eq!(judged_or_gone + trial.meter.open() as u64, offered);
        if outcome.why == Why::Breach {
            let (judged, late) = trial.meter.slice();
            prop_assert!(late >= 5 && late as f64 > 0.01 * judged as f64);
            prop_assert!(!outcome.why.keeps());
        }
        if outcome.why.keeps() {
            prop_assert!(report.changed.answered >= ANSWERS_MIN);
        }
    }
}
