//! The metadata of each kind of frame, and how it is encoded.
//!
//! Encoding: bincode 2.0.1, little-endian, fixed-width integers, at most [`super::Limits::METADATA_CEILING`] bytes. So: an
//! integer is its bytes; a list or string is a u64 count and then its elements; an option is a byte 0 or 1 and then
//! its value; a struct is its fields in order, with nothing between them.
//!
//! Always true
//! - Decoding consumes exactly the metadata; what is left over is an error.
//! - Lists have a fixed capacity in the type, so no count can ask for memory.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};

use crate::vocab::{Code, Executed, Refusal, Retry, Stage, TraceContext};

const METADATA_LIMIT: usize = super::Limits::METADATA_CEILING as usize;

type Config = Configuration<LittleEndian, Fixint, Limit<METADATA_LIMIT>>;

const CONFIG: Config =
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<METADATA_LIMIT>();

/// Most tensors in one request or result.
pub const TENSORS_MAX: usize = 8;
/// Most dimensions of a tensor, rows included.
pub const RANK_MAX: usize = 8;
/// Longest name or other string in metadata, in bytes.
pub const NAME_MAX: usize = 128;

/// Metadata that does not decode to exactly one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataError {
    pub message: String,
}

impl std::fmt::Display for MetadataError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MetadataError {}

/// Decodes one value that fills `bytes` exactly.
pub fn decode_exact<T: Decode<()>>(bytes: &[u8]) -> Result<T, MetadataError> {
    let (value, used) = bincode::decode_from_slice::<T, Config>(bytes, CONFIG)
        .map_err(|error| MetadataError { message: format!("malformed metadata: {error}") })?;
    if used != bytes.len() {
        return Err(MetadataError {
            message: format!("metadata has {} bytes, its message ends after {used}", bytes.len()),
        });
    }
    Ok(value)
}

/// Appends the encoding of `value` to `out`, whole or not at all. Fails only for a value over the metadata limit.
pub fn encode_into<T: Encode>(value: &T, out: &mut Vec<u8>) -> Result<(), MetadataError> {
    struct Sink<'a>(&'a mut Vec<u8>);
    impl bincode::enc::write::Writer for Sink<'_> {
        fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
            self.0.extend_from_slice(bytes);
            Ok(())
        }
    }
    let start = out.len();
    if let Err(error) = bincode::encode_into_writer(value, Sink(out), CONFIG) {
        out.truncate(start);
        return Err(MetadataError { message: format!("metadata does not encode: {error}") });
    }
    let len = out.len() - start;
    if len > METADATA_LIMIT {
        out.truncate(start);
        return Err(MetadataError { message: format!("metadata of {len} bytes is over {METADATA_LIMIT}") });
    }
    Ok(())
}

/// A list of at most `N` small values, kept in place. Encoded as any list: a u64 count, then the elements.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct List<T, const N: usize> {
    len: u8,
    items: [T; N],
}

impl<T: Copy + Default, const N: usize> List<T, N> {
    pub fn new() -> Self {
        List { len: 0, items: [T::default(); N] }
    }

    /// `None` when `values` has more than `N`.
    pub fn from_slice(values: &[T]) -> Option<Self> {
        let mut list = List::new();
        for value in values {
            list.push(*value).ok()?;
        }
        Some(list)
    }

    /// Gives the value back when the list is full.
    pub fn push(&mut self, value: T) -> Result<(), T> {
        let at = usize::from(self.len);
        if at == N {
            return Err(value);
        }
        self.items[at] = value;
        self.len += 1;
        Ok(())
    }
}

impl<T: Copy + Default, const N: usize> Default for List<T, N> {
    fn default() -> Self {
        List::new()
    }
}

impl<T, const N: usize> std::ops::Deref for List<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items[..usize::from(self.len)]
    }
}

impl<T: std::fmt::Debug, const N: usize> std::fmt::Debug for List<T, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<T: Encode, const N: usize> Encode for List<T, N> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        (self.len() as u64).encode(encoder)?;
        self.iter().try_for_each(|item| item.encode(encoder))
    }
}

impl<Context, T: Decode<Context> + Copy + Default, const N: usize> Decode<Context> for List<T, N> {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let count = u64::decode(decoder)?;
        if count > N as u64 {
            return Err(DecodeError::OtherString(format!("a list of {count} elements, at most {N} are allowed")));
        }
        let mut list = List::new();
        for _ in 0..count {
            let pushed = list.push(T::decode(decoder)?);
            debug_assert!(pushed.is_ok(), "count was checked against the capacity");
        }
        Ok(list)
    }
}

impl<'de, Context, T: Decode<Context> + Copy + Default, const N: usize> BorrowDecode<'de, Context> for List<T, N> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Decode::decode(decoder)
    }
}

/// First frame of a client. Names the protocol versions it speaks; `token` is empty where no authentication is used.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    pub version_min: u8,
    pub version_max: u8,
    /// Bit set of optional features the client understands; none are defined in version 1.
    pub features: u64,
    /// Free text for logs, at most [`NAME_MAX`] bytes.
    pub client: String,
    /// Whose quota the connection counts against; empty for the default tenant.
    pub tenant: String,
    pub token: Vec<u8>,
}

/// The server's answer: the version both will speak, its limits, and the first grant of credit.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HelloAck {
    pub version: u8,
    pub features: u64,
    pub server: String,
    pub metadata_bytes_max: u32,
    pub payload_bytes_max: u32,
    /// Requests that may be in flight on this connection.
    pub credit_requests: u32,
    /// Payload bytes that may be in flight on this connection.
    pub credit_bytes: u64,
}

/// Asks for one model's handle and contract; an empty name asks for the list of models.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Describe {
    pub model: String,
    /// Empty: the version that serves by default.
    pub version: String,
}

/// Answer to describe. The payload is a JSON document: the contract, or the list of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Description {
    pub handle: u16,
    /// Changes whenever anything a caller depends on changes. 0 for the list of models.
    pub contract_hash: u64,
}

/// One tensor's place in a payload. `dims[0]` is the number of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct TensorMeta {
    /// Position in the contract's list of inputs or outputs.
    pub index: u8,
    /// A `DType` by number.
    pub dtype: u8,
    pub dims: List<u32, RANK_MAX>,
}

pub const INFER_TIMINGS: u8 = 0x01;
pub const INFER_TRUNCATE: u8 = 0x02;
pub const INFER_ITEMS: u8 = 0x04;
pub const INFER_RECEIPT: u8 = 0x08;
pub const INFER_FLAGS_KNOWN: u8 = INFER_TIMINGS | INFER_TRUNCATE | INFER_ITEMS | INFER_RECEIPT;

/// A request. Tensor bytes follow as the payload, in ascending `index`, each at the next multiple of 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Infer {
    /// Remaining time in microseconds when the frame was sent; 0 for none.
    pub deadline_us: u64,
    /// 0 is the highest; used by priority policies.
    pub priority: u8,
    /// Bit set: `INFER_TIMINGS` asks for the timeline in the reply, `INFER_TRUNCATE` allows over-long text to be cut,
    /// `INFER_ITEMS` has rows answered as they are done, by items, `INFER_RECEIPT` asks for the timeline and the receipt.
    pub flags: u8,
    /// For tests: requests of one model with the same non-zero tag form exactly one batch, closed when their rows add
    /// up to `compose_rows`. 0 for none.
    pub compose_tag: u64,
    pub compose_rows: u32,
    /// How much later than intended the frame was sent, in microseconds and at least 1; 0: not stated.
    pub late_us: u64,
    /// The caller's span, to be the parent of the server's.
    pub trace: Option<TraceContext>,
    pub inputs: List<TensorMeta, TENSORS_MAX>,
}

/// Where the server's time went, in nanoseconds. The parts add up to the time from the last byte read to the reply
/// written into the connection's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Timings {
    /// Received to admitted by the scheduler (parse, validate, mailbox; for text, tokenization).
    pub admit_ns: u64,
    /// Admitted to sealed.
    pub queue_ns: u64,
    /// Sealed to packed into the staging buffer.
    pub pack_ns: u64,
    /// Packed to started on the executor.
    pub wait_ns: u64,
    /// The model.
    pub run_ns: u64,
    /// Finished to encoded for the connection.
    pub scatter_ns: u64,
}

impl Timings {
    pub fn total_ns(&self) -> u64 {
        self.admit_ns + self.queue_ns + self.pack_ns + self.wait_ns + self.run_ns + self.scatter_ns
    }
}

/// Most lengths of co-members in a receipt.
pub const CO_LENS_MAX: usize = 64;

/// What came of a request, and why: its batch, and what its time in the queue was spent on. Of a request that ran in parts,
/// the last part's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Receipt {
    /// Number of the executor that ran the batch.
    pub executor: u16,
    /// 0: rows were padded to `padded_len`; 1: they lay end to end.
    pub layout: u8,
    /// Its own rows in this batch, and how long each was.
    pub rows: u32,
    pub len: u32,
    /// Rows that would have fitted at this padded length.
    pub rows_possible: u32,
    /// Cells of the batch that carry data, and all that were computed.
    pub cells_real: u64,
    pub cells_padded: u64,
    /// Of the cells that carry nothing, those behind its own rows.
    pub cells_own_padding: u64,
    /// Of the time in the queue: an executor could have run it, and the policy waited for others to join.
    pub held_ns: u64,
    /// Of the time in the queue: every executor that could run it was running something else.
    pub behind_ns: u64,
    /// Of the time in the queue: its model had its share of the executors, or its composition was not complete.
    pub other_ns: u64,
    /// Of the wait for the executor: on a device, copying its batch there. 0 on a processor.
    pub upload_ns: u64,
    /// Of the run: on a device, copying the answers back. 0 on a processor.
    pub readback_ns: u64,
    /// How long the batch was expected to take, when it was sealed; 0 where nothing was known.
    pub predicted_ns: u64,
    /// How much later than intended its caller said that it sent it, in microseconds; 0: not stated. Before it was received, so no
    /// part of the timings.
    pub late_us: u64,
    /// Other requests in the batch.
    pub co_members: u32,
    /// How long their rows were, in the batch's order: of the first [`CO_LENS_MAX`].
    pub co_lens: List<u32, CO_LENS_MAX>,
}

/// A result. Tensor bytes follow as the payload, laid out as in a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct InferResult {
    /// The batch that carried the request, counted from the server's start.
    pub batch: u64,
    pub batch_rows: u32,
    /// Length that every row was padded to.
    pub padded_len: u32,
    /// A `SealReason` by number.
    pub seal_reason: u8,
    /// Bit 0: text was truncated, as allowed.
    pub flags: u8,
    /// Generation of the policy that decided the batch.
    pub generation: u32,
    pub outputs: List<TensorMeta, TENSORS_MAX>,
    pub timings: Option<Timings>,
    /// Boxed, so that answers without one stay small.
    pub receipt: Option<Box<Receipt>>,
}

pub const RESULT_TRUNCATED: u8 = 0x01;

/// Some rows of a request that asked for them as they are done. Tensor bytes follow as in a result, of these rows only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Item {
    /// The first of them among the request's.
    pub at_row: u32,
    /// As of a result; its timings and receipt are always absent: the result at the end has them.
    pub result: InferResult,
}

/// A request that ended without a result.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ErrorMessage {
    /// A `Code` by number.
    pub code: u16,
    /// A `Stage` by number.
    pub stage: u8,
    /// 0 never, 1 maybe, 2 yes.
    pub executed: u8,
    /// 0 no, 1 same, 2 elsewhere, 3 after `retry_after_ms`, 4 the client decides.
    pub retry: u8,
    pub retry_after_ms: u32,
    pub message: String,
}

/// Longest sentence sent in an error or goaway, in bytes; longer ones are cut at a character.
pub const MESSAGE_MAX: usize = 1024;

/// `text` cut to at most `max` bytes at a character boundary.
pub fn cut(text: &str, max: usize) -> &str {
    if text.len() <= max {
        return text;
    }
    let mut end = max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl ErrorMessage {
    pub fn from_refusal(refusal: &Refusal) -> ErrorMessage {
        ErrorMessage {
            code: refusal.code as u16,
            stage: refusal.stage as u8,
            executed: refusal.executed as u8,
            retry: refusal.retry as u8,
            retry_after_ms: refusal.retry_after_ms,
            message: cut(&refusal.message, MESSAGE_MAX).to_owned(),
        }
    }

    /// `Err` names the field whose number this version does not know.
    pub fn to_refusal(&self) -> Result<Refusal, MetadataError> {
        let unknown =
            |field: &str, value: u64| MetadataError { message: format!("unknown {field} {value} in an error") };
        Ok(Refusal {
            code: Code::from_number(self.code).ok_or_else(|| unknown("code", self.code.into()))?,
            stage: Stage::from_number(self.stage).ok_or_else(|| unknown("stage", self.stage.into()))?,
            executed: match self.executed {
                0 => Executed::Never,
                1 => Executed::Maybe,
                2 => Executed::Yes,
                other => return Err(unknown("executed", other.into())),
            },
            retry: match self.retry {
                0 => Retry::No,
                1 => Retry::Same,
                2 => Retry::Elsewhere,
                3 => Retry::After,
                4 => Retry::ClientDecides,
                other => return Err(unknown("retry", other.into())),
            },
            retry_after_ms: self.retry_after_ms,
            message: self.message.clone(),
        })
    }
}

/// Changes the window: these totals replace the ones in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Credit {
    pub requests: u32,
    pub bytes: u64,
}

/// The sender will accept nothing more on this connection. What was accepted is still answered; requests with ids
/// above `last_accepted_id` were never executed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Goaway {
    /// A `Code` by number: `draining`, `protocol_error`, `unauthenticated`…
    pub code: u16,
    pub last_accepted_id: u64,
    pub version_min: u8,
    pub version_max: u8,
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensor(dims: &[u32]) -> TensorMeta {
        TensorMeta { index: 0, dtype: 5, dims: List::from_slice(dims).expect("few dims") }
    }

    #[test]
    fn an_infer_comes_back_as_it_was() {
        let trace = Some(TraceContext { trace_id: [7; 16], span_id: [8; 8], flags: 1 });
        let mut infer =
            Infer { deadline_us: 9, compose_tag: 3, compose_rows: 2, late_us: 4, trace, ..Infer::default() };
        infer.inputs.push(tensor(&[1, 7])).expect("room");
        let mut bytes = Vec::new();
        encode_into(&infer, &mut bytes).expect("small");
        assert_eq!(decode_exact::<Infer>(&bytes).expect("just encoded"), infer);
    }

    #[test]
    fn bytes_left_over_are_an_error() {
        let mut bytes = Vec::new();
        encode_into(&Credit { requests: 1, bytes: 2 }, &mut bytes).expect("small");
        bytes.push(0);
        let error = decode_exact::<Credit>(&bytes).expect_err("one byte too many");
        assert!(error.message.contains("ends after 12"), "{error}");
    }

    #[test]
    fn a_count_beyond_the_capacity_is_an_error_before_its_elements_are_read() {
        let mut bytes = vec![0; 8 + 1 + 1 + 8 + 4 + 8 + 1];
        bytes.extend_from_slice(&u64::MAX.to_le_bytes());
        let error = decode_exact::<Infer>(&bytes).expect_err("2^64-1 tensors");
        assert!(error.message.contains("at most 8"), "{error}");
    }

    #[test]
    fn length_bombs_end_in_an_error_without_allocating() {
        for count in [1u64 << 12, 1 << 45, u64::MAX] {
            let mut bytes = vec![1, 1];
            bytes.extend_from_slice(&0u64.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            assert!(decode_exact::<Hello>(&bytes).is_err(), "a string of {count} bytes");
        }
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            macro_rules! check {
                ($($ty:ty),*) => {$(
                    if let Ok(value) = decode_exact::<$ty>(&bytes) {
                        let mut again = Vec::new();
                        encode_into(&value, &mut again).expect("it was within the limit");
                        prop_assert_eq!(&again, &bytes);
                    }
                )*};
            }
            check!(Hello, HelloAck, Describe, Description, Infer, InferResult, ErrorMessage, Credit, Goaway);
        }
    }

    #[test]
    fn the_total_of_a_request_is_the_sum_of_all_six_parts() {
        let timings =
            Timings { admit_ns: 1, queue_ns: 10, pack_ns: 100, wait_ns: 1000, run_ns: 10_000, scatter_ns: 100_000 };
        assert_eq!(timings.total_ns(), 111_111);
    }

    #[test]
    fn a_full_list_gives_the_next_value_back() {
        let mut list: List<u32, 3> = List::new();
        for value in [7, 8, 9] {
            assert_eq!(list.push(value), Ok(()));
        }
        assert_eq!(list.push(10), Err(10));
        assert_eq!(&*list, [7, 8, 9]);
        assert_eq!(format!("{list:?}"), "[7, 8, 9]");
        assert_eq!(List::from_slice(&[7, 8, 9]), Some(list));
        assert_eq!(List::<u32, 3>::from_slice(&[7, 8, 9, 10]), None);
    }

    #[test]
    fn a_refusal_comes_back_from_its_message_and_unknown_numbers_are_named() {
        let mut refusal = Refusal::overloaded("the queue is full", std::time::Duration::from_millis(7));
        for executed in [Executed::Never, Executed::Maybe, Executed::Yes] {
            for retry in [Retry::No, Retry::Same, Retry::Elsewhere, Retry::After, Retry::ClientDecides] {
                (refusal.executed, refusal.retry) = (executed, retry);
                assert_eq!(ErrorMessage::from_refusal(&refusal).to_refusal().as_ref(), Ok(&refusal));
            }
        }
        let sent = ErrorMessage::from_refusal(&refusal);
        for (what, message) in [
            ("unknown code 65535 in an error", ErrorMessage { code: u16::MAX, ..sent.clone() }),
            ("unknown stage 255 in an error", ErrorMessage { stage: u8::MAX, ..sent.clone() }),
            ("unknown executed 3 in an error", ErrorMessage { executed: 3, ..sent.clone() }),
            ("unknown retry 5 in an error", ErrorMessage { retry: 5, ..sent.clone() }),
        ] {
            assert_eq!(message.to_refusal().expect_err("unknown").to_string(), what);
        }
        refusal.message = "é".repeat(600);
        assert_eq!(ErrorMessage::from_refusal(&refusal).message, "é".repeat(512), "1,024 bytes");
    }
}
