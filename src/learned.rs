//! What was learned about batch times, kept in a directory while the process does not run.
//!
//! ```text
//! DIR/<model>/<version>/cost.toml
//! ```
//!
//! Always true
//! - A file is replaced whole: written beside, synced, renamed. A reader finds the old one or the new one.
//! - A file counts only for the model, version, weights and number of executors that it was learned with. Any other, and
//!   any that is damaged, is told in one line and ignored: learning begins anew, and nothing else changes.
//! - Nothing of it is on the way of a request: one thread, which only runs where a directory was given, asks the batcher
//!   for a copy and writes it.
//!
//! Elsewhere: the numbers themselves (scheduler/cost.rs), when it begins and ends (server.rs).

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::mail::{Question, ToBatcher};
use crate::mailbox::{Sender, reply};
use crate::scheduler::cost::{CostModel, Learned};
use crate::vocab::ModelHandle;

/// Raised when what a file says changes its meaning.
const FORMAT: u32 = 2;
/// A file has some thousand bytes; one of more than this is none of ours.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// How often it is written while the server runs.
pub const SAVE_EVERY: Duration = Duration::from_secs(60);
/// How long the batcher may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A warm-up that takes this many times longer or shorter than predicted, in the mean, contradicts what was learned.
const CONTRADICTION: f64 = 3.0;

/// What batch times depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub model: String,
    pub version: String,
    /// Where the manifest names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_sha256: Option<String>,
    /// They share the machine's memory and cores.
    pub executors: usize,
}

/// Why a file was not used or not written. Each names the file.
#[derive(Debug)]
pub enum LearnedError {
    Io {
        file: PathBuf,
        doing: &'static str,
        error: io::Error,
    },
    TooLarge {
        file: PathBuf,
    },
    /// Not the form of this version.
    Malformed {
        file: PathBuf,
        message: String,
    },
    /// Learned by something else.
    Other {
        file: PathBuf,
        expected: Box<Identity>,
        got: Box<Identity>,
    },
}

impl fmt::Display for LearnedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LearnedError::Io { file, doing, error } => write!(f, "{}: cannot {doing}: {error}", file.display()),
            LearnedError::TooLarge { file } => {
                write!(f, "{}: expected at most {FILE_BYTES_MAX} bytes, it has more", file.display())
            }
            LearnedError::Malformed { file, message } => write!(f, "{}: {message}", file.display()),
            LearnedError::Other { file, expected, got } => {
                write!(f, "{}: expected what was learned by {expected}, it is by {got}", file.display())
            }
        }
    }
}

impl std::error::Error for LearnedError {}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights = self.weights_sha256.as_ref().map_or("", |hash| hash.get(..12).unwrap_or(hash));
        let Identity { model, version, executors, .. } = self;
        write!(f, "{model} {version} (weights {weights:?}, executors {executors})")
    }
}

/// The file as written.
#[derive(Serialize, Deserialize)]
struct Written {
    format: u32,
    #[serde(flatten)]
    identity: Identity,
    observations: u64,
    error: f64,
    weight: f64,
    /// ns of a batch, a cell, a squared cell.
    fit: [f64; 3],
    moment: [f64; 3],
    normal: [[f64; 3]; 3],
    corrections: Vec<(u8, u8, f32, u16)>,
    /// By executor: logarithm of its time beside the mean, how often it was observed.
    paces: Vec<(f64, u32)>,
}

/// The file of a model's cost.
pub fn file_of(directory: &Path, identity: &Identity) -> PathBuf {
    directory.join(&identity.model).join(&identity.version).join("cost.toml")
}

/// What was learned before. `None`: nothing yet.
pub fn load(directory: &Path, identity: &Identity) -> Result<Option<CostModel>, LearnedError> {
    let file = file_of(directory, identity);
    let malformed = |message: String| LearnedError::Malformed { file: file.clone(), message };
    let text = match read(&file) {
        Ok(Some(bytes)) => String::from_utf8(bytes).map_err(|_| malformed("not text".into()))?,
        Ok(None) => return Err(LearnedError::TooLarge { file }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LearnedError::Io { file, doing: "read it", error }),
    };
    let written: Written = toml::from_str(&text).map_err(|error| malformed(error.message().trim().to_owned()))?;
    if written.format != FORMAT {
        return Err(malformed(format!("expected format {FORMAT}, got {}", written.format)));
    }
    if written.identity != *identity {
        let (expected, got) = (Box::new(identity.clone()), Box::new(written.identity));
        return Err(LearnedError::Other { file, expected, got });
    }
    let Written { fit, normal, moment, weight, observations, error, corrections, paces, .. } = written;
    let learned = Learned { fit, normal, moment, weight, observations, error, corrections, paces };
    let cost = CostModel::resume(&learned).ok_or_else(|| malformed("its numbers cannot have been learned".into()))?;
    Ok(Some(cost))
}

/// `None`: it has too many bytes.
fn read(file: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    File::open(file)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= FILE_BYTES_MAX).then_some(bytes))
}

/// Replaces the file.
pub fn save(directory: &Path, identity: &Identity, cost: &CostModel) -> Result<(), LearnedError> {
    let file = file_of(directory, identity);
    let Learned { fit, normal, moment, weight, observations, error, corrections, paces } = cost.learned();
    let identity = identity.clone();
    let written =
        Written { format: FORMAT, identity, observations, error, weight, fit, moment, normal, corrections, paces };
    let text = toml::to_string(&written).expect("plain data");
    let folder = file.parent().expect("file_of joins folders");
    let beside = folder.join("cost.toml.new");
    let replace = || -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut new = File::create(&beside)?;
        new.write_all(text.as_bytes())?;
        new.sync_all()?;
        fs::rename(&beside, &file)?;
        // The rename is kept only with its folder.
        File::open(folder)?.sync_all()
    };
    replace().map_err(|error| LearnedError::Io { file: file.clone(), doing: "write it", error })
}

/// Whether warm-up batches (rows, padded length, time) took about as long as was learned. The machine may have changed.
pub fn agrees(cost: &CostModel, warmed: impl Iterator<Item = (u32, u32, Duration)>) -> bool {
    let (mut sum, mut count) = (0.0, 0);
    for (rows, len, took) in warmed {
        let (predicted, took) = (cost.predict(rows, len), took.as_nanos() as f64);
        if predicted > 0.0 && took > 0.0 {
            sum += (took / predicted).ln();
            count += 1;
        }
    }
    count == 0 || (sum / f64::from(count)).abs() <= CONTRADICTION.ln()
}

/// Keeps a server's cost models.
pub struct Keeper {
    pub directory: PathBuf,
    /// In the order of the handles.
    pub identities: Vec<Identity>,
    pub batcher: Sender<ToBatcher>,
}

impl Keeper {
    /// Saves now and then, and once more when `stop`'s sender is gone; then ends.
    pub fn run(self, stop: &flume::Receiver<()>) {
        let mut saved = vec![0; self.identities.len()];
        loop {
            let stopped = !matches!(stop.recv_timeout(SAVE_EVERY), Err(flume::RecvTimeoutError::Timeout));
            self.save_all(&mut saved);
            if stopped {
                return;
            }
        }
    }

    /// Writes the models that were observed since. `saved` has the observations of each that are in its file.
    fn save_all(&self, saved: &mut [u64]) {
        for (at, identity) in self.identities.iter().enumerate() {
            let (reply, awaited) = reply();
            let question = Question::Cost { model: ModelHandle(at as u16), reply };
            if self.batcher.send(ToBatcher::Ask(question)).is_err() {
                return;
            }
            let Some(cost) = awaited.wait(ANSWER_MAX) else { return };
            if !cost.is_known() || cost.observations() == saved[at] {
                continue;
            }
            match save(&self.directory, identity, &cost) {
                Ok(()) => saved[at] = cost.observations(),
                Err(error) => tracing::warn!(model = identity.model, "what was learned is not kept: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::cost::Work;

    fn identity() -> Identity {
        Identity { model: "m".into(), version: "1".into(), weights_sha256: Some("ab".repeat(32)), executors: 2 }
    }

    fn learned() -> CostModel {
        let mut cost = CostModel::default();
        cost.set_executors(2);
        for at in 0..200u32 {
            let (rows, len) = (1 + at % 13, 8 + at * 7 % 300);
            let took = u64::from(100_000 + rows * len * 37 + at % 5 * 1000) << (at % 2);
            cost.observe_on(at as usize % 2, Work::padded(rows, len), Duration::from_nanos(took), true);
        }
        assert!(cost.paces().differ());
        cost
    }

    #[test]
    fn what_was_saved_is_loaded_to_the_last_bit() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(load(directory.path(), &identity()).expect("no file is no error"), None);
        for identity in [identity(), Identity { weights_sha256: None, ..identity() }] {
            save(directory.path(), &identity, &CostModel::resume(&learned().learned()).expect("learned"))
                .expect("saves");
            assert_eq!(load(directory.path(), &identity).expect("loads"), Some(learned()));
        }
        let names: Vec<_> = fs::read_dir(directory.path().join("m/1")).expect("a folder").collect();
        assert_eq!(names.len(), 1, "nothing is left beside it");
    }

    #[test]
    fn what_something_else_learned_is_not_used() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        save(directory.path(), &identity(), &learned()).expect("saves");
        for other in [
            Identity { weights_sha256: Some("cd".repeat(32)), ..identity() },
            Identity { weights_sha256: None, ..identity() },
            Identity { executors: 3, ..identity() },
        ] {
            let error = load(directory.path(), &other).expect_err("another").to_string();
            assert!(error.contains("cost.toml: expected what was learned by m 1"), "{error}");
        }
        assert!(load(directory.path(), &Identity { version: "2".into(), ..identity() }).expect("no file").is_none());
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it_and_never_a_panic() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        save(directory.path(), &identity(), &learned()).expect("saves");
        let file = file_of(directory.path(), &identity());
        let whole = fs::read(&file).expect("it is there");
        let text = String::from_utf8(whole.clone()).expect("text");
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).step_by(7).map(|len| whole[..len].to_vec()).collect();
        damaged.push(vec![b'x'; FILE_BYTES_MAX as usize + 1]);
        damaged.push(vec![0xff; 100]);
        damaged.push(text.replace("format = 2", "format = 3").into_bytes());
        damaged.push(text.replace("observations = 200", "observations = 0").into_bytes());
        damaged.push(text.replace("weight = ", "weight = -").into_bytes());
        for bytes in damaged {
            fs::write(&file, &bytes).expect("writes");
            let error = load(directory.path(), &identity()).expect_err("damaged").to_string();
            assert!(error.contains("cost.toml"), "{error}");
        }
        // Any single byte: refused, or numbers that a model can have learned.
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&file, &bytes).expect("writes");
            if let Ok(Some(cost)) = load(directory.path(), &identity()) {
                assert!(cost.predict(4, 64).is_finite());
            }
        }
    }

    #[test]
    fn a_warm_up_that_takes_several_times_as_long_contradicts() {
        let cost = learned();
        let times = |factor: f64| {
            let cost = &cost;
            [(1, 16), (8, 100)]
                .into_iter()
                .map(move |(rows, len)| (rows, len, Duration::from_nanos((cost.predict(rows, len) * factor) as u64)))
        };
        assert!(agrees(&cost, times(1.0)) && agrees(&cost, times(2.8)) && agrees(&cost, times(0.4)));
        assert!(!agrees(&cost, times(3.2)) && !agrees(&cost, times(0.3)));
        assert!(agrees(&cost, std::iter::empty()));
    }
}
