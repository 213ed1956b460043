//! The waterfall against stories whose every nanosecond is known, and against random ones.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const CELLS: Cells = Cells { real: 60, longest_row: 30, bucket: 10 };

/// A batch that ran on a processor: packed, taken, began, ended, answered.
fn run([packed, taken, began, ended, answered]: [u64; 5]) -> Run {
    Run {
        packed_at: Moment(packed),
        taken_at: Moment(taken),
        asked_at: Moment(taken),
        began_at: Moment(began),
        ended_at: Moment(ended),
        copied_at: Moment(ended),
        answered_at: Moment(answered),
        uploaded_in: Duration::ZERO,
        computed_in: Duration::from_nanos(ended - began),
        cells: 0,
    }
}

fn one() -> Waterfall {
    Waterfall::new(Moment(0), [0])
}

/// What is not 0, by name.
fn parts(books: &Waterfall) -> Vec<(&'static str, u64)> {
    let view = books.view(0);
    assert_eq!(view.elapsed(), view.parts.total());
    PARTS.into_iter().zip(view.parts.0).filter(|(_, nanos)| *nanos > 0).collect()
}

#[test]
fn a_lone_request_is_followed_from_its_arrival_to_the_end_of_its_batch() {
    let mut books = one();
    books.came(0, Moment(100));
    books.sealed(Moment(130), 0, 1, CELLS, 0.0);
    books.turn(Moment(130), [false; 2], None);
    let took = books.finished(0, 1, &run([150, 170, 170, 270, 275]));
    books.turn(Moment(300), [false; 2], None);
    assert_eq!(took, 100);
    let expected = [
        ("useful", 60),
        ("padding_longest_row", 30),
        ("padding_bucket", 10),
        ("idle_packing", 20),
        ("idle_mailbox", 30 + 20),
        // Before it came, and after it: nobody waited for the answers to be sent.
        ("idle_empty", 100 + 30),
    ];
    assert_eq!(parts(&books), expected);
}

#[test]
fn a_window_is_a_hold_until_it_ends_and_a_late_batcher_is_a_mailbox() {
    let mut books = one();
    books.came(0, Moment(10));
    books.turn(Moment(15), [true, false], Some(Moment(1_000)));
    // Another row comes, and it is held on.
    books.came(0, Moment(500));
    books.turn(Moment(505), [true, false], Some(Moment(1_000)));
    books.sealed(Moment(1_040), 0, 1, CELLS, 0.0);
    assert_eq!(parts(&books), [("idle_hold", 985), ("idle_mailbox", 5 + 40), ("idle_empty", 10)]);
}

#[test]
fn a_hold_ends_with_the_arrival_that_fills_the_batch() {
    let mut books = one();
    books.turn(Moment(15), [true, false], Some(Moment(1_000)));
    books.came(0, Moment(400));
    books.sealed(Moment(430), 0, 1, CELLS, 0.0);
    assert_eq!(parts(&books), [("idle_hold", 385), ("idle_mailbox", 30), ("idle_empty", 15)]);
}

#[test]
fn rows_that_were_cancelled_leave_an_empty_queue_behind() {
    let mut books = one();
    books.turn(Moment(10), [true, false], None);
    books.turn(Moment(50), [false; 2], None);
    books.turn(Moment(90), [true, false], None);
    assert_eq!(parts(&books), [("idle_hold", 40), ("idle_empty", 50)]);
}

#[test]
fn work_of_another_group_keeps_nobody_waiting() {
    let mut books = Waterfall::new(Moment(0), [0, 1]);
    books.turn(Moment(10), [false, true], None);
    books.turn(Moment(50), [false; 2], None);
    let idle = |at: usize| books.view(at).extended(Moment(60)).parts;
    assert_eq!(idle(0).get(Part::IdleEmpty), 60);
    assert_eq!((idle(1).get(Part::IdleHold), idle(1).get(Part::IdleEmpty)), (40, 20));
}

#[test]
fn a_batch_behind_another_begins_where_that_one_ended() {
    let mut books = one();
    books.came(0, Moment(0));
    books.sealed(Moment(0), 0, 1, CELLS, 0.0);
    books.sealed(Moment(0), 0, 2, CELLS, 0.0);
    books.turn(Moment(0), [false; 2], None);
    books.finished(0, 1, &run([0, 0, 0, 100, 104]));
    books.turn(Moment(130), [false; 2], None);
    books.finished(0, 2, &run([20, 105, 105, 205, 206]));
    books.turn(Moment(210), [false; 2], None);
    let expected = [
        ("useful", 120),
        ("padding_longest_row", 60),
        ("padding_bucket", 20),
        ("idle_mailbox", 1),
        ("idle_scatter", 4),
        ("idle_empty", 5),
    ];
    assert_eq!(parts(&books), expected);
}

#[test]
fn rows_that_wait_while_nobody_knows_that_the_executor_is_free_wait_for_a_message() {
    let mut books = one();
    books.sealed(Moment(0), 0, 1, CELLS, 0.0);
    books.came(0, Moment(60));
    books.turn(Moment(70), [true, false], None);
    books.finished(0, 1, &run([0, 0, 0, 100, 110]));
    // Heard of at 150, and the rows are packed for 20.
    books.sealed(Moment(150), 0, 2, CELLS, 0.0);
    books.turn(Moment(150), [false; 2], None);
    books.finished(0, 2, &run([170, 170, 170, 170, 170]));
    let expected = [
        ("useful", 60),
        ("padding_longest_row", 30),
        ("padding_bucket", 10),
        ("idle_packing", 20),
        ("idle_mailbox", 40),
        ("idle_scatter", 10),
    ];
    assert_eq!(parts(&books), expected);
}

#[test]
fn the_fixed_share_of_a_batch_is_launch_and_the_rest_is_split_by_cells() {
    let mut books = one();
    books.sealed(Moment(0), 0, 1, CELLS, 0.25);
    // A device computes 120 cells for 100.
    books.finished(0, 1, &Run { cells: 120, ..run([0, 0, 0, 1_600, 1_600]) });
    let expected = [
        ("useful", 600),
        ("padding_longest_row", 300),
        ("padding_bucket", 100),
        ("padding_rounding", 200),
        ("overhead_launch", 400),
    ];
    assert_eq!(parts(&books), expected);
}

#[test]
fn copies_count_where_nothing_was_computed_meanwhile() {
    let device = |[packed, taken, asked, began, ended, copied]: [u64; 6], uploaded| Run {
        packed_at: Moment(packed),
        taken_at: Moment(taken),
        asked_at: Moment(asked),
        began_at: Moment(began),
        ended_at: Moment(ended),
        copied_at: Moment(copied),
        answered_at: Moment(copied),
        uploaded_in: Duration::from_nanos(uploaded),
        computed_in: Duration::from_nanos(ended - began),
        cells: 0,
    };
    let all = Cells { real: 1, ..Cells::default() };
    let mut books = one();
    books.sealed(Moment(0), 0, 1, all, 0.0);
    books.sealed(Moment(0), 0, 2, all, 0.0);
    // Waits 5 for readback memory, is asked for in 10, uploaded in 20, and read back while the second is computed.
    books.finished(0, 1, &device([0, 0, 5, 35, 100, 130], 20));
    books.finished(0, 2, &device([1, 6, 40, 102, 200, 240], 30));
    let expected = [
        ("useful", 65 + 98),
        ("overhead_launch", 10),
        // 2 of the first one's readback, and all of the last one's.
        ("overhead_copy", 20 + 2 + 40),
        ("idle_copy", 5),
    ];
    assert_eq!(parts(&books), expected);
    // In pieces, one after the other: what was not computed was copied.
    books.sealed(Moment(240), 0, 3, all, 0.0);
    let pieces = Run { computed_in: Duration::from_nanos(70), ..device([240, 240, 240, 240, 340, 340], 0) };
    assert_eq!(books.finished(0, 3, &pieces), 100);
    assert_eq!(parts(&books)[2], ("overhead_copy", 62 + 30));
}

#[test]
fn a_whole_is_divided_without_a_rest() {
    let divided = |whole, shares: &[u64]| {
        let mut parts = Vec::new();
        divide(whole, shares.iter().copied(), |_, part| parts.push(part));
        parts
    };
    assert_eq!(divided(100, &[1, 1, 1]), [33, 33, 34]);
    assert_eq!(divided(7, &[0, 3, 0]), [0, 7, 0]);
    assert_eq!(divided(7, &[0, 0]), [7]);
    let half = 1 << 63;
    assert_eq!(divided(u64::MAX, &[half - 1, half]), [half - 1, half]);
}

#[test]
fn bars_show_what_there_is() {
    let mut share = [0.0; PARTS.len()];
    (share[0], share[1], share[2], share[11]) = (0.749, 0.001, 0.0004, 0.25);
    let mut bars = bars(&share);
    assert_eq!(bars.len(), 3);
    assert_eq!(bars.remove(1), "padding_longest_row    0.1 %");
    assert_eq!(bars[0], format!("useful                74.9 %  {}", "█".repeat(30)));
    assert_eq!(bars[1], format!("idle_empty            25.0 %  {}", "█".repeat(10)));
}

/// Something that may happen to the books, with moments from anywhere.
#[derive(Clone, Debug)]
enum Event {
    Came(usize, u64),
    Sealed(usize, u64, Cells, f64),
    /// Which of the batches that are out, and its moments in any order.
    Finished(usize, [u64; 9], u64),
    Turn(u64, [bool; 2], Option<u64>),
    Shown(usize, u64),
}

fn event() -> impl Strategy<Value = Event> {
    let at = || 0u64..10_000;
    let cells =
        (0u64..50, 0u64..50, 0u64..50).prop_map(|(real, longest_row, bucket)| Cells { real, longest_row, bucket });
    prop_oneof![
        (0usize..2, at()).prop_map(|(group, at)| Event::Came(group, at)),
        (0usize..3, at(), cells, -0.5f64..1.5).prop_map(|(e, at, cells, fixed)| Event::Sealed(e, at, cells, fixed)),
        (any::<prop::sample::Index>(), prop::array::uniform9(at()), 0u64..200)
            .prop_map(|(which, moments, cells)| Event::Finished(which.index(16), moments, cells)),
        (at(), prop::array::uniform2(any::<bool>()), prop::option::of(at()))
            .prop_map(|(at, waits, wake)| Event::Turn(at, waits, wake)),
        (0usize..3, at()).prop_map(|(e, at)| Event::Shown(e, at)),
    ]
}

proptest! {
    #[test]
    fn parts_add_up_and_never_shrink_whatever_is_said_in_whatever_order(
        events in prop::collection::vec(event(), 0..200)
    ) {
        let mut books = Waterfall::new(Moment(50), [0, 0, 1]);
        let (mut out, mut batches) = (Vec::new(), 0);
        let mut before: Vec<View> = (0..3).map(|at| books.view(at)).collect();
        let mut charged = [0u64; 3];
        for event in events {
            match event {
                Event::Came(group, at) => books.came(group, Moment(at)),
                Event::Sealed(executor, at, cells, fixed) => {
                    batches += 1;
                    out.push((executor, batches));
                    books.sealed(Moment(at), executor, batches, cells, fixed);
                }
                Event::Finished(which, m, cells) if !out.is_empty() => {
                    let (executor, batch) = out.swap_remove(which % out.len());
                    let run = Run {
                        packed_at: Moment(m[0]),
                        taken_at: Moment(m[1]),
                        asked_at: Moment(m[2]),
                        began_at: Moment(m[3]),
                        ended_at: Moment(m[4]),
                        copied_at: Moment(m[5]),
                        answered_at: Moment(m[6]),
                        uploaded_in: Duration::from_nanos(m[7]),
                        computed_in: Duration::from_nanos(m[8]),
                        cells,
                    };
                    charged[executor] += books.finished(executor, batch, &run);
                }
                Event::Finished(..) => {}
                Event::Turn(at, waits, wake) => books.turn(Moment(at), waits, wake.map(Moment)),
                Event::Shown(executor, at) => books.shown(executor, Moment(at)),
            }
            for (executor, last) in before.iter_mut().enumerate() {
                let view = books.view(executor);
                prop_assert_eq!(view.elapsed(), view.parts.total());
                prop_assert!(view.until >= last.until);
                prop_assert!(last.parts.0.iter().zip(view.parts.0).all(|(before, now)| *before <= now));
                prop_assert_eq!(view.parts.of_batches(), charged[executor]);
                *last = view;
            }
        }
    }
}
