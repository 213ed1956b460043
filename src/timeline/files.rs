//! Dumps of the flight recorder as files: a thread writes them, and keeps no more than so many.
//!
//! ```text
//! DIR/ferry-<milliseconds since 1970>-<why>.json       trace events (trace.rs)
//! DIR/ferry-<milliseconds since 1970>-<why>.ferrytrc   the scheduler's inputs, where they are recorded, for `ferry replay`:
//!                                                      up to the dump, and …-before.ferrytrc the stretch before that
//! ```
//!
//! Always true
//! - A file is there whole or not at all: it is written beside and renamed.
//! - Only files of that form are counted and removed, the oldest first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::breach::Why;
use super::{BatchRecord, trace};
use crate::vocab::ModelHandle;

/// What is to be written.
#[derive(Debug)]
pub struct Dump {
    pub why: Why,
    /// Milliseconds since 1970.
    pub unix_ms: u64,
    pub records: Vec<BatchRecord>,
    /// Whole traces of the scheduler's inputs, the newest first: at most two.
    pub traces: Vec<Vec<u8>>,
}

/// Writes dumps.
#[derive(Clone, Debug)]
pub struct DumpFiles {
    pub directory: PathBuf,
    /// Dumps kept.
    pub files_max: usize,
    /// Models, by their handles.
    pub names: Vec<String>,
}

const JSON: &str = "json";
/// Endings of traces, the newest first.
const TRACES: [&str; 2] = [".ferrytrc", "-before.ferrytrc"];

impl DumpFiles {
    /// Writes what comes until there is nobody to send any more. What cannot be written is told in the log.
    pub fn run(&self, dumps: &flume::Receiver<Dump>) {
        while let Ok(dump) = dumps.recv() {
            let (model, why) = (self.name(dump.why), dump.why.name());
            match self.write(&dump) {
                Ok(file) => tracing::warn!(model, why, file = %file.display(), "the flight recorder was kept"),
                Err(error) => {
                    let directory = self.directory.display();
                    tracing::error!(model, why, %error, %directory, "the flight recorder could not be kept");
                }
            }
        }
    }

    fn name(&self, why: Why) -> &str {
        let (Why::Slo(ModelHandle(model)) | Why::Panic(ModelHandle(model))) = why;
        self.names.get(usize::from(model)).map_or("", String::as_str)
    }

    /// Writes one dump, and removes the oldest where there are too many. Returns the file of trace events.
    pub fn write(&self, dump: &Dump) -> io::Result<PathBuf> {
        fs::create_dir_all(&self.directory)?;
        let stem = format!("ferry-{:015}-{}", dump.unix_ms, dump.why.name());
        let file = self.directory.join(format!("{stem}.{JSON}"));
        for (trace, ending) in dump.traces.iter().zip(TRACES) {
            replace(&self.directory.join(format!("{stem}{ending}")), trace)?;
        }
        let why = format!("{}: {}", dump.why.name(), self.name(dump.why));
        replace(&file, &trace::to_json(&dump.records, &self.names, &why))?;
        self.remove_old()?;
        Ok(file)
    }

    fn remove_old(&self) -> io::Result<()> {
        let mut stems = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            stems.extend(name.to_str().and_then(|name| stem_of(name, JSON)).map(str::to_owned));
        }
        // Names begin with the time, all of one length.
        stems.sort();
        for stem in stems.iter().take(stems.len().saturating_sub(self.files_max)) {
            fs::remove_file(self.directory.join(format!("{stem}.{JSON}")))?;
            for ending in TRACES {
                match fs::remove_file(self.directory.join(format!("{stem}{ending}"))) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The stem of a file of ours.
fn stem_of<'a>(name: &'a str, extension: &str) -> Option<&'a str> {
    let stem = name.strip_suffix(extension)?.strip_suffix('.')?;
    let (time, why) = stem.strip_prefix("ferry-")?.split_once('-')?;
    let ours = time.len() == 15 && time.bytes().all(|byte| byte.is_ascii_digit()) && ["slo", "panic"].contains(&why);
    ours.then_some(stem)
}

fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut part = file.as_os_str().to_owned();
    part.push(".part");
    fs::write(&part, bytes)?;
    fs::rename(&part, file)
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn the_last_dumps_are_kept_and_files_of_others_stay() {
        let directory = tempfile::tempdir().expect("a directory");
        let files = DumpFiles { directory: directory.path().join("new"), files_max: 2, names: vec!["echo".into()] };
        fs::create_dir(&files.directory).expect("makes the folder");
        for name in ["notes.json", "ferry-1-slo.json", "ferry-000000000000001-other.json"] {
            fs::write(files.directory.join(name), "mine").expect("writes");
        }
        for unix_ms in [5, 3_000, 40] {
            let traces = if unix_ms == 40 { Vec::new() } else { vec![vec![1, 2], vec![3]] };
            let dump = Dump { why: Why::Slo(ModelHandle(0)), unix_ms, records: vec![record(1, 0)], traces };
            let file = files.write(&dump).expect("there is room");
            let json: serde_json::Value =
                serde_json::from_slice(&fs::read(file).unwrap_or_else(|_| b"null".to_vec())).expect("JSON");
            assert!(json.is_null() || json["otherData"]["why"] == "slo: echo", "{json}");
        }
        let mut names: Vec<String> = fs::read_dir(&files.directory)
            .expect("lists")
            .map(|entry| entry.expect("lists").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let expected = [
            "ferry-000000000000001-other.json",
            "ferry-000000000000040-slo.json",
            "ferry-000000000003000-slo-before.ferrytrc",
            "ferry-000000000003000-slo.ferrytrc",
            "ferry-000000000003000-slo.json",
            "ferry-1-slo.json",
            "notes.json",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn where_there_is_no_directory_to_be_made_the_error_is_told() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let files = DumpFiles { directory: file.path().join("below"), files_max: 1, names: Vec::new() };
        let dump = Dump { why: Why::Panic(ModelHandle(3)), unix_ms: 1, records: Vec::new(), traces: Vec::new() };
        assert!(files.write(&dump).is_err());
    }
}
