//! Compiles kernels/*.cu for the feature `cuda`; does nothing without it.
//!
//! Each file becomes one fat binary: machine code for the architectures of [`ARCHITECTURES`], and text that the driver compiles for
//! those that come later. `$OUT_DIR/kernels.rs` lists them for device/cuda. A file is compiled again when it, a header beside it, the
//! compiler or an option changed.
//!
//! `FERRY_KERNELS=skip` embeds empty modules, for lints and links where there is no nvcc; the program then says that it has none.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsStr;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

/// `-gencode` of each: machine code for Ampere, Ada and Hopper with its own instructions, and text for what is newer.
const ARCHITECTURES: [&str; 4] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=compute_80",
];

/// Line numbers are for profilers and compute-sanitizer; they cost nothing at run time.
const OPTIONS: [&str; 4] = ["-fatbin", "-std=c++17", "-O3", "-lineinfo"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["FERRY_KERNELS", "FERRY_NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if let Err(message) = build() {
        println!("cargo:error={message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let sources = files("kernels", "cu")?;
    let skip = match env::var("FERRY_KERNELS").as_deref() {
        Ok("skip") => true,
        Ok("") | Err(_) => false,
        Ok(other) => return Err(format!("FERRY_KERNELS is \"{other}\"; expected \"skip\", or none")),
    };
    if !skip {
        compile_all(&sources, &out)?;
    }
    let text = list(&sources, skip);
    let to = out.join("kernels.rs");
    fs::write(&to, text).map_err(|error| format!("cannot write {}: {error}", to.display()))
}

fn home() -> Option<PathBuf> {
    env::var_os("CUDA_HOME").filter(|home| !home.is_empty()).map(PathBuf::from)
}

/// Those of a folder, not of its subfolders, with this extension, sorted.
fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("cannot read {folder}: {error}"))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension() == Some(OsStr::new(extension)))
        .collect();
    found.sort();
    Ok(found)
}

fn stem(source: &Path) -> &str {
    source.file_stem().and_then(OsStr::to_str).expect("kernels have plain names")
}

/// The compiler, and what it says of itself.
fn nvcc() -> Result<(PathBuf, String), String> {
    let named = env::var_os("FERRY_NVCC").filter(|path| !path.is_empty()).map(PathBuf::from);
    let in_home = home().map(|home| home.join("bin/nvcc"));
    let places = named.into_iter().chain(in_home).chain(["nvcc".into(), "/usr/local/cuda/bin/nvcc".into()]);
    for place in places {
        if let Ok(output) = Command::new(&place).arg("--version").output()
            && output.status.success()
        {
            return Ok((place, String::from_utf8_lossy(&output.stdout).into_owned()));
        }
    }
    Err("the feature cuda needs nvcc, which was not found: run tools/cuda-toolkit DIR and source DIR/env".to_owned())
}

fn compile_all(sources: &[PathBuf], out: &Path) -> Result<(), String> {
    if sources.is_empty() {
        return Ok(());
    }
    let (nvcc, version) = nvcc()?;
    let mut headers = DefaultHasher::new();
    (ARCHITECTURES, OPTIONS, version).hash(&mut headers);
    for header in files("kernels", "cuh")?.into_iter().chain(files("kernels", "h")?) {
        (header.as_os_str(), read(&header)?).hash(&mut headers);
    }
    let waiting = Mutex::new(sources.iter());
    let mistakes = Mutex::new(Vec::new());
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1_usize);
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, sources.len()) {
            scope.spawn(|| {
                loop {
                    let Some(source) = waiting.lock().expect("nobody panics").next() else { break };
                    if let Err(message) = compile(&nvcc, source, headers.clone(), out) {
                        mistakes.lock().expect("nobody panics").push(message);
                    }
                }
            });
        }
    });
    let mistakes = mistakes.into_inner().expect("nobody panics");
    if mistakes.is_empty() { Ok(()) } else { Err(mistakes.join("\n")) }
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    fs::read(file).map_err(|error| format!("cannot read {}: {error}", file.display()))
}

fn compile(nvcc: &Path, source: &Path, mut key: DefaultHasher, out: &Path) -> Result<(), String> {
    read(source)?.hash(&mut key);
    let key = format!("{:016x}", key.finish());
    let (target, key_file) =
        (out.join(stem(source)).with_extension("fatbin"), out.join(stem(source)).with_extension("key"));
    if target.exists() && fs::read_to_string(&key_file).is_ok_and(|before| before == key) {
        return Ok(());
    }
    let output = Command::new(nvcc)
        .args(OPTIONS)
        .args(ARCHITECTURES.iter().flat_map(|architecture| ["-gencode", architecture]))
        .arg("-o")
        .arg(&target)
        .arg(source)
        .output()
        .map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
    if !output.status.success() {
        // Written to standard output by some of its parts.
        eprintln!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        return Err(format!("nvcc refused {}: see above", source.display()));
    }
    fs::write(&key_file, key).map_err(|error| format!("cannot write {}: {error}", key_file.display()))
}

fn list(sources: &[PathBuf], skip: bool) -> String {
    let mut text = format!(
        "/// This build has no kernels (`FERRY_KERNELS=skip`): for lints only.\n\
         pub const KERNELS_MISSING: bool = {skip};\n\n\
         #[repr(C, align(64))]\n\
         struct Aligned<T: ?Sized>(T);\n\n\
         /// Each file of kernels/, by its name without `.cu`, and its fat binary.\n\
         pub const MODULES: &[(&str, &[u8])] = &[\n"
    );
    for name in sources.iter().map(|source| stem(source)) {
        text += &if skip {
            format!("    ({name:?}, &Aligned([]).0),\n")
        } else {
            format!("    ({name:?}, &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))).0),\n")
        };
    }
    text + "];\n"
}
