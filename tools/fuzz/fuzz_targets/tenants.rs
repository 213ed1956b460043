//! Any text as a file of tenants, and any bytes as a token of one.
//!
//! Fails on a panic, on an error without a sentence, and on a token that is taken though its secret is not the one whose hash is in the file.
#![no_main]

use ferry::tenants::{Day, Tenants, token_of};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let text = String::from_utf8_lossy(input);
    match Tenants::parse(&text) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(tenants) => {
            assert!(!tenants.is_empty());
            let _ = tenants.quotas();
        }
    }
    let (token, sha256) = token_of("a", &[7; 32]);
    let file = format!("[tenant.t]\nroles = [\"infer\"]\ntokens = [{{ id = \"a\", sha256 = \"{sha256}\" }}]\n");
    let tenants = Tenants::parse(&file).expect("sound");
    assert_eq!(tenants.by_token(input, Day(0)).is_some(), input == token.as_bytes());
});
