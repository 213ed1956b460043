//! `ferry timeline`: a server's last batches as a file that ui.perfetto.dev and chrome://tracing open.

use std::path::PathBuf;
use std::process::ExitCode;

use super::http;
use super::load::{failed, resolve, wrong_use};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The server's control address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    control: String,
    /// Only batches that were sealed in the last N seconds [default: all that the server keeps].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Where the file goes.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub fn run(args: &Args) -> ExitCode {
    let control = match resolve(&args.control) {
        Ok(control) => control,
        Err(message) => return wrong_use(&message.replace("--addr", "--control")),
    };
    let query = args.seconds.map_or(String::new(), |seconds| format!("?seconds={seconds}"));
    let json = match http::request(control, "GET", &format!("/v1/timeline{query}"), None) {
        Ok((200, json)) => json,
        Ok((_, answer)) => return failed(answer["error"].as_str().unwrap_or("the server refused without a reason")),
        Err(message) => return failed(&message),
    };
    if let Err(error) = std::fs::write(&args.output, json.to_string()) {
        return failed(&format!("{}: {error}", args.output.display()));
    }
    let batches = &json["otherData"]["batches"];
    println!("{}: {batches} batches; open it in ui.perfetto.dev or chrome://tracing", args.output.display());
    ExitCode::SUCCESS
}
