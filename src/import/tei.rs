//! text-embeddings-inference: the command line of `text-embeddings-router`, or its variables as `NAME=value` lines.
//!
//! Flags, defaults and meaning: huggingface/text-embeddings-inference, router/src/main.rs; how batches are made:
//! core/src/queue.rs. A whole `docker run … --model-id X` is taken from the image on; lines of an env file may say `export`.

use toml::Value as Toml;

use super::textproto::Place;
use super::{Fault, Format, ImportError, Imported, Options, Verdict};

const ROWS_CEILING: u64 = 65_536;
/// Defaults here.
const DATA_PORT: u64 = 7600;
const CONTROL_PORT: u64 = 7601;
/// Of a text, in bytes for each token of the longest row: four of the most long-winded script, twice over.
const TEXT_BYTES_PER_TOKEN: u64 = 16;

struct Flag {
    name: &'static str,
    /// It has no value.
    switch: bool,
    /// Where it has no equivalent: why, and what to do instead.
    absent: Option<&'static str>,
}

const fn taken(name: &'static str) -> Flag {
    Flag { name, switch: false, absent: None }
}

const fn absent(name: &'static str, why: &'static str) -> Flag {
    Flag { name, switch: false, absent: Some(why) }
}

const HUB: &str =
    "Nothing is downloaded: weights and tokenizer.json lie in models/<name>/<version>/, put there by you.";
const TRACES: &str = "Not of the batching: see README.md for what the server says about itself.";
const PROMPTS: &str = "Texts are tokenized as they come: put the prompt in front of them.";

const FLAGS: &[Flag] = &[
    taken("max-batch-tokens"),
    taken("max-batch-requests"),
    taken("max-concurrent-requests"),
    taken("max-client-batch-size"),
    Flag { switch: true, ..taken("auto-truncate") },
    taken("tokenization-workers"),
    taken("dtype"),
    taken("pooling"),
    taken("port"),
    taken("hostname"),
    taken("prometheus-port"),
    taken("payload-limit"),
    taken("device-id"),
    taken("served-model-name"),
    Flag { switch: true, ..taken("json-output") },
    absent("model-id", HUB),
    absent("revision", HUB),
    absent("hf-token", HUB),
    absent("hf-api-token", HUB),
    absent("huggingface-hub-cache", HUB),
    absent("default-prompt", PROMPTS),
    absent("default-prompt-name", PROMPTS),
    absent(
        "dense-path",
        "There is no dense layer behind the pooling: a model that has one needs an architecture of its own.",
    ),
    absent("uds-path", "There is no second process: models run in the server."),
    absent("api-key", "There is no authentication yet: listen on loopback, or behind something that has it."),
    absent("cors-allow-origin", "No browser speaks to the data port, which is not HTTP."),
    absent("otlp-endpoint", TRACES),
    absent("otlp-service-name", TRACES),
    Flag { switch: true, ..absent("disable-spans", TRACES) },
];

/// Shorter than the flags' own names.
const SHORT: &[(&str, &str)] = &[("-p", "port")];

/// Whether a text is one of these: it names the program, or a flag or variable of it.
pub fn looks_like(text: &str) -> bool {
    text.contains("text-embeddings")
        || FLAGS.iter().any(|flag| text.contains(&format!("--{}", flag.name)))
        || variables(text)
            .is_some_and(|found| !found.is_empty() && found.iter().any(|given| flag(&given.name).is_some()))
}

fn flag(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}

/// One setting as it was given.
struct Given {
    name: String,
    value: String,
    at: Option<Place>,
}

/// `NAME=value` lines, if there is nothing else.
fn variables(text: &str) -> Option<Vec<Given>> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = line.split_once('=')?;
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return None;
        }
        let value = shlex::split(value)?.join(" ");
        let name = name.to_ascii_lowercase().replace('_', "-");
        found.push(Given { name, value, at: Some(Place { line: number + 1, column: 1 }) });
    }
    Some(found)
}

fn wrong<T>(at: Option<Place>, message: String) -> Result<T, ImportError> {
    Err(ImportError { at, fault: Fault::Command(message) })
}

fn command(text: &str) -> Result<Vec<Given>, ImportError> {
    // A line that goes on behind a backslash is a space to a shell, and a word to the splitter.
    let text = text.replace("\\\r\n", " ").replace("\\\n", " ");
    let Some(words) = shlex::split(&text) else {
        return wrong(None, "expected a command line whose quotes are closed".into());
    };
    // What stands before the image or the program are flags of something else.
    let from = words
        .iter()
        .rposition(|word| !word.starts_with('-') && word.contains("text-embeddings"))
        .map_or(0, |at| at + 1);
    let mut words = words.into_iter().skip(from).peekable();
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        let short = SHORT.iter().find(|(short, _)| *short == word).map(|(_, long)| *long);
        let Some(text) = short.or(word.strip_prefix("--")) else {
            return wrong(None, format!("expected a flag such as --max-batch-tokens, got {word:?}"));
        };
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (text.to_owned(), None),
        };
        let switch = match flag(&name) {
            Some(flag) => flag.switch,
            // Of an unknown one: has it a value behind it?
            None => words.peek().is_none_or(|next| next.starts_with('-')),
        };
        let value = match value {
            Some(value) => value,
            None if switch => "true".to_owned(),
            None => match words.next() {
                Some(value) => value,
                None => return wrong(None, format!("--{name}: expected a value behind it, got the end")),
            },
        };
        found.push(Given { name, value, at: None });
    }
    Ok(found)
}

/// The settings, each once, and asked for once.
struct Settings(Vec<Given>);

impl Settings {
    fn take(&mut self, name: &str) -> Option<Given> {
        self.0.iter().position(|given| given.name == name).map(|at| self.0.remove(at))
    }

    fn number(&mut self, name: &str, least: u64, most: u64) -> Result<Option<(u64, Option<Place>)>, ImportError> {
        let Some(given) = self.take(name) else { return Ok(None) };
        match given.value.parse::<u64>() {
            Ok(number) if (least..=most).contains(&number) => Ok(Some((number, given.at))),
            _ => wrong(
                given.at,
                format!("--{name}: expected a whole number from {least} to {most}, got {:?}", given.value),
            ),
        }
    }

    fn switch(&mut self, name: &str) -> Result<Option<(bool, Option<Place>)>, ImportError> {
        let Some(given) = self.take(name) else { return Ok(None) };
        match given.value.as_str() {
            "true" | "1" => Ok(Some((true, given.at))),
            "false" | "0" | "" => Ok(Some((false, given.at))),
            other => wrong(given.at, format!("--{name}: expected true or false, got {other:?}")),
        }
    }
}

pub fn read(text: &str, options: &Options) -> Result<Imported, ImportError> {
    let found = match variables(text) {
        Some(found) => found,
        None => command(text)?,
    };
    for (at, given) in found.iter().enumerate() {
        if found[..at].iter().any(|before| before.name == given.name) {
            return wrong(given.at, format!("--{} is there twice", given.name));
        }
    }
    let mut settings = Settings(found);
    let mut out = Imported::new(Format::TextEmbeddings);
    batching(&mut settings, options, &mut out)?;
    model(&mut settings, options, &mut out)?;
    server(&mut settings, &mut out)?;
    for given in settings.0 {
        let why = flag(&given.name).and_then(|flag| flag.absent);
        let why = why.unwrap_or("Not a flag that ferry knows of text-embeddings-router.");
        // A secret stays out of what is printed.
        let secret = ["hf-token", "hf-api-token", "api-key"].contains(&given.name.as_str());
        let value = if secret { "…".to_owned() } else { given.value };
        out.note(Verdict::Absent, (format!("--{}", given.name), given.at), value, &[], why);
    }
    Ok(out)
}

/// Notes a number: as given, or the default there.
fn note_number(
    out: &mut Imported,
    name: &str,
    given: Option<(u64, Option<Place>)>,
    default: u64,
    keys: &[&'static str],
    (verdict, why): (Verdict, String),
) {
    let verdict = if given.is_some() { verdict } else { Verdict::Assumed };
    let (value, at) = given.unwrap_or((default, None));
    out.note(verdict, (format!("--{name}"), at), value, keys, why);
}

fn batching(settings: &mut Settings, options: &Options, out: &mut Imported) -> Result<(), ImportError> {
    let longest = u64::from(options.longest);
    let tokens = settings.number("max-batch-tokens", 1, 1 << 30)?;
    let rows = settings.number("max-batch-requests", 1, ROWS_CEILING)?;
    let client = settings.number("max-client-batch-size", 1, ROWS_CEILING)?;
    let concurrent = settings.number("max-concurrent-requests", 1, 1 << 30)?;

    // Inputs of all requests together are bounded there: no batch has more rows.
    let waiting = concurrent.map_or(512, |(requests, _)| requests);
    // The budget lies between one row of the longest and rows_max of them; and rows_max of the shortest, of one token, within it.
    let budget = tokens.map_or(16_384, |(tokens, _)| tokens).max(longest);
    let rows_max = rows.map_or(waiting.min(ROWS_CEILING), |(rows, _)| rows).min(budget);
    let cells = budget.min(rows_max * longest);
    out.manifest.set("batching", "rows_max", rows_max as i64);
    out.manifest.set("batching", "padded_cells_max", cells as i64);
    out.manifest.set("batching", "queue_delay_max_us", 0);
    let policy = "policy = \"greedy_tokens\"  # what it does there: in order of arrival, up to the budget, at once";
    out.manifest.remark("batching", policy);
    let why = "Nothing is held for others there. Leave it out and the policy `cost` waits as long as that pays.";
    out.note(Verdict::Assumed, ("no window", None), 0, &["batching.queue_delay_max_us"], why);
    let clipped = match tokens {
        Some((tokens, _)) if tokens < longest => {
            format!(" One row of the longest, {longest} tokens (--longest), must fit: it is more than {tokens}.")
        }
        _ if cells < budget => {
            format!(" More than rows_max × the longest row, {rows_max} × {longest}, is never reached.")
        }
        _ => String::new(),
    };
    note_number(
        out,
        "max-batch-tokens",
        tokens,
        16_384,
        &["batching.padded_cells_max"],
        (
            Verdict::Changed,
            format!(
                "Tokens of a batch: the sum of its rows' where they lie end to end, which encoders do here; rows × the longest where they are \
                 padded. There the queue is cut in order of arrival; `cost` looks at all of it. \"auto\" lets the warm-up find the size \
                 from which on more brings little, which on a CPU is far less.{clipped}"
            ),
        ),
    );
    let why = match rows {
        Some(_) => "Most rows of a batch.".to_owned(),
        None => {
            format!("None is given there: as many as may be there at once, and as the budget has tokens, {rows_max}.")
        }
    };
    let setting = ("--max-batch-requests", rows.and_then(|(_, at)| at));
    let value = rows.map_or("none".to_owned(), |(rows, _)| rows.to_string());
    let verdict = if rows.is_some() { Verdict::Taken } else { Verdict::Assumed };
    out.note(verdict, setting, value, &["batching.rows_max"], why);

    out.manifest.set("batching", "request_rows_max", client.map_or(32, |(rows, _)| rows) as i64);
    let why = "Most rows of a request.".to_owned();
    note_number(out, "max-client-batch-size", client, 32, &["batching.request_rows_max"], (Verdict::Taken, why));

    out.manifest.set("queue", "rows_max", waiting.max(rows_max) as i64);
    let raised = if waiting < rows_max { " It must hold one full batch, so it is more." } else { "" };
    note_number(
        out,
        "max-concurrent-requests",
        concurrent,
        512,
        &["queue.rows_max"],
        (
            Verdict::Changed,
            format!(
                "Rows that wait are counted here, not requests and not what runs.{raised} Above it requests are answered `overloaded`. Of one \
                 connection, frontend.credit_requests bounds them."
            ),
        ),
    );
    Ok(())
}

fn model(settings: &mut Settings, options: &Options, out: &mut Imported) -> Result<(), ImportError> {
    if let Some(given) = settings.take("served-model-name") {
        let name =
            given.value.to_ascii_lowercase().replace(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c), "_");
        let name = name.trim_start_matches('.').to_owned();
        if !name.is_empty() && name.len() <= 128 {
            let why = "The model's folder, and what callers name.";
            let verdict = if name == given.value { Verdict::Taken } else { Verdict::Changed };
            out.note(verdict, ("--served-model-name", given.at), &given.value, &[], why);
            out.model = Some(name);
        }
    }
    if let Some((truncate, at)) = settings.switch("auto-truncate")? {
        let bytes = u64::from(options.longest) * TEXT_BYTES_PER_TOKEN;
        out.manifest.set("text", "input", "text");
        out.manifest.set("text", "bytes_max", bytes as i64);
        out.manifest.set("text", "truncate", truncate);
        let why = "A text that is too long is cut for a caller who asks for it in the request, and the answer says so; others are refused. \
                   bytes_max bounds a text before it is tokenized.";
        out.note(Verdict::Changed, ("--auto-truncate", at), truncate, &["text.truncate", "text.bytes_max"], why);
    }
    if let Some(given) = settings.take("dtype") {
        let (precision, why) = match given.value.as_str() {
            "float32" => ("f32", "As the weights are stored."),
            "float16" => ("f16", "On a GPU only; on a CPU use \"f32\", or \"int8\" after comparing answers."),
            "bfloat16" => ("bf16", "On a GPU only; on a CPU use \"f32\", or \"int8\" after comparing answers."),
            other => return wrong(given.at, format!("--dtype: expected float32, float16 or bfloat16, got {other:?}")),
        };
        out.manifest.set("model", "precision", precision);
        let verdict = if precision == "f32" { Verdict::Taken } else { Verdict::Changed };
        out.note(verdict, ("--dtype", given.at), given.value, &["model.precision"], why);
    }
    if let Some(given) = settings.take("pooling") {
        match given.value.as_str() {
            pooling @ ("cls" | "mean") => {
                out.manifest.set("model", "pooling", pooling);
                out.note(Verdict::Taken, ("--pooling", given.at), pooling, &["model.pooling"], "The same.");
            }
            other @ ("splade" | "last-token") => {
                let why = "Encoders pool by mean, cls or max; sparse vectors and decoders have no architecture here.";
                out.note(Verdict::Absent, ("--pooling", given.at), other, &[], why);
            }
            other => {
                return wrong(given.at, format!("--pooling: expected cls, mean, splade or last-token, got {other:?}"));
            }
        }
    }
    Ok(())
}

fn server(settings: &mut Settings, out: &mut Imported) -> Result<(), ImportError> {
    let port = |settings: &mut Settings, name: &str| settings.number(name, 1, u16::MAX.into());
    let listen = port(settings, "port")?;
    let metrics = port(settings, "prometheus-port")?;
    if let Some((number, at)) = listen {
        out.server.set("", "listen", format!("127.0.0.1:{number}"));
        let why = "The data port speaks ferry's framed protocol, not HTTP: callers use the client library, or WIRE.md.";
        out.note(Verdict::Changed, ("--port", at), number, &["listen"], why);
    }
    if let Some(given) = settings.take("hostname") {
        let why = "Ports listen on loopback unless auth.tenants and tls.certificate are set. Others need allow_unauthenticated = true: decide that \
                   yourself.";
        out.note(Verdict::Absent, ("--hostname", given.at), given.value, &["listen", "allow_unauthenticated"], why);
    }
    let taken = listen.map_or(DATA_PORT, |(number, _)| number);
    match metrics {
        Some((number, at)) if number == taken => {
            let why = "GET /metrics is on the control port, which cannot be the data port: choose another.";
            out.note(Verdict::Absent, ("--prometheus-port", at), number, &["control"], why);
        }
        Some((number, at)) => {
            out.server.set("", "control", format!("127.0.0.1:{number}"));
            let why = "GET /metrics is on the control port, with all else that operates the server.";
            out.note(Verdict::Changed, ("--prometheus-port", at), number, &["control"], why);
        }
        None => {}
    }
    if taken == CONTROL_PORT && metrics.is_none_or(|(number, _)| number == taken) {
        // It would meet the default of the other one.
        out.server.set("", "control", format!("127.0.0.1:{DATA_PORT}"));
    }
    if let Some((number, at)) = settings.number("tokenization-workers", 1, 256)? {
        out.server.set("threads", "tokenizers", number as i64);
        let why =
            "Threads that turn text into ids, of all models. The default is 1 here, and the number of cores there.";
        out.note(Verdict::Taken, ("--tokenization-workers", at), number, &["threads.tokenizers"], why);
    }
    if let Some((number, at)) = settings.number("payload-limit", 1, 256 << 20)? {
        let bytes = number.max(4096);
        out.server.set("frontend", "payload_bytes_max", bytes as i64);
        let why = "Of one frame: tensors are binary here, so the same request is smaller.";
        out.note(Verdict::Changed, ("--payload-limit", at), number, &["frontend.payload_bytes_max"], why);
        // What one connection may have in flight holds at least one payload.
        if bytes > 64 << 20 {
            out.server.set("frontend", "credit_bytes", bytes as i64);
        }
    }
    if let Some((number, at)) = settings.number("device-id", 0, u16::MAX.into())? {
        out.server.set("executor", "device", Toml::String(format!("cuda:{number}")));
        let why = "With a binary that was built with the feature cuda; leave it out for the CPU.";
        out.note(Verdict::Taken, ("--device-id", at), number, &["executor.device"], why);
    }
    if let Some((json, at)) = settings.switch("json-output")? {
        out.server.set("log", "format", if json { "json" } else { "text" });
        out.note(Verdict::Taken, ("--json-output", at), json, &["log.format"], "On standard error.");
    }
    Ok(())
}
