//! The pool against real servers that are drained and killed under load, and against servers that are scripted frame by
//! frame.

mod common;
mod scripted;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use common::process::Child;
use common::{Server, wait_until};
use ferry::client::{Client, ClientError, ClientOptions, Pool, PoolError, PoolOptions, PoolPending, ReplicaState};
use ferry::client::{Request, Stop};
use ferry::server::Ending;
use ferry::vocab::{Code, Executed, Refusal, Stage};
use ferry::wire::Kind;
use nix::sys::signal::Signal;
use scripted::bare_server::{self, BareOptions};
use scripted::{Peer, Seen, scripted};

/// Short waits between attempts, one connection per replica, so that scripts see every step.
fn options() -> PoolOptions {
    PoolOptions {
        connections: 1,
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(20),
        client: ClientOptions { deadline_grace: Duration::from_millis(1), ..ClientOptions::default() },
        ..PoolOptions::default()
    }
}

fn pool(replicas: &[SocketAddr]) -> Pool {
    Pool::new(replicas, options()).expect("there is a replica")
}

fn echo(bytes: &[u8]) -> Request {
    Request::new("echo").input("data", &[1, bytes.len() as u32], bytes)
}

fn data(pending: PoolPending) -> Vec<u8> {
    pending.wait().expect("answered").output::<u8>("data").expect("echo has data").to_vec()
}

fn wait_until_up(pool: &Pool) {
    wait_until("all replicas are connected", || {
        pool.stats().replicas.iter().all(|replica| replica.state == ReplicaState::Up)
    });
}

/// Serves the connections of one listener in turn, each by its own script.
fn scripted_in_turn<const N: usize>(scripts: [Box<dyn FnOnce(Peer) + Send>; N]) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let thread = std::thread::spawn(move || {
        for script in scripts {
            let (stream, _) = listener.accept().expect("a client comes");
            script(Peer::new(stream));
        }
    });
    (addr, thread)
}

/// Threads that call until they are told to stop, each with numbers of its own; every answer is compared with them.
struct Load {
    stop: Arc<AtomicBool>,
    failures: Arc<Mutex<Vec<PoolError>>>,
    threads: Vec<JoinHandle<u64>>,
}

impl Load {
    fn start(pool: &Arc<Pool>, threads: u32, request: fn(u32) -> Request, output: &'static str) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let failures = Arc::new(Mutex::new(Vec::new()));
        let threads = (0..threads).map(|thread| {
            let (pool, stop, failures) = (pool.clone(), stop.clone(), failures.clone());
            std::thread::spawn(move || {
                let mut calls = 0;
                while !stop.load(Ordering::Relaxed) {
                    let number = 1000 + thread * 100 + calls as u32 % 100;
                    calls += 1;
                    match pool.infer(request(number)) {
                        Ok(response) => {
                            assert_eq!(response.output_f64(output).expect("it has one"), [f64::from(number)]);
                        }
                        Err(error) => failures.lock().expect("nobody panics").push(error),
                    }
                }
                calls
            })
        });
        let threads = threads.collect();
        Load { stop, failures, threads }
    }

    /// The number of calls, and those that failed.
    fn end(self) -> (u64, Vec<PoolError>) {
        self.stop.store(true, Ordering::Relaxed);
        let calls = self.threads.into_iter().map(|thread| thread.join().expect("every answer was its own")).sum();
        (calls, self.failures.lock().expect("nobody panics").clone())
    }
}

fn sleep(micros: u32) -> Request {
    Request::new("sleep").input("micros", &[1, 1], &[micros])
}

fn value(number: u32) -> Request {
    Request::new("echo").input("values", &[1, 1], &[number as f32])
}

fn wait_for_responses(pool: &Pool, more: u64) {
    let before = pool.stats().responses;
    wait_until("calls are answered", || pool.stats().responses >= before + more);
}

#[test]
fn a_killed_replica_costs_only_calls_that_may_have_run() {
    let servers = [Child::start(&[]), Child::start(&[])];
    let pool = Arc::new(Pool::new(&[servers[0].data, servers[1].data], PoolOptions::default()).expect("two replicas"));
    wait_until_up(&pool);
    let load = Load::start(&pool, 8, sleep, "micros");
    wait_for_responses(&pool, 200);
    servers[0].signal(Signal::SIGKILL);
    wait_until("the pool sees it", || pool.stats().replicas[0].connections == 0);
    wait_for_responses(&pool, 200);
    let (calls, failures) = load.end();
    for error in &failures {
        assert_ne!(error.executed, Executed::Never, "this could have been retried: {error}");
    }
    let stats = pool.stats();
    assert_eq!((stats.requests, stats.errors), (calls, failures.len() as u64));
    assert_eq!(stats.responses + stats.errors, calls, "each call ended once");
    assert!(stats.connections_lost >= 1, "{stats:?}");
}

#[test]
fn a_killed_replica_costs_nothing_when_pure_calls_may_run_twice() {
    let servers = [Child::start(&[]), Child::start(&[])];
    let options = PoolOptions { retry_maybe_executed: true, ..PoolOptions::default() };
    let pool = Arc::new(Pool::new(&[servers[0].data, servers[1].data], options).expect("two replicas"));
    wait_until_up(&pool);
    let load = Load::start(&pool, 8, sleep, "micros");
    wait_for_responses(&pool, 200);
    servers[0].signal(Signal::SIGKILL);
    wait_until("the pool sees it", || pool.stats().replicas[0].connections == 0);
    wait_for_responses(&pool, 200);
    let (calls, failures) = load.end();
    assert_eq!(failures, []);
    let stats = pool.stats();
    assert_eq!((stats.responses, stats.requests), (calls, calls));
    assert_eq!(stats.attempts, calls + stats.retries, "each call has one attempt that was answered");
}

#[test]
fn draining_one_replica_of_two_is_seen_by_no_caller_and_nothing_is_accepted_twice() {
    let servers = [Server::start(&[]), Server::start(&[])];
    let pool = Arc::new(Pool::new(&[servers[0].data, servers[1].data], PoolOptions::default()).expect("two replicas"));
    wait_until_up(&pool);
    let load = Load::start(&pool, 6, value, "values");
    wait_for_responses(&pool, 500);
    servers[0].drain();
    wait_until("it has ended", || servers[0].has_ended());
    wait_for_responses(&pool, 500);
    let (calls, failures) = load.end();
    assert_eq!(failures, []);
    let accepted: f64 = servers.iter().map(|server| server.metric("ferry_requests_accepted_total", &[])).sum();
    assert_eq!(accepted, calls as f64, "each call was accepted by one server, once");
    let [drained, _] = servers;
    assert_eq!(drained.ending(), Ending::Drained);
}

#[test]
fn a_call_that_a_leaving_server_did_not_take_is_sent_elsewhere() {
    let (left, left_server) = scripted(|mut peer| {
        peer.open(8);
        let first = peer.expect(Kind::Infer);
        peer.expect(Kind::Infer);
        peer.goaway(Code::Draining, first.id);
        peer.answer(&first);
        while peer.next().is_some() {} // closing with unread input would reset the connection
    });
    let pool = Pool::new(&[left, bare_server::spawn(BareOptions::default())], options()).expect("two replicas");
    wait_until_up(&pool);
    // Two choices of two replicas: both have calls as soon as there are three in flight or four were made.
    let pending: Vec<PoolPending> = (0..40).map(|n| pool.submit(echo(&[n]))).collect();
    for (n, pending) in (0..40).zip(pending) {
        assert_eq!(data(pending), [n]);
    }
    left_server.join().expect("the script ran through");
    let stats = pool.stats();
    assert_eq!((stats.responses, stats.errors), (40, 0));
    assert!(stats.retries >= 1, "{stats:?}");
}

#[test]
fn what_may_have_run_is_not_sent_again() {
    let (addr, server) = scripted_in_turn([
        Box::new(|mut peer: Peer| {
            peer.open(8);
            peer.expect(Kind::Infer);
        }),
        Box::new(|mut peer: Peer| {
            // The next call is the first thing it hears.
            peer.open(8);
            let infer = peer.expect(Kind::Infer);
            assert_eq!(infer.payload[0], 2);
            peer.answer(&infer);
        }),
    ]);
    let pool = pool(&[addr]);
    let error = pool.infer(echo(&[1])).expect_err("its connection was lost");
    assert!(matches!(error.last, ClientError::ConnectionLost { executed: Executed::Maybe, .. }), "{error}");
    assert_eq!((error.attempts, error.executed, error.stop), (1, Executed::Maybe, Stop::Final));
    assert_eq!(data(pool.submit(echo(&[2]))), [2]);
    server.join().expect("the script ran through");
    assert_eq!(pool.stats().retries, 0);
}

#[test]
fn what_may_have_run_is_sent_again_for_those_who_say_so() {
    let (addr, server) = scripted_in_turn([
        Box::new(|mut peer: Peer| {
            peer.open(8);
            let first = peer.expect(Kind::Infer);
            peer.refuse(first.id, &Refusal::new(Code::ExecutorFailed, "a panic"));
            peer.expect(Kind::Infer);
        }),
        Box::new(|mut peer: Peer| {
            peer.open(8);
            let infer = peer.expect(Kind::Infer);
            peer.answer(&infer);
        }),
    ]);
    let pool = Pool::new(&[addr], PoolOptions { retry_maybe_executed: true, ..options() }).expect("a replica");
    assert_eq!(data(pool.submit(echo(&[1]))), [1]);
    server.join().expect("the script ran through");
    assert_eq!((pool.stats().attempts, pool.stats().retries), (3, 2));
}

#[test]
fn a_refusal_that_no_retry_can_change_is_told_as_it_was_said() {
    let said = Refusal::invalid("row 0 is not a number");
    let copy = said.clone();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        peer.refuse(infer.id, &copy);
        assert!(peer.next().is_none(), "nothing more comes");
    });
    let pool = pool(&[addr]);
    let error = pool.infer(echo(&[1])).expect_err("refused");
    let expected =
        PoolError { last: ClientError::Refused(said), attempts: 1, executed: Executed::Never, stop: Stop::Final };
    assert_eq!(error, expected);
    drop(pool);
    server.join().expect("the script ran through");
}

#[test]
fn an_overloaded_replica_gets_the_call_again_and_a_later_call_waits_too() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let first = peer.expect(Kind::Infer);
        peer.refuse(first.id, &Refusal::overloaded("full", Duration::from_millis(10)));
        // Both come after the pause, the older one first.
        let again = peer.expect(Kind::Infer);
        let second = peer.expect(Kind::Infer);
        assert_eq!((again.payload[0], second.payload[0]), (1, 2));
        peer.answer(&second);
        peer.answer(&again);
    });
    let pool = pool(&[addr]);
    let first = pool.submit(echo(&[1]));
    wait_until("the refusal came", || pool.stats().retries == 1);
    let second = pool.submit(echo(&[2]));
    assert_eq!((data(first), data(second)), (vec![1], vec![2]));
    server.join().expect("the script ran through");
    assert_eq!(pool.stats().attempts, 3);
}

#[test]
fn a_pause_beyond_the_deadline_is_not_waited_for() {
    let refusal = Refusal::overloaded("full", Duration::from_secs(50));
    let copy = refusal.clone();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(8);
        let infer = peer.expect(Kind::Infer);
        let left = Duration::from_micros(infer.infer().deadline_us);
        assert!(!left.is_zero() && left <= Duration::from_secs(40), "{left:?}");
        peer.refuse(infer.id, &copy);
        assert!(peer.next().is_none(), "nothing more comes");
    });
    let pool = pool(&[addr]);
    let error = pool.infer(echo(&[1]).deadline(Duration::from_secs(40))).expect_err("overloaded for longer than that");
    assert_eq!((error.last, error.attempts, error.stop), (ClientError::Refused(refusal), 1, Stop::Deadline));
    // Who comes in the pause waits for its own deadline at most, and is not sent at all.
    let error = pool.infer(echo(&[2]).deadline(Duration::from_millis(5))).expect_err("there is no other replica");
    assert_eq!((error.attempts, error.executed, error.stop), (0, Executed::Never, Stop::Deadline));
    drop(pool);
    server.join().expect("the script ran through");
}

#[test]
fn retries_end_when_their_budget_is_used_up() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        // Two calls, one retry between them.
        for _ in 0..3 {
            let infer = peer.expect(Kind::Infer);
            peer.refuse(infer.id, &Refusal::overloaded("full", Duration::from_millis(1)));
        }
        assert!(peer.next().is_none(), "nothing more comes");
    });
    let pool = Pool::new(&[addr], PoolOptions { retry_percent: 0, retry_reserve: 1, ..options() }).expect("a replica");
    for attempts in [2, 1] {
        let error = pool.infer(echo(&[1])).expect_err("always overloaded");
        assert_eq!((error.attempts, error.stop, error.code()), (attempts, Stop::Budget, Some(Code::Overloaded)));
    }
    assert_eq!((pool.stats().retries, pool.stats().retries_denied), (1, 2));
    drop(pool);
    server.join().expect("the script ran through");
}

#[test]
fn the_remaining_time_shrinks_from_attempt_to_attempt() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        let first = peer.expect(Kind::Infer);
        peer.refuse(first.id, &Refusal::overloaded("full", Duration::from_millis(20)));
        let second = peer.expect(Kind::Infer);
        // The pause alone is 20 ms of it.
        assert!(second.infer().deadline_us + 20_000 <= first.infer().deadline_us);
        peer.answer(&second);
    });
    assert_eq!(data(pool(&[addr]).submit(echo(&[1]).deadline(Duration::from_secs(60)))), [1]);
    server.join().expect("the script ran through");
}

#[test]
fn a_replica_that_comes_back_is_used_again() {
    let (addr, server) = scripted_in_turn([
        Box::new(|mut peer: Peer| {
            peer.open(8);
            let infer = peer.expect(Kind::Infer);
            peer.answer(&infer);
        }),
        Box::new(|_| ()), // closes before the hello
        Box::new(|_| ()),
        Box::new(|mut peer: Peer| {
            peer.open(8);
            let infer = peer.expect(Kind::Infer);
            peer.answer(&infer);
        }),
    ]);
    let pool = pool(&[addr]);
    assert_eq!(data(pool.submit(echo(&[1]))), [1]);
    wait_until("the connection was lost", || pool.stats().connections_lost == 1);
    assert_eq!(data(pool.submit(echo(&[2]))), [2], "waits for the replica");
    server.join().expect("the script ran through");
    let stats = pool.stats();
    assert_eq!(stats.connects, 2);
    assert!(stats.connects_failed >= 2, "two were closed before the hello: {stats:?}");
}

#[test]
fn a_server_that_is_restarted_is_found_again_by_calls_that_wait() {
    let mut server = Child::start(&[]);
    let addr = server.data;
    let pool = Pool::new(&[addr], PoolOptions::default()).expect("a replica");
    pool.infer(value(1)).expect("answered");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.status(), Some(0));
    wait_until("the pool knows", || pool.stats().replicas[0].connections == 0);
    let waiting: Vec<PoolPending> = (0..10).map(|n| pool.submit(value(n))).collect();
    let server = Child::start(&[&format!("listen=\"{addr}\"")]);
    assert_eq!(server.data, addr);
    for pending in waiting {
        pending.wait().expect("answered by the new one");
    }
}

#[test]
fn nobody_anywhere_is_told_with_the_reason() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("bound");
    drop(listener);
    let pool = Pool::new(&[addr], PoolOptions { replica_timeout: Duration::from_millis(30), ..options() });
    let pool = pool.expect("a replica");
    wait_until("it was tried", || pool.stats().connects_failed > 0);
    let error = pool.infer(echo(&[1])).expect_err("nobody is there");
    assert!(matches!(error.last, ClientError::Connect(_)), "{error}");
    assert_eq!((error.attempts, error.executed, error.stop), (0, Executed::Never, Stop::NoReplica));
    let error = pool.infer(echo(&[1]).deadline(Duration::from_millis(1))).expect_err("nobody is there");
    assert_eq!(error.stop, Stop::Deadline);
}

#[test]
fn a_client_that_is_let_in_nowhere_does_not_wait() {
    let (addr, server) = scripted(|mut peer| {
        peer.expect(Kind::Hello);
        peer.goaway(Code::Unauthenticated, 0);
    });
    let options = PoolOptions { replica_timeout: Duration::from_secs(3600), ..options() };
    let options =
        PoolOptions { backoff_min: Duration::from_secs(3600), backoff_max: Duration::from_secs(3600), ..options };
    let pool = Pool::new(&[addr], options).expect("a replica");
    let error = pool.infer(echo(&[1])).expect_err("not let in");
    assert_eq!((error.code(), error.attempts, error.stop), (Some(Code::Unauthenticated), 0, Stop::Final));
    server.join().expect("the script ran through");
}

#[test]
fn calls_beyond_the_credit_wait_their_turn_and_beyond_the_queue_are_refused() {
    let ((come, came), (go, gone)) = (channel::<()>(), channel::<()>());
    let (addr, server) = scripted(move |mut peer| {
        peer.open(2);
        let held = [peer.expect(Kind::Infer), peer.expect(Kind::Infer)];
        come.send(()).expect("the test waits");
        gone.recv().expect("the test says when");
        held.iter().for_each(|seen| peer.answer(seen));
        for number in 2..5 {
            let infer = peer.expect(Kind::Infer);
            assert_eq!(infer.payload[0], number, "oldest first");
            peer.answer(&infer);
        }
    });
    let pool = Pool::new(&[addr], PoolOptions { waiting_max: 3, ..options() }).expect("a replica");
    let mut pending: Vec<PoolPending> = (0..2).map(|n| pool.submit(echo(&[n]))).collect();
    came.recv().expect("both are with the server");
    pending.extend((2..5).map(|n| pool.submit(echo(&[n]))));
    wait_until("three wait", || pool.stats().waiting == 3);
    let error = pool.infer(echo(&[5])).expect_err("one more than may wait");
    assert_eq!((error.last, error.stop, error.attempts), (ClientError::NoCredit, Stop::Full, 0));
    go.send(()).expect("the script waits");
    for (n, pending) in (0..5).zip(pending) {
        assert_eq!(data(pending), [n]);
    }
    server.join().expect("the script ran through");
}

#[test]
fn many_threads_with_little_credit_each_get_their_own_answers() {
    let bare = || bare_server::spawn(BareOptions { credit_requests: 3, ..BareOptions::default() });
    let pool = Pool::new(&[bare(), bare()], PoolOptions::default()).expect("two replicas");
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let pool = &pool;
            scope.spawn(move || {
                for number in 0..100u8 {
                    let sent = [thread, number, thread ^ number];
                    assert_eq!(data(pool.submit(echo(&sent))), sent);
                }
            });
        }
    });
    let stats = pool.stats();
    assert_eq!((stats.requests, stats.responses, stats.attempts, stats.waiting), (800, 800, 800, 0));
    assert!(stats.replicas.iter().all(|replica| replica.outstanding == 0), "{stats:?}");
}

#[test]
fn a_contract_is_asked_for_once_and_all_who_need_it_go_on() {
    let (addr, server) = scripted(|mut peer| {
        peer.greet(8);
        let question = peer.expect(Kind::Describe);
        // A second question would come before the requests.
        let contract = bare_server::echo_contract();
        let description = ferry::wire::message::Description { handle: 0, contract_hash: contract.hash() };
        peer.send(Kind::Description, question.id, &description, &serde_json::to_vec(&contract).expect("plain data"));
        let seen: Vec<Seen> = (0..3).map(|_| peer.expect(Kind::Infer)).collect();
        seen.iter().for_each(|seen| peer.answer(seen));
    });
    let pool = pool(&[addr]);
    let pending: Vec<PoolPending> = (0..3).map(|n| pool.submit(echo(&[n]))).collect();
    for (n, pending) in (0..3).zip(pending) {
        assert_eq!(data(pending), [n]);
    }
    server.join().expect("the script ran through");
    assert_eq!(pool.stats().attempts, 3, "the question is part of the attempt");
}

#[test]
fn a_model_that_does_not_exist_is_an_error_of_the_call_alone() {
    let pool = pool(&[bare_server::spawn(BareOptions::default())]);
    let error = pool.infer(Request::new("nothing")).expect_err("there is no such model");
    assert_eq!((error.code(), error.stop), (Some(Code::NotFound), Stop::Final));
    let error = pool.infer(Request::new("")).expect_err("a model has a name");
    assert!(matches!(error.last, ClientError::Usage(_)), "{error}");
    assert_eq!(data(pool.submit(echo(&[1]))), [1]);
    assert_eq!(pool.stats().connections_lost, 0);
}

#[test]
fn a_server_that_answers_nothing_does_not_outlive_the_deadline() {
    let (addr, server) = scripted(|mut peer| {
        peer.open(8);
        peer.expect(Kind::Infer);
        while peer.next().is_some() {}
    });
    let silent = pool(&[addr]);
    let error = silent.infer(echo(&[1]).deadline(Duration::from_secs(1))).expect_err("no answer");
    assert_eq!(error.last, ClientError::DeadlineExceeded { executed: Executed::Maybe });
    assert_eq!((error.executed, error.stop), (Executed::Maybe, Stop::Final));
    drop(silent);
    server.join().expect("the script ran through");

    let (addr, server) = scripted(|mut peer| {
        peer.greet(8);
        while peer.next().is_some() {}
    });
    let silent = pool(&[addr]);
    let error = silent.infer(echo(&[1]).deadline(Duration::from_millis(50))).expect_err("not even a contract");
    assert_eq!((error.executed, error.stop), (Executed::Never, Stop::Deadline));
    drop(silent);
    server.join().expect("the script ran through");
}

#[test]
fn a_server_that_says_nothing_of_its_models_is_left_for_another() {
    let (addr, server) = scripted(|mut peer| {
        peer.greet(8);
        while peer.next().is_some() {}
    });
    let client = ClientOptions { control_timeout: Duration::from_millis(300), ..ClientOptions::default() };
    let good = bare_server::spawn(BareOptions::default());
    let pool = Pool::new(&[addr, good], PoolOptions { client, ..options() }).expect("two replicas");
    wait_until_up(&pool);
    let pending: Vec<PoolPending> = (0..20).map(|n| pool.submit(echo(&[n]))).collect();
    for (n, pending) in (0..20).zip(pending) {
        assert_eq!(data(pending), [n]);
    }
    server.join().expect("the pool closed that connection");
}

#[test]
fn dropping_a_call_cancels_it_wherever_it_is() {
    let (come, came) = channel::<()>();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(1);
        let infer = peer.expect(Kind::Infer);
        come.send(()).expect("the test waits");
        let cancel = peer.expect(Kind::Cancel);
        assert_eq!(cancel.id, infer.id);
        // An outcome that would be retried, if anybody still wanted it.
        peer.refuse(infer.id, &Refusal::overloaded("full", Duration::from_millis(1)));
        let next = peer.expect(Kind::Infer);
        assert_eq!(next.payload[0], 3, "neither the first again nor the one that waited");
        peer.answer(&next);
    });
    let pool = pool(&[addr]);
    let first = pool.submit(echo(&[1]));
    came.recv().expect("it is with the server");
    let waiting = pool.submit(echo(&[2]));
    assert_eq!(pool.stats().waiting, 1);
    drop(waiting);
    assert_eq!(pool.stats().waiting, 0);
    drop(first);
    assert_eq!(data(pool.submit(echo(&[3]))), [3]);
    server.join().expect("the script ran through");
}

#[test]
fn a_cancelled_call_still_ends_by_an_answer() {
    let (come, came) = channel::<()>();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(1);
        let infer = peer.expect(Kind::Infer);
        come.send(()).expect("the test waits");
        assert_eq!(peer.expect(Kind::Cancel).id, infer.id);
        peer.refuse(infer.id, &Refusal::at_stage(Code::Cancelled, Stage::Queue, "the client asked"));
    });
    let pool = pool(&[addr]);
    let sent = pool.submit(echo(&[1]));
    came.recv().expect("it is with the server");
    let waiting = pool.submit(echo(&[2]));
    waiting.cancel();
    let error = waiting.wait().expect_err("cancelled");
    assert_eq!((error.code(), error.executed, error.stop), (Some(Code::Cancelled), Executed::Never, Stop::Cancelled));
    sent.cancel();
    let error = sent.wait().expect_err("cancelled");
    assert_eq!((error.code(), error.executed, error.stop), (Some(Code::Cancelled), Executed::Never, Stop::Final));
    server.join().expect("the script ran through");
}

#[test]
fn dropping_the_pool_ends_what_is_pending_sent_or_not() {
    let (come, came) = channel::<()>();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(1);
        peer.expect(Kind::Infer);
        come.send(()).expect("the test waits");
        assert!(peer.next().is_none(), "the pool closes");
    });
    let pool = pool(&[addr]);
    let sent = pool.submit(echo(&[1]));
    came.recv().expect("it is with the server");
    let waiting = pool.submit(echo(&[2]));
    drop(pool);
    let errors = [sent, waiting].map(|pending| pending.wait().expect_err("there is no pool"));
    assert_eq!(errors.each_ref().map(|error| error.stop), [Stop::Closed, Stop::Closed]);
    assert_eq!(errors[1].executed, Executed::Never);
    server.join().expect("the script ran through");
}

#[test]
fn a_call_is_a_future() {
    let pool = pool(&[bare_server::spawn(BareOptions::default())]);
    let request = Arc::new(echo(&[5]));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let sum = runtime.block_on(async {
        let mut sum = 0;
        for pending in (0..5).map(|_| pool.submit(request.clone())).collect::<Vec<_>>() {
            sum += u32::from(pending.await.expect("answered").output::<u8>("data").expect("echo has data")[0]);
        }
        sum
    });
    assert_eq!(sum, 25);
}

/// Goal: a replica whose process is stopped holds up no caller beyond its deadline, not even by a full socket, and the
/// others serve on. Method: a peer that greets, describes and then never reads; calls too large for its buffers.
#[test]
fn a_replica_that_does_not_read_holds_nobody_up() {
    let (go, gone) = channel::<()>();
    let (addr, server) = scripted(move |mut peer| {
        peer.open(64);
        gone.recv().expect("the test says when");
    });
    let pool = pool(&[addr]);
    let request = Arc::new(echo(&vec![7; 1 << 20]).deadline(Duration::from_millis(300)));
    let pending: Vec<PoolPending> = (0..40).map(|_| pool.submit(request.clone())).collect();
    for pending in pending {
        let error = pending.wait().expect_err("nothing was read");
        assert!(matches!(error.last, ClientError::DeadlineExceeded { .. }), "{error}");
    }
    go.send(()).expect("the script waits");
    drop(pool);
    server.join().expect("the script ran through");
}

/// A server whose every connection says goaway with its n-th request, the last that it answers, and stays open.
fn leaving_again_and_again(requests: u32) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut peer = Peer::new(stream);
                peer.open(64);
                for number in 1..=requests {
                    let Some(seen) = peer.next() else { return };
                    assert_eq!(seen.kind, Kind::Infer);
                    if number == requests {
                        peer.goaway(Code::Draining, seen.id);
                    }
                    peer.answer(&seen);
                }
                while peer.next().is_some() {}
            });
        }
    });
    addr
}

/// Goal: connections that end in the middle of load lose and double nothing. Method: servers that leave every few
/// requests and come back, in front of many threads; the order is the threads' own, so only what must always hold is
/// asserted.
#[test]
fn goaways_in_the_middle_of_load_lose_and_double_nothing() {
    let replicas = [leaving_again_and_again(7), leaving_again_and_again(30), leaving_again_and_again(100)];
    let pool = Pool::new(&replicas, PoolOptions { attempts_max: 100, retry_percent: 1000, ..options() });
    let pool = pool.expect("three replicas");
    std::thread::scope(|scope| {
        for thread in 0..6u8 {
            let pool = &pool;
            scope.spawn(move || {
                for number in 0..200u8 {
                    let sent = [thread, number];
                    let calls: Vec<PoolPending> = (0..3).map(|_| pool.submit(echo(&sent))).collect();
                    calls.into_iter().for_each(|call| assert_eq!(data(call), sent));
                }
            });
        }
    });
    let stats = pool.stats();
    assert_eq!((stats.requests, stats.responses, stats.errors), (3600, 3600, 0));
    assert_eq!(stats.attempts, 3600 + stats.retries);
    assert!(stats.retries > 0 && stats.connects > 36, "{stats:?}");
}

#[test]
fn a_pool_of_nothing_is_refused() {
    let none: [SocketAddr; 0] = [];
    assert!(matches!(Pool::new(&none, PoolOptions::default()), Err(ClientError::Usage(_))));
    assert!(Client::connect("127.0.0.1:1", ClientOptions::default()).is_err(), "as a client of nobody is");
}

/// A server whose echo takes at most so many values, and the hash of that contract.
fn server_of_contract(values_max: u32) -> (Server, u64) {
    let models = common::models_directory();
    let manifest = models.path().join("echo/model.toml");
    let text = std::fs::read_to_string(&manifest).expect("reads the manifest");
    let text =
        text.replace("max = 1024", &format!("max = {values_max}")).replace("512, 1024]", &format!("{values_max}]"));
    let text = text.replace("lengths = [8, 1024]", "lengths = [8]");
    std::fs::write(&manifest, text).expect("writes the manifest");
    let server = Server::start_in(models, &[], ferry::server::TestHooks::default());
    let client = Client::connect(server.data, ClientOptions::default()).expect("the server greets");
    let hash = client.model("echo").expect("it is there").contract_hash;
    (server, hash)
}

fn built_for(hash: u64) -> Request {
    Request::new("echo").input("values", &[1, 2], &[1.0f32, 2.0]).built_for(hash)
}

#[test]
fn a_request_that_was_built_for_another_contract_is_not_sent_and_both_are_named() {
    let (server, hash) = server_of_contract(600);
    let client = Client::connect(server.data, ClientOptions::default()).expect("the server greets");
    client.infer(&built_for(hash)).expect("the same contract");
    let other = hash ^ 1;
    let ClientError::Contract(refusal) = client.infer(&built_for(other)).expect_err("another contract") else {
        panic!("not for its contract")
    };
    assert_eq!((refusal.code, refusal.executed), (Code::InvalidArgument, Executed::Never));
    let (wants, has) = (format!("{other:016x}"), format!("{hash:016x}"));
    assert!(refusal.message.contains(&wants) && refusal.message.contains(&has), "{}", refusal.message);
    assert_eq!(server.metric("ferry_requests_accepted_total", &["model=\"echo\""]), 1.0, "it was not sent");
}

#[test]
fn a_pool_finds_the_replica_that_still_has_the_contract_a_request_was_built_for() {
    let ((old, old_hash), (new, new_hash)) = (server_of_contract(600), server_of_contract(700));
    assert_ne!(old_hash, new_hash);
    let pool = Pool::new(&[old.data, new.data], PoolOptions { retry_reserve: 1000, ..options() }).expect("replicas");
    wait_until_up(&pool);
    for _ in 0..50 {
        for hash in [old_hash, new_hash] {
            pool.infer(built_for(hash)).expect("one of them has it");
        }
    }
    let error = pool.infer(built_for(old_hash ^ new_hash)).expect_err("nobody has that");
    assert!(matches!(&error.last, ClientError::Contract(_)), "{error}");
    assert_eq!(error.executed, Executed::Never);
    for server in [&old, &new] {
        assert_eq!(server.metric("ferry_requests_accepted_total", &["model=\"echo\""]), 50.0, "each had its own");
    }
}
