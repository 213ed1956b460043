//! Requests to a control port: HTTP/1.1 in a few lines, one connection each, JSON both ways.
//!
//! Always true
//! - An answer has at most [`ANSWER_BYTES_MAX`] bytes, and comes within [`PATIENCE`] or not at all.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

const ANSWER_BYTES_MAX: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// Status and body of an answer. The text of an error says what was tried.
pub fn request(addr: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value), String> {
    let answer = exchange(addr, method, path, body)?;
    read_answer(&answer)
        .ok_or_else(|| format!("control port {addr}: {method} {path}: the answer is not HTTP with JSON"))
}

/// [`request`] of what is no JSON: the body as it is.
pub fn text(addr: SocketAddr, path: &str) -> Result<(u16, String), String> {
    let answer = exchange(addr, "GET", path, None)?;
    split_answer(&answer)
        .map(|(status, body)| (status, String::from_utf8_lossy(body).into_owned()))
        .ok_or_else(|| format!("control port {addr}: GET {path}: the answer is not HTTP"))
}

fn exchange(addr: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> Result<Vec<u8>, String> {
    let exchange = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let body = body.map_or(String::new(), Value::to_string);
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
        Ok(answer)
    };
    exchange().map_err(|error| format!("control port {addr}: {method} {path}: {error}"))
}

fn split_answer(answer: &[u8]) -> Option<(u16, &[u8])> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, &answer[end + 4..]))
}

fn read_answer(answer: &[u8]) -> Option<(u16, Value)> {
    let (status, body) = split_answer(answer)?;
    // Refusals of the port itself are plain text.
    let value = serde_json::from_slice(body)
        .unwrap_or_else(|_| serde_json::json!({ "error": String::from_utf8_lossy(body).trim_end() }));
    Some((status, value))
}

/// A path segment: what is not plain is escaped.
pub fn segment(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_json_or_a_sentence() {
        assert_eq!(
            read_answer(b"HTTP/1.1 200 OK\r\na: b\r\n\r\n{\"x\":1}"),
            Some((200, serde_json::json!({ "x": 1 })))
        );
        let (status, value) = read_answer(b"HTTP/1.1 429 Too Many\r\n\r\nslow down\n").expect("an answer");
        assert_eq!((status, value["error"].as_str()), (429, Some("slow down")));
        assert_eq!(read_answer(b"HTTP/1.1 200"), None);
    }

    #[test]
    fn a_name_with_a_slash_stays_one_segment() {
        assert_eq!(segment("a/b c-1.0"), "a%2Fb%20c-1.0");
    }
}
