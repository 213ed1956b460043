//! What each frame means, given the state of its connection.
//!
//! Always true
//! - A request is accepted in one step that does not yield: read whole, checksum right, checked against the contract,
//!   in the in-flight table, in the burst. Before that it may be refused; after it, exactly one outcome is owed.
//! - A wrong frame that leaves the stream readable costs one request; one that does not costs the connection.

use std::time::Duration;

use bytes::Bytes;

use super::abuse::Act;
use super::access::identify;
use super::connection::{Connection, Phase};
use super::inflight::Waiting;
use super::state::{Burst, State};
use crate::clock;
use crate::mail::{Part, Request};
use crate::quota::Use;
use crate::scatter::{Details, append_error};
use crate::scheduler::{Class, Compose};
use crate::telemetry::Operation;
use crate::tenants::{Identity, Role};
use crate::vocab::{Code, ModelHandle, Moment, Refusal, Stage};
use crate::wire::encoder::{Head, append_bare, append_frame};
use crate::wire::message::{
    Describe, Description, Goaway, Hello, HelloAck, INFER_ITEMS, INFER_RECEIPT, INFER_TIMINGS, INFER_TRUNCATE, Infer,
    MESSAGE_MAX, NAME_MAX, cut, decode_exact,
};
use crate::wire::{Frame, Kind, Limits, PROTOCOL_MAJOR};

/// Longest deadline that is kept as one; beyond it a request has none.
const DEADLINE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Why the connection cannot go on.
#[derive(Debug)]
pub struct Fatal {
    pub code: Code,
    pub message: String,
}

impl Fatal {
    pub fn protocol(message: impl Into<String>) -> Fatal {
        Fatal { code: Code::ProtocolError, message: message.into() }
    }
}

/// Acts on one whole frame that lies at the front of `data`.
pub fn handle_frame(
    state: &mut State,
    at: u32,
    frame: &Frame,
    data: &Bytes,
    now: Moment,
    burst: &mut Burst,
) -> Result<(), Fatal> {
    if !frame.kind.from_client() {
        return Err(Fatal::protocol(format!("frame kind {} comes from servers only", frame.header.kind)));
    }
    match (state.connections[at as usize].phase, frame.kind) {
        (Phase::Greeting, Kind::Hello) => hello(state, at, frame.metadata(data), now),
        (Phase::Greeting, _) if state.wants_proof() => {
            state.proof_failed(at, now);
            Err(Fatal { code: Code::Unauthenticated, message: "a hello with credentials comes first".into() })
        }
        (Phase::Greeting, _) => Err(Fatal::protocol(format!("expected a hello first, got kind {}", frame.header.kind))),
        (_, Kind::Hello) => Err(Fatal::protocol("a second hello")),
        (Phase::Open, Kind::Infer) => infer(state, at, frame, data, now, burst),
        (Phase::Open, Kind::Describe) => {
            state.charge(at, Act::Document, now)?;
            let (operation, model, code) = describe(state, at, frame, data);
            state.metrics().operated(operation, model, code, clock::now().since(now));
            Ok(())
        }
        (Phase::Open | Phase::Leaving, Kind::Cancel) => {
            cancel(state, at, frame.header.request_id, burst);
            state.charge(at, Act::Cancel, now)
        }
        (Phase::Open, Kind::Ping) => {
            state.charge(at, Act::Ping, now)?;
            let head = Head { kind: Kind::Pong, model: ModelHandle(0), request_id: frame.header.request_id };
            append_bare(state.output(at).out.end(), head);
            Ok(())
        }
        (Phase::Open, Kind::Stats) => {
            if let Some(refusal) = forbidden(&state.connections[at as usize], Role::Observe) {
                append_error(state.output(at).out.end(), ModelHandle(0), frame.header.request_id, &refusal);
                return Ok(());
            }
            state.charge(at, Act::Document, now)?;
            let json = state.telemetry.stats_json().to_string();
            let head = Head { kind: Kind::StatsReply, model: ModelHandle(0), request_id: frame.header.request_id };
            append_frame(state.output(at).out.end(), head, &(), json.as_bytes())
                .expect("no metadata is within every limit");
            state.metrics().operated(Operation::Stats, None, Code::Ok, clock::now().since(now));
            Ok(())
        }
        // The client will send nothing more; what it sent is answered.
        (Phase::Open, Kind::Goaway) => {
            state.leave(at, now);
            Ok(())
        }
        // After our goaway frames are read and thrown away: the client knows that they were not accepted.
        _ => Ok(()),
    }
}

fn hello(state: &mut State, at: u32, metadata: &[u8], now: Moment) -> Result<(), Fatal> {
    let mut hello: Hello = decode_exact(metadata).map_err(|error| Fatal::protocol(format!("hello: {error}")))?;
    if hello.version_min > PROTOCOL_MAJOR || hello.version_max < PROTOCOL_MAJOR {
        return Err(Fatal::protocol(format!(
            "this server speaks protocol version {PROTOCOL_MAJOR}, the client {} to {}",
            hello.version_min, hello.version_max
        )));
    }
    if hello.client.len() > NAME_MAX || hello.tenant.len() > NAME_MAX {
        return Err(Fatal::protocol(format!("hello: expected names of at most {NAME_MAX} bytes")));
    }
    if let Some(identity) = prove(state, at, &hello, now)? {
        hello.tenant = identity.tenant.to_string();
        let connection = &mut state.connections[at as usize];
        connection.roles = identity.roles;
        connection.identity = Some(identity);
    }
    state.greeted(at);
    let options = &state.options;
    let ack = HelloAck {
        version: PROTOCOL_MAJOR,
        features: 0,
        server: concat!("ferry/", env!("CARGO_PKG_VERSION")).to_owned(),
        metadata_bytes_max: Limits::METADATA_CEILING,
        payload_bytes_max: options.payload_bytes_max,
        credit_requests: options.credit_requests,
        credit_bytes: options.credit_bytes,
    };
    let limits = Limits { metadata_bytes: Limits::METADATA_CEILING, payload_bytes: options.payload_bytes_max };
    let tenant = state.catalog.tenants.id_of(&hello.tenant);
    let Some(seat) = options.quotas.of(&hello.tenant, tenant.0 != 0).connect() else {
        return Err(Fatal {
            code: Code::QuotaExceeded,
            message: "the tenant has as many connections as its quota allows".into(),
        });
    };
    state.telemetry.tenant_named(tenant.0, &hello.tenant);
    let connection = state.output(at);
    connection.tenant = tenant;
    connection.seat = Some(seat);
    connection.window_bytes = ack.credit_bytes;
    connection.phase = Phase::Open;
    connection.decoder.set_limits(limits);
    append_frame(connection.out.end(), Head::control(Kind::HelloAck), &ack, &[]).expect("short strings");
    Ok(())
}

/// Who says hello, where that has to be proved. Who fails is noted by where it comes from.
fn prove(state: &mut State, at: u32, hello: &Hello, now: Moment) -> Result<Option<Identity>, Fatal> {
    let Some(access) = state.options.access.clone() else { return Ok(None) };
    let Some(tenants) = access.current().tenants.clone() else { return Ok(None) };
    let connection = &state.connections[at as usize];
    match identify(&tenants, &hello.token, &connection.uris, &hello.tenant, access.today()) {
        Ok(identity) => {
            state.metrics().authenticated(true);
            Ok(Some(identity))
        }
        Err(fatal) => {
            state.proof_failed(at, now);
            Err(fatal)
        }
    }
}

/// What a connection may not do.
fn forbidden(connection: &Connection, role: Role) -> Option<Refusal> {
    let message = || format!("this needs the role {}, which the credentials do not have", role.name());
    (!connection.roles.has(role)).then(|| Refusal::new(Code::PermissionDenied, message()))
}

/// Answers what was asked, and says what that was and what came of it.
fn describe(state: &mut State, at: u32, frame: &Frame, data: &Bytes) -> (Operation, Option<ModelHandle>, Code) {
    let request_id = frame.header.request_id;
    let asked: Result<Describe, _> = decode_exact(frame.metadata(data));
    let catalog = std::sync::Arc::clone(&state.catalog);
    let connection = state.output(at);
    let mut answer = |model: ModelHandle, description: Description, json: &[u8]| {
        let head = Head { kind: Kind::Description, model, request_id };
        append_frame(connection.out.end(), head, &description, json).expect("two numbers");
    };
    let refusal = match asked {
        Err(error) => Refusal::invalid(format!("describe: {error}")),
        Ok(asked) if asked.model.is_empty() => {
            answer(ModelHandle(0), Description { handle: 0, contract_hash: 0 }, &catalog.list_json);
            return (Operation::List, None, Code::Ok);
        }
        Ok(asked) => match catalog.find(&asked.model, &asked.version) {
            Some((handle, entry)) => {
                answer(handle, Description { handle: handle.0, contract_hash: entry.contract_hash }, &entry.json);
                return (Operation::Describe, Some(handle), Code::Ok);
            }
            None => Refusal::new(Code::NotFound, not_found(&asked)),
        },
    };
    append_error(connection.out.end(), ModelHandle(0), request_id, &refusal);
    (Operation::Describe, None, refusal.code)
}

fn not_found(asked: &Describe) -> String {
    // The name came from a peer: quoted, escaped and cut.
    let name = format!("{:?}", cut(&asked.model, NAME_MAX));
    match asked.version.as_str() {
        "" => format!("model {name} is not served here"),
        version => format!("version {:?} of model {name} is not served here", cut(version, NAME_MAX)),
    }
}

fn cancel(state: &mut State, at: u32, request_id: u64, burst: &mut Burst) {
    let owned = state.connections[at as usize].owned;
    let Some(key) = state.in_flight.find(&owned, request_id) else { return };
    burst.cancelled.push(key);
    let refusal = Refusal::new(Code::Cancelled, "cancelled by the client");
    state.end(key, &refusal);
}

/// Accepts a request or refuses it.
///
/// Hot: once per request. Guarded by benches/decoder.rs and benches/echo_path.rs.
fn infer(state: &mut State, at: u32, frame: &Frame, data: &Bytes, now: Moment, burst: &mut Burst) -> Result<(), Fatal> {
    let header = &frame.header;
    if state.options.panic_on_request_id == Some(header.request_id) {
        panic!("test hook: request {}", header.request_id);
    }
    if state.options.panic_shard_on_request_id == Some(header.request_id) {
        state.broken = true;
        state.wake_main();
        return Ok(());
    }
    let mut waste = None;
    match accept(state, at, frame, data, now, &mut waste) {
        Ok((request, text)) => {
            state.metrics().accepted(request.model, 1);
            match text {
                true => burst.texts.push(request),
                false => burst.arrivals.push(request),
            }
        }
        Err(refusal) => {
            let model = state.catalog.by_handle(header.model).map(|_| header.model);
            state.metrics().refused(model, refusal.code);
            append_error(state.output(at).out.end(), header.model, header.request_id, &refusal);
            if let Some(act) = waste {
                return state.charge(at, act, now);
            }
        }
    }
    Ok(())
}

/// The request, and whether it is text. `waste` is what a refusal costs the caller; None where it is not the caller's fault.
fn accept(
    state: &mut State,
    at: u32,
    frame: &Frame,
    data: &Bytes,
    now: Moment,
    waste: &mut Option<Act>,
) -> Result<(Request, bool), Refusal> {
    let header = &frame.header;
    *waste = Some(Act::Malformed);
    let connection = &mut state.connections[at as usize];
    if header.request_id <= connection.last_id {
        return Err(Refusal::invalid(format!(
            "request ids must rise: expected more than {}, got {}",
            connection.last_id, header.request_id
        )));
    }
    connection.last_id = header.request_id;
    if let Some(refusal) = forbidden(connection, Role::Infer) {
        return Err(refusal);
    }
    let [requests, bytes] = [state.options.credit_requests.into(), state.options.credit_bytes];
    // What crossed a credit frame that lowered the window is refused and costs nothing: nobody is to blame.
    let beyond = connection.bytes_in_flight + u64::from(header.payload_len) > bytes;
    *waste = (beyond || u64::from(connection.requests_in_flight) >= requests).then_some(Act::BeyondCredit);
    check_credit(connection, header.payload_len, state.options.credit_requests)?;
    *waste = Some(Act::Malformed);
    let payload = frame.payload(data);
    let crc = crc32c::crc32c(payload);
    if crc != header.payload_crc {
        return Err(Refusal::new(
            Code::ChecksumMismatch,
            format!("the payload's CRC32C is {crc:#010x}, the header says {:#010x}", header.payload_crc),
        ));
    }
    let infer: Infer = decode_exact(frame.metadata(data)).map_err(|error| Refusal::invalid(error.message))?;
    *waste = Some(Act::Refused);
    let entry = state
        .catalog
        .by_handle(header.model)
        .ok_or_else(|| Refusal::new(Code::NotFound, format!("model handle {} is unknown", header.model.0)))?;
    let checked = entry.contract.check(&infer, payload)?;
    *waste = None;
    let deadline = deadline_of(&infer, now);
    if deadline.is_some_and(|deadline| deadline <= now) {
        return Err(Refusal::at_stage(Code::DeadlineExceeded, Stage::Arrival, "the deadline was over on arrival"));
    }
    let class = Class::from_priority(infer.priority);
    if let Some(throttle) = &mut connection.throttle
        && let Some(rest) = throttle.ask(now, header.model, class)
    {
        state.metrics().throttled();
        let message = "nearly everything that this connection asked for lately was refused, and it keeps asking";
        return Err(Refusal::overloaded(message, rest));
    }
    let mut in_quota = false;
    if let Some(seat) = &connection.seat {
        // Also what the scheduler refuses later has been used: asking is what is bounded here.
        let asked = Use {
            rows: checked.rows.into(),
            cells: u64::from(checked.rows) * u64::from(checked.len),
            bytes: header.payload_len.into(),
        };
        in_quota = seat
            .quota()
            .take(asked, now)
            .map_err(|exceeded| Refusal::quota_exceeded(exceeded.message, exceeded.retry_after))?;
    }
    let waiting = Waiting {
        connection: at,
        request_id: header.request_id,
        model: header.model,
        class,
        payload_bytes: header.payload_len,
        details: Details {
            timings: infer.flags & INFER_TIMINGS != 0,
            receipt: infer.flags & INFER_RECEIPT != 0,
            late_us: u32::try_from(infer.late_us).unwrap_or(u32::MAX), // more than an hour is an hour
        },
        items: infer.flags & INFER_ITEMS != 0,
        in_quota,
        trace: 0,
    };
    let key = state.in_flight.insert(waiting, &mut connection.owned).ok_or_else(|| {
        if let Some(seat) = connection.seat.as_ref().filter(|_| in_quota) {
            seat.quota().finished();
        }
        let message = format!("{} requests are in flight on this shard, its bound", state.options.in_flight_max);
        Refusal::overloaded(message, Duration::from_millis(10))
    })?;
    connection.requests_in_flight += 1;
    connection.bytes_in_flight += u64::from(header.payload_len);
    state.admitted += u64::from(header.payload_len);
    let trace = state.traces.begin(infer.trace, [checked.rows, checked.len], now, &state.telemetry);
    if trace != 0 {
        state.in_flight.set_trace(key, trace);
    }
    let request = Request {
        key,
        model: header.model,
        rows: checked.rows,
        len: checked.len,
        part: Part::whole(checked.rows),
        payload: data.slice(frame.payload_range()),
        received_at: now,
        deadline,
        compose: (infer.compose_tag != 0).then_some(Compose { tag: infer.compose_tag, rows: infer.compose_rows }),
        class,
        tenant: connection.tenant,
        truncated: checked.text && infer.flags & INFER_TRUNCATE != 0,
    };
    Ok((request, checked.text))
}

fn check_credit(connection: &Connection, payload: u32, requests: u32) -> Result<(), Refusal> {
    let bytes = connection.window_bytes;
    if connection.requests_in_flight >= requests {
        return Err(Refusal::overloaded(
            format!("the credit is {requests} requests in flight, all are used"),
            Duration::from_millis(1),
        ));
    }
    if connection.bytes_in_flight + u64::from(payload) > bytes {
        return Err(Refusal::overloaded(
            format!(
                "the credit is {bytes} bytes in flight, {} are used, {payload} more do not fit",
                connection.bytes_in_flight
            ),
            Duration::from_millis(1),
        ));
    }
    Ok(())
}

/// Deadlines travel as remaining time and are pinned to the monotonic clock on arrival.
fn deadline_of(infer: &Infer, now: Moment) -> Option<Moment> {
    let remaining = Duration::from_micros(infer.deadline_us);
    (infer.deadline_us != 0 && remaining <= DEADLINE_MAX).then(|| now + remaining)
}

/// Appends a goaway: nothing above `last_accepted_id` was or will be executed.
pub fn append_goaway(connection: &mut Connection, code: Code, message: &str) {
    let goaway = Goaway {
        code: code as u16,
        last_accepted_id: connection.last_id,
        version_min: PROTOCOL_MAJOR,
        version_max: PROTOCOL_MAJOR,
        message: cut(message, MESSAGE_MAX).to_owned(),
    };
    append_frame(connection.out.end(), Head::control(Kind::Goaway), &goaway, &[]).expect("a short sentence");
}
