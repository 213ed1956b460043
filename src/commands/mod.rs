//! The commands of `ferry`, one file each: their arguments, what they print, and their exit status.
//!
//! Always true
//! - With `--json` exactly one JSON document is printed on standard output, and nothing else there.
//! - What is for people while work goes on (progress, plans, mistakes) is printed on standard error.

pub mod capture;
pub mod check;
pub mod connection;
pub mod devices;
pub mod explain;
mod http;
pub mod import;
pub mod infer;
pub mod load;
pub mod models;
pub mod offline;
pub mod replay;
pub mod serve;
pub mod set;
pub mod shadow;
pub mod timeline;
pub mod token;
pub mod top;
pub mod trial;
pub mod tune;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use clap::Args;
use ferry::config::{Config, ConfigErrors};

/// The work failed.
pub const EXIT_FAILED: u8 = 1;
/// The command was used wrongly.
pub const EXIT_USE: u8 = 2;
/// Not now, perhaps after a new start: sysexits' EX_TEMPFAIL. A device was lost.
pub const EXIT_AGAIN: u8 = 75;
/// The configuration or the machine does not allow it: starting again without a change would fail again.
pub const EXIT_CONFIG: u8 = 78;

/// Where the configuration comes from. Later wins: file, `--set`, the flags that have names of their own.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigArgs {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of <name>/model.toml.
    #[arg(long, value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Sets one key, such as frontend.credit_requests=512; can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl ConfigArgs {
    /// Loads the configuration with `more` settings after all others.
    pub fn load(&self, more: &[(&str, Option<String>)]) -> Result<Config, ConfigErrors> {
        let mut sets = self.sets.clone();
        let models = self.models.as_deref().map(Path::display).map(|path| path.to_string());
        for (key, value) in more.iter().cloned().chain([("models", models)]) {
            if let Some(value) = value {
                // Quoted: a directory called 12 is a text and not a number.
                sets.push(format!("{key}={}", toml::Value::String(value)));
            }
        }
        Config::load(self.config.as_deref(), &sets)
    }
}

/// One thread inside each executor: candle splits its matrix products over all cores unless this variable says
/// otherwise, and executors are already one per core. A process cannot safely change its own environment, so it is
/// started again, under the same process id, with the variable set.
pub fn run_each_model_on_one_thread() -> std::io::Result<()> {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_some() {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "ferry".into());
    // Returns only when it failed.
    Err(std::process::Command::new(std::env::current_exe()?).arg0(name).args(arguments).env(VARIABLE, "1").exec())
}
