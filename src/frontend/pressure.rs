//! What a shard does when accepted payloads come near their budget: smaller windows first, then no new connections.
//!
//! Requests beyond the budget are refused in any case (scheduler/admission.rs). But a refusal is a round trip for nothing; a
//! smaller window makes those wait that have the most in flight, before anything has to be refused.
//!
//! Pure, but for the last function, which acts on it.
//!
//! Always true
//! - Between two marks nothing changes, so that a load that stays makes no frames.
//! - No window is below the floor, with which one payload of the largest size can be sent.
//! - Nobody's window is lowered who has less in flight than somebody whose window is not.

use super::connection::{Connection, Phase};
use super::state::State;
use crate::wire::Kind;
use crate::wire::encoder::{Head, append_frame};
use crate::wire::message::Credit;

/// Windows are lowered above this share of the budget, and raised below the other, in percent.
const WINDOWS: [u64; 2] = [75, 60];
/// Connections are not taken above this share, until it is below the other.
const CONNECTIONS: [u64; 2] = [95, 85];
/// What lowering leaves of what is in flight, in percent.
const LEFT: u64 = 75;

/// What is to happen to windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    Lower,
    Hold,
    Raise,
}

/// How near the budget is.
#[derive(Clone, Copy, Debug)]
pub struct Pressure {
    budget: u64,
    closed: bool,
}

impl Pressure {
    pub fn new(budget: u64) -> Pressure {
        Pressure { budget, closed: false }
    }

    /// Looks at the payload bytes of all accepted requests, of all shards.
    pub fn look(&mut self, bytes: u64) -> Windows {
        self.closed = match self.closed {
            false => bytes > self.share(CONNECTIONS[0]),
            true => bytes >= self.share(CONNECTIONS[1]),
        };
        if bytes > self.share(WINDOWS[0]) {
            Windows::Lower
        } else if bytes < self.share(WINDOWS[1]) {
            Windows::Raise
        } else {
            Windows::Hold
        }
    }

    /// Whether new connections have to wait.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    fn share(&self, percent: u64) -> u64 {
        (u128::from(self.budget) * u128::from(percent) / 100) as u64
    }
}

/// The window that leaves so much of what connections have in flight that it is [`LEFT`] percent in all: those with less keep
/// what they have, the greedy share the rest. Not below `floor`.
pub fn lowered(in_flight: &mut [u64], floor: u64) -> u64 {
    in_flight.sort_unstable();
    let total: u128 = in_flight.iter().map(|bytes| u128::from(*bytes)).sum();
    let mut left = (total * u128::from(LEFT) / 100) as u64;
    for (at, bytes) in in_flight.iter().enumerate() {
        // An equal share of what is left, of all from here on.
        let share = left / (in_flight.len() - at) as u64;
        if *bytes > share {
            return share.max(floor);
        }
        left -= bytes;
    }
    floor
}

/// The next larger window on the way back.
pub fn raised(window: u64, full: u64) -> u64 {
    window.saturating_mul(2).min(full)
}

impl State {
    /// Lowers the windows of those that have the most in flight while payloads are near their budget, and raises them again.
    pub(super) fn adjust_windows(&mut self) {
        let full = self.options.credit_bytes;
        let step = self.pressure.look(self.telemetry.admitted_bytes());
        let open = |connection: &Connection| connection.phase == Phase::Open;
        let changes: Vec<(u32, u64)> = match step {
            Windows::Hold => return,
            Windows::Lower => {
                let connections = || self.connections.iter().filter(|(_, connection)| open(connection));
                let mut in_flight: Vec<u64> = connections()
                    .map(|(_, connection)| connection.bytes_in_flight)
                    .filter(|bytes| *bytes > 0)
                    .collect();
                let window = lowered(&mut in_flight, u64::from(self.options.payload_bytes_max).min(full));
                let greedy =
                    |connection: &Connection| connection.bytes_in_flight > window && connection.window_bytes > window;
                connections().filter(|(_, connection)| greedy(connection)).map(|(at, _)| (at as u32, window)).collect()
            }
            Windows::Raise => self
                .connections
                .iter()
                .filter(|(_, connection)| open(connection) && connection.window_bytes < full)
                .map(|(at, connection)| (at as u32, raised(connection.window_bytes, full)))
                .collect(),
        };
        for (at, window) in changes {
            self.metrics().window_changed();
            let credit = Credit { requests: self.options.credit_requests, bytes: window };
            let connection = self.output(at);
            connection.window_bytes = window;
            append_frame(connection.out.end(), Head::control(Kind::Credit), &credit, &[]).expect("two numbers");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn windows_and_connections_change_at_their_marks_and_not_between() {
        let mut pressure = Pressure::new(1000);
        let mut look = |bytes: u64| (pressure.look(bytes), pressure.is_closed());
        assert_eq!(look(0), (Windows::Raise, false));
        assert_eq!(
            [look(599), look(600), look(750), look(751)].map(|(windows, _)| windows),
            [Windows::Raise, Windows::Hold, Windows::Hold, Windows::Lower]
        );
        assert_eq!(
            [look(950), look(951), look(900), look(850), look(849), look(950)].map(|(_, closed)| closed),
            [false, true, true, true, false, false]
        );
        assert_eq!(Pressure::new(u64::MAX).look(u64::MAX / 2), Windows::Raise);
    }

    #[test]
    fn the_greedy_are_lowered_to_one_level_and_the_modest_keep_what_they_have() {
        // 1210 are in flight, 907 are to be left: the modest have 110, the two greedy share 797.
        assert_eq!(lowered(&mut [600, 10, 500, 100], 1), 398);
        assert_eq!(lowered(&mut [100, 100], 1), 75);
        assert_eq!(lowered(&mut [100, 100], 80), 80);
        assert_eq!((lowered(&mut [], 7), lowered(&mut [0, 0], 7)), (7, 7));
    }

    #[test]
    fn a_window_comes_back_in_steps() {
        let steps: Vec<u64> =
            std::iter::successors(Some(10), |window| (*window < 64).then(|| raised(*window, 64))).collect();
        assert_eq!(steps, [10, 20, 40, 64]);
    }

    proptest! {
        #[test]
        fn what_a_lowered_window_leaves_is_what_was_to_be_left(mut in_flight in proptest::collection::vec(0..1_000_000u64, 1..50)) {
            let window = lowered(&mut in_flight, 0);
            let total: u64 = in_flight.iter().sum();
            let left: u64 = in_flight.iter().map(|bytes| *bytes.min(&window)).sum();
            // Rounding leaves less than a byte for each.
            prop_assert!(left <= total * LEFT / 100 && left + in_flight.len() as u64 >= total * LEFT / 100);
        }
    }
}
