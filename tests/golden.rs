//! The bytes of the wire, fixed: every file of tests/golden is one frame, and a changed byte is a protocol change.
//!
//! A file is made of a title (`## …`, one or more lines) and then, field by field, a line `# OFFSET meaning` with the
//! field's bytes in hex on the lines below it. The offset is checked, so that the comments stay with their bytes.
//! The bytes were made by a program of another language, written from src/wire/WIRE.md, not by the encoder under test.
//!
//! Always true
//! - Each file has one value here and each value one file; neither can be added without the other.
//! - Decoding the bytes gives the value, encoding the value gives the bytes.

use std::collections::BTreeMap;
use std::path::Path;

use bincode::{Decode, Encode};
use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::vocab::{Code, DType, Executed, Layout, ModelHandle, Refusal, Retry, SealReason, Stage, TraceContext};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, LongFrame, append_bare, append_frame, append_frame_with, pad_to_8};
use ferry::wire::frame::FLAG_OPTIONAL;
use ferry::wire::message::{
    Credit, Describe, Description, ErrorMessage, Goaway, Hello, HelloAck, INFER_TIMINGS, INFER_TRUNCATE, Infer,
    InferResult, Item, List, RESULT_TRUNCATED, Receipt, TensorMeta, Timings, decode_exact,
};
use ferry::wire::{Decoder, Header, Kind, Limits};

/// The bytes of one golden file; panics where the file is not of the form described above.
fn bytes_of(text: &str, file: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut lines = text.lines().peekable();
    let mut titles = 0;
    while lines.next_if(|line| line.starts_with("## ")).is_some() {
        titles += 1;
    }
    assert!(titles > 0, "{file} has no title");
    while let Some(line) = lines.next() {
        let field = line.strip_prefix("# ").unwrap_or_else(|| panic!("{file}: {line:?} is not `# OFFSET meaning`"));
        let (offset, meaning) = field.split_once(' ').unwrap_or_else(|| panic!("{file}: {line:?} has no meaning"));
        assert_eq!(offset.parse(), Ok(bytes.len()), "{file}: the offset in {line:?}");
        assert!(!meaning.trim().is_empty(), "{file}: {line:?} has no meaning");
        let start = bytes.len();
        while let Some(hex) = lines.next_if(|line| !line.starts_with('#')) {
            for byte in hex.split_ascii_whitespace() {
                assert_eq!(byte.len(), 2, "{file}: {byte:?} is not one byte in hex");
                bytes.push(u8::from_str_radix(byte, 16).unwrap_or_else(|_| panic!("{file}: {byte:?} is not hex")));
            }
        }
        assert!(bytes.len() > start, "{file}: {line:?} has no bytes");
    }
    bytes
}

/// All golden files, by name without the ending.
fn files() -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).expect("tests/golden is in the repository") {
        let path = entry.expect("the folder can be listed").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("golden files have plain names");
        let stem = name.strip_suffix(".txt").unwrap_or_else(|| panic!("tests/golden/{name} is a stray file"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        files.insert(stem.to_owned(), bytes_of(&text, name));
    }
    files
}

/// Panics where the bytes are not what was expected.
type Check = dyn Fn(&[u8]);

/// What one file is expected to be, and the check that it is.
struct Golden {
    name: &'static str,
    check: Box<Check>,
}

/// A frame of `value` and `payload`.
fn golden<M>(name: &'static str, kind: Kind, model: u16, request_id: u64, value: M, payload: Vec<u8>) -> Golden
where
    M: Encode + Decode<()> + PartialEq + std::fmt::Debug + 'static,
{
    let head = Head { kind, model: ModelHandle(model), request_id };
    let check = move |bytes: &[u8]| {
        let step = Decoder::new(Limits::DEFAULT).next(bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let Step::Frame(frame) = step else { panic!("{name} is not a frame: {step:?}") };
        assert_eq!(frame.kind, kind, "{name}");
        assert_eq!(frame.len, bytes.len(), "{name}: bytes behind the frame");
        assert_eq!(frame.header.flags, 0, "{name}");
        assert_eq!(frame.header.model, head.model, "{name}");
        assert_eq!(frame.header.request_id, request_id, "{name}");
        assert!(frame.payload_is_intact(bytes), "{name}: checksum of the payload");
        assert_eq!(frame.payload(bytes), payload, "{name}: payload");
        let decoded: M = decode_exact(frame.metadata(bytes)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(decoded, value, "{name}: metadata");
        let mut again = Vec::new();
        append_frame(&mut again, head, &value, &payload).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(again, bytes, "{name}: the encoder writes other bytes");
    };
    Golden { name, check: Box::new(check) }
}

/// A frame that is its header.
fn golden_bare(name: &'static str, kind: Kind, request_id: u64) -> Golden {
    let Golden { check, .. } = golden(name, kind, 0, request_id, (), Vec::new());
    let check = move |bytes: &[u8]| {
        check(bytes);
        let mut again = Vec::new();
        append_bare(&mut again, Head { kind, model: ModelHandle(0), request_id });
        assert_eq!(again, bytes, "{name}: append_bare writes other bytes");
    };
    Golden { name, check: Box::new(check) }
}

fn tensors(all: &[(DType, &[u32])]) -> List<TensorMeta, 8> {
    let mut list = List::new();
    for (index, (dtype, dims)) in all.iter().enumerate() {
        let dims = List::from_slice(dims).expect("at most 8 dimensions");
        list.push(TensorMeta { index: index as u8, dtype: *dtype as u8, dims }).expect("at most 8 tensors");
    }
    list
}

/// Tensor bytes one behind the other, each at a multiple of 8.
fn laid_out(tensors: &[&[u8]]) -> Vec<u8> {
    let mut payload = Vec::new();
    for bytes in tensors {
        pad_to_8(&mut payload, 0);
        payload.extend_from_slice(bytes);
    }
    payload
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn echo_contract() -> Contract {
    let tensor = |range| TensorSpec {
        name: "tokens".into(),
        dtype: DType::U32,
        shape: vec![Dim::Named("length".into())],
        pad: 0.0,
        range,
        nonfinite: NonFinite::Refuse,
    };
    Contract {
        name: "echo".into(),
        version: "1".into(),
        architecture: "echo".into(),
        inputs: vec![tensor(Some([0, 999]))],
        outputs: vec![tensor(None)],
        length: Some(Length { name: "length".into(), min: 1, max: 512 }),
        text: None,
        rows_max: 8,
    }
    .checked()
    .expect("a sound contract")
}

fn goldens() -> Vec<Golden> {
    let contract = echo_contract();
    let contract_json = serde_json::to_vec(&contract).expect("plain data");
    let list_json = format!(
        r#"{{"models":[{{"name":"echo","version":"1","handle":1,"contract_hash":{},"ready":true}}]}}"#,
        contract.hash()
    );
    let describe = |model: &str, version: &str| Describe { model: model.into(), version: version.into() };
    let refusal = |refusal: Refusal| ErrorMessage::from_refusal(&refusal);
    let integers: [(DType, &[u8]); 8] = [
        (DType::U8, &200u8.to_le_bytes()),
        (DType::I8, &(-2i8).to_le_bytes()),
        (DType::U16, &60_000u16.to_le_bytes()),
        (DType::I16, &(-300i16).to_le_bytes()),
        (DType::U32, &4_000_000_000u32.to_le_bytes()),
        (DType::I32, &(-70_000i32).to_le_bytes()),
        (DType::U64, &u64::MAX.to_le_bytes()),
        (DType::I64, &i64::MIN.to_le_bytes()),
    ];
    let mut overloaded = Refusal::new(Code::Overloaded, "the queue of echo is full");
    overloaded.retry_after_ms = 25;
    assert_eq!((overloaded.executed, overloaded.retry), (Executed::Never, Retry::After));

    vec![
        golden(
            "hello",
            Kind::Hello,
            0,
            0,
            Hello {
                version_min: 1,
                version_max: 1,
                features: 0,
                client: "ferry-test".into(),
                tenant: String::new(),
                token: vec![],
            },
            vec![],
        ),
        golden(
            "hello_token",
            Kind::Hello,
            0,
            0,
            Hello {
                version_min: 1,
                version_max: 3,
                features: 1 << 63,
                client: "näher".into(),
                tenant: "blue".into(),
                token: vec![0x00, 0xFF, 0x10],
            },
            vec![],
        ),
        golden(
            "hello_ack",
            Kind::HelloAck,
            0,
            0,
            HelloAck {
                version: 1,
                features: 0,
                server: "ferry 0.1.0".into(),
                metadata_bytes_max: 4096,
                payload_bytes_max: 16 << 20,
                credit_requests: 256,
                credit_bytes: 64 << 20,
            },
            vec![],
        ),
        golden("describe", Kind::Describe, 0, 1, describe("echo", ""), vec![]),
        golden("describe_version", Kind::Describe, 0, 2, describe("digits", "2"), vec![]),
        golden("describe_list", Kind::Describe, 0, 3, describe("", ""), vec![]),
        golden(
            "description",
            Kind::Description,
            1,
            1,
            Description { handle: 1, contract_hash: contract.hash() },
            contract_json,
        ),
        golden(
            "description_list",
            Kind::Description,
            0,
            3,
            Description { handle: 0, contract_hash: 0 },
            list_json.into_bytes(),
        ),
        golden(
            "infer_echo",
            Kind::Infer,
            1,
            2,
            Infer { inputs: tensors(&[(DType::U32, &[1, 3])]), ..Infer::default() },
            u32s(&[7, 8, 9]),
        ),
        golden(
            "infer_options",
            Kind::Infer,
            7,
            0x0123_4567_89AB_CDEF,
            Infer {
                deadline_us: 250_000,
                priority: 3,
                flags: INFER_TIMINGS | INFER_TRUNCATE,
                compose_tag: 0xFEED,
                compose_rows: 5,
                late_us: 1500,
                trace: Some(
                    TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
                        .expect("as in the standard"),
                ),
                inputs: tensors(&[(DType::U8, &[2, 3]), (DType::F32, &[2, 1])]),
            },
            laid_out(&[&[1, 2, 3, 4, 5, 6], &f32s(&[0.5, -1.0])]),
        ),
        golden(
            "infer_text",
            Kind::Infer,
            3,
            9,
            Infer {
                deadline_us: 1_000_000,
                flags: INFER_TRUNCATE,
                inputs: List::from_slice(&[TensorMeta {
                    index: 1,
                    dtype: DType::Text as u8,
                    dims: List::from_slice(&[1]).expect("one dimension"),
                }])
                .expect("one tensor"),
                ..Infer::default()
            },
            [&6u32.to_le_bytes()[..], "héllo".as_bytes()].concat(),
        ),
        golden(
            "infer_floats",
            Kind::Infer,
            4,
            10,
            Infer {
                inputs: tensors(&[
                    (DType::F16, &[1, 1]),
                    (DType::BF16, &[1, 1]),
                    (DType::F32, &[1, 1]),
                    (DType::F64, &[1, 1]),
                ]),
                ..Infer::default()
            },
            laid_out(&[&[0x00, 0x3E], &[0xC0, 0x3F], &1.5f32.to_le_bytes(), &1.5f64.to_le_bytes()]),
        ),
        golden(
            "result",
            Kind::Result,
            1,
            2,
            InferResult {
                batch: 41,
                batch_rows: 4,
                padded_len: 8,
                seal_reason: SealReason::Idle as u8,
                flags: 0,
                generation: 1,
                outputs: tensors(&[(DType::U32, &[1, 3])]),
                timings: None,
                receipt: None,
            },
            u32s(&[7, 8, 9]),
        ),
        golden(
            "item",
            Kind::Item,
            1,
            2,
            Item {
                at_row: 64,
                result: InferResult {
                    batch: 44,
                    batch_rows: 64,
                    padded_len: 3,
                    seal_reason: SealReason::Full as u8,
                    flags: 0,
                    generation: 3,
                    outputs: tensors(&[(DType::U32, &[2, 3])]),
                    timings: None,
                    receipt: None,
                },
            },
            u32s(&[7, 8, 9, 10, 11, 12]),
        ),
        golden(
            "result_timings",
            Kind::Result,
            3,
            9,
            InferResult {
                batch: 42,
                batch_rows: 1,
                padded_len: 16,
                seal_reason: SealReason::QueueDelay as u8,
                flags: RESULT_TRUNCATED,
                generation: 2,
                outputs: tensors(&[(DType::F32, &[1, 2])]),
                timings: Some(Timings {
                    admit_ns: 1000,
                    queue_ns: 2_000_000,
                    pack_ns: 300,
                    wait_ns: 40,
                    run_ns: 5_000_000,
                    scatter_ns: 600,
                }),
                receipt: None,
            },
            f32s(&[0.25, -2.0]),
        ),
        golden(
            "result_receipt",
            Kind::Result,
            3,
            15,
            InferResult {
                batch: 45,
                batch_rows: 4,
                padded_len: 9,
                seal_reason: SealReason::QueueDelay as u8,
                flags: 0,
                generation: 2,
                outputs: tensors(&[(DType::F32, &[1, 2])]),
                timings: Some(Timings {
                    admit_ns: 1000,
                    queue_ns: 2_000_000,
                    pack_ns: 300,
                    wait_ns: 90_000,
                    run_ns: 5_000_000,
                    scatter_ns: 600,
                }),
                receipt: Some(Box::new(Receipt {
                    executor: 1,
                    layout: Layout::Padded as u8,
                    rows: 1,
                    len: 5,
                    rows_possible: 16,
                    cells_real: 25,
                    cells_padded: 36,
                    cells_own_padding: 4,
                    held_ns: 1_500_000,
                    behind_ns: 499_000,
                    other_ns: 1000,
                    upload_ns: 40_000,
                    readback_ns: 7000,
                    predicted_ns: 4_800_000,
                    late_us: 1500,
                    co_members: 2,
                    co_lens: List::from_slice(&[9, 3]).expect("two"),
                })),
            },
            f32s(&[0.25, -2.0]),
        ),
        golden(
            "result_integers",
            Kind::Result,
            5,
            11,
            InferResult {
                batch: 43,
                batch_rows: 1,
                padded_len: 1,
                seal_reason: SealReason::Composed as u8,
                flags: 0,
                generation: 1,
                outputs: tensors(&integers.map(|(dtype, _)| (dtype, &[1u32][..]))),
                timings: None,
                receipt: None,
            },
            laid_out(&integers.map(|(_, bytes)| bytes)),
        ),
        golden("error_overloaded", Kind::Error, 1, 12, refusal(overloaded), vec![]),
        golden(
            "error_invalid",
            Kind::Error,
            1,
            13,
            refusal(Refusal::invalid("input größe: expected shape [rows, 8], got [1, 9]")),
            vec![],
        ),
        golden(
            "error_deadline",
            Kind::Error,
            1,
            14,
            refusal(Refusal::at_stage(Code::DeadlineExceeded, Stage::Executing, "")),
            vec![],
        ),
        golden_bare("cancel", Kind::Cancel, 14),
        golden_bare("ping", Kind::Ping, 7),
        golden_bare("pong", Kind::Pong, 7),
        golden("credit", Kind::Credit, 0, 0, Credit { requests: 64, bytes: 1 << 20 }, vec![]),
        golden(
            "goaway_draining",
            Kind::Goaway,
            0,
            0,
            Goaway {
                code: Code::Draining as u16,
                last_accepted_id: 14,
                version_min: 1,
                version_max: 1,
                message: "the server is shutting down".into(),
            },
            vec![],
        ),
        golden(
            "goaway_protocol",
            Kind::Goaway,
            0,
            0,
            Goaway {
                code: Code::ProtocolError as u16,
                last_accepted_id: 0,
                version_min: 1,
                version_max: 1,
                message: "expected protocol version 1, got 2".into(),
            },
            vec![],
        ),
        golden_bare("stats", Kind::Stats, 15),
        golden("stats_reply", Kind::StatsReply, 0, 15, (), br#"{"accepted":2}"#.to_vec()),
        Golden { name: "unknown_optional", check: Box::new(check_unknown_optional) },
    ]
}

/// No message of ours makes this frame, so it is put together from its header.
fn check_unknown_optional(bytes: &[u8]) {
    let step = Decoder::new(Limits::DEFAULT).next(bytes).expect("it may be skipped");
    assert_eq!(step, Step::Skip { len: bytes.len() });
    let (metadata, payload) = ([1, 2], [3]);
    let header = Header {
        kind: 200,
        flags: FLAG_OPTIONAL,
        model: ModelHandle(0),
        request_id: 0,
        metadata_len: 2,
        payload_len: 1,
        payload_crc: crc32c::crc32c(&payload),
        head_crc: 0,
    };
    assert_eq!([&header.encode(&metadata)[..], &metadata, &payload].concat(), bytes);
}

#[test]
fn every_golden_file_is_its_value_and_every_value_its_file() {
    let mut files = files();
    for Golden { name, check } in goldens() {
        let bytes = files.remove(name).unwrap_or_else(|| panic!("tests/golden/{name}.txt is missing"));
        check(&bytes);
    }
    assert!(files.is_empty(), "no value is known for {:?}", files.keys());
}

#[test]
fn every_kind_has_a_golden_file() {
    let mut kinds: Vec<u8> = files().values().map(|bytes| bytes[4]).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let expected: Vec<u8> = Kind::ALL.iter().map(|kind| *kind as u8).collect();
    assert_eq!(kinds[..kinds.len() - 1], expected[..], "and one of an unknown kind behind them");
}

#[test]
fn a_change_of_any_byte_of_any_golden_file_is_noticed() {
    let files = files();
    let mut unnoticed = Vec::new();
    for Golden { name, check } in goldens() {
        let bytes = &files[name];
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x01;
            // The worst case: whoever changed the byte mended the checksums too.
            for mend in [false, true] {
                if mend {
                    let payload_at = 32 + u32::from_le_bytes(bytes[16..20].try_into().expect("4 bytes")) as usize;
                    let payload_crc = crc32c::crc32c(&changed[payload_at..]);
                    changed[24..28].copy_from_slice(&payload_crc.to_le_bytes());
                    let head_crc = crc32c::crc32c_append(crc32c::crc32c(&changed[..28]), &changed[32..payload_at]);
                    changed[28..32].copy_from_slice(&head_crc.to_le_bytes());
                }
                if changed == *bytes {
                    continue; // the changed byte was of a checksum, and mended
                }
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&changed))).is_ok() {
                    unnoticed.push((name, at, mend));
                }
            }
        }
    }
    assert!(unnoticed.is_empty(), "{unnoticed:?}");
}

#[test]
fn the_encoders_of_a_frame_write_the_same_bytes() {
    let head = Head { kind: Kind::Result, model: ModelHandle(1), request_id: 2 };
    let value = InferResult { outputs: tensors(&[(DType::U8, &[1, 3])]), ..InferResult::default() };
    let (mut whole, mut in_place) = (vec![9; 3], vec![9; 3]);
    append_frame(&mut whole, head, &value, &[1, 2, 3]).expect("small");
    append_frame_with(&mut in_place, head, &value, |out| out.extend_from_slice(&[1, 2, 3])).expect("small");
    assert_eq!(whole, in_place, "behind what was there before");
    let mut long = LongFrame::begin(head, &value, 3, vec![9; 3]).expect("small");
    let lens = [&[][..], &[1], &[2, 3]].map(|part| {
        long.extend(part);
        long.payload_len()
    });
    assert_eq!((lens, long.end()), ([0, 1, 3], whole[3..].to_vec()), "in parts, in memory of before");
    append_frame_with(&mut in_place, head, &value, |out| {
        let payload_at = out.len();
        out.push(1);
        pad_to_8(out, payload_at);
    })
    .expect("small");
    assert_eq!(in_place.len() - whole.len(), whole.len() - 3 + 5, "one byte padded to eight, where three stood");
}

#[test]
fn a_file_that_is_not_of_the_form_is_refused() {
    let sound = "## title\n# 0 a\n01 02\n# 2 b\n03\n04\n";
    assert_eq!(bytes_of(sound, "sound"), [1, 2, 3, 4]);
    for (broken, why) in [
        ("# 0 a\n01\n", "no title"),
        ("## t\n01\n", "bytes without a comment"),
        ("## t\n# 0 a\n01\n# 2 b\n02\n", "a wrong offset"),
        ("## t\n# 0 a\n# 0 b\n01\n", "a field without bytes"),
        ("## t\n# 0\n01\n", "a field without a meaning"),
        ("## t\n# 0 a\n1\n", "half a byte"),
        ("## t\n# 0 a\nzz\n", "no hex"),
    ] {
        assert!(std::panic::catch_unwind(|| bytes_of(broken, "broken")).is_err(), "{why}");
    }
}

/// The page for writers of clients, which must not drift from the bytes and tables it describes.
const WIRE_PAGE: &str = include_str!("../src/wire/WIRE.md");

#[test]
fn the_examples_of_the_written_specification_are_golden_files() {
    let examples = WIRE_PAGE.split("## 11. Examples").nth(1).expect("the page ends with its examples");
    let hex: Vec<u8> = examples
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .flat_map(|line| line.split("   ").next().expect("split gives one part").split(' '))
        .map(|byte| u8::from_str_radix(byte, 16).expect("examples are hex, three spaces, words"))
        .collect();
    let files = files();
    assert_eq!(hex, [&files["ping"][..], &files["infer_echo"]].concat());
}

#[test]
fn the_tables_of_the_written_specification_are_those_of_the_code() {
    for code in Code::ALL {
        let executed = match code.executed() {
            Executed::Never => "never",
            Executed::Maybe => "maybe",
            Executed::Yes => "yes",
        };
        let retry = match code.retry() {
            Retry::No => "no",
            Retry::Same => "same",
            Retry::Elsewhere => "elsewhere",
            Retry::After => "after",
            Retry::ClientDecides => "the client decides",
        };
        let row = format!("| {} | {} | {executed} | {retry} |", *code as u16, code.name());
        assert!(WIRE_PAGE.contains(&row), "WIRE.md has no row {row}");
    }
    for dtype in DType::ALL {
        assert!(WIRE_PAGE.contains(&format!("| {} | {}", dtype as u8, dtype.name())), "WIRE.md has no dtype {dtype}");
    }
    for reason in SealReason::ALL {
        let text = format!("{} {}", reason as u8, reason.name());
        assert!(WIRE_PAGE.contains(&text), "WIRE.md has no seal reason {text}");
    }
    for stage in [Stage::None, Stage::Arrival, Stage::Queue, Stage::Executing, Stage::Writing] {
        let text = format!("{} {}", stage as u8, stage.name());
        assert!(WIRE_PAGE.contains(&text), "WIRE.md has no stage {text}");
    }
    for kind in Kind::ALL {
        let row = WIRE_PAGE
            .lines()
            .find(|line| line.starts_with(&format!("| {} | ", kind as u8)) && line.matches('|').count() == 7)
            .unwrap_or_else(|| panic!("WIRE.md has no row of {kind:?}"));
        let sender = row.split('|').nth(3).expect("seven bars").trim();
        assert_eq!(kind.from_client(), matches!(sender, "client" | "both"), "{row}");
        let metadata = row.split('|').nth(4).expect("seven bars").trim();
        assert_eq!(kind.carries_metadata(), metadata != "none", "{row}");
        let payload = row.split('|').nth(5).expect("seven bars").trim();
        assert_eq!(kind.carries_payload(), payload != "none", "{row}");
    }
}
