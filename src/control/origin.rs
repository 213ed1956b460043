//! Which requests may have been made by a page in a browser, and which of those are answered.
//!
//! The port has no passwords, and every page that somebody opens on this machine can send requests to it. What protects it:
//! a browser says where a page came from.
//!
//! Always true
//! - A request is answered only if its `Host` is an address or a name of this machine. A page whose name was made to point
//!   here (DNS rebinding) carries that name, and with it would count as served by this very port.
//! - `Origin`, where there is one, is this port's own, as the caller reached it. Others are refused before anything happens,
//!   reads included.
//! - What a page of elsewhere embeds or fetches without an `Origin` (`Sec-Fetch-Site`) is refused too; a link that is followed
//!   is not.
//! - Callers that are no browser send none of these headers but `Host`, and are not hindered.
//!
//! Elsewhere: requests that no page at all may make (drain in admin.rs, capture.rs); health and metrics, which supervisors and
//! scrapers ask by whatever name (admin.rs).

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::admin::Unanswered;

/// Answers only what [`check`] lets pass.
pub(super) async fn guard(request: Request, next: Next) -> Response {
    answer(check(request.method(), request.headers(), is_here), request, next).await
}

/// The same where callers show tokens: this machine may have any name then. A page whose name was made to point here has no token
/// to show: what a browser keeps, it keeps by name.
pub(super) async fn guard_by_any_name(request: Request, next: Next) -> Response {
    answer(check(request.method(), request.headers(), |_| true), request, next).await
}

async fn answer(checked: Result<(), (StatusCode, String)>, request: Request, next: Next) -> Response {
    match checked {
        Ok(()) => next.run(request).await,
        Err((status, message)) => Unanswered::new(status, message).into_response(),
    }
}

fn check(method: &Method, headers: &HeaderMap, is_known: fn(&str) -> bool) -> Result<(), (StatusCode, String)> {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("\u{fffd}"));
    let cut = |value: &str| -> String { value.chars().take(128).collect() };
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().map(|host| host.to_str().unwrap_or("\u{fffd}"));
    if hosts.next().is_some() {
        return Err((StatusCode::BAD_REQUEST, "expected one Host, got several".into()));
    }
    if let Some(host) = host
        && !is_known(host)
    {
        let message = format!("expected a Host that is an IP address or localhost, got {:?}", cut(host));
        return Err((StatusCode::MISDIRECTED_REQUEST, message));
    }
    if let Some(origin) = text("origin") {
        // https where something in front of this port speaks TLS.
        let own = |scheme: &str| host.is_some_and(|host| origin.strip_prefix(scheme) == Some(host));
        if !own("http://") && !own("https://") {
            let message = format!("a page of {:?} may not use this port; its own pages may", cut(origin));
            return Err((StatusCode::FORBIDDEN, message));
        }
    }
    let followed = method == Method::GET
        && text("sec-fetch-mode") == Some("navigate")
        && text("sec-fetch-dest") == Some("document");
    match text("sec-fetch-site") {
        None | Some("same-origin" | "none") => Ok(()),
        Some(_) if followed => Ok(()),
        Some(_) => Err((StatusCode::FORBIDDEN, "a page of elsewhere may not use this port".into())),
    }
}

/// An IP address or a name of this machine, with or without a port.
fn is_here(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    bare.parse::<IpAddr>().is_ok() || name == "localhost" || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: Method, headers: &[(&'static str, &str)]) -> Option<u16> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().expect("a header"));
        }
        check(&method, &map, is_here).err().map(|(status, _)| status.as_u16())
    }

    #[test]
    fn hosts_are_addresses_or_names_of_this_machine() {
        for host in [
            "127.0.0.1:7601",
            "10.1.2.3",
            "[::1]:7601",
            "[fe80::1]",
            "localhost",
            "LOCALHOST:80",
            "a.localhost:1",
            "localhost.:1",
        ] {
            assert_eq!(status(Method::GET, &[("host", host)]), None, "{host}");
        }
        for host in
            ["evil.example:7601", "127.0.0.1.evil.example", "localhost.evil.example", "", "evil", ":7601", "[::1"]
        {
            assert_eq!(status(Method::GET, &[("host", host)]), Some(421), "{host}");
        }
    }

    #[test]
    fn a_page_is_answered_where_it_came_from_this_very_port() {
        let from = |origin: &str, host: &str| status(Method::PATCH, &[("host", host), ("origin", origin)]);
        assert_eq!(from("http://127.0.0.1:7601", "127.0.0.1:7601"), None);
        assert_eq!(from("http://localhost:7601", "localhost:7601"), None);
        assert_eq!(from("https://10.0.0.1", "10.0.0.1"), None);
        for origin in
            ["http://evil.example", "null", "http://127.0.0.1:7602", "http://localhost:7601", "127.0.0.1:7601", ""]
        {
            assert_eq!(from(origin, "127.0.0.1:7601"), Some(403), "{origin}");
        }
        // Rebound: the name is the attacker's, and Origin and Host agree.
        assert_eq!(from("http://evil.example:7601", "evil.example:7601"), Some(421));
        assert_eq!(status(Method::PATCH, &[("origin", "http://127.0.0.1:7601")]), Some(403), "no Host to compare with");
    }

    #[test]
    fn what_pages_of_elsewhere_embed_is_refused_and_a_link_to_the_page_is_followed() {
        let here = ("host", "127.0.0.1:7601");
        for site in ["cross-site", "same-site"] {
            assert_eq!(
                status(Method::GET, &[here, ("sec-fetch-site", site), ("sec-fetch-mode", "no-cors")]),
                Some(403)
            );
            let link = [here, ("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
            assert_eq!(status(Method::GET, &link), None);
            assert_eq!(status(Method::POST, &link), Some(403), "a form that is sent from elsewhere");
            let framed = [here, ("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")];
            assert_eq!(status(Method::GET, &framed), Some(403));
        }
        assert_eq!(status(Method::GET, &[here, ("sec-fetch-site", "same-origin")]), None);
        assert_eq!(status(Method::GET, &[here, ("sec-fetch-site", "none")]), None);
    }

    #[test]
    fn a_request_with_two_hosts_is_refused() {
        assert_eq!(status(Method::GET, &[("host", "127.0.0.1"), ("host", "evil.example")]), Some(400));
        assert_eq!(status(Method::GET, &[]), None, "HTTP/1.0 has none, and no browser speaks it");
    }
}
