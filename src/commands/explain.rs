//! `ferry explain`: why a request took as long as it did, in plain sentences. Either sends one and tells its receipt, or tells
//! what a server remembers: its slowest requests, or its last batches.
//!
//! Elsewhere: the sentences (timeline/story.rs), how inputs are read (infer.rs).

use std::net::SocketAddr;
use std::process::ExitCode;

use ferry::client::{Client, ClientError, Request, Response};
use ferry::clock;
use ferry::contract::{Contract, Dim};
use ferry::timeline::story::{Story, Times};
use ferry::vocab::Layout;
use serde_json::{Value, json};

use super::load::{failed, resolve, wrong_use};
use super::{http, infer};

#[derive(clap::Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("what").required(true).multiple(true).args(["model", "slowest", "last"])))]
pub struct Args {
    /// The server's data address, to which one request is sent.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7600")]
    addr: String,
    /// The server's control address, where --slowest and --last are asked.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    control: String,
    /// Sends one request to this model.
    #[arg(long, conflicts_with_all = ["slowest", "last"])]
    model: Option<String>,
    /// Its input: a text, tokenized by the server.
    #[arg(long, value_name = "STR", requires = "model", conflicts_with_all = ["input", "len"])]
    text: Option<String>,
    /// Its input from a file of NumPy's format; repeated for models of several inputs.
    #[arg(long, value_name = "NAME=FILE.npy", requires = "model", conflicts_with = "len")]
    input: Vec<String>,
    /// One row of this length, of zeros or what the contract pads with [default: the shortest].
    #[arg(long, value_name = "N", requires = "model")]
    len: Option<u32>,
    /// The K slowest requests that the server remembers, one a batch.
    #[arg(long, value_name = "K")]
    slowest: Option<usize>,
    /// Only of the last N batches; alone: each of them, oldest first.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Prints one JSON document.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> ExitCode {
    match &args.model {
        Some(model) => run_one(args, model),
        None => run_remembered(args),
    }
}

fn run_one(args: &Args, model: &str) -> ExitCode {
    let addr = match resolve(&args.addr) {
        Ok(addr) => addr,
        Err(message) => return wrong_use(&message),
    };
    let mut arrays = Vec::new();
    for input in &args.input {
        match infer::read_input(input) {
            Ok(array) => arrays.push(array),
            Err(message) => return wrong_use(&message),
        }
    }
    let asked = Client::connect(addr, super::connection::options()).and_then(|client| {
        let contract = &client.model(model)?.contract;
        let request = match (&args.text, arrays.is_empty()) {
            (Some(text), _) => Request::text(model, text),
            (None, false) => infer::array_request(contract, arrays),
            (None, true) => row_of(contract, args.len)?,
        };
        let sent_at = clock::now();
        let response = client.infer(&request.receipt())?;
        Ok((response, clock::now().since(sent_at).as_nanos() as f64 / 1e3))
    });
    let (response, seen_us) = match asked {
        Ok(asked) => asked,
        Err(ClientError::Contract(refusal)) => return wrong_use(&refusal.message),
        Err(error) => return failed(&error.to_string()),
    };
    let Some(story) = story_of(&response) else {
        return failed("the server sent no receipt, although it was asked for one");
    };
    let outside_us = seen_us - story.times_us.total;
    if args.json {
        let document = json!({ "client_us": seen_us, "outside_us": outside_us, "request": story });
        println!("{}", serde_json::to_string_pretty(&document).expect("plain data"));
    } else {
        print!("{}", page(&story));
        println!("  Seen from here it took {:.0} µs: {outside_us:.0} µs of it on the way there and back.", seen_us);
    }
    ExitCode::SUCCESS
}

/// One row of padding values.
fn row_of(contract: &Contract, len: Option<u32>) -> Result<Request, ClientError> {
    let length = contract.length.as_ref();
    let len = len.or(length.map(|length| length.min)).unwrap_or(1);
    let request = contract.inputs.iter().fold(Request::new(contract.name.as_str()), |request, spec| {
        let pad = spec.pad_bytes();
        let mut dims = vec![1];
        dims.extend(spec.shape.iter().map(|dim| match dim {
            Dim::Fixed(size) => *size,
            Dim::Named(_) => len,
        }));
        let elements = spec.row_bytes(len) / pad.len();
        request.input_bytes(spec.name.as_str(), spec.dtype, &dims, pad.repeat(elements))
    });
    Ok(request)
}

/// A response's receipt as a story.
fn story_of(response: &Response) -> Option<Story> {
    let (receipt, timings) = (response.receipt()?, response.timings()?);
    let us = |nanos: u64| nanos as f64 / 1e3;
    Some(Story {
        model: response.model().contract.name.clone(),
        batch: response.batch(),
        executor: receipt.executor,
        generation: response.generation(),
        reason: response.seal_reason().map_or(String::new(), |reason| reason.name().to_owned()),
        layout: Layout::from_number(receipt.layout).map_or(String::new(), |layout| layout.name().to_owned()),
        rows: receipt.rows,
        len: receipt.len,
        batch_rows: response.batch_rows(),
        rows_possible: receipt.rows_possible,
        padded_len: response.padded_len(),
        cells_real: receipt.cells_real,
        cells_padded: receipt.cells_padded,
        cells_own_padding: receipt.cells_own_padding,
        co_members: receipt.co_members,
        co_lens: receipt.co_lens.to_vec(),
        predicted_us: us(receipt.predicted_ns),
        late_us: receipt.late_us as f64,
        failed: false,
        times_us: Times {
            admit: us(timings.admit_ns),
            queue: us(timings.queue_ns),
            held: us(receipt.held_ns),
            behind: us(receipt.behind_ns),
            other: us(receipt.other_ns),
            pack: us(timings.pack_ns),
            wait: us(timings.wait_ns),
            upload: us(receipt.upload_ns),
            run: us(timings.run_ns),
            readback: us(receipt.readback_ns),
            scatter: us(timings.scatter_ns),
            total: us(timings.total_ns()),
        },
    })
}

fn page(story: &Story) -> String {
    story.sentences().into_iter().map(|sentence| format!("  {sentence}\n")).collect()
}

fn run_remembered(args: &Args) -> ExitCode {
    let control = match resolve(&args.control) {
        Ok(control) => control,
        Err(message) => return wrong_use(&message.replace("--addr", "--control")),
    };
    match remembered(args, control) {
        Ok((answer, _)) if args.json => {
            println!("{}", serde_json::to_string_pretty(&answer).expect("plain data"));
            ExitCode::SUCCESS
        }
        Ok((_, stories)) if stories.is_empty() => {
            println!("the server remembers no batch: nothing ran, or recorder.batches is 0");
            ExitCode::SUCCESS
        }
        Ok((_, stories)) => {
            for (at, story) in stories.iter().enumerate() {
                println!("{}.", at + 1);
                print!("{}", page(story));
            }
            ExitCode::SUCCESS
        }
        Err(message) => failed(&message),
    }
}

/// The server's answer, and the stories in it.
fn remembered(args: &Args, control: SocketAddr) -> Result<(Value, Vec<Story>), String> {
    let path = match (args.slowest, args.last) {
        (Some(slowest), Some(last)) => format!("/v1/requests?slowest={slowest}&last={last}"),
        (Some(slowest), None) => format!("/v1/requests?slowest={slowest}"),
        (None, last) => format!("/v1/batches?last={}", last.expect("clap asks for one of them")),
    };
    let (status, answer) = http::request(control, "GET", &path, None)?;
    if status != 200 {
        return Err(answer["error"].as_str().unwrap_or("the server refused without a reason").to_owned());
    }
    let stories = match args.slowest {
        Some(_) => answer["requests"].as_array().cloned().unwrap_or_default(),
        None => answer["batches"].as_array().into_iter().flatten().map(|batch| batch["oldest"].clone()).collect(),
    };
    let told = stories.into_iter().filter(|story| !story.is_null());
    let told =
        told.map(|story| serde_json::from_value(story).map_err(|error| format!("an answer of another form: {error}")));
    Ok((answer, told.collect::<Result<_, String>>()?))
}
