//! Sees from outside when a shard has mail and does not move, and ends its sleep.
//!
//! glommio 0.9 can park with runnable tasks. The shard's own timer ends that within a tick; this is the second line, for
//! the day when the timer is the thing that was lost. A handled signal interrupts the ring's wait.
//!
//! Always true
//! - A nudge is given only to a shard that had mail waiting and made no turn between two looks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One shard as seen at the last look.
#[derive(Debug)]
pub struct Watch {
    turns: Arc<AtomicU64>,
    turns_seen: u64,
    had_mail: bool,
}

impl Watch {
    pub fn new(turns: Arc<AtomicU64>) -> Watch {
        Watch { turns, turns_seen: 0, had_mail: false }
    }

    /// Whether the shard stands still: mail was waiting at the last look and now, and no turn was made between.
    pub fn look(&mut self, has_mail: bool) -> bool {
        let turns = self.turns.load(Ordering::Relaxed);
        let stands_still = self.had_mail && has_mail && turns == self.turns_seen;
        self.turns_seen = turns;
        self.had_mail = has_mail;
        stands_still
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_shard_with_mail_and_without_turns_stands_still() {
        let turns = Arc::new(AtomicU64::new(0));
        let mut watch = Watch::new(Arc::clone(&turns));
        assert!(!watch.look(true), "one look is no proof");
        assert!(watch.look(true));
        turns.fetch_add(1, Ordering::Relaxed);
        assert!(!watch.look(true), "it moved");
        assert!(!watch.look(false), "it has nothing to do");
        assert!(!watch.look(true));
    }
}
