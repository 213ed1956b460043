//! The models directory: finds manifests, loads what they describe, or says which model, which file and why not.
//!
//! ```text
//! models/<name>/model.toml                      the manifest
//! models/<name>/<version>/weights.safetensors   its parameters, where the architecture has any
//! models/<name>/<version>/tokenizer.json        what else the version needs
//! ```
//!
//! Always true
//! - Models come in the order of their names, so the same directory gives the same list.
//! - A model is loaded whole or not at all. Only one failure is none: a model that says its weights are optional and whose
//!   weights file is not there is skipped, with a sentence that says how to get it.
//! - Nothing is downloaded, and nothing outside the directory is named by a manifest.
//!
//! Elsewhere: what a manifest may say (manifest.rs), how tensors are matched (weights.rs).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

use super::manifest::{Manifest, ManifestError, Placement, Precision, WeightsSpec};
use super::weights::{Weights, WeightsError, WeightsFault};
use super::{bert, digits, echo, faulty, sleep, witness};
use crate::contract::name_is_valid;
use crate::executor::model::LoadedModel;
use crate::tokenize::{TextLimits, TextTokenizer, TokenizerError};

/// What `architecture` in a manifest may say.
pub const ARCHITECTURES: [&str; 6] = ["bert", "digits", "echo", "faulty", "sleep", "witness"];

/// A manifest is read by people; one of more bytes than this was written by an accident.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Where models are put, and how much they may take.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where candle's own operations run.
    pub device: Device,
    /// Load what executors of a device compute, of models that have such a program; the others are loaded for the CPU.
    pub for_device: bool,
    /// Largest weights file, compared before anything of it is read.
    pub weight_bytes_max: u64,
    /// Threads that share each batch, where the architecture can divide one.
    pub threads: usize,
    /// Instead of what the manifest says, where the architecture has one.
    pub precision: Option<Precision>,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { device: Device::Cpu, for_device: false, weight_bytes_max: 8 << 30, threads: 1, precision: None }
    }
}

/// A model ready to be served.
#[derive(Clone)]
pub struct ModelEntry {
    pub manifest: Manifest,
    pub model: Arc<dyn LoadedModel>,
    /// Where the contract accepts text.
    pub tokenizer: Option<Arc<TextTokenizer>>,
}

impl ModelEntry {
    pub fn name(&self) -> &str {
        &self.manifest.contract.name
    }
}

impl fmt::Debug for ModelEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelEntry").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// A model that is described but not delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub name: String,
    /// One sentence: what is missing, and how to get it.
    pub reason: String,
}

/// What a models directory holds.
#[derive(Debug, Default)]
pub struct Repository {
    pub models: Vec<ModelEntry>,
    pub skipped: Vec<Skipped>,
}

/// What loading one model led to.
#[derive(Debug)]
pub enum Loaded {
    Model(Box<ModelEntry>),
    Skipped(Skipped),
}

/// A model that could not be loaded. The message names the model, the file and the reason.
#[derive(Debug)]
pub enum RepositoryError {
    /// The directory itself.
    Directory {
        directory: PathBuf,
        error: std::io::Error,
    },
    Name {
        directory: PathBuf,
        name: String,
    },
    NoManifest {
        name: String,
        file: PathBuf,
        error: std::io::Error,
    },
    ManifestSize {
        name: String,
        file: PathBuf,
        bytes: u64,
    },
    Manifest {
        name: String,
        error: ManifestError,
    },
    Weights {
        name: String,
        error: WeightsError,
    },
    Tokenizer {
        name: String,
        error: TokenizerError,
    },
}

impl fmt::Display for RepositoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { directory, error } => {
                write!(f, "models directory {}: cannot be read: {error}", directory.display())
            }
            Self::Name { directory, name } => write!(
                f,
                "models directory {}: {name:?} is no model name; expected 1 to 128 characters of a-z 0-9 . _ - that do not start with a dot",
                directory.display()
            ),
            Self::NoManifest { name, file, error } => {
                write!(f, "model {name}: {}: cannot be read: {error}", file.display())
            }
            Self::ManifestSize { name, file, bytes } => write!(
                f,
                "model {name}: {}: expected at most {MANIFEST_BYTES_MAX} bytes, it has {bytes}",
                file.display()
            ),
            Self::Manifest { name, error } => write!(f, "model {name}: {error}"),
            Self::Weights { name, error } => write!(f, "model {name}: {error}"),
            Self::Tokenizer { name, error } => write!(f, "model {name}: {error}"),
        }
    }
}

impl std::error::Error for RepositoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Directory { error, .. } | Self::NoManifest { error, .. } => Some(error),
            Self::Manifest { error, .. } => Some(error),
            Self::Weights { error, .. } => Some(error),
            Self::Tokenizer { error, .. } => Some(error),
            Self::Name { .. } | Self::ManifestSize { .. } => None,
        }
    }
}

/// Names of the models that `directory` describes, in order. Files beside the folders, and names with a leading dot, are
/// not models and are left alone.
pub fn names(directory: &Path) -> Result<Vec<String>, RepositoryError> {
    let failed = |error| RepositoryError::Directory { directory: directory.to_path_buf(), error };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Through a link too: folders of models are often mounted as links.
        if name.starts_with('.') || !std::fs::metadata(entry.path()).map_err(failed)?.is_dir() {
            continue;
        }
        if !name_is_valid(&name) {
            return Err(RepositoryError::Name { directory: directory.to_path_buf(), name });
        }
        names.push(name);
    }
    names.sort();
    Ok(names)
}

/// Loads every model of a directory.
pub fn load_all(directory: &Path, options: &LoadOptions) -> Result<Repository, RepositoryError> {
    let mut repository = Repository::default();
    for name in names(directory)? {
        match load(directory, &name, options)? {
            Loaded::Model(entry) => repository.models.push(*entry),
            Loaded::Skipped(skipped) => repository.skipped.push(skipped),
        }
    }
    Ok(repository)
}

/// Reads and checks one model's manifest; its other files are not touched.
pub fn read_manifest(directory: &Path, name: &str) -> Result<Manifest, RepositoryError> {
    if !name_is_valid(name) {
        return Err(RepositoryError::Name { directory: directory.to_path_buf(), name: name.to_owned() });
    }
    let file = directory.join(name).join("model.toml");
    let unreadable = |error| RepositoryError::NoManifest { name: name.to_owned(), file: file.clone(), error };
    let bytes = std::fs::metadata(&file).map_err(unreadable)?.len();
    if bytes > MANIFEST_BYTES_MAX {
        return Err(RepositoryError::ManifestSize { name: name.to_owned(), file, bytes });
    }
    let text = std::fs::read_to_string(&file).map_err(unreadable)?;
    let of_manifest = |error| RepositoryError::Manifest { name: name.to_owned(), error };
    let manifest = Manifest::parse(name, &file, &text).map_err(of_manifest)?;
    check_architecture(&manifest)
        .map_err(|message| of_manifest(ManifestError { file: file.clone(), line: None, message }))?;
    Ok(manifest)
}

/// Loads one model.
pub fn load(directory: &Path, name: &str, options: &LoadOptions) -> Result<Loaded, RepositoryError> {
    let mut manifest = read_manifest(directory, name)?;
    if let (Some(precision), Some(params)) = (options.precision, &mut manifest.bert) {
        params.precision = precision;
    }
    let options = LoadOptions { for_device: options.for_device && runs_on_device(&manifest), ..options.clone() };
    if options.for_device {
        manifest.for_device();
    }
    let folder = directory.join(name).join(&manifest.contract.version);
    let model = match build(&manifest, &folder, &options) {
        Ok(model) => model,
        Err(error) => match &manifest.weights {
            Some(weights) if weights.optional && matches!(*error.fault, WeightsFault::Missing) => {
                return Ok(Loaded::Skipped(skipped(name, &error.file, weights)));
            }
            _ => return Err(RepositoryError::Weights { name: name.to_owned(), error }),
        },
    };
    if let Some(layout) = manifest.batching.layout.filter(|layout| !model.layouts().contains(layout)) {
        let message = format!(
            "[batching] layout: architecture {} has no {} layout",
            manifest.contract.architecture,
            layout.name()
        );
        let file = directory.join(name).join("model.toml");
        return Err(RepositoryError::Manifest {
            name: name.to_owned(),
            error: ManifestError { file, line: None, message },
        });
    }
    let tokenizer = load_tokenizer(&manifest, &folder)
        .map_err(|error| RepositoryError::Tokenizer { name: name.to_owned(), error })?;
    Ok(Loaded::Model(Box::new(ModelEntry { manifest, model, tokenizer: tokenizer.map(Arc::new) })))
}

/// Whether executors of a device compute this model. Says why not where somebody might expect it.
fn runs_on_device(manifest: &Manifest) -> bool {
    let Some(params) = &manifest.bert else { return false };
    let why = match (manifest.placement, bert::has_program(params)) {
        (Placement::Inline, _) => "its placement is inline".to_owned(),
        (Placement::Executor, Err(why)) => why,
        (Placement::Executor, Ok(())) => return true,
    };
    tracing::warn!(model = manifest.contract.name, why, "this model runs on the CPU, and not on the device");
    false
}

fn skipped(name: &str, file: &Path, weights: &WeightsSpec) -> Skipped {
    let how = match &weights.fetch {
        Some(command) => format!("; `{command}` fetches it"),
        None => String::new(),
    };
    Skipped { name: name.to_owned(), reason: format!("model {name} is skipped: {} is not there{how}", file.display()) }
}

/// What the architecture asks of its manifest, before any file is opened.
fn check_architecture(manifest: &Manifest) -> Result<(), String> {
    let contract = &manifest.contract;
    let architecture = contract.architecture.as_str();
    let has_weights = match architecture {
        "bert" => bert::check(manifest).map(|_| true),
        "digits" => digits::check(contract).map(|()| true),
        "echo" => echo::check(contract).map(|()| false),
        "faulty" => faulty::check(contract).map(|()| false),
        "sleep" => sleep::check(contract).map(|()| false),
        "witness" => witness::check(contract).map(|()| false),
        _ => {
            let nearest = (ARCHITECTURES.iter())
                .max_by(|a, b| strsim::jaro_winkler(architecture, a).total_cmp(&strsim::jaro_winkler(architecture, b)))
                .expect("there are architectures");
            return Err(format!(
                "architecture {architecture:?} is unknown; did you mean {nearest:?}? Known: {}",
                ARCHITECTURES.join(", ")
            ));
        }
    }
    .map_err(|message| format!("architecture {architecture}: {message}"))?;
    if manifest.weights.is_some() && !has_weights {
        return Err(format!("architecture {architecture} has no weights, expected no [weights] table"));
    }
    Ok(())
}

fn build(manifest: &Manifest, folder: &Path, options: &LoadOptions) -> Result<Arc<dyn LoadedModel>, WeightsError> {
    let contract = manifest.contract.clone();
    let open = || {
        let spec = manifest.weights.clone().unwrap_or_default();
        let file = folder.join("weights.safetensors");
        Weights::open(&file, options.weight_bytes_max, spec.sha256.as_deref(), spec.names, &options.device)
    };
    match contract.architecture.as_str() {
        "echo" => Ok(Arc::new(echo::Echo::new(contract))),
        "sleep" => Ok(Arc::new(sleep::Sleep::new(contract))),
        "faulty" => Ok(Arc::new(faulty::Faulty::new(contract))),
        "witness" => Ok(Arc::new(witness::Witness::new(contract, folder.parent().unwrap_or(folder)))),
        "digits" => {
            let mut weights = open()?;
            let model = digits::Digits::load(contract, &mut weights, &options.device)?;
            weights.finish()?;
            Ok(Arc::new(model))
        }
        "bert" => {
            let mut weights = open()?;
            let params = bert::check(manifest).expect("check_architecture came first");
            let model = bert::Bert::load(manifest, params, &mut weights, options)?;
            weights.finish()?;
            Ok(Arc::new(model))
        }
        other => unreachable!("check_architecture refuses {other}"),
    }
}

fn load_tokenizer(manifest: &Manifest, folder: &Path) -> Result<Option<TextTokenizer>, TokenizerError> {
    let (Some(file), Some(spec)) = (&manifest.text, &manifest.contract.text) else { return Ok(None) };
    let length = manifest.contract.length.as_ref().expect("Contract::checked ties text to an input with a length");
    let limits =
        TextLimits { bytes_max: spec.bytes_max, len_min: length.min, len_max: length.max, truncate: file.truncate };
    let range = manifest.contract.inputs[spec.into].range;
    let last_id = range.map_or(u32::MAX, |[_, high]| u32::try_from(high).unwrap_or(u32::MAX));
    TextTokenizer::load(&folder.join(&file.tokenizer), file.sha256.as_deref(), limits, last_id).map(Some)
}
