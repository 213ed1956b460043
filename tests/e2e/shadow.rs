//! Shadow schedulers beside a server that serves, from the command line and the control port.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ferry::server::{Ending, TestHooks};
use serde_json::{Value, json};

use super::live::{SetOnDrop, converse, ferry, get, patiently, set};
use super::trial::wait_gently;
use crate::common::{Server, control};

const PATH: &str = "/v1/models/queued/shadow";

fn put(server: &Server, settings: Value) -> (u16, Value) {
    let body = json!({ "settings": settings }).to_string();
    patiently(|| control(server.control, "PUT", PATH, "", &body))
}

/// Goal: what two settings would have made of the requests is told beside what came; a switch to one of them is compared with
/// its prediction; nobody is harmed by it. Method: short stretches, and 24 requests in flight all the time.
#[test]
fn other_settings_see_what_comes_and_a_switch_is_compared_with_what_was_predicted() {
    let hooks = TestHooks { shadow_stretch: Some(Duration::from_millis(700)), ..TestHooks::default() };
    let server = Server::start_with(&[], hooks);
    let addr = server.control.to_string();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let talking = scope.spawn(|| converse(&server, 9, 4, &stop));
        let talks = SetOnDrop(&stop);
        let window = "policy=window,queue_delay_max_us=20000";
        let (status, out, err) =
            ferry(&["shadow", "queued", "--set", window, "--set", "rows_max=4", "--control", &addr]);
        assert_eq!(status, Some(0), "{out}{err}");
        assert!(out.contains("rows_max=4") && out.contains("stretch"), "{out}");
        let mut shown = Value::Null;
        wait_gently("two stretches are over", || {
            shown = get(&server, PATH);
            shown["window"]["stretches"].as_u64() >= Some(2)
        });
        for run in [
            &shown["real"],
            &shown["simulated_as_is"],
            &shown["shadows"][0]["figures"],
            &shown["shadows"][1]["figures"],
        ] {
            assert!(run["answered"].as_u64() > Some(0), "{shown}");
            let us = &run["queue_and_run_us"];
            assert!(us["p50"].as_f64() > Some(0.0) && us["p99"].as_f64() >= us["p50"].as_f64(), "{shown}");
            for share in ["fill", "waste", "on_time"] {
                assert!((0.0..=1.0).contains(&run[share].as_f64().expect("a share")), "{share}: {shown}");
            }
        }
        // A setting does what its knobs say: four rows at most, and rows that are held for others share larger batches.
        let rows = |run: &Value| run["batch_rows"].as_f64().expect("a number");
        assert!(rows(&shown["shadows"][1]["figures"]) <= 4.0, "{shown}");
        assert!(rows(&shown["shadows"][0]["figures"]) > rows(&shown["shadows"][1]["figures"]), "{shown}");
        assert_eq!((&shown["last_switch"], &shown["trouble"]), (&Value::Null, &Value::Null), "{shown}");

        let (status, changed) =
            patiently(|| set(&server, "queued", json!({ "policy": "window", "queue_delay_max_us": 20_000 })));
        assert_eq!(status, 200, "{changed}");
        wait_gently("as much time as was predicted from has passed", || {
            shown = get(&server, PATH);
            !shown["last_switch"].is_null()
        });
        let switch = &shown["last_switch"];
        assert_eq!(switch["set"], json!({ "policy": "window", "queue_delay_max_us": "20000" }));
        assert!(switch["happened"]["answered"].as_u64() > Some(0), "{switch}");
        for what in ["p50", "p99", "fill", "waste"] {
            let error = switch["errors"][what].as_f64().expect("a number");
            let label = format!("what=\"{what}\"");
            let exported = server.metric("ferry_shadow_error_ratio", &["model=\"queued\"", &label]);
            assert!((exported - error).abs() < 1e-9, "{what}: {exported} and {error}");
        }
        let mut history = Value::Null;
        wait_gently("the history has it", || {
            history = get(&server, "/v1/models/queued/policy/history");
            history["changes"][0]["prediction"].is_object()
        });
        let figures = &history["changes"][0]["prediction"]["figures"];
        assert_eq!(figures["fill"]["error"], switch["errors"]["fill"], "{history}");
        println!("off by {}", switch["errors"]);

        let (_, out, _) = ferry(&["shadow", "queued", "--control", &addr]);
        assert!(out.contains("  real") && out.contains("\nlast switch, to policy=window"), "{out}");
        let (status, out, _) = ferry(&["shadow", "queued", "--clear", "--control", &addr]);
        assert!(status == Some(0) && out.starts_with("queued: no setting is looked at\n"), "{out}");
        drop(talks);
        assert!(talking.join().expect("each request is answered once") > 100);
    });
    assert!(server.metric("ferry_shadow_stretches_total", &["outcome=\"used\""]) >= 4.0);
    assert_eq!(server.metric("ferry_shadow_stretches_total", &["outcome=\"differs\""]), 0.0);
    assert!(server.metric("ferry_shadow_cpu_seconds_total", &[]) > 0.0);
    assert_eq!(server.metric("ferry_captures_total", &[]), 0.0, "nobody captured");
    server.wait_until_at_rest();
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn settings_that_cannot_be_are_refused_with_what_was_expected() {
    let server = Server::start(&[]);
    for (settings, said) in [
        (json!([{ "rows": 8 }]), "settings[0]: unknown knob `rows`"),
        (json!([{ "rows_max": 8 }, { "hold": -1 }]), "settings[1]: hold: expected 0 to 1000"),
        (json!({}), "expected {\"settings\""),
        (
            json!([{ "hold": 1 }, { "hold": 2 }, { "hold": 3 }, { "hold": 4 }, { "hold": 5 }]),
            "expected at most 4, got 5",
        ),
    ] {
        let (status, answer) = put(&server, settings.clone());
        assert_eq!(status, 400, "{settings}: {answer}");
        assert!(answer["error"].as_str().expect("a sentence").contains(said), "{settings}: {answer}");
    }
    let body = json!({ "settings": [{ "hold": 0 }] }).to_string();
    assert_eq!(control(server.control, "PUT", PATH, "Origin: http://elsewhere\r\n", &body).0, 403);
    assert_eq!(control(server.control, "PUT", "/v1/models/nobody/shadow", "", &body).0, 404);
    assert_eq!(get(&server, PATH)["settings"], json!([]));
    // All models together.
    let four = json!([{ "hold": 1 }, { "hold": 2 }, { "hold": 3 }, { "hold": 4 }]);
    for model in ["echo", "digits", "sleep", "tiny_bert"] {
        let (path, body) = (format!("/v1/models/{model}/shadow"), json!({ "settings": four }).to_string());
        assert_eq!(patiently(|| control(server.control, "PUT", &path, "", &body)).0, 200);
    }
    let (status, answer) = put(&server, json!([{ "hold": 0 }]));
    assert!(status == 400 && answer["error"].as_str().expect("a sentence").contains("others have 16"), "{answer}");
    // A stretch is being taken: the server ends all the same.
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
}
