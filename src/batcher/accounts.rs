//! What each tenant's rows take: cells when their batch is sealed, executor time when it has run.
//!
//! A row is charged the place it takes: its own cells, and the padding behind them to the padded length of its batch. Not the
//! row that is the longest for all of it: a bill would then depend on how short the neighbours are whom the scheduler chose, and
//! it chose them because a place in this batch costs less than a batch of their own. It is also what fair queueing charges.
//! Time is charged by the same cells, fixed costs included. Rows that lie end to end are charged their own cells.
//!
//! Always true
//! - Over all tenants, cells are those of the batch and time is what the batch took, to the nanosecond.
//! - Nothing is allocated once every executor has run a batch with as many tenants as it will have.

use std::sync::Arc;

use crate::scheduler::{SealedBatch, TenantId};
use crate::telemetry::Telemetry;
use crate::telemetry::waterfall::divide;
use crate::vocab::Layout;

/// A tenant's part of a batch.
#[derive(Clone, Copy, Debug)]
struct Share {
    place: usize,
    real: u64,
    all: u64,
}

#[derive(Debug)]
pub struct Accounts {
    /// Batches that executors hold.
    running: Vec<(u64, Vec<Share>)>,
    spare: Vec<Vec<Share>>,
    telemetry: Arc<Telemetry>,
}

impl Accounts {
    pub fn new(telemetry: Arc<Telemetry>) -> Accounts {
        Accounts { running: Vec::new(), spare: Vec::new(), telemetry }
    }

    /// A batch was sealed: tenant, rows and length of each member.
    pub fn sealed(&mut self, batch: &SealedBatch, members: impl Iterator<Item = (TenantId, u32, u32)>) {
        let mut shares = self.spare.pop().unwrap_or_default();
        for (tenant, rows, len) in members {
            let place = Telemetry::tenant_place(tenant.0);
            let placed = match batch.layout {
                Layout::Padded => batch.padded_len,
                Layout::Packed => len,
            };
            let (real, all) = (u64::from(rows) * u64::from(len), u64::from(rows) * u64::from(placed));
            match shares.iter_mut().find(|share| share.place == place) {
                Some(share) => {
                    share.real += real;
                    share.all += all;
                }
                None => shares.push(Share { place, real, all }),
            }
        }
        let metrics = self.telemetry.model(batch.model);
        shares.iter().for_each(|share| metrics.tenant_cells(share.place, share.real, share.all - share.real));
        self.running.push((batch.id, shares));
    }

    /// A batch took so much of its executor's time.
    pub fn finished(&mut self, batch: u64, nanos: u64) {
        let Some(at) = self.running.iter().position(|(id, _)| *id == batch) else { return };
        let (_, mut shares) = self.running.swap_remove(at);
        let telemetry = &self.telemetry;
        divide(nanos, shares.iter().map(|share| share.all), |at, part| telemetry.tenant_ran(shares[at].place, part));
        shares.clear();
        self.spare.push(shares);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::telemetry::ModelLabels;
    use crate::vocab::{ModelHandle, Moment, SealReason};

    /// A number of the metrics page.
    fn counted(telemetry: &Arc<Telemetry>, series: &str) -> f64 {
        let page = telemetry.encode();
        let line =
            page.lines().find_map(|line| line.strip_prefix(series)).unwrap_or_else(|| panic!("{series}: {page}"));
        line.trim().parse().expect("a number")
    }

    #[test]
    fn each_row_pays_for_its_place_and_nothing_is_left_over() {
        let telemetry = Telemetry::new(&[ModelLabels { name: "m".into(), version: "1".into() }], 1, 1);
        telemetry.tenant_named(1, "red");
        telemetry.tenant_named(2, "blue");
        let mut accounts = Accounts::new(Arc::clone(&telemetry));
        let batch = |id, layout| SealedBatch {
            id,
            model: ModelHandle(0),
            executor: 0,
            rows: 4,
            rows_possible: 4,
            layout,
            padded_len: 10,
            cells_real: 21,
            squares_real: 0,
            reason: SealReason::Full,
            sealed_at: Moment(0),
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        };
        // A short row, the long one, and two of the nameless.
        let members = [(TenantId(1), 1, 5), (TenantId(2), 1, 10), (TenantId(0), 1, 3), (TenantId(0), 1, 3)];
        accounts.sealed(&batch(7, Layout::Padded), members.into_iter());
        let cells = |tenant: &str, kind: &str| {
            counted(&telemetry, &format!("ferry_tenant_cells_total{{model=\"m\",tenant=\"{tenant}\",kind=\"{kind}\"}}"))
        };
        assert_eq!((cells("red", "real"), cells("red", "padding")), (5.0, 5.0));
        assert_eq!((cells("other", "real"), cells("other", "padding")), (6.0, 14.0));
        assert_eq!(cells("blue", "real"), 10.0, "the longest row has no padding");
        accounts.finished(7, 1_001);
        let nanos = |tenant: &str| {
            1e9 * counted(&telemetry, &format!("ferry_tenant_executor_seconds_total{{tenant=\"{tenant}\"}}"))
        };
        let near = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-3, "{got} for {expected}");
        near(nanos("red"), 250.0);
        near(nanos("blue"), 250.0);
        near(nanos("other"), 501.0);
        // Rows end to end pay for what they are. A batch that is nobody's is charged to nobody.
        accounts.sealed(&batch(8, Layout::Packed), members.into_iter());
        accounts.finished(8, 2_100);
        accounts.finished(9, 5_000);
        near(nanos("red"), 750.0);
        near(nanos("blue"), 1_250.0);
        near(nanos("other"), 1_101.0);
    }
}
