//! Hands a model its parameters, by name, out of one safetensors file.
//!
//! The file is read once into memory, checked against its SHA-256 where the manifest gives one, and then every
//! tensor is asked for by its exact name and shape. Nothing is matched by position or by guess: a file that is nearly
//! right is the dangerous one.
//!
//! Always true
//! - A tensor that was handed out is f32, has the shape asked for, and holds only finite numbers.
//! - `finish` succeeds only if every tensor of the file was handed out or is ignored by name in the manifest.
//! - Each failure names the file and the tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

/// How names of parameters become names in the file. What `[weights]` of a manifest says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightNames {
    /// Put before every name that `map` does not mention, for checkpoints that keep the encoder under `bert.`.
    pub prefix: String,
    /// The model's name for a parameter, to the file's name for it.
    pub map: BTreeMap<String, String>,
    /// Tensors of the file that the model is known not to need: a full name, or a beginning that ends in `.`.
    pub ignore: Vec<String>,
}

/// A weights file that was not taken: which, and why.
#[derive(Debug)]
pub struct WeightsError {
    pub file: PathBuf,
    /// Boxed: every call of a loader returns one of these, and none but the last is ever an error.
    pub fault: Box<WeightsFault>,
}

/// Why a weights file was not taken. Every message says what was expected and what came.
#[derive(Debug)]
pub enum WeightsFault {
    Missing,
    Unreadable(std::io::Error),
    TooLarge { expected: u64, received: u64 },
    Checksum { expected: String, received: String },
    NotSafetensors(candle_core::Error),
    MissingTensor { name: String, nearest: Option<String> },
    UnexpectedTensors(Vec<String>),
    UnusedMap(Vec<String>),
    Shape { name: String, expected: Vec<usize>, received: Vec<usize> },
    Dtype { name: String, received: String },
    NotFinite { name: String, index: usize, value: f32 },
    Device { name: String, error: candle_core::Error },
}

impl fmt::Display for WeightsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.fault)
    }
}

impl fmt::Display for WeightsFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(f, "the weights file is not there"),
            Self::Unreadable(error) => write!(f, "cannot be read: {error}"),
            Self::TooLarge { expected, received } => {
                write!(f, "expected at most {expected} bytes of weights, the file has {received}")
            }
            Self::Checksum { expected, received } => {
                write!(f, "the manifest expects SHA-256 {expected}, the file has {received}")
            }
            Self::NotSafetensors(error) => write!(f, "is not a safetensors file: {error}"),
            Self::MissingTensor { name, nearest: None } => write!(f, "expected a tensor `{name}`, there is none"),
            Self::MissingTensor { name, nearest: Some(nearest) } => {
                write!(f, "expected a tensor `{name}`, there is none; the nearest name is `{nearest}`")
            }
            Self::UnexpectedTensors(names) => write!(
                f,
                "the model has no place for {}; name them in [weights] ignore if they are not needed",
                some_of(names)
            ),
            Self::UnusedMap(names) => {
                write!(f, "[weights] map renames {}, which this model does not ask for", some_of(names))
            }
            Self::Shape { name, expected, received } => {
                write!(f, "tensor `{name}` is expected to have shape {expected:?}, the file has {received:?}")
            }
            Self::Dtype { name, received } => {
                write!(f, "tensor `{name}` is expected to be F32, the file has {received}")
            }
            Self::NotFinite { name, index, value } => {
                write!(f, "tensor `{name}` is expected to hold finite numbers, element {index} is {value}")
            }
            Self::Device { name, error } => write!(f, "tensor `{name}` cannot be put on the device: {error}"),
        }
    }
}

impl std::error::Error for WeightsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.fault {
            WeightsFault::Unreadable(error) => Some(error),
            WeightsFault::NotSafetensors(error) | WeightsFault::Device { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A wrong file can have thousands of wrong names; eight are enough to see what kind of wrong it is.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// As manifests write it.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A weights file being handed out. Lives only while a model is built.
pub struct Weights {
    file: PathBuf,
    names: WeightNames,
    tensors: BufferedSafetensors,
    device: Device,
    taken: BTreeSet<String>,
    map_used: BTreeSet<String>,
    taken_bytes: u64,
}

impl Weights {
    /// Reads the file. `bytes_max` is compared with its size before anything is allocated; `sha256` comes from the manifest.
    pub fn open(
        file: &Path,
        bytes_max: u64,
        sha256: Option<&str>,
        names: WeightNames,
        device: &Device,
    ) -> Result<Weights, WeightsError> {
        let failed = |fault| WeightsError { file: file.to_path_buf(), fault: Box::new(fault) };
        let unreadable = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => failed(WeightsFault::Missing),
            _ => failed(WeightsFault::Unreadable(error)),
        };
        let size = std::fs::metadata(file).map_err(unreadable)?.len();
        if size > bytes_max {
            return Err(failed(WeightsFault::TooLarge { expected: bytes_max, received: size }));
        }
        // Owned memory, not a mapping: a file that is replaced or cut short while it serves changes nothing.
        let bytes = std::fs::read(file).map_err(unreadable)?;
        if let Some(expected) = sha256 {
            let received = sha256_hex(&bytes);
            if !received.eq_ignore_ascii_case(expected) {
                return Err(failed(WeightsFault::Checksum { expected: expected.to_owned(), received }));
            }
        }
        let tensors = BufferedSafetensors::new(bytes).map_err(|error| failed(WeightsFault::NotSafetensors(error)))?;
        Ok(Weights {
            file: file.to_path_buf(),
            names,
            tensors,
            device: device.clone(),
            taken: BTreeSet::new(),
            map_used: BTreeSet::new(),
            taken_bytes: 0,
        })
    }

    /// The tensor that the model calls `parameter`, on the device.
    pub fn take(&mut self, parameter: &str, shape: &[usize]) -> Result<Tensor, WeightsError> {
        let prefixed = format!("{}{parameter}", self.names.prefix);
        self.take_named(parameter, prefixed, shape)
    }

    /// The same for a parameter that does not stand under the prefix.
    pub fn take_beside(&mut self, parameter: &str, shape: &[usize]) -> Result<Tensor, WeightsError> {
        self.take_named(parameter, parameter.to_owned(), shape)
    }

    fn take_named(&mut self, parameter: &str, usual: String, shape: &[usize]) -> Result<Tensor, WeightsError> {
        let name = match self.names.map.get(parameter) {
            Some(name) => {
                self.map_used.insert(parameter.to_owned());
                name.clone()
            }
            None => usual,
        };
        let Ok(view) = self.tensors.get(&name) else {
            let nearest = self.nearest(&name);
            return Err(self.failed(WeightsFault::MissingTensor { name, nearest }));
        };
        if view.shape() != shape {
            let received = view.shape().to_vec();
            return Err(self.failed(WeightsFault::Shape { name, expected: shape.to_vec(), received }));
        }
        if DType::try_from(view.dtype()).ok() != Some(DType::F32) {
            let received = format!("{:?}", view.dtype());
            return Err(self.failed(WeightsFault::Dtype { name, received }));
        }
        let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        if let Some((index, value)) = values.enumerate().find(|(_, value)| !value.is_finite()) {
            return Err(self.failed(WeightsFault::NotFinite { name, index, value }));
        }
        match self.tensors.load(&name, &self.device) {
            Ok(tensor) => {
                self.taken_bytes += (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
                self.taken.insert(name);
                Ok(tensor)
            }
            Err(error) => Err(self.device_error(&name, error)),
        }
    }

    /// Bytes of the tensors handed out so far.
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes
    }

    /// Called when the model has all it wants: what is left over must have been announced.
    pub fn finish(self) -> Result<(), WeightsError> {
        let ignored = |name: &str| {
            self.names.ignore.iter().any(|i| name == i || (i.ends_with('.') && name.starts_with(i.as_str())))
        };
        let mut left: Vec<String> = (self.tensors.tensors().into_iter())
            .map(|(name, _)| name)
            .filter(|name| !self.taken.contains(name) && !ignored(name))
            .collect();
        if !left.is_empty() {
            left.sort();
            return Err(self.failed(WeightsFault::UnexpectedTensors(left)));
        }
        let unused: Vec<String> =
            self.names.map.keys().filter(|parameter| !self.map_used.contains(*parameter)).cloned().collect();
        if !unused.is_empty() {
            return Err(self.failed(WeightsFault::UnusedMap(unused)));
        }
        Ok(())
    }

    /// Turns what a device said while a model folded its parameters into an error that names the file.
    pub fn device_error(&self, parameter: &str, error: candle_core::Error) -> WeightsError {
        self.failed(WeightsFault::Device { name: parameter.to_owned(), error })
    }

    fn failed(&self, fault: WeightsFault) -> WeightsError {
        WeightsError { file: self.file.clone(), fault: Box::new(fault) }
    }

    fn nearest(&self, name: &str) -> Option<String> {
        (self.tensors.tensors().into_iter())
            .map(|(candidate, _)| candidate)
            .filter(|candidate| !self.taken.contains(candidate))
            .max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
    }
}
