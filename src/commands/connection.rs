//! How commands that ask a server prove who they are, and how their connections are encrypted: the same flags for all of them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::Args;
use ferry::client::{ClientOptions, ClientTls};
use ferry::tls;

/// Of every command that connects to a server.
#[derive(Args, Clone, Debug, Default)]
pub struct ConnectionArgs {
    /// Encrypt, and trust servers whose certificate is signed by one of these authorities (PEM).
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    tls_ca: Option<PathBuf>,
    /// The name that the server's certificate is to have [default: the address that is connected to].
    #[arg(long, global = true, value_name = "NAME", requires = "tls_ca", help_heading = "Connection")]
    tls_name: Option<String>,
    /// Show this certificate (PEM).
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        requires = "tls_ca",
        requires = "tls_key",
        help_heading = "Connection"
    )]
    tls_cert: Option<PathBuf>,
    /// The key of --tls-cert (PEM).
    #[arg(long, global = true, value_name = "FILE", requires = "tls_cert", help_heading = "Connection")]
    tls_key: Option<PathBuf>,
    /// The control port is encrypted, too (`auth.control` with `tls.certificate`).
    #[arg(long, global = true, requires = "tls_ca", help_heading = "Connection")]
    control_tls: bool,
    /// Show the token in this file [default: the variable FERRY_TOKEN]. There is no flag for the token itself: arguments can be seen
    /// by everybody on the machine.
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    token_file: Option<PathBuf>,
}

/// What the flags came to. Once for the process.
#[derive(Debug, Default)]
struct Connection {
    token: Vec<u8>,
    tls: Option<ClientTls>,
    control_tls: bool,
}

static CONNECTION: OnceLock<Connection> = OnceLock::new();

/// Reads the files. Before any command runs.
pub fn set(args: &ConnectionArgs) -> Result<(), String> {
    let token = match &args.token_file {
        Some(file) => std::fs::read_to_string(file)
            .map_err(|error| format!("--token-file {}: {error}", file.display()))?
            .trim()
            .as_bytes()
            .to_vec(),
        None => std::env::var("FERRY_TOKEN").unwrap_or_default().into_bytes(),
    };
    let own = args.tls_cert.as_deref().zip(args.tls_key.as_deref());
    let encrypt = |ca: &Path| {
        let config = tls::client_config(ca, own).map_err(|error| error.to_string())?;
        Ok::<_, String>(ClientTls { config, name: args.tls_name.clone().unwrap_or_default() })
    };
    let tls = args.tls_ca.as_deref().map(encrypt).transpose()?;
    let _ = CONNECTION.set(Connection { token, tls, control_tls: args.control_tls });
    Ok(())
}

fn connection() -> &'static Connection {
    CONNECTION.get_or_init(Connection::default)
}

pub fn token() -> Vec<u8> {
    connection().token.clone()
}

pub fn tls() -> Option<ClientTls> {
    connection().tls.clone()
}

/// How a control port is spoken to; None: in plain.
pub fn control_tls() -> Option<ClientTls> {
    tls().filter(|_| connection().control_tls)
}

pub fn options() -> ClientOptions {
    ClientOptions { token: token(), tls: tls(), ..ClientOptions::default() }
}
