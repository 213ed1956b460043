//! Records of requests as spans: one for the request with its stages below it, and one for each batch that carried one.
//!
//! Always true
//! - The stages of a request that was answered lie end to end and are its whole time, as in the timings of a reply.
//! - A batch's ids follow from its number, so that a request can link to it before it is sent.
//! - A batch is sent once, when no record of it came for a while: its members end on several shards, moments apart.
//!
//! Pure: time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::trace::v1::span::{Event, Link, SpanKind};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, Status};

use super::metrics::nanos;
use super::{About, LINKS_MAX, number, real, text};
use crate::telemetry::spans::{BatchRecord, Passage, RequestRecord};
use crate::vocab::{Code, Moment, TraceContext};

/// How long after its last record a batch is sent.
pub const SETTLE: Duration = Duration::from_millis(500);

/// Turns records into spans. `seed`: of this process, at random.
#[derive(Debug)]
pub struct Recorded {
    seed: u64,
    /// By number: those whose members may not all have come.
    open: BTreeMap<u64, OpenBatch>,
}

#[derive(Debug)]
struct OpenBatch {
    record: BatchRecord,
    members: Vec<TraceContext>,
    touched_at: Moment,
}

impl Recorded {
    pub fn new(seed: u64) -> Recorded {
        Recorded { seed, open: BTreeMap::new() }
    }

    /// Appends the spans of one request. `origin`: the moment zero in time since 1970.
    pub fn take(&mut self, record: &RequestRecord, about: &About, origin: Duration, now: Moment, out: &mut Vec<Span>) {
        if let Some(Passage { batch, .. }) = &record.batch {
            let fresh = || OpenBatch { record: *batch, members: Vec::new(), touched_at: now };
            let open = self.open.entry(batch.id).or_insert_with(fresh);
            open.touched_at = now;
            open.members.push(record.span);
        }
        out.push(self.request_span(record, about, origin));
        stage_spans(record, origin, out);
    }

    /// Appends the spans of batches that no record came of for [`SETTLE`], or of `all`.
    pub fn settle(&mut self, all: bool, about: &About, origin: Duration, now: Moment, out: &mut Vec<Span>) {
        let seed = self.seed;
        self.open.retain(|_, batch| {
            let waits = !all && now.since(batch.touched_at) < SETTLE;
            if !waits {
                out.push(batch_span(seed, batch, about, origin));
            }
            waits
        });
    }

    fn request_span(&self, record: &RequestRecord, about: &About, origin: Duration) -> Span {
        let mut attributes = vec![
            text("ferry.code", record.code.name()),
            number("ferry.request.id", record.request_id),
            number("ferry.request.rows", record.rows),
            number("ferry.request.length", record.len),
            number("ferry.shard", record.shard),
        ];
        attributes.extend(model_attributes(record.model.index(), about));
        if let Some(lag) = record.send_lag {
            attributes.push(real("ferry.request.send_lag_seconds", lag.as_secs_f64()));
        }
        let mut links = Vec::new();
        if let Some(Passage { batch, .. }) = &record.batch {
            attributes.push(number("ferry.batch.id", batch.id));
            links.push(link(&batch_context(self.seed, batch.id)));
        }
        // A caller that goes away, or a deadline that it set, is not the server's error; the code says it all the same.
        let status = match record.code {
            Code::Ok | Code::Cancelled => None,
            _ => Some(Status { message: record.message.clone(), code: StatusCode::Error as i32 }),
        };
        Span {
            parent_span_id: record.parent.map_or_else(Vec::new, Vec::from),
            kind: SpanKind::Server as i32,
            attributes,
            links,
            status,
            ..span("ferry.infer", &record.span, [record.received_at, record.ended_at], origin)
        }
    }
}

/// Names as in the timings of a reply.
fn stage_spans(record: &RequestRecord, origin: Duration, out: &mut Vec<Span>) {
    let Some(Passage { admitted_at, batch }) = &record.batch else { return };
    let edges = [
        ("admit", record.received_at),
        ("queue", *admitted_at),
        ("pack", batch.sealed_at),
        ("wait", batch.packed_at),
        ("run", batch.started_at),
        ("scatter", batch.finished_at),
        ("", record.ended_at),
    ];
    for (number, pair) in edges.windows(2).enumerate() {
        let [(name, from), (_, to)] = pair else { unreachable!("windows of two") };
        let span_id = id_of(mix(u64::from_be_bytes(record.span.span_id) ^ (number as u64 + 1)));
        let context = TraceContext { span_id, ..record.span };
        out.push(Span {
            parent_span_id: record.span.span_id.to_vec(),
            kind: SpanKind::Internal as i32,
            ..span(&format!("ferry.{name}"), &context, [*from, *to], origin)
        });
    }
}

fn batch_span(seed: u64, open: &OpenBatch, about: &About, origin: Duration) -> Span {
    let batch = &open.record;
    let fill = f64::from(batch.rows) / f64::from(batch.rows_possible.max(1));
    let padding = 1.0 - batch.cells_real as f64 / batch.cells_padded.max(1) as f64;
    let mut attributes = vec![
        number("ferry.batch.id", batch.id),
        number("ferry.batch.size", batch.rows),
        number("ferry.batch.bucket", batch.padded_len),
        real("ferry.batch.fill_ratio", fill.min(1.0)),
        real("ferry.batch.padding_ratio", padding.max(0.0)),
        text("ferry.batch.layout", batch.layout.name()),
        text("ferry.batch.close_reason", batch.reason.name()),
        number("ferry.executor", batch.executor),
    ];
    attributes.extend(model_attributes(batch.model.index(), about));
    if let Some(device) = about.telemetry.installation().devices.get(usize::from(batch.executor)) {
        attributes.push(text("ferry.device", device.as_str()));
    }
    let event = |name: &str, at: Moment| Event {
        time_unix_nano: nanos(origin + Duration::from_nanos(at.nanos())),
        name: name.into(),
        ..Event::default()
    };
    let failed = || Status { message: "the batch failed".into(), code: StatusCode::Error as i32 };
    Span {
        kind: SpanKind::Internal as i32,
        attributes,
        events: vec![event("packed", batch.packed_at), event("started", batch.started_at)],
        links: open.members.iter().take(LINKS_MAX).map(link).collect(),
        dropped_links_count: open.members.len().saturating_sub(LINKS_MAX) as u32,
        status: batch.failed.then(failed),
        ..span("ferry.batch", &batch_context(seed, batch.id), [batch.sealed_at, batch.finished_at], origin)
    }
}

fn model_attributes(model: usize, about: &About) -> Vec<KeyValue> {
    let (name, version) = about.telemetry.model_labels(model);
    let mut attributes = vec![text("ferry.model.name", name), text("ferry.model.version", version)];
    if let Some(precision) = about.telemetry.installation().precisions.get(model) {
        attributes.push(text("ferry.model.precision", precision.as_str()));
    }
    attributes
}

fn span(name: &str, context: &TraceContext, [from, to]: [Moment; 2], origin: Duration) -> Span {
    let unix = |moment: Moment| nanos(origin + Duration::from_nanos(moment.nanos()));
    Span {
        trace_id: context.trace_id.to_vec(),
        span_id: context.span_id.to_vec(),
        flags: context.flags.into(),
        name: name.into(),
        start_time_unix_nano: unix(from),
        // Clocks of two threads may be read out of order.
        end_time_unix_nano: unix(to.max(from)),
        ..Span::default()
    }
}

fn link(context: &TraceContext) -> Link {
    Link {
        trace_id: context.trace_id.to_vec(),
        span_id: context.span_id.to_vec(),
        flags: context.flags.into(),
        ..Link::default()
    }
}

/// A batch is the root of its own trace: its members belong to many.
fn batch_context(seed: u64, id: u64) -> TraceContext {
    let base = mix(seed ^ mix(id));
    let halves = [id_of(mix(base ^ 1)), id_of(mix(base ^ 2))];
    let trace_id = std::array::from_fn(|at| halves[at / 8][at % 8]);
    TraceContext { trace_id, span_id: id_of(mix(base ^ 3)), flags: TraceContext::SAMPLED }
}

/// An id is never zero.
fn id_of(bits: u64) -> [u8; 8] {
    bits.max(1).to_be_bytes()
}

/// The output function of SplitMix64: one to one, and each bit of its input changes half of its output.
fn mix(bits: u64) -> u64 {
    let mut mixed = bits.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{ModelLabels, Telemetry};
    use crate::vocab::{Layout, ModelHandle, SealReason};

    const ORIGIN: Duration = Duration::from_secs(1_000_000);

    fn about() -> About {
        let labels = [ModelLabels { name: "echo".into(), version: "3".into() }];
        About::new(Telemetry::new(&labels, 1, 1), "test", 7)
    }

    fn passage(id: u64) -> Passage {
        let batch = BatchRecord {
            id,
            model: ModelHandle(0),
            executor: 0,
            layout: Layout::Padded,
            rows: 3,
            rows_possible: 4,
            padded_len: 8,
            cells_real: 18,
            cells_padded: 24,
            reason: SealReason::Idle,
            sealed_at: Moment(30),
            packed_at: Moment(40),
            started_at: Moment(50),
            finished_at: Moment(80),
            failed: false,
        };
        Passage { admitted_at: Moment(20), batch }
    }

    fn record(number: u8, batch: Option<Passage>) -> RequestRecord {
        RequestRecord {
            span: TraceContext { trace_id: [number; 16], span_id: [number; 8], flags: 1 },
            parent: Some([99; 8]),
            model: ModelHandle(0),
            request_id: number.into(),
            shard: 0,
            rows: 1,
            len: 6,
            received_at: Moment(10),
            ended_at: Moment(100),
            code: Code::Ok,
            message: String::new(),
            send_lag: None,
            batch,
        }
    }

    fn names(spans: &[Span]) -> Vec<&str> {
        spans.iter().map(|span| span.name.as_str()).collect()
    }

    #[test]
    fn the_stages_of_an_answered_request_are_its_whole_time_end_to_end() {
        let (mut recorded, mut spans) = (Recorded::new(1), Vec::new());
        recorded.take(&record(5, Some(passage(1))), &about(), ORIGIN, Moment(100), &mut spans);
        let expected =
            ["ferry.infer", "ferry.admit", "ferry.queue", "ferry.pack", "ferry.wait", "ferry.run", "ferry.scatter"];
        assert_eq!(names(&spans), expected);
        let (request, stages) = spans.split_first().expect("seven");
        assert_eq!(request.start_time_unix_nano, 1_000_000_000_000_010);
        assert_eq!(request.parent_span_id, [99; 8]);
        let mut at = request.start_time_unix_nano;
        for stage in stages {
            assert_eq!((stage.start_time_unix_nano, &stage.parent_span_id), (at, &request.span_id), "{}", stage.name);
            assert_eq!(stage.trace_id, request.trace_id);
            at = stage.end_time_unix_nano;
        }
        assert_eq!(at, request.end_time_unix_nano);
        let mut ids: Vec<&Vec<u8>> = spans.iter().map(|span| &span.span_id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 7, "each span has an id of its own");
    }

    #[test]
    fn a_batch_is_sent_once_and_linked_with_its_members_both_ways() {
        let (mut recorded, mut spans) = (Recorded::new(1), Vec::new());
        let about = about();
        recorded.take(&record(5, Some(passage(1))), &about, ORIGIN, Moment(0), &mut spans);
        let later = Moment(0) + SETTLE / 2;
        recorded.settle(false, &about, ORIGIN, later, &mut spans);
        recorded.take(&record(6, Some(passage(1))), &about, ORIGIN, later, &mut spans);
        recorded.settle(false, &about, ORIGIN, Moment(0) + SETTLE, &mut spans);
        assert!(!names(&spans).contains(&"ferry.batch"), "a member came less than that ago");
        recorded.settle(false, &about, ORIGIN, later + SETTLE, &mut spans);
        recorded.settle(true, &about, ORIGIN, Moment::FAR, &mut spans);
        let batches: Vec<&Span> = spans.iter().filter(|span| span.name == "ferry.batch").collect();
        let [batch] = batches[..] else { panic!("{} batches", batches.len()) };
        let linked: Vec<&[u8]> = batch.links.iter().map(|link| &link.span_id[..]).collect();
        assert_eq!(linked, [&[5; 8][..], &[6; 8]]);
        for request in spans.iter().filter(|span| span.name == "ferry.infer") {
            assert_eq!((&request.links[0].trace_id, &request.links[0].span_id), (&batch.trace_id, &batch.span_id));
        }
        let fill = batch.attributes.iter().find(|attribute| attribute.key == "ferry.batch.fill_ratio");
        assert_eq!(fill, Some(&real("ferry.batch.fill_ratio", 0.75)));
    }

    #[test]
    fn links_have_a_bound_and_the_rest_is_counted() {
        let (mut recorded, mut spans) = (Recorded::new(1), Vec::new());
        for number in 0..=LINKS_MAX {
            recorded.take(&record(number as u8, Some(passage(1))), &about(), ORIGIN, Moment(0), &mut spans);
        }
        recorded.settle(true, &about(), ORIGIN, Moment(0), &mut spans);
        let batch = spans.last().expect("the batch");
        assert_eq!((batch.links.len(), batch.dropped_links_count), (LINKS_MAX, 1));
    }

    #[test]
    fn a_request_that_never_ran_has_neither_stages_nor_batch_and_says_why() {
        let (mut recorded, mut spans) = (Recorded::new(1), Vec::new());
        let refused = RequestRecord { code: Code::Overloaded, message: "full".into(), ..record(5, None) };
        recorded.take(&refused, &about(), ORIGIN, Moment(0), &mut spans);
        recorded.settle(true, &about(), ORIGIN, Moment(0), &mut spans);
        let [span] = &spans[..] else { panic!("{:?}", names(&spans)) };
        assert_eq!(span.status, Some(Status { message: "full".into(), code: StatusCode::Error as i32 }));
        assert!(span.links.is_empty());
    }

    #[test]
    fn batches_of_two_processes_have_different_traces() {
        assert_eq!(batch_context(1, 5), batch_context(1, 5));
        assert_ne!(batch_context(1, 5), batch_context(2, 5));
        assert_ne!(batch_context(1, 5), batch_context(1, 6));
        assert!(batch_context(0, 0).is_valid());
    }
}
