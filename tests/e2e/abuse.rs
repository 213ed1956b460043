//! Peers that only make work, and tenants that want more than their share.

use std::io::Write;
use std::time::Duration;

use ferry::server::Ending;
use ferry::vocab::Code;
use ferry::wire::Kind;
use ferry::wire::encoder::{Head, append_frame};

use crate::common::process::Child;
use crate::common::{Ask, Event, Raw, Server, bare_frame, describe_frame, header, hello, hello_frame, wait_until};

/// Points that nothing gives back, so that counts are exact however slow the machine is.
const EXACT: &str = "abuse.points_per_second=0";

/// Sends bytes of a peer that may have been sent away meanwhile.
fn pour(raw: &mut Raw, bytes: &[u8]) {
    let _ = raw.stream.write_all(bytes);
}

/// Everything until the server closes: how many events came before the goaway, and its code and message.
fn farewell(raw: &mut Raw) -> (usize, Code, String) {
    let events = raw.recv_all();
    let goaway = events.iter().enumerate().find_map(|(at, event)| match event {
        Event::Goaway { code, goaway } => Some((at, *code, goaway.message.clone())),
        _ => None,
    });
    goaway.unwrap_or_else(|| panic!("expected a goaway among {events:?}"))
}

#[test]
fn each_wasteful_act_is_forgiven_up_to_its_points_and_not_once_more() {
    let server = Server::start(&["abuse.points=200", EXACT, "frontend.credit_requests=1"]);
    let mut bystander = server.connect();
    let sleep = bystander.handle("sleep");
    let echo = bystander.handle("echo");
    let nap = Ask::word(sleep, 2_000_000);
    let broken = |id: u64| {
        let mut frame = Ask::floats(echo, &[1.0]).frame(id);
        *frame.last_mut().expect("a payload") ^= 1;
        frame
    };
    type Frame<'a> = &'a dyn Fn(u64) -> Vec<u8>;
    let acts: [(&str, usize, bool, Frame); 8] = [
        ("pings", 200, true, &|id| bare_frame(Kind::Ping, id)),
        ("cancels", 200, false, &|id| bare_frame(Kind::Cancel, id)),
        ("frames of unknown kinds", 200, false, &|_| header(99, 0x80, 0, 0)),
        ("describes and stats", 100, true, &|id| bare_frame(Kind::Stats, id)),
        ("describes and stats", 100, true, &|id| describe_frame(id, "echo", "")),
        ("requests that the contract refuses", 100, true, &|id| Ask::words(echo, &[1, 2]).frame(id)),
        ("malformed requests", 2, true, &broken),
        ("requests beyond the credit", 20, true, &|id| nap.frame(id)),
    ];
    for (what, forgiven, answered, frame) in acts {
        for more in [0, 1] {
            let mut raw = server.connect();
            if what == "requests beyond the credit" {
                // The only one that the credit allows; it is answered after all that follow.
                pour(&mut raw, &nap.frame(1));
            }
            let acts: Vec<u8> = (0..forgiven + more).flat_map(|at| frame(at as u64 + 2)).collect();
            pour(&mut raw, &acts);
            if more == 0 {
                // A wrong goaway would come before the answer to the last request.
                let answers = if answered { forgiven } else { 0 };
                let events: Vec<Event> = (0..answers).map(|_| raw.recv()).collect();
                assert!(
                    events.iter().all(|event| !matches!(event, Event::Goaway { .. } | Event::End)),
                    "{what}: {events:?}"
                );
                pour(&mut raw, &Ask::floats(echo, &[1.0]).frame(1 << 40));
                assert!(!matches!(raw.recv(), Event::Goaway { .. } | Event::End), "{what}: {forgiven} are forgiven");
            } else {
                let (_, code, message) = farewell(&mut raw);
                assert_eq!((code, message), (Code::QuotaExceeded, format!("too many {what}: enhance your calm")));
            }
        }
        bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
    }
    assert!(server.metric("ferry_goaways_total", &["code=\"quota_exceeded\""]) >= 8.0);
    assert!(server.metric("ferry_wasted_points_total", &[]) >= 8.0 * 400.0);
    assert_eq!(server.metric("ferry_banned_connections_total", &[]), 0.0, "this machine is not banned by default");
}

#[test]
fn an_answered_request_earns_two_cancels_and_full_use_never_costs() {
    let server = Server::start(&["abuse.points=50", EXACT, "frontend.credit_requests=64"]);
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    for _ in 0..100 {
        let mut bytes = Vec::new();
        let ids: Vec<u64> = (0..64).map(|_| raw.take_id()).collect();
        ids.iter().for_each(|id| bytes.extend(Ask::floats(echo, &[1.0]).frame(*id)));
        raw.send(&bytes);
        for _ in 0..64 {
            raw.recv().expect_result();
        }
        // 40 at a time, which is less than 50: what was earned is kept only up to that.
        ids.iter().take(20).for_each(|id| raw.send(&[*id, id + 1].map(|id| bare_frame(Kind::Cancel, id)).concat()));
    }
    raw.round(&Ask::floats(echo, &[1.0])).expect_result();
}

/// F16.
#[test]
fn a_flood_is_sent_away_and_its_address_kept_out_for_a_while_and_good_traffic_is_not_hurt() {
    let server = Server::start(&["abuse.ban_loopback=true", "abuse.ban_ms=1000", EXACT]);
    let mut bystander = server.connect();
    let echo = bystander.handle("echo");
    let mut flood = server.connect();
    let pings: Vec<u8> = (0..5000).flat_map(|id| bare_frame(Kind::Ping, id)).collect();
    pour(&mut flood, &pings);
    let (pongs, code, message) = farewell(&mut flood);
    assert_eq!((pongs, code, &*message), (1000, Code::QuotaExceeded, "too many pings: enhance your calm"));
    wait_until("the address is let in again", || {
        bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
        let mut again = Raw::connect(server.data);
        pour(&mut again, &hello_frame());
        matches!(again.recv(), Event::HelloAck(_))
    });
    assert!(server.metric("ferry_banned_connections_total", &[]) >= 1.0, "it was not let in at first");
    server.drain();
    drop(bystander);
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn streams_that_cannot_be_followed_are_forgiven_ten_times() {
    let server = Server::start(&["abuse.ban_loopback=true", EXACT]);
    let mut bystander = server.connect();
    for _ in 0..11 {
        let mut raw = Raw::connect(server.data);
        pour(&mut raw, b"GET / HTTP/1.1\r\nHost: ferry\r\n\r\n");
        assert!(matches!(raw.recv(), Event::Goaway { code: Code::ProtocolError, .. }));
    }
    let mut raw = Raw::connect(server.data);
    pour(&mut raw, &hello_frame());
    assert!(matches!(raw.recv(), Event::End), "the twelfth is not listened to");
    bystander.ping();
}

/// F17.
#[test]
fn a_hundred_thousand_requests_cancelled_at_once_end_their_connections_and_leave_nothing() {
    const PAIRS: u64 = 100_000;
    let child = Child::start(&[]);
    let mut bystander = child.connect();
    let echo = bystander.handle("queued");
    let mut pairs = 0;
    let mut goaways = 0;
    let mut attack = |until: u64, bystander: &mut Raw| {
        while pairs < until {
            let mut raw = child.connect();
            let bytes: Vec<u8> = (1..=2000)
                .flat_map(|id| [Ask::floats(echo, &[1.0]).frame(id), bare_frame(Kind::Cancel, id)].concat())
                .collect();
            pour(&mut raw, &bytes);
            let events = raw.recv_all();
            let ends = events.iter().filter_map(Event::ends);
            pairs += ends.clone().count() as u64;
            let distinct: std::collections::HashSet<u64> = ends.clone().collect();
            assert_eq!(distinct.len(), ends.count(), "no request ends twice");
            goaways +=
                events.iter().filter(|event| matches!(event, Event::Goaway { code: Code::QuotaExceeded, .. })).count();
            bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
        }
    };
    attack(PAIRS / 4, &mut bystander);
    let before = child.resident_bytes();
    attack(PAIRS, &mut bystander);
    let grown = child.resident_bytes() - before;
    assert!(grown < 4 << 20, "{grown} bytes more after {} pairs", PAIRS * 3 / 4);
    assert!(goaways >= 20, "{goaways} connections were sent away");
    wait_until("nothing is owed", || child.metric("ferry_requests_in_flight", &[]) == 0.0);
    assert_eq!(child.metric("ferry_audits_total", &["outcome=\"drift\""]), 0.0);
}

/// Counted limits of a connection: one less, as many, one more.
#[test]
fn names_and_windows_of_a_connection_hold_to_the_last_one() {
    let sets = ["frontend.credit_requests=3", "frontend.credit_bytes=4096", "frontend.payload_bytes_max=4096"];
    let server = Server::start(&sets);
    for (bytes, fits) in [(127, true), (128, true), (129, false)] {
        match of_tenant(&server, &"n".repeat(bytes)).recv() {
            Event::HelloAck(_) if fits => {}
            Event::Goaway { code: Code::ProtocolError, .. } if !fits => {}
            other => panic!("a name of {bytes} bytes: {other:?}"),
        }
    }
    let mut raw = server.connect();
    let sleep = raw.handle("sleep");
    let nap = Ask::word(sleep, 2_000_000);
    let ids: Vec<u64> = (0..3).map(|_| raw.ask(&nap)).collect();
    raw.ping();
    raw.round(&nap).expect_error(Code::Overloaded);
    for id in &ids {
        raw.send(&bare_frame(Kind::Cancel, *id));
        assert_eq!(raw.recv().ends(), Some(*id));
    }
    let queued = raw.handle("queued");
    for (values, fits) in [(1023, true), (1024, true), (1025, false)] {
        let id = raw.ask(&Ask::floats(queued, &vec![1.0; values]));
        match raw.recv() {
            // Whatever the contract says of its length: it was read.
            Event::Result { id: ended, .. } | Event::Error { id: ended, .. } if fits => assert_eq!(ended, id),
            Event::Goaway { code: Code::TooLarge, .. } if !fits => {}
            other => panic!("a payload of {} bytes: {other:?}", 4 * values),
        }
    }
}

/// F49: names that are made up do not grow the page of metrics.
#[test]
fn thousands_of_made_up_tenants_are_a_bounded_number_of_labels() {
    let server = Server::start(&["threads.shards=1"]);
    for at in 0..1500 {
        drop(open_tenant(&server, &format!("made-up-{at}")));
    }
    let page = crate::common::get(server.control, "/metrics");
    let labels = page.lines().filter_map(|line| line.split("tenant=\"").nth(1)?.split('"').next());
    let distinct: std::collections::HashSet<&str> = labels.collect();
    assert!(distinct.len() <= 1024, "{} names of tenants", distinct.len());
    let mut last = open_tenant(&server, "made-up-1499");
    let echo = last.handle("echo");
    last.round(&Ask::floats(echo, &[1.0])).expect_result();
}

/// Near the budget of payloads windows shrink, the greediest caller's first, and no connection is taken; then all comes back.
#[test]
fn near_the_budget_the_greedy_get_smaller_windows_and_new_connections_wait() {
    let server = Server::start(&[
        "queue.bytes_max=16384",
        "frontend.payload_bytes_max=4096",
        "frontend.credit_bytes=16384",
        "threads.executors=1",
        "threads.shards=1",
    ]);
    let (mut greedy, mut modest) = (server.connect(), server.connect());
    let sleep = greedy.handle("sleep");
    let nap = Ask::words(sleep, &[2_000_000; 32]);
    assert_eq!(nap.payload.len(), 128);
    let alone = modest.ask(&nap);
    modest.ping();
    let mut ids: Vec<u64> = (0..100).map(|_| greedy.ask(&nap)).collect();
    let Event::Credit(credit) = greedy.recv() else { panic!("expected a credit frame") };
    // Three quarters of 101 * 128 are left, of which the modest one has 128.
    assert_eq!((credit.requests, credit.bytes), (256, 101 * 128 * 3 / 4 - 128));
    let refusal = greedy.round(&nap).expect_error(Code::Overloaded);
    assert!(refusal.message.contains("the credit is 9568 bytes in flight"), "{refusal:?}");
    // The modest one goes on until 95 % are reached; it is answered last, so that nothing has to be read meanwhile.
    let mut others: Vec<u64> = (0..24).map(|_| modest.ask(&nap)).collect();
    others.push(alone);
    wait_until("no connection is taken", || {
        drop(Raw::connect(server.data));
        server.metric("ferry_accept_pauses_total", &[]) >= 1.0
    });
    let mut waiting = Raw::connect(server.data);
    waiting.send(&hello_frame());
    for (raw, ids) in [(&mut greedy, &mut ids), (&mut modest, &mut others)] {
        ids.iter().for_each(|id| raw.send(&bare_frame(Kind::Cancel, *id)));
        let mut ended = 0;
        while ended < ids.len() {
            ended += usize::from(raw.recv().ends().is_some());
        }
    }
    assert!(matches!(waiting.recv(), Event::HelloAck(_)), "it was only late");
    let Event::Credit(credit) = greedy.recv() else { panic!("expected a credit frame") };
    assert_eq!((credit.requests, credit.bytes), (256, 16384));
    assert_eq!(server.metric("ferry_audits_total", &["outcome=\"drift\""]), 0.0);
}

/// A connection of a tenant.
fn of_tenant(server: &Server, name: &str) -> Raw {
    let mut raw = Raw::connect(server.data);
    let mut bytes = Vec::new();
    let hello = ferry::wire::message::Hello { tenant: name.into(), ..hello() };
    append_frame(&mut bytes, Head::control(Kind::Hello), &hello, &[]).expect("short names");
    raw.send(&bytes);
    raw
}

fn open_tenant(server: &Server, name: &str) -> Raw {
    let mut raw = of_tenant(server, name);
    assert!(matches!(raw.recv(), Event::HelloAck(_)));
    raw
}

/// F49: each figure of a quota at its limit and one above, over connections and shards, and another tenant beside it.
#[test]
fn a_tenant_gets_its_quota_over_all_shards_and_the_others_notice_nothing() {
    let cases = [
        ("quota.requests_per_second=5", "the tenant's quota is 5 requests a second"),
        ("quota.rows_per_second=5", "the tenant's quota is 5 rows a second"),
        ("quota.cells_per_second=5", "the tenant's quota is 5 cells a second"),
        ("quota.bytes_per_second=20", "the tenant's quota is 20 bytes a second"),
    ];
    for (set, message) in cases {
        let server = Server::start(&[set, "threads.shards=2"]);
        let mut raws: Vec<Raw> = (0..4).map(|_| open_tenant(&server, "greedy")).collect();
        let echo = raws[0].handle("echo");
        let ask = Ask::floats(echo, &[1.0]);
        let mut taken = 0;
        // Real time goes on while they ask, so there may be some more than a second's worth; what is said counts.
        let refusal = (0..10_000).find_map(|at| match raws[at % 4].round(&ask) {
            Event::Result { .. } => {
                taken += 1;
                None
            }
            event => Some(event.expect_error(Code::QuotaExceeded)),
        });
        let refusal = refusal.expect("it has to end");
        assert!(taken >= 5, "{set}: {taken} were taken");
        assert_eq!(refusal.message, message);
        assert!((1..=200).contains(&refusal.retry_after_ms), "{refusal:?}");
        open_tenant(&server, "modest").round(&ask).expect_result();
        std::thread::sleep(Duration::from_millis(refusal.retry_after_ms.into()));
        raws[0].round(&ask).expect_result();
    }
}

#[test]
fn a_tenant_has_no_more_requests_in_flight_and_connections_than_its_quota() {
    let server = Server::start(&["quota.in_flight_max=2", "quota.connections_max=2", "threads.shards=2"]);
    let (mut one, mut two) = (open_tenant(&server, "greedy"), open_tenant(&server, "greedy"));
    let sleep = one.handle("sleep");
    let nap = Ask::word(sleep, 10_000_000);
    let (first, second) = (one.ask(&nap), two.ask(&nap));
    two.ping();
    one.ping();
    let refusal = two.round(&nap).expect_error(Code::QuotaExceeded);
    assert_eq!(refusal.message, "the tenant has 2 requests in flight, its quota");
    one.send(&bare_frame(Kind::Cancel, first));
    assert_eq!(one.recv().ends(), Some(first));
    let third = two.ask(&nap);
    let mut more = of_tenant(&server, "greedy");
    let goaway = more.recv().expect_goaway(Code::QuotaExceeded);
    assert_eq!(goaway.message, "the tenant has as many connections as its quota allows");
    drop(open_tenant(&server, "modest"));
    drop(one);
    wait_until("a place is free again", || matches!(of_tenant(&server, "greedy").recv(), Event::HelloAck(_)));
    for id in [second, third] {
        two.send(&bare_frame(Kind::Cancel, id));
        assert_eq!(two.recv().ends(), Some(id));
    }
}

/// F88: a swarm on the control port, of which some never read and some never finish asking, is no matter for the data port, and
/// the control port answers again as soon as they go.
#[test]
fn a_swarm_on_the_control_port_costs_requests_nothing() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let echo = raw.handle("queued");
    let ask = Ask::floats(echo, &[1.0]);
    let page = b"GET /metrics HTTP/1.1\r\nHost: ferry\r\n\r\n";
    let unfinished = b"GET /metrics HTTP/1.1\r\nX-Long: ";
    let mut swarm = Vec::new();
    for at in 0..300 {
        let Some(mut stream) = Raw::connect_or_none(server.control) else { continue };
        // Whether it is taken is for the control port to say.
        let _ = stream.write_all(if at % 2 == 0 { page } else { unfinished });
        swarm.push(stream);
        if at % 10 == 0 {
            raw.round(&ask).expect_result();
        }
    }
    drop(swarm);
    wait_until("the control port answers", || {
        raw.round(&ask).expect_result();
        let Some(mut stream) = Raw::connect_or_none(server.control) else { return false };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
        let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: ferry\r\nConnection: close\r\n\r\n");
        let mut head = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut head).is_ok() && head == *b"HTTP/1.1 200"
    });
}

/// Goal: F42. Method: a queue that is full, one connection that asks again at once for each refusal, and one that does not.
#[test]
fn f42_who_comes_back_at_once_is_refused_at_the_door_and_read_less_and_the_patient_are_not() {
    let server = Server::start(&["threads.executors=1", "executor.slots=1", "queue.rows_max=1"]);
    let throttled = || server.metric("ferry_throttled_requests_total", &[]);
    let (mut holder, mut patient, mut hasty) = (server.connect(), server.connect(), server.connect());
    let faulty = hasty.handle("faulty");
    // One runs, one waits: there is no room.
    let runs = holder.ask(&Ask::word(faulty, 3_000).compose(1, 1));
    wait_until("it runs", || server.metric("ferry_batches_total", &["model=\"faulty\""]) == 1.0);
    let waits = holder.ask(&Ask::word(faulty, 4).compose(2, 1));
    // Behind its answer whatever comes is behind the request, too.
    holder.ping();
    let ask = Ask::word(faulty, 0);
    let mut refused = 0;
    while throttled() < 1000.0 {
        // A swarm of 100 callers on one connection.
        for _ in 0..100 {
            hasty.ask(&ask);
        }
        for _ in 0..100 {
            let refusal = hasty.recv().expect_error(Code::Overloaded);
            assert!(refusal.retry_after_ms > 0);
            refused += 1;
        }
        assert!(refused < 100_000, "nobody is throttled");
    }
    let before = throttled();
    let refusal = patient.round(&ask).expect_error(Code::Overloaded);
    assert!(refusal.message.contains("queue"), "it is asked, and there is no room: {}", refusal.message);
    assert_eq!(throttled(), before);
    for id in [runs, waits] {
        assert_eq!(holder.recv().ends(), Some(id));
    }
    patient.round(&ask).expect_result();
    // Nor is the other locked out.
    let mut tries = 0;
    while matches!(hasty.round(&ask), Event::Error { .. }) {
        tries += 1;
        assert!(tries < 1000, "it is never heard again");
    }
    server.wait_until_at_rest();
}
