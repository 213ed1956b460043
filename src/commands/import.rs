//! `ferry import`: settings of another server, as ferry's.
//!
//! Always true
//! - Standard output is TOML, the notes in comments: blocks for a manifest first, then those for the server's file, which are two
//!   files, and said to be. With `--json` one document has them apart.
//! - Exit status 0: it was read, whatever of it has no equivalent. 1: it cannot be read.

use std::fmt::Write;
use std::io::Read;
use std::process::ExitCode;

use ferry::import::{self, Format, Imported, Note, Options, Verdict};

use super::load::{failed, wrong_use};

/// Of any file that is read here.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// A Triton config.pbtxt, a TensorFlow Serving batching parameters file, or a text-embeddings-inference command line or file of
    /// variables; - for standard input.
    #[arg(value_name = "FILE")]
    file: String,
    /// Whose it is; what it has in it says so where this is not given.
    #[arg(long, value_name = "triton|tfs|tei")]
    format: Option<String>,
    /// Longest row, in cells: no file says it where lengths vary.
    #[arg(long, value_name = "CELLS", default_value_t = Options::default().longest, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    longest: u32,
    /// Prints one JSON document.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> ExitCode {
    let text = match text_of(&args.file) {
        Ok(text) => text,
        Err(message) => return failed(&message),
    };
    let format = match args.format.as_deref().map(|name| (name, Format::from_name(name))) {
        Some((_, Some(format))) => format,
        Some((name, None)) => return wrong_use(&format!("--format: expected triton, tfs or tei, got {name:?}")),
        None => match Format::guess(&text) {
            Some(format) => format,
            None => return failed(&format!("{}: {}", args.file, unknown(&text))),
        },
    };
    match import::read(format, &text, &Options { longest: args.longest }) {
        Ok(imported) if args.json => {
            println!("{}", serde_json::to_string_pretty(&to_json(&imported)).expect("plain data"));
            ExitCode::SUCCESS
        }
        Ok(imported) => {
            print!("{}", to_text(&imported));
            ExitCode::SUCCESS
        }
        Err(error) => failed(&format!("{}:{}{error}", args.file, if error.at.is_some() { "" } else { " " })),
    }
}

/// What is wrong with a text that is nobody's: most likely a slip in a file of the strictest format.
fn unknown(text: &str) -> String {
    let what = "not known for settings of another server; --format says whose they are";
    match import::textproto::parse(text) {
        Ok(_) => what.to_owned(),
        Err(error) => format!("{what}. As text of protocol buffers: {error}"),
    }
}

fn text_of(file: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    let read = match file {
        "-" => std::io::stdin().take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes),
        path => std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)),
    };
    match read {
        Err(error) => Err(format!("{file}: {error}")),
        Ok(_) if bytes.len() as u64 > FILE_BYTES_MAX => Err(format!("{file}: expected at most {FILE_BYTES_MAX} bytes")),
        Ok(_) => String::from_utf8(bytes).map_err(|_| format!("{file}: expected text in UTF-8")),
    }
}

fn to_text(imported: &Imported) -> String {
    let name = imported.model.as_deref().unwrap_or("<name>");
    let mut text =
        format!("# models/{name}/model.toml: these blocks, beside `architecture`, and what else is not said here.\n");
    text += &imported.manifest.to_toml();
    if !imported.server.is_empty() {
        text += "\n# A file of its own, for `ferry serve --config`.\n";
        text += &imported.server.to_toml();
    }
    for (verdict, title) in [
        (Verdict::Absent, "Without an equivalent:"),
        (Verdict::Changed, "Means something else here:"),
        (Verdict::Assumed, "Not in the file:"),
        (Verdict::Taken, "Taken as it is:"),
    ] {
        let mut notes = imported.notes.iter().filter(|note| note.verdict == verdict).peekable();
        if notes.peek().is_some() {
            let _ = writeln!(text, "\n# {title}");
        }
        notes.for_each(|note| text += &line(note));
    }
    text
}

/// A note as comments of at most some 100 columns.
fn line(note: &Note) -> String {
    let at = note.at.map_or(String::new(), |at| format!("line {}: ", at.line));
    let keys = if note.keys.is_empty() { String::new() } else { format!(" -> {}", note.keys.join(", ")) };
    let mut text = format!("#   {at}{} = {}{keys}\n", note.setting, note.value.replace('\n', " "));
    let mut row = String::new();
    for word in note.why.split_whitespace() {
        if !row.is_empty() && row.chars().count() + word.chars().count() > 90 {
            let _ = writeln!(text, "#      {row}");
            row.clear();
        }
        row = if row.is_empty() { word.to_owned() } else { format!("{row} {word}") };
    }
    let _ = writeln!(text, "#      {row}");
    text
}

fn to_json(imported: &Imported) -> serde_json::Value {
    let note = |note: &Note| {
        serde_json::json!({
            "setting": note.setting,
            "line": note.at.map(|at| at.line),
            "column": note.at.map(|at| at.column),
            "value": note.value,
            "verdict": note.verdict.name(),
            "keys": note.keys,
            "why": note.why,
        })
    };
    serde_json::json!({
        "format": imported.format.name(),
        "model": imported.model,
        "manifest": imported.manifest.to_toml(),
        "server": imported.server.to_toml(),
        "notes": imported.notes.iter().map(note).collect::<Vec<_>>(),
    })
}
