//! Clients of another time (F93): the very bytes that the first version's golden files have.

use std::path::Path;

use ferry::wire::Kind;

use crate::caller::models;
use crate::common::process::Child;
use crate::common::{Event, Raw, bare_frame};

/// The bytes of a golden file, whose lines are comments or hex.
fn golden(name: &str) -> Vec<u8> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    let text = std::fs::read_to_string(file).expect("tests/golden has it");
    let bytes = text.lines().filter(|line| !line.starts_with('#')).flat_map(str::split_ascii_whitespace);
    bytes.map(|byte| u8::from_str_radix(byte, 16).expect("hex")).collect()
}

#[test]
fn what_a_client_of_the_first_version_says_is_still_understood() {
    let child = Child::start_in(models(), &[]);
    for hello in ["hello", "hello_token"] {
        let mut raw = Raw::connect(child.data);
        raw.send(&golden(hello));
        assert!(matches!(raw.recv(), Event::HelloAck(_)), "{hello}");
        raw.send(&golden("describe"));
        assert!(matches!(raw.recv(), Event::Description { .. }), "{hello}");
        raw.send(&golden("unknown_optional"));
        raw.send(&golden("ping"));
        assert!(matches!(raw.recv(), Event::Pong(_)), "what is optional is skipped");
        raw.send(&golden("stats"));
        assert!(matches!(raw.recv(), Event::Stats(_)));
        // Requests whose meaning depends on models that are not here: answered or refused, and the stream goes on.
        for (request, id) in [("infer_echo", 2), ("infer_floats", 3), ("infer_options", 4)] {
            raw.send(&golden(request));
            let event = raw.recv();
            assert!(event.ends().is_some(), "{request} ({id}): {event:?}");
        }
        raw.send(&golden("cancel"));
        raw.send(&bare_frame(Kind::Ping, 9));
        assert!(matches!(raw.recv(), Event::Pong(9)));
    }
}
