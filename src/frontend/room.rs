//! Room for bytes that are on their way, asked for so that a system without memory says no instead of ending the process.

use std::collections::TryReserveError;

use bytes::{Bytes, BytesMut};

/// Makes room for `more` bytes behind what `buffer` holds, which stays as it is if there is none.
///
/// `BytesMut` can only grow or abort; a vector can be asked. The way there and back copies nothing.
pub fn try_reserve(buffer: &mut BytesMut, more: usize) -> Result<(), TryReserveError> {
    if buffer.capacity() - buffer.len() >= more {
        return Ok(());
    }
    let mut bytes = Vec::from(std::mem::take(buffer));
    let grown = bytes.try_reserve(more);
    *buffer = BytesMut::from(Bytes::from(bytes));
    grown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_stays_whether_there_is_room_for_more_or_not() {
        let mut buffer = BytesMut::from(&b"begun"[..]);
        try_reserve(&mut buffer, 1000).expect("a thousand bytes");
        assert!(buffer.capacity() >= 1005 && buffer == b"begun"[..]);
        let (address, capacity) = (buffer.as_ptr(), buffer.capacity());
        try_reserve(&mut buffer, capacity - 5).expect("they are there");
        assert_eq!((buffer.as_ptr(), buffer.capacity()), (address, capacity));
        // More than any machine has addresses for.
        assert!(try_reserve(&mut buffer, 1 << 60).is_err());
        assert!(try_reserve(&mut buffer, usize::MAX).is_err());
        assert_eq!(buffer, b"begun"[..]);
        buffer.extend_from_slice(b" and ended");
        assert_eq!(buffer, b"begun and ended"[..]);
    }

    #[test]
    fn a_vector_on_its_way_is_not_copied() {
        let mut buffer = BytesMut::zeroed(10_000);
        try_reserve(&mut buffer, 1 << 20).expect("a megabyte");
        let address = buffer.as_ptr();
        buffer.resize(1 << 20, 7);
        assert_eq!(buffer.as_ptr(), address, "it was room for all of it");
        let frozen = buffer.freeze();
        assert_eq!(frozen.as_ptr(), address);
    }
}
