//! Certificates and keys, from PEM files to what rustls wants; and what a client's certificate says of who it is.
//!
//! TLS 1.3 alone: no renegotiation, no early data, no tickets that outlive the process. The provider is ring, which builds with a C
//! compiler alone.
//!
//! Elsewhere: sessions on connections (frontend/tls.rs, client/stream.rs), who a name means (tenants).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Both ends must name it, so that a client of another protocol ends in the handshake.
pub const ALPN: &[u8] = b"ferry/1";

/// Whether clients show certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientAuth {
    #[default]
    None,
    Optional,
    Required,
}

impl ClientAuth {
    pub const ALL: [ClientAuth; 3] = [ClientAuth::None, ClientAuth::Optional, ClientAuth::Required];

    pub fn name(self) -> &'static str {
        match self {
            ClientAuth::None => "none",
            ClientAuth::Optional => "optional",
            ClientAuth::Required => "required",
        }
    }
}

/// The files of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFiles {
    /// Its certificate, and those between it and an authority.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The authorities of clients' certificates: not those of the server's own.
    pub client_ca: Option<PathBuf>,
    pub client_auth: ClientAuth,
}

/// A file that is of no use: which, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsError {
    pub file: PathBuf,
    pub message: String,
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.message)
    }
}

impl std::error::Error for TlsError {}

fn failed(file: &Path, message: impl fmt::Display) -> TlsError {
    TlsError { file: file.to_path_buf(), message: message.to_string() }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(file).map_err(|error| failed(file, error))?;
    let all = read.collect::<Result<Vec<_>, _>>().map_err(|error| failed(file, error))?;
    if all.is_empty() {
        return Err(failed(file, "expected certificates in PEM form (BEGIN CERTIFICATE), found none"));
    }
    Ok(all)
}

fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    // What is in the file is a secret: an error says no more than that.
    PrivateKeyDer::from_pem_file(file).map_err(|error| match error {
        rustls_pki_types::pem::Error::Io(error) => failed(file, error),
        _ => failed(file, "expected a private key in PEM form (BEGIN PRIVATE KEY)"),
    })
}

fn roots(file: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots.add(certificate).map_err(|error| failed(file, error))?;
    }
    Ok(Arc::new(roots))
}

/// What a server's sessions begin with.
pub fn server_config(files: &ServerFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = server_builder();
    let builder = match (&files.client_ca, files.client_auth) {
        (Some(ca), ClientAuth::Optional | ClientAuth::Required) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca)?, provider());
            let verifier = match files.client_auth {
                ClientAuth::Required => verifier,
                _ => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| failed(ca, error))?)
        }
        _ => builder.with_no_client_auth(),
    };
    let chain = certificates(&files.certificate)?;
    let mut config = builder
        .with_single_cert(chain, key(&files.key)?)
        .map_err(|error| failed(&files.certificate, format!("with the key {}: {error}", files.key.display())))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(without_sessions(config)))
}

/// The same certificate for HTTP on the control port: none is asked for, tokens say who it is there; no protocol has to be named.
pub fn control_config(data: &ServerConfig) -> Arc<ServerConfig> {
    let builder = server_builder().with_no_client_auth();
    Arc::new(without_sessions(builder.with_cert_resolver(Arc::clone(&data.cert_resolver))))
}

fn server_builder() -> rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier> {
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider knows TLS 1.3")
}

/// A session costs its handshake, each time: nothing of one is kept that somebody could use again.
fn without_sessions(mut config: ServerConfig) -> ServerConfig {
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config
}

/// What a client's sessions begin with: the authorities that it trusts, and its own certificate where it has one.
pub fn client_config(ca: &Path, own: Option<(&Path, &Path)>) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider knows TLS 1.3")
        .with_root_certificates(roots(ca)?);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some((certificate, key_file)) => builder
            .with_client_auth_cert(certificates(certificate)?, key(key_file)?)
            .map_err(|error| failed(certificate, error))?,
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The URIs among the names of a certificate that was verified.
pub fn uris_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return Vec::new() };
    certificate.valid_uri_names().map(str::to_owned).collect()
}
