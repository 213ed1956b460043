//! Room for bytes that are on their way, asked for so that a system without memory says no instead of ending the process.

use std::collections::TryReserveError;

use bytes::{Bytes, BytesMut};

/// Makes room for `more` bytes behind what `buffer` holds: where it has to grow, for `growth` bytes, which are not fewer. The buffer
/// stays as it is if the system has no room.
///
/// `BytesMut` can only grow or abort; a vector can be asked. The way there and back copies nothing.
pub fn try_reserve(buffer: &mut BytesMut, more: usize, growth: usize) -> Result<(), TryReserveError> {
    if buffer.capacity() - buffer.len() >= more {
        return Ok(());
    }
    let mut bytes = Vec::from(std::mem::take(buffer));
    let grown = bytes.try_reserve_exact(growth);
    *buffer = BytesMut::from(Bytes::from(bytes));
    grown
}

/// Room to make beyond the `have` bytes that have come of a frame of `needed`, when the next `read` may bring so many: all of the
/// rest once an eighth has come. Whoever only announces much gets little, and a long frame moves once or twice.
pub fn growth(have: usize, needed: usize, read: usize) -> usize {
    let rest = needed - have;
    rest.min(read.max(7 * have))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_for_what_comes_next_and_at_most_eight_times_what_has_come() {
        const NEEDED: usize = 64 << 20;
        let (mut buffer, mut moves, mut have) = (32, 0, 32);
        while have < NEEDED {
            let next = (have + 256).min(NEEDED);
            if buffer < next {
                buffer = have + growth(have, NEEDED, 256);
                assert!(buffer >= next && buffer <= NEEDED && buffer <= (8 * have).max(have + 256), "{have}: {buffer}");
                moves += 1;
            }
            have = next;
        }
        assert_eq!(buffer, NEEDED, "exactly");
        assert!(moves <= 9, "{moves}: eight times as much each time");
        assert_eq!([growth(99, 100, 256), growth(100, 100, 256), growth(0, 100, 8)], [1, 0, 8]);
    }

    #[test]
    fn what_is_there_stays_whether_there_is_room_for_more_or_not() {
        let mut buffer = BytesMut::from(&b"begun"[..]);
        try_reserve(&mut buffer, 1000, 1000).expect("a thousand bytes");
        assert!(buffer.capacity() >= 1005 && buffer == b"begun"[..]);
        let (address, capacity) = (buffer.as_ptr(), buffer.capacity());
        try_reserve(&mut buffer, capacity - 5, 1 << 60).expect("they are there");
        assert_eq!((buffer.as_ptr(), buffer.capacity()), (address, capacity));
        // More than any machine has addresses for.
        assert!(try_reserve(&mut buffer, 1 << 60, 1 << 60).is_err());
        assert!(try_reserve(&mut buffer, usize::MAX, usize::MAX).is_err());
        assert_eq!(buffer, b"begun"[..]);
        buffer.extend_from_slice(b" and ended");
        assert_eq!(buffer, b"begun and ended"[..]);
    }

    #[test]
    fn a_vector_on_its_way_is_not_copied() {
        let mut buffer = BytesMut::zeroed(10_000);
        try_reserve(&mut buffer, 1 << 10, 1 << 20).expect("a megabyte");
        let address = buffer.as_ptr();
        buffer.resize(1 << 20, 7);
        assert_eq!(buffer.as_ptr(), address, "it was room for all of it");
        let frozen = buffer.freeze();
        assert_eq!(frozen.as_ptr(), address);
    }
}
