//! Which room may use which. A change that needs another line here is a change of design: say so in its commit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Rooms and what each may name as `crate::…`. `server` and the commands see every room.
const ALLOWED: &[(&str, &[&str])] = &[
    ("vocab", &[]),
    ("clock", &["vocab"]),
    // What could leak counts itself where it is made.
    ("live", &[]),
    ("wire", &["vocab"]),
    ("contract", &["vocab", "wire"]),
    ("mailbox", &["clock", "vocab"]),
    ("scheduler", &["vocab"]),
    ("telemetry", &["clock", "live", "vocab"]),
    // Files of certificates and tenants, read and read again.
    ("access", &["clock", "config", "frontend", "quota", "telemetry", "tenants", "tls", "vocab"]),
    // Text and dates to who somebody is; files to what rustls wants.
    ("tenants", &["quota", "vocab"]),
    ("tls", &[]),
    ("timeline", &["vocab"]),
    ("config", &["timeline", "tls", "vocab", "wire"]),
    ("capture", &["scheduler", "vocab"]),
    ("trial", &["scheduler", "vocab"]),
    ("mail", &["capture", "contract", "executor", "mailbox", "scheduler", "timeline", "trial", "vocab"]),
    ("scatter", &["contract", "mail", "mailbox", "vocab", "wire"]),
    (
        "executor",
        &[
            "clock",
            "contract",
            "gpu",
            "live",
            "mail",
            "mailbox",
            "scatter",
            "scheduler",
            "telemetry",
            "timeline",
            "vocab",
        ],
    ),
    (
        "batcher",
        &[
            "capture",
            "clock",
            "contract",
            "executor",
            "mail",
            "mailbox",
            "scheduler",
            "telemetry",
            "timeline",
            "trial",
            "vocab",
        ],
    ),
    ("device", &["clock", "gpu", "live", "vocab"]),
    ("gpu", &["vocab"]),
    ("kernels", &["device"]),
    // Pure: types of tensors, and what the wire can carry of them.
    ("import", &["vocab", "wire"]),
    ("models", &["contract", "executor", "gpu", "kernels", "scheduler", "tokenize", "vocab"]),
    ("tokenize", &["models", "vocab"]),
    ("tokenizers", &["mail", "mailbox", "tokenize", "vocab"]),
    (
        "frontend",
        &[
            "clock",
            "contract",
            "mail",
            "mailbox",
            "quota",
            "scatter",
            "scheduler",
            "telemetry",
            "tenants",
            "tls",
            "vocab",
            "wire",
        ],
    ),
    ("quota", &["vocab"]),
    // It asks the batcher, and shows what the scheduler answers.
    (
        "control",
        &[
            "capture",
            "clock",
            "mail",
            "mailbox",
            "replay",
            "scheduler",
            "shadow",
            "telemetry",
            "tenants",
            "timeline",
            "trial",
            "vocab",
        ],
    ),
    // What was counted and recorded, to a receiver elsewhere.
    ("otel", &["clock", "mailbox", "telemetry", "vocab"]),
    ("learned", &["mail", "mailbox", "scheduler", "vocab"]),
    // A capture that nobody keeps, given to the scheduler in virtual time beside the one that serves.
    ("shadow", &["capture", "clock", "mail", "mailbox", "replay", "telemetry", "vocab"]),
    ("client", &["clock", "contract", "tls", "vocab", "wire"]),
    // Where executors' time goes is told by one module, whoever asks.
    ("replay", &["capture", "load", "scheduler", "telemetry", "vocab"]),
    // It chooses among what replays say of a policy; who runs them, and who measures, is the command.
    ("tune", &["replay", "scheduler", "vocab"]),
    // The product that it measures a machine by; the names of the parts of executors' time.
    ("load", &["client", "clock", "contract", "executor", "gpu", "kernels", "telemetry", "vocab", "wire"]),
];

fn files_of(room: &str) -> Vec<PathBuf> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders = vec![src.join(room)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let single = src.join(format!("{room}.rs"));
    if single.exists() {
        files.push(single);
    }
    files
}

/// Rooms that a source text names, outside comments and its unit tests.
fn rooms_named(text: &str) -> BTreeSet<String> {
    let code = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or(text);
    let mut rooms = BTreeSet::new();
    for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
        for (at, found) in line.match_indices("crate::") {
            // Not the end of a longer path such as `$crate::` or `candle_crate::`.
            if line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
                continue;
            }
            let rest = &line[at + found.len()..];
            let room: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !room.is_empty() {
                rooms.insert(room);
            }
        }
    }
    rooms
}

#[test]
fn every_room_uses_only_what_it_may() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        ALLOWED.iter().map(|(room, rooms)| (*room, rooms.iter().copied().collect())).collect();
    let mut wrong = Vec::new();
    for (room, may_use) in &allowed {
        let files = files_of(room);
        assert!(!files.is_empty(), "room {room} has no file");
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a readable file");
            for used in rooms_named(&text) {
                if used != *room && !may_use.contains(used.as_str()) {
                    wrong.push(format!("{}: {room} uses {used}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_room_is_in_the_table() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let lib = std::fs::read_to_string(src.join("lib.rs")).expect("a library");
    let known: BTreeSet<&str> = ALLOWED.iter().map(|(room, _)| *room).chain(["server", "commands"]).collect();
    for room in lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')) {
        assert!(known.contains(room), "room {room} is not in the table");
    }
}

#[test]
fn no_room_but_device_can_allow_unsafe_code() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let lib = std::fs::read_to_string(src.join("lib.rs")).expect("a library");
    let lines: Vec<&str> = lib.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let Some(room) = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')) else { continue };
        assert_eq!(lines[at - 1] == "#[forbid(unsafe_code)]", room != "device", "room {room}");
    }
    assert!(lib.contains("#![deny(unsafe_code)]"));
    let main = std::fs::read_to_string(src.join("main.rs")).expect("a program");
    assert!(main.contains("#![forbid(unsafe_code)]"), "the commands, too");
}

#[test]
fn only_the_frontend_knows_glommio() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (room, _) in ALLOWED.iter().filter(|(room, _)| *room != "frontend") {
        for file in files_of(room) {
            let text = std::fs::read_to_string(&file).expect("a readable file");
            assert!(!text.contains("glommio::"), "{} uses glommio", file.display());
        }
    }
    assert!(src.join("frontend").is_dir());
}

#[test]
fn the_scheduler_is_pure() {
    for file in files_of("scheduler") {
        let text = std::fs::read_to_string(&file).expect("a readable file");
        for banned in ["std::time::Instant", "std::thread", "std::sync", "std::net", "std::fs", "HashMap", "unsafe"] {
            assert!(!text.contains(banned), "{} uses {banned}", file.display());
        }
    }
}

#[test]
fn a_planted_use_is_found() {
    assert!(rooms_named("use crate::frontend::Options;\n").contains("frontend"));
    assert!(!rooms_named("// use crate::frontend\n").contains("frontend"));
    assert!(!rooms_named("#[cfg(test)]\nmod x {}\n\n#[cfg(test)]\nmod tests { use crate::clock; }").contains("clock"));
}
