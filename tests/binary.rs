//! What the program needs at run time: no interpreter and no other machine-learning runtime (B3.1).

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
