//! `ferry check`: reads the configuration and every manifest, prints what they allow, and warns of knobs that work
//! against each other. Starts nothing, opens no port, loads no weights.
//!
//! Always true
//! - Exit status 0: it can be served, perhaps with findings. 1: it cannot; every mistake was printed.
//!
//! Elsewhere: what contradicts what (findings.rs).

mod findings;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ferry::access::AccessFiles;
use ferry::config::limits::{MemoryPart, SETTINGS, memory, memory_total};
use ferry::config::{Config, Machine};
use ferry::models::manifest::Manifest;
use ferry::models::repository;
use ferry::scheduler::Edges;

use self::findings::{Finding, Given, Severity, findings};
use super::{ConfigArgs, EXIT_FAILED};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// What was found out.
#[derive(Default)]
struct Report {
    config: Option<Config>,
    manifests: Vec<Manifest>,
    memory: Vec<MemoryPart>,
    errors: Vec<String>,
    findings: Vec<Finding>,
}

pub fn run(args: Args) -> ExitCode {
    let report = check(&args.config);
    if args.json {
        println!("{}", report.to_json());
    } else {
        print!("{}", report.to_text());
    }
    if report.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) }
}

fn check(args: &ConfigArgs) -> Report {
    let mut report = Report::default();
    let config = match args.load(&[]) {
        Ok(config) => config,
        Err(errors) => {
            report.errors = errors.0.iter().map(ToString::to_string).collect();
            return report;
        }
    };
    if let Some(Err(message)) = AccessFiles::of(&config).map(AccessFiles::open) {
        report.errors.push(message);
    }
    match repository::names(&config.models) {
        Ok(names) if names.is_empty() => {
            report.errors.push(format!("{} holds no <name>/model.toml", config.models.display()));
        }
        Ok(names) => {
            for name in names {
                match repository::read_manifest(&config.models, &name) {
                    Ok(manifest) => {
                        report.note_missing_weights(&config, &manifest);
                        report.manifests.push(manifest);
                    }
                    Err(error) => report.errors.push(error.to_string()),
                }
            }
        }
        Err(error) => report.errors.push(error.to_string()),
    }
    let staging = staging_bytes(&config, &report.manifests);
    report.memory = memory(&config, staging, weight_bytes(&config.models, &report.manifests));
    report.errors.extend(report.manifests.iter().filter_map(|manifest| findings::unservable(&config, manifest)));
    let machine = Machine::here();
    let given = Given {
        config: &config,
        manifests: &report.manifests,
        cores: machine.cores,
        memory_bytes: memory_total(&report.memory),
        machine_bytes: machine.memory,
    };
    report.findings.extend(findings(&given));
    report.config = Some(config);
    report
}

/// What the slots of all executors hold once each has seen the largest batch. Buffers are shared by models and never
/// shrink, so the largest model counts.
fn staging_bytes(config: &Config, manifests: &[Manifest]) -> u64 {
    let largest = manifests.iter().map(batch_bytes_max).max().unwrap_or(0);
    largest * config.threads.executors as u64 * u64::from(config.executor.slots)
}

/// Bytes of inputs and outputs of the largest batch, over all buckets.
fn batch_bytes_max(manifest: &Manifest) -> u64 {
    let contract = &manifest.contract;
    let bytes_at = |len: u32| -> u64 {
        let rows = u64::from(manifest.batching.rows_at(len));
        contract.inputs.iter().chain(&contract.outputs).map(|spec| rows * spec.row_bytes(len) as u64).sum()
    };
    manifest.batching.buckets.iter().map(|len| bytes_at(*len)).max().unwrap_or(0)
}

/// Sizes of the weight files that are there; their layout in memory is the model's own matter.
fn weight_bytes(directory: &Path, manifests: &[Manifest]) -> u64 {
    manifests.iter().filter_map(|manifest| Some(weight_file(directory, manifest).metadata().ok()?.len())).sum()
}

fn weight_file(directory: &Path, manifest: &Manifest) -> PathBuf {
    let contract = &manifest.contract;
    directory.join(&contract.name).join(&contract.version).join("weights.safetensors")
}

fn size_text(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", units[unit]) }
}

impl Report {
    /// A model without its weights is skipped or refused at the start: better said now.
    fn note_missing_weights(&mut self, config: &Config, manifest: &Manifest) {
        let Some(weights) = &manifest.weights else { return };
        let file = weight_file(&config.models, manifest);
        if file.exists() {
            return;
        }
        let how = weights.fetch.as_ref().map_or(String::new(), |command| format!("; `{command}` fetches it"));
        let message = format!("{} is not there{how}", file.display());
        if weights.optional {
            self.findings.push(Finding {
                code: "weights_missing",
                severity: Severity::Warning,
                model: Some(manifest.contract.name.clone()),
                knob: "weights.optional",
                message,
            });
        } else {
            self.errors.push(format!("{}: {message}", manifest.contract.name));
        }
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        if let Some(config) = &self.config {
            text += "limits\n";
            for setting in SETTINGS {
                text += &format!("  {:<30} {}\n", setting.key, setting.read(config));
            }
            text += "models\n";
            for manifest in &self.manifests {
                text += &format!(
                    "  {} {}: policy {}, batches up to {} rows and {} cells, buckets {}{:?}, queue delay {}, largest batch {}\n",
                    manifest.contract.name,
                    manifest.contract.version,
                    manifest.batching.policy,
                    manifest.batching.rows_max,
                    manifest.batching.padded_cells_max,
                    if manifest.batching.edges == Edges::Auto { "automatic, at first " } else { "" },
                    manifest.batching.buckets,
                    manifest
                        .batching
                        .queue_delay_max
                        .map_or("as long as it pays".to_owned(), |delay| format!("up to {delay:?}")),
                    size_text(batch_bytes_max(manifest)),
                );
            }
            text += "memory at most\n";
            for part in &self.memory {
                text += &format!("  {:>10}  {}\n", size_text(part.bytes), part.what);
            }
            text += &format!("  {:>10}  together\n", size_text(memory_total(&self.memory)));
        }
        for finding in &self.findings {
            let Finding { code, severity, knob, .. } = finding;
            text += &format!("{}: {} [{code}: change {knob}]\n", severity.name(), finding.sentence());
        }
        for error in &self.errors {
            text += &format!("error: {error}\n");
        }
        text
    }

    fn to_json(&self) -> serde_json::Value {
        let limits: serde_json::Map<String, serde_json::Value> = self
            .config
            .iter()
            .flat_map(|config| SETTINGS.iter().map(move |setting| (setting.key.to_owned(), setting.json(config))))
            .collect();
        let models: Vec<serde_json::Value> = self
            .manifests
            .iter()
            .map(|manifest| {
                serde_json::json!({
                    "name": manifest.contract.name,
                    "version": manifest.contract.version,
                    "rows_max": manifest.batching.rows_max,
                    "padded_cells_max": manifest.batching.padded_cells_max,
                    "buckets": manifest.batching.buckets,
                    "batch_bytes_max": batch_bytes_max(manifest),
                })
            })
            .collect();
        let memory: Vec<serde_json::Value> =
            self.memory.iter().map(|part| serde_json::json!({ "what": part.what, "bytes": part.bytes })).collect();
        let warnings = self.findings.iter().filter(|finding| finding.severity == Severity::Warning);
        serde_json::json!({
            "ok": self.errors.is_empty(),
            "errors": self.errors,
            "warnings": warnings.map(Finding::sentence).collect::<Vec<_>>(),
            "findings": self.findings.iter().map(Finding::to_json).collect::<Vec<_>>(),
            "limits": limits,
            "models": models,
            "memory": memory,
            "memory_bytes": memory_total(&self.memory),
        })
    }
}
