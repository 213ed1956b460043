//! The dashboard's side of the server: the page, its stream, and which pages may change something. What a browser makes of it:
//! tools/dashboard-check.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use ferry::control::dashboard::VIEWERS_MAX;
use serde_json::{Value, json};

use crate::common::{Ask, Server, control, wait_until};

/// Status, head in lower case, and body of one answer.
fn get(server: &Server, path: &str, host: &str, headers: &str) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(server.control).expect("the control port listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket option");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).expect("sends");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, head, answer[end + 4..].to_vec())
}

/// A reader of server-sent events.
struct Viewer {
    status: u16,
    lines: BufReader<TcpStream>,
}

impl Viewer {
    fn open(server: &Server) -> Viewer {
        let mut stream = TcpStream::connect(server.control).expect("the control port listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket option");
        stream.write_all(b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sends");
        let mut lines = BufReader::new(stream);
        let mut status = String::new();
        lines.read_line(&mut status).expect("a status line");
        let status = status.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        Viewer { status, lines }
    }

    /// Name and data of the next event.
    fn next(&mut self) -> (String, Value) {
        let mut name = String::new();
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).expect("a line in time") > 0, "the stream goes on");
            if let Some(text) = line.strip_prefix("event: ") {
                name = text.trim_end().to_owned();
            } else if let Some(data) = line.strip_prefix("data: ") {
                return (name, serde_json::from_str(data).expect("JSON"));
            }
        }
    }

    fn snapshot(&mut self) -> Value {
        let (name, value) = self.next();
        assert_eq!(name, "snapshot");
        value
    }
}

#[test]
fn the_page_and_all_it_names_come_from_this_port() {
    let server = Server::start(&[]);
    let (status, head, page) = get(&server, "/", "127.0.0.1", "");
    let page = String::from_utf8(page).expect("text");
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/html; charset=utf-8"), "{head}");
    assert!(head.contains("content-security-policy: default-src 'self';"), "{head}");
    assert!(head.contains("frame-ancestors 'none'") && head.contains("x-content-type-options: nosniff"), "{head}");
    let named: Vec<&str> = page.split('"').filter(|text| text.starts_with("/assets/")).collect();
    assert!(named.len() >= 5, "{named:?}");
    let mut scripts = vec!["/assets/format.js".to_owned(), "/assets/uPlot.LICENSE".to_owned()];
    scripts.extend(named.iter().map(|name| (*name).to_owned()));
    let mut seen = 0;
    while let Some(name) = scripts.pop() {
        let (status, head, bytes) = get(&server, &name, "127.0.0.1", "");
        assert_eq!(status, 200, "{name}");
        let kind = match name.rsplit('.').next().expect("an ending") {
            "js" => "text/javascript",
            "css" => "text/css",
            "svg" => "image/svg+xml",
            _ => "text/plain",
        };
        assert!(head.contains(&format!("content-type: {kind}")), "{name}: {head}");
        let text = String::from_utf8(bytes).expect("text");
        assert!(!text.is_empty(), "{name}");
        // Modules name others beside them.
        let imports = text.lines().filter_map(|line| line.strip_prefix("import ")?.split("from \"./").nth(1));
        scripts.extend(imports.map(|rest| format!("/assets/{}", rest.trim_end_matches("\";"))));
        seen += 1;
        assert!(seen < 64, "imports form a circle");
    }
    assert_eq!(get(&server, "/assets/../Cargo.toml", "127.0.0.1", "").0, 404);
    assert_eq!(get(&server, "/assets/nothing.js", "127.0.0.1", "").0, 404);
}

#[test]
fn a_viewer_is_greeted_and_then_told_each_second_how_things_stand() {
    let server = Server::start(&[]);
    let mut viewer = Viewer::open(&server);
    let (name, hello) = viewer.next();
    assert_eq!((viewer.status, name.as_str()), (200, "hello"));
    let models: Vec<&str> =
        hello["models"].as_array().expect("a list").iter().filter_map(|model| model["name"].as_str()).collect();
    let queued = models.iter().position(|model| *model == "queued").expect("it is served");
    assert_eq!(hello["bounds"]["seconds"][0], 1e-6);
    let before = viewer.snapshot();
    assert_eq!((&before["state"], &before["not_ready"]), (&json!("serving"), &Value::Null));
    assert_eq!(before["models"][queued]["accepted"], 0);

    let mut raw = server.connect();
    let handle = raw.handle("queued");
    let values = [1.0f32; 3 * 8];
    raw.ask(&Ask::new(handle, ferry::vocab::DType::F32, &[3, 8], bytemuck::cast_slice(&values)));
    raw.recv().expect_result();
    // Its outcome is counted before it is sent.
    let after = (0..60).map(|_| viewer.snapshot()).find(|snapshot| snapshot["models"][queued]["finished"]["ok"] == 1);
    let after = after.expect("one of the next snapshots has it");
    assert!(after["stats"]["uptime_us"].as_u64() > before["stats"]["uptime_us"].as_u64());
    let model = &after["models"][queued];
    assert_eq!((&model["rows"], &model["generation"]), (&json!(3), &json!(1)));
    assert_eq!(
        model["queue_delay"].as_array().expect("a list").iter().skip(1).filter_map(Value::as_u64).sum::<u64>(),
        1
    );
    // The batch, by the fields that were told in the beginning.
    let fields: Vec<&str> =
        hello["batch_fields"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    let batches = after["batcher"]["batches"].as_array().expect("the batcher answered");
    let field = |batch: &Value, name: &str| batch[fields.iter().position(|field| *field == name).expect(name)].clone();
    let batch = batches.iter().find(|batch| field(batch, "model") == queued).expect("its batch");
    assert_eq!((field(batch, "rows"), field(batch, "padded_len")), (json!(3), json!(8)));
    assert!(field(batch, "rows_possible").as_u64() >= Some(3), "{batch}");
    assert_eq!(field(batch, "padding_ratio").as_f64(), Some(0.0), "{batch}");
    assert_eq!(after["batcher"]["lanes"], json!([]), "nothing waits any more");
}

#[test]
fn what_waits_is_in_the_snapshot_by_length() {
    let server = Server::start(&[]);
    let body = json!({ "set": { "policy": "window", "queue_delay_max_us": 60_000_000 } }).to_string();
    assert_eq!(control(server.control, "PATCH", "/v1/models/queued/policy", "", &body).0, 200);
    let mut raw = server.connect();
    let handle = raw.handle("queued");
    let values = [1.0f32; 3 * 8];
    raw.ask(&Ask::new(handle, ferry::vocab::DType::F32, &[3, 8], bytemuck::cast_slice(&values)));
    let mut viewer = Viewer::open(&server);
    viewer.next();
    let lanes = (0..60).find_map(|_| {
        let lanes = viewer.snapshot()["batcher"]["lanes"].clone();
        lanes.as_array().is_some_and(|lanes| !lanes.is_empty()).then_some(lanes)
    });
    let lanes = lanes.expect("it waits for a minute");
    let lane = lanes[0].as_array().expect("model, length, rows, requests, age");
    assert_eq!(
        (lanes.as_array().map(Vec::len), &lane[1..4]),
        (Some(1), &[json!(8), json!(3), json!(1)][..]),
        "{lanes}"
    );
}

#[test]
fn viewers_beyond_the_bound_are_told_so_and_a_seat_that_is_left_is_given_again() {
    let server = Server::start(&[]);
    let mut viewers: Vec<Viewer> = (0..VIEWERS_MAX).map(|_| Viewer::open(&server)).collect();
    for viewer in &mut viewers {
        assert_eq!((viewer.status, viewer.next().0.as_str()), (200, "hello"));
    }
    // The first snapshot was made when some of them had not come yet.
    assert!((0..60).any(|_| viewers[0].snapshot()["viewers"] == VIEWERS_MAX as u64));
    let mut refused = Viewer::open(&server);
    assert_eq!(refused.status, 503);
    let mut answer = vec![0; 4096];
    let read = refused.lines.read(&mut answer).expect("a reason");
    assert!(String::from_utf8_lossy(&answer[..read]).contains("viewers at once"), "it says why");
    viewers.pop();
    // Found out when the next snapshot is written.
    wait_until("the seat is free", || Viewer::open(&server).status == 200);
    // The others were not disturbed, and the rest of the port neither.
    assert!(viewers.iter_mut().all(|viewer| viewer.snapshot()["state"] == "serving"));
    assert_eq!(get(&server, "/healthz", "127.0.0.1", "").0, 200);
}

#[test]
fn a_policy_is_changed_by_this_ports_own_page_and_by_no_other() {
    let server = Server::start(&[]);
    let path = "/v1/models/queued/policy";
    let set = |rows_max: u32, headers: &str| {
        let body = json!({ "set": { "rows_max": rows_max } }).to_string();
        control(server.control, "PATCH", path, headers, &body)
    };
    // `control` calls the port localhost.
    assert_eq!(set(16, "Origin: http://localhost\r\n").0, 200);
    for (headers, status) in [
        ("Origin: http://elsewhere.example\r\n", 403),
        ("Origin: null\r\n", 403),
        ("Origin: http://localhost:1\r\n", 403),
        ("Sec-Fetch-Site: cross-site\r\n", 403),
        ("Host: rebound.example\r\nOrigin: http://rebound.example\r\n", 400),
    ] {
        let (answered, answer) = set(8, headers);
        assert_eq!(answered, status, "{headers}: {answer}");
        assert!(answer["error"].is_string(), "{answer}");
    }
    let (status, policy) = control(server.control, "GET", path, "", "");
    assert_eq!((status, &policy["generation"]), (200, &json!(2)), "only the first was made");
    // A name that was made to point here reads nothing either; supervisors and scrapers may use any.
    for (path, status) in
        [("/", 421), ("/stats", 421), ("/v1/live", 421), ("/config", 421), ("/metrics", 200), ("/readyz", 200)]
    {
        assert_eq!(get(&server, path, "rebound.example", "").0, status, "{path}");
    }
    assert_eq!(get(&server, "/stats", "127.0.0.1", "Origin: http://elsewhere.example\r\n").0, 403);
}

#[test]
fn every_endpoint_that_is_told_is_there() {
    let server = Server::start(&[]);
    let (_, hello) = Viewer::open(&server).next();
    let endpoints: Vec<&str> =
        hello["endpoints"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert!(endpoints.contains(&"/v1/models/{model}/policy"), "{endpoints:?}");
    for endpoint in endpoints {
        if endpoint == "/v1/live" {
            continue; // it never ends, and was just read
        }
        let (status, _, body) = get(&server, &endpoint.replace("{model}", "queued"), "127.0.0.1", "");
        assert!(![404, 405].contains(&status), "{endpoint}: {status} {}", String::from_utf8_lossy(&body));
    }
}
