//! Writes down what it was given before it answers: the model by which tests know what was executed. No manifest in models/
//! names it.
//!
//! A row is four words: the caller's number of 64 bits, low half first, how long to take in µs (the longest of its mates, once),
//! and a word that only makes it differ. Its answer is [`proof`] of the row, which nobody has who did not run it.
//!
//! Always true
//! - The number of each row is in `executed.log`, in the model's own folder, one a line, before the row is computed: the file
//!   survives the process. A batch is one write in append mode, so executors share the file.
//! - Row 0 is padding and warm-up, and is not written.
//!
//! Elsewhere: who compares the file with what callers were told (tests/chaos).

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::contract::{Contract, Dim};
use crate::executor::batch::{BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, Model, ModelError};
use crate::vocab::DType;

/// Words of a row, and of its answer.
pub const WORDS: usize = 4;

/// What a row may ask for at most. An executor that sleeps is an executor lost.
const MICROS_MAX: u32 = 60_000_000;

const LOG: &str = "executed.log";

/// The answer to a row: each bit of it depends on every bit of the row, and on which word it is.
pub fn proof(row: [u32; WORDS]) -> [u32; WORDS] {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for word in row {
        state = mixed(state ^ u64::from(word));
    }
    std::array::from_fn(|at| mixed(state.wrapping_add(at as u64)) as u32)
}

/// The finalizer of SplitMix64.
fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

pub struct Witness {
    contract: Contract,
    log: PathBuf,
}

impl Witness {
    /// `folder` is the model's own, where the manifest is.
    pub fn new(contract: Contract, folder: &Path) -> Witness {
        Witness { contract, log: folder.join(LOG) }
    }
}

/// What the architecture asks of a contract: four u32 a row in and out.
pub fn check(contract: &Contract) -> Result<(), String> {
    let four = [Dim::Fixed(WORDS as u32)];
    match (&contract.inputs[..], &contract.outputs[..]) {
        ([input], [output])
            if input.dtype == DType::U32
                && output.dtype == DType::U32
                && input.shape == four
                && output.shape == four =>
        {
            Ok(())
        }
        _ => Err("expected one input and one output, both of dtype u32 and shape [4]".into()),
    }
}

impl LoadedModel for Witness {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    /// It would be written down twice.
    fn can_repeat(&self) -> bool {
        false
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        let open = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = open.map_err(|error| ModelError(format!("{LOG} cannot be opened: {error}")))?;
        Ok(Box::new(Instance { log, lines: String::new() }))
    }
}

struct Instance {
    log: File,
    lines: String,
}

impl Model for Instance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        let (rows, _) = batch.input::<u32>(0).as_chunks::<WORDS>();
        self.lines.clear();
        let mut micros = 0;
        for row in rows {
            let number = u64::from(row[0]) | u64::from(row[1]) << 32;
            if number != 0 {
                writeln!(self.lines, "{number}").expect("a string takes all");
            }
            micros = micros.max(row[2].min(MICROS_MAX));
        }
        self.log
            .write_all(self.lines.as_bytes())
            .map_err(|error| ModelError(format!("{LOG} cannot be written: {error}")))?;
        if micros > 0 {
            std::thread::sleep(Duration::from_micros(u64::from(micros)));
        }
        for (row, answer) in rows.iter().zip(out.output_mut::<u32>(0).as_chunks_mut::<WORDS>().0) {
            *answer = proof(*row);
        }
        Ok(())
    }
}
