//! `GET /v1/capture?seconds=N`: a trace of the scheduler's inputs, as it is made.
//!
//! Always true
//! - One capture at a time. Its memory is that of the chunks between the batcher and this thread, which are bounded there.
//! - The answer ends with the trace's last chunk, which says why it ended, or the batcher is dead.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_lite::stream;
use serde::Deserialize;

use super::admin::{Shared, Unanswered};
use crate::capture::{SECONDS_MAX, Source, channel, end_chunk};
use crate::mail::ToBatcher;

#[derive(Deserialize)]
pub struct Asked {
    seconds: Option<u64>,
}

/// Held while a capture is on.
struct Turn(Arc<AtomicBool>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

pub async fn capture(
    State(shared): State<Arc<Shared>>,
    Query(asked): Query<Asked>,
    request: Request,
) -> Result<Response, Unanswered> {
    if request.headers().contains_key(header::ORIGIN) {
        return Err(Unanswered::new(StatusCode::FORBIDDEN, "a page in a browser may not start a capture"));
    }
    let busy = || Unanswered::new(StatusCode::CONFLICT, "another capture is on");
    if shared.capturing.load(Ordering::Acquire) {
        return Err(busy());
    }
    let Some(seconds @ 1..=SECONDS_MAX) = asked.seconds else {
        return Err(Unanswered::new(StatusCode::BAD_REQUEST, format!("expected seconds=1 to {SECONDS_MAX}")));
    };
    if shared.capturing.swap(true, Ordering::AcqRel) {
        return Err(busy());
    }
    let turn = Turn(Arc::clone(&shared.capturing));
    let (sink, source) = channel();
    shared.mail(ToBatcher::Capture { time: Duration::from_secs(seconds), sink })?;
    tracing::info!(seconds, "capture asked for on the control port");
    let body = Body::from_stream(stream::unfold(Some((source, turn)), next));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

type Capture = Option<(Source, Turn)>;

/// The next piece of the answer.
async fn next(capture: Capture) -> Option<(Result<Bytes, Infallible>, Capture)> {
    let (source, turn) = capture?;
    match source.chunks.recv_async().await {
        Ok(chunk) => Some((Ok(chunk), Some((source, turn)))),
        // Without a word why: the answer ends, and whoever reads finds no last chunk.
        Err(flume::RecvError::Disconnected) => Some((Ok(end_chunk(source.ended()?).into()), None)),
    }
}
