//! `ferry token new`: a secret for a caller, and the line for the server's file of tenants.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use ferry::tenants::{SECRET_BYTES, Tenants, token_of};
use rand::TryRngCore;
use rand::rngs::OsRng;

use super::load::wrong_use;

#[derive(Args, Clone, Debug)]
pub struct TokenArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Clone, Debug)]
enum What {
    /// Make a token: the secret is printed once, on standard output; the line for the file of tenants on standard error.
    New {
        /// Whose it is to be.
        #[arg(long)]
        tenant: String,
        /// Names it in the file and in the token: a-z, 0-9 and - [default: drawn by chance].
        #[arg(long)]
        id: Option<String>,
        /// Its last day, YYYY-MM-DD [default: none].
        #[arg(long, value_name = "DATE")]
        expires: Option<String>,
    },
}

pub fn run(args: &TokenArgs) -> ExitCode {
    let What::New { tenant, id, expires } = &args.what;
    let mut secret = [0; SECRET_BYTES];
    let mut chance = [0; 4];
    for bytes in [&mut secret[..], &mut chance[..]] {
        if let Err(error) = OsRng.try_fill_bytes(bytes) {
            return super::load::failed(&format!("the system gives no random bytes: {error}"));
        }
    }
    let id = id.clone().unwrap_or_else(|| chance.iter().map(|byte| format!("{byte:02x}")).collect());
    let (token, sha256) = token_of(&id, &secret);
    let expiry = expires.as_ref().map_or_else(String::new, |day| format!(", expires = {day:?}"));
    let line = format!("tokens = [{{ id = {id:?}, sha256 = \"{sha256}\"{expiry} }}]");
    // What is printed is what the server would take.
    let table = format!("[tenant.{}]\nroles = [\"infer\"]\n{line}\n", toml::Value::String(tenant.clone()));
    if let Err(error) = Tenants::parse(&table) {
        return wrong_use(&error.to_string());
    }
    eprint!(
        "for the server's file of tenants:\n\n{table}\nthe token, shown this once; keep it in a file that only its user can read:\n\n"
    );
    println!("{token}");
    ExitCode::SUCCESS
}
