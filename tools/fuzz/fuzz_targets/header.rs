//! Any 32 bytes as a header, under any limits.
//!
//! Fails on a panic, on a header that is read and written as other bytes, and on a decoder that asks for more than its limits
//! allow: that is what would be allocated.
#![no_main]

use ferry::wire::decoder::Step;
use ferry::wire::{Decoder, HEADER_LEN, Header, Limits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((head, rest)) = input.split_first_chunk::<HEADER_LEN>() else {
        // Less than a header: it waits for one, or knows already that it is none.
        if let Ok(Step::Incomplete { needed }) = Decoder::new(Limits::DEFAULT).next(input) {
            assert_eq!(needed, HEADER_LEN);
        }
        return;
    };
    match Header::decode(head) {
        Ok(header) => {
            let mut again = header.encode(&[]);
            // The checksum of the head covers the metadata, which is not there.
            again[28..].copy_from_slice(&head[28..]);
            assert_eq!(&again, head, "one encoding per header");
        }
        Err(error) => drop(format!("{error:?}")),
    }
    let number = |at: usize| rest.get(at).map_or(0, |byte| 1u32 << (byte % 28));
    let limits = Limits { metadata_bytes: number(0).min(Limits::METADATA_CEILING), payload_bytes: number(1) };
    match Decoder::new(limits).next(input) {
        Ok(Step::Incomplete { needed }) => {
            let most = HEADER_LEN + limits.metadata_bytes as usize + limits.payload_bytes as usize;
            assert!(needed > input.len() && needed <= most, "{needed} bytes, of at most {most}");
        }
        Ok(Step::Frame(frame)) => assert!(frame.len <= input.len()),
        Ok(Step::Skip { len }) => assert!(len > 0 && len <= input.len()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
