//! Panics on one input: a fuzzer that does not find it is broken. `tools/fuzz/run --canary` expects that it is found.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    // Four steps, each to be found by the coverage of the one before.
    let steps = b"sunk".iter().zip(input).take_while(|(a, b)| a == b).count();
    assert!(steps < 4, "found");
});
