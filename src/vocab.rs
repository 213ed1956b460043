//! The words all rooms share: moments, names of things inside the server, and the closed table of outcomes.
//!
//! Always true
//! - `Moment` is monotonic nanoseconds since the process started its clock; only `clock` makes one from the system.
//! - `Code` is wire-stable: numbers and names never change meaning, new ones are appended.
//! - A `TraceContext` that was parsed names a trace and a span.
//!
//! Elsewhere: dtypes and shapes (contract.rs), how an outcome travels (wire/message.rs).

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

/// A point on the server's monotonic clock, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Decode, bincode::Encode)]
pub struct Moment(pub u64);

impl Moment {
    pub const ZERO: Moment = Moment(0);
    pub const FAR: Moment = Moment(u64::MAX);

    pub fn from_nanos(nanos: u64) -> Moment {
        Moment(nanos)
    }

    pub fn nanos(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero when `earlier` is later (clocks of two threads may be read out of order).
    pub fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;

    /// Saturates at [`Moment::FAR`]: a deadline of 2^64 µs is "never", not an overflow.
    fn add(self, rhs: Duration) -> Moment {
        let nanos = u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX);
        Moment(self.0.saturating_add(nanos))
    }
}

impl Sub<Duration> for Moment {
    type Output = Moment;

    fn sub(self, rhs: Duration) -> Moment {
        let nanos = u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX);
        Moment(self.0.saturating_sub(nanos))
    }
}

/// A model's place in the server's list, negotiated once per connection and used in every frame header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Decode, bincode::Encode)]
pub struct ModelHandle(pub u16);

impl ModelHandle {
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Names one accepted request from any thread: a slot in its shard's in-flight table and the slot's generation.
///
/// The shard owns the slot. The first terminal outcome frees it and raises the generation, so a later outcome
/// for the same request (a result after its deadline, say) no longer matches and is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TicketKey {
    pub shard: u16,
    pub slot: u32,
    pub generation: u32,
}

/// Whether a model may have run a request that ended with some outcome. `Never` is a guarantee: such a request
/// can be retried blindly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Executed {
    Never = 0,
    Maybe = 1,
    Yes = 2,
}

/// What a caller may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Retry {
    /// Not as it is: the request itself has to change.
    No = 0,
    /// The same bytes to the same server.
    Same = 1,
    /// The same request to another replica.
    Elsewhere = 2,
    /// The same server, after `retry_after_ms`.
    After = 3,
    /// The client knows best (its own deadline or cancel ended the request).
    ClientDecides = 4,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal, $executed:ident, $retry:ident;)*) => {
        /// The closed table of outcomes. Every accepted request ends with exactly one of them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Code {
            $($(#[$doc])* $variant = $number,)*
        }

        impl Code {
            /// All codes, in the order of their numbers.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            pub fn from_number(number: u16) -> Option<Code> {
                match number {
                    $($number => Some(Code::$variant),)*
                    _ => None,
                }
            }

            /// The name used on the wire's page, in JSON, metrics and logs.
            pub fn name(self) -> &'static str {
                match self {
                    $(Code::$variant => $name,)*
                }
            }

            /// Whether a model may have run, unless the outcome itself says better.
            pub fn executed(self) -> Executed {
                match self {
                    $(Code::$variant => Executed::$executed,)*
                }
            }

            /// The default retry hint.
            pub fn retry(self) -> Retry {
                match self {
                    $(Code::$variant => Retry::$retry,)*
                }
            }
        }
    };
}

codes! {
    /// A result follows.
    Ok = 0, "ok", Yes, No;
    /// Name, dtype, rank, dimension, id or length is not what the contract says.
    InvalidArgument = 1, "invalid_argument", Never, No;
    /// Over a frame, tensor, item or batch budget.
    TooLarge = 2, "too_large", Never, No;
    /// The payload's CRC32C does not match: the bytes changed on the way.
    ChecksumMismatch = 3, "checksum_mismatch", Never, Same;
    Unauthenticated = 4, "unauthenticated", Never, No;
    PermissionDenied = 5, "permission_denied", Never, No;
    /// No such model or version.
    NotFound = 6, "not_found", Never, No;
    /// A tenant's limit.
    QuotaExceeded = 7, "quota_exceeded", Never, After;
    /// A queue or memory bound of the server.
    Overloaded = 8, "overloaded", Never, After;
    /// Shutting down, or the model is being unloaded.
    Draining = 9, "draining", Never, Elsewhere;
    DeadlineExceeded = 10, "deadline_exceeded", Maybe, ClientDecides;
    /// The client asked, or its connection ended.
    Cancelled = 11, "cancelled", Maybe, No;
    /// Panic, error, hang or lost device.
    ExecutorFailed = 12, "executor_failed", Maybe, Same;
    /// The item does not fit the device even alone.
    OutOfMemory = 13, "out_of_memory", Maybe, No;
    /// NaN or infinity in this item's result.
    NonFiniteOutput = 14, "non_finite_output", Yes, No;
    /// A broken invariant of ours; also counted as an alarm.
    Internal = 15, "internal", Maybe, Elsewhere;
    /// The byte stream itself is wrong: only ever in a goaway, never for one request.
    ProtocolError = 16, "protocol_error", Never, No;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where in its life a request was when a deadline or a cancel ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    None = 0,
    Arrival = 1,
    Queue = 2,
    Executing = 3,
    Writing = 4,
}

impl Stage {
    pub fn from_number(number: u8) -> Option<Stage> {
        Some(match number {
            0 => Stage::None,
            1 => Stage::Arrival,
            2 => Stage::Queue,
            3 => Stage::Executing,
            4 => Stage::Writing,
            _ => return None,
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Stage::None => "none",
            Stage::Arrival => "arrival",
            Stage::Queue => "queue",
            Stage::Executing => "executing",
            Stage::Writing => "writing",
        }
    }
}

/// A typed no. An ordinary answer: counted and sent, never logged as an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    pub stage: Stage,
    pub executed: Executed,
    pub retry: Retry,
    /// Only meaningful with [`Retry::After`]; 0 otherwise.
    pub retry_after_ms: u32,
    /// One sentence that says what was expected and what came. No paths, addresses or internal names.
    pub message: String,
}

impl Refusal {
    pub fn new(code: Code, message: impl Into<String>) -> Refusal {
        Refusal {
            code,
            stage: Stage::None,
            executed: code.executed(),
            retry: code.retry(),
            retry_after_ms: 0,
            message: message.into(),
        }
    }

    pub fn invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(Code::InvalidArgument, message)
    }

    pub fn too_large(message: impl Into<String>) -> Refusal {
        Refusal::new(Code::TooLarge, message)
    }

    pub fn overloaded(message: impl Into<String>, retry_after: Duration) -> Refusal {
        let mut refusal = Refusal::new(Code::Overloaded, message);
        refusal.retry_after_ms = u32::try_from(retry_after.as_millis().max(1)).unwrap_or(u32::MAX);
        refusal
    }

    /// A tenant has used what it may; after `retry_after`, rounded up, it may again.
    pub fn quota_exceeded(message: impl Into<String>, retry_after: Duration) -> Refusal {
        let mut refusal = Refusal::new(Code::QuotaExceeded, message);
        let millis = retry_after.as_nanos().div_ceil(1_000_000).max(1);
        refusal.retry_after_ms = u32::try_from(millis).unwrap_or(u32::MAX);
        refusal
    }

    /// The end of a request by deadline or cancel in a stage where it can be known that no model saw it.
    pub fn at_stage(code: Code, stage: Stage, message: impl Into<String>) -> Refusal {
        let mut refusal = Refusal::new(code, message);
        refusal.stage = stage;
        refusal.executed = match stage {
            Stage::Arrival | Stage::Queue => Executed::Never,
            Stage::None | Stage::Executing | Stage::Writing => refusal.executed,
        };
        refusal
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refusal {}

/// Element types on the wire and in contracts. Numbers are wire-stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DType {
    U8 = 1,
    I8 = 2,
    U16 = 3,
    I16 = 4,
    U32 = 5,
    I32 = 6,
    U64 = 7,
    I64 = 8,
    F16 = 9,
    BF16 = 10,
    F32 = 11,
    F64 = 12,
    /// UTF-8, one string per row: for each row its length in bytes as u32, then the bytes; no padding between rows.
    Text = 16,
}

impl DType {
    pub const ALL: [DType; 13] = [
        DType::U8,
        DType::I8,
        DType::U16,
        DType::I16,
        DType::U32,
        DType::I32,
        DType::U64,
        DType::I64,
        DType::F16,
        DType::BF16,
        DType::F32,
        DType::F64,
        DType::Text,
    ];

    pub fn from_number(number: u8) -> Option<DType> {
        DType::ALL.into_iter().find(|dtype| *dtype as u8 == number)
    }

    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::U8 => "u8",
            DType::I8 => "i8",
            DType::U16 => "u16",
            DType::I16 => "i16",
            DType::U32 => "u32",
            DType::I32 => "i32",
            DType::U64 => "u64",
            DType::I64 => "i64",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::Text => "text",
        }
    }

    /// Bytes of one element; 1 for text, whose elements are bytes.
    pub fn size(self) -> usize {
        match self {
            DType::U8 | DType::I8 | DType::Text => 1,
            DType::U16 | DType::I16 | DType::F16 | DType::BF16 => 2,
            DType::U32 | DType::I32 | DType::F32 => 4,
            DType::U64 | DType::I64 | DType::F64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the rows of a batch lie in memory. Numbers are wire-stable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, bincode::Decode, bincode::Encode)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Each row in a place of the batch's padded length.
    #[default]
    Padded = 0,
    /// End to end, without padding.
    Packed = 1,
}

impl Layout {
    pub fn from_number(number: u8) -> Option<Layout> {
        [Layout::Padded, Layout::Packed].into_iter().find(|layout| *layout as u8 == number)
    }

    pub fn name(self) -> &'static str {
        match self {
            Layout::Padded => "padded",
            Layout::Packed => "packed",
        }
    }
}

/// Why a batch was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SealReason {
    /// No further row fits the row or cell budget.
    Full = 1,
    /// An executor was idle and nothing said to hold the batch.
    Idle = 2,
    /// The oldest row has waited its promised time.
    QueueDelay = 3,
    /// A member's deadline leaves no more time to wait.
    Deadline = 4,
    /// The server is draining.
    Drain = 5,
    /// A test asked for exactly this composition.
    Composed = 6,
    /// A deadline in danger, or a row that has waited too long, went before the batch that would have been best; or the
    /// batch was made smaller for it.
    Urgent = 7,
    /// The next row is not expected soon enough to pay for the wait of those who are there.
    Economic = 8,
}

impl SealReason {
    pub const ALL: [SealReason; 8] = [
        SealReason::Full,
        SealReason::Idle,
        SealReason::QueueDelay,
        SealReason::Deadline,
        SealReason::Drain,
        SealReason::Composed,
        SealReason::Urgent,
        SealReason::Economic,
    ];

    pub fn from_number(number: u8) -> Option<SealReason> {
        SealReason::ALL.into_iter().find(|reason| *reason as u8 == number)
    }

    pub fn name(self) -> &'static str {
        match self {
            SealReason::Full => "full",
            SealReason::Idle => "idle",
            SealReason::QueueDelay => "queue_delay",
            SealReason::Deadline => "deadline",
            SealReason::Drain => "drain",
            SealReason::Composed => "composed",
            SealReason::Urgent => "urgent",
            SealReason::Economic => "economic",
        }
    }
}

/// When an executor did what with a batch, on the server's clock. Each moment is at or after the one before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The batch was packed and sent.
    pub packed_at: Moment,
    /// The executor had it.
    pub taken_at: Moment,
    /// The executor had all the memory that it needed for it, and began to ask its device.
    pub asked_at: Moment,
    /// Computing began, and ended.
    pub began_at: Moment,
    pub ended_at: Moment,
    /// The answers were in the host's memory.
    pub copied_at: Moment,
    /// The answers were mailed, and the executor had nothing more to do for it.
    pub answered_at: Moment,
    /// Time that its upload took.
    pub uploaded_in: Duration,
    /// Time that was computed between `began_at` and `ended_at`.
    pub computed_in: Duration,
    /// Cells that were computed, with those that a device adds; 0: it adds none.
    pub cells: u64,
}

/// Whose work a request is part of, as W3C Trace Context names it: the caller's trace and its span, which is the parent of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, bincode::Decode, bincode::Encode)]
pub struct TraceContext {
    pub trace_id: [u8; 16],
    /// Of the caller.
    pub span_id: [u8; 8],
    /// Bit 0: the caller records this trace. The others mean nothing here and travel on.
    pub flags: u8,
}

/// A text that is no `traceparent`: what was expected and what came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceParentError {
    pub message: String,
}

impl fmt::Display for TraceParentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TraceParentError {}

impl TraceContext {
    pub const SAMPLED: u8 = 0x01;

    /// Reads a `traceparent` as of <https://www.w3.org/TR/trace-context/>: version, trace id, span id and flags, in lower-case
    /// hexadecimal. Of a later version the first four parts are read, as that page says.
    pub fn parse(text: &str) -> Result<TraceContext, TraceParentError> {
        let wrong = |what: &str| {
            let got: String = text.chars().take(80).collect();
            let example = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
            TraceParentError { message: format!("traceparent: expected {what}, as in {example}, got {got:?}") }
        };
        let bytes = text.as_bytes();
        let dashes = bytes.len() >= 55 && [2, 35, 52].iter().all(|at| bytes[*at] == b'-');
        let version: [u8; 1] = dashes
            .then(|| from_hex(&bytes[..2]))
            .flatten()
            .ok_or_else(|| wrong("two, 32, 16 and two lower-case hexadecimal digits with dashes between them"))?;
        match (version[0], bytes.len()) {
            (0xFF, _) => return Err(wrong("a version below ff")),
            (0, 55) => {}
            (0, _) => return Err(wrong("55 characters in version 00")),
            _ if bytes.len() > 55 && bytes[55] != b'-' => return Err(wrong("a dash behind the flags")),
            _ => {}
        }
        let context = TraceContext {
            trace_id: from_hex(&bytes[3..35]).ok_or_else(|| wrong("a trace id of 32 lower-case hexadecimal digits"))?,
            span_id: from_hex(&bytes[36..52]).ok_or_else(|| wrong("a span id of 16 lower-case hexadecimal digits"))?,
            flags: from_hex::<1>(&bytes[53..55]).ok_or_else(|| wrong("flags of two hexadecimal digits"))?[0],
        };
        if context.is_valid() { Ok(context) } else { Err(wrong("a trace id and a span id other than zero")) }
    }

    /// Ids of nothing but zeros name nothing.
    pub fn is_valid(&self) -> bool {
        self.trace_id != [0; 16] && self.span_id != [0; 8]
    }

    pub fn is_sampled(&self) -> bool {
        self.flags & TraceContext::SAMPLED != 0
    }
}

/// As a `traceparent` of version 00.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace, span) = (u128::from_be_bytes(self.trace_id), u64::from_be_bytes(self.span_id));
        write!(f, "00-{trace:032x}-{span:016x}-{:02x}", self.flags)
    }
}

/// `None` where it is not twice as many lower-case hexadecimal digits.
fn from_hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_from_its_number_and_names_are_unique() {
        let mut names = std::collections::HashSet::new();
        for code in Code::ALL {
            assert_eq!(Code::from_number(*code as u16), Some(*code));
            assert!(names.insert(code.name()), "two codes are called {}", code.name());
        }
        assert_eq!(Code::from_number(999), None);
    }

    #[test]
    fn a_deadline_too_far_to_count_is_never() {
        assert_eq!(Moment(5) + Duration::from_secs(u64::MAX), Moment::FAR);
    }

    #[test]
    fn what_ends_in_the_queue_was_never_executed() {
        let refusal = Refusal::at_stage(Code::DeadlineExceeded, Stage::Queue, "late");
        assert_eq!(refusal.executed, Executed::Never);
        let refusal = Refusal::at_stage(Code::DeadlineExceeded, Stage::Executing, "late");
        assert_eq!(refusal.executed, Executed::Maybe);
    }

    #[test]
    fn a_traceparent_is_read_and_written_as_the_standard_says() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = TraceContext::parse(text).expect("the example of the standard");
        assert_eq!((context.trace_id[0], context.trace_id[15], context.span_id[7]), (0x4b, 0x36, 0xb7));
        assert!(context.is_sampled());
        assert_eq!(context.to_string(), text);
        let later = TraceContext::parse(&format!("cc{}-what-comes-later", &text[2..])).expect("a later version");
        assert_eq!(later, context);
        assert!(!TraceContext::parse(&format!("{}00", &text[..53])).expect("not recorded").is_sampled());
    }

    #[test]
    fn what_is_no_traceparent_is_an_error_that_says_what_came() {
        let right = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let wrong = [
            "",
            "00",
            &right[..54],
            &right.to_uppercase(),
            &format!("ff{}", &right[2..]),
            &format!("{right}-more"),
            &format!("cc{}x", &right[2..]),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0é",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
        ];
        for text in wrong {
            let error = TraceContext::parse(text).expect_err(text);
            assert!(error.message.contains("expected") && error.message.contains(&format!("{text:?}")), "{error}");
        }
    }
}
