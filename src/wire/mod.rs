//! Bytes to messages and back. Does no I/O and reads no clock.
//!
//! Always true
//! - Every length is checked against a limit before anything is allocated for it.
//! - Metadata decodes to exactly its bytes: nothing left over, one encoding per value.
//! - A frame whose head is damaged is never acted on; a payload whose checksum is wrong is never executed.
//!
//! The page for writers of clients in other languages is WIRE.md beside this file; the bytes are in tests/golden.

pub mod decoder;
pub mod encoder;
pub mod frame;
pub mod message;

pub use decoder::{DecodeError, Decoder, Frame};
pub use frame::{HEADER_LEN, Header, Kind, Limits, PROTOCOL_MAJOR};
