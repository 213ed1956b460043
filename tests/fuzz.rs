//! The fuzz targets (tools/fuzz) on what fuzzing has found so far and what it starts from, and on each of that changed a little: so that
//! a target that does not compile, or an old finding that comes back, is seen on every change. No coverage leads here: `tools/fuzz/run`
//! looks for new ones.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

// The targets name these crates; here they are this one.
extern crate self as ferry_fuzz;
extern crate self as libfuzzer_sys;

#[path = "../tools/fuzz/src/lib.rs"]
mod needed;
pub use needed::{Source, echo};

/// What a target says of itself: a function of an input. As in libfuzzer-sys, what is no text is no input of one that takes text.
#[macro_export]
macro_rules! fuzz_target {
    (|$input:ident: &[u8]| $body:block) => {
        pub fn fuzz_one($input: &[u8]) {
            $body
        }
    };
    (|$input:ident: &str| $body:block) => {
        pub fn fuzz_one(input: &[u8]) {
            let Ok($input) = std::str::from_utf8(input) else { return };
            $body
        }
    };
}

/// Each target: a module of it, and a test.
macro_rules! targets {
    ($($name:ident $path:literal,)*) => {
        $(
            #[path = $path]
            #[allow(unused_attributes, unused_imports)] // its main function is here, and the macro
            mod $name;
        )*

        mod holds {
            $(
                #[test]
                fn $name() {
                    super::replay(stringify!($name), super::$name::fuzz_one);
                }
            )*
        }
    };
}

targets! {
    config "../tools/fuzz/fuzz_targets/config.rs",
    contract "../tools/fuzz/fuzz_targets/contract.rs",
    header "../tools/fuzz/fuzz_targets/header.rs",
    import "../tools/fuzz/fuzz_targets/import.rs",
    manifest "../tools/fuzz/fuzz_targets/manifest.rs",
    metadata "../tools/fuzz/fuzz_targets/metadata.rs",
    scheduler "../tools/fuzz/fuzz_targets/scheduler.rs",
    session "../tools/fuzz/fuzz_targets/session.rs",
    state "../tools/fuzz/fuzz_targets/state.rs",
    stream "../tools/fuzz/fuzz_targets/stream.rs",
    tenants "../tools/fuzz/fuzz_targets/tenants.rs",
    trace "../tools/fuzz/fuzz_targets/trace.rs",
    weights "../tools/fuzz/fuzz_targets/weights.rs",
}

#[path = "../tools/fuzz/fuzz_targets/canary.rs"]
#[allow(unused_attributes, unused_imports)]
mod canary;

const FUZZ: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/fuzz");

/// Inputs of a target, unpacked anew.
fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{target}"));
    let _ = std::fs::remove_dir_all(&folder);
    let script = format!("{FUZZ}/seed.py");
    let done = Command::new("python3").args([&script, target, "--to"]).arg(&folder).output();
    let done = done.expect("python3 starts");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("a seed");
        (path, bytes)
    };
    let mut seeds: Vec<_> = std::fs::read_dir(folder.join(target)).expect("its seeds").map(read).collect();
    seeds.sort();
    seeds
}

/// Runs a target on its seeds, and on each with a byte changed, its end cut off or a part of it twice.
fn replay(target: &str, run: fn(&[u8])) {
    let seeds = seeds(target);
    assert!(seeds.len() >= 20, "{} seeds of {target}", seeds.len());
    let mut number = 1u64;
    let mut below = |bound: usize| {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (number >> 33) as usize % bound.max(1)
    };
    for (path, seed) in seeds {
        let mut changed = seed.clone();
        let at = below(seed.len());
        match below(3) {
            0 if !seed.is_empty() => changed[at] ^= 1 << below(8),
            1 => changed.truncate(at),
            _ => changed.extend_from_slice(&seed[at.min(seed.len())..]),
        }
        for input in [seed, changed] {
            let held = catch_unwind(AssertUnwindSafe(|| run(&input)));
            assert!(held.is_ok(), "a finding near {}: {}", path.display(), input.escape_ascii());
        }
    }
}

/// A target that must be found out is.
#[test]
fn a_finding_is_one() {
    assert!(catch_unwind(|| canary::fuzz_one(b"sunk")).is_err());
    canary::fuzz_one(b"sun");
}

/// Every target is here.
#[test]
fn none_is_left_out() {
    const HERE: &str = include_str!("fuzz.rs");
    let mut found = 0;
    for entry in std::fs::read_dir(format!("{FUZZ}/fuzz_targets")).expect("the targets") {
        let name = entry.expect("an entry").file_name().into_string().expect("a plain name");
        assert!(HERE.contains(&format!("/fuzz_targets/{name}\"")), "{name} is not in tests/fuzz.rs");
        found += 1;
    }
    assert!(found > 10);
}
