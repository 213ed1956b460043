//! The dashboard: one page with what it needs, from this binary alone, and the stream that feeds it.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /` | the page |
//! | `GET /assets/{name}` | its style, scripts and icon |
//! | `GET /v1/live` | server-sent events: `hello` once, then a `snapshot` each second (live.rs) |
//!
//! Always true
//! - The page loads and sends nothing but to this port: its policy (`Content-Security-Policy`) forbids all else, and that
//!   another page frames it, so that nobody can be led to click in it unseen.
//! - What it shows and changes it gets from the same endpoints that everybody has.
//!
//! Elsewhere: which requests of pages are answered (origin.rs). The charts are uPlot's (assets/uPlot.*, version and licence
//! in its files), as it came from the npm registry.

mod live;

use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

pub(super) use live::Live;
pub use live::VIEWERS_MAX;

use super::admin::{Shared, Unanswered};

const POLICY: &str =
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct Asset {
    name: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
}

macro_rules! assets {
    ($($name:literal: $kind:expr),* $(,)?) => {
        &[$(Asset { name: $name, kind: $kind, bytes: include_bytes!(concat!("assets/", $name)) }),*]
    };
}

const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

const ASSETS: &[Asset] = assets! {
    "app.js": SCRIPT,
    "ask.js": SCRIPT,
    "charts.js": SCRIPT,
    "format.js": SCRIPT,
    "history.js": SCRIPT,
    "panels.js": SCRIPT,
    "policy.js": SCRIPT,
    "shadow.js": SCRIPT,
    "theme.js": SCRIPT,
    "style.css": STYLE,
    "icon.svg": "image/svg+xml",
    "uPlot.iife.min.js": SCRIPT,
    "uPlot.min.css": STYLE,
    "uPlot.LICENSE": "text/plain; charset=utf-8",
};

const PAGE: Asset = Asset { name: "", kind: "text/html; charset=utf-8", bytes: include_bytes!("assets/index.html") };

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/", get(async || answer(&PAGE)))
        .route("/assets/{name}", get(asset))
        .route("/v1/live", get(live::live))
}

async fn asset(Path(name): Path<String>) -> Result<Response, Unanswered> {
    let asset = ASSETS.iter().find(|asset| asset.name == name);
    asset.map(answer).ok_or_else(|| Unanswered::new(StatusCode::NOT_FOUND, "the page has no such asset"))
}

fn answer(asset: &Asset) -> Response {
    const OPTIONS: HeaderName = header::X_CONTENT_TYPE_OPTIONS;
    let headers = [
        (header::CONTENT_TYPE, asset.kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version of the server has another page.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, asset.bytes).into_response()
}
