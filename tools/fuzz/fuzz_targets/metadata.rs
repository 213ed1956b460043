//! Any bytes as the metadata of each kind, hello and its token included.
//!
//! Fails on a panic, on more than one encoding for a value, and on a value that is longer than the bytes it came from: a length
//! that is believed before its bytes are there.
#![no_main]

use ferry::wire::message::{
    Credit, Describe, Description, ErrorMessage, Goaway, Hello, HelloAck, Infer, InferResult, Item, decode_exact,
    encode_into,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else { return };
    macro_rules! kinds {
        ($($number:literal => $message:ty,)*) => {
            match kind % 10 {
                $($number => if let Ok(message) = decode_exact::<$message>(bytes) {
                    let mut again = Vec::new();
                    encode_into(&message, &mut again).expect("it came from as many bytes");
                    assert_eq!(again, bytes, "one encoding per value");
                    let _ = format!("{message:?}");
                    for cut in [0, bytes.len() / 2, bytes.len() - usize::from(!bytes.is_empty())] {
                        assert!(cut == bytes.len() || decode_exact::<$message>(&bytes[..cut]).is_err(), "a part is no whole");
                    }
                },)*
                _ => unreachable!(),
            }
        };
    }
    kinds! {
        0 => Hello, 1 => HelloAck, 2 => Describe, 3 => Description, 4 => Infer,
        5 => InferResult, 6 => ErrorMessage, 7 => Credit, 8 => Goaway, 9 => Item,
    }
    if let Ok(message) = decode_exact::<ErrorMessage>(bytes) {
        let _ = message.to_refusal();
    }
});
