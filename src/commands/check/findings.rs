//! What manifests and configuration contradict by themselves, before anything has come: the static half of the linter.
//!
//! Pure. It knows no traffic, so it speaks of what can never be, or always is: a batch that no callers can fill, a window longer
//! than the deadline, a request that no queue holds. What depends on the traffic is said by the running server.
//!
//! Always true
//! - A finding has a code that stays, the numbers it follows from, and the key to change as it is written in the manifest
//!   (`batching.rows_max`) or in the configuration (`frontend.credit_requests`).
//! - What is both here and in the live half has one code.
//!
//! Elsewhere: values that are wrong by themselves (models/manifest.rs, config/limits.rs refuse them); the live half
//! (scheduler/lint.rs).

use std::time::Duration;

use ferry::config::{Config, Place};
use ferry::models::manifest::{Manifest, Placement, Precision};
use ferry::scheduler::{Edges, PadTo, PolicyKind, lint::Kind};
use ferry::vocab::Layout;

use super::size_text;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It costs answers or speed as long as it stays.
    Warning,
    /// A setting without effect, or a limit that some callers meet: perhaps it is meant.
    Note,
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Severity::Warning => "warning",
            Severity::Note => "note",
        }
    }
}

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub code: &'static str,
    pub severity: Severity,
    /// None: of the server.
    pub model: Option<String>,
    /// The key to change.
    pub knob: &'static str,
    /// A sentence with the numbers.
    pub message: String,
}

impl Finding {
    /// The sentence, with the model it is about.
    pub fn sentence(&self) -> String {
        match &self.model {
            Some(model) => format!("{model}: {}", self.message),
            None => self.message.clone(),
        }
    }

    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "code": self.code,
            "severity": self.severity.name(),
            "model": self.model,
            "knob": self.knob,
            "message": self.message,
        })
    }
}

/// What the rules look at.
pub struct Given<'a> {
    pub config: &'a Config,
    pub manifests: &'a [Manifest],
    /// Physical cores.
    pub cores: usize,
    /// The most that the limits allow.
    pub memory_bytes: u64,
    /// What the machine or its container gives; `u64::MAX` where it does not say.
    pub machine_bytes: u64,
}

/// Shares of the executors below which a model hardly runs beside busy others.
const SHARE_TINY: f64 = 0.01;

/// A canary that looks at more than one row in so many costs what people notice.
const CANARY_EVERY_LOW: u32 = 20;

/// Everything there is to say: of the server first, then model by model.
pub fn findings(given: &Given<'_>) -> Vec<Finding> {
    let mut found = Found { model: None, findings: Vec::new() };
    machine(given, &mut found);
    devices(given.config, &mut found);
    for manifest in given.manifests {
        found.model = Some(manifest.contract.name.clone());
        let model = Model { config: given.config, manifest };
        model.callers(&mut found);
        model.queue(&mut found);
        model.sizes(&mut found);
        model.window(&mut found);
        model.buckets(&mut found);
        model.budget(&mut found);
        model.share(given.manifests, &mut found);
    }
    found.findings
}

/// Collects findings about one model, or the server.
struct Found {
    model: Option<String>,
    findings: Vec<Finding>,
}

impl Found {
    fn add(&mut self, code: &'static str, severity: Severity, knob: &'static str, message: String) {
        self.findings.push(Finding { code, severity, model: self.model.clone(), knob, message });
    }

    fn warn(&mut self, code: &'static str, knob: &'static str, message: String) {
        self.add(code, Severity::Warning, knob, message);
    }

    fn note(&mut self, code: &'static str, knob: &'static str, message: String) {
        self.add(code, Severity::Note, knob, message);
    }
}

fn machine(given: &Given<'_>, found: &mut Found) {
    let (config, cores) = (given.config, given.cores);
    let threads = &config.threads;
    let on_cpu = config.executor.device == Place::Cpu;
    if on_cpu && threads.shards + threads.executors > cores {
        found.warn(
            "threads_above_cores",
            "threads.executors",
            format!(
                "{} shards and {} executors share {cores} core(s): each batch gets slower, none gets sooner",
                threads.shards, threads.executors
            ),
        );
    }
    let computing = threads.executors * config.executor.threads as usize;
    if on_cpu && config.executor.threads > 1 && computing > cores {
        found.warn(
            "executor_threads_above_cores",
            "executor.threads",
            format!(
                "{} executors of {} threads are {computing} threads on {cores} core(s): batches wait for their own parts",
                threads.executors, config.executor.threads
            ),
        );
    }
    if !config.frontend.spin.is_zero() && threads.shards + threads.executors >= cores {
        found.warn(
            "spin_without_core",
            "frontend.spin_us",
            "frontend.spin_us keeps a core busy that executors need; every core already has a thread".into(),
        );
    }
    let canary = config.executor.canary_every;
    if (1..=CANARY_EVERY_LOW).contains(&canary) {
        found.warn(
            "canary_often",
            "executor.canary_every",
            format!(
                "one row in {canary} is computed once more, alone, behind its batch: up to {:.0} % more rows, each as a batch \
                 of its own, while the next batch waits; one in 1000 finds the same faults later",
                100.0 / f64::from(canary)
            ),
        );
    }
    if given.memory_bytes > given.machine_bytes {
        found.warn(
            "limits_above_memory",
            "queue.bytes_max",
            format!(
                "the limits add up to {} and this machine, or its container, has {}: lower queue.bytes_max or \
                 frontend.output_bytes_total_max",
                size_text(given.memory_bytes),
                size_text(given.machine_bytes)
            ),
        );
    }
}

fn devices(config: &Config, found: &mut Found) {
    let (devices, executors) = (config.executor.device.devices(), config.threads.executors);
    if devices > 1 && !executors.is_multiple_of(devices) {
        found.warn(
            "executors_uneven",
            "threads.executors",
            format!("{executors} executors are shared by {devices} devices: some get one more than others, or none"),
        );
    }
}

/// One model under one configuration.
struct Model<'a> {
    config: &'a Config,
    manifest: &'a Manifest,
}

impl Model<'_> {
    /// Executors that run it.
    fn executors(&self) -> u64 {
        match self.manifest.placement {
            Placement::Inline => 1,
            Placement::Executor => self.config.threads.executors as u64,
        }
    }

    /// Rows of its batches lie end to end.
    fn packs(&self) -> bool {
        self.manifest.batching.layout.unwrap_or(match self.manifest.bert {
            Some(_) => Layout::Packed,
            None => Layout::Padded,
        }) == Layout::Packed
    }

    /// Bytes of a request.
    fn request_bytes(&self, rows: u32, len: u32) -> u64 {
        let contract = &self.manifest.contract;
        contract.input_offset(contract.inputs.len(), rows, len) as u64
    }

    fn len_min(&self) -> u32 {
        self.manifest.contract.length.as_ref().map_or(1, |length| length.min)
    }

    /// Can those who may connect fill a batch at all?
    fn callers(&self, found: &mut Found) {
        let frontend = &self.config.frontend;
        let batching = &self.manifest.batching;
        let contract = &self.manifest.contract;
        let (connections, credit) = (u64::from(frontend.connections_max), u64::from(frontend.credit_requests));
        // The shortest rows are those of which a batch holds the most, and credit in bytes too.
        let cap = u64::from(batching.rows_at(self.len_min()));
        let row_bytes = self.request_bytes(1, self.len_min()).max(1);
        let rows_each = (credit * u64::from(contract.rows_max)).min(frontend.credit_bytes / row_bytes);
        let rows = connections.saturating_mul(rows_each);
        let callers = connections * credit;
        let code = Kind::RowsMaxAboveInFlight.code();
        if rows < cap {
            found.warn(
                code,
                "batching.rows_max",
                format!(
                    "batches up to {cap} rows, but callers can have at most {rows} in flight, in {callers} requests: no \
                     batch is ever more than {:.0} % full",
                    100.0 * rows as f64 / cap as f64
                ),
            );
        } else if callers < cap {
            found.warn(
                code,
                "frontend.credit_requests",
                format!(
                    "batches up to {cap} rows, but callers can have at most {callers} in flight if each sends one row: \
                     only requests of many rows fill a batch"
                ),
            );
        } else if credit < cap {
            found.warn(
                "rows_max_above_credit",
                "frontend.credit_requests",
                format!(
                    "batches up to {cap} rows, but one connection can have at most {credit} requests in flight: a single \
                     caller never fills a batch with requests of one row"
                ),
            );
        }
        let longest = self.request_bytes(1, contract.len_max()).max(1);
        let by_bytes = frontend.credit_bytes / longest;
        if by_bytes < credit && by_bytes < u64::from(batching.rows_at(batching.bucket_longest())) {
            found.note(
                "credit_bytes_below_batch",
                "frontend.credit_bytes",
                format!(
                    "of its longest rows, of {longest} bytes each, a connection can have {by_bytes} in flight by \
                     frontend.credit_bytes {}, not {credit}",
                    frontend.credit_bytes
                ),
            );
        }
    }

    /// Does what may wait hold a batch for each executor, and the largest request?
    fn queue(&self, found: &mut Found) {
        let (own, server) = (&self.manifest.queue, &self.config.queue);
        let batching = &self.manifest.batching;
        let contract = &self.manifest.contract;
        let executors = self.executors();
        let longest = batching.bucket_longest();
        let batch_bytes = (batching.buckets.iter())
            .map(|len| self.request_bytes(batching.rows_at(*len), (*len).min(contract.len_max())))
            .max();
        let bounds = [
            ("rows", own.rows_max, u64::from(server.rows_max), ("queue_rows_below_batches", "queue.rows_max"), {
                (u64::from(batching.rows_max), u64::from(contract.rows_max))
            }),
            ("cells", own.cells_max, server.cells_max, ("queue_cells_below_batches", "queue.cells_max"), {
                (batching.padded_cells_max, u64::from(contract.rows_max) * u64::from(longest))
            }),
            ("bytes", own.bytes_max, server.bytes_max, ("queue_bytes_below_batches", "queue.bytes_max"), {
                (batch_bytes.unwrap_or(0), self.request_bytes(contract.rows_max, contract.len_max()))
            }),
        ];
        for (unit, own, server, (code, knob), (batch, request)) in bounds {
            let holds = own.unwrap_or(u64::MAX).min(server);
            let wanted = batch.saturating_mul(executors);
            if holds < batch {
                found.warn(
                    if unit == "rows" { Kind::RowsMaxAboveQueue.code() } else { code },
                    knob,
                    format!("one full batch has {batch} {unit}, but at most {holds} may wait: no batch is ever full"),
                );
            } else if holds < wanted {
                found.warn(
                    code,
                    knob,
                    format!(
                        "the queue holds {holds} {unit}, but {executors} executors want {wanted} for a full batch each"
                    ),
                );
            }
            if request > holds {
                found.warn(
                    "request_above_queue",
                    knob,
                    format!(
                        "a request may have {request} {unit}, but at most {holds} may wait: the largest are refused by \
                         an idle server too"
                    ),
                );
            }
        }
    }

    /// Do its requests and answers fit through the front end?
    fn sizes(&self, found: &mut Found) {
        let frontend = &self.config.frontend;
        let contract = &self.manifest.contract;
        let (rows, len) = (contract.rows_max, contract.len_max());
        let request = self.request_bytes(rows, len);
        if request > u64::from(frontend.payload_bytes_max) {
            found.warn(
                "request_above_payload",
                "frontend.payload_bytes_max",
                format!(
                    "its largest request has {request} bytes, but frontend.payload_bytes_max is {}",
                    frontend.payload_bytes_max
                ),
            );
        }
        if let Some(text) = contract.text.as_ref().filter(|text| text.bytes_max > frontend.payload_bytes_max) {
            found.warn(
                "request_above_payload",
                "text.bytes_max",
                format!(
                    "a text may have {} bytes, but frontend.payload_bytes_max is {}",
                    text.bytes_max, frontend.payload_bytes_max
                ),
            );
        }
        let answer: u64 = contract.outputs.iter().map(|spec| u64::from(rows) * spec.row_bytes(len) as u64).sum();
        if answer > u64::from(frontend.output_bytes_max) {
            found.warn(
                "answer_above_output",
                "frontend.output_bytes_max",
                format!(
                    "its largest answer has {answer} bytes, but frontend.output_bytes_max is {}: each one stops its \
                     connection from being read",
                    frontend.output_bytes_max
                ),
            );
        }
    }

    fn window(&self, found: &mut Found) {
        let batching = &self.manifest.batching;
        let knob = "batching.queue_delay_max_us";
        let Some(window) = batching.queue_delay_max.filter(|window| !window.is_zero()) else {
            if matches!(batching.policy, PolicyKind::Window | PolicyKind::Buckets) && batching.rows_max > 1 {
                found.note(
                    "window_without_delay",
                    knob,
                    format!(
                        "policy {} holds rows for queue_delay_max_us, and there is none: an idle executor takes what is \
                         there, one row at low rates",
                        batching.policy
                    ),
                );
            }
            return;
        };
        let (held, slo) = (millis(window), millis(batching.slo));
        if window > batching.slo {
            found.warn(
                Kind::DelayAboveSlo.code(),
                knob,
                format!("rows may be held for {held} ms, but slo_ms is {slo}: one without a deadline can be late before it runs"),
            );
        } else if window * 2 > batching.slo {
            found.note(
                "delay_near_slo",
                knob,
                format!(
                    "rows may be held for {held} ms of slo_ms {slo}: {} ms are left for the queue, the batch and the way",
                    millis(batching.slo - window)
                ),
            );
        }
        if window >= self.config.drain_timeout {
            found.warn(
                "delay_above_drain",
                "drain_timeout_ms",
                format!("batches wait up to {window:?}, but a drain ends after {:?}", self.config.drain_timeout),
            );
        }
        if batching.rows_at(self.len_min()) == 1 {
            found.note(
                "window_without_rows",
                knob,
                format!(
                    "a batch has room for 1 row, so it is full with its first: the window of {held} ms never applies"
                ),
            );
        }
    }

    /// Buckets that nothing uses, or that pad more than half.
    fn buckets(&self, found: &mut Found) {
        let batching = &self.manifest.batching;
        let Some(length) = &self.manifest.contract.length else { return };
        if batching.edges == Edges::Auto {
            return;
        }
        let given = batching.pad_to == PadTo::Bucket;
        if given && self.packs() && batching.policy != PolicyKind::Buckets {
            found.note(
                "buckets_without_effect",
                "batching.buckets",
                format!(
                    "{} buckets are given, but rows lie end to end and nothing is padded: only layout = \"padded\" or policy = \
                     \"buckets\" uses them",
                    batching.buckets.len()
                ),
            );
            return;
        }
        if !given {
            return;
        }
        let unused: Vec<u32> = batching.buckets.iter().copied().filter(|bucket| *bucket < length.min).collect();
        if !unused.is_empty() {
            found.note(
                Kind::BucketsUnused.code(),
                "batching.buckets",
                format!("no row is shorter than {} {}: buckets {unused:?} are never used", length.min, length.name),
            );
        }
        let mut shortest = length.min;
        for bucket in batching.buckets.iter().filter(|bucket| **bucket >= length.min) {
            let padding = 1.0 - f64::from(shortest) / f64::from(*bucket);
            // The first bucket of a model that takes rows from one cell up always looks so; its rows cost little.
            if padding > 0.5 && shortest > length.min {
                found.note(
                    "bucket_gap_wide",
                    "batching.buckets",
                    format!(
                        "a row of {shortest} {} is padded to {bucket}, the next bucket: {:.0} % of its cells are padding",
                        length.name,
                        100.0 * padding
                    ),
                );
            }
            shortest = bucket + 1;
        }
    }

    /// Does the budget of cells let rows share a batch?
    fn budget(&self, found: &mut Found) {
        let batching = &self.manifest.batching;
        if batching.rows_max == 1 || batching.cells_auto {
            return;
        }
        let (budget, longest) = (batching.padded_cells_max, batching.bucket_longest());
        let least = u64::from(batching.rows_max) * u64::from(self.len_min());
        if least > budget {
            found.note(
                Kind::RowsMaxNeverReached.code(),
                "batching.padded_cells_max",
                format!(
                    "rows_max is {}, but rows have at least {} cells: a budget of {budget} holds {} of them",
                    batching.rows_max,
                    self.len_min(),
                    batching.rows_at(self.len_min())
                ),
            );
        }
        if batching.rows_at(longest) == 1 {
            found.note(
                Kind::LongestRowsRunAlone.code(),
                "batching.padded_cells_max",
                format!(
                    "a budget of {budget} cells holds one row of {longest}: rows longer than {} never share a batch",
                    budget / 2
                ),
            );
        }
    }

    /// Its weight beside the others'.
    fn share(&self, all: &[Manifest], found: &mut Found) {
        let weight = self.manifest.batching.weight;
        let rivals: Vec<&Manifest> = all.iter().filter(|other| other.placement == self.manifest.placement).collect();
        let total: f64 = rivals.iter().map(|other| other.batching.weight).sum();
        if rivals.len() == 1 && weight != 1.0 {
            found.note(
                "weight_alone",
                "batching.weight",
                format!("weight is {weight}, but no other model runs on its executors: there is nothing to share"),
            );
        } else if weight / total < SHARE_TINY {
            found.note(
                "weight_tiny",
                "batching.weight",
                format!(
                    "weight {weight} of {total} in all is {:.2} % of the executors while the others are busy",
                    100.0 * weight / total
                ),
            );
        }
    }
}

/// A model that this configuration cannot serve although its manifest is right: a sentence for each.
pub fn unservable(config: &Config, manifest: &Manifest) -> Option<String> {
    let precision = manifest.bert.as_ref()?.precision;
    let name = &manifest.contract.name;
    (matches!(precision, Precision::F16 | Precision::BF16) && config.executor.device == Place::Cpu).then(|| {
        let written = if precision == Precision::F16 { "f16" } else { "bf16" };
        format!("{name}: precision = \"{written}\" is computed on a GPU only, but executor.device is cpu")
    })
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ferry::config::Machine;

    use super::*;

    /// A model of one input of 1 to 128 cells of 4 bytes.
    fn model(name: &str, batching: &str, more: &str) -> Manifest {
        let text = format!(
            "architecture = \"echo\"\nversion = \"1\"\n{more}\n\
             [dims.values]\nmin = 1\nmax = 128\n\
             [[input]]\nname = \"x\"\ndtype = \"f32\"\nshape = [\"values\"]\n\
             [[output]]\nname = \"x\"\ndtype = \"f32\"\nshape = [\"values\"]\n\
             [batching]\n{batching}\n"
        );
        Manifest::parse(name, Path::new("model.toml"), &text).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    fn config(sets: &[&str]) -> Config {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let machine = Machine { cores: 8, nofile: 4096, memory: u64::MAX };
        // One core stays free for the shards.
        let sets = [vec!["threads.executors=4".to_owned()], sets].concat();
        Config::load_on(machine, None, &sets).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn found(config: &Config, manifests: &[Manifest]) -> Vec<Finding> {
        findings(&Given { config, manifests, cores: 8, memory_bytes: 1, machine_bytes: 2 })
    }

    fn codes(findings: &[Finding]) -> Vec<(&str, &str)> {
        findings.iter().map(|finding| (finding.code, finding.knob)).collect()
    }

    /// What nobody could object to.
    const QUIET: &str = "rows_max = 8\nslo_ms = 50\nqueue_delay_max_us = 2000\nbuckets = [8, 16, 32, 64, 128]";

    #[test]
    fn each_contradiction_of_a_manifest_has_its_finding_and_no_other() {
        type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);
        let table: &[Case<'_>] = &[
            ("nothing to say", QUIET, &[]),
            (
                "a window longer than the deadline",
                "rows_max = 8\nslo_ms = 1.5\nqueue_delay_max_us = 2000",
                &[("delay_above_slo", "batching.queue_delay_max_us")],
            ),
            (
                "a window that leaves little of it",
                "rows_max = 8\nslo_ms = 3\nqueue_delay_max_us = 2000",
                &[("delay_near_slo", "batching.queue_delay_max_us")],
            ),
            (
                "a window longer than a drain",
                "rows_max = 8\nslo_ms = 200000\nqueue_delay_max_us = 30000000",
                &[("delay_above_drain", "drain_timeout_ms")],
            ),
            (
                "a window for batches of one row",
                "rows_max = 1\nqueue_delay_max_us = 2000",
                &[("window_without_rows", "batching.queue_delay_max_us")],
            ),
            (
                "a policy with a window that has none",
                "rows_max = 8\npolicy = \"window\"",
                &[("window_without_delay", "batching.queue_delay_max_us")],
            ),
            ("buckets far apart", "rows_max = 8\nbuckets = [8, 128]", &[("bucket_gap_wide", "batching.buckets")]),
            (
                "a budget of less than two of the longest rows",
                "rows_max = 8\npadded_cells_max = 200\nbuckets = [16, 32, 64, 128]",
                &[("longest_rows_run_alone", "batching.padded_cells_max")],
            ),
            (
                "more rows than one connection's credit",
                "rows_max = 300",
                &[("rows_max_above_credit", "frontend.credit_requests")],
            ),
            ("a share of nothing", "rows_max = 8\nweight = 3", &[("weight_alone", "batching.weight")]),
        ];
        let config = config(&[]);
        for (situation, batching, expected) in table {
            assert_eq!(codes(&found(&config, &[model("m", batching, "")])), *expected, "{situation}");
        }
    }

    #[test]
    fn each_contradiction_of_a_configuration_has_its_finding() {
        let table: &[(&[&str], (&str, &str))] = &[
            (&["threads.executors=8"], ("threads_above_cores", "threads.executors")),
            (&["executor.threads=3"], ("executor_threads_above_cores", "executor.threads")),
            (&["threads.executors=6", "frontend.spin_us=10"], ("spin_without_core", "frontend.spin_us")),
            (&["executor.canary_every=20"], ("canary_often", "executor.canary_every")),
            (&["executor.device=\"cuda:0,1\"", "threads.executors=3"], ("executors_uneven", "threads.executors")),
            (&["queue.rows_max=24"], ("queue_rows_below_batches", "queue.rows_max")),
            (&["queue.rows_max=7"], ("rows_max_above_queue", "queue.rows_max")),
            (&["queue.rows_max=7"], ("request_above_queue", "queue.rows_max")),
            (&["queue.rows_max=1000", "queue.cells_max=1024"], ("queue_cells_below_batches", "queue.cells_max")),
            (
                &["queue.bytes_max=4096", "frontend.payload_bytes_max=4096"],
                ("queue_bytes_below_batches", "queue.bytes_max"),
            ),
            (&["frontend.output_bytes_max=4096"], ("fits", "")),
            (&["frontend.credit_requests=1"], ("rows_max_above_credit", "frontend.credit_requests")),
            (
                &["frontend.connections_max=2", "frontend.credit_requests=1"],
                ("rows_max_above_in_flight", "frontend.credit_requests"),
            ),
        ];
        let models = [model("m", "rows_max = 8\nslo_ms = 50", "")];
        for (sets, expected) in table {
            let config = config(sets);
            let findings = found(&config, &models);
            if expected.0 == "fits" {
                assert_eq!(findings, [], "exactly as much as one answer: {sets:?}");
            } else {
                assert!(codes(&findings).contains(expected), "{sets:?}: {findings:#?}");
            }
        }
        assert_eq!(found(&config(&[]), &models), []);
        let models = [model("m", "rows_max = 16\nrequest_rows_max = 8", "")];
        let config = config(&["frontend.credit_bytes=4096", "frontend.payload_bytes_max=4096"]);
        assert_eq!(codes(&found(&config, &models)), [("credit_bytes_below_batch", "frontend.credit_bytes")]);
    }

    #[test]
    fn requests_and_answers_that_do_not_fit_the_front_end_are_found() {
        let large = [model("m", "rows_max = 64\npadded_cells_max = 4096", "")];
        let config = config(&["frontend.payload_bytes_max=32767", "frontend.output_bytes_max=32767"]);
        let expected = [
            ("request_above_payload", "frontend.payload_bytes_max"),
            ("answer_above_output", "frontend.output_bytes_max"),
        ];
        assert_eq!(codes(&found(&config, &large)), expected);
    }

    #[test]
    fn rows_that_can_never_be_in_flight_together_say_how_full_a_batch_gets() {
        let models = [model("m", "rows_max = 64\nrequest_rows_max = 1", "")];
        let config = config(&["frontend.connections_max=4", "frontend.credit_requests=4", "threads.shards=1"]);
        let findings = found(&config, &models);
        assert_eq!(findings[0].code, "rows_max_above_in_flight");
        assert_eq!(findings[0].severity, Severity::Warning);
        let expected = "m: batches up to 64 rows, but callers can have at most 16 in flight, in 16 requests: no batch is ever \
                        more than 25 % full";
        assert_eq!(findings[0].sentence(), expected);
    }

    #[test]
    fn a_model_with_next_to_no_share_is_found_and_an_inline_one_shares_with_nobody() {
        let heavy = model("a", "rows_max = 8\nweight = 1000", "");
        let light = model("b", "rows_max = 8\nweight = 1", "");
        let inline = model("c", "rows_max = 8", "placement = \"inline\"");
        let findings = found(&config(&[]), &[heavy, light, inline]);
        assert_eq!(codes(&findings), [("weight_tiny", "batching.weight")]);
        assert_eq!(findings[0].model.as_deref(), Some("b"));
    }

    #[test]
    fn limits_above_the_machine_are_found() {
        let config = config(&[]);
        let given = Given { config: &config, manifests: &[], cores: 8, memory_bytes: 3, machine_bytes: 2 };
        assert_eq!(codes(&findings(&given)), [("limits_above_memory", "queue.bytes_max")]);
        let given = Given { machine_bytes: u64::MAX, ..given };
        assert_eq!(findings(&given), [], "a machine that does not say");
    }

    #[test]
    fn half_precision_without_a_gpu_cannot_be_served() {
        let minilm = include_str!("../../../models/minilm/model.toml");
        let half = minilm.replace("normalize = true", "normalize = true\nprecision = \"bf16\"");
        let parse = |text: &str| Manifest::parse("minilm", Path::new("model.toml"), text).expect("a manifest");
        assert_eq!(unservable(&config(&[]), &parse(minilm)), None);
        let error = unservable(&config(&[]), &parse(&half)).expect("no GPU");
        assert!(error.contains("bf16") && error.contains("executor.device is cpu"), "{error}");
        assert_eq!(unservable(&config(&["executor.device=\"cuda\""]), &parse(&half)), None);
    }
}
