//! `ferry models`: what a server has, and what each model asks for and gives.

use std::process::ExitCode;

use ferry::client::{Client, ClientError, ModelEntry, ModelInfo};
use ferry::contract::{Dim, TensorSpec};
use serde_json::json;

use super::connection;
use super::load::{failed, resolve, wrong_use};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The server's data address.
    #[arg(long, default_value = "127.0.0.1:7600")]
    addr: String,
    /// Prints one JSON document.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> ExitCode {
    let addr = match resolve(&args.addr) {
        Ok(addr) => addr,
        Err(message) => return wrong_use(&message),
    };
    let listed = Client::connect(addr, connection::options()).and_then(|client| {
        let describe = |entry: ModelEntry| {
            // A model that is not ready may have no contract yet; it is still listed.
            match client.model_version(&entry.name, &entry.version) {
                Ok(info) => Ok((entry, Some(info))),
                Err(ClientError::Refused(_)) => Ok((entry, None)),
                Err(error) => Err(error),
            }
        };
        client.models()?.into_iter().map(describe).collect::<Result<Vec<_>, _>>()
    });
    let models = match listed {
        Ok(models) => models,
        Err(error) => return failed(&error.to_string()),
    };
    if args.json {
        let entries: Vec<serde_json::Value> = models
            .iter()
            .map(|(entry, info)| {
                json!({
                    "name": entry.name,
                    "version": entry.version,
                    "handle": entry.handle,
                    // As text: a number of 64 bits is rounded by most readers of JSON.
                    "contract_hash": format!("{:016x}", entry.contract_hash),
                    "ready": entry.ready,
                    "contract": info.as_ref().map(|info| &info.contract),
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&json!({ "models": entries })).expect("plain data"));
    } else {
        for (entry, info) in &models {
            println!("{} {} ({})", entry.name, entry.version, if entry.ready { "ready" } else { "not ready" });
            if let Some(info) = info {
                print!("{}", describe(info));
            }
        }
    }
    ExitCode::SUCCESS
}

fn describe(info: &ModelInfo) -> String {
    let contract = &info.contract;
    let tensor = |what: &str, spec: &TensorSpec| {
        let dims: Vec<String> = std::iter::once("rows".to_owned())
            .chain(spec.shape.iter().map(|dim| match dim {
                Dim::Fixed(n) => n.to_string(),
                Dim::Named(name) => name.clone(),
            }))
            .collect();
        let range = spec.range.map_or(String::new(), |[low, high]| format!(", {low} to {high}"));
        format!("  {what:<7} {} {} [{}]{range}\n", spec.name, spec.dtype, dims.join(", "))
    };
    let mut text = String::new();
    contract.inputs.iter().for_each(|spec| text += &tensor("input", spec));
    if let Some(spec) = &contract.text {
        text += &format!("  or      {} text, at most {} bytes\n", spec.name, spec.bytes_max);
    }
    contract.outputs.iter().for_each(|spec| text += &tensor("output", spec));
    if let Some(length) = &contract.length {
        text += &format!("  {:<7} {} to {}\n", length.name, length.min, length.max);
    }
    text + &format!("  rows    1 to {}\n", contract.rows_max)
}
