//! Who may look at a server and who may change it, where the control port wants tokens.
//!
//! A token comes as `Authorization: Bearer`, or as the password of `Basic`, which is what a browser asks its user for: then the
//! dashboard works as it is, its events included.
//!
//! Always true
//! - Without a token of a tenant that has the role, nothing is answered but health and readiness, and nothing happens.
//! - To look (`GET`, `HEAD`) takes the role observe or admin; whatever else takes admin.
//!
//! Elsewhere: whose a token is, and how often an address may fail (frontend/access.rs), pages of elsewhere (origin.rs).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::ServerConfig;

use super::admin::Unanswered;
use super::listener::Bounded;
use crate::clock;
use crate::tenants::{Role, Roles};
use crate::vocab::Moment;

/// Longest header that is looked at.
const HEADER_BYTES_MAX: usize = 1024;

/// Why somebody is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stranger {
    /// No token, or none that is known.
    Unknown,
    /// Tokens of this address are not looked at for a while.
    Banned,
}

/// Roles of whoever shows this token from there.
pub type Prove = Box<dyn Fn(&[u8], IpAddr, Moment) -> Result<Roles, Stranger> + Send + Sync>;

/// Whom the control port lets in.
pub struct Gate {
    pub prove: Prove,
    /// How new connections are encrypted; None: not at all.
    pub tls: Box<dyn Fn() -> Option<Arc<ServerConfig>> + Send + Sync>,
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(SocketAddr);

impl Connected<IncomingStream<'_, Bounded>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Peer {
        Peer(*stream.remote_addr())
    }
}

/// Answers only who may ask.
pub(super) async fn guard(
    State(gate): State<Arc<Gate>>,
    ConnectInfo(Peer(addr)): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let token = shown.and_then(token_of).unwrap_or_default();
    match (gate.prove)(&token, addr.ip(), clock::now()) {
        Ok(roles) if suffices(roles, request.method()) => next.run(request).await,
        Ok(_) => {
            let what = if looks(request.method()) { "observe" } else { "admin" };
            Unanswered::new(StatusCode::FORBIDDEN, format!("this takes the role {what}")).into_response()
        }
        Err(Stranger::Unknown) => {
            let wanted = [(header::WWW_AUTHENTICATE, "Basic realm=\"ferry: the password is a token\"")];
            (wanted, Unanswered::new(StatusCode::UNAUTHORIZED, "the control port wants a tenant's token"))
                .into_response()
        }
        Err(Stranger::Banned) => {
            let message = "too many tokens from this address were wrong: none is looked at for a while";
            ([(header::RETRY_AFTER, "30")], Unanswered::new(StatusCode::TOO_MANY_REQUESTS, message)).into_response()
        }
    }
}

fn looks(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

fn suffices(roles: Roles, method: &Method) -> bool {
    roles.has(Role::Admin) || looks(method) && roles.has(Role::Observe)
}

/// The token in an `Authorization` header.
fn token_of(value: &[u8]) -> Option<Vec<u8>> {
    if value.len() > HEADER_BYTES_MAX {
        return None;
    }
    let at = value.iter().position(|byte| *byte == b' ')?;
    let (scheme, shown) = (&value[..at], value[at..].trim_ascii());
    if scheme.eq_ignore_ascii_case(b"bearer") {
        return Some(shown.to_vec());
    }
    if !scheme.eq_ignore_ascii_case(b"basic") {
        return None;
    }
    let pair = STANDARD.decode(shown).ok()?;
    let colon = pair.iter().position(|byte| *byte == b':')?;
    Some(pair[colon + 1..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_by_either_scheme_and_nothing_else_is_one() {
        let token = |value: &str| token_of(value.as_bytes()).map(|token| String::from_utf8(token).expect("text"));
        assert_eq!(token("Bearer ferry_a_b").as_deref(), Some("ferry_a_b"));
        assert_eq!(token("bearer   ferry_a_b ").as_deref(), Some("ferry_a_b"));
        // any:ferry_a:b
        assert_eq!(token("Basic YW55OmZlcnJ5X2E6Yg==").as_deref(), Some("ferry_a:b"));
        for wrong in
            ["", "Bearer", "ferry_a_b", "Digest x", "Basic !!", "Basic YQ==", &format!("Bearer {}", "x".repeat(1024))]
        {
            assert_eq!(token(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn to_look_takes_less_than_to_change() {
        let roles = |names: &[Role]| names.iter().fold(Roles::default(), |roles, role| roles.with(*role));
        let may = |names: &[Role]| {
            [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE]
                .map(|method| suffices(roles(names), &method))
        };
        assert_eq!(may(&[Role::Observe]), [true, true, false, false, false]);
        assert_eq!(may(&[Role::Admin]), [true; 5]);
        assert_eq!(may(&[Role::Infer]), [false; 5]);
    }
}
