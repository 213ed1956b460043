//! Any text as the settings of another server: Triton, TensorFlow Serving, text-embeddings-inference.
//!
//! Fails on a panic, and on a manifest or configuration of ours that our own parsers refuse as text: what is written is at least TOML.
#![no_main]

use ferry::import::{Format, Options, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Format::guess(text);
    for format in [Format::Triton, Format::TensorflowServing, Format::TextEmbeddings] {
        match read(format, text, &Options::default()) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(imported) => {
                for draft in [&imported.manifest, &imported.server] {
                    let mut errors = Vec::new();
                    ferry::config::file::read("draft", &draft.to_toml(), &mut errors);
                    assert!(errors.is_empty(), "{errors:?} in {}", draft.to_toml());
                }
            }
        }
    }
});
