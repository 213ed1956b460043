//! Batches as a trace-event file, which Perfetto (ui.perfetto.dev) and `chrome://tracing` open.
//!
//! Format: "Trace Event Format" of the Chromium project, JSON object form; times in microseconds of the server's clock.
//!
//! ```text
//! process 1 "ferry"       track "batcher": a slice for each batch while it is packed
//!                         a track for each executor: a slice for each batch while it runs; of a device also "upload", "read back"
//! process 2 "requests"    the oldest request of each batch, with its stages inside; requests that overlap lie on several tracks
//! flows                   from a request's seal to its batch's run
//! ```
//!
//! Always true
//! - Slices of one track are disjoint or nested. Where two threads' clocks say otherwise, the later begins where the earlier
//!   ended; true times are in the arguments.
//! - A request's stages lie in its slice, end to end, and add up to it.

use serde::Serialize;

use super::{BatchRecord, DeviceTimes, Ran};
use crate::vocab::{Layout, ModelHandle, Moment};

const SERVER: u32 = 1;
const REQUESTS: u32 = 2;
const BATCHER: u32 = 1;
/// Tracks of executors: the first, and how many are set aside for each.
const EXECUTORS: u32 = 10;
const TRACKS_EACH: u32 = 3;

#[derive(Serialize)]
struct File<'a> {
    #[serde(rename = "traceEvents")]
    events: Vec<Event<'a>>,
    #[serde(rename = "displayTimeUnit")]
    unit: &'static str,
    #[serde(rename = "otherData")]
    about: About<'a>,
}

#[derive(Serialize)]
struct About<'a> {
    ferry: &'static str,
    why: &'a str,
    batches: usize,
}

#[derive(Serialize)]
struct Event<'a> {
    name: String,
    cat: &'static str,
    ph: &'static str,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    /// Of a flow's end: it belongs to the slice around it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bp: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Args<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Args<'a> {
    Name { name: String },
    Batch(Box<Batch<'a>>),
    Queue { held_us: f64, behind_us: f64, other_us: f64 },
}

/// What is said about a batch.
#[derive(Serialize)]
struct Batch<'a> {
    batch: u64,
    model: &'a str,
    generation: u32,
    reason: &'static str,
    rows: u32,
    fill: f64,
    padding: f64,
    padded_len: u32,
    layout: &'static str,
    requests: u32,
    lens: &'a [u32],
    predicted_us: f64,
    sealed_us: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    late: Option<u32>,
    outcome: &'static str,
}

/// The file, as bytes. `names` are the models', by handle; `why` it was made. `records` oldest first.
pub fn to_json(records: &[BatchRecord], names: &[String], why: &str) -> Vec<u8> {
    let mut tracks = Tracks { events: Vec::with_capacity(records.len() * 14 + 16), names, ends: Vec::new() };
    tracks.name_processes();
    let mut by_start: Vec<&BatchRecord> = records.iter().filter(|record| record.ran.is_some()).collect();
    tracks.batcher(records);
    by_start.sort_by_key(|record| record.ran.map(|ran| (ran.started_at, record.id)));
    by_start.iter().for_each(|record| tracks.run(record));
    by_start.sort_by_key(|record| (record.oldest.received_at, record.id));
    let mut lanes = Vec::new();
    by_start.iter().for_each(|record| tracks.request(record, &mut lanes));
    let about = About { ferry: env!("CARGO_PKG_VERSION"), why, batches: records.len() };
    let file = File { events: tracks.events, unit: "ms", about };
    serde_json::to_vec(&file).expect("plain data")
}

struct Tracks<'a> {
    events: Vec<Event<'a>>,
    names: &'a [String],
    /// Tracks of the server that have been named, and where their last slices end.
    ends: Vec<(u32, Moment)>,
}

fn micros(moment: Moment) -> f64 {
    moment.nanos() as f64 / 1e3
}

fn name_of(names: &[String], model: ModelHandle) -> &str {
    names.get(model.index()).map_or("", String::as_str)
}

impl<'a> Tracks<'a> {
    fn meta(&mut self, what: &str, pid: u32, tid: u32, name: String) {
        self.events.push(Event {
            name: what.to_owned(),
            cat: "__metadata",
            ph: "M",
            ts: 0.0,
            dur: None,
            pid,
            tid,
            id: None,
            bp: None,
            args: Some(Args::Name { name }),
        });
    }

    fn name_processes(&mut self) {
        self.meta("process_name", SERVER, 0, "ferry".into());
        self.meta("process_name", REQUESTS, 0, "requests (the oldest of each batch)".into());
        self.meta("thread_name", SERVER, BATCHER, "batcher".into());
        self.ends.push((BATCHER, Moment::ZERO));
    }

    fn slice(
        &mut self,
        (pid, tid): (u32, u32),
        (cat, name): (&'static str, String),
        from: Moment,
        to: Moment,
        args: Option<Args<'a>>,
    ) {
        let dur = Some(to.since(from).as_nanos() as f64 / 1e3);
        self.events.push(Event { name, cat, ph: "X", ts: micros(from), dur, pid, tid, id: None, bp: None, args });
    }

    /// A slice on a track of the server, behind what is there already. Returns where it begins.
    fn append(
        &mut self,
        tid: u32,
        track: impl FnOnce() -> String,
        what: (&'static str, String),
        from: Moment,
        to: Moment,
        args: Option<Args<'a>>,
    ) -> Moment {
        let at = match self.ends.iter().position(|(known, _)| *known == tid) {
            Some(at) => at,
            None => {
                self.meta("thread_name", SERVER, tid, track());
                self.ends.push((tid, Moment::ZERO));
                self.ends.len() - 1
            }
        };
        let from = from.max(self.ends[at].1);
        let to = to.max(from);
        self.ends[at].1 = to;
        self.slice((SERVER, tid), what, from, to, args);
        from
    }

    fn batch(&self, record: &'a BatchRecord) -> Args<'a> {
        Args::Batch(Box::new(Batch {
            batch: record.id,
            model: name_of(self.names, record.model),
            generation: record.generation,
            reason: record.reason.name(),
            rows: record.rows,
            fill: f64::from(record.rows) / f64::from(record.rows_possible.max(1)),
            padding: match record.layout {
                Layout::Packed => 0.0,
                Layout::Padded => 1.0 - record.cells_real as f64 / record.cells_padded.max(1) as f64,
            },
            padded_len: record.padded_len,
            layout: record.layout.name(),
            requests: record.members,
            lens: record.lens(),
            predicted_us: record.predicted as f64 / 1e3,
            sealed_us: micros(record.sealed_at),
            started_us: record.ran.map(|ran| micros(ran.started_at)),
            service_us: record.ran.map(|ran| ran.service.as_nanos() as f64 / 1e3),
            late: record.ran.map(|ran| ran.late),
            outcome: record.ran.map_or("running", |ran| ran.outcome.name()),
        }))
    }

    fn batcher(&mut self, records: &'a [BatchRecord]) {
        for record in records {
            let what = ("pack", format!("pack #{}", record.id));
            let args = Some(self.batch(record));
            self.append(BATCHER, || "batcher".into(), what, record.sealed_at, record.packed_at, args);
        }
    }

    fn run(&mut self, record: &'a BatchRecord) {
        let Some(Ran { started_at, finished_at, device, .. }) = record.ran else { return };
        let executor = record.executor;
        let tid = EXECUTORS + TRACKS_EACH * u32::from(executor);
        let what = ("batch", format!("{} #{} ×{}", name_of(self.names, record.model), record.id, record.rows));
        let end = device.map_or(finished_at, |device| device.computed_at);
        let args = Some(self.batch(record));
        let starts = self.append(tid, || format!("executor {executor}"), what, started_at, end, args);
        self.events.push(Event {
            name: "batch".into(),
            cat: "flow",
            ph: "f",
            ts: micros(starts),
            dur: None,
            pid: SERVER,
            tid,
            id: Some(record.id),
            bp: Some("e"),
            args: None,
        });
        if let Some(DeviceTimes { asked_at, uploaded_at, computed_at }) = device {
            let copies = |copy: &str| format!("executor {executor}: {copy}");
            let id = record.id;
            let upload = ("copy", format!("upload #{id}"));
            self.append(tid + 1, || copies("upload"), upload, asked_at, uploaded_at, None);
            let readback = ("copy", format!("read back #{id}"));
            self.append(tid + 2, || copies("read back"), readback, computed_at, finished_at, None);
        }
    }

    /// The oldest request of a batch, on the first of the tracks `lanes` that is free.
    fn request(&mut self, record: &'a BatchRecord, lanes: &mut Vec<Moment>) {
        let Some(ran) = record.ran else { return };
        let oldest = &record.oldest;
        let (from, to) = (oldest.received_at, record.last_at());
        let lane = lanes.iter().position(|end| *end <= from).unwrap_or_else(|| {
            lanes.push(Moment::ZERO);
            self.meta("thread_name", REQUESTS, lanes.len() as u32, format!("requests {}", lanes.len()));
            lanes.len() - 1
        });
        lanes[lane] = to;
        let track = (REQUESTS, lane as u32 + 1);
        let args = Some(self.batch(record));
        self.slice(track, ("request", format!("request of #{}", record.id)), from, to, args);
        let admitted_at = oldest.admitted_at.max(from);
        let sealed_at = record.sealed_at.max(admitted_at);
        let packed_at = record.packed_at.max(sealed_at);
        let (behind, other) = (oldest.waited.behind as f64 / 1e3, oldest.waited.other as f64 / 1e3);
        let queue = sealed_at.since(admitted_at).as_nanos() as f64 / 1e3;
        let queue = Args::Queue { held_us: (queue - behind - other).max(0.0), behind_us: behind, other_us: other };
        for (stage, from, to, args) in [
            ("admit", from, admitted_at, None),
            ("queue", admitted_at, sealed_at, Some(queue)),
            ("pack", sealed_at, packed_at, None),
            ("wait", packed_at, ran.started_at, None),
            ("run", ran.started_at, ran.finished_at, None),
            ("scatter", ran.finished_at, to, None),
        ] {
            self.slice(track, ("stage", stage.to_owned()), from, to, args);
        }
        self.events.push(Event {
            name: "batch".into(),
            cat: "flow",
            ph: "s",
            ts: micros(sealed_at),
            dur: None,
            pid: track.0,
            tid: track.1,
            id: Some(record.id),
            bp: None,
            args: None,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ran, record};
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeMap;
    use std::time::Duration;

    /// Twenty batches, each sealed while the one before still runs; the last has not run.
    fn records(on_device: bool) -> Vec<BatchRecord> {
        let mut records: Vec<BatchRecord> = (1..=20).map(|id| record(id, id * 400)).collect();
        let mut free_at = Moment::ZERO;
        for record in &mut records[..19] {
            let mut ran = ran(record);
            ran.started_at = ran.started_at.max(free_at);
            ran.finished_at = ran.started_at + Duration::from_micros(450);
            // The next begins a little before this one is seen to have ended.
            free_at = ran.finished_at - Duration::from_micros(3);
            ran.device = on_device.then(|| DeviceTimes {
                asked_at: record.packed_at,
                uploaded_at: ran.started_at,
                computed_at: ran.finished_at - Duration::from_micros(30),
            });
            record.executor = (record.id % 2) as u16;
            record.answered_at = Some(ran.finished_at + Duration::from_micros(7));
            record.ran = Some(ran);
        }
        records
    }

    fn events(records: &[BatchRecord]) -> Vec<Value> {
        let json: Value = serde_json::from_slice(&to_json(records, &["minilm".into()], "test")).expect("JSON");
        assert_eq!((&json["displayTimeUnit"], &json["otherData"]["why"]), (&"ms".into(), &"test".into()));
        json["traceEvents"].as_array().expect("a list").clone()
    }

    /// Beginning and end, in ns.
    fn span(event: &Value) -> (i64, i64) {
        let nanos = |key: &str| (event[key].as_f64().expect("a number") * 1e3).round() as i64;
        (nanos("ts"), nanos("ts") + nanos("dur"))
    }

    type Slices = BTreeMap<(u64, u64), Vec<(i64, i64, Value)>>;

    fn slices(events: &[Value]) -> Slices {
        let mut slices = Slices::new();
        for event in events.iter().filter(|event| event["ph"] == "X") {
            let (from, to) = span(event);
            let track = (event["pid"].as_u64().expect("a number"), event["tid"].as_u64().expect("a number"));
            slices.entry(track).or_default().push((from, to, event.clone()));
        }
        slices
    }

    #[test]
    fn slices_of_a_track_are_disjoint_or_nested_and_every_track_has_a_name() {
        for on_device in [false, true] {
            let events = events(&records(on_device));
            let named = |pid: u64, tid: u64| {
                events.iter().any(|event| event["name"] == "thread_name" && event["pid"] == pid && event["tid"] == tid)
            };
            let slices = slices(&events);
            assert_eq!(slices.keys().filter(|(pid, _)| *pid == 1).count(), if on_device { 7 } else { 3 });
            for ((pid, tid), slices) in &slices {
                assert!(named(*pid, *tid), "track {pid}/{tid} has no name");
                for (at, (from, to, one)) in slices.iter().enumerate() {
                    assert!(from <= to);
                    for (other_from, other_to, other) in &slices[at + 1..] {
                        let disjoint = other_from >= to || other_to <= from;
                        let nested = (from <= other_from && other_to <= to) || (other_from <= from && to <= other_to);
                        assert!(disjoint || nested, "{one} and {other}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_stages_of_a_request_are_its_whole_time() {
        let (records, mut requests) = (records(false), 0);
        for ((pid, _), slices) in slices(&events(&records)) {
            if pid != u64::from(REQUESTS) {
                continue;
            }
            for (from, to, request) in slices.iter().filter(|(_, _, event)| event["cat"] == "request") {
                let inside = slices.iter().filter(|(a, b, event)| event["cat"] == "stage" && a >= from && b <= to);
                let stages: Vec<_> = inside.collect();
                assert_eq!(stages.len(), 6, "{request}");
                assert_eq!(stages.iter().map(|(from, to, _)| to - from).sum::<i64>(), to - from, "{request}");
                assert!(stages.windows(2).all(|pair| pair[0].1 == pair[1].0), "end to end");
                let record = &records[request["args"]["batch"].as_u64().expect("a number") as usize - 1];
                assert_eq!(*to - *from, record.last_at().since(record.oldest.received_at).as_nanos() as i64);
                requests += 1;
            }
        }
        assert_eq!(requests, 19, "all that ran");
    }

    #[test]
    fn each_batch_that_ran_has_one_flow_from_its_request_to_its_run() {
        let events = events(&records(true));
        let of = |ph: &str, id: u64| {
            let mut found = events.iter().filter(|event| event["ph"] == ph && event["id"] == id);
            let event = found.next().unwrap_or_else(|| panic!("no {ph} of {id}")).clone();
            assert!(found.next().is_none());
            event
        };
        let slices = slices(&events);
        for id in 1..=19 {
            let (start, end) = (of("s", id), of("f", id));
            for (event, cat) in [(&start, "request"), (&end, "batch")] {
                let track = (event["pid"].as_u64().expect("a number"), event["tid"].as_u64().expect("a number"));
                let at = (event["ts"].as_f64().expect("a number") * 1e3).round() as i64;
                let around = slices[&track].iter().find(|(from, to, slice)| {
                    slice["cat"] == cat && slice["args"]["batch"] == id && *from <= at && at <= *to
                });
                assert!(around.is_some(), "{event} is not in a {cat} of batch {id}");
            }
            assert!(start["ts"].as_f64() <= end["ts"].as_f64());
        }
        assert!(!events.iter().any(|event| event["ph"] == "f" && event["id"] == 20), "it has not run");
    }

    #[test]
    fn a_batch_says_what_was_decided_about_it() {
        let events = events(&records(false));
        let batch = events.iter().find(|event| event["cat"] == "batch").expect("a run");
        assert_eq!(batch["name"], "minilm #1 ×3");
        let args = &batch["args"];
        assert_eq!((&args["model"], &args["reason"]), (&"minilm".into(), &"queue_delay".into()));
        assert_eq!((args["rows"].as_u64(), args["generation"].as_u64()), (Some(3), Some(2)));
        assert_eq!((args["fill"].as_f64(), args["lens"].as_array().map(Vec::len)), (Some(0.375), Some(3)));
    }

    #[test]
    fn of_no_batches_a_file_is_made_that_opens() {
        assert!(slices(&events(&[])).is_empty());
    }
}
