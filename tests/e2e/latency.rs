//! Latency as the server counts it: from arrival, and from the moment its sender meant to send (N20).

use std::time::Duration;

use ferry::client::{Client, ClientOptions, Request};
use ferry::load::{Arrival, Lengths, LoadOptions, Mode};
use ferry::vocab::{Code, TraceContext};

use crate::common::{Ask, Server};

const LATENCY: &str = "ferry_request_latency_seconds";
const INTENDED: &str = "ferry_intended_latency_seconds";
const LAG: &str = "ferry_send_lag_seconds";

fn count_and_sum(server: &Server, name: &str) -> (f64, f64) {
    let of = |part: &str| server.metric(&format!("{name}_{part}"), &["model=\"echo\""]);
    (of("count"), of("sum"))
}

fn echo(values: &[f32]) -> Request {
    Request::new("echo").input("values", &[1, values.len() as u32], values)
}

#[test]
fn a_request_that_says_how_late_it_is_is_counted_from_its_intention() {
    let server = Server::start(&[]);
    let client = Client::connect(server.data, ClientOptions::default()).expect("a server");
    client.infer(&echo(&[1.0])).expect("an answer");
    assert_eq!(count_and_sum(&server, LATENCY).0, 1.0);
    assert_eq!(count_and_sum(&server, INTENDED), (0.0, 0.0), "it said nothing");
    assert!(!server.telemetry.encode().contains(&format!("{LAG}_count")), "no series for nothing");

    client.infer(&echo(&[2.0]).late(Duration::from_secs(3))).expect("an answer");
    client.infer(&echo(&[3.0]).late(Duration::ZERO)).expect("an answer");
    let (_, latency) = count_and_sum(&server, LATENCY);
    let ((intended, from_intention), (lags, lag)) = (count_and_sum(&server, INTENDED), count_and_sum(&server, LAG));
    assert_eq!((intended, lags), (2.0, 2.0), "on time is stated, too");
    assert!(lag >= 3.0, "three seconds and what the client took: {lag}");
    assert!(
        from_intention > lag && from_intention <= lag + latency + 1e-9,
        "{from_intention} = {lag} + part of {latency}"
    );
}

#[test]
fn an_open_loop_states_how_late_each_request_is_and_a_closed_one_cannot() {
    let server = Server::start(&[]);
    let options = |mode| LoadOptions {
        lengths: Lengths::Fixed(8),
        duration: Duration::from_millis(200),
        warmup: Duration::from_millis(20),
        drain_max: Duration::from_secs(30),
        ..LoadOptions::new(server.data, "echo", mode)
    };
    let run = |mode| ferry::load::run(&options(mode), |_| ()).expect("the server serves");
    let closed = run(Mode::Closed { callers: 4 });
    assert!(closed.ok > 0 && count_and_sum(&server, INTENDED).0 == 0.0);
    let before = count_and_sum(&server, LATENCY).0;
    let open = run(Mode::Open { rate: 1000.0, arrival: Arrival::Poisson });
    assert!(open.ok > 0 && open.lost == 0, "{open:?}");
    let answered = count_and_sum(&server, LATENCY).0 - before;
    assert_eq!(count_and_sum(&server, INTENDED).0, answered, "every one of them, warm-up too");
    assert!(answered >= open.ok as f64);
}

#[test]
fn a_trace_of_zeros_is_refused_and_one_of_a_caller_is_not() {
    let server = Server::shared();
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    let mut ask = Ask::floats(echo, &[1.0]);
    ask.infer.trace = Some(TraceContext { trace_id: [0; 16], span_id: [1; 8], flags: 1 });
    let refusal = raw.round(&ask).expect_error(Code::InvalidArgument);
    assert!(refusal.message.contains("a trace id and a span id"), "{refusal}");
    ask.infer.trace = Some(TraceContext { trace_id: [9; 16], span_id: [1; 8], flags: 0xFF });
    raw.round(&ask).expect_result();
}
