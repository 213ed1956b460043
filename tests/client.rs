//! The client library against the bare server, and against servers that are scripted frame by frame.

mod scripted;

use std::future::Future;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use ferry::client::session::{Event, Session, SessionOptions};
use ferry::client::{Client, ClientError, ClientOptions, Pending, Request};
use ferry::vocab::{Code, Executed, ModelHandle, Refusal, Retry, Stage};
use ferry::wire::Kind;
use ferry::wire::encoder::{Head, append_bare, append_frame};
use ferry::wire::message::{Credit, HelloAck, InferResult, Item};
use scripted::bare_server::{self, BareOptions, echo_contract};
use scripted::{Seen, scripted};

fn connect(addr: SocketAddr) -> Client {
    Client::connect(addr, ClientOptions::default()).expect("the server greets")
}

fn echo(bytes: &[u8]) -> Request {
    Request::new("echo").input("data", &[1, bytes.len() as u32], bytes)
}

fn data(pending: Pending) -> Vec<u8> {
    pending.wait().expect("answered").output::<u8>("data").expect("echo has data").to_vec()
}

/// Counts how often a future was woken.
#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// The smallest runtime: polls, parks, polls.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        std::thread::park();
    }
}

#[test]
fn many_threads_share_a_connection_and_each_gets_its_own_answer() {
    let addr = bare_server::spawn(BareOptions { credit_requests: 5, ..BareOptions::default() });
    let client = connect(addr);
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let client = &client;
            scope.spawn(move || {
                for number in 0..100u8 {
                    let sent = [thread, number, thread ^ number];
                    let response = client.infer(&echo(&sent)).expect("the bare server answers");
                    assert_eq!(response.output::<u8>("data").expect("echo has data"), sent);
                }
            });
        }
    });
    assert_eq!(client.window().requests, 0, "every answer gave its credit back");
}

#[test]
fn models_counters_and_pings_are_answered() {
    let client = connect(bare_server::spawn(BareOptions::default()));
    let models = client.models().expect("a list");
    assert_eq!((models.len(), models[0].name.as_str(), models[0].ready), (1, "echo", true));
    assert_eq!(models[0].contract_hash, echo_contract().hash());
    assert_eq!(client.model("echo").expect("a contract").contract, echo_contract());
    assert_eq!(client.stats().expect("counters").accepted, 0);
    client.ping().expect("a pong");
    let error = client.model("nothing").expect_err("there is no such model");
    assert_eq!(error.code(), Some(Code::NotFound));
    assert_eq!(client.server().server, "bare");
}

#[test]
fn answers_in_any_order_reach_their_own_callers() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let requests: Vec<Seen> = (0..3).map(|_| peer.expect(Kind::Infer)).collect();
        assert!(requests.is_sorted_by(|a, b| a.id < b.id), "ids strictly increase");
        requests.iter().rev().for_each(|request| peer.answer(request));
    });
    let client = connect(addr);
    let pending: Vec<Pending> = (1..=3).map(|n| client.submit(&echo(&[n])).expect("credit for 8")).collect();
    server.join().expect("the script ran through");
    for (n, pending) in (1..=3).zip(pending) {
        assert_eq!(data(pending), [n]);
    }
}

#[test]
fn credit_is_respected_and_comes_back_with_each_answer() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(2);
        let first = peer.expect(Kind::Infer);
        let second = peer.expect(Kind::Infer);
        // The third was tried before the ping: it is not here, so it was held back.
        let ping = peer.expect(Kind::Ping);
        peer.send(Kind::Pong, ping.id, &(), &[]);
        peer.answer(&first);
        let third = peer.expect(Kind::Infer);
        peer.refuse(second.id, &Refusal::new(Code::Internal, "an error gives credit back too"));
        let fourth = peer.expect(Kind::Infer);
        peer.answer(&third);
        peer.answer(&fourth);
    });
    let client = connect(addr);
    let first = client.submit(&echo(&[1])).expect("credit");
    let second = client.submit(&echo(&[2])).expect("credit");
    assert_eq!(client.try_submit(&echo(&[3])).expect_err("two are in flight"), ClientError::NoCredit);
    client.ping().expect("a pong needs no credit");
    let third = client.submit(&echo(&[3])).expect("waits for the first answer");
    let fourth = client.submit(&echo(&[4])).expect("waits for the error");
    assert_eq!(data(first), [1]);
    assert_eq!(second.wait().expect_err("refused").code(), Some(Code::Internal));
    assert_eq!((data(third), data(fourth)), (vec![3], vec![4]));
    server.join().expect("the script ran through");
}

#[test]
fn a_credit_frame_replaces_the_totals() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(1);
        let first = peer.expect(Kind::Infer);
        peer.send(Kind::Credit, 0, &Credit { requests: 2, bytes: 1 << 20 }, &[]);
        // Only the larger window lets the second through while the first is unanswered.
        let second = peer.expect(Kind::Infer);
        peer.answer(&second);
        peer.answer(&first);
    });
    let client = connect(addr);
    let pending = [1, 2].map(|n| client.submit(&echo(&[n])).expect("credit comes"));
    server.join().expect("the script ran through");
    assert_eq!(pending.map(data), [vec![1], vec![2]]);
}

#[test]
fn a_payload_over_the_byte_credit_waits_and_one_over_its_total_is_refused() {
    let addr = bare_server::spawn(BareOptions { credit_bytes: 64, ..BareOptions::default() });
    let client = connect(addr);
    let error = client.infer(&echo(&[0; 100])).expect_err("104 bytes never fit into 64");
    assert!(matches!(&error, ClientError::Contract(refusal) if refusal.code == Code::TooLarge), "{error}");
    let pending: Vec<Pending> = (0..4).map(|n| client.submit(&echo(&[n; 40])).expect("waits its turn")).collect();
    for (n, pending) in (0..4).zip(pending) {
        assert_eq!(data(pending), [n; 40]);
    }
}

#[test]
fn a_lost_connection_ends_every_pending_request_exactly_once() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        (0..3).for_each(|_| drop(peer.expect(Kind::Infer)));
    });
    let client = connect(addr);
    let pending: Vec<Pending> = (1..=2).map(|n| client.submit(&echo(&[n])).expect("credit")).collect();
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(wakes.clone());
    let mut watched = client.submit(&echo(&[3])).expect("credit");
    let first_poll = pin!(&mut watched).poll(&mut Context::from_waker(&waker));
    server.join().expect("the script ran through");
    for pending in pending {
        let error = pending.wait().expect_err("never answered");
        assert!(matches!(error, ClientError::ConnectionLost { executed: Executed::Maybe, .. }), "{error}");
    }
    // Where the connection ended before the first poll, that poll took the outcome and nobody was to be woken.
    let wakes_expected = usize::from(first_poll.is_pending());
    if first_poll.is_pending() {
        let error = watched.wait().expect_err("never answered");
        assert_eq!(error.executed(), Executed::Maybe);
    }
    let error = client.infer(&echo(&[4])).expect_err("there is no connection");
    assert!(matches!(error, ClientError::ConnectionLost { executed: Executed::Never, .. }), "{error}");
    drop(client); // joins the reader: whatever it had to wake is awake
    assert_eq!(wakes.0.load(Ordering::SeqCst), wakes_expected, "ending twice would wake twice");
}

#[test]
fn dropping_the_client_ends_what_is_pending() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        peer.expect(Kind::Infer);
        assert!(peer.next().is_none(), "the client closes");
    });
    let client = connect(addr);
    let pending = client.submit(&echo(&[1])).expect("credit");
    drop(client);
    assert!(matches!(pending.wait(), Err(ClientError::ConnectionLost { .. })));
    server.join().expect("the script ran through");
}

#[test]
fn a_refusal_arrives_as_it_was_said() {
    let mut said = Refusal::overloaded("queue of 4096 is full", Duration::from_millis(25));
    said.stage = Stage::Arrival;
    let copy = said.clone();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        peer.refuse(infer.id, &copy);
    });
    let error = connect(addr).infer(&echo(&[1])).expect_err("refused");
    assert_eq!(error, ClientError::Refused(said.clone()));
    assert_eq!((said.retry, error.executed()), (Retry::After, Executed::Never));
    server.join().expect("the script ran through");
}

#[test]
fn a_cancel_names_its_request_and_the_request_still_ends_by_an_answer() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        let cancel = peer.expect(Kind::Cancel);
        assert_eq!(cancel.id, infer.id);
        peer.refuse(infer.id, &Refusal::at_stage(Code::Cancelled, Stage::Queue, "the client asked"));
    });
    let client = connect(addr);
    let pending = client.submit(&echo(&[1])).expect("credit");
    pending.cancel();
    let error = pending.wait().expect_err("cancelled");
    assert_eq!((error.code(), error.executed()), (Some(Code::Cancelled), Executed::Never));
    server.join().expect("the script ran through");
}

#[test]
fn dropping_a_pending_request_cancels_it_and_its_credit_waits_for_the_answer() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(1);
        let infer = peer.expect(Kind::Infer);
        assert_eq!(peer.expect(Kind::Cancel).id, infer.id);
        let ping = peer.expect(Kind::Ping);
        peer.send(Kind::Pong, ping.id, &(), &[]);
        peer.answer(&infer); // the result was faster
        let next = peer.expect(Kind::Infer);
        peer.answer(&next);
    });
    let client = connect(addr);
    drop(client.submit(&echo(&[1])).expect("credit"));
    assert_eq!(client.try_submit(&echo(&[2])).expect_err("still in flight"), ClientError::NoCredit);
    client.ping().expect("a pong");
    assert_eq!(data(client.submit(&echo(&[2])).expect("credit comes back")), [2]);
    server.join().expect("the script ran through");
}

#[test]
fn the_remaining_time_travels_and_a_silent_server_does_not_outlive_it() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(1);
        let infer = peer.expect(Kind::Infer);
        let left = infer.infer().deadline_us;
        assert!(left > 0 && left <= 20_000, "{left}");
        assert!(peer.next().is_none(), "nothing is answered, the client leaves");
    });
    let options = ClientOptions { deadline_grace: Duration::from_millis(1), ..ClientOptions::default() };
    let client = Client::connect(addr, options).expect("greeted");
    client.model("echo").expect("described, so that the deadline is spent on the request alone");
    let request = echo(&[1]).deadline(Duration::from_millis(20));
    let error = client.infer(&request).expect_err("no answer");
    assert_eq!(error, ClientError::DeadlineExceeded { executed: Executed::Maybe });
    let error = client.infer(&request).expect_err("its credit is still out");
    assert_eq!(error, ClientError::DeadlineExceeded { executed: Executed::Never });
    drop(client);
    server.join().expect("the script ran through");
}

#[test]
fn a_server_that_does_not_read_yet_holds_nobody_up_who_submits() {
    let (send, receive) = std::sync::mpsc::channel::<()>();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(64);
        receive.recv().expect("all were submitted");
        for _ in 0..40 {
            let infer = peer.expect(Kind::Infer);
            peer.answer(&infer);
        }
    });
    let client = connect(addr);
    // More than the buffers of both ends hold: without somebody else to write, this would wait for the script, and the
    // script for this.
    let pending: Vec<Pending> =
        (0..40).map(|n| client.submit(&echo(&vec![n; 1 << 20])).expect("credit for 64 MiB")).collect();
    send.send(()).expect("the script waits");
    for (n, pending) in (0..40).zip(pending) {
        assert_eq!(data(pending), vec![n; 1 << 20]);
    }
    server.join().expect("the script ran through");
}

#[test]
fn the_deadline_also_bounds_the_question_for_a_contract() {
    let (addr, server) = scripted(|mut peer| {
        peer.greet(1);
        peer.expect(Kind::Describe);
        assert!(peer.next().is_none(), "nothing is answered, the client leaves");
    });
    let client = connect(addr);
    let error = client.infer(&echo(&[1]).deadline(Duration::from_millis(5))).expect_err("no contract, no request");
    assert_eq!(error, ClientError::DeadlineExceeded { executed: Executed::Never });
    drop(client);
    server.join().expect("the script ran through");
}

#[test]
fn a_wait_that_was_too_short_gives_the_request_back() {
    let (send, receive) = std::sync::mpsc::channel::<()>();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(1);
        let infer = peer.expect(Kind::Infer);
        receive.recv().expect("the test says when");
        peer.answer(&infer);
    });
    let client = connect(addr);
    let pending = client.submit(&echo(&[9])).expect("credit");
    let pending = pending.wait_timeout(Duration::from_millis(1)).expect_err("nothing was answered yet");
    send.send(()).expect("the script waits");
    assert_eq!(data(pending), [9]);
    server.join().expect("the script ran through");
}

#[test]
fn after_a_goaway_accepted_requests_are_answered_and_others_never_ran() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let first = peer.expect(Kind::Infer);
        peer.expect(Kind::Infer);
        peer.goaway(Code::Draining, first.id);
        peer.answer(&first);
    });
    let client = connect(addr);
    let [first, second] = [1, 2].map(|n| client.submit(&echo(&[n])).expect("credit"));
    let error = second.wait().expect_err("not accepted");
    assert_eq!(error, ClientError::Goaway { code: Some(Code::Draining), message: "bye".into() });
    assert_eq!(error.executed(), Executed::Never);
    assert_eq!(data(first), [1]);
    server.join().expect("the script ran through");
    let error = client.infer(&echo(&[3])).expect_err("the server takes nothing more");
    assert_eq!(error.executed(), Executed::Never);
}

#[test]
fn a_goaway_in_place_of_a_greeting_says_why() {
    let (addr, server) = scripted(|mut peer| {
        peer.expect(Kind::Hello);
        peer.goaway(Code::Unauthenticated, 0);
    });
    let error = Client::connect(addr, ClientOptions::default()).expect_err("not let in");
    assert_eq!(error.code(), Some(Code::Unauthenticated));
    server.join().expect("the script ran through");
}

#[test]
fn nobody_at_the_address_is_a_connect_error() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("bound");
    drop(listener);
    assert!(matches!(Client::connect(addr, ClientOptions::default()), Err(ClientError::Connect(_))));
}

#[test]
fn a_request_that_breaks_its_contract_is_not_sent() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let ping = peer.expect(Kind::Ping);
        peer.send(Kind::Pong, ping.id, &(), &[]);
    });
    let client = connect(addr);
    let wrong = [
        Request::new("echo"),
        Request::new("echo").input("data", &[1, 1], &[1.0f32]),
        Request::new("echo").input("other", &[1, 1], &[1u8]),
        Request::new("echo").input("data", &[1, 3], &[1u8]),
        Request::new("echo").input("data", &[0, 1], &[0u8; 0]),
        Request::new("echo").input("data", &[1; 20], &[1u8]),
        Request::text("echo", "hello"),
    ];
    for request in wrong {
        let error = client.infer(&request).expect_err("the contract says no");
        assert!(matches!(error, ClientError::Contract(_)), "{error}");
    }
    assert_eq!(client.window().requests, 0);
    client.ping().expect("a pong");
    server.join().expect("the script ran through");
}

#[test]
fn a_damaged_result_is_lost_alone() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        let result = InferResult { outputs: infer.infer().inputs, ..InferResult::default() };
        let mut out = Vec::new();
        let head = Head { kind: Kind::Result, model: ModelHandle(0), request_id: infer.id };
        append_frame(&mut out, head, &result, &infer.payload).expect("small");
        *out.last_mut().expect("a payload") ^= 1;
        peer.stream.write_all(&out).expect("the client reads");
        let infer = peer.expect(Kind::Infer);
        peer.answer(&infer);
    });
    let client = connect(addr);
    let error = client.infer(&echo(&[1])).expect_err("damaged");
    assert_eq!((error.code(), error.executed()), (Some(Code::ChecksumMismatch), Executed::Yes));
    assert_eq!(data(client.submit(&echo(&[2])).expect("the connection goes on")), [2]);
    server.join().expect("the script ran through");
}

/// The request goes on to its one end, and that says what was lost.
#[test]
fn a_damaged_item_fails_its_request_alone_and_once() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        let result = InferResult { outputs: infer.infer().inputs, ..InferResult::default() };
        let mut out = Vec::new();
        let head = Head { kind: Kind::Item, model: ModelHandle(0), request_id: infer.id };
        append_frame(&mut out, head, &Item { at_row: 0, result: result.clone() }, &infer.payload).expect("small");
        *out.last_mut().expect("a payload") ^= 1;
        peer.stream.write_all(&out).expect("the client reads");
        peer.send(Kind::Item, infer.id, &Item { at_row: 1, result }, &infer.payload);
        peer.send(Kind::Result, infer.id, &InferResult::default(), &[]);
        let infer = peer.expect(Kind::Infer);
        peer.answer(&infer);
    });
    let client = connect(addr);
    let mut items = client.infer_items(&echo(&[1])).expect("is sent");
    assert_eq!(items.next().expect("the second item").expect("came whole").at_row, 1);
    let error = items.next().expect("an end").expect_err("rows were lost");
    assert_eq!((error.code(), error.executed()), (Some(Code::ChecksumMismatch), Executed::Yes));
    assert!(items.next().is_none());
    assert_eq!(client.window().requests, 0);
    assert_eq!(data(client.submit(&echo(&[2])).expect("the connection goes on")), [2]);
    server.join().expect("the script ran through");
}

#[test]
fn an_answer_that_nobody_waits_for_ends_the_connection() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        peer.send(Kind::Result, infer.id + 1, &InferResult::default(), &[]);
        assert!(peer.next().is_none(), "the client closes");
    });
    let error = connect(addr).infer(&echo(&[1])).expect_err("another's answer");
    assert!(error.to_string().contains("not waiting"), "{error}");
    server.join().expect("the script ran through");
}

#[test]
fn a_result_whose_tensors_do_not_fit_its_payload_is_not_shown() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        let result = InferResult { outputs: infer.infer().inputs, ..InferResult::default() };
        peer.send(Kind::Result, infer.id, &result, &infer.payload[..1]);
    });
    let error = connect(addr).infer(&echo(&[1, 2, 3])).expect_err("one byte for three");
    assert!(matches!(error, ClientError::Protocol(_)), "{error}");
    server.join().expect("the script ran through");
}

#[test]
fn a_pending_request_is_a_future() {
    let client = connect(bare_server::spawn(BareOptions::default()));
    let sum: u32 = block_on(async {
        let mut sum = 0;
        for pending in (1..=5).map(|n| client.submit(&echo(&[n])).expect("credit")).collect::<Vec<_>>() {
            let response = pending.await.expect("answered");
            sum += u32::from(response.output::<u8>("data").expect("echo has data")[0]);
        }
        sum
    });
    assert_eq!(sum, 15);
}

#[test]
fn a_response_knows_its_names_dtypes_batch_and_timings() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        peer.answer(&infer);
    });
    let request = Request::new("echo").input("data", &[2, 3], &[1u8, 2, 3, 4, 5, 6]).timings();
    let response = connect(addr).infer(&request).expect("answered");
    server.join().expect("the script ran through");
    assert_eq!((response.rows(), response.batch(), response.batch_rows()), (2, 7, 3));
    assert_eq!(response.dims("data").expect("echo has data"), [2, 3]);
    assert_eq!(response.output_f64("data").expect("numbers"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(response.timings().expect("asked for").run_ns, 5);
    assert!(matches!(response.output::<f32>("data"), Err(ClientError::Usage(_))));
    assert!(matches!(response.output::<u8>("logits"), Err(ClientError::Usage(_))));
}

#[test]
fn a_session_understands_bytes_that_come_one_at_a_time() {
    let mut hello = Vec::new();
    let mut session = Session::new(&SessionOptions::default(), &mut hello).expect("small");
    let ack = HelloAck {
        version: 1,
        features: 0,
        server: "s".into(),
        metadata_bytes_max: 1,
        payload_bytes_max: 2,
        credit_requests: 3,
        credit_bytes: 4,
    };
    let mut stream = Vec::new();
    append_frame(&mut stream, Head::control(Kind::HelloAck), &ack, &[]).expect("small");
    append_frame(&mut stream, Head::control(Kind::Credit), &Credit { requests: 5, bytes: 6 }, &[]).expect("small");
    let (mut held, mut events) = (Vec::new(), Vec::new());
    for byte in stream {
        held.push(byte);
        let used = session.receive(&held, |event| {
            events.push(match event {
                Event::Ready(ack) => ack.credit_requests,
                Event::Credit => 0,
                other => panic!("{other:?}"),
            });
        });
        held.drain(..used.expect("valid"));
    }
    assert_eq!((events, held.len()), (vec![3, 0], 0));
    assert_eq!((session.window().requests_max, session.window().bytes_max), (5, 6));
}

#[test]
fn a_session_takes_no_frame_that_only_clients_send() {
    let mut out = Vec::new();
    let mut session = Session::new(&SessionOptions::default(), &mut out).expect("small");
    let mut stream = Vec::new();
    append_bare(&mut stream, Head::control(Kind::Ping));
    assert!(session.receive(&stream, |_| ()).is_err());
}
