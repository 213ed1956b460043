//! `ferry top --once` against the real binary.

mod common;

use std::process::Command;

use common::process::Child;

/// Runs `ferry top --once` and returns its exit status, standard output and standard error.
fn top(control: &str, more: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(["top", "--control", control, "--interval", "250ms", "--once"])
        .args(more)
        .env("COLUMNS", "120")
        .output()
        .expect("the binary was built for this test");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("ferry prints UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn one_reading_has_every_executor_and_model_and_the_policy_of_the_chosen_one() {
    let server = Child::start(&["threads.executors=2"]);
    let (status, out, err) = top(&server.control.to_string(), &["--model", "echo"]);
    assert_eq!((status, err.as_str()), (Some(0), ""), "{out}");
    assert!(out.starts_with(" ferry top 127.0.0.1:") && out.contains(" req/s "), "{out}");
    assert!(out.lines().filter(|line| line.starts_with("ex ")).count() >= 2, "{out}");
    assert!(out.contains("\n> echo "), "{out}");
    assert!(out.contains("\necho: ") && out.contains("generation 1") && out.contains("rows_max"), "{out}");
    assert!(!out.contains('\x1b'), "plain text");
}

#[test]
fn a_server_that_is_not_there_is_said_and_fails() {
    let control = {
        let server = Child::start(&[]);
        server.control.to_string()
    };
    let (status, out, err) = top(&control, &[]);
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert!(err.contains(&format!("control port {control}")), "{err}");
}

#[test]
fn without_a_terminal_it_asks_for_once() {
    let output = Command::new(env!("CARGO_BIN_EXE_ferry")).arg("top").output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--once"));
}
