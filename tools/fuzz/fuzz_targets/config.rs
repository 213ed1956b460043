//! Any text as the server's configuration: a file, and settings of a command line.
//!
//! Fails on a panic, on an error without a sentence, and on a configuration that is taken and does not come back the same from its
//! own dump.
#![no_main]

use std::path::Path;

use ferry::config::{Config, Machine};
use libfuzzer_sys::fuzz_target;

const MACHINE: Machine = Machine { cores: 4, nofile: 4096, memory: 8 << 30 };

fuzz_target!(|text: &str| {
    let mut errors = Vec::new();
    let items = ferry::config::file::read("ferry.toml", text, &mut errors);
    assert!(errors.iter().all(|error| !error.to_string().is_empty()));
    assert!(items.len() <= text.len());
    // Each line as an argument of --set, which needs no file.
    let sets: Vec<String> = text.lines().take(16).map(str::to_owned).collect();
    match Config::load_on(MACHINE, None::<&Path>, &sets) {
        Err(errors) => assert!(!errors.to_string().is_empty()),
        Ok(config) => {
            let dump = config.to_toml();
            let (mut table, mut sets) = (String::new(), Vec::new());
            for line in dump.lines().filter(|line| !line.starts_with('#')) {
                if let Some(name) = line.strip_prefix('[') {
                    table = format!("{}.", name.trim_end_matches(']'));
                } else if let Some((key, value)) = line.split_once(" = ") {
                    sets.push(format!("{table}{key}={value}"));
                }
            }
            assert_eq!(Config::load_on(MACHINE, None, &sets).as_ref(), Ok(&config), "{dump}");
        }
    }
});
