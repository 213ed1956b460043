//! The files that say who may connect: read at start, and again when they change.
//!
//! Always true
//! - What cannot be read or understood changes nothing: the old certificates and tenants stay, an error is logged once for that content, and
//!   counted (`ferry_reloads_total`).
//! - A file that is being written is not believed before it has looked the same for one round.
//!
//! Elsewhere: what is in them (tenants, tls), who asks (frontend/access.rs).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::config::Config;
use crate::frontend::access::{Access, SharedAccess};
use crate::quota::Quotas;
use crate::telemetry::Telemetry;
use crate::tenants::{Day, Tenants};
use crate::tls::{self, ServerFiles};
use crate::vocab::Moment;

/// Between two looks at the files.
const EVERY: Duration = Duration::from_secs(1);
/// A file of tenants is at most so long.
const TENANTS_BYTES_MAX: u64 = 16 << 20;

/// Places in `telemetry::RELOADED`.
const TLS: usize = 0;
const TENANTS: usize = 1;

/// Which files.
#[derive(Clone, Debug)]
pub struct AccessFiles {
    tls: Option<ServerFiles>,
    tenants: Option<PathBuf>,
}

impl AccessFiles {
    /// None where everybody may connect and nothing is encrypted.
    pub fn of(config: &Config) -> Option<AccessFiles> {
        let files = AccessFiles { tls: config.tls_files(), tenants: config.tenants.clone() };
        (files.tls.is_some() || files.tenants.is_some()).then_some(files)
    }

    /// Reads all of it for the first time: an error says which file, and why.
    pub fn open(self) -> Result<OpenAccess, String> {
        let seen = self.stamps();
        let access = Access {
            tls: self.tls.as_ref().map(tls::server_config).transpose().map_err(|error| error.to_string())?,
            tenants: self.tenants.as_deref().map(read_tenants).transpose()?.map(Arc::new),
        };
        if let (Some(files), Some(tenants)) = (&self.tls, &access.tenants) {
            warn_of_readable_key(&files.key);
            if tenants.have_certificates() && files.client_ca.is_none() {
                tracing::warn!("tenants are named by certificates, but clients show none: tls.client_auth is none");
            }
        }
        Ok(OpenAccess {
            files: self,
            quotas: None,
            shared: Arc::new(SharedAccess::new(access, today())),
            seen: seen.clone(),
            taken: seen,
            look_at: Moment::ZERO,
        })
    }

    fn stamps(&self) -> [Vec<Stamp>; 2] {
        let tls = self.tls.iter().flat_map(|files| {
            [Some(&files.certificate), Some(&files.key), files.client_ca.as_ref()].into_iter().flatten()
        });
        [tls.map(|file| Stamp::of(file)).collect(), self.tenants.iter().map(|file| Stamp::of(file)).collect()]
    }
}

/// How a file looks from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    /// All 0 where there is none.
    fn of(file: &Path) -> Stamp {
        std::fs::metadata(file).map_or(Stamp { inode: 0, bytes: 0, modified: (0, 0) }, |metadata| Stamp {
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// By the wall clock, which only says when credentials have expired.
fn today() -> Day {
    Day::of_unix(clock::unix_time(clock::now()))
}

fn read_tenants(file: &Path) -> Result<Tenants, String> {
    let named = |message: String| format!("{}: {message}", file.display());
    let bytes = std::fs::metadata(file).map_err(|error| named(error.to_string()))?.len();
    if bytes > TENANTS_BYTES_MAX {
        return Err(named(format!("expected at most {TENANTS_BYTES_MAX} bytes, the file has {bytes}")));
    }
    let text = std::fs::read_to_string(file).map_err(|error| named(error.to_string()))?;
    Tenants::parse(&text).map_err(|error| named(error.to_string()))
}

fn warn_of_readable_key(key: &Path) {
    if std::fs::metadata(key).is_ok_and(|metadata| metadata.mode() & 0o044 != 0) {
        tracing::warn!("tls.key can be read by others than its owner: chmod 600 it");
    }
}

/// What is in force, and how the files looked when it was read.
#[derive(Debug)]
pub struct OpenAccess {
    pub shared: Arc<SharedAccess>,
    files: AccessFiles,
    /// That follow the tenants.
    quotas: Option<Arc<Quotas>>,
    /// At the last look.
    seen: [Vec<Stamp>; 2],
    /// When they were last read, for better or worse.
    taken: [Vec<Stamp>; 2],
    look_at: Moment,
}

impl OpenAccess {
    /// Tenants' own quotas are those of the file from now on.
    pub fn govern(&mut self, quotas: Arc<Quotas>) {
        if let Some(tenants) = &self.shared.current().tenants {
            quotas.set_own(tenants.quotas());
        }
        self.quotas = Some(quotas);
    }

    /// Looks at the files, if it is time, and reads those that have changed and changed no more.
    pub fn look(&mut self, now: Moment, telemetry: &Telemetry) {
        if now < self.look_at {
            return;
        }
        self.look_at = now + EVERY;
        self.shared.set_today(today());
        let stamps = self.files.stamps();
        for what in [TLS, TENANTS] {
            if stamps[what] != self.taken[what] && stamps[what] == self.seen[what] {
                self.read(what, telemetry);
            }
        }
        self.seen = stamps;
    }

    /// Reads all of them now.
    pub fn reload(&mut self, telemetry: &Telemetry) {
        self.seen = self.files.stamps();
        self.read(TLS, telemetry);
        self.read(TENANTS, telemetry);
    }

    fn read(&mut self, what: usize, telemetry: &Telemetry) {
        self.taken[what] = self.files.stamps()[what].clone();
        let mut access = Access::clone(&self.shared.current());
        let outcome = match (what, &self.files) {
            (TLS, AccessFiles { tls: Some(files), .. }) => {
                tls::server_config(files).map(|config| access.tls = Some(config)).map_err(|error| error.to_string())
            }
            (TENANTS, AccessFiles { tenants: Some(file), .. }) => {
                read_tenants(file).map(|tenants| access.tenants = Some(Arc::new(tenants)))
            }
            _ => return,
        };
        telemetry.reloaded(what, outcome.is_ok());
        let what = crate::telemetry::RELOADED[what];
        match outcome {
            Ok(()) => {
                if let (Some(quotas), Some(tenants)) = (&self.quotas, &access.tenants) {
                    quotas.set_own(tenants.quotas());
                }
                self.shared.replace(access);
                tracing::info!(what, "read again, and in force for new connections");
            }
            Err(message) => tracing::error!(what, message, "cannot be used: what was there before stays in force"),
        }
    }
}
