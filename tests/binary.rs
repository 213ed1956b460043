//! What the program is made of and needs at run time: no interpreter, no other machine-learning runtime, no dependency from
//! elsewhere (B3.1, F82, F94, F95).

use std::process::Command;

/// Libraries the binary may ask for. The C library, its parts, and the compiler's runtime.
const ALLOWED: &[&str] = &[
    "linux-vdso",
    "linux-gate",
    "libc.so",
    "libm.so",
    "libgcc_s.so",
    "libdl.so",
    "libpthread.so",
    "librt.so",
    "ld-linux",
];

fn not_allowed(listing: &str) -> Vec<String> {
    listing
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|path| path.rsplit('/').next().unwrap_or(path).to_owned())
        .filter(|name| !ALLOWED.iter().any(|allowed| name.starts_with(allowed)))
        .collect()
}

#[test]
fn the_binary_needs_nothing_but_the_c_library() {
    let output = Command::new("ldd").arg(env!("CARGO_BIN_EXE_ferry")).output().expect("ldd is part of the C library");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listing = String::from_utf8_lossy(&output.stdout);
    assert!(listing.contains("libc.so"), "a listing: {listing}");
    assert_eq!(not_allowed(&listing), Vec::<String>::new(), "{listing}");
}

#[test]
fn a_banned_library_would_be_seen() {
    let listing =
        "\tlibpython3.11.so.1.0 => /usr/lib/libpython3.11.so.1.0 (0x0)\n\tlibc.so.6 => /lib/libc.so.6 (0x0)\n";
    assert_eq!(not_allowed(listing), ["libpython3.11.so.1.0"]);
}

/// What no name of a function in the binary begins with: interpreters and other runtimes, linked in as archives.
const BANNED_SYMBOLS: &[&str] =
    &["Py_Initialize", "PyObject_Call", "_PyEval_", "OrtGetApiBase", "THPModule", "TF_NewGraph", "SSL_CTX_new"];

fn banned_symbols(binary: &[u8]) -> Vec<&'static str> {
    // A name in a string table has a zero before it.
    let holds = |name: &&&str| {
        let needle = [b"\0", name.as_bytes()].concat();
        binary.windows(needle.len()).any(|window| window == needle)
    };
    BANNED_SYMBOLS.iter().filter(holds).copied().collect()
}

#[test]
fn the_binary_has_no_function_of_an_interpreter_or_another_runtime() {
    let binary = std::fs::read(env!("CARGO_BIN_EXE_ferry")).expect("the binary can be read");
    assert_eq!(banned_symbols(&binary), [] as [&str; 0]);
    let planted = [&binary[..4096], b"\0Py_Initialize\0malloc\0"].concat();
    assert_eq!(banned_symbols(&planted), ["Py_Initialize"]);
}

const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Crates that may not come in, with the first version from which that is so. deny.toml has the same, with reasons.
const BANNED_CRATES: &[(&str, u64)] = &[("pyo3", 0), ("tch", 0), ("ort", 0), ("openssl-sys", 0), ("bincode", 3)];

/// What is wrong with a lock file.
fn wrong_dependencies(lock: &str) -> Vec<String> {
    let lock: toml::Table = match lock.parse() {
        Ok(lock) => lock,
        Err(error) => return vec![format!("no lock file: {error}")],
    };
    let packages = lock.get("package").and_then(toml::Value::as_array).cloned().unwrap_or_default();
    let mut wrong = Vec::new();
    for package in &packages {
        let field = |key: &str| package.get(key).and_then(toml::Value::as_str).unwrap_or_default();
        let (name, version) = (field("name"), field("version"));
        if name == "ferry" {
            continue;
        }
        if field("source") != REGISTRY {
            wrong.push(format!("{name} {version} is from {:?}", field("source")));
        }
        if field("checksum").len() != 64 {
            wrong.push(format!("{name} {version} has no checksum"));
        }
        let major = version.split('.').next().and_then(|major| major.parse::<u64>().ok()).unwrap_or_default();
        if BANNED_CRATES.iter().any(|(banned, from)| *banned == name && major >= *from) {
            wrong.push(format!("{name} {version} is banned"));
        }
    }
    if packages.len() < 100 {
        wrong.push(format!("{} packages are not all", packages.len()));
    }
    wrong
}

fn file(name: &str) -> String {
    std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name))
        .expect("it is in the repository")
}

#[test]
fn every_dependency_is_of_the_registry_with_a_checksum_and_none_is_banned() {
    assert_eq!(wrong_dependencies(&file("Cargo.lock")), [] as [String; 0]);
    let deny = file("deny.toml");
    for (name, _) in BANNED_CRATES {
        assert!(deny.contains(&format!("crate = \"{name}")), "deny.toml bans {name} as well");
    }
}

#[test]
fn a_planted_dependency_is_found() {
    let lock = file("Cargo.lock");
    let checksum = "0".repeat(64);
    let plant = |name: &str, version: &str, source: &str, checksum: &str| {
        let package = format!(
            "\n[[package]]\nname = \"{name}\"\nversion = \"{version}\"\nsource = \"{source}\"\nchecksum = \"{checksum}\"\n"
        );
        wrong_dependencies(&(lock.clone() + &package))
    };
    assert_eq!(plant("pyo3", "0.22.0", REGISTRY, &checksum), ["pyo3 0.22.0 is banned"]);
    assert_eq!(plant("bincode", "3.0.0", REGISTRY, &checksum), ["bincode 3.0.0 is banned"]);
    assert_eq!(plant("bincode", "2.9.0", REGISTRY, &checksum), [] as [String; 0]);
    let elsewhere = "git+https://example.invalid/x";
    assert_eq!(plant("serde-x", "1.0.0", elsewhere, &checksum), [format!("serde-x 1.0.0 is from {elsewhere:?}")]);
    assert_eq!(plant("serde-x", "1.0.0", REGISTRY, ""), ["serde-x 1.0.0 has no checksum"]);
    assert_eq!(wrong_dependencies("").len(), 1);
}

/// Files of a room, with what is in them.
fn sources() -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut folders = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a readable folder") {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("sources are text");
                let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).expect("it is in src").display().to_string();
                all.push((name, text));
            }
        }
    }
    all
}

/// Lines in which a source asks for the time of day.
fn asks_the_wall_clock(text: &str) -> bool {
    let code = text.lines().map(str::trim_start).filter(|line| !line.starts_with("//"));
    let mut code = code.filter(|line| line.contains("SystemTime") || line.contains("unix_time"));
    code.next().is_some()
}

#[test]
fn no_decision_asks_the_wall_clock() {
    // Whoever asks shows it to people or receivers. Rooms that decide are not among them.
    let asking: Vec<String> =
        sources().into_iter().filter(|(_, text)| asks_the_wall_clock(text)).map(|(name, _)| name).collect();
    // When something was learned is written beside it, to be shown.
    let shows = "src/batcher/keeping.rs";
    let decides =
        ["src/scheduler", "src/frontend", "src/batcher", "src/executor", "src/scatter", "src/mail", "src/wire"];
    let is_wrong = |name: &&String| *name != shows && decides.iter().any(|room| name.starts_with(room));
    let wrong: Vec<&String> = asking.iter().filter(is_wrong).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(asking.contains(&"src/clock.rs".to_owned()), "the look finds what there is: {asking:?}");
    assert!(asks_the_wall_clock("let now = SystemTime::now();") && !asks_the_wall_clock("// SystemTime"));
}

#[test]
fn wrong_use_ends_with_2_and_a_broken_configuration_with_78() {
    let ferry = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_ferry")).args(arguments).output().expect("the binary runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(ferry(&["serve", "--no-such-flag"]).0, Some(2));
    let (status, message) = ferry(&["serve", "--set", "frontend.credit_reqests=5"]);
    assert_eq!(status, Some(78), "{message}");
    assert!(message.contains("credit_requests"), "names the nearest key: {message}");
}
