//! Any text as a model's manifest.
//!
//! Fails on a panic, on an error without a sentence, and on a manifest whose promises do not hold: every length that the contract
//! lets in has a bucket and fits a batch, and its queue holds one.
#![no_main]

use std::path::Path;

use ferry::models::manifest::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let manifest = match Manifest::parse("model", Path::new("model.toml"), text) {
        Ok(manifest) => manifest,
        Err(error) => return assert!(!error.message.is_empty()),
    };
    let (contract, batching) = (&manifest.contract, &manifest.batching);
    assert!(contract.rows_max >= 1 && !contract.inputs.is_empty());
    let longest = contract.length.as_ref().map_or(1, |length| length.max);
    assert!(batching.bucket_longest() >= longest, "a row of {longest} has a bucket");
    assert!(batching.rows_at(batching.bucket_longest()) >= 1, "the longest row fits a batch");
    assert!(batching.buckets.is_sorted_by(|a, b| a < b));
});
