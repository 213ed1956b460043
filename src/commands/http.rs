//! Requests to a control port: HTTP/1.1 in a few lines, one connection each, JSON both ways. With the token and the TLS of the
//! command's flags.
//!
//! Always true
//! - An answer has at most [`ANSWER_BYTES_MAX`] bytes, and comes within [`PATIENCE`] or not at all.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use super::connection;

const ANSWER_BYTES_MAX: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// Status and body of an answer. The text of an error says what was tried.
pub fn request(addr: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value), String> {
    let (status, body) = exchange(addr, method, path, body)?;
    // Refusals of the port itself are plain text.
    let value = serde_json::from_slice(&body)
        .unwrap_or_else(|_| serde_json::json!({ "error": String::from_utf8_lossy(&body).trim_end() }));
    Ok((status, value))
}

/// The text that is at a path, which must be there.
pub fn text(addr: SocketAddr, path: &str) -> Result<String, String> {
    match exchange(addr, "GET", path, None)? {
        (200, body) => Ok(String::from_utf8_lossy(&body).into_owned()),
        (status, _) => Err(format!("control port {addr}: GET {path}: {status}")),
    }
}

trait Duplex: Read + Write {}

impl<T: Read + Write> Duplex for T {}

fn exchange(addr: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Vec<u8>), String> {
    let exchange = || -> std::io::Result<Vec<u8>> {
        let socket = TcpStream::connect_timeout(&addr, PATIENCE)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let tls = connection::control_tls();
        // In plain a token stays on this machine.
        let may_show = tls.is_some() || addr.ip().is_loopback();
        let mut stream: Box<dyn Duplex> = match tls {
            Some(tls) => Box::new(tls.open(socket)?),
            None => Box::new(socket),
        };
        let shown = match String::from_utf8_lossy(&connection::token()).into_owned() {
            token if token.is_empty() || !may_show => String::new(),
            token => format!("Authorization: Bearer {token}\r\n"),
        };
        let body = body.map_or(String::new(), Value::to_string);
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n{shown}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(|error| format!("control port {addr}: {method} {path}: {error}"))?;
    read_answer(&answer).ok_or_else(|| {
        format!("control port {addr}: {method} {path}: the answer is not HTTP; where it is encrypted, --control-tls")
    })
}

fn read_answer(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer[end + 4..].to_vec()))
}

/// A path segment: what is not plain is escaped.
pub fn segment(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port that answers each request with the next of these.
    fn port(answers: Vec<&'static [u8]>) -> (SocketAddr, std::thread::JoinHandle<()>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let thread = std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().expect("somebody asks");
                let mut head = [0; 4096];
                let read = stream.read(&mut head).expect("a request");
                assert!(read > 0);
                stream.write_all(answer).expect("it is awaited");
            }
        });
        (addr, thread)
    }

    #[test]
    fn answers_are_json_or_a_sentence() {
        let (addr, thread) = port(vec![
            b"HTTP/1.1 200 OK\r\na: b\r\n\r\n{\"x\":1}",
            b"HTTP/1.1 429 Too Many\r\n\r\nslow down\n",
            b"HTTP/1.1 200",
            b"HTTP/1.1 200 OK\r\n\r\nplain",
            b"HTTP/1.1 404 Not Found\r\n\r\n",
        ]);
        assert_eq!(request(addr, "GET", "/", None), Ok((200, serde_json::json!({ "x": 1 }))));
        let (status, value) = request(addr, "GET", "/", None).expect("an answer");
        assert_eq!((status, value["error"].as_str()), (429, Some("slow down")));
        assert!(request(addr, "GET", "/", None).expect_err("cut off").contains("not HTTP"));
        assert_eq!(text(addr, "/config"), Ok("plain".into()));
        assert!(text(addr, "/config").expect_err("it is not there").contains("404"));
        thread.join().expect("all were asked");
    }

    #[test]
    fn a_name_with_a_slash_stays_one_segment() {
        assert_eq!(segment("a/b c-1.0"), "a%2Fb%20c-1.0");
    }
}
