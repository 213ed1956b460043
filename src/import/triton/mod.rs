//! Triton: a model's `config.pbtxt`, a `ModelConfig` message as text.
//!
//! Fields and their meaning: triton-inference-server/common, protobuf/model_config.proto (as of 2024). What the dynamic batcher does
//! with them: triton-inference-server/server, docs/user_guide/batcher.md.

mod contract;

use toml::Value as Toml;

use super::fields::{At, Fields};
use super::textproto::{Message, Value, parse};
use super::{DELAY_US_MAX, Format, ImportError, Imported, Options, Verdict};

const ROWS_CEILING: i64 = 65_536;

/// Fields of the model that nothing here does, and what to do instead.
const ABSENT: &[(&str, &str)] = &[
    ("platform", "Models run on architectures of ferry's own (`architecture` in the manifest), not on backends."),
    ("backend", "Models run on architectures of ferry's own (`architecture` in the manifest), not on backends."),
    ("runtime", "There are no backend libraries: an architecture is part of the binary."),
    ("default_model_filename", "Weights are <version>/weights.safetensors beside the manifest: convert them."),
    (
        "cc_model_filenames",
        "One set of weights serves all devices; kernels for each compute capability are in the binary.",
    ),
    ("batch_input", "A model here is told lengths and starts of its rows by itself."),
    ("batch_output", "Answers are cut by the lengths of their rows by themselves."),
    ("metric_tags", "Labels are closed sets: model and version. Add others where metrics are scraped."),
    ("parameters", "Parameters of backends. What an architecture needs is under [model] in the manifest."),
    ("model_operations", "There are no libraries of operations: an architecture is part of the binary."),
    ("model_repository_agents", "Models are read from their directory as they are: prepare them before."),
    ("response_cache", "Answers are not kept. Put a cache in front of the client."),
    ("model_metrics", "Histograms have the same buckets for all models, from microseconds up."),
    (
        "ensemble_scheduling",
        "Models are not chained in the server: call one after the other. Text is tokenized by [text] in the manifest.",
    ),
    (
        "sequence_batching",
        "There is no state between requests: each carries all that it needs. A model with implicit state cannot be moved.",
    ),
];

pub fn read(text: &str, options: &Options) -> Result<Imported, ImportError> {
    let message = parse(text)?;
    let mut fields = Fields::new("", &message);
    let mut out = Imported::new(Format::Triton);
    name(&mut fields, &mut out)?;
    version(&mut fields, &mut out)?;
    let rows_max = rows(&mut fields, &mut out)?;
    let dynamic = fields.message("dynamic_batching")?;
    match &dynamic {
        Some(found) => batching(found, rows_max, &mut out)?,
        None if fields.rest().iter().any(|(name, _)| name == "sequence_batching" || name == "ensemble_scheduling") => {}
        None => out.note(
            Verdict::Changed,
            ("dynamic_batching", None),
            "none",
            &["batching.policy"],
            "Without it Triton runs each request by itself. Here rows of different requests always share batches; rows_max = 1 with \
             request_rows_max is the nearest to none.",
        ),
    }
    let lengths = contract::read(&mut fields, rows_max, options, &mut out)?;
    warmup(&mut fields, &dynamic, rows_max, lengths, &mut out)?;
    instances(&mut fields, &mut out)?;
    optimization(&mut fields, &mut out)?;
    if let Some(found) = fields.message("model_transaction_policy")? {
        let mut inside = Fields::new("model_transaction_policy", found.value);
        let decoupled = inside.boolean("decoupled")?.is_some_and(|decoupled| decoupled.value);
        let verdict = if decoupled { Verdict::Absent } else { Verdict::Taken };
        let why = "Each request has exactly one answer (or an item for each of its rows, as their batches end).";
        out.note(verdict, ("model_transaction_policy.decoupled", Some(found.at)), decoupled, &[], why);
    }
    for (name, found) in fields.rest() {
        let why = ABSENT.iter().find(|(known, _)| *known == name).map_or(UNKNOWN, |(_, why)| why);
        out.note(Verdict::Absent, (name, Some(found.at)), found.value, &[], why);
    }
    Ok(out)
}

const UNKNOWN: &str = "Not a field that ferry knows of this message.";

/// Notes what is left of a message, with one reason for the fields it names.
fn note_rest(fields: &Fields<'_>, known: &[(&str, &str)], out: &mut Imported) {
    for (name, found) in fields.rest() {
        let why = known.iter().find(|(known, _)| *known == name).map_or(UNKNOWN, |(_, why)| why);
        out.note(Verdict::Absent, (fields.path(&name), Some(found.at)), found.value, &[], why);
    }
}

fn name(fields: &mut Fields<'_>, out: &mut Imported) -> Result<(), ImportError> {
    let Some(name) = fields.text("name")? else { return Ok(()) };
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c.to_ascii_lowercase() } else { '_' };
    let folder: String = name.value.chars().map(plain).take(128).collect();
    let folder = folder.trim_start_matches('.').to_owned();
    if folder.is_empty() {
        return Ok(());
    }
    if folder == name.value {
        out.note(Verdict::Taken, ("name", Some(name.at)), name.value, &[], "The model's folder.");
    } else {
        let why = format!("Names have a-z 0-9 . _ - only: the folder is {folder:?}, and so callers must name it.");
        out.note(Verdict::Changed, ("name", Some(name.at)), name.value, &[], why);
    }
    out.model = Some(folder);
    Ok(())
}

fn version(fields: &mut Fields<'_>, out: &mut Imported) -> Result<(), ImportError> {
    let Some(found) = fields.message("version_policy")? else { return Ok(()) };
    let mut policy = Fields::new("version_policy", found.value);
    if let Some(specific) = policy.message("specific")? {
        let versions = Fields::new("", specific.value).integers("versions", 0, i64::MAX)?;
        if let [one] = versions.as_slice() {
            out.manifest.set("", "version", one.value.to_string());
            let why = "The folder of the weights.";
            out.note(Verdict::Taken, ("version_policy.specific", Some(one.at)), one.value, &["version"], why);
            return Ok(());
        }
    }
    let value = Value::Message(found.value.clone());
    let why = "A manifest names one version. Serve two as two models, and switch callers by name.";
    out.note(Verdict::Absent, ("version_policy", Some(found.at)), value, &["version"], why);
    Ok(())
}

fn rows(fields: &mut Fields<'_>, out: &mut Imported) -> Result<i64, ImportError> {
    let rows = fields.integer("max_batch_size", 0, ROWS_CEILING)?;
    let keys = &["batching.rows_max"];
    let rows_max = rows.map_or(0, |rows| rows.value).max(1);
    out.manifest.set("batching", "rows_max", rows_max);
    match rows {
        Some(rows) if rows.value > 0 => out.note(
            Verdict::Taken,
            ("max_batch_size", Some(rows.at)),
            rows.value,
            keys,
            "Most rows of a batch, and of a request. Where rows differ in length, padded_cells_max is the budget that counts: set it \
             too.",
        ),
        rows => out.note(
            if rows.is_some() { Verdict::Changed } else { Verdict::Assumed },
            ("max_batch_size", rows.map(|rows| rows.at)),
            0,
            keys,
            "0 means a model without a batch dimension, which is run request by request. Tensors here always have rows: one in a batch.",
        ),
    }
    Ok(rows_max)
}

fn batching(found: &At<&Message>, rows_max: i64, out: &mut Imported) -> Result<(), ImportError> {
    let path = "dynamic_batching";
    let mut fields = Fields::new(path, found.value);

    let delay = fields.integer("max_queue_delay_microseconds", 0, i64::MAX)?;
    let delay_us = delay.map_or(0, |delay| delay.value.min(DELAY_US_MAX));
    out.manifest.set("batching", "queue_delay_max_us", delay_us);
    out.note(
        if delay.is_some() { Verdict::Taken } else { Verdict::Assumed },
        (fields.path("max_queue_delay_microseconds"), delay.map(|delay| delay.at)),
        delay.map_or(0, |delay| delay.value),
        &["batching.queue_delay_max_us"],
        "How long the oldest row may be held for others, exactly; while no executor is idle there is nothing to hold. 0 never holds. \
         Leave it out and the policy `cost` waits as long as that pays.",
    );

    let preferred = fields.integers("preferred_batch_size", 1, ROWS_CEILING)?;
    if let Some(first) = preferred.first() {
        let list: Vec<i64> = preferred.iter().map(|size| size.value).collect();
        let largest = list.iter().copied().max().unwrap_or(rows_max);
        let cap = if largest < rows_max {
            format!(" If batches above {largest} were not wanted, set rows_max = {largest}.")
        } else {
            String::new()
        };
        out.note(
            Verdict::Changed,
            (fields.path("preferred_batch_size"), Some(first.at)),
            format!("{list:?}"),
            &["warmup.rows", "batching.policy"],
            format!(
                "No size is preferred here: `cost` closes a batch when another row would cost more than it brings, by what batches of \
                 each size were measured to take. The sizes are only those that are run before the model counts as ready.{cap}"
            ),
        );
    }

    let order = fields.boolean("preserve_ordering")?;
    if let Some(order) = order {
        let why = "Answers carry the request's id and come as their batches end. A caller who needs an order sorts by id, or sends the \
                   next request after the answer.";
        let verdict = if order.value { Verdict::Absent } else { Verdict::Taken };
        out.note(verdict, (fields.path("preserve_ordering"), Some(order.at)), order.value, &[], why);
    }
    priorities(&mut fields, out)?;
    if let Some(found) = fields.message("default_queue_policy")? {
        queue_policy(&found, rows_max, out)?;
    }
    let known = [(
        "priority_queue_policy",
        "Bounds of the queue hold for all classes together. Callers of a class set their own deadline_us.",
    )];
    note_rest(&fields, &known, out);
    out.manifest
        .remark("batching", "policy = \"window\"  # what Triton does: first come, first served, a fixed window");
    Ok(())
}

fn priorities(fields: &mut Fields<'_>, out: &mut Imported) -> Result<(), ImportError> {
    if let Some(levels) = fields.integer("priority_levels", 0, i64::MAX)? {
        let path = fields.path("priority_levels");
        let note = |why: &str| (Verdict::Changed, (path.clone(), Some(levels.at)), why.to_owned());
        let (verdict, setting, why) = match levels.value {
            0 | 1 => (Verdict::Taken, (path.clone(), Some(levels.at)), "One class.".to_owned()),
            2 | 3 => note(
                "Level 1 is priority 0 of a request, and so on. `cost` weighs classes instead of serving them strictly in turn, so that low ones \
                 do not starve; the other policies know none.",
            ),
            _ => note(
                "There are three classes, 0 to 2; level 1 is priority 0, levels from 3 on are 2. `cost` weighs them instead of serving \
                 them strictly in turn; the other policies know none.",
            ),
        };
        out.note(verdict, setting, levels.value, &[], why);
    }
    if let Some(level) = fields.integer("default_priority_level", 0, i64::MAX)? {
        let verdict = if level.value <= 1 { Verdict::Taken } else { Verdict::Absent };
        let why = "A request that says nothing has priority 0, the highest: those of lower classes must say so.";
        out.note(verdict, (fields.path("default_priority_level"), Some(level.at)), level.value, &[], why);
    }
    Ok(())
}

fn queue_policy(found: &At<&Message>, rows_max: i64, out: &mut Imported) -> Result<(), ImportError> {
    let mut fields = Fields::new("dynamic_batching.default_queue_policy", found.value);
    let action = fields.word("timeout_action")?;
    let delays = action.is_some_and(|action| action.value == "DELAY");
    let timeout = fields.integer("default_timeout_microseconds", 0, i64::MAX)?;
    if let Some(timeout) = timeout.filter(|timeout| timeout.value > 0) {
        let slo_ms = (timeout.value as f64 / 1e3).clamp(0.01, 600_000.0);
        out.manifest.set("batching", "slo_ms", Toml::Float(slo_ms));
        let why = if delays {
            "Requests that are late run all the same; slo_ms is the time within which `cost` tries to answer those without a deadline."
        } else {
            "slo_ms is the time within which `cost` tries to answer requests without a deadline: it orders them, and refuses none. To be \
             rejected when late a request says deadline_us itself."
        };
        let setting = (fields.path("default_timeout_microseconds"), Some(timeout.at));
        out.note(Verdict::Changed, setting, timeout.value, &["batching.slo_ms"], why);
    } else if let Some(timeout) = timeout {
        let setting = (fields.path("default_timeout_microseconds"), Some(timeout.at));
        out.note(Verdict::Taken, setting, 0, &[], "No timeout.");
    }
    if let Some(action) = action {
        let why = match action.value {
            "DELAY" => "A request without a deadline is never given up, and is older the longer it waits.",
            _ => {
                "A request whose deadline passes is answered `deadline_exceeded`, wherever it is; one without has none."
            }
        };
        out.note(Verdict::Changed, (fields.path("timeout_action"), Some(action.at)), action.value, &[], why);
    }
    if let Some(allow) = fields.boolean("allow_timeout_override")? {
        let why = "Each request may say its own deadline_us, however long.";
        let verdict = if allow.value { Verdict::Taken } else { Verdict::Changed };
        out.note(verdict, (fields.path("allow_timeout_override"), Some(allow.at)), allow.value, &[], why);
    }
    if let Some(size) = fields.integer("max_queue_size", 0, u32::MAX.into())? {
        let setting = (fields.path("max_queue_size"), Some(size.at));
        if size.value == 0 {
            out.note(
                Verdict::Taken,
                setting,
                0,
                &[],
                "No bound of the model's own; the server's queue.rows_max holds.",
            );
        } else {
            let rows = size.value.max(rows_max);
            out.manifest.set("queue", "rows_max", rows);
            let raised = if rows > size.value { " It must hold one full batch, so it is more." } else { "" };
            let why =
                format!("Rows are counted here, not requests.{raised} Above it requests are answered `overloaded`.");
            out.note(Verdict::Changed, setting, size.value, &["queue.rows_max"], why);
        }
    }
    note_rest(&fields, &[], out);
    Ok(())
}

/// Shapes to run before the model is ready: those of `model_warmup`, and preferred sizes.
fn warmup(
    fields: &mut Fields<'_>,
    dynamic: &Option<At<&Message>>,
    rows_max: i64,
    longest: Option<u32>,
    out: &mut Imported,
) -> Result<(), ImportError> {
    let mut rows = match dynamic {
        Some(found) => Fields::new("", found.value).integers("preferred_batch_size", 1, ROWS_CEILING)?,
        None => Vec::new(),
    };
    let samples = fields.messages("model_warmup")?;
    for sample in &samples {
        rows.extend(Fields::new("model_warmup", sample.value).integer("batch_size", 0, ROWS_CEILING)?);
    }
    let mut rows: Vec<i64> = rows.iter().map(|size| size.value.clamp(1, rows_max)).collect();
    rows.sort_unstable();
    rows.dedup();
    if let Some(first) = samples.first() {
        let lengths =
            if longest.is_some() { " Lengths are those of the buckets; [warmup] lengths names others." } else { "" };
        out.note(
            Verdict::Changed,
            ("model_warmup", Some(first.at)),
            format!("{} sample(s)", samples.len()),
            &["warmup.rows"],
            format!("Shapes are run with made-up rows, which is enough for memory and for batch times.{lengths}"),
        );
    }
    if !rows.is_empty() {
        out.manifest.set("warmup", "rows", rows);
    }
    Ok(())
}

fn instances(fields: &mut Fields<'_>, out: &mut Imported) -> Result<(), ImportError> {
    let groups = fields.messages("instance_group")?;
    let Some(first) = groups.first().map(|group| group.at) else { return Ok(()) };
    let (mut executors, mut gpus, mut on_cpu, mut unnamed) = (0i64, Vec::new(), false, false);
    let mut weight = None;
    for group in &groups {
        let mut inside = Fields::new("instance_group", group.value);
        let count = inside.integer("count", 0, 1024)?.map_or(1, |count| count.value.max(1));
        let kind = inside.word("kind")?.map_or("KIND_AUTO", |kind| kind.value);
        let listed = inside.integers("gpus", 0, u16::MAX.into())?;
        match kind {
            "KIND_CPU" => on_cpu = true,
            "KIND_GPU" if listed.is_empty() => unnamed = true,
            _ => {}
        }
        executors += count * listed.len().max(1) as i64;
        gpus.extend(listed.iter().map(|gpu| gpu.value));
        if let Some(limiter) = inside.message("rate_limiter")? {
            let mut limits = Fields::new("instance_group.rate_limiter", limiter.value);
            if let Some(priority) = limits.integer("priority", 0, 1000)? {
                weight.get_or_insert(1.0 / priority.value.max(1) as f64);
                let why = "An instance of priority 2 gets half the chances of one with 1: so is the weight of the model's share.";
                let setting = ("instance_group.rate_limiter.priority", Some(priority.at));
                out.note(Verdict::Changed, setting, priority.value, &["batching.weight"], why);
            }
            let known = [("resources", "Executors are the only resource, and a model's weight its share of them.")];
            note_rest(&limits, &known, out);
        }
        let known = [
            ("name", "Executors have numbers."),
            ("profile", "There are no optimization profiles: kernels take every shape."),
            ("passive", "Every executor takes work."),
            ("host_policy", "`threads.pin` and the process's own affinity say which cores are used."),
            ("secondary_devices", "A batch runs on one device."),
        ];
        note_rest(&inside, &known, out);
    }
    if let Some(weight) = weight {
        out.manifest.set("batching", "weight", Toml::Float(weight));
    }
    gpus.sort_unstable();
    gpus.dedup();
    let executors = executors.min(1024);
    out.server.set("threads", "executors", executors);
    let mut keys = vec!["threads.executors"];
    let mut why = String::from(
        "Executors are the server's, shared by all models by their weight; each runs one batch at a time, on one thread or one GPU stream.",
    );
    if !gpus.is_empty() {
        let list: Vec<String> = gpus.iter().map(i64::to_string).collect();
        out.server.set("executor", "device", format!("cuda:{}", list.join(",")));
        keys.push("executor.device");
        why += " Two or more for a GPU are streams that share its weights.";
    } else if unnamed {
        why += " No GPU is named: `ferry serve --device auto` takes all there are.";
    }
    if on_cpu && (unnamed || !gpus.is_empty()) {
        why += " A server runs on GPUs or on the CPU, not a part of a model on each.";
    }
    out.note(Verdict::Changed, ("instance_group", Some(first)), format!("{executors} instance(s)"), &keys, why);
    Ok(())
}

fn optimization(fields: &mut Fields<'_>, out: &mut Imported) -> Result<(), ImportError> {
    let Some(found) = fields.message("optimization")? else { return Ok(()) };
    let mut fields = Fields::new("optimization", found.value);
    if let Some(cuda) = fields.message("cuda")? {
        let mut inside = Fields::new("optimization.cuda", cuda.value);
        if let Some(graphs) = inside.boolean("graphs")? {
            let why =
                "Graphs are captured for every size by themselves, within executor.graph_bytes_max; 0 turns them off.";
            let setting = (inside.path("graphs"), Some(graphs.at));
            if graphs.value {
                out.note(Verdict::Taken, setting, true, &[], why);
            } else {
                out.server.set("executor", "graph_bytes_max", 0);
                out.note(Verdict::Taken, setting, false, &["executor.graph_bytes_max"], why);
            }
        }
        let known = [
            ("graph_spec", "Sizes of graphs are chosen by themselves: every size up to 4,096 tokens has one."),
            ("busy_wait_events", "A thread sleeps on each event; there is no busy wait."),
            ("output_copy_stream", "Uploads, work and answers have streams of their own always."),
        ];
        note_rest(&inside, &known, out);
    }
    let pinned = "Host memory that a device copies is pinned always.";
    let known = [
        ("graph", "There is no graph to optimise: an architecture is compiled."),
        ("priority", "`weight` in the manifest is a model's share of the executors."),
        ("execution_accelerators", "There are no accelerators to plug in: kernels are in the binary."),
        ("input_pinned_memory", pinned),
        ("output_pinned_memory", pinned),
        (
            "gather_kernel_buffer_threshold",
            "Rows are packed into one buffer as they are read; nothing is gathered on the device.",
        ),
        (
            "eager_batching",
            "A batch is decided when an executor can take it; executor.slots = 2 packs the next one meanwhile.",
        ),
    ];
    note_rest(&fields, &known, out);
    Ok(())
}
