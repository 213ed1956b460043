//! Bytes for a peer that have not gone yet, in pieces, so that what waits is never moved: neither by what is appended behind
//! it nor when what was before it has gone.
//!
//! Always true
//! - Bytes leave in the order in which they were appended.
//! - A frame lies in one piece. A piece takes more frames until it has [`PIECE`] bytes.

use std::collections::VecDeque;

/// From so many bytes on a piece is full: large enough that most answers to one burst are one write.
const PIECE: usize = 256 << 10;

#[derive(Debug, Default)]
pub struct Output {
    /// Full pieces, first to last.
    full: VecDeque<Vec<u8>>,
    /// Bytes in them.
    full_bytes: usize,
    /// Where frames are appended.
    tail: Vec<u8>,
    /// Bytes of the first piece that have gone.
    sent: usize,
    /// A piece that has gone, for its memory.
    spare: Vec<u8>,
}

impl Output {
    /// Bytes that have not gone.
    pub fn len(&self) -> usize {
        self.full_bytes + self.tail.len() - self.sent
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where to append one frame or some small ones.
    pub fn end(&mut self) -> &mut Vec<u8> {
        if self.tail.len() >= PIECE {
            self.end_piece();
        }
        &mut self.tail
    }

    /// The tail is full.
    fn end_piece(&mut self) {
        let full = std::mem::replace(&mut self.tail, std::mem::take(&mut self.spare));
        self.full_bytes += full.len();
        self.full.push_back(full);
    }

    /// Appends a frame that was written elsewhere, as a piece of its own.
    pub fn push(&mut self, frame: Vec<u8>) {
        if !self.tail.is_empty() {
            self.end_piece();
        }
        self.full_bytes += frame.len();
        self.full.push_back(frame);
    }

    /// Memory for such a frame: of a piece that has gone, or none.
    pub fn memory(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.spare)
    }

    /// The next bytes to go. Empty only if all has gone.
    pub fn front(&self) -> &[u8] {
        &self.full.front().unwrap_or(&self.tail)[self.sent..]
    }

    /// So many of [`Output::front`] have gone.
    pub fn advance(&mut self, count: usize) {
        self.sent += count;
        let first = self.full.front().unwrap_or(&self.tail);
        assert!(self.sent <= first.len(), "{} bytes have gone of {}", self.sent, first.len());
        if self.sent < first.len() {
            return;
        }
        self.sent = 0;
        match self.full.pop_front() {
            Some(mut gone) => {
                self.full_bytes -= gone.len();
                gone.clear();
                self.spare = gone;
            }
            None => self.tail.clear(),
        }
    }

    /// Throws everything away.
    pub fn clear(&mut self) {
        *self = Output::default();
    }

    /// Gives back memory that only bursts need.
    pub fn trim(&mut self) {
        self.spare = Vec::new();
        if self.is_empty() {
            self.tail = Vec::new();
            self.full = VecDeque::new();
        }
    }

    /// Bytes of memory that it holds.
    #[cfg(test)]
    fn capacity(&self) -> usize {
        self.tail.capacity() + self.spare.capacity() + self.full.iter().map(Vec::capacity).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_is_what_was_appended_whatever_the_sizes() {
        // Frames of 1 byte to 600 KiB, taken away in parts of other sizes, beside one plain buffer.
        let mut output = Output::default();
        let (mut plain, mut gone) = (Vec::new(), Vec::new());
        let mut number = 1u32;
        let mut next = |most: usize| {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            1 + (number >> 8) as usize % most
        };
        for round in 0..150 {
            for _ in 0..next(4) {
                let len = next([20, 3000, 600 << 10][round % 3]);
                plain.resize(plain.len() + len, round as u8);
                if len > PIECE / 2 && len % 2 == 0 {
                    let mut frame = output.memory();
                    frame.clear();
                    frame.resize(len, round as u8);
                    output.push(frame);
                } else {
                    let end = output.end();
                    end.resize(end.len() + len, round as u8);
                }
            }
            for _ in 0..next(6) {
                let len = output.front().len();
                assert_eq!(len == 0, output.is_empty());
                let taken = if len == 0 { 0 } else { next(len) };
                gone.extend_from_slice(&output.front()[..taken]);
                output.advance(taken);
            }
            assert_eq!(output.len(), plain.len() - gone.len());
            assert_eq!(gone, plain[..gone.len()]);
            plain.drain(..gone.len());
            gone.clear();
        }
        while !output.is_empty() {
            gone.extend_from_slice(output.front());
            output.advance(output.front().len());
        }
        assert!(gone == plain);
        output.trim();
        assert_eq!(output.capacity(), 0);
    }

    #[test]
    fn what_waits_stays_where_it_is() {
        let mut output = Output::default();
        output.end().resize(PIECE, 1);
        let at = output.front().as_ptr();
        output.end().resize(3 * PIECE, 2);
        output.end().resize(5, 3);
        assert_eq!((output.front().as_ptr(), output.front().len()), (at, PIECE));
        output.advance(100);
        assert_eq!(output.front().as_ptr(), at.wrapping_add(100));
        assert_eq!(output.len(), 4 * PIECE + 5 - 100);
        // The memory of the first piece is used again, and no more is held than what waits and that.
        output.advance(PIECE - 100);
        output.end().resize(PIECE, 3);
        assert_eq!(output.end().as_ptr(), at);
        output.clear();
        assert_eq!((output.len(), output.capacity()), (0, 0));
    }

    #[test]
    fn a_frame_from_elsewhere_goes_in_its_turn_and_its_memory_is_used_again() {
        let mut output = Output::default();
        output.end().extend([1; 10]);
        output.advance(4);
        let frame = vec![2; 3 * PIECE];
        let at = frame.as_ptr();
        output.push(frame);
        output.end().extend([3; 5]);
        assert_eq!((output.len(), output.front()), (6 + 3 * PIECE + 5, &[1; 6][..]));
        output.advance(6);
        assert_eq!((output.front().as_ptr(), output.front().len()), (at, 3 * PIECE), "it was not copied");
        output.advance(3 * PIECE);
        assert_eq!(output.front(), [3; 5]);
        let memory = output.memory();
        assert_eq!(memory.as_ptr(), at);
        output.advance(5);
        assert!(output.is_empty());
    }

    #[test]
    fn memory_is_kept_until_it_is_trimmed() {
        let mut output = Output::default();
        output.end().resize(1000, 1);
        let at = output.front().as_ptr();
        output.advance(1000);
        output.end().push(1);
        assert_eq!(output.front().as_ptr(), at, "the same piece again");
        output.trim();
        assert_eq!(output.len(), 1, "what waits is not trimmed away");
        output.advance(1);
        output.trim();
        assert_eq!(output.capacity(), 0);
    }
}
