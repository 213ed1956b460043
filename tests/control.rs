//! The control port over real loopback HTTP, with a client of a few lines.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ferry::control::admin::{self, CONNECTIONS_MAX, ControlHandle, ControlOptions, RATE, REQUEST_BYTES_MAX};
use ferry::control::lifecycle::Lifecycle;
use ferry::mail::{Question, SetPolicyError, ToBatcher};
use ferry::mailbox::{Received, Receiver, mailbox};
use ferry::shadow::Board;
use ferry::telemetry::{ModelLabels, Telemetry};
use ferry::vocab::{Code, ModelHandle, SealReason};

/// Nobody reads what is asked of it.
fn board() -> Arc<Board> {
    Arc::new(Board::new(2, flume::bounded(4).0))
}

struct Control {
    handle: ControlHandle,
    telemetry: Arc<Telemetry>,
    lifecycle: Arc<Lifecycle>,
    drains: Arc<AtomicUsize>,
    /// What the batcher would get.
    mailbox: Receiver<ToBatcher>,
}

const ECHO: ModelHandle = ModelHandle(0);

fn start() -> Control {
    start_on([127, 0, 0, 1])
}

fn start_on(ip: [u8; 4]) -> Control {
    let labels = |name: &str| ModelLabels { name: name.into(), version: "1".into() };
    let telemetry = Telemetry::new(&[labels("echo"), labels("digits")], 2, 1);
    let lifecycle = Arc::new(Lifecycle::new());
    let drains = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&drains);
    let (batcher, mailbox) = mailbox(16);
    let handle = admin::spawn(ControlOptions {
        addr: SocketAddr::from((ip, 0)),
        telemetry: Arc::clone(&telemetry),
        lifecycle: Arc::clone(&lifecycle),
        models: vec![
            serde_json::json!({ "name": "echo", "version": "1", "inputs": [] }),
            serde_json::json!({ "name": "digits", "version": "1", "inputs": [] }),
        ],
        config_toml: "listen = \"127.0.0.1:0\"\n".into(),
        on_drain: Arc::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        }),
        batcher,
        shadow: board(),
        gate: None,
    })
    .expect("a free port");
    Control { handle, telemetry, lifecycle, drains, mailbox }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

/// Sends these bytes on a connection of their own and reads until the server closes it.
fn exchange(addr: SocketAddr, request: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?; // a bound for a broken server, not a measure
    // A server that refuses in the middle of a request closes before it is all written.
    let _ = stream.write_all(request);
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => return Err(error),
    }
    Ok(String::from_utf8(bytes).expect("answers are text"))
}

fn send(addr: SocketAddr, line: &str, headers: &str) -> Answer {
    let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n");
    let text = exchange(addr, request.as_bytes()).expect("the control port answers");
    let (head, body) = text.split_once("\r\n\r\n").expect("an answer has a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    Answer { status, head: head.to_ascii_lowercase(), body: body.into() }
}

impl Control {
    fn get(&self, path: &str) -> Answer {
        send(self.handle.addr, &format!("GET {path}"), "")
    }
}

#[test]
fn readiness_follows_the_life_of_the_server_and_health_does_not() {
    let control = start();
    let both = |control: &Control| (control.get("/healthz").status, control.get("/readyz").status);
    assert_eq!(both(&control), (200, 503));
    assert_eq!(control.get("/readyz").body, "starting\n");
    control.lifecycle.set_cold("digits");
    control.lifecycle.set_serving();
    assert_eq!(control.get("/readyz").body, "serving: not warm: digits\n");
    control.lifecycle.set_warm("digits");
    assert_eq!(both(&control), (200, 200));
    control.lifecycle.set_draining();
    assert_eq!(both(&control), (200, 503));
    assert_eq!(control.get("/readyz").body, "draining\n");
}

#[test]
fn models_are_listed_with_their_contracts_and_whether_each_is_ready() {
    let control = start();
    control.lifecycle.set_serving();
    control.lifecycle.set_cold("digits");
    let answer = control.get("/v1/models");
    assert!(answer.head.contains("content-type: application/json"), "{}", answer.head);
    let value: serde_json::Value = serde_json::from_str(&answer.body).expect("JSON");
    assert_eq!(value["state"], "serving");
    assert_eq!(value["models"][0]["name"], "echo");
    assert_eq!(value["models"][0]["ready"], true);
    assert_eq!(value["models"][1]["ready"], false);
    assert_eq!(value["models"][1]["handle"], 1);
    assert_eq!(value["models"][1]["contract"]["version"], "1");
}

#[test]
fn configuration_and_statistics_are_what_the_server_runs_with() {
    let control = start();
    assert_eq!(control.get("/config").body, "listen = \"127.0.0.1:0\"\n");
    control.telemetry.shard(0).accepted(ECHO, 4);
    control.telemetry.shard(0).finished(ECHO, Code::Ok, 1);
    let stats: serde_json::Value = serde_json::from_str(&control.get("/stats").body).expect("JSON");
    assert_eq!((stats["accepted"].as_u64(), stats["in_flight"].as_u64()), (Some(4), Some(3)));
    assert_eq!(stats["outcomes"]["ok"], 1);
}

#[test]
fn a_drain_is_asked_for_by_post_and_by_nothing_else() {
    let control = start();
    assert_eq!(control.get("/drain").status, 405);
    let from_a_page = send(control.handle.addr, "POST /drain", "Content-Length: 0\r\nOrigin: http://localhost\r\n");
    assert_eq!(from_a_page.status, 403);
    assert_eq!(control.drains.load(Ordering::SeqCst), 0);
    let answer = send(control.handle.addr, "POST /drain", "Content-Length: 0\r\n");
    assert_eq!((answer.status, answer.body.as_str()), (202, "{\"state\":\"draining\"}"));
    assert_eq!(control.drains.load(Ordering::SeqCst), 1);
}

#[test]
fn an_unknown_path_says_which_are_known() {
    let answer = start().get("/metric");
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("/metrics"), "{}", answer.body);
}

#[test]
fn a_request_that_is_too_long_costs_its_connection_and_nothing_else() {
    let control = start();
    let long = format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(2 * REQUEST_BYTES_MAX));
    let answer = exchange(control.handle.addr, long.as_bytes()).expect("it is closed, not left open");
    assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(control.get("/healthz").status, 200);
    let fits = "X: ".to_owned() + &"x".repeat(REQUEST_BYTES_MAX / 2) + "\r\n";
    assert_eq!(send(control.handle.addr, "GET /healthz", &fits).status, 200);
}

#[test]
fn a_body_that_never_ends_is_cut() {
    let control = start();
    let head = format!("POST /drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", 1u64 << 40);
    let mut request = head.into_bytes();
    request.resize(4 * REQUEST_BYTES_MAX, b'x');
    exchange(control.handle.addr, &request).expect("it is closed, not left open");
    assert_eq!(control.get("/healthz").status, 200);
}

#[test]
fn bytes_that_are_not_http_end_their_connection() {
    let control = start();
    exchange(control.handle.addr, b"FRY\x01 this is the other port\r\n\r\n").expect("it is closed, not left open");
    assert_eq!(control.get("/healthz").status, 200);
}

/// Goal: a scraper in a loop is slowed down, while health keeps being answered.
/// Method: more requests than the rate allows on one connection; some are refused, none of them health.
#[test]
fn a_hammering_scraper_is_told_to_slow_down_and_health_is_still_answered() {
    let control = start();
    let statuses: Vec<u16> = (0..RATE * 3).map(|_| control.get("/stats").status).collect();
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert!(statuses[..RATE as usize].iter().all(|status| *status == 200), "a second's worth is always answered");
    // Whether all of them fit into the time depends on the machine; a machine that fast is not needed to see that
    // health is outside of it.
    assert!((0..RATE * 2).all(|_| control.get("/healthz").status == 200));
}

/// Goal: callers that connect and say nothing cannot keep a supervisor from asking.
/// Method: all seats are taken by silent connections; the next request is answered once they are thrown out.
#[test]
fn silent_connections_are_thrown_out() {
    let control = start();
    let silent: Vec<TcpStream> =
        (0..CONNECTIONS_MAX).map(|_| TcpStream::connect(control.handle.addr).expect("a connection")).collect();
    assert_eq!(control.get("/healthz").status, 200);
    drop(silent);
}

#[test]
fn a_control_port_that_is_stopped_is_free_again() {
    let control = start_on([127, 77, 0, 1]); // where no other test could be given the port in between
    let addr = control.handle.addr;
    assert_eq!(control.get("/healthz").status, 200);
    control.handle.shutdown();
    assert!(TcpStream::connect(addr).is_err(), "nobody listens any more");
}

#[test]
fn a_port_that_is_taken_is_an_error_and_not_a_panic() {
    let control = start();
    let error = admin::spawn(ControlOptions {
        addr: control.handle.addr,
        telemetry: Arc::clone(&control.telemetry),
        lifecycle: Arc::clone(&control.lifecycle),
        models: Vec::new(),
        config_toml: String::new(),
        on_drain: Arc::new(|| {}),
        batcher: mailbox(1).0,
        shadow: board(),
        gate: None,
    })
    .expect_err("the port is taken");
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}

/// Goal: a caller is told why the batcher cannot be asked, and never waits for it without end.
/// Method: ask before the server serves, while nobody reads the mailbox, when it is full, and when its reader is gone.
#[test]
fn questions_that_nobody_answers_end_with_the_reason() {
    let mut control = start();
    let path = "/v1/models/echo/policy";
    let ask = |control: &Control| {
        let answer = control.get(path);
        (answer.status, answer.body)
    };
    assert_eq!(ask(&control).0, 503);
    assert!(ask(&control).1.contains("starting"));
    assert!(control.mailbox.is_empty(), "nothing is asked of a batcher that does not run yet");
    control.lifecycle.set_serving();
    let (status, body) = ask(&control);
    assert!(status == 503 && body.contains("did not answer in time"), "{body}");
    assert_eq!(control.get("/v1/models/nobody/policy").status, 404);
    assert_eq!(control.get("/healthz").status, 200);
    assert!(matches!(control.mailbox.try_recv(), Some(ToBatcher::Ask(Question::Policy { model: ECHO, .. }))));
    let (sender, mailbox) = mailbox(1);
    drop(sender);
    drop(std::mem::replace(&mut control.mailbox, mailbox));
    let (status, body) = ask(&control);
    assert!(status == 503 && body.contains("nobody to ask any more"), "{body}");
}

#[test]
fn a_change_reaches_the_batcher_as_it_was_written_and_its_answer_the_caller() {
    let control = start();
    control.lifecycle.set_serving();
    let Control { handle, mailbox, .. } = &control;
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let body = r#"{"set": {"rows_max": 8}}"#;
            let request = format!(
                "PUT /v1/models/digits/policy HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            exchange(handle.addr, request.as_bytes()).expect("the control port answers")
        });
        let Received::Message(ToBatcher::SetPolicy(wish)) = mailbox.recv_until(None, Duration::ZERO) else {
            panic!("a change was sent")
        };
        assert_eq!((wish.model, &wish.set), (ModelHandle(1), &vec![("rows_max".to_owned(), "8".to_owned())]));
        wish.reply.give(Err(SetPolicyError::Invalid("rows_max: no".into())));
        let answer = caller.join().expect("the caller does not panic");
        assert!(answer.starts_with("HTTP/1.1 400") && answer.ends_with(r#"{"error":"rows_max: no"}"#), "{answer}");
    });
}

/// One sample line of OpenMetrics text: name, labels, value.
#[derive(Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Checks a page of OpenMetrics text line by line and returns its samples by family. Small, but strict in what a
/// scraper trips over: order, types, suffixes, label syntax, bucket sums, the end.
fn parse_openmetrics(text: &str) -> Result<BTreeMap<String, (String, Vec<Sample>)>, String> {
    let mut families: BTreeMap<String, (String, Vec<Sample>)> = BTreeMap::new();
    let mut current = String::new();
    let body = text.strip_suffix("# EOF\n").ok_or("the page does not end with # EOF")?;
    let mut series = BTreeSet::new();
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or(format!("TYPE without a type: {line}"))?;
            if !["counter", "gauge", "histogram"].contains(&kind) {
                return Err(format!("unknown type: {line}"));
            }
            if families.insert(name.into(), (kind.into(), Vec::new())).is_some() {
                return Err(format!("{name} is declared twice"));
            }
            current = name.into();
        } else if line.starts_with("# HELP ") || line.starts_with("# UNIT ") {
            continue;
        } else {
            let sample = parse_sample(line)?;
            let (kind, samples) = families.get_mut(&current).ok_or(format!("a sample before any TYPE: {line}"))?;
            let suffixes: &[&str] = match kind.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                _ => &["_bucket", "_sum", "_count"],
            };
            if !suffixes.iter().any(|suffix| sample.name == format!("{current}{suffix}")) {
                return Err(format!("{} is no {kind} of {current}", sample.name));
            }
            if !series.insert(line.rsplit_once(' ').map(|(series, _)| series.to_owned())) {
                return Err(format!("a series comes twice: {line}"));
            }
            samples.push(sample);
        }
    }
    for (name, (kind, samples)) in &families {
        if kind == "histogram" {
            check_histogram(name, samples)?;
        }
    }
    Ok(families)
}

fn parse_sample(line: &str) -> Result<Sample, String> {
    let wrong = || format!("not a sample: {line}");
    let (series, value) = line.rsplit_once(' ').ok_or_else(wrong)?;
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, rest)) => (name, rest.strip_suffix('}').ok_or_else(wrong)?),
    };
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let mut parsed = BTreeMap::new();
    for label in labels.split(',').filter(|label| !label.is_empty()) {
        let (key, value) = label.split_once('=').ok_or_else(wrong)?;
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).ok_or_else(wrong)?;
        if !is_name(key) || value.contains('"') || parsed.insert(key.into(), value.into()).is_some() {
            return Err(wrong());
        }
    }
    let value = value.parse().map_err(|_| wrong())?;
    if !is_name(name) {
        return Err(wrong());
    }
    Ok(Sample { name: name.into(), labels: parsed, value })
}

fn check_histogram(name: &str, samples: &[Sample]) -> Result<(), String> {
    /// Bounds with their cumulative counts, and the count of the whole.
    type Buckets = (Vec<(f64, f64)>, Option<f64>);
    let mut by_labels: BTreeMap<String, Buckets> = BTreeMap::new();
    for sample in samples {
        let mut labels = sample.labels.clone();
        let bound = labels.remove("le");
        let entry = by_labels.entry(format!("{labels:?}")).or_default();
        match (bound, sample.name.ends_with("_count")) {
            (Some(bound), _) => entry.0.push((bound.parse().map_err(|_| format!("{name}: le {bound}"))?, sample.value)),
            (None, true) => entry.1 = Some(sample.value),
            (None, false) => {}
        }
    }
    for (labels, (buckets, count)) in by_labels {
        if !buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1) {
            return Err(format!("{name}{labels}: buckets do not ascend"));
        }
        let last = buckets.last().ok_or(format!("{name}{labels}: no buckets"))?;
        if last.0 != f64::INFINITY || Some(last.1) != count {
            return Err(format!("{name}{labels}: the bucket +Inf is not the count"));
        }
    }
    Ok(())
}

#[test]
fn the_checker_of_metrics_finds_what_is_wrong_with_a_page() {
    let good = "# TYPE a counter\na_total{x=\"1\"} 2\n# EOF\n";
    assert!(parse_openmetrics(good).is_ok());
    for bad in [
        "# TYPE a counter\na_total 2\n",
        "# TYPE a counter\na 2\n# EOF\n",
        "a_total 2\n# EOF\n",
        "# TYPE a counter\na_total{x=1} 2\n# EOF\n",
        "# TYPE a counter\na_total 2\na_total 3\n# EOF\n",
        "# TYPE a histogram\na_bucket{le=\"1.0\"} 2\na_bucket{le=\"+Inf\"} 1\na_count 1\n# EOF\n",
        "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\na_count 2\n# EOF\n",
    ] {
        assert!(parse_openmetrics(bad).is_err(), "{bad}");
    }
}

#[test]
fn metrics_are_openmetrics_text_whose_sums_are_the_counts() {
    let control = start();
    let telemetry = &control.telemetry;
    telemetry.publish_limits(vec![("queue.rows_max".into(), 65_536)]);
    telemetry.shard(0).accepted(ECHO, 5);
    telemetry.shard(1).accepted(ECHO, 2);
    telemetry.shard(0).finished(ECHO, Code::Ok, 4);
    telemetry.shard(1).refused(None, Code::NotFound);
    telemetry.shard(1).goaway(Code::ProtocolError);
    for reason in SealReason::ALL {
        telemetry.model(ECHO).batch_sealed(reason, 3, 8, 10, 30, 40);
    }
    telemetry.model(ECHO).queue_delay(Duration::from_micros(7));
    telemetry.model(ECHO).service_time(Duration::from_millis(2));
    telemetry.model(ECHO).queue_depth(1, 2, 3);
    telemetry.executor(0).busy(Duration::from_millis(1500));
    let answer = control.get("/metrics");
    assert!(answer.head.contains("content-type: application/openmetrics-text"), "{}", answer.head);
    let families = parse_openmetrics(&answer.body).unwrap_or_else(|error| panic!("{error}\n{}", answer.body));
    let sum = |family: &str| -> f64 { families[family].1.iter().map(|sample| sample.value).sum() };
    assert_eq!(sum("ferry_requests_accepted"), 7.0);
    assert_eq!(sum("ferry_requests_accepted"), sum("ferry_requests_finished") + sum("ferry_requests_in_flight"));
    assert_eq!(sum("ferry_batches"), SealReason::ALL.len() as f64);
    assert_eq!(sum("ferry_executor_busy_seconds"), 1.5);
    let value = |family: &str, suffix: &str| -> f64 {
        let name = format!("{family}{suffix}");
        let mine = |sample: &&Sample| sample.name == name && sample.labels.get("model").is_some_and(|m| m == "echo");
        families[family].1.iter().find(mine).map(|sample| sample.value).expect("the series is there")
    };
    assert_eq!(value("ferry_batch_rows", "_count"), sum("ferry_batches"));
    assert_eq!(value("ferry_batch_rows", "_sum"), 3.0 * SealReason::ALL.len() as f64);
    assert_eq!(value("ferry_queue_delay_seconds", "_sum"), 7e-6);
    assert_eq!(value("ferry_queue_bytes", ""), 3.0);
}

/// Goal: nothing that a caller sends makes a new time series.
/// Method: count every model handle, code and shard there can be; only known labels appear, in a known number.
#[test]
fn labels_come_only_from_sets_that_were_fixed_at_the_start() {
    let control = start();
    for handle in (0..u16::MAX).step_by(97) {
        for code in Code::ALL {
            let shard = control.telemetry.shard(usize::from(handle % 2));
            shard.accepted(ModelHandle(handle), 1);
            shard.finished(ModelHandle(handle), *code, 1);
            shard.refused(Some(ModelHandle(handle)), *code);
        }
    }
    let families = parse_openmetrics(&control.get("/metrics").body).expect("a page that parses");
    let mut models = BTreeSet::new();
    for (_, samples) in families.values() {
        for sample in samples {
            models.extend(sample.labels.get("model").cloned());
        }
    }
    assert_eq!(models, BTreeSet::from(["echo".to_owned(), "digits".into(), "other".into()]));
    // Only handle 0 of the multiples of 97 is a model: the rest is "other".
    assert_eq!(families["ferry_requests_finished"].1.len(), 2 * Code::ALL.len());
}

/// A `ferry serve` that is killed when its test ends early.
struct Served(std::process::Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server with few threads, a free control port, and the models of this repository.
fn serve(listen: &str) -> Served {
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(["serve", "--listen", listen, "--control", "127.0.0.1:0"])
        .args(["--set", "threads.shards=1", "--set", "threads.executors=1", "--set", "threads.pin=false"])
        .args(["--set", "frontend.connections_max=64"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary was built for this test");
    Served(child)
}

/// Goal: what a supervisor does with a server works: start it, wait for its line, ask, stop it by a signal.
#[test]
fn a_served_process_says_when_it_is_ready_and_ends_on_sigterm_with_0() {
    let mut served = serve("127.0.0.1:0");
    let mut out = std::io::BufReader::new(served.0.stdout.take().expect("it is piped"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).expect("a line, or the end of a server that failed");
    let words: Vec<&str> = line.trim_end().split(' ').collect();
    if words.len() != 4 {
        let mut err = String::new();
        served.0.stderr.take().expect("it is piped").read_to_string(&mut err).expect("it ended");
        panic!("not a ready line: {line:?}; standard error: {err}");
    }
    assert_eq!(words[0], "ready");
    let data: SocketAddr = words[1].strip_prefix("data=").expect("data=").parse().expect("an address");
    let control: SocketAddr = words[2].strip_prefix("control=").expect("control=").parse().expect("an address");
    assert!(words[3].strip_prefix("models=").expect("models=").split(',').any(|name| name == "echo"), "{line}");
    assert_eq!(send(control, "GET /readyz", "").status, 200);
    assert!(parse_openmetrics(&send(control, "GET /metrics", "").body).is_ok());
    // A second server is told that the port is taken, before it starts anything.
    let mut second = serve(&data.to_string());
    assert_eq!(second.0.wait().expect("it ends by itself").code(), Some(78));
    let mut err = String::new();
    second.0.stderr.take().expect("it is piped").read_to_string(&mut err).expect("it ended");
    assert!(err.contains(&format!("{data} is taken by another server")), "{err}");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(served.0.id()).expect("process ids are small"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
    assert_eq!(served.0.wait().expect("it ends").code(), Some(0));
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("it ended");
    assert_eq!(rest, "", "the ready line is the only one");
}
