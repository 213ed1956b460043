//! Who may ask: TLS, certificates, tokens, roles, and files that change while the server runs (F46, F50 to F52, F54, F90).

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::process::{Child, run_under};
use common::{Server, models_directory, wait_until};
use ferry::client::{Client, ClientError, ClientOptions, ClientTls, Request};
use ferry::server::Ending;
use ferry::tenants::token_of;
use ferry::tls;
use ferry::vocab::Code;
use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

/// Certificates and tenants in a folder, as an operator would have them.
struct Office {
    folder: tempfile::TempDir,
    server_ca: Issuer<'static, KeyPair>,
    client_ca: Issuer<'static, KeyPair>,
}

fn authority(name: &str) -> (Certificate, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let certificate = params.self_signed(&key).expect("signed");
    (certificate, Issuer::new(params, key))
}

impl Office {
    fn new() -> Office {
        let folder = tempfile::tempdir().expect("a folder");
        let (server_root, server_ca) = authority("servers");
        let (client_root, client_ca) = authority("clients");
        std::fs::write(folder.path().join("server-ca.pem"), server_root.pem()).expect("written");
        std::fs::write(folder.path().join("client-ca.pem"), client_root.pem()).expect("written");
        let office = Office { folder, server_ca, client_ca };
        office.issue("server", &office.server_ca, &["127.0.0.1", "localhost"], None, false);
        office
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("written");
    }

    /// NAME.pem and NAME.key.
    fn issue(&self, name: &str, ca: &Issuer<'static, KeyPair>, names: &[&str], uri: Option<&str>, expired: bool) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("good names");
        params.subject_alt_names.extend(uri.map(|uri| SanType::URI(Ia5String::try_from(uri).expect("ASCII"))));
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(if expired { 2021 } else { 2100 }, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, ca).expect("signed");
        self.write(&format!("{name}.pem"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    /// A tenant's table, and its token.
    fn tenant(&self, name: &str, roles: &str, secret: u8) -> (String, String) {
        let (token, sha256) = token_of(name, &[secret; 32]);
        let table =
            format!("[tenant.{name}]\nroles = [{roles}]\ntokens = [{{ id = \"{name}\", sha256 = \"{sha256}\" }}]\n");
        (table, token)
    }

    fn set(&self, key: &str, file: &str) -> String {
        format!("{key}={}", toml::Value::String(self.path(file).display().to_string()))
    }

    fn tls_sets(&self) -> Vec<String> {
        vec![self.set("tls.certificate", "server.pem"), self.set("tls.key", "server.key")]
    }

    fn client(&self, own: Option<&str>) -> ClientTls {
        let own = own.map(|name| (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key"))));
        let own = own.as_ref().map(|(certificate, key)| (certificate.as_path(), key.as_path()));
        let config = tls::client_config(&self.path("server-ca.pem"), own).expect("good files");
        ClientTls { config, name: String::new() }
    }
}

fn options(tls: Option<ClientTls>, token: &str) -> ClientOptions {
    ClientOptions { tls, token: token.as_bytes().to_vec(), ..ClientOptions::default() }
}

fn start(sets: &[String]) -> Server {
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    Server::start(&sets)
}

/// So many rows of 1024 floats, and one of a few, through echo, there and back.
fn echo(client: &Client, rows: u32, seed: u32) -> Result<(), ClientError> {
    for dims in [[1, 1 + seed % 1024], [rows, 1024]] {
        let values: Vec<f32> = (0..dims[0] * dims[1]).map(|at| (at * 7 + seed) as f32).collect();
        let response = client.infer(&Request::new("echo").input("values", &dims, &values))?;
        assert_eq!(response.output::<f32>("values")?, values);
    }
    Ok(())
}

fn refused(result: Result<Client, ClientError>) -> Option<Code> {
    match result {
        Err(ClientError::Goaway { code, .. }) => code,
        Err(ClientError::Connect(_) | ClientError::Protocol(_)) => None,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn everything_of_every_size_goes_through_tls_and_a_drain_says_goodbye() {
    let office = Office::new();
    let server = start(&office.tls_sets());
    let client = Client::connect(server.data, options(Some(office.client(None)), "")).expect("a handshake");
    for rows in [1, 2, 15, 64] {
        echo(&client, rows, rows).expect("there and back");
    }
    assert!(client.ping().is_ok() && client.stats().expect("counters").accepted > 0);
    // Many at once, of many threads, answered in any order.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let client = &client;
            scope.spawn(move || {
                (0..50).for_each(|at| echo(client, 1 + at % 9, thread * 100 + at).expect("there and back"))
            });
        }
    });
    // What was accepted before a drain is answered, behind the goaway.
    let slow: Vec<_> = (0..20)
        .map(|_| client.submit(&Request::new("sleep").input("micros", &[1, 1], &[20_000u32])).expect("sent"))
        .collect();
    wait_until("all are accepted", || server.telemetry.in_flight() == 20);
    server.drain();
    for pending in slow {
        pending.wait().expect("accepted before the drain");
    }
    // Nothing more is taken, or the connection has ended by now.
    assert!(matches!(
        client.ping(),
        Err(ClientError::Goaway { code: Some(Code::Draining), .. } | ClientError::ConnectionLost { .. })
    ));
    drop(client);
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn a_reader_that_does_not_read_is_bounded_behind_tls_too() {
    let office = Office::new();
    let mut sets = office.tls_sets();
    sets.extend(
        ["frontend.output_bytes_max=65536", "frontend.stall_timeout_ms=500", "abuse.points=0"].map(String::from),
    );
    let server = start(&sets);
    let tls = office.client(None);
    let mut socket = TcpStream::connect(server.data).expect("it listens");
    let name = rustls_pki_types::ServerName::try_from("localhost").expect("a name");
    let mut session = rustls::ClientConnection::new(Arc::clone(&tls.config), name).expect("a session");
    while session.is_handshaking() {
        session.complete_io(&mut socket).expect("a handshake");
    }
    let mut out = common::hello_frame();
    out.extend(common::bare_frame(ferry::wire::Kind::Ping, 1));
    // Stats are long answers to short questions.
    let question = common::bare_frame(ferry::wire::Kind::Stats, 2).repeat(4096);
    out.extend_from_slice(&question);
    socket.set_write_timeout(Some(Duration::from_secs(10))).expect("a socket option");
    // More than all buffers on the way hold.
    let sent = std::iter::once(&out).chain(std::iter::repeat_n(&question, 500)).try_for_each(|part| {
        // A session takes no more than it may hold.
        part.chunks(16 << 10).try_for_each(|part| {
            session.writer().write_all(part)?;
            while session.wants_write() {
                session.write_tls(&mut socket)?;
            }
            Ok::<_, std::io::Error>(())
        })
    });
    assert!(sent.is_err(), "the server stops reading, and then ends it");
    wait_until("it is closed", || server.metric("ferry_slow_readers_total", &[]) == 1.0);
    server.wait_until_at_rest();
    wait_until("nothing is held", || server.metric("ferry_live_bytes", &["kind=\"unsent\""]) == 0.0);
}

#[test]
fn f52_only_the_right_certificates_come_in_and_each_wrong_one_is_counted_and_closed() {
    let office = Office::new();
    let (table, _) = office.tenant("unused", "\"infer\"", 1);
    office.write(
        "tenants.toml",
        &format!("{table}[tenant.search]\nroles = [\"infer\"]\ncertificates = [\"spiffe://corp/search\"]\n"),
    );
    office.issue("search", &office.client_ca, &[], Some("spiffe://corp/search"), false);
    office.issue("stranger", &office.client_ca, &[], Some("spiffe://corp/stranger"), false);
    office.issue("nameless", &office.client_ca, &["search"], None, false);
    office.issue("expired", &office.client_ca, &[], Some("spiffe://corp/search"), true);
    office.issue("forged", &office.server_ca, &[], Some("spiffe://corp/search"), false);
    let mut sets = office.tls_sets();
    sets.push(office.set("tls.client_ca", "client-ca.pem"));
    sets.push("tls.client_auth=required".into());
    sets.push(office.set("auth.tenants", "tenants.toml"));
    let server = start(&sets);
    let connect = |own: Option<&str>| Client::connect(server.data, options(Some(office.client(own)), ""));
    let good = connect(Some("search")).expect("its certificate is in the file");
    echo(&good, 3, 1).expect("served");
    for (own, code) in [
        (None, None),
        (Some("expired"), None),
        (Some("forged"), None),
        (Some("stranger"), Some(Code::Unauthenticated)),
        (Some("nameless"), Some(Code::Unauthenticated)),
    ] {
        assert_eq!(refused(connect(own)), code, "{own:?}");
    }
    // Plain bytes on this port, TLS on a plain one, and a goodbye in the middle of the handshake.
    assert_eq!(refused(Client::connect(server.data, options(None, ""))), None);
    let plain = Server::start(&[]);
    assert_eq!(refused(Client::connect(plain.data, options(Some(office.client(None)), ""))), None);
    for bytes in [&[0x16, 3, 1, 0xFF, 0xFF][..], &[0x15, 3, 3, 0, 2, 1, 0], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut socket = TcpStream::connect(server.data).expect("it listens");
        socket.write_all(bytes).expect("sent");
        if bytes.len() == 5 {
            // The start of a record that never comes.
            socket.shutdown(std::net::Shutdown::Write).expect("half-closed");
        }
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
    }
    // Another authority's server is not believed.
    std::fs::copy(office.path("client-ca.pem"), office.path("other-ca.pem")).expect("copied");
    let config = tls::client_config(&office.path("other-ca.pem"), None).expect("good files");
    assert_eq!(
        refused(Client::connect(server.data, options(Some(ClientTls { config, name: String::new() }), ""))),
        None
    );
    wait_until("all of them have gone", || {
        server.metric("ferry_connections_opened_total", &[])
            == 1.0 + server.metric("ferry_connections_closed_total", &[])
    });
    assert!(server.metric("ferry_tls_handshakes_total", &["outcome=\"failed\""]) >= 5.0);
    assert_eq!(server.metric("ferry_authentications_total", &["outcome=\"failed\""]), 2.0);
    echo(&good, 2, 9).expect("nobody else was hurt");
}

#[test]
fn f51_wrong_tokens_get_one_answer_and_too_many_of_them_get_none() {
    let office = Office::new();
    let (table, token) = office.tenant("search", "\"infer\"", 1);
    let (expired, old_token) = office.tenant("old", "\"infer\"", 2);
    office.write("tenants.toml", &format!("{table}{}", expired.replace(" }]", ", expires = \"2020-01-01\" }]")));
    let server = start(&[office.set("auth.tenants", "tenants.toml")]);
    let connect = |token: &str| Client::connect(server.data, options(None, token));
    let good = connect(&token).expect("the right token");
    echo(&good, 1, 1).expect("served");
    let other_tenant = ClientOptions { tenant: "old".into(), ..options(None, &token) };
    assert_eq!(refused(Client::connect(server.data, other_tenant)), Some(Code::PermissionDenied));
    let messages: std::collections::BTreeSet<String> =
        ["", "x", &old_token, &token[..70], "ferry_search_", "ferry_nobody_00"]
            .into_iter()
            .map(|token| match connect(token) {
                Err(ClientError::Goaway { code: Some(Code::Unauthenticated), message }) => message,
                other => panic!("expected to be refused, got {other:?}"),
            })
            .collect();
    assert_eq!(messages.len(), 1, "one answer for all: {messages:?}");
    // Guessing: after some failures the address is not listened to any more, for a while.
    let mut answered = 0;
    while refused(connect("ferry_search_guess")).is_some() {
        answered += 1;
        assert!(answered < 20, "guessing goes on");
    }
    assert!(server.metric("ferry_turned_away_total", &["why=\"banned\""]) >= 1.0);
    echo(&good, 1, 2).expect("who is there already stays");
}

#[test]
fn f54_a_role_that_is_missing_is_said_and_nothing_is_run() {
    let office = Office::new();
    let tables = [("asks", "\"infer\""), ("looks", "\"observe\""), ("rules", "\"infer\", \"observe\", \"admin\"")]
        .map(|(name, roles)| (name, office.tenant(name, roles, name.len() as u8)));
    office.write("tenants.toml", &tables.iter().map(|(_, (table, _))| table.as_str()).collect::<String>());
    let server = start(&[office.set("auth.tenants", "tenants.toml")]);
    for (name, (_, token)) in &tables {
        let client = Client::connect(server.data, options(None, token)).expect("a tenant");
        let denied = |result: Result<(), ClientError>| match result {
            Ok(()) => false,
            Err(ClientError::Refused(refusal)) => {
                assert_eq!((refusal.code, refusal.executed), (Code::PermissionDenied, ferry::vocab::Executed::Never));
                true
            }
            Err(other) => panic!("{other}"),
        };
        assert_eq!(denied(echo(&client, 1, 1)), *name == "looks", "{name} asks");
        assert_eq!(denied(client.stats().map(drop)), *name == "asks", "{name} looks");
        assert!(client.models().is_ok_and(|models| !models.is_empty()), "everybody may ask what there is");
    }
    assert_eq!(server.metric("ferry_requests_refused_total", &["permission_denied"]), 1.0);
}

/// Status and all of an answer of the control port.
fn ask_control(server: &Server, tls: Option<&ClientTls>, line: &str, headers: &str) -> (u16, String) {
    let socket = TcpStream::connect(server.control).expect("it listens");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let rest = "HTTP/1.1\r\nHost: somewhere.example\r\nConnection: close\r\nContent-Length: 0\r\n";
    let request = format!("{line} {rest}{headers}\r\n");
    let mut answer = String::new();
    let exchange = |mut stream: Box<dyn ReadWrite>, answer: &mut String| {
        stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(answer))
    };
    let done = match tls {
        Some(tls) => exchange(Box::new(tls.open(socket).expect("a good name")), &mut answer),
        None => exchange(Box::new(socket), &mut answer),
    };
    done.unwrap_or_else(|error| panic!("{line}: {error}: {answer}"));
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{line}: {answer:?}")), answer)
}

trait ReadWrite: Read + Write {}

impl<T: Read + Write> ReadWrite for T {}

#[test]
fn f54_where_the_control_port_wants_tokens_one_role_looks_and_another_changes() {
    let office = Office::new();
    let [asks, looks, rules] = [("asks", "\"infer\""), ("looks", "\"observe\""), ("rules", "\"admin\"")]
        .map(|(name, roles)| office.tenant(name, roles, name.len() as u8));
    office.write("tenants.toml", &[&*asks.0, &*looks.0, &*rules.0].concat());
    for encrypted in [false, true] {
        let mut sets = vec![office.set("auth.tenants", "tenants.toml"), "auth.control=true".into()];
        sets.extend(encrypted.then(|| office.tls_sets()).into_iter().flatten());
        let server = start(&sets);
        let tls = encrypted.then(|| office.client(None));
        let ask = |line: &str, headers: &str| ask_control(&server, tls.as_ref(), line, headers);
        assert_eq!((ask("GET /healthz", "").0, ask("GET /readyz", "").0), (200, 200), "a supervisor has no token");
        let as_whom = |line: &str| {
            let bearer = |token: &str| ask(line, &format!("Authorization: Bearer {token}\r\n")).0;
            [bearer(&asks.1), bearer(&looks.1), bearer(&rules.1)]
        };
        for line in ["GET /metrics", "GET /stats", "GET /", "GET /v1/models/echo/policy"] {
            let (status, answer) = ask(line, "");
            assert_eq!(status, 401, "{line}");
            assert!(
                answer.to_ascii_lowercase().contains("www-authenticate: basic"),
                "a browser asks its user: {answer}"
            );
            assert_eq!(as_whom(line), [403, 200, 200], "{line}");
        }
        assert_eq!(as_whom("GET /nothing"), [403, 404, 404]);
        assert_eq!(as_whom("DELETE /v1/models/nothing/trial"), [403, 403, 404]);
        // As a browser shows it, and from a page of elsewhere that a browser shows it for.
        let basic = STANDARD.encode(format!("me:{}", looks.1));
        let from = |headers: &str| ask("GET /stats", &format!("Authorization: Basic {basic}\r\n{headers}")).0;
        assert_eq!((from(""), from("Origin: https://evil.example\r\n")), (200, 403));
        // Guesses are counted, and cost nobody the data port.
        let guess = "Authorization: Bearer ferry_rules_guess\r\n";
        let guesses = (0..20).map(|_| ask("POST /drain", guess).0).collect::<Vec<_>>();
        assert!(guesses.starts_with(&[401]) && guesses.ends_with(&[429]), "{guesses:?}");
        assert_eq!(as_whom("GET /stats"), [429; 3], "not even the right one");
        echo(&Client::connect(server.data, options(tls, &asks.1)).expect("served"), 1, 1).expect("served");
        assert!(!server.has_ended());
    }
}

#[test]
fn f54_commands_ask_an_encrypted_control_port_and_a_drain_by_an_admin_drains() {
    let office = Office::new();
    let (table, token) = office.tenant("rules", "\"admin\"", 9);
    office.write("tenants.toml", &table);
    office.write("token", &token);
    let mut sets = office.tls_sets();
    sets.extend([office.set("auth.tenants", "tenants.toml"), "auth.control=true".into()]);
    let server = start(&sets);
    let file = |name: &str| office.path(name).display().to_string();
    let ferry = |more: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_ferry"))
            .args(["set", "echo", "rows_max=3", "--control", &server.control.to_string()])
            .args(more)
            .output()
            .expect("the binary runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let encrypted = ["--control-tls", "--tls-ca", &file("server-ca.pem")];
    let (status, said) = ferry(&[&encrypted[..], &["--token-file", &file("token")]].concat());
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(ferry(&encrypted).0, Some(1), "no token");
    let (status, said) = ferry(&["--token-file", &file("token")]);
    assert!(status == Some(1) && said.contains("--control-tls"), "{said}");
    let bearer = format!("Authorization: Bearer {token}\r\n");
    assert_eq!(ask_control(&server, Some(&office.client(None)), "POST /drain", &bearer).0, 202);
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn f50_a_large_frame_before_the_hello_is_refused_by_its_header() {
    let office = Office::new();
    let (table, _) = office.tenant("search", "\"infer\"", 1);
    office.write("tenants.toml", &table);
    let server = start(&[office.set("auth.tenants", "tenants.toml")]);
    let mut raw = TcpStream::connect(server.data).expect("it listens");
    let mut header = common::header(ferry::wire::Kind::Infer as u8, 0, 60, 16 << 20);
    header.truncate(32);
    raw.write_all(&header).expect("sent");
    let _ = raw.write_all(&vec![7; 1 << 20]);
    let mut answer = Vec::new();
    let _ = raw.read_to_end(&mut answer);
    assert_eq!(answer.get(4), Some(&(ferry::wire::Kind::Goaway as u8)), "a goaway, and then the end");
    wait_until("nothing is held", || server.metric("ferry_live_bytes", &["kind=\"receiving\""]) == 0.0);
}

#[test]
fn f90_files_that_change_take_effect_and_bad_ones_change_nothing() {
    let office = Office::new();
    let (search, search_token) = office.tenant("search", "\"infer\"", 1);
    let (ads, ads_token) = office.tenant("ads", "\"infer\"", 2);
    office.write("tenants.toml", &format!("{search}{ads}"));
    let mut sets = office.tls_sets();
    sets.push(office.set("auth.tenants", "tenants.toml"));
    let server = start(&sets);
    let tls = office.client(None);
    let connect = |token: &str| Client::connect(server.data, options(Some(tls.clone()), token));
    let (searcher, advertiser) = (connect(&search_token).expect("a tenant"), connect(&ads_token).expect("a tenant"));
    let reloads = |what: &str, outcome: &str| {
        server.metric("ferry_reloads_total", &[&format!("what=\"{what}\""), &format!("outcome=\"{outcome}\"")])
    };
    // Half a file, and one without a meaning: the old one stays.
    office.write("tenants.toml", &search[..search.len() / 2]);
    wait_until("the bad file was looked at", || reloads("tenants", "failed") == 1.0);
    echo(&advertiser, 1, 1).expect("still a tenant");
    drop(connect(&ads_token).expect("still a tenant"));
    // One tenant less: it is cut off, the other is not.
    office.write("tenants.toml", &search);
    wait_until("the file was taken", || reloads("tenants", "ok") == 1.0);
    wait_until("it is cut off", || {
        matches!(echo(&advertiser, 1, 1), Err(ClientError::Goaway { .. } | ClientError::ConnectionLost { .. }))
    });
    assert_eq!(refused(connect(&ads_token)), Some(Code::Unauthenticated));
    echo(&searcher, 1, 2).expect("nobody else was hurt");
    // A certificate that is none, a key of another, and then a good pair of another authority.
    let (good_certificate, good_key) = (office.path("server.pem"), office.path("server.key"));
    std::fs::write(&good_certificate, "-----BEGIN CERTIFICATE-----\nbm90IG9uZQ==\n").expect("written");
    wait_until("the bad file was looked at", || reloads("tls", "failed") == 1.0);
    drop(connect(&search_token).expect("the old certificate is still shown"));
    let (root, ca) = authority("others");
    office.issue("server", &ca, &["127.0.0.1"], None, false);
    assert!(good_key.is_file());
    wait_until("the files were taken", || reloads("tls", "ok") >= 1.0);
    assert_eq!(refused(connect(&search_token)), None, "the new certificate is of another authority");
    office.write("server-ca.pem", &root.pem());
    drop(
        Client::connect(server.data, options(Some(office.client(None)), &search_token))
            .expect("who trusts that comes in"),
    );
    echo(&searcher, 1, 3).expect("a session that was there goes on");
}

/// A connection from this address of our own machine, on which nothing was said.
fn silent_from(ends_with: [u8; 2], server: &Server) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    let own = std::net::SocketAddr::from(([127, 0, ends_with[0], ends_with[1]], 0));
    socket.bind(&own.into()).expect("all of 127/8 is ours");
    socket.connect(&server.data.into()).expect("the server listens");
    socket.into()
}

#[test]
fn f46_a_full_house_of_silent_strangers_locks_nobody_out() {
    silent_strangers(false);
}

#[test]
fn f46_silent_strangers_use_up_no_handshakes_of_others() {
    silent_strangers(true);
}

fn silent_strangers(encrypted: bool) {
    let office = Office::new();
    let (table, token) = office.tenant("search", "\"infer\"", 1);
    office.write("tenants.toml", &table);
    // None of the silent leaves by itself while this lasts.
    let mut sets = vec![office.set("auth.tenants", "tenants.toml"), "threads.shards=1".into()];
    sets.push("frontend.hello_timeout_ms=60000".into());
    if encrypted {
        sets.extend(office.tls_sets());
    }
    let server = start(&sets);
    let connect = || Client::connect(server.data, options(encrypted.then(|| office.client(None)), &token));
    let turned_away = |why: &str| server.metric("ferry_turned_away_total", &[&format!("why=\"{why}\"")]);
    let good = connect().expect("a tenant");
    let silent: Vec<TcpStream> = (0..300).map(|_| silent_from([0, 2], &server)).collect();
    wait_until("the house was full, and they had to go themselves", || turned_away("strangers") > 0.0);
    // From another address at once, and as often as it likes.
    for _ in 0..20 {
        drop(connect().expect("there is a place for it"));
    }
    assert!(turned_away("displaced") >= 1.0);
    assert_eq!(turned_away("handshakes"), 0.0, "the silent have begun none");
    echo(&good, 4, 1).expect("nobody else was hurt");
    drop(silent);
    let only_one_is_left = || {
        server.metric("ferry_connections_opened_total", &[])
            == 1.0 + server.metric("ferry_connections_closed_total", &[])
    };
    wait_until("only one is left", only_one_is_left);
    // Also where every address holds one place: after a second the first of them have had their chance.
    let many: Vec<TcpStream> =
        (0..300).map(|n| silent_from([1 + (n / 200) as u8, 1 + (n % 200) as u8], &server)).collect();
    wait_until("one is let in", || connect().is_ok());
    echo(&good, 4, 2).expect("nobody else was hurt");
    drop(many);
    wait_until("only one is left", only_one_is_left);
}

#[test]
fn f46_half_done_handshakes_are_bounded_and_end_by_themselves() {
    let office = Office::new();
    let (table, token) = office.tenant("search", "\"infer\"", 1);
    office.write("tenants.toml", &table);
    let mut sets = office.tls_sets();
    sets.push(office.set("auth.tenants", "tenants.toml"));
    sets.push("frontend.hello_timeout_ms=700".into());
    let server = start(&sets);
    let good = Client::connect(server.data, options(Some(office.client(None)), &token)).expect("a tenant");
    let half: Vec<TcpStream> = (0..300)
        .filter_map(|_| {
            let mut socket = TcpStream::connect(server.data).ok()?;
            // The head of a record of 512 bytes, and nothing more.
            socket.write_all(&[0x16, 3, 1, 2, 0]).ok()?;
            Some(socket)
        })
        .collect();
    wait_until("some were turned away", || server.metric("ferry_turned_away_total", &[]) > 0.0);
    echo(&good, 4, 1).expect("nobody else was hurt");
    wait_until("all of them have gone", || {
        server.metric("ferry_connections_opened_total", &[])
            == 1.0 + server.metric("ferry_connections_closed_total", &[])
    });
    drop(half);
    drop(Client::connect(server.data, options(Some(office.client(None)), &token)).expect("there is room again"));
}

#[test]
fn what_is_wrong_with_the_files_ends_the_start_with_status_78_and_one_line() {
    let office = Office::new();
    let (table, _) = office.tenant("search", "\"infer\"", 1);
    office.write("tenants.toml", &table);
    office.write("broken.toml", "[tenant.x]\nroles = [\"root\"]\n");
    office.write("empty.pem", "");
    office.issue("other", &office.client_ca, &["x"], None, false);
    let models = models_directory();
    let table: &[(&[String], &str)] = &[
        (&[office.set("auth.tenants", "missing.toml")], "No such file"),
        (&[office.set("auth.tenants", "broken.toml")], "expected roles among infer, observe, admin"),
        (&[office.set("tls.certificate", "server.pem"), office.set("tls.key", "empty.pem")], "expected a private key"),
        (&[office.set("tls.certificate", "empty.pem"), office.set("tls.key", "server.key")], "expected certificates"),
        (
            &[office.set("tls.certificate", "server.pem"), office.set("tls.key", "other.key")],
            "server.pem: with the key",
        ),
        (&[office.set("tls.certificate", "server.pem")], "tls.certificate and tls.key belong together"),
        (&["tls.client_auth=required".into()], "needs tls.client_ca"),
        (&[office.set("auth.tenants", "tenants.toml"), "listen=0.0.0.0:0".into()], "credentials are not encrypted"),
        (&["listen=0.0.0.0:0".into()], "set auth.tenants"),
    ];
    for (sets, expected) in table {
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let output = run_under("true", models.path(), &sets);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert!(said.contains(expected), "{said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
        assert!(output.stdout.is_empty());
    }
}

/// The binary, as somebody at a terminal uses it: a token is made, put into the file, and asks.
#[test]
fn a_token_from_the_command_is_what_the_server_takes_and_is_in_no_log() {
    let office = Office::new();
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(["token", "new", "--tenant", "search", "--expires", "2099-12-31"])
        .output()
        .expect("the binary runs");
    assert!(made.status.success());
    let token = String::from_utf8(made.stdout).expect("text").trim().to_owned();
    let said = String::from_utf8(made.stderr).expect("text");
    let secret = token.rsplit('_').next().expect("a secret").to_owned();
    assert!(!said.contains(&secret), "the file gets a hash alone");
    let table: Vec<&str> = said.lines().skip_while(|line| !line.starts_with("[tenant.")).take(3).collect();
    office.write("tenants.toml", &table.join("\n"));
    office.write("token", &format!("{token}\n"));
    let mut sets = office.tls_sets();
    sets.push(office.set("auth.tenants", "tenants.toml"));
    sets.push("log.level=trace".into());
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let mut child = Child::start(&sets);
    let ferry = |arguments: &[&str]| {
        let file = |name: &str| office.path(name).display().to_string();
        std::process::Command::new(env!("CARGO_BIN_EXE_ferry"))
            .args(arguments)
            .args([
                "--addr",
                &child.data.to_string(),
                "--tls-ca",
                &file("server-ca.pem"),
                "--token-file",
                &file("token"),
            ])
            .output()
            .expect("the binary runs")
    };
    let listed = ferry(&["models"]);
    assert!(
        listed.status.success() && String::from_utf8_lossy(&listed.stdout).contains("echo 1 (ready)"),
        "{listed:?}"
    );
    let load = ferry(&[
        "load",
        "--model",
        "echo",
        "--concurrency",
        "16",
        "--duration",
        "1s",
        "--warmup",
        "0s",
        "--verify",
        "--json",
    ]);
    let report: serde_json::Value = serde_json::from_slice(&load.stdout).expect("one document");
    assert!(load.status.success() && report["ok"].as_u64().is_some_and(|ok| ok > 100), "{load:?}");
    assert!(report["errors"].as_object().is_some_and(serde_json::Map::is_empty), "{report}");
    // Wrong ones are not logged either.
    let wrong = Client::connect(child.data, options(Some(office.client(None)), "ferry_x_c0ffee0000"));
    assert_eq!(refused(wrong), Some(Code::Unauthenticated));
    child.signal(nix::sys::signal::Signal::SIGHUP);
    wait_until("files were read again", || child.metric("ferry_reloads_total", &["ok"]) == 2.0);
    child.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(child.status(), Some(0));
    let log = child.log();
    assert!(log.contains("read again"), "{log}");
    for secret in [secret.as_str(), "c0ffee"] {
        assert!(!log.contains(secret), "a secret is in the log");
    }
}

#[test]
fn a_check_reads_certificates_and_tenants_as_the_server_would() {
    let office = Office::new();
    office.write("tenants.toml", &office.tenant("search", "\"infer\"", 1).0);
    office.write("broken.toml", "[tenant.x]\nroles = [\"root\"]\n");
    let models = models_directory();
    let check = |tenants: &str| {
        let mut sets = office.tls_sets();
        sets.push(office.set("auth.tenants", tenants));
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let sets = common::settings(models.path(), &sets).into_iter().flat_map(|set| ["--set".to_owned(), set]);
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_ferry")).arg("check").args(sets).output();
        done.expect("the binary runs")
    };
    let good = check("tenants.toml");
    assert_eq!(good.status.code(), Some(0), "{good:?}");
    let bad = check("broken.toml");
    assert_eq!(bad.status.code(), Some(1), "{bad:?}");
    let said = String::from_utf8_lossy(&bad.stdout);
    assert!(said.contains("broken.toml") && said.contains("expected roles among infer, observe, admin"), "{said}");
}

/// The client that knows WIRE.md alone, against the real server behind TLS. Where there is no python3 nothing is tested.
#[test]
fn the_python_client_comes_in_with_its_token_and_not_without() {
    let office = Office::new();
    let (table, token) = office.tenant("search", "\"infer\"", 1);
    office.write("tenants.toml", &table);
    office.write("token", &format!("{token}\n"));
    let mut sets = office.tls_sets();
    sets.push(office.set("auth.tenants", "tenants.toml"));
    let server = start(&sets);
    let file = |name: &str| office.path(name).display().to_string();
    let (trusted, other, token) = (file("server-ca.pem"), file("client-ca.pem"), file("token"));
    let run = |flags: &[&str]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/python_client.py");
        let mut command = std::process::Command::new("python3");
        command.env_remove("FERRY_TOKEN").arg(script).args(["--addr", &server.data.to_string()]).args(flags).output()
    };
    let Ok(good) = run(&["--tls-ca", &trusted, "--token-file", &token]) else {
        return println!("not tested, python3 does not start");
    };
    assert_eq!(String::from_utf8_lossy(&good.stdout), "7\n", "{good:?}");
    for (flags, expected) in [
        (&["--tls-ca", trusted.as_str()][..], "refused with code 4"),
        (&["--tls-ca", other.as_str(), "--token-file", token.as_str()], "TLS: "),
    ] {
        let output = run(flags).expect("it started before");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(expected), "{said}");
    }
}

#[test]
fn f50_whoever_begins_with_something_else_than_a_hello_has_proved_nothing_and_is_counted() {
    let office = Office::new();
    office.write("tenants.toml", &office.tenant("search", "\"infer\"", 1).0);
    let server = start(&[office.set("auth.tenants", "tenants.toml")]);
    let infer = common::header(ferry::wire::Kind::Infer as u8, 0, 60, 16 << 20);
    let stats = common::bare_frame(ferry::wire::Kind::Stats, 1);
    for (round, first) in [&infer, &stats].into_iter().enumerate() {
        let mut raw = common::Raw::connect(server.data);
        raw.send(first);
        let goaway = raw.recv().expect_goaway(Code::Unauthenticated);
        assert_eq!(goaway.last_accepted_id, 0);
        assert!(matches!(raw.recv(), common::Event::End));
        assert_eq!(server.metric("ferry_authentications_total", &["failed"]), round as f64 + 1.0);
    }
    // Noise is noise, and tells whoever speaks another protocol so.
    let mut raw = common::Raw::connect(server.data);
    raw.send(b"GET / HTTP/1.1\r\n\r\n");
    raw.recv().expect_goaway(Code::ProtocolError);
}

#[test]
fn f52_a_peer_that_speaks_tls_on_a_plain_port_or_plain_on_a_tls_port_is_named_in_the_log() {
    let office = Office::new();
    let tls_sets = office.tls_sets();
    let sets: Vec<&str> = tls_sets.iter().map(String::as_str).collect();
    for (sets, options, expected) in [
        (&sets[..], options(None, ""), "does not speak TLS"),
        (&[], options(Some(office.client(None)), ""), "tls.certificate is not set"),
    ] {
        let mut child = Child::start(sets);
        for _ in 0..50 {
            assert_eq!(refused(Client::connect(child.data, options.clone())), None);
        }
        child.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(child.status(), Some(0));
        let log = child.log();
        let said = log.lines().filter(|line| line.contains(expected)).count();
        // Said, and not once for each of them: whoever wants to could fill the disk.
        assert!((1..=15).contains(&said), "{said} lines: {log}");
    }
}
