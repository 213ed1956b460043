//! Arguments, and which command they name. No logic.
//!
//! Exit status: 0 success, 1 the work failed, 2 wrong use, 78 the configuration or the machine does not allow it.
#![forbid(unsafe_code)]

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A dynamic batching inference runtime.
#[derive(Parser)]
#[command(name = "ferry", version)]
struct Cli {
    #[command(flatten)]
    connection: commands::connection::ConnectionArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve models until told to stop.
    Serve(commands::serve::Args),
    /// Offer a load to a server and report what came of it.
    Load(commands::load::Args),
    /// Send a few requests by hand.
    Infer(commands::infer::Args),
    /// List a server's models and their contracts.
    Models(commands::models::Args),
    /// Show a model's knobs, or change some while the server runs.
    Set(commands::set::Args),
    /// Show what other settings would have made of the requests that come.
    Shadow(commands::shadow::Args),
    /// Try knobs of a model for a while, and keep them or go back by what comes of it.
    Trial(commands::trial::Args),
    /// Run the executors alone on all requests at once: the bound.
    Offline(commands::offline::Args),
    /// Record what a server's scheduler is told, for a replay.
    Capture(commands::capture::Args),
    /// Run the scheduler in virtual time: a trace again, or with other settings.
    Replay(commands::replay::Args),
    /// Tell why a request took as long as it did, in plain sentences.
    Explain(commands::explain::Args),
    /// Write a server's last batches as a file for a trace viewer.
    Timeline(commands::timeline::Args),
    /// Search for better settings of a model in virtual time, and measure the best of them.
    Tune(commands::tune::Args),
    /// Check the configuration and the models, without starting anything.
    Check(commands::check::Args),
    /// Watch a server in a terminal: where executor time goes, and what each model does.
    Top(commands::top::Args),
    /// Read another server's batching settings and print ferry's.
    Import(commands::import::Args),
    /// Show what models could run on: the processor and the GPUs.
    Devices(commands::devices::Args),
    /// Make tokens for callers.
    Token(commands::token::TokenArgs),
}

/// Who reads the output may stop: `ferry … | head` is no failure to report. Rust's own answer to a closed pipe is a panic.
fn end_quietly_when_nobody_reads() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        if message.starts_with("failed printing to stdout") && message.contains("Broken pipe") {
            std::process::exit(EXIT_PIPE);
        }
        report(panic);
    }));
}

/// What a shell shows of a program that ended by SIGPIPE.
const EXIT_PIPE: i32 = 141;

fn main() -> ExitCode {
    end_quietly_when_nobody_reads();
    let cli = Cli::parse();
    if let Err(message) = commands::connection::set(&cli.connection) {
        eprintln!("{message}");
        return ExitCode::from(commands::EXIT_USE);
    }
    match cli.command {
        Command::Serve(args) => commands::serve::run(args),
        Command::Load(args) => commands::load::run(args),
        Command::Infer(args) => commands::infer::run(args),
        Command::Models(args) => commands::models::run(args),
        Command::Set(args) => commands::set::run(&args),
        Command::Shadow(args) => commands::shadow::run(&args),
        Command::Trial(args) => commands::trial::run(&args),
        Command::Offline(args) => commands::offline::run(&args),
        Command::Capture(args) => commands::capture::run(args),
        Command::Replay(args) => commands::replay::run(&args),
        Command::Explain(args) => commands::explain::run(&args),
        Command::Timeline(args) => commands::timeline::run(&args),
        Command::Tune(args) => commands::tune::run(&args),
        Command::Check(args) => commands::check::run(args),
        Command::Top(args) => commands::top::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Devices(args) => commands::devices::run(&args),
        Command::Token(args) => commands::token::run(&args),
    }
}
