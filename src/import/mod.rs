//! Settings of other servers, as ferry's: a text in, blocks of a manifest and of a configuration out, and what became of each
//! setting.
//!
//! | format | file | defined by |
//! | --- | --- | --- |
//! | Triton | `config.pbtxt` | `ModelConfig` of triton-inference-server/common, protobuf/model_config.proto |
//! | TensorFlow Serving | `--batching_parameters_file` | `BatchingParameters` of tensorflow/serving, session_bundle_config.proto |
//! | text-embeddings-inference | command line, or `NAME=value` lines | its `--help`: router/src/main.rs, docs cli_arguments |
//!
//! Always true
//! - Each setting that a file has is in the notes: taken, taken with another meaning, or without an equivalent and why. So is a
//!   default of the other server that the result depends on.
//! - What is written is accepted by ferry's own parsers, in a manifest that has what the file does not say.
//! - Pure: nothing is read but the text given. An error has line and column where the text has them.
//!
//! Elsewhere: `ferry import` prints it (commands/import.rs); what our settings mean (models/manifest.rs, config/limits.rs); that
//! they are taken (tests/import.rs).

mod draft;
mod fields;
mod tei;
pub mod textproto;
mod tfs;
mod triton;

use std::fmt;

pub use self::draft::Draft;
use self::textproto::{Place, SyntaxError, Value};

/// Whose settings they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Triton,
    TensorflowServing,
    TextEmbeddings,
}

impl Format {
    pub const ALL: [Format; 3] = [Format::Triton, Format::TensorflowServing, Format::TextEmbeddings];

    pub fn name(self) -> &'static str {
        match self {
            Format::Triton => "triton",
            Format::TensorflowServing => "tfs",
            Format::TextEmbeddings => "tei",
        }
    }

    pub fn from_name(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whose a text is, by what only one of them has. None: by nothing.
    pub fn guess(text: &str) -> Option<Format> {
        if let Ok(message) = textproto::parse(text) {
            let has = |names: &[&str]| message.fields.iter().any(|field| names.contains(&field.name.as_str()));
            // `max_batch_size` is a field of both: a number there, a message here.
            let wrapped = message
                .fields
                .iter()
                .any(|field| field.name == "max_batch_size" && matches!(field.value, Value::Message(_)));
            if wrapped || has(tfs::FIELDS_OF_ITS_OWN) {
                return Some(Format::TensorflowServing);
            }
            return (!message.fields.is_empty()).then_some(Format::Triton);
        }
        tei::looks_like(text).then_some(Format::TextEmbeddings)
    }
}

/// What a file does not say and its reader must know.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Longest row, in cells: where a dimension varies.
    pub longest: u32,
}

impl Default for Options {
    fn default() -> Options {
        // As many tokens as most encoders take.
        Options { longest: 512 }
    }
}

/// What became of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It means the same here.
    Taken,
    /// It has an equivalent that does not mean quite the same.
    Changed,
    /// It has none.
    Absent,
    /// The file does not say it: the other server's default, or ours, is written.
    Assumed,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Taken => "taken",
            Verdict::Changed => "changed",
            Verdict::Absent => "no equivalent",
            Verdict::Assumed => "assumed",
        }
    }
}

/// One setting of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Note {
    /// As the other server calls it, with the messages around it.
    pub setting: String,
    pub at: Option<Place>,
    /// As it was written, shortened.
    pub value: String,
    pub verdict: Verdict,
    /// Keys here, where it has any.
    pub keys: Vec<&'static str>,
    /// What it means here, or why there is no equivalent and what to do instead.
    pub why: String,
}

/// What came of a file.
#[derive(Clone, Debug)]
pub struct Imported {
    pub format: Format,
    /// The model's, if the file says it.
    pub model: Option<String>,
    /// For `models/<name>/model.toml`.
    pub manifest: Draft,
    /// For the file of `ferry serve --config`.
    pub server: Draft,
    pub notes: Vec<Note>,
}

impl Imported {
    fn new(format: Format) -> Imported {
        Imported { format, model: None, manifest: Draft::default(), server: Draft::default(), notes: Vec::new() }
    }

    fn note(
        &mut self,
        verdict: Verdict,
        (setting, at): (impl Into<String>, Option<Place>),
        value: impl fmt::Display,
        keys: &[&'static str],
        why: impl Into<String>,
    ) {
        let mut value = value.to_string();
        if value.chars().count() > VALUE_CHARS_MAX {
            value = value.chars().take(VALUE_CHARS_MAX).chain(['…']).collect();
        }
        let setting = setting.into();
        self.notes.push(Note { setting, at, value, verdict, keys: keys.to_vec(), why: why.into() });
    }
}

/// Longest window that is written: more is a mistake in the unit.
const DELAY_US_MAX: i64 = 60_000_000;

/// Of a value in a note.
const VALUE_CHARS_MAX: usize = 60;

/// Reads a text of this format.
pub fn read(format: Format, text: &str, options: &Options) -> Result<Imported, ImportError> {
    match format {
        Format::Triton => triton::read(text, options),
        Format::TensorflowServing => tfs::read(text, options),
        Format::TextEmbeddings => tei::read(text, options),
    }
}

/// A text that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportError {
    pub at: Option<Place>,
    pub fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    Syntax(SyntaxError),
    /// A field that may be there once is there again.
    Twice {
        field: String,
        first: Place,
    },
    Value {
        field: String,
        expected: String,
        got: String,
    },
    /// Two settings that the other server refuses together, too.
    Contradiction(String),
    /// A command line that cannot be split or does not fit its flags.
    Command(String),
}

impl From<SyntaxError> for ImportError {
    fn from(error: SyntaxError) -> ImportError {
        ImportError { at: Some(error.at), fault: Fault::Syntax(error) }
    }
}

impl fmt::Display for ImportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(at), false) = (self.at, matches!(self.fault, Fault::Syntax(_))) {
            write!(f, "{at}: ")?;
        }
        match &self.fault {
            Fault::Syntax(error) => error.fmt(f),
            Fault::Twice { field, first } => write!(f, "{field} is there twice, first at {first}"),
            Fault::Value { field, expected, got } => write!(f, "{field}: expected {expected}, got {got}"),
            Fault::Contradiction(message) | Fault::Command(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for ImportError {}
