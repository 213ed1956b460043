//! Trials of policies, from the command line and the control port, under traffic.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ferry::server::Ending;
use serde_json::{Value, json};

use super::live::{SetOnDrop, converse, ferry, get, knob, patiently, set};
use crate::common::{Server, control, wait_until};

const PATH: &str = "/v1/models/queued/trial";

/// Looks until `holds`, seldom enough that the command line, which shares the control port's rate, is not refused.
pub fn wait_gently(what: &str, mut holds: impl FnMut() -> bool) {
    wait_until(what, || {
        let held = holds();
        if !held {
            std::thread::sleep(Duration::from_millis(100));
        }
        held
    });
}

fn trial(server: &Server) -> Value {
    get(server, PATH)["trial"].clone()
}

fn begin(server: &Server, body: &Value) -> (u16, Value) {
    control(server.control, "PUT", PATH, "", &body.to_string())
}

/// Goal: a policy that holds everybody back for two seconds is undone by itself, one that is no worse stays, and one that an
/// operator overrides ends; meanwhile every request is answered once, with its own values.
/// Method: 24 requests of at most two rows in flight all the time: fewer rows than the 64 that a batch takes, or it would be full
/// before anybody is late.
#[test]
fn trials_revert_stay_or_give_way_and_lose_nobody() {
    let server = Server::start(&[]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let talking = scope.spawn(|| converse(&server, 5, 2, &stop));
        let talks = SetOnDrop(&stop);
        let bad = json!({
            "set": { "policy": "window", "queue_delay_max_us": 2_000_000 },
            "seconds": 10, "share": 0.8, "slo_ms": 100, "on_time_min": 0.5,
        });
        let (status, begun) = begin(&server, &bad);
        assert_eq!((status, &begun["trial"]["ended"]), (202, &Value::Null), "{begun}");
        assert_eq!(begin(&server, &bad).0, 409, "one at a time");
        let mut ended = Value::Null;
        wait_gently("it reverts", || {
            ended = trial(&server)["ended"].clone();
            !ended.is_null()
        });
        assert_eq!((&ended["outcome"], &ended["reason"]), (&json!("reverted"), &json!("breach")), "{ended}");
        println!("reverted after {} ms in force: {}", ended["changed_in_force_ms"], ended["message"]);
        let policy = get(&server, "/v1/models/queued/policy");
        assert_eq!((knob(&policy, "policy"), &policy["generation"]), ("cost".into(), &ended["generation"]));
        // Generation 1 is the first turn's; where the baseline had too short a turn to be judged by, the second breach counts.
        let turns = trial(&server)["turns"].as_array().expect("a list").len();
        assert_eq!(ended["generation"], turns + 1, "{ended}");
        let history = get(&server, "/v1/models/queued/policy/history");
        let notes: Vec<(&str, &str)> = (history["changes"].as_array().expect("a list").iter())
            .map(|change| (change["by"].as_str().expect("who"), change["note"].as_str().expect("why")))
            .collect();
        assert!(
            matches!(notes[..], [("trial", begun), ("trial", ended)]
            if begun.starts_with("trial: for 10 s") && ended.starts_with("trial reverted: ")),
            "{notes:?}"
        );

        let addr = server.control.to_string();
        let good = ["trial", "queued", "--set", "rows_max=16", "--seconds", "1", "--share", "1", "--slo-ms", "60000"];
        let (status, out, err) = ferry(&[&good[..], &["--keep-if", "unbroken", "--control", &addr]].concat());
        assert_eq!(status, Some(0), "{out}{err}");
        assert!(out.starts_with("queued: rows_max=16, for 1.0 s") && out.contains("\nkept (unbroken): "), "{out}");
        assert_eq!(knob(&get(&server, "/v1/models/queued/policy"), "rows_max"), "16");

        let by_hand = ["trial", "queued", "--set", "rows_max=8", "--seconds", "600", "--share", "1", "--no-wait"];
        let (status, out, _) = ferry(&[&by_hand[..], &["--slo-ms", "60000", "--control", &addr]].concat());
        assert!(status == Some(0) && out.contains("  on; in force: "), "{out}");
        wait_gently("it is in force", || knob(&get(&server, "/v1/models/queued/policy"), "rows_max") == "8");
        let (status, changed) = patiently(|| set(&server, "queued", json!({ "slo_ms": 77 })));
        assert_eq!(status, 200, "{changed}");
        let policy = get(&server, "/v1/models/queued/policy");
        assert_eq!((knob(&policy, "rows_max"), knob(&policy, "slo_ms")), ("16".into(), "77".into()));
        let (status, out, _) = ferry(&["trial", "queued", "--control", &addr]);
        assert_eq!(status, Some(0));
        assert!(out.contains("reverted (superseded): somebody changed the policy by hand"), "{out}");

        drop(talks);
        let answered = talking.join().expect("each request is answered once");
        assert!(answered > 100, "{answered}");
    });
    server.wait_until_at_rest();
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn a_trial_that_cannot_be_is_refused_with_what_was_expected() {
    let server = Server::start(&[]);
    for (body, said) in [
        (json!({ "set": { "rows_max": 8 } }), "expected {\"set\""),
        (json!({ "set": { "rows_max": 8 }, "seconds": 0.5 }), "seconds: expected 1 to 3600, got 0.5"),
        (json!({ "set": { "rows_max": 65 }, "seconds": 5 }), "rows_max: expected at most 64"),
        (json!({ "set": { "rows_max": 64 }, "seconds": 5 }), "set: expected knobs that change something"),
        (json!({ "set": { "rows_max": 8 }, "seconds": 5, "keep_if": "good" }), "keep_if: expected one of p50"),
    ] {
        let (status, answer) = begin(&server, &body);
        assert_eq!(status, 400, "{body}: {answer}");
        assert!(answer["error"].as_str().expect("a sentence").contains(said), "{body}: {answer}");
    }
    assert_eq!(trial(&server), Value::Null);
    let good = json!({ "set": { "rows_max": 8 }, "seconds": 5 }).to_string();
    assert_eq!(control(server.control, "PUT", PATH, "Origin: http://elsewhere\r\n", &good).0, 403);
    assert_eq!(control(server.control, "DELETE", PATH, "", "").0, 404);
    assert_eq!(control(server.control, "PUT", "/v1/models/nobody/trial", "", &good).0, 404);
    assert_eq!(begin(&server, &json!({ "set": { "rows_max": 8 }, "seconds": 5 })).0, 202);
    let (status, ended) = control(server.control, "DELETE", PATH, "", "");
    assert_eq!((status, &ended["trial"]["ended"]["reason"]), (200, &json!("aborted")), "{ended}");
    let (status, _, err) =
        ferry(&["trial", "queued", "--set", "rows_max=0", "--seconds", "5", "--control", &server.control.to_string()]);
    assert_eq!(status, Some(2));
    assert!(err.contains("rows_max: expected 1 to 65536"), "{err}");
}
