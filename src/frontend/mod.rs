//! One shard per core: listener, connections, mailboxes. The only room that knows glommio.
//!
//! Always true
//! - Nothing blocks a shard: no file, lock wait, device call or unbounded loop.
//! - No task is ever always runnable: after a bounded burst it waits for something that truly pends until the next poll.
//! - What is accepted is answered exactly once, or its connection is gone and that is counted.
//!
//! The loop's shape follows from how glommio 0.9 runs (ARCHITECTURE.md, "The shard's loop"). Files: shard.rs (the thread
//! and its tasks), tls.rs, access.rs (who may connect), state.rs (connections and in-flight requests), session.rs (what each frame means),
//! connection.rs, abuse.rs (what waste costs), inflight.rs, ledger.rs (its books, recomputed), pressure.rs (near the budget), traces.rs
//! (recorded requests), task.rs (the one spawn), watchdog.rs, preflight.rs (run before any of this).

pub mod abuse;
pub mod access;
pub mod answering;
pub mod bucket;
pub mod connection;
pub mod inflight;
pub mod ledger;
pub mod output;
pub mod preflight;
pub mod pressure;
pub mod room;
pub mod session;
pub mod shard;
pub mod state;
pub mod task;
pub mod throttle;
pub mod tls;
pub mod traces;
pub mod watchdog;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use self::abuse::{Bans, Rules};
use crate::contract::Contract;
use crate::quota::Quotas;
use crate::scheduler::TenantId;
use crate::vocab::ModelHandle;

/// Bounds and times of a shard. See config/limits.rs for what each trades.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of this shard.
    pub connections_max: u32,
    pub credit_requests: u32,
    pub credit_bytes: u64,
    pub payload_bytes_max: u32,
    pub output_bytes_max: u32,
    /// Of all connections of this shard together.
    pub output_bytes_total_max: u64,
    /// Bytes of unfinished frames that all connections together may hold.
    pub receiving_bytes_max: u64,
    /// Payload bytes of all accepted requests, of all shards.
    pub admitted_bytes_max: u64,
    /// Requests in flight on this shard.
    pub in_flight_max: u32,
    pub hello_timeout: Duration,
    pub frame_timeout: Duration,
    pub stall_timeout: Duration,
    pub idle_timeout: Duration,
    /// What waste costs a connection.
    pub rules: Rules,
    /// Whom no shard listens to.
    pub bans: Arc<Bans>,
    pub quotas: Arc<Quotas>,
    /// How long an idle shard looks for work before it sleeps.
    pub spin: Duration,
    /// Who may connect, and how. None: everybody, and nothing is encrypted.
    pub access: Option<Arc<access::SharedAccess>>,
    /// Where requests that are recorded for a trace go; None: none is.
    pub tracing: Option<traces::Tracing>,
    /// Test hook: a request with this id panics in its connection's task.
    pub panic_on_request_id: Option<u64>,
    /// Test hook: a request with this id ends its shard with a panic.
    pub panic_shard_on_request_id: Option<u64>,
}

#[cfg(test)]
impl Options {
    /// Nothing is refused or too late.
    pub(crate) fn unbounded() -> Options {
        let long = Duration::from_secs(3600);
        Options {
            connections_max: u32::MAX,
            credit_requests: u32::MAX,
            credit_bytes: u64::MAX,
            payload_bytes_max: 1 << 30,
            output_bytes_max: 1 << 30,
            output_bytes_total_max: u64::MAX,
            receiving_bytes_max: u64::MAX,
            admitted_bytes_max: u64::MAX,
            in_flight_max: u32::MAX,
            hello_timeout: long,
            frame_timeout: long,
            stall_timeout: long,
            idle_timeout: long,
            rules: Rules::NONE,
            bans: Arc::default(),
            quotas: Arc::default(),
            spin: Duration::ZERO,
            access: None,
            tracing: None,
            panic_on_request_id: None,
            panic_shard_on_request_id: None,
        }
    }
}

/// What connections are told about models, made once.
#[derive(Debug)]
pub struct Catalog {
    pub entries: Vec<CatalogEntry>,
    /// JSON document of the list of models.
    pub list_json: Vec<u8>,
    pub tenants: TenantNames,
}

/// The tenants that have said hello, numbered. Taken once per connection.
///
/// Always true: at most [`TenantNames::MAX`] are told apart; whoever comes later is the first, "others" and the nameless.
#[derive(Debug)]
pub struct TenantNames(Mutex<Vec<String>>);

impl TenantNames {
    pub const MAX: usize = 1024;

    fn new() -> TenantNames {
        TenantNames(Mutex::new(vec![String::new()]))
    }

    pub fn id_of(&self, name: &str) -> TenantId {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = names.iter().position(|known| known == name) {
            return TenantId(at as u16);
        }
        if names.len() == TenantNames::MAX {
            return TenantId(0);
        }
        names.push(name.to_owned());
        TenantId((names.len() - 1) as u16)
    }
}

#[derive(Debug)]
pub struct CatalogEntry {
    pub contract: Arc<Contract>,
    pub contract_hash: u64,
    /// JSON document of the contract.
    pub json: Vec<u8>,
}

impl Catalog {
    pub fn new(contracts: &[Arc<Contract>]) -> Catalog {
        let entries: Vec<CatalogEntry> = contracts
            .iter()
            .map(|contract| CatalogEntry {
                contract: Arc::clone(contract),
                contract_hash: contract.hash(),
                json: serde_json::to_vec(&**contract).expect("a contract is plain data"),
            })
            .collect();
        let list: Vec<serde_json::Value> = entries
            .iter()
            .enumerate()
            .map(|(handle, entry)| {
                serde_json::json!({
                    "name": entry.contract.name,
                    "version": entry.contract.version,
                    "handle": handle,
                    "contract_hash": format!("{:016x}", entry.contract_hash),
                    "ready": true,
                })
            })
            .collect();
        let list_json = serde_json::to_vec(&serde_json::json!({ "models": list })).expect("plain data");
        Catalog { entries, list_json, tenants: TenantNames::new() }
    }

    pub fn by_handle(&self, handle: ModelHandle) -> Option<&CatalogEntry> {
        self.entries.get(handle.index())
    }

    /// The model with this name, and with this version unless it is empty.
    pub fn find(&self, name: &str, version: &str) -> Option<(ModelHandle, &CatalogEntry)> {
        let at = self.entries.iter().position(|entry| {
            entry.contract.name == name && (version.is_empty() || entry.contract.version == version)
        })?;
        Some((ModelHandle(at as u16), &self.entries[at]))
    }
}
