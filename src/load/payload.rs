//! Inputs for any contract, made from a seed before the run: sending one is a copy and two checksums.
//!
//! Always true
//! - Request `n` carries entry `plan[n % plan.len()]`, so what was sent can be found again from the number alone.
//! - Every entry has passed the contract's own check.
//!
//! Elsewhere: what the answers must be (verify.rs).

use super::Rng;
use crate::contract::{Contract, TensorSpec};
use crate::vocab::{DType, ModelHandle};
use crate::wire::encoder::{Head, append_frame_with, pad_to_8};
use crate::wire::frame::{HEADER_LEN, Kind};
use crate::wire::message::{Infer, List, TensorMeta};

/// Bytes of frames that are kept ready.
const FRAMES_BYTES_MAX: usize = 64 << 20;
/// Different inputs per length, where lengths come from a list.
const VARIANTS: u32 = 4;

/// Offset of `deadline_us` in a frame: the first field of its metadata.
const DEADLINE_AT: usize = HEADER_LEN;
/// Offset of `late_us`, behind deadline, priority, flags and the two of compositions.
const LATE_AT: usize = HEADER_LEN + 8 + 1 + 1 + 8 + 4;

/// A frame that is ready to be sent but for its id.
#[derive(Clone, Debug)]
pub struct Entry {
    start: usize,
    frame_len: usize,
    payload_at: usize,
    /// Tokens of its one row; 1 where the model has no length.
    pub len: u32,
}

/// All inputs of a run.
pub struct Inputs {
    frames: Vec<u8>,
    entries: Vec<Entry>,
    plan: Vec<u32>,
    /// Lengths that the contract does not allow and that were changed to the nearest it does.
    pub clipped: u64,
}

/// What every request of a run has in common.
#[derive(Clone, Copy, Debug, Default)]
pub struct Common {
    pub handle: u16,
    pub priority: u8,
    pub has_deadline: bool,
}

impl Inputs {
    /// Inputs that are sent in turn, one per length. A list of lengths that is longer than `inputs_max` is kept as it
    /// is, and its requests share [`VARIANTS`] inputs per length.
    pub fn new(
        contract: &Contract,
        lengths: impl IntoIterator<Item = u32>,
        inputs_max: usize,
        seed: u64,
        common: Common,
    ) -> Result<Inputs, String> {
        let mut inputs = Inputs { frames: Vec::new(), entries: Vec::new(), plan: Vec::new(), clipped: 0 };
        let mut shared: std::collections::HashMap<(u32, u32), u32> = std::collections::HashMap::new();
        let mut seen: std::collections::HashMap<u32, u32> = std::collections::HashMap::new();
        for wanted in lengths {
            let len = match &contract.length {
                Some(length) => wanted.clamp(length.min, length.max),
                None => 1,
            };
            inputs.clipped += u64::from(contract.length.is_some() && len != wanted);
            let room = inputs.entries.len() < inputs_max && inputs.frames.len() < FRAMES_BYTES_MAX;
            let variant = seen.entry(len).or_default();
            let key = (len, *variant % VARIANTS);
            *variant += 1;
            let entry = match shared.get(&key) {
                Some(entry) if !room => *entry,
                _ => inputs.add(contract, len, seed, common)?,
            };
            shared.insert(key, entry);
            inputs.plan.push(entry);
        }
        if inputs.plan.is_empty() {
            return Err("there are no lengths to send".into());
        }
        Ok(inputs)
    }

    fn add(&mut self, contract: &Contract, len: u32, seed: u64, common: Common) -> Result<u32, String> {
        let number = self.entries.len() as u32;
        let mut rng = Rng::new(seed, 0x1000 + u64::from(number));
        let mut infer =
            Infer { deadline_us: u64::from(common.has_deadline), priority: common.priority, ..Infer::default() };
        for (index, spec) in contract.inputs.iter().enumerate() {
            let mut dims = vec![1];
            dims.extend(spec.shape.iter().map(|dim| match dim {
                crate::contract::Dim::Fixed(n) => *n,
                crate::contract::Dim::Named(_) => len,
            }));
            let dims = List::from_slice(&dims).expect("Contract::checked limits the rank");
            let meta = TensorMeta { index: index as u8, dtype: spec.dtype as u8, dims };
            infer.inputs.push(meta).expect("Contract::checked limits the inputs");
        }
        let start = self.frames.len();
        let mut payload_at = start;
        let head = Head { kind: Kind::Infer, model: ModelHandle(common.handle), request_id: 0 };
        append_frame_with(&mut self.frames, head, &infer, |out| {
            payload_at = out.len();
            for spec in &contract.inputs {
                append_values(spec, spec.row_elements(len), &mut rng, out);
                pad_to_8(out, payload_at);
            }
        })
        .map_err(|error| error.message)?;
        let checked = contract.check(&infer, &self.frames[payload_at..]);
        checked.map_err(|refusal| format!("the load generator made an input the model refuses: {refusal}"))?;
        self.entries.push(Entry {
            start,
            frame_len: self.frames.len() - start,
            payload_at: payload_at - start,
            len: contract.length.as_ref().map_or(1, |_| len),
        });
        Ok(number)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry that request `number` carries.
    pub fn of_request(&self, number: u64) -> u32 {
        self.plan[(number % self.plan.len() as u64) as usize]
    }

    pub fn entry(&self, index: u32) -> &Entry {
        &self.entries[index as usize]
    }

    pub fn payload(&self, index: u32) -> &[u8] {
        let entry = self.entry(index);
        &self.frames[entry.start + entry.payload_at..entry.start + entry.frame_len]
    }

    pub fn payload_bytes(&self, index: u32) -> u64 {
        let entry = self.entry(index);
        (entry.frame_len - entry.payload_at) as u64
    }

    pub fn payload_bytes_max(&self) -> u64 {
        (0..self.entries.len()).map(|index| self.payload_bytes(index as u32)).max().unwrap_or(0)
    }

    /// The metadata that the entry is sent with, but for the deadline.
    pub fn metadata(&self, index: u32) -> Infer {
        let entry = self.entry(index);
        let bytes = &self.frames[entry.start + HEADER_LEN..entry.start + entry.payload_at];
        crate::wire::message::decode_exact(bytes).expect("it was encoded here")
    }

    /// Appends the frame of an entry under `id`. Of the deadline and of how late it is, 0 says nothing.
    ///
    /// Hot: once per request. Guarded by benches/echo_path.rs.
    pub fn append(&self, index: u32, id: u64, handle: u16, [deadline_us, late_us]: [u64; 2], out: &mut Vec<u8>) {
        let entry = &self.entries[index as usize];
        let start = out.len();
        out.extend_from_slice(&self.frames[entry.start..entry.start + entry.frame_len]);
        let frame = &mut out[start..];
        frame[6..8].copy_from_slice(&handle.to_le_bytes());
        frame[8..16].copy_from_slice(&id.to_le_bytes());
        if deadline_us != 0 {
            frame[DEADLINE_AT..DEADLINE_AT + 8].copy_from_slice(&deadline_us.to_le_bytes());
        }
        frame[LATE_AT..LATE_AT + 8].copy_from_slice(&late_us.to_le_bytes());
        let head: &[u8; HEADER_LEN] = frame.first_chunk().expect("a frame has a header");
        let crc = crate::wire::Header::expected_head_crc(head, &frame[HEADER_LEN..entry.payload_at]);
        frame[28..32].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Appends `count` elements that the spec allows: integers over their whole range, floats from -1 to 1.
fn append_values(spec: &TensorSpec, count: usize, rng: &mut Rng, out: &mut Vec<u8>) {
    macro_rules! ints {
        ($ty:ty) => {{
            let (low, high) = match spec.range {
                Some([low, high]) => (i128::from(low).max(<$ty>::MIN.into()), i128::from(high).min(<$ty>::MAX.into())),
                None => (<$ty>::MIN.into(), <$ty>::MAX.into()),
            };
            for _ in 0..count {
                out.extend_from_slice(&(rng.between(low, high) as $ty).to_le_bytes());
            }
        }};
    }
    match spec.dtype {
        DType::U8 | DType::Text => ints!(u8),
        DType::I8 => ints!(i8),
        DType::U16 => ints!(u16),
        DType::I16 => ints!(i16),
        DType::U32 => ints!(u32),
        DType::I32 => ints!(i32),
        DType::U64 => ints!(u64),
        DType::I64 => ints!(i64),
        DType::F16 => {
            for _ in 0..count {
                let bits = rng.next_u64();
                // Sign and fraction at random, exponent of 2^-5 to 2^-1: finite, and smaller than 1.
                let exponent = 10 + (bits >> 32) % 5;
                out.extend_from_slice(&((bits as u16 & 0x83FF) | (exponent as u16) << 10).to_le_bytes());
            }
        }
        DType::BF16 => {
            for _ in 0..count {
                let value = (rng.unit() * 2.0 - 1.0) as f32;
                out.extend_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
            }
        }
        DType::F32 => {
            for _ in 0..count {
                out.extend_from_slice(&((rng.unit() * 2.0 - 1.0) as f32).to_le_bytes());
            }
        }
        DType::F64 => {
            for _ in 0..count {
                out.extend_from_slice(&(rng.unit() * 2.0 - 1.0).to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{Dim, Length, NonFinite};
    use crate::wire::decoder::Step;
    use crate::wire::{Decoder, Limits};

    fn contract(dtype: DType, range: Option<[i64; 2]>) -> Contract {
        let tensor = |name: &str, shape| TensorSpec {
            name: name.into(),
            dtype,
            shape,
            pad: 0.0,
            range,
            nonfinite: NonFinite::Refuse,
        };
        Contract {
            name: "m".into(),
            version: "1".into(),
            architecture: "echo".into(),
            inputs: vec![
                tensor("a", vec![Dim::Named("tokens".into())]),
                tensor("b", vec![Dim::Named("tokens".into()), Dim::Fixed(3)]),
            ],
            outputs: vec![tensor("c", vec![Dim::Fixed(1)])],
            length: Some(Length { name: "tokens".into(), min: 1, max: 32 }),
            text: None,
            rows_max: 4,
        }
        .checked()
        .expect("a valid contract")
    }

    #[test]
    fn inputs_of_every_dtype_pass_their_contract() {
        for dtype in DType::ALL.into_iter().filter(|dtype| *dtype != DType::Text) {
            let range = matches!(dtype, DType::U32 | DType::I8).then_some([0, 100]);
            let made = Inputs::new(&contract(dtype, range), [1, 7, 32], 100, 5, Common::default());
            let made = made.unwrap_or_else(|error| panic!("{dtype}: {error}"));
            assert_eq!(made.len(), 3);
        }
    }

    #[test]
    fn what_is_sent_depends_on_the_seed_and_the_number_only() {
        let contract = contract(DType::U32, Some([0, 30_000]));
        let make = |seed| Inputs::new(&contract, [5, 9, 5], 100, seed, Common::default()).expect("valid");
        let (first, again, other) = (make(1), make(1), make(2));
        for number in 0..7 {
            let entry = first.of_request(number);
            assert_eq!(first.payload(entry), again.payload(again.of_request(number)));
            assert_ne!(first.payload(entry), other.payload(other.of_request(number)));
        }
        assert_ne!(first.payload(0), first.payload(2), "equal lengths still carry different values");
    }

    #[test]
    fn a_long_list_of_lengths_keeps_its_order_and_shares_inputs() {
        let lens: Vec<u32> = (0..1000).map(|n| 1 + n % 10).collect();
        let made =
            Inputs::new(&contract(DType::U8, None), lens.iter().copied(), 20, 1, Common::default()).expect("valid");
        assert!(made.len() <= 60, "20 and then at most 4 per length, got {}", made.len());
        for (number, len) in lens.iter().enumerate() {
            assert_eq!(made.entry(made.of_request(number as u64)).len, *len);
        }
    }

    #[test]
    fn lengths_outside_the_contract_are_clipped_and_counted() {
        let made = Inputs::new(&contract(DType::U8, None), [1, 32, 33, 900], 10, 1, Common::default()).expect("valid");
        assert_eq!(made.clipped, 2);
        assert_eq!(made.entry(3).len, 32);
    }

    #[test]
    fn an_appended_frame_decodes_to_its_id_handle_deadline_and_lateness() {
        let common = Common { handle: 1, priority: 2, has_deadline: true };
        let made = Inputs::new(&contract(DType::F32, None), [4], 10, 1, common).expect("valid");
        let mut out = Vec::new();
        made.append(0, 77, 3, [5_000, 12], &mut out);
        let Ok(Step::Frame(frame)) = Decoder::new(Limits::DEFAULT).next(&out) else { panic!("no frame") };
        assert_eq!((frame.header.request_id, frame.header.model.0), (77, 3));
        assert!(frame.payload_is_intact(&out));
        let infer: Infer = crate::wire::message::decode_exact(frame.metadata(&out)).expect("an infer");
        assert_eq!((infer.deadline_us, infer.late_us, infer.priority, infer.inputs.len()), (5_000, 12, 2, 2));
    }
}
