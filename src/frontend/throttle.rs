//! Connections that ask again and again, whatever they are told.
//!
//! A refusal is cheap, and whoever comes back at once has the next place before anybody who waits as told: 384 callers without
//! patience left a patient load beside them 1 request of 60. So a connection of which nearly everything is refused is
//! refused here, all but little more than what is accepted of it: coming back sooner gains nothing then, and costs the batcher
//! nothing. And it is not read for as long as it was told to wait, so that refusing it costs this machine little either:
//! half a million refusals a second left a fifth of the goodput.
//!
//! The rule is what clients are asked to keep by themselves (adaptive throttling: Beyer and others, "Site Reliability
//! Engineering", 2016, chapter 21), kept by the server, for those alone that are far beyond it. Who is refused nine of ten is not; a
//! fast open load is, behind a door that stays shut for hundreds of its requests.
//!
//! Pure: the time is an argument.
//!
//! Always true
//! - At most [`ENTRIES_MAX`] pairs of model and class are counted for a connection, none before its first refusal.
//! - A throttled connection still asks: little more of its requests go on than were accepted lately, and one whenever nothing went on
//!   for as long as it was told to wait.

use std::time::Duration;

use crate::scheduler::Class;
use crate::vocab::{ModelHandle, Moment};

/// What was asked and refused counts a third (1/e) after this time.
const MEMORY: Duration = Duration::from_millis(250);
/// Throttled is who asks for this many times what is accepted, and [`SURPLUS`] more...
const ASKED: f64 = 16.0;
/// ... which a burst may be refused of: as many as a connection may have in flight by default.
const SURPLUS: f64 = 256.0;
/// ... until it asks for no more than this many times that, and so many more.
const CALM: [f64; 2] = [4.0, 16.0];
/// Of a throttled connection go on this many times what is accepted: more than that, so that its share can grow.
const GROWTH: f64 = 1.1;
/// Longest time for which a connection is not read: its pings and cancels wait, too.
const PAUSE_MAX: Duration = Duration::from_millis(50);

const ENTRIES_MAX: usize = 16;

/// What one connection asked for and was refused.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    entries: Vec<Entry>,
    /// A request went no further since this was last asked for.
    pause: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    model: ModelHandle,
    class: Class,
    /// Both fade.
    asked: f64,
    refused: f64,
    at: Moment,
    /// The last that went on.
    went_at: Moment,
    throttled: bool,
    /// Parts of a refusal that add up to the next.
    carry: f64,
    /// What the last that was refused was told.
    rest: Duration,
}

impl Entry {
    fn fade(&mut self, now: Moment) {
        let share = (-now.since(self.at).as_secs_f64() / MEMORY.as_secs_f64()).exp();
        self.asked *= share;
        self.refused *= share;
        self.at = self.at.max(now);
    }

    /// Whether this one goes no further.
    fn ask(&mut self, now: Moment) -> bool {
        self.fade(now);
        self.asked += 1.0;
        let accepted = self.asked - self.refused;
        self.throttled = match self.throttled {
            false => self.asked > ASKED * accepted + SURPLUS,
            true => self.asked > CALM[0] * accepted + CALM[1],
        };
        if self.throttled && now < self.went_at + self.rest {
            self.carry += ((self.asked - GROWTH * accepted) / self.asked).max(0.0);
            if self.carry >= 1.0 {
                self.carry -= 1.0;
                self.refused += 1.0;
                return true;
            }
        }
        self.went_at = now;
        false
    }
}

impl Throttle {
    /// A request is about to be accepted. Some: it is to be refused, and may come back after so long.
    pub fn ask(&mut self, now: Moment, model: ModelHandle, class: Class) -> Option<Duration> {
        let entry = self.entries.iter_mut().find(|entry| (entry.model, entry.class) == (model, class))?;
        let rest = entry.ask(now).then_some(entry.rest)?;
        self.pause = Some(rest.min(PAUSE_MAX));
        Some(rest)
    }

    /// For how long its connection is not to be read, if it was throttled since this was last asked for.
    pub fn take_pause(&mut self) -> Option<Duration> {
        self.pause.take()
    }

    /// One that went on was refused for now, and told to come back after `rest`.
    pub fn refused(&mut self, now: Moment, model: ModelHandle, class: Class, rest: Duration) {
        let at = self.entries.iter().position(|entry| (entry.model, entry.class) == (model, class));
        let at = at.unwrap_or_else(|| {
            let entry = Entry {
                model,
                class,
                asked: 1.0,
                refused: 0.0,
                at: now,
                went_at: now,
                throttled: false,
                carry: 0.0,
                rest,
            };
            if self.entries.len() < ENTRIES_MAX {
                self.entries.push(entry);
                return self.entries.len() - 1;
            }
            let oldest = (0..ENTRIES_MAX).min_by_key(|at| self.entries[*at].at).expect("there are some");
            self.entries[oldest] = entry;
            oldest
        });
        let entry = &mut self.entries[at];
        entry.fade(now);
        entry.refused = (entry.refused + 1.0).min(entry.asked);
        entry.rest = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Duration = Duration::from_millis(40);
    const MODEL: ModelHandle = ModelHandle(3);

    fn at(micros: u64) -> Moment {
        Moment(1_000_000_000 + micros * 1000)
    }

    fn class(priority: u8) -> Class {
        Class::from_priority(priority)
    }

    /// Asks each `every_us` for `seconds` where one of `one_of` is accepted: how many went on.
    fn went_on(throttle: &mut Throttle, from: u64, seconds: u64, every_us: u64, one_of: u64) -> u64 {
        let mut went = 0;
        for n in 0..seconds * 1_000_000 / every_us {
            let now = at(from + n * every_us);
            if throttle.ask(now, MODEL, class(1)).is_none() {
                went += 1;
                if one_of == 0 || went % one_of != 0 {
                    throttle.refused(now, MODEL, class(1), REST);
                }
            }
        }
        went
    }

    #[test]
    fn an_open_load_of_many_times_what_is_accepted_is_not_throttled() {
        // 500 a second, one of ten accepted.
        let mut throttle = Throttle::default();
        assert_eq!(went_on(&mut throttle, 0, 10, 2000, 10), 5000);
        assert_eq!(throttle.entries.len(), 1);
    }

    #[test]
    fn of_one_that_asks_all_the_time_go_on_a_few_more_than_are_accepted() {
        // 20,000 a second, and nothing is accepted: the burst, then some probes.
        let mut throttle = Throttle::default();
        let first = went_on(&mut throttle, 0, 1, 50, 0);
        assert!((256..400).contains(&first), "{first}");
        let probes = went_on(&mut throttle, 1_000_000, 10, 50, 0);
        assert!((240..=300).contains(&probes), "one in each 40 ms, and a few: {probes}");
        // Half is accepted again: not enough for it to grow.
        let half = went_on(&mut throttle, 11_000_000, 10, 50, 2);
        assert!((250..600).contains(&half), "{half}");
        assert_eq!(throttle.ask(at(21_000_000), MODEL, class(1)), Some(REST));
    }

    #[test]
    fn a_connection_that_was_throttled_is_not_read_for_as_long_as_it_was_told_to_wait() {
        let mut throttle = Throttle::default();
        throttle.refused(at(0), MODEL, class(1), REST);
        assert_eq!((throttle.ask(at(1), MODEL, class(1)), throttle.take_pause()), (None, None));
        went_on(&mut throttle, 0, 1, 50, 0);
        assert_eq!((throttle.take_pause(), throttle.take_pause()), (Some(REST), None));
        throttle.entries[0].rest = Duration::from_secs(10);
        assert!(throttle.ask(at(1_000_050), MODEL, class(1)).is_some());
        assert_eq!(throttle.take_pause(), Some(PAUSE_MAX));
    }

    #[test]
    fn where_all_is_accepted_again_it_is_soon_free() {
        let mut throttle = Throttle::default();
        went_on(&mut throttle, 0, 2, 50, 0);
        // 100 a second now, all accepted.
        let back = went_on(&mut throttle, 2_000_000, 2, 10_000, 1);
        assert!(back > 90, "{back} of 200: it takes a second until 5,000 refusals are forgotten");
        assert_eq!(went_on(&mut throttle, 4_000_000, 2, 10_000, 1), 200);
    }

    #[test]
    fn classes_and_models_are_counted_each_for_themselves_and_only_so_many() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.ask(at(0), MODEL, class(1)), None);
        assert_eq!(throttle.entries.capacity(), 0, "nothing is held for who is not refused");
        went_on(&mut throttle, 0, 1, 50, 0);
        throttle.refused(at(1_000_000), MODEL, class(0), REST);
        throttle.refused(at(1_000_000), ModelHandle(4), class(1), REST);
        assert!((0..100).all(|_| throttle.ask(at(1_000_100), MODEL, class(0)).is_none()));
        assert!((0..100).all(|_| throttle.ask(at(1_000_100), ModelHandle(4), class(1)).is_none()));
        assert_eq!(throttle.ask(at(1_000_100), MODEL, class(1)), Some(REST));
        for model in 0..100 {
            throttle.refused(at(1_000_200 + u64::from(model)), ModelHandle(model), class(2), REST);
        }
        assert_eq!(throttle.entries.len(), ENTRIES_MAX);
        assert_eq!(throttle.ask(at(1_000_400), MODEL, class(1)), None, "the oldest were forgotten");
    }

    /// A queue of 64 places that loses 32 all 70 ms, at whose door a patient load of 370/s stands beside 96 callers who ask
    /// again each millisecond, on one connection each.
    fn beside_a_swarm(throttles: bool) -> f64 {
        let (mut patient, mut swarm) = (Throttle::default(), Throttle::default());
        let (mut queue, mut offered, mut accepted) = (0u32, 0u32, 0u32);
        for ms in 0..10_000u64 {
            if ms % 70 == 0 {
                queue = queue.saturating_sub(32);
            }
            let now = at(ms * 1000);
            let mut ask = |throttle: &mut Throttle| {
                let went = throttle.ask(now, MODEL, class(1)).is_none() || !throttles;
                let taken = went && queue < 64;
                queue += u32::from(taken);
                if went && !taken {
                    throttle.refused(now, MODEL, class(1), REST);
                }
                taken
            };
            for n in 0..96 {
                // Wherever in the millisecond it comes.
                if n == ms * 37 % 96 && ms * 37 % 100 < 37 {
                    offered += 1;
                    accepted += u32::from(ask(&mut patient));
                }
                ask(&mut swarm);
            }
        }
        f64::from(accepted) / f64::from(offered)
    }

    #[test]
    fn a_swarm_that_asks_at_once_does_not_crowd_out_a_patient_load() {
        let (without, with) = (beside_a_swarm(false), beside_a_swarm(true));
        assert!(without < 0.1, "the control: {without}");
        assert!(with > 0.5, "{with}");
    }
}
