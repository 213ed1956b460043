//! The whole server, spoken to over real sockets: faults of FAULTS.md in their order, then what users compare.
//!
//! Always true
//! - A test says which case it is where it has a number (F01…), and asserts that nobody else was hurt.
//! - Order of events is compared, not times of day: the machine may be slow, the server may not be wrong.

mod common;

#[path = "e2e/abuse.rs"]
mod abuse;
#[path = "e2e/dashboard.rs"]
mod dashboard;
#[path = "e2e/device.rs"]
mod device;
#[path = "e2e/faults.rs"]
mod faults;
#[path = "e2e/features.rs"]
mod features;
#[path = "e2e/framing.rs"]
mod framing;
#[path = "e2e/latency.rs"]
mod latency;
#[path = "e2e/live.rs"]
mod live;
#[path = "e2e/meaning.rs"]
mod meaning;
#[path = "e2e/order.rs"]
mod order;
#[path = "e2e/otel.rs"]
mod otel;
#[path = "e2e/process.rs"]
mod process;
#[path = "e2e/receipts.rs"]
mod receipts;
#[path = "e2e/recorder.rs"]
mod recorder;
#[path = "e2e/shadow.rs"]
mod shadow;
#[path = "e2e/trial.rs"]
mod trial;
#[path = "e2e/waterfall.rs"]
mod waterfall;
